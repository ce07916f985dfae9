"""A checkpoint of one world size goes on at another: 4 to 2, 4 to 1, 2 to 4, 1 to 2, and into a plain optimizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launching import ONE_HOST, launch, mpirun

PROGRAM = Path(__file__).parent / "programs" / "resume.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def visit(size: int, folder: Path, *arguments: object) -> None:
    command = [*mpirun(size), sys.executable, str(PROGRAM), *map(str, arguments)]
    outcome = launch(command, folder / f"job-{len(list(folder.iterdir()))}", environ=ONE_HOST)
    outcome.require_success()
    assert len(outcome.events("passed")) == size


@pytest.fixture(scope="module")
def of_four(folder: Path) -> Path:
    visit(4, folder, "--save", folder / "four.pt")
    return folder / "four.pt"


@pytest.fixture(scope="module")
def of_two(folder: Path, of_four: Path) -> Path:
    visit(2, folder, "--load", of_four, "--save", folder / "two.pt")
    return folder / "two.pt"


def test_four_to_two_to_four(folder: Path, of_two: Path) -> None:
    visit(4, folder, "--load", of_two)


def test_four_to_one_to_two(folder: Path, of_four: Path) -> None:
    visit(1, folder, "--load", of_four, "--save", folder / "one.pt")
    visit(2, folder, "--load", folder / "one.pt")


@pytest.mark.parametrize("algorithm", ["ma", "bmuf", "easgd"])
def test_into_a_script_that_never_heard_of_us(of_four: Path, algorithm: str) -> None:
    content = torch.load(f"{of_four}.{algorithm}", weights_only=True)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Tanh(), torch.nn.Linear(12, 1)
    )
    model.load_state_dict(content["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert all(int(state["step"]) == 12 for state in optimizer.state.values())
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()


def test_no_temporary_file_is_left(of_four: Path) -> None:
    assert sorted(path.name for path in of_four.parent.glob("*four*") if path.is_file()) == [
        "four.pt.bmuf", "four.pt.easgd", "four.pt.ma",
    ]  # fmt: skip
    assert not list(of_four.parent.glob(".*tmp"))
