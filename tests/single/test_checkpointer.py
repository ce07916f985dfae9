"""`Checkpointer` on ranks that are threads: what is written, when, what is refused, and the end of a job."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_as_threads import (
    TIMEOUT_S,
    Content,
    content,
    make_model,
    on_ranks,
    same,
    sgd,
    train,
)

from hvd_shadowsync import BMUF, Checkpointer, CheckpointError, ElasticAveraging, ModelAveraging, ShadowSync, checkpoint
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.checkpointing import checkpointer as checkpointers
from hvd_shadowsync.checkpointing import folder as folders
from hvd_shadowsync.checkpointing import writer as writers
from hvd_shadowsync.checkpointing.folder import Draft
from hvd_shadowsync.checkpointing.writer import DigestedFile
from hvd_shadowsync.comm import local
from hvd_shadowsync.comm.base import Communicator

FOREGROUND: dict[str, Any] = {"sync_every": 2, "foreground": True}
NEVER: dict[str, Any] = {"every_s": 1e6}
ALGORITHMS = [ModelAveraging(), BMUF(), BMUF(block_momentum=0.5, nesterov=True), ElasticAveraging()]
PATIENCE_S = 20.0


def on_checkpointers(
    size: int,
    folder: Path,
    use: Callable[[Any], Any],
    options: dict[str, Any] | None = None,
    *,
    outlives: bool = False,
    **more: Any,
) -> list[Any]:
    """Return what `use` gives on each rank, for a namespace with model, optimizer, sync and checkpointer."""

    class Job:
        def __init__(self, comm: Communicator) -> None:
            self.rank, self.comm = comm.rank, comm
            self.model = make_model(comm.rank)
            self.optimizer = sgd(self.model, momentum=0.9)
            sync_options = {**FOREGROUND, **(options or {})}
            self.sync = ShadowSync(self.optimizer, model=self.model, communicator=comm, **sync_options)
            self.checkpointer = Checkpointer(folder, self.model, self.sync, **{**NEVER, **more})
            self.steps = 0

        def train(self, steps: int, after: Callable[[], object] = lambda: None) -> None:
            train(self.model, self.optimizer, steps, stream=self.rank, first=self.steps, after=after)
            self.steps += steps

        def written(self, number: int) -> None:
            """Wait until rank 0 has written `number` checkpoints."""
            deadline = time.monotonic() + PATIENCE_S
            while self.rank == 0 and self.checkpointer.metrics()["checkpoints"] < number:
                assert time.monotonic() < deadline, self.checkpointer.last_error
                time.sleep(0.001)
            self.checkpointer._writer.wait()

        def failed(self, number: int) -> None:
            """Wait until rank 0 has failed `number` times."""
            deadline = time.monotonic() + PATIENCE_S
            while self.rank == 0 and self.checkpointer.metrics()["checkpoint_failures"] < number:
                assert time.monotonic() < deadline, self.checkpointer.last_error
                time.sleep(0.001)
            self.checkpointer._writer.wait()

    def program(comm: Communicator) -> Any:
        job = Job(comm)
        try:
            return use(job)
        finally:
            job.checkpointer.close()
            job.sync.close()

    return local.run(size, program, timeout_s=TIMEOUT_S, kill={} if outlives else None)


def saved_in(path: Path) -> dict[str, Any]:
    return checkpoint.read(path / "model.pt")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_the_model_is_what_a_round_makes_of_the_replicas(algorithm: Algorithm, tmp_path: Path) -> None:
    """In the foreground, with alpha = 1, replicas are at the anchor after each round: that has to be in the file."""

    def use(job: Any) -> tuple[Content, dict[str, Any]]:
        job.train(4)
        job.written(1)
        return content(job.model), job.optimizer.state_dict()

    options = {"algorithm": algorithm}
    found = on_checkpointers(2, tmp_path, use, options, every_steps=3)
    saved = saved_in(tmp_path / "step-4")
    if not isinstance(algorithm, ElasticAveraging):
        assert all(torch.allclose(found[0][0][name], value, atol=1e-6) for name, value in saved["model"].items())
    assert saved["model"].keys() == found[0][0].keys()
    ours, theirs = found[0][1], saved["optimizer"]
    assert theirs["param_groups"] == ours["param_groups"]
    assert all(
        torch.equal(theirs["state"][i]["momentum_buffer"], s["momentum_buffer"]) for i, s in ours["state"].items()
    )
    rounds = theirs["shadow_sync"]
    assert rounds["counters"] == ours["shadow_sync"]["counters"] == {"steps": 4, "rounds": 2, "steps_at_last_round": 4}
    assert rounds["algorithm"] == ours["shadow_sync"]["algorithm"]
    for name in set(rounds["state"]) - {"center"}:
        assert same(rounds["state"][name], ours["shadow_sync"]["state"][name])


def test_the_elastic_center_is_what_this_rank_was_answered(tmp_path: Path) -> None:
    """FR-EASGD goes in rank order: rank 0 is answered by the center after its own exchange."""

    def use(job: Any) -> tuple[Content, Content]:
        job.train(1)
        before = content(job.model)
        job.train(1)
        job.written(1)
        return before, content(job.model)

    start = content(make_model(0))
    options = {"algorithm": ElasticAveraging(alpha=1.0), "sync_every": 1}
    (_, after), _ = on_checkpointers(2, tmp_path, use, options, every_steps=1)
    saved = saved_in(tmp_path / "step-2")
    weights = [name for name, _ in make_model().named_parameters()]
    assert all(torch.equal(saved["model"][name], after[name]) for name in weights)
    assert any(not torch.equal(saved["model"][name], start[name]) for name in weights)
    assert all(torch.equal(saved["optimizer"]["shadow_sync"]["state"]["center"][n], saved["model"][n]) for n in weights)


@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF(), ElasticAveraging()], ids=str)
def test_the_same_in_the_background(algorithm: Algorithm, tmp_path: Path) -> None:
    """Steps that move nothing: wherever a round takes its snapshot, the mean is that of the replicas."""

    def use(job: Any) -> Content:
        job.train(3)
        job.sync.synchronize()
        for group in job.optimizer.param_groups:
            group["lr"] = 0.0
        weights = content(job.model)
        job.train(1)
        job.checkpointer._every_steps = 1
        deadline = time.monotonic() + PATIENCE_S
        while not Checkpointer.latest(tmp_path):
            job.train(1)
            assert time.monotonic() < deadline
        return weights

    found = on_checkpointers(2, tmp_path, use, {"algorithm": algorithm, "foreground": False, "sync_every": 1})
    latest = Checkpointer.latest(tmp_path)
    assert latest is not None
    saved = saved_in(latest)
    for name, _ in make_model().named_parameters():
        assert torch.allclose(saved["model"][name], found[0][name], atol=1e-5), name
    assert set(saved["optimizer"]["shadow_sync"]["state"]) >= set(
        {"ElasticAveraging": ["center"], "BMUF": ["global_model"]}.get(type(algorithm).__name__, [])
    )


def test_alone_and_in_the_warmup_it_is_the_live_weights(tmp_path: Path) -> None:
    def use(job: Any) -> Content:
        job.train(5)
        job.written(1)
        return content(job.model)

    (alone,) = on_checkpointers(1, tmp_path / "alone", use, every_steps=5)
    assert same(saved_in(tmp_path / "alone" / "step-5")["model"], alone)
    warm = on_checkpointers(2, tmp_path / "warm", use, {"warmup_steps": 9, "sync_buffers": False}, every_steps=5)
    assert same(saved_in(tmp_path / "warm" / "step-5")["model"], warm[0])


def test_half_precision_complex_frozen_and_integer_tensors_keep_their_types(tmp_path: Path) -> None:
    def program(comm: Communicator) -> Content:
        model = torch.nn.Module()
        model.low = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        model.complex = torch.nn.Parameter(torch.full((3, 2), 1 + 2j))
        model.frozen = torch.nn.Parameter(torch.arange(4.0), requires_grad=False)
        model.register_buffer("count", torch.arange(6).view(2, 3) + 100 * comm.rank)
        optimizer = torch.optim.SGD([model.low, model.complex], lr=0.1)
        with (
            ShadowSync(optimizer, model=model, communicator=comm, **FOREGROUND) as sync,
            Checkpointer(tmp_path, model, sync, every_steps=1) as checkpointer,
        ):
            for _ in range(2):
                for param in (model.low, model.complex):
                    param.grad = torch.ones_like(param)
                optimizer.step()
            checkpointer._writer.wait()
            return content(model)

    found = on_ranks(2, program)[0]
    latest = Checkpointer.latest(tmp_path)
    assert latest is not None
    model = saved_in(latest)["model"]
    assert same({**model, "low": found["low"]}, found)
    assert model["low"].dtype == torch.bfloat16


def test_a_mask_may_be_infinite(tmp_path: Path) -> None:
    def use(job: Any) -> None:
        job.model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        job.train(1)
        assert job.checkpointer.save_now() == tmp_path / "step-1"
        job.model.mask[0] = torch.nan
        assert job.checkpointer.save_now() is None

    on_checkpointers(1, tmp_path, use)


def test_extra_is_taken_at_the_boundary(tmp_path: Path) -> None:
    values = torch.zeros(2)

    def use(job: Any) -> None:
        job.checkpointer.extra = lambda: {"values": values, "steps": job.sync.steps}
        job.train(1)
        values.fill_(1)
        job.written(1)

    on_checkpointers(1, tmp_path, use, every_steps=1)
    extra = saved_in(tmp_path / "step-1")["extra"]
    assert extra["steps"] == 1
    assert extra["values"].tolist() == [0, 0]


def test_a_plain_script_reads_it(tmp_path: Path) -> None:
    on_checkpointers(2, tmp_path, lambda job: (job.train(3), job.checkpointer.save_now()))
    read = torch.load(tmp_path / "step-3" / "model.pt", weights_only=True)
    model = make_model(9)
    model.load_state_dict(read["model"])
    optimizer = sgd(model)
    optimizer.load_state_dict(read["optimizer"])
    train(model, optimizer, 1)


# --- when, and how many -----------------------------------------------------------------------------------------------


def test_by_time_and_by_steps(tmp_path: Path) -> None:
    def use(job: Any) -> None:
        for number in range(1, 4):
            time.sleep(0.01)
            job.train(1)
            job.written(number)

    on_checkpointers(1, tmp_path, use, every_s=0.005, keep=9)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_the_newest_are_kept_and_foreign_files_are_not_touched(tmp_path: Path) -> None:
    foreign = {"notes.txt": "mine", "step-1000/data": "mine", "step-x/manifest.json": "{}", ".tmp/step-1": "mine"}
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    left = tmp_path / ".step-7-0123456789ab-1.tmp"
    left.mkdir()
    (left / "model.pt").write_bytes(b"half a")

    def use(job: Any) -> None:
        for number in range(1, 6):
            job.train(1)
            job.written(number)

    on_checkpointers(1, tmp_path, use, every_steps=1, keep=2)
    assert names(tmp_path) == [".tmp", "notes.txt", "step-1000", "step-4", "step-5", "step-x"]
    assert all((tmp_path / name).read_text() == text for name, text in foreign.items())
    assert Checkpointer.latest(tmp_path) == tmp_path / "step-5"


def test_a_run_that_begins_anew_in_the_same_folder_is_the_latest(tmp_path: Path) -> None:
    for _ in range(2):
        on_checkpointers(1, tmp_path, lambda job: (job.train(2), job.checkpointer.save_now()))
    on_checkpointers(1, tmp_path, lambda job: (job.train(1), job.checkpointer.save_now()))
    assert names(tmp_path) == ["step-1", "step-2", "step-2.1"]
    assert Checkpointer.latest(tmp_path) == tmp_path / "step-1"


def test_one_that_waits_for_its_round_is_dropped_by_close(tmp_path: Path) -> None:
    on_checkpointers(2, tmp_path, lambda job: job.train(5), {"sync_every": 100}, every_steps=1)
    assert names(tmp_path) == []


def test_a_consolidation_serves_as_well(tmp_path: Path) -> None:
    def use(job: Any) -> Content:
        job.train(5)
        job.sync.synchronize()
        weights = content(job.model)
        job.train(1)
        job.written(1)
        return weights

    found = on_checkpointers(2, tmp_path, use, {"sync_every": 100}, every_steps=4)
    assert same(saved_in(tmp_path / "step-6")["model"], found[1])


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("algorithm", ALGORITHMS[1:], ids=str)
def test_any_world_size_goes_on(algorithm: Algorithm, before: int, after: int, tmp_path: Path) -> None:
    def save(job: Any) -> None:
        job.train(4)
        job.written(1)

    def load(job: Any) -> tuple[Any, Content, dict[str, float], Content]:
        extra = job.checkpointer.load_latest()
        loaded = content(job.model)
        job.train(3)
        job.checkpointer.save_now()
        return extra, loaded, job.sync.metrics(), content(job.model)

    on_checkpointers(before, tmp_path, save, {"algorithm": algorithm}, every_steps=3, extra={"epoch": 3})
    (first,) = tmp_path.iterdir()
    saved = saved_in(first)
    for extra, loaded, metrics, _ in on_checkpointers(after, tmp_path, load, {"algorithm": algorithm}):
        assert extra == {"epoch": 3}
        assert same(loaded, saved["model"])
        if before > 1:
            assert metrics["steps"] == 4 + 3
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize(
    "driver",
    [FOREGROUND, {"sync_every": 2, "foreground": False}, {"warmup_steps": 2}, {"warmup_steps": 100}],
    ids=["foreground", "background", "after the warm-up", "in the warm-up"],
)
def test_steps_are_those_of_the_checkpoint_as_soon_as_it_is_loaded(
    driver: dict[str, Any], before: int, after: int, tmp_path: Path
) -> None:
    """A script goes on from there, whatever the number of ranks was and is."""

    def go_on(job: Any) -> tuple[int, int]:
        job.checkpointer.load_latest()
        begun = job.sync.steps
        job.train(3)
        job.checkpointer.save_now()
        return begun, job.sync.steps

    assert on_checkpointers(before, tmp_path, go_on, driver) == [(0, 3)] * before
    assert on_checkpointers(after, tmp_path, go_on, driver) == [(3, 6)] * after
    assert on_checkpointers(before, tmp_path, go_on, driver) == [(6, 9)] * before
    assert {"step-3", "step-6", "step-9"} <= set(names(tmp_path))


def test_files_have_the_rights_of_the_umask(tmp_path: Path) -> None:
    def save(job: Any) -> None:
        job.train(1)
        job.checkpointer.save_now()
        checkpoint.save(tmp_path / "one.pt", job.model, job.sync)

    mask = os.umask(0o077)
    try:
        on_checkpointers(1, tmp_path / "new", save)
    finally:
        os.umask(mask)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (tmp_path / "new" / "step-1").stat().st_mode & 0o777 == 0o700


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert on_checkpointers(2, tmp_path / "new", lambda job: job.checkpointer.load_latest()) == [None, None]
    assert Checkpointer.latest(tmp_path / "nowhere") is None


def test_a_damaged_one_is_passed_over_on_every_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def save(job: Any) -> None:
        for step in range(2):
            job.train(2)
            job.checkpointer.extra = step
            job.checkpointer.save_now()

    on_checkpointers(2, tmp_path, save)
    with open(tmp_path / "step-4" / "model.pt", "r+b") as file:
        file.seek(100)
        file.write(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        found = on_checkpointers(3, tmp_path, lambda job: (job.checkpointer.load_latest(), job.checkpointer.loaded))
    assert found == [(0, tmp_path / "step-2")] * 3
    assert "step-4 is passed over" in caplog.text
    assert "other content than was written" in caplog.text


def test_one_that_does_not_fit_is_an_error_on_every_rank(tmp_path: Path) -> None:
    on_checkpointers(1, tmp_path, lambda job: (job.train(1), job.checkpointer.save_now()))

    def program(comm: Communicator) -> None:
        model = torch.nn.Linear(2, 2)
        with (
            ShadowSync(sgd(model), model=model, communicator=comm, **FOREGROUND) as sync,
            Checkpointer(tmp_path, model, sync) as checkpointer,
            pytest.raises(CheckpointError, match="not fit"),
        ):
            checkpointer.load_latest()

    on_ranks(2, program)


def test_a_rank_that_sees_another_folder_is_an_error_on_every_rank(tmp_path: Path) -> None:
    on_checkpointers(1, tmp_path, lambda job: (job.train(1), job.checkpointer.save_now()))

    def use(job: Any) -> None:
        with pytest.raises(CheckpointError, match=r"rank 1 does not see .*step-1 as rank 0 does"):
            job.checkpointer.load_latest()

    real = folders.manifests.read

    def read(path: Path) -> Any:
        if threading.current_thread().name == "rank-1":
            raise CheckpointError("it is missing")
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_shadowsync.checkpointing.checkpointer.manifests.read", read)
        on_checkpointers(2, tmp_path, use)


# --- what is refused, and what fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_nan_and_infinity_never_take_the_place_of_a_good_one(where: str, value: float, tmp_path: Path) -> None:
    def use(job: Any) -> str:
        job.train(2)
        assert job.checkpointer.save_now() == tmp_path / "step-2"
        if where == "weights":
            next(job.model.parameters()).data[0] = value
        else:
            job.optimizer.state[next(job.model.parameters())]["momentum_buffer"][0] = value
        assert job.checkpointer.save_now() is None
        return job.checkpointer.last_error

    size = 1 if where == "weights" else 2  # several replicas that are all bad are an error in save_now()
    found = on_checkpointers(size, tmp_path, use, keep=1)
    assert "NaN or infinity; the earlier checkpoint stays" in found[0]
    assert names(tmp_path) == ["step-2"]


def test_an_extra_that_could_not_be_loaded_is_reported(tmp_path: Path) -> None:
    def use(job: Any) -> None:
        job.checkpointer.extra = {"seen": range(3)}
        job.train(1)
        job.failed(1)
        assert "could not be loaded again" in job.checkpointer.last_error
        job.checkpointer.extra = {"seen": 3}
        job.train(1)
        job.written(1)

    on_checkpointers(1, tmp_path, use, every_steps=1)
    assert names(tmp_path) == ["step-2"]


def test_a_folder_that_cannot_be_made_is_reported_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file")

    def use(job: Any) -> None:
        job.train(2)
        job.failed(1)
        if job.rank == 0:
            (tmp_path / "taken").unlink()
        job.sync.gather(None)
        job.train(2)
        job.written(1)

    with caplog.at_level(logging.ERROR):
        on_checkpointers(2, tmp_path / "taken" / "below", use, every_steps=1)
    assert "cannot be made" in caplog.text
    assert "earlier ones stay" in caplog.text
    assert names(tmp_path / "taken" / "below") == ["step-4"]


@pytest.mark.parametrize("call", ["rename", "fsync", "mkdir", "write"])
def test_a_full_disk_or_a_read_only_folder_at_any_call(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: Any, **__: Any) -> Any:
        raise full

    def use(job: Any) -> None:
        job.train(1)
        job.written(1)
        with pytest.MonkeyPatch.context() as patch:
            if call == "write":
                patch.setattr(DigestedFile, "__init__", fail)
            elif call == "mkdir":
                patch.setattr(Path, "mkdir", fail)
            else:
                patch.setattr(os, call, fail)
            job.train(1)
            job.failed(1)
        assert "No space left" in job.checkpointer.last_error
        job.train(1)
        job.written(2)

    on_checkpointers(1, tmp_path, use, every_steps=1)
    assert names(tmp_path) == ["step-1", "step-3"]


def test_a_write_that_fails_half_way_is_raised_at_the_end_of_the_file(tmp_path: Path) -> None:
    """torch's writer would end the process where the write itself raised."""
    number = 0

    class Full:
        def write(self, data: bytes) -> int:
            nonlocal number
            number += 1
            if number > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"), DigestedFile(tmp_path / "model.pt") as file:
        file._file.close()
        file._file = Full()  # type: ignore[assignment]
        torch.save({"a": torch.ones(100_000), "b": torch.ones(3)}, file)  # type: ignore[arg-type]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 1 MiB: a small model fits, what is larger does not, and is gone then."""
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=1m none {tmp_path} 2>/dev/null") != 0:
        pytest.skip("mounting a file system takes root and the right to do so")
    try:

        def use(job: Any) -> None:
            job.train(1)
            job.written(1)
            job.checkpointer.extra = torch.ones(1 << 20)
            job.train(1)
            job.failed(1)
            assert "No space left" in job.checkpointer.last_error
            job.checkpointer.extra = None
            job.train(1)
            job.written(2)

        on_checkpointers(1, tmp_path, use, every_steps=1)
        assert names(tmp_path) == ["step-1", "step-3"]
        assert Checkpointer.latest(tmp_path) == tmp_path / "step-3"
        os.system(f"mount -o remount,ro {tmp_path}")
        on_checkpointers(1, tmp_path, lambda job: (job.train(1), job.failed(1)), every_steps=1)
        assert names(tmp_path) == ["step-1", "step-3"]
    finally:
        os.system(f"umount {tmp_path}")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every_s": 0}, ValueError, "every_s=0 is outside"),
        ({"every_steps": 0}, ValueError, "every_steps=0 is below 1"),
        ({"keep": 0}, ValueError, "keep=0 is below 1"),
        ({"end_signals": [999]}, ValueError, "end_signals has 999"),
        ({"end_signals": ["TERM"]}, ValueError, "end_signals has 'TERM', which is no signal; give such"),
        ({"end_signals": [9]}, ValueError, "end_signals has 9, which no process can wait for; give such"),
        ({"end_signals": [signal.SIGSTOP]}, ValueError, "SIGSTOP.*no process can wait for"),
        ({"end_signals": signal.SIGTERM}, TypeError, r"SIGTERM.* is no list of signals; give such as \[signal.SIGTERM"),
        ({"end_signals": None}, TypeError, r"end_signals=None is no list of signals; .* or \(\) for none"),
        ({"end_signals": "TERM"}, TypeError, "end_signals='TERM' is no list of signals"),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        Checkpointer(tmp_path, *_alone(), **options)


def test_arguments_of_another_kind(tmp_path: Path) -> None:
    model, sync = _alone()
    with pytest.raises(TypeError, match="model is a str"):
        Checkpointer(tmp_path, "model", sync)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sync is a SGD; pass the handle"):
        Checkpointer(tmp_path, model, sync.optimizer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("folder", "error", "words"),
    [
        (5, TypeError, "dir=5 is no path; give a str or a pathlib.Path"),
        (None, TypeError, "dir=None is no path"),
        (b"x", TypeError, "dir=b'x' is no path"),
        ("a\0b", ValueError, r"dir='a\\x00b' has a zero byte"),
        ("", ValueError, "dir='' is empty; give the path of a folder, '.' for the current one"),
    ],
)
def test_folders_that_are_none(folder: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Checkpointer(folder, *_alone())


def test_calls_after_close(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, *_alone())
    checkpointer.close()
    checkpointer.close()
    with pytest.raises(RuntimeError, match=r"save_now\(\) came after close"):
        checkpointer.save_now()


def test_a_handle_has_one_checkpointer_at_a_time(tmp_path: Path) -> None:
    def use(job: Any) -> list[str]:
        with pytest.raises(ValueError, match=r"sync has a Checkpointer already, .* close\(\) that one first"):
            Checkpointer(tmp_path / "other", job.model, job.sync)
        job.checkpointer.close()
        with Checkpointer(tmp_path / "other", job.model, job.sync) as other:
            job.train(2)
            other.save_now()
        return names(tmp_path / "other") if job.rank == 0 else ["step-2"]

    assert on_checkpointers(2, tmp_path, use) == [["step-2"]] * 2
    assert names(tmp_path) == ["other"]


def test_training_after_the_handle_was_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said once; a signal that has come before is an end without a last checkpoint, and no clean one."""

    def use(job: Any) -> int | None:
        job.train(3)
        job.sync.close()
        if job.rank == 0:
            job.train(3)
        job.comm.allgather_object(None)  # then the others may be told, by the first rank's writer
        if job.rank == 1:
            job.checkpointer.stop()
            with pytest.raises(SystemExit) as ended:
                job.train(1)
            return ended.value.code
        return None

    assert on_checkpointers(2, tmp_path, use, every_steps=1) == [None, 1]
    said = [each.message for each in caplog.records if "after its handle was closed" in each.message]
    assert sorted(each.split(":")[0] for each in said) == [
        f"rank {rank} trains on after its handle was closed" for rank in range(2)
    ]


def _alone() -> tuple[torch.nn.Module, ShadowSync]:
    model = make_model()
    from hvd_shadowsync.comm.local import run

    return model, run(1, lambda comm: ShadowSync(sgd(model), model=model, communicator=comm), timeout_s=10.0)[0]


def in_trouble(folder: Path, patch: pytest.MonkeyPatch, threads: int = 1) -> Callable[[], int]:
    """Have looks into `folder` fail as those into an NFS folder do; return how many of each of `threads` have."""
    real, looks = Path.exists, Counter[int]()

    def exists(path: Path, **options: Any) -> bool:
        if path.parent != folder:
            return real(path, **options)
        looks[threading.get_ident()] += 1
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    patch.setattr(Path, "exists", exists)
    return lambda: min(looks.values(), default=0) if len(looks) >= threads else 0


def test_a_folder_that_is_away_for_a_moment_is_looked_at_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged once on each rank; training, later checkpoints and a later word to end are as ever."""
    monkeypatch.setattr(writers, "LOOK_S", 0.005)

    def use(job: Any) -> int | None:
        job.train(2)
        if job.rank == 0:
            with pytest.MonkeyPatch.context() as patch:
                looks = in_trouble(tmp_path, patch, threads=2)
                deadline = time.monotonic() + PATIENCE_S
                while looks() < 10:
                    time.sleep(0.002)
                    assert time.monotonic() < deadline
        job.sync.gather(None)
        job.train(2)
        assert job.checkpointer.save_now() == tmp_path / "step-4"
        if job.rank == 1:
            job.checkpointer.stop()
        with pytest.raises(SystemExit) as ended:
            job.train(1_000_000, after=lambda: time.sleep(0.0005))
        return ended.value.code

    with caplog.at_level(logging.ERROR):
        assert on_checkpointers(2, tmp_path, use) == [0, 0]
    for rank in range(2):
        said = [each for each in caplog.messages if f"rank {rank} has trouble with {tmp_path}" in each]
        assert len(said) == 1
        assert "Stale file handle" in said[0]


def test_others_are_told_to_end_as_soon_as_the_folder_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elastic averaging: ranks that train meet in no vote, only the file tells them."""
    monkeypatch.setattr(writers, "LOOK_S", 0.005)
    real, failed = Path.touch, threading.Event()
    times = iter(range(3))

    def touch(path: Path, **options: Any) -> None:
        if path.name.startswith(".stop-") and next(times, None) is not None:
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        real(path, **options)

    monkeypatch.setattr(Path, "touch", touch)

    def use(job: Any) -> int | None:
        if job.rank == 1:
            job.checkpointer.stop()
        with pytest.raises(SystemExit) as ended:
            job.train(1_000_000, after=lambda: time.sleep(0.0005))
        return ended.value.code

    options = {"foreground": False, "sync_every": 1, "algorithm": ElasticAveraging()}
    assert on_checkpointers(2, tmp_path, use, options) == [0, 0]
    assert failed.is_set()


def test_earlier_ones_that_cannot_be_removed_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(writers, "prune", fail)

    def use(job: Any) -> None:
        job.train(1)
        assert job.checkpointer.save_now() == tmp_path / "step-1"
        job.train(1)
        assert job.checkpointer.save_now() == tmp_path / "step-2"

    on_checkpointers(1, tmp_path, use)
    assert "are not removed" in caplog.text


@pytest.mark.parametrize("fails", [False, True], ids=["of a subclass", "whose extra fails"])
def test_what_cannot_be_loaded_or_made_does_not_take_the_place_of_a_good_one(fails: bool, tmp_path: Path) -> None:
    """And training goes on."""

    class Special(torch.Tensor):
        pass

    def extra() -> Any:
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        return torch.zeros(3).as_subclass(Special)

    def use(job: Any) -> Path | None:
        job.train(1)
        job.written(1)
        job.checkpointer.extra = extra
        job.train(1)
        job.failed(1)
        assert ("No space left" if fails else "could not be loaded") in job.checkpointer.last_error
        assert job.checkpointer.save_now() is None
        job.checkpointer.extra = None
        return job.checkpointer.load_latest() or job.checkpointer.loaded

    assert on_checkpointers(1, tmp_path, use, every_steps=1, keep=1) == [tmp_path / "step-1"]


def test_counters_of_a_scheduler_come_back_as_what_they_are(tmp_path: Path) -> None:
    def use(job: Any) -> Any:
        schedule = torch.optim.lr_scheduler.MultiStepLR(job.optimizer, [2, 5])
        job.checkpointer.extra = {"schedule": schedule.state_dict()}
        assert job.checkpointer.save_now() is not None
        return job.checkpointer.load_latest()["schedule"]["milestones"]

    assert on_checkpointers(1, tmp_path, use) == [Counter([2, 5])]


def test_a_folder_that_cannot_be_listed_is_an_error_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To begin anew there would remove what earlier runs have written."""
    real = Path.iterdir

    def iterdir(path: Path) -> Any:
        if path == tmp_path:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path)

    def use(job: Any) -> None:
        job.train(1)
        job.checkpointer.save_now()
        job.comm.allgather_object(None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "iterdir", iterdir)
            with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be listed .*Stale file handle"):
                job.checkpointer.load_latest()
            job.comm.allgather_object(None)

    on_checkpointers(2, tmp_path, use)


@pytest.mark.parametrize("name", ["file/below.pt", "x" * 240, "missing/below.pt"])
def test_a_path_that_cannot_be_written_is_the_same_error_on_every_rank(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theirs")

    def use(job: Any) -> None:
        with pytest.raises(CheckpointError, match="cannot be written"):
            checkpoint.save(tmp_path / name, job.model, job.sync)

    on_checkpointers(2, tmp_path / "checkpoints", use)


def test_two_checkpointers_have_two_folders(tmp_path: Path) -> None:
    def use(job: Any) -> None:
        model = make_model(job.rank)
        with ShadowSync(sgd(model), model=model, communicator=job.comm, **FOREGROUND) as sync:
            with pytest.raises(ValueError, match="is another Checkpointer's, which is open; give each its own folder"):
                Checkpointer(tmp_path / "below" / "..", model, sync)
            job.comm.allgather_object(None)
            job.checkpointer.close()
            left = Checkpointer(tmp_path, model, sync)
        model = make_model(job.rank)
        with ShadowSync(sgd(model), model=model, communicator=job.comm, **FOREGROUND) as sync:  # that one's is closed
            again = Checkpointer(tmp_path, model, sync)
            with pytest.raises(MemoryError), again:
                raise MemoryError
            again._leave()  # the handle's one
            third = Checkpointer(tmp_path, model, sync)
        for each in (left, again, third):
            each.close()

    on_checkpointers(2, tmp_path, use)


def test_steps_that_go_back_count_from_there(tmp_path: Path) -> None:
    def use(job: Any) -> None:
        job.train(2)
        checkpoint.save(tmp_path.with_suffix(".pt"), job.model, job.sync)
        for number, steps in enumerate((8, 10), start=1):
            job.train(steps)
            job.written(number)
        checkpoint.load(tmp_path.with_suffix(".pt"), job.model, job.sync)
        job.train(10)
        job.written(3)

    on_checkpointers(1, tmp_path, use, every_steps=10)
    assert "step-12" in names(tmp_path)


def test_a_checkpoint_that_waits_for_long_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpointers, "WAIT_WARNING_S", 0.0)

    def use(job: Any) -> None:
        job.sync.pause()
        job.train(6)
        job.sync.resume()
        job.sync.synchronize()
        job.train(1)
        job.written(1)

    on_checkpointers(2, tmp_path, use, {"foreground": False, "sync_every": 1}, every_steps=2, keep=9)
    said = [each for each in caplog.messages if "a checkpoint has waited for the end of a round for" in each]
    assert len(said) == 1


@pytest.mark.parametrize("mixed", [False, True])
def test_a_checkpoint_is_as_large_as_what_is_in_it(mixed: bool, tmp_path: Path) -> None:
    """A few weights of full precision among many of half."""

    def program(comm: Communicator) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(1000, 200, dtype=torch.bfloat16 if mixed else None))
        model.append(torch.nn.Linear(200, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, foreground=True) as sync:
            checkpointer = Checkpointer(tmp_path, model, sync, every_steps=1)
            for _ in range(2):
                for each in model.parameters():
                    each.grad = torch.zeros_like(each)
                optimizer.step()
            checkpointer.close()

    on_ranks(2, program)
    (written,) = tmp_path.glob("step-*/model.pt")
    assert written.stat().st_size < (0.45e6 if mixed else 0.85e6)


@pytest.mark.parametrize("algorithm", [ModelAveraging(), ElasticAveraging()], ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("driver", ["foreground", "background"])
@pytest.mark.leaves_threads
def test_when_a_rank_is_lost_in_the_round_that_is_copied_the_next_one_is(
    driver: str, algorithm: Algorithm, tmp_path: Path
) -> None:
    """In each of twenty of its calls."""

    def program(comm: Communicator, folder: Path) -> float:
        model = make_model(comm.rank)
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, algorithm=algorithm, **DRIVERS[driver]) as sync:
            with Checkpointer(folder, model, sync, every_steps=1, end_signals=()) as checkpointer:
                at_loss, steps, deadline = None, 0, time.monotonic() + PATIENCE_S
                while at_loss is None or checkpointer.metrics()["checkpoints"] < at_loss + 3:
                    assert time.monotonic() < deadline, checkpointer.last_error
                    train(model, optimizer, 1, stream=comm.rank, first=steps)
                    steps += 1
                    time.sleep(0.001)
                    if at_loss is None and sync.size == 2:
                        at_loss = checkpointer.metrics()["checkpoints"]
                    if at_loss is not None and comm.rank != 0:
                        break
            return checkpointer.metrics()["checkpoint_failures"]

    for call in range(40, 60):
        folder = tmp_path / str(call)
        ended = local.run(3, lambda comm, to=folder: program(comm, to), timeout_s=TIMEOUT_S, kill={2: call})
        assert ended[:2] == [0, 0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_the_thread_nobody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise GeneratorExit("whatever")

    def use(job: Any) -> str:
        job.train(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writers.Writer, "_written", fail)
            assert job.checkpointer.save_now() is None
        assert job.checkpointer.save_now() is None
        return job.checkpointer.last_error

    assert on_checkpointers(1, tmp_path, use) == ["the thread that writes has ended; its error is above"]


# --- the end of a job -------------------------------------------------------------------------------------------------

DRIVERS = {
    "foreground": FOREGROUND,
    "background": {"sync_every": 1, "foreground": False},
    "rarely": {"sync_interval_ms": 1e6, "sync_every": None, "foreground": False},
    "easgd": {"sync_every": 1, "foreground": False, "algorithm": ElasticAveraging()},
    "warmup": {"warmup_steps": 100_000},
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("calls", ["trains", "meets", "synchronizes", "closes"])
def test_told_on_one_rank_all_end_with_a_last_checkpoint(driver: str, calls: str, tmp_path: Path) -> None:
    def use(job: Any) -> tuple[int | None, Content]:
        with pytest.raises(SystemExit) as ended:
            job.train(10)
            if job.rank == 1:
                job.checkpointer.stop()
            elif job.rank == 2 and calls == "meets":
                job.sync.metrics(merged=True)
            elif job.rank == 2 and calls == "synchronizes":
                job.sync.synchronize()
            elif job.rank == 2 and calls == "closes":
                job.sync.close()
                raise SystemExit(0)
            job.train(1_000_000, after=lambda: time.sleep(0.0005))
        return ended.value.code, content(job.model)

    found = on_checkpointers(3, tmp_path, use, DRIVERS[driver])
    assert [code for code, _ in found] == [0, 0, 0]
    latest = Checkpointer.latest(tmp_path)
    assert latest is not None
    saved = saved_in(latest)["model"]  # since then the mean was formed once more, of replicas that are the same
    assert saved.keys() == found[0][1].keys()
    assert all(torch.allclose(saved[name], value, rtol=1e-6, atol=1e-6) for name, value in found[0][1].items())
    assert same({n: t for n, t in found[0][1].items() if "running" not in n and "num" not in n},
                {n: t for n, t in found[1][1].items() if "running" not in n and "num" not in n})  # fmt: skip


class KilledWriters:
    """Has so many ranks lost, one after the other, while they write; call it with each rank's job."""

    def __init__(self, number: int, patch: pytest.MonkeyPatch) -> None:
        self.comms: list[Any] = []
        self.left = number
        real = writers.Writer._written

        def written(writer: Any, content: Any) -> Path:
            if self.left:
                self.left -= 1
                Draft(writer._folder, writer._job, content.step, 1)
                next(comm for comm, its in self.comms if its is writer).die()
                raise OSError(errno.EIO, "killed")
            return real(writer, content)

        patch.setattr(writers.Writer, "_written", written)

    def __call__(self, job: Any) -> None:
        self.comms.append((job.comm, job.checkpointer._writer))
        job.sync.gather(None)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.leaves_threads
def test_if_the_rank_that_writes_the_last_checkpoint_is_lost_the_next_one_writes_it(
    lost: int, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = KilledWriters(lost, monkeypatch)

    def use(job: Any) -> tuple[int | None, Content]:
        killed(job)
        job.train(10)
        if job.rank == 2:
            job.checkpointer.stop()
        with pytest.raises(SystemExit) as ended:
            job.train(1_000_000, after=lambda: time.sleep(0.0005))
        return ended.value.code, content(job.model)

    found = on_checkpointers(3, tmp_path, use, DRIVERS[driver], outlives=True)
    assert found[:lost] == [None] * lost
    assert [code for code, _ in found[lost:]] == [0] * (3 - lost)
    latest = Checkpointer.latest(tmp_path)
    assert latest is not None
    assert not any(folders.UNDER_WAY.fullmatch(name) for name in names(tmp_path))
    saved = saved_in(latest)["model"]
    for name, _ in make_model().named_parameters():
        assert torch.allclose(saved[name], found[2][1][name], atol=1e-6)


def test_a_last_checkpoint_of_some_of_the_jobs_ranks(tmp_path: Path) -> None:
    """Their ranks are not their numbers."""

    def program(comm: Communicator) -> int | None:
        part = comm.split(0 if comm.rank > 1 else None)
        if part is None:
            return 0
        model = make_model()
        sync = ShadowSync(sgd(model), model=model, communicator=part, **FOREGROUND)
        checkpointer = Checkpointer(tmp_path, model, sync)
        checkpointer.stop()
        with pytest.raises(SystemExit) as ended:
            train(model, sync.optimizer, 1)
        checkpointer.close()
        sync.close()
        return ended.value.code

    assert on_ranks(4, program) == [0, 0, 0, 0]
    assert Checkpointer.latest(tmp_path) == tmp_path / "step-1"


@pytest.mark.parametrize("loads", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_without_training_there_is_no_last_checkpoint(
    size: int, loads: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be the newest, of the weights that the job has begun with."""

    def first(job: Any) -> None:
        job.train(4)
        job.checkpointer.save_now()

    def second(job: Any) -> int | None:
        if loads:
            job.checkpointer.load_latest()
            assert job.sync.steps == 4
        job.checkpointer.stop()
        with pytest.raises(SystemExit) as ended:
            job.checkpointer._end_if_told()
        return ended.value.code

    on_checkpointers(size, tmp_path, first)
    with caplog.at_level(logging.WARNING):
        assert on_checkpointers(size, tmp_path, second) == [0] * size
    assert [each for each in names(tmp_path) if not each.startswith(".stop-")] == ["step-4"]
    assert "no last checkpoint is needed" in caplog.text


@pytest.mark.parametrize("foreground", [True, False])
@pytest.mark.leaves_threads
def test_if_the_rank_that_saves_now_is_lost_the_next_one_saves(
    foreground: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = KilledWriters(1, monkeypatch)

    def use(job: Any) -> Path | None:
        killed(job)
        job.train(4)
        path: Path | None = job.checkpointer.save_now()
        return path

    options = {"sync_every": 1, "foreground": foreground}
    found = on_checkpointers(3, tmp_path, use, options, outlives=True)
    assert found == [None] + [tmp_path / "step-4"] * 2
    assert names(tmp_path) == ["step-4"]


def test_what_a_lost_rank_has_left_may_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(job: Any) -> Path | None:
        job.train(1)
        left = Draft(tmp_path, job.checkpointer._job, 1, 1)
        (left.path / "file").write_text("open on another host")
        path: Path | None = job.checkpointer.save_now()
        return path

    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "not empty")))
    assert on_checkpointers(1, tmp_path, use) == [tmp_path / "step-1"]


def test_a_last_checkpoint_that_cannot_be_written_is_another_code(tmp_path: Path) -> None:
    def use(job: Any) -> int | None:
        job.train(2)
        next(job.model.parameters()).data.fill_(float("nan"))
        job.checkpointer.stop()
        with pytest.raises(SystemExit) as ended:
            job.train(2)
        return ended.value.code

    assert on_checkpointers(1, tmp_path, use) == [1]


def test_a_signal_in_the_main_thread_and_the_handler_before(tmp_path: Path) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: came.append(number))
    try:
        model, sync = _alone()
        checkpointer = Checkpointer(tmp_path, model, sync, end_signals=[signal.SIGUSR2])
        train(model, sync.optimizer, 2)
        os.kill(os.getpid(), signal.SIGUSR2)
        with pytest.raises(SystemExit) as ended:
            train(model, sync.optimizer, 2)
        assert ended.value.code == 0
        assert came == [signal.SIGUSR2]
        checkpointer.close()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert came == [signal.SIGUSR2] * 2
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert names(tmp_path) == ["step-3"]


def test_the_thread_gives_way_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "setpriority", lambda *args: given.append(args))
    writers._give_way()
    assert given in ([], [(os.PRIO_PROCESS, threading.get_native_id(), writers.NICENESS)])
