"""The command line of the benchmark of quality, without a job: the list, the report, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

for module in ("scipy", "matplotlib", "horovod"):
    pytest.importorskip(module)

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "quality.py"
EMPTY = '{"about": {"machine": "m", "settings": {"batch_size": 256, "examples": 40960}}, "runs": []}'


def run(folder: Path, *options: str) -> None:
    """Call the program's `main`, under another name: examples has a module `quality` as well."""
    spec = importlib.util.spec_from_file_location("quality_benchmark", PROGRAM)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.main(["--quick", "--results", str(folder / "quality.json"), "--plots", str(folder / "plots"), *options])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--examples", "100"], "--examples 100: expected at least 2048"),
        (["--max-runs", "0"], "--max-runs 0: expected at least 1"),
        (["--other-rates", "0.1", "-1"], "--other-rates -1.0: expected finite values above 0"),
        (["--learning-rate", "nan"], "--learning-rate nan: expected finite values above 0"),
        (["--trainers", "3"], "invalid choice: 3"),
        (["--algorithms", "S-X"], "invalid choice: 'S-X'"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (None, ["--report-only"], "does not exist: leave --report-only out"),
        (EMPTY.replace("[]", '[{"run": {"method": "Horovod", "trainers": 2, "seed": 1, "learning_rate": 0.1}}]'), [],
         "exists: go on with --resume"),
        (EMPTY.replace("256", "1"), ["--resume"], "was measured with"),
        ("{}", ["--resume"], "holds no results of this benchmark"),
        ("", ["--resume"], "holds no results of this benchmark"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(
    text: str | None, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "quality.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_list_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--list", "--sweep", "--other-rates", "0.1", "0.2")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert ["sweep", "2", "S-MA, S-EASGD", "28", "28"] in [row[:5] for row in rows]
    assert ["other rates", "2", "Horovod, S-MA, S-EASGD, S-BMUF", "16", "16"] in [row[:5] for row in rows]
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(EMPTY)
    for method, trainers, every in (
        ("one process", 1, None), ("Horovod", 2, None), ("S-MA", 2, None), ("S-MA", 2, 30), ("S-MA", 2, 1000),
    ):  # fmt: skip
        for seed in (1, 2):
            made["runs"].append({
                "run": {"method": method, "trainers": trainers, "seed": seed, "learning_rate": 0.02,
                        "sync_every": every},
                "auc": 0.68 + seed / 1000, "normalised_entropy": 0.95, "steps": 160 // trainers, "examples": 40_960,
                "sync_gap_steps": None if every == 1000 else 30.0, "seconds": 1.0,
            })  # fmt: skip
    (tmp_path / "quality.json").write_text(json.dumps(made))
    run(tmp_path, "--report-only")
    output = capsys.readouterr().out
    assert "| 2 | S-MA | 1000 | at the end only | 2 | 0.6815 ± 0.0064 |" in output
    assert "| 2 | S-MA | 2 | 0.6815 ± 0.0064 | +0.0000 (+0.0000 to +0.0000) |" in output
    for name in ("quality_trainers.png", "quality_gap.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
