"""What goes wrong with sharded embeddings, as real processes: one error on all ranks, no hang, a code other than 0."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from launching import ONE_HOST, Outcome, launch, mpirun

PROGRAM = Path(__file__).parent / "programs" / "embedding_errors.py"
EXPECTED = {
    "lr": r"argument optimizer: SGD\(lr=0\.1\) on rank 0, SGD\(lr=0\.2\) on rank 2",
    "tables": r"replicas differ",
    "too large": r"rank 2: feature 'a' has the id 10 at place 1; table 'a' has rows 0 to 9",
    "negative": r"rank 2: feature 'b' has the id -1 at place 0; table 'b' has rows 0 to 5",
    "dtype": r"rank 2: ids of feature 'a' is of torch\.float32; give a tensor of torch\.int64 or torch\.int32",
    "offsets": r"rank 2: feature 'a' has offsets that begin with 2; the first has to be 0",
    "unknown feature": r"rank 2: inputs has the feature 'c', which no table has; known are a, b",
    "missing feature": r"rank 2: inputs lacks the feature 'b'; give all of a, b",
    "samples": r"rank 2: the features have different numbers of samples \(a: 2, b: 1\)",
    "another call": r"rank 0 is in an update \(backward\) while rank 2 is in a lookup \(forward\); all ranks have to",
    "another mode": r"rank 0 looks up for training while rank 2 looks up without gradients",
    "another order": r"rank 0 runs backward of lookup 1, rank 2 of lookup 2; run backward in the same order",
    "other weights": r"rank 0 and rank 2 make different calls: meeting 1, a lookup",
}


def run_case(folder: Path, case: str, ranks: int = 3) -> Outcome:
    return launch([*mpirun(ranks), sys.executable, str(PROGRAM), case], folder, timeout_s=90.0, environ=ONE_HOST)


def test_every_error_is_the_same_on_every_rank(tmp_path: Path) -> None:
    outcome = run_case(tmp_path, "too large")
    assert outcome.events("accepted") == []
    for name, message in EXPECTED.items():
        said = [each["text"] for each in outcome.events("refused") if each["what"] == name]
        assert len(said) == 3, (name, outcome.text)
        assert len(set(said)) == 1, said
        assert re.search(message, said[0]), said[0]
    require_failure(outcome, f"EmbeddingError: {EXPECTED['too large']}")


@pytest.mark.parametrize("case", ["another call", "offsets"])
def test_uncaught_it_ends_the_job(tmp_path: Path, case: str) -> None:
    require_failure(run_case(tmp_path, case), f"EmbeddingError: {EXPECTED[case]}")


def test_a_rank_that_ends_early_serves_the_others_to_the_end(tmp_path: Path) -> None:
    outcome = run_case(tmp_path, "exit").require_success()
    assert len(outcome.events("trained")) == 3


def test_a_rank_that_is_killed_ends_the_job(tmp_path: Path) -> None:
    outcome = run_case(tmp_path, "dies")
    assert not outcome.verdict, outcome.verdict
    assert outcome.code != 0
    assert outcome.left_over == []


def require_failure(outcome: Outcome, message: str) -> None:
    assert not outcome.verdict, outcome.verdict
    assert outcome.code != 0, outcome.text
    assert outcome.left_over == []
    assert re.search(message, outcome.errors), outcome.errors
