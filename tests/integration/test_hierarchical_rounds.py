"""Rounds of ranks on several hosts, several on each: a real job on emulated hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import find_mpi

from hvd_shadowsync import emulated
from hvd_shadowsync.launcher.command import LaunchError

TIMEOUT_S = 120
PROGRAM = """
import sys
import torch
import hvd_shadowsync
from hvd_shadowsync import ShadowSync
from mpi4py import MPI

comm = MPI.COMM_WORLD
torch.manual_seed(comm.rank)
weights = torch.nn.Parameter(torch.zeros(3_000_000))
optimizer = torch.optim.SGD([weights], lr=1.0)
options = {"wire_dtype": torch.float16} if sys.argv[1:] == ["half"] else {}
sync = ShadowSync(optimizer, sync_every=1, hierarchical=True, **options)
weights.grad = torch.full_like(weights, -float(comm.rank))
while sync.metrics()["rounds"] < 3:
    optimizer.step()
# The delta rule keeps the sum over the replicas, whatever was in flight: only steps move it.
sync.synchronize()
steps = comm.allgather(sync.metrics()["steps"])
expected = sum(rank * taken for rank, taken in enumerate(steps)) / comm.size
same = len(set(comm.allgather(weights.detach().numpy().tobytes()))) == 1
error = float((weights.detach() - expected).abs().max()) / max(expected, 1.0)
kind = type(sync._course.driver.rounds._reducer).__name__
sent = comm.allgather(sync.metrics()["bytes_sent"])
print("found", comm.rank, kind, same, error < 2e-3, sent[comm.rank] > sent[1 - comm.rank % 2 + comm.rank // 2 * 2])
sync.close()
"""


@pytest.mark.parametrize("precision", ["full", "half"])
def test_two_hosts_with_two_ranks_each(tmp_path: Path, precision: str) -> None:
    if find_mpi().kind != "openmpi":
        pytest.skip("needs Open MPI")
    try:
        emulated.run(emulated.Network(2), [sys.executable, "-c", ""], os.environ)
    except LaunchError as error:
        pytest.skip(str(error))
    script = tmp_path / "rounds.py"
    script.write_text(PROGRAM)
    options = ["--emulated", "2", "--rate", "1gbit", "-np", "4", "--threads", "1", "python", str(script), precision]
    command = [sys.executable, "-m", "hvd_shadowsync.run", *options]
    job = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert job.returncode == 0, job.stderr
    found = sorted(line.split()[1:] for line in job.stdout.splitlines() if line.startswith("found"))
    assert [line[:4] for line in found] == [[str(rank), "HierarchicalMean", "True", "True"] for rank in range(4)]
    assert [line[4] for line in found] == ["True", "False"] * 2, "the first rank of a host sends for both"
