"""The training program as one plain process: its record, its quality, and what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CTR = Path(__file__).parents[3] / "examples" / "ctr.py"
ALONE = {"OMPI_MCA_btl": "self", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def ctr(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CTR), *map(str, arguments)]
    environment = {**os.environ, **ALONE, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)


def test_plain_process_learns_and_writes_its_record(tmp_path: Path) -> None:
    done = ctr("--sync", "none", "--steps", 300, "--report", tmp_path / "deep" / "record.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "deep" / "record.json").read_text())
    assert (record["steps"], record["examples"], record["world_size"]) == (300, 300 * 256, 1)
    assert record["test"]["rows"] == 53_991 and record["test"]["auc"] > 0.62
    assert [entry["examples"] for entry in record["history"]] == [2560 * i for i in range(1, 31)]
    assert record["sync"]["rounds"] == 0 and record["examples_per_second"] > 0


def test_plain_process_with_sharded_tables_and_synthetic_rows(tmp_path: Path) -> None:
    """One rank has all tables, in another form: the same values to start with, and the same steps."""
    options = ["--sync", "none", "--synthetic-criteo", "rows=2000,examples=20480", "--log-every", 40]
    records = []
    for form in ("replicated", "sharded"):
        done = ctr(*options, "--embedding", form, "--report", tmp_path / form)
        assert done.returncode == 0, done.stderr
        records.append(json.loads((tmp_path / form).read_text()))
    replicated, sharded = records
    assert [record["name"] for record in records] == ["none", "none sharded"]
    assert [(record["steps"], record["embedding"]["rows"]) for record in records] == [(80, 2000)] * 2
    assert sharded["settings"]["data"] == ["synthetic-criteo"]
    assert sharded["settings"]["synthetic_criteo"] == {"rows": 2000, "examples": 20480}
    assert sharded["embedding"]["bytes_per_step"] == sharded["sync"]["bytes_sent"] == 0
    losses = [[entry["loss"] for entry in record["history"]] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert replicated["test"]["auc"] == pytest.approx(sharded["test"]["auc"], abs=1e-3)
    assert sharded["test"]["auc"] > 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefetch", "0"], "--prefetch belongs to --embedding sharded"),
        (["--placement", "row-wise"], "--placement belongs to --embedding sharded"),
        (["--embedding", "sharded", "--prefetch", "3"], "invalid choice: 3"),
        (["--synthetic-criteo", "10"], "'10': expected rows=N or rows=N,examples=M"),
        (["--synthetic-criteo", "rows=many"], "'rows=many': expected rows=N or rows=N,examples=M"),
        (["--synthetic-criteo", "rows=100,columns=3"], "'rows=100,columns=3': expected rows=N"),
        (["--synthetic-criteo", "rows=10"], "ctr.py: total_rows=10"),
        (["--synthetic-criteo", "rows=100", "--data", "flights"], "not allowed with argument"),
        (["--synthetic-criteo", "rows=100", "--validate"], "--validate belongs to --data flights"),
        (["--data", "criteo"], "expected the path"),
        (["--data", "criteo", "no/such/file"], "no/such/file does not exist. Name a Criteo file"),
        (["--data", "houses"], "expected flights, or criteo PATH"),
        (["--validate", "--data", "criteo", "x"], "--validate belongs to --data flights"),
        (["--lr", "0"], "--lr 0.0: expected a value above 0"),
        (["--sync", "sometimes"], "invalid choice: 'sometimes'"),
    ],
)
def test_bad_arguments_end_with_one_message(arguments: list[str], message: str) -> None:
    done = ctr("--sync", "none", *arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_truncated_criteo_row_ends_the_run(tmp_path: Path) -> None:
    row = "\t".join(["1", *["3"] * 13, *["0a1b2c3d"] * 26])
    (tmp_path / "train.txt").write_text("\n".join([row] * 900 + [row[:40]] + [row] * 99))
    done = ctr("--sync", "none", "--data", "criteo", tmp_path / "train.txt", "--batch-size", 64)
    assert done.returncode != 0 and done.stderr.count("Error: ") == 1
    assert "train.txt, line 901: " in done.stderr and "fields where 40 were expected" in done.stderr
