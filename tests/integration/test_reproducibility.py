"""`deterministic=True`: two jobs leave the same bits, whatever the timing and whatever the MPI library prefers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import ONE_HOST, launch, mpirun

PROGRAM = Path(__file__).parent / "programs" / "repeatable.py"
OTHER_CHOICES = {
    "OMPI_MCA_coll_libnbc_iallreduce_algorithm": "recursive_doubling",
    "OMPI_MCA_coll_libnbc_iallgather_algorithm": "recursive_doubling",
    "OMPI_MCA_coll_libnbc_ialltoall_algorithm": "pairwise",
}
"""Of Open MPI; other libraries do not read them."""
Found = dict[str, dict[str, str]]


def trained(size: int, folder: Path, seed: int, *more: str, environ: dict[str, str] | None = None) -> list[Found]:
    """Return the digests of all that each rank has at the end, by case and name."""
    command = [*mpirun(size), sys.executable, str(PROGRAM), str(folder / "found"), str(seed), *more]
    outcome = launch(command, folder, timeout_s=100.0, environ={**ONE_HOST, **(environ or {})}).require_success()
    assert len(outcome.events("passed")) == size
    return [json.loads((folder / "found" / f"{rank}.json").read_text()) for rank in range(size)]


def differences(left: list[Found], right: list[Found]) -> list[Any]:
    return [
        (rank, case, name)
        for rank, (one, other) in enumerate(zip(left, right, strict=True))
        for case in one
        for name in one[case]
        if one[case][name] != other[case][name]
    ]


@pytest.mark.timeout(320)
@pytest.mark.parametrize("size", [2, 4])
def test_two_runs_leave_the_same_bits(size: int, tmp_path: Path) -> None:
    """The second one with other timing, and with other algorithms inside of MPI's collectives."""
    first = trained(size, tmp_path / "first", 1)
    second = trained(size, tmp_path / "second", 1, "--uneven-timing", environ=OTHER_CHOICES)
    assert differences(first, second) == []
    assert all(len(case) > 20 for rank in first for case in rank.values())
    for rank in first[1:]:
        for case, found in rank.items():
            shared = [name for name in found if "last" not in name and "rows_" not in name]
            assert all(found[name] == first[0][case][name] for name in shared), "and the ranks are the same at the end"


@pytest.mark.timeout(220)
def test_another_seed_leaves_other_bits(tmp_path: Path) -> None:
    """The test above could not fail if what it compares did not depend on the training."""
    one, other = (trained(2, tmp_path / str(seed), seed) for seed in (1, 2))
    different = {(case, name) for _, case, name in differences(one, other)}
    for case in one[0]:
        assert (case, "top.1.weight") in different
