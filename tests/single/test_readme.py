"""The README names tests that exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_each_row_of_its_tables_of_failures_names_tests_that_exist() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## When something fails\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    named = re.findall(r"`(\w*test_\w+)`", section[1])
    found: Counter[str] = Counter()
    for file in (REPOSITORY / "tests").rglob("test_*.py"):
        found.update(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(set(named)) > 40
    assert [name for name in named if found[name] != 1] == []
    rows = [line for line in section[1].splitlines() if line.startswith("| ") and line.rstrip().endswith("|")]
    heads = [line for line in rows if line.rstrip().endswith("| test |")]
    assert len(heads) == 4
    of_failures = [line for line in rows[rows.index(heads[0]) : rows.index(_first_other(rows))] if line not in heads]
    assert [line for line in of_failures if "`test_" not in line] == []


def _first_other(rows: list[str]) -> str:
    """Return the head of the first table that is not about what happens."""
    return next(line for line in rows if line.startswith("| | "))
