"""hivemind's Optimizer with local updates: each peer steps for itself, a background thread averages the parameters.

From the configuration guide of hivemind.Optimizer: local updates ("fully asynchronous"), state averaging in the
background (its default), 16-bit compression. Peers average after an epoch, for which they first look for each other
during the matchmaking time. The guide has 3 to 5 s for that in small local runs, less where latency is low, and wants
epochs that are long beside it; 1 s is taken, and epochs of several seconds of training. With 30 steps, as the others
have, averaging takes longer than an epoch, and next to nothing is trained: in version 1.1.12 a local step waits for
the averaging that is under way, matchmaking included.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import hivemind
from contender import Asked, Contender
from hivemind.compression import Float16Compression

MATCHMAKING_S = 1.0
REQUEST_S = 0.5  # it warns where this is not below the matchmaking time


def make(asked: Asked) -> Contender:
    """Return hivemind's optimizer around the task's."""
    address = socket.gethostname() if os.environ.get("SHADOW_EMULATED") else "127.0.0.1"
    peers = asked.folder / "peers"
    known = [] if asked.place.rank == 0 else wait_for(peers)
    dht = hivemind.DHT(host_maddrs=[f"/ip4/{address}/tcp/0"], initial_peers=known, start=True)
    if asked.place.rank == 0:
        written = asked.folder / "peers.new"
        written.write_text("\n".join(str(each) for each in dht.get_visible_maddrs()))
        written.rename(peers)
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="compare",
        batch_size_per_step=asked.batch,
        target_batch_size=asked.batch * asked.place.size * asked.every,
        optimizer=asked.task.optimizer(),
        use_local_updates=True,
        state_averaging_compression=Float16Compression(),
        matchmaking_time=MATCHMAKING_S,
        averaging_timeout=30.0,
        averager_opts={"request_timeout": REQUEST_S},
    )

    def metrics() -> dict[str, float]:
        return {"rounds": optimizer.local_epoch}

    def close() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # an orderly end waits for time-outs; what is left of it ends with the run's processes

    return Contender(asked.task.model, optimizer, period_steps=None, sync_gap_steps=None, metrics=metrics, close=close)


def wait_for(peers: Path) -> list[str]:
    while not peers.exists():
        time.sleep(0.02)  # the run has a time-out
    return peers.read_text().split("\n")
