"""Sharded embeddings saved by 4 ranks go on at 1, 2 and 3, and in plain modules; a kill leaves the old checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launching import ONE_HOST, Outcome, launch, mpirun
from torch import nn

from hvd_shadowsync.embedding import files

PROGRAM = Path(__file__).parent / "programs" / "embedding_files.py"
RULES = ("sgd", "rowwise", "adagrad", "adam")
SIZES = {"table": (301, 8), "rows": (1000, 4), "hashed": (777, 16), "columns": (123, 12), "everywhere": (20, 4)}


def start(size: int, folder: Path, *arguments: object) -> Outcome:
    command = [*mpirun(size), sys.executable, str(PROGRAM), *map(str, arguments)]
    return launch(command, folder / f"job-{len(list(folder.iterdir()))}", environ=ONE_HOST)


def visit(size: int, folder: Path, *arguments: object) -> None:
    outcome = start(size, folder, *arguments).require_success()
    assert len(outcome.events("passed")) == size


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory, jobs: Path) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    visit(4, jobs, "--save", folder)
    return folder


@pytest.mark.parametrize("size", [1, 2, 3])
def test_four_to(size: int, of_four: Path, jobs: Path) -> None:
    visit(size, jobs, "--load", of_four)


@pytest.mark.parametrize("rule", RULES)
def test_into_plain_modules(of_four: Path, rule: str) -> None:
    bags = {name: nn.EmbeddingBag(*shape) for name, shape in SIZES.items()}
    files.load_into(of_four / rule, bags)
    saved = torch.load(of_four / f"{rule}.pt", weights_only=True)
    for name, bag in bags.items():
        assert torch.equal(bag.weight, saved[name, "weight"])
        assert torch.equal(torch.cat([rows for _, rows in files.read(of_four / rule, name)]), bag.weight)


def test_a_rank_that_is_killed_while_it_saves_leaves_the_old_one(tmp_path: Path, jobs: Path) -> None:
    visit(2, jobs, "--save", tmp_path)
    index = (tmp_path / "sgd" / "index.json").read_bytes()
    for rank in range(2):
        outcome = start(2, jobs, "--save", tmp_path, "--die", rank)
        assert outcome.events("dies")
        assert outcome.code != 0
        assert not outcome.verdict
    assert (tmp_path / "sgd" / "index.json").read_bytes() == index
    assert len(list((tmp_path / "sgd").iterdir())) > 3
    visit(1, jobs, "--load", tmp_path, "--save", tmp_path)
    assert sorted(path.name[:5] for path in (tmp_path / "sgd").iterdir()) == ["index", "rows-"], "the rest is removed"
