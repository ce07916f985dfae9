"""Counters and timings of rounds as a plain dict, per rank and merged; JSON lines and TensorBoard scalars of it."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

MERGED_BY_SUM = ("bytes_sent", "times_healed")
MERGED_BY_MAX = ("rounds", "ranks_lost", "ranks_replaced", "recovery_ms")
COUNTERS = ("steps", "rounds", "steps_at_last_round")
"""What a checkpoint keeps."""


@dataclass
class RoundMetrics:
    """What is counted while rounds run; the shadow thread writes, any thread reads.

    `snapshot()` gives:

    | key | meaning |
    |---|---|
    | steps | training steps of this rank |
    | rounds | rounds that reached this rank's weights |
    | sync_gap_steps | training steps per round, on average (nan before the first round) |
    | in_flight_ms | from snapshot to staged result, on average |
    | merge_ms | the training thread's part of a round, on average |
    | bytes_sent | bytes that this rank put on the wire for weights |
    | cpu_share | CPU time of the communicator thread and of merges, per second of wall clock |
    | distance | of the replica from the last round's anchor, over the anchor's norm, on a sample of each slice |
    | surviving_progress | share of the last round's in-flight steps that the merge kept, on a sample of weights |
    | chunk_bytes | what a round puts into one collective call; nan where it is not sent in chunks |
    | chunks_in_flight | how many of those are under way at a time; nan likewise |
    | pause_ms | longest pause between two looks at them; nan likewise |
    | searching | 1 while rounds still try what to choose for these three, 0 then |
    | times_healed | how often this rank's replica had NaN or infinity and took over the others' numbers |
    | ranks_lost | ranks that were lost since the handle's construction, or since this one took a lost one's place |
    | ranks_replaced | of those, how many were replaced (`shadowrun --respawn`); the others go on without the rest |
    | gap_wait_ms | how long training has waited at `max_sync_gap`, in all |
    | recovery_ms | how long it has taken, in all, to be without them |
    """

    steps: int = 0
    rounds: int = 0
    steps_at_last_round: int = 0
    in_flight_s: float = 0.0
    merge_s: float = 0.0
    bytes_sent: int = 0
    cpu_s: float = 0.0
    distance: float = math.nan
    surviving_progress: float = math.nan
    progress: Callable[[], float] | None = None
    """What the last merge kept of the progress in flight, if it is not known yet."""
    chunk_bytes: float = math.nan
    chunks_in_flight: float = math.nan
    pause_ms: float = math.nan
    searching: bool = False
    times_healed: int = 0
    ranks_lost: int = 0
    ranks_replaced: int = 0
    gap_wait_s: float = 0.0
    recovery_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def snapshot(self) -> dict[str, float]:
        """Return the figures so far."""
        self.settle()
        with self.lock:
            per_round = 1.0 / self.rounds if self.rounds else math.nan
            return {
                "steps": self.steps,
                "rounds": self.rounds,
                "sync_gap_steps": self.steps_at_last_round * per_round,
                "in_flight_ms": 1000 * self.in_flight_s * per_round,
                "merge_ms": 1000 * self.merge_s * per_round,
                "bytes_sent": self.bytes_sent,
                "cpu_share": (self.cpu_s + self.merge_s) / max(time.monotonic() - self.started, 1e-9),
                "distance": self.distance,
                "surviving_progress": self.surviving_progress,
                "chunk_bytes": self.chunk_bytes,
                "chunks_in_flight": self.chunks_in_flight,
                "pause_ms": self.pause_ms,
                "searching": float(self.searching),
                "times_healed": self.times_healed,
                "ranks_lost": self.ranks_lost,
                "ranks_replaced": self.ranks_replaced,
                "gap_wait_ms": 1000 * self.gap_wait_s,
                "recovery_ms": 1000 * self.recovery_s,
            }

    def note_lost(self, lost: int, replaced: int, recovery_s: float) -> None:
        """Take note of ranks lost by now, of those replaced, and of how long it has taken, in all, to go on."""
        with self.lock:
            self.ranks_lost, self.ranks_replaced, self.recovery_s = lost, replaced, recovery_s

    def settle(self) -> None:
        """Find out what the last merge kept; not at the merge, which would wait for a GPU then."""
        with self.lock:
            progress, self.progress = self.progress, None
        surviving = math.nan if progress is None else progress()
        if not math.isnan(surviving):
            self.surviving_progress = surviving

    def restore(self, counters: Mapping[str, int]) -> None:
        """Go on counting from the counters of a checkpoint."""
        with self.lock:
            self.steps = int(counters["steps"])
            self.rounds = int(counters["rounds"])
            self.steps_at_last_round = int(counters["steps_at_last_round"])

    def counters(self) -> dict[str, int]:
        """Return the counters that a checkpoint keeps."""
        with self.lock:
            return {"steps": self.steps, "rounds": self.rounds, "steps_at_last_round": self.steps_at_last_round}


def merge(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return one dict for all ranks: bytes summed, the most rounds, the rest averaged over ranks that have a value."""
    return {key: _merge_one(key, [rank[key] for rank in ranks]) for key in ranks[0]}


def _merge_one(key: str, values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    if key in MERGED_BY_SUM:
        return sum(known)
    if key in MERGED_BY_MAX:
        return max(known)
    return sum(known) / len(known) if known else math.nan


class JsonLinesWriter:
    """Appends metrics to a file, one JSON object a line; values that JSON does not have (nan, inf) become null."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Append `metrics` with the key `step`."""
        record = {"step": step, **{key: value if math.isfinite(value) else None for key, value in metrics.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def __enter__(self) -> JsonLinesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardWriter:
    """Writes metrics as TensorBoard scalars `shadowsync/<key>`; needs the package tensorboard."""

    def __init__(self, log_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"TensorBoardWriter needs tensorboard ({error}); pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(log_dir))

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Write each finite value of `metrics` at `step`."""
        for key, value in metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"shadowsync/{key}", value, step)

    def close(self) -> None:
        """Flush and close; idempotent."""
        self._writer.close()

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
