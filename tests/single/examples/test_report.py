"""The report: groups, figures of the table, and files that stand alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import report


def record(
    name: str, *, seed: int, auc: float | None = 0.7, lr: float = 0.02, gap: float | None = 4.0
) -> dict[str, Any]:
    return {
        "name": name,
        "settings": {"lr": lr, "seed": seed, "report": f"{seed}.json"},
        "world_size": 2,
        "examples_per_second": 1000.0 * seed,
        "test": {"auc": auc, "normalised_entropy": 0.95},
        "sync": {"rounds": 5, "sync_gap_steps": gap, "bytes_sent": 2_000_000},
        "history": [
            {"examples": 512 * i, "seconds": 0.1 * i, "loss": 1 / (i + 1), "sync_gap": gap if i % 2 else None}
            for i in range(9)
        ],
    }


def test_seeds_are_one_row_with_mean_and_deviation() -> None:
    groups = report.group([record("a", seed=1, auc=0.70), record("a", seed=3, auc=0.72), record("b", seed=1)])
    assert report.rows(groups) == [
        ["a", "2", "2000 ± 1414", "0.7100 ± 0.0141", "0.9500 ± 0.0000", "4.0 ± 0.0", "5 ± 0", "2.0 ± 0.0"],
        ["b", "1", "1000", "0.7000", "0.9500", "4.0", "5", "2.0"],
    ]


def test_other_settings_are_other_rows_named_by_what_differs() -> None:
    groups = report.group([record("a", seed=1), record("a", seed=1, lr=0.1), record("b", seed=1)])
    assert list(groups) == ["a lr=0.02", "a lr=0.1", "b"]


def test_values_that_are_not_there_are_a_dash() -> None:
    (row,) = report.rows(report.group([record("none", seed=1, auc=None, gap=None)]))
    assert row[3] == "-" and row[5] == "-"


def test_files_stand_alone(tmp_path: Path) -> None:
    records = [record("<horovod>", seed=1, gap=1.0), record("none", seed=1, gap=None), record("short", seed=1)]
    records[2]["history"] = []
    table = report.write(records, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8").startswith(table)
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page and "&lt;horovod&gt;" in page and "<horovod>" not in page
    assert "http" not in page and "lr" in page


def test_wrong_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; write it with"):
        report.load([tmp_path / "none.json"])
    for text, message in (("{", "is no record"), ("{}", "lacks examples_per_second"), ("3", "is no record")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            report.load([tmp_path / "bad.json"])
    (tmp_path / "good.json").write_text(json.dumps(record("a", seed=1)))
    assert report.load([tmp_path / "good.json"])[0]["name"] == "a"
