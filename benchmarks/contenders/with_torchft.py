"""torchft: LocalSGD, and DiLoCo in its streaming form, over its Gloo group, with a lighthouse on rank 0.

Settings are those of its example train_diloco.py: a synchronous quorum, which DiLoCo demands, an outer SGD of rate 0.7
with Nesterov momentum 0.9, and with streaming two fragments of the model whose averages arrive five steps after they
were sent. Streaming is the form that overlaps communication with steps, hence the stronger one here; gradients are put
in buckets. Quantisation needs a GPU. Each rank is a replica group of its own. Both synchronise every 30 steps, the
longer of the periods that are compared: DiLoCo is meant for long ones.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torchft
from contender import Asked, Contender
from torch import nn
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo, LocalSGD

TIMEOUT = timedelta(seconds=60)


def make(asked: Asked) -> Contender:
    """Return the inner optimizer, whose step hooks synchronise."""
    model, optimizer = asked.task.model, asked.task.optimizer()
    lighthouse = start_lighthouse(asked) if asked.place.rank == 0 else None
    store = TCPStore(own_address(), 0, is_master=True, wait_for_workers=False)
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        min_replica_size=asked.place.size,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr=own_address(),
        store_port=store.port,
        lighthouse_addr=lighthouse_address(asked.folder),
        replica_id=f"rank{asked.place.rank}",
        hostname=own_address(),
        init_sync=False,  # replicas begin alike: all are made from one seed
    )
    averaging = averaging_of(asked, manager, model, optimizer)
    averaging.__enter__()

    def close() -> None:
        averaging.__exit__(None, None, None)
        sys.stdout.flush()
        sys.stderr.flush()
        if lighthouse is not None:
            time.sleep(1.0)  # others are still speaking to it
        os._exit(0)  # its threads' end is no part of this, and waits for time-outs

    # The store and the lighthouse live as long as `close` does.
    close.keeps = (store, lighthouse, manager)  # type: ignore[attr-defined]
    every = asked.every
    return Contender(model, optimizer, period_steps=every, sync_gap_steps=float(every), close=close)


def averaging_of(asked: Asked, manager: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    if asked.variant == "local-sgd":
        return LocalSGD(manager, model, optimizer, sync_every=asked.every)
    fragments = halves(model)
    outer = [torch.optim.SGD(each.parameters(), lr=0.7, momentum=0.9, nesterov=True) for each in fragments]
    return DiLoCo(
        manager, fragments, optimizer, outer, sync_every=asked.every, fragment_sync_delay=5, use_bucketization=True
    )


def halves(model: nn.Module) -> list[nn.Module]:
    """Cut the model between two of its children, where its halves are most alike in size."""
    children = list(model.children())
    sizes = [sum(param.numel() for param in child.parameters()) for child in children]
    cut = min(range(1, len(children)), key=lambda at: abs(sum(sizes[:at]) - sum(sizes[at:])))
    return [nn.ModuleList(children[:cut]), nn.ModuleList(children[cut:])]


def start_lighthouse(asked: Asked) -> Any:
    """Start it on rank 0 and write its address for the others."""
    server = LighthouseServer(bind=f"{own_address()}:0", min_replicas=asked.place.size, join_timeout_ms=10_000)
    port = server.address().rsplit(":", 1)[1].rstrip("/")
    written = asked.folder / "lighthouse.new"
    written.write_text(f"http://{own_address()}:{port}")
    written.rename(asked.folder / "lighthouse")
    return server


def lighthouse_address(folder: Path) -> str:
    while not (folder / "lighthouse").exists():
        time.sleep(0.02)  # the run has a time-out
    return (folder / "lighthouse").read_text()


def own_address() -> str:
    """Return this host's address: an emulated host has it for a name."""
    return socket.gethostname() if os.environ.get("SHADOW_EMULATED") else "127.0.0.1"
