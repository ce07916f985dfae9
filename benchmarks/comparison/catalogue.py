"""The contenders: which file makes them, how they are started, in which environment, and on what they cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

HEAD_START_S = 5.0
NO_TABLES = "knows no embedding tables that are divided over ranks"


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: as in tables and records; "k=" is followed by the steps between two synchronisations.
        module: the file in `contenders/`.
        variant: which of its ways.
        every: that k; 0: there is none.
        every_s: instead of k: so many seconds of training, as steps of about the workload's length.
        least_s: of training that have to be measured for it to synchronise.
        warm_s: of training before that, at least.
        pauses: whether its synchronisation can pause, which is measured as well.
        on_request: whether it runs only where it is named.
        launcher: "mpi" is shadowrun; "plain" starts a process on each host with what torch.distributed reads.
        peers: whether it runs in the peers' environment (`launch/peers`), not in the project's.
        tables: on "dlrm-criteo": whether it has sharded tables ("yes"), or is for nothing else ("only"), or why it
            cannot run.
    """

    name: str
    module: str
    variant: str = ""
    every: int = 0
    every_s: float = 0.0
    least_s: float = 0.0
    warm_s: float = 0.0
    pauses: bool = False
    on_request: bool = False
    launcher: Literal["mpi", "plain"] = "plain"
    peers: bool = False
    tables: str = NO_TABLES

    def why_not(self, workload: str) -> str:
        """Return why it does not run a workload; empty where it does."""
        if workload == "dlrm-criteo":
            return "" if self.tables in ("yes", "only") else self.tables
        return "is measured where tables are sharded; its dense part is ddp" if self.tables == "only" else ""


def ours() -> list[Contender]:
    """Return the background algorithms, and each one's foreground twin with k = 5 and 30.

    What those in the background do at first, a head start of their budget and the search for how to send, is over
    before anything is measured.
    """
    shared = {"module": "with_shadowsync", "launcher": "mpi", "tables": "yes"}
    names = ("ma", "easgd", "bmuf")
    background = [
        Contender(f"S-{name.upper()}", variant=name, warm_s=HEAD_START_S, pauses=True, **shared) for name in names
    ]
    twins = [
        Contender(f"FR-{name.upper()} k={every}", variant=name, every=every, **shared)
        for name in names
        for every in (5, 30)
    ]
    others = [
        Contender(
            f"S-MA {options}", variant=f"ma {options}", warm_s=HEAD_START_S, pauses=True, on_request=True, **shared
        )
        for options in (
            "cpu_budget=0.05",
            "cpu_budget=0.07",
            "cpu_budget=0.1",
            "wire_dtype=float16",
            "cpu_budget=0.1 wire_dtype=float16",
        )
    ]
    return background + twins + others


DDP_TABLES = "replicates what it is given; with sharded tables its documented form is torchrec's, see there"
CATALOGUE = [
    Contender("none", "alone", launcher="mpi", tables="yes"),
    Contender("none (peers)", "alone", peers=True, tables="has no sharded tables of this project there"),
    Contender("horovod", "with_horovod", launcher="mpi", tables="yes"),
    Contender("horovod fp16", "with_horovod", "fp16", launcher="mpi", tables="yes"),
    Contender("ddp", "with_torch", "ddp", tables=DDP_TABLES),
    Contender("post-local SGD k=5", "with_torch", "post-local", 5, tables=DDP_TABLES),
    Contender("post-local SGD k=30", "with_torch", "post-local", 30, tables=DDP_TABLES),
    Contender("torchft LocalSGD k=30", "with_torchft", "local-sgd", 30, peers=True),
    Contender("torchft DiLoCo k=30", "with_torchft", "diloco", 30, peers=True),
    Contender("hivemind", "with_hivemind", "local", every_s=6.0, least_s=15.0, peers=True),
    Contender("torchrec", "with_torchrec", peers=True, tables="only"),
    *ours(),
    *(
        Contender(f"sockets k={every}", "with_sockets", every=every, pauses=True, on_request=True)
        for every in (8, 16, 40)
    ),
]


def matching(patterns: Sequence[str]) -> list[Contender]:
    """Return the contenders that one of the patterns names, in the catalogue's order.

    Without patterns it is all but those on request, which have to be named in full.

    Raises:
        ValueError: a pattern names none.
    """
    found = [
        each for each in CATALOGUE
        if (not patterns and not each.on_request) or any(_fits(each, pattern) for pattern in patterns)
    ]  # fmt: skip
    for pattern in patterns:
        if not any(_fits(each, pattern) for each in CATALOGUE):
            known = ", ".join(repr(each.name) for each in CATALOGUE)
            raise ValueError(f"--contenders {pattern!r} names none; there are {known}, and patterns such as 'FR-*'")
    return found


def _fits(contender: Contender, pattern: str) -> bool:
    name, pattern = contender.name.lower(), pattern.lower()
    return name == pattern or (not contender.on_request and fnmatch(name, pattern))
