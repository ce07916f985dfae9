"""What the training loop asks of a contender, and what a contender is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import nn
from workloads import Task


@dataclass(frozen=True)
class Place:
    """This process among the ranks: its rank, from 0, and how many there are."""

    rank: int
    size: int

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] = os.environ) -> Place:
        """Read what mpirun or `start.py` set; alone otherwise."""
        for rank, size in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("RANK", "WORLD_SIZE")):
            if rank in environ:
                return cls(int(environ[rank]), int(environ[size]))
        return cls(0, 1)


@dataclass(frozen=True)
class Asked:
    """What is to be made.

    Attributes:
        task: the model, its loss and its optimizer.
        place: this rank.
        variant: which of the framework's ways; the module knows the names.
        every: steps between two synchronisations, where the variant has a period.
        batch: examples a step and rank.
        folder: of this run, which all ranks see.
    """

    task: Task
    place: Place
    variant: str
    every: int
    batch: int
    folder: Path


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Contender:
    """A model and an optimizer that the loop calls as in a script of one process.

    Attributes:
        model: called with a batch's inputs.
        optimizer: steps after `backward()`.
        period_steps: ranks have to take equally many steps, a multiple of this; None: they go each at its own pace.
        sync_gap_steps: steps between two synchronisations, where that is known beforehand.
        metrics: counters so far: rounds, and in_flight_ms of them on average where that is known; or nothing.
        pause: begin no more synchronisation, and let `resume` begin it again; the same in turns shows what it takes.
        close: the framework's own end.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    _: KW_ONLY
    period_steps: int | None
    sync_gap_steps: float | None
    metrics: Callable[[], dict[str, float]] = dict
    pause: Callable[[], None] | None = None
    resume: Callable[[], None] = nothing
    close: Callable[[], None] = nothing
