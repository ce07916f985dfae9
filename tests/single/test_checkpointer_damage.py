"""Damage of every kind is refused and the previous checkpoint used; a kill at any moment leaves good ones only."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_shadowsync import Checkpointer, CheckpointError, checkpoint
from hvd_shadowsync.checkpointing import folder as folders
from hvd_shadowsync.checkpointing import manifest as manifests
from hvd_shadowsync.checkpointing.folder import Draft
from hvd_shadowsync.checkpointing.manifest import Manifest, Written

JOB = "0123456789ab"
FILES = ["model.pt", "model.pt.tables/rows.safetensors", "manifest.json"]


def write(folder: Path, step: int, size: int = 300) -> Path:
    draft = Draft(folder, JOB, step, step)
    for name in FILES[:2]:
        (draft.path / name).parent.mkdir(exist_ok=True)
        (draft.path / name).write_bytes(random.Random(step).randbytes(size))
        draft.files[name] = Written.of(draft.path / name)
    return draft.complete(2).path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints; tests copy it."""
    folder = tmp_path_factory.mktemp("good")
    write(folder, 1)
    write(folder, 2)
    assert Checkpointer.latest(folder) == folder / "step-2"
    return folder


def damaged(good: Path, to: Path, name: str, data: bytes) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(good, to)
    (to / "step-2" / name).write_bytes(data)
    return to


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "copy"


class Said(logging.Handler):
    """What is logged: `caplog` is one for all examples of a test."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def require_fallback(copy: Path) -> None:
    """Fail unless the newest is passed over, with a warning that says so, in favour of the one before."""
    said = Said()
    folders.logger.addHandler(said)
    try:
        assert Checkpointer.latest(copy) == copy / "step-1"
    finally:
        folders.logger.removeHandler(said)
    (message,) = said.messages
    assert message.startswith(f"{copy / 'step-2'} is passed over: {copy / 'step-2'}/")


@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit(good: Path, scratch: Path, name: str, where: float, bit: int) -> None:
    data = bytearray((good / "step-2" / name).read_bytes())
    data[int(where * len(data))] ^= 1 << bit
    copy = damaged(good, scratch, name, bytes(data))
    require_fallback(copy)


@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True))
def test_any_truncation(good: Path, scratch: Path, name: str, where: float) -> None:
    data = (good / "step-2" / name).read_bytes()
    copy = damaged(good, scratch, name, data[: int(where * len(data))])
    require_fallback(copy)


@given(name=st.sampled_from(FILES), more=st.binary(min_size=1, max_size=4))
def test_any_addition(good: Path, scratch: Path, name: str, more: bytes) -> None:
    data = (good / "step-2" / name).read_bytes()
    copy = damaged(good, scratch, name, data + more)
    require_fallback(copy)


@given(data=st.binary(max_size=40) | st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda each: (
    st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(["files", "step", "number", "a"]), each)
)).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_manifest_of_somebody_else(good: Path, scratch: Path, data: bytes) -> None:
    copy = damaged(good, scratch, "manifest.json", data)
    require_fallback(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_and_one_of_another_checkpoint(good: Path, scratch: Path, name: str) -> None:
    copy = damaged(good, scratch, name, (good / "step-1" / name).read_bytes())
    assert Checkpointer.latest(copy) == copy / "step-1"
    (copy / "step-2" / name).unlink()
    require_fallback(copy)


def test_manifests_that_lead_out_of_their_folder(tmp_path: Path) -> None:
    for name in ("../model.pt", "/etc/passwd", ""):
        (tmp_path / "manifest.json").write_bytes(Manifest(0, 0, 1, {name: Written(0, "0")}).encode())
        with pytest.raises(CheckpointError, match="is not below the checkpoint's folder"):
            manifests.read(tmp_path)


@given(number=st.integers(0, 1 << 40), step=st.integers(0, 1 << 40), size=st.integers(1, 9), name=st.text(min_size=1))
def test_manifests_come_back(scratch: Path, number: int, step: int, size: int, name: str) -> None:
    manifest = Manifest(number, step, size, {f"a{name}".replace("..", "_"): Written(3, "0" * 64)})
    scratch.mkdir(exist_ok=True)
    (scratch / "manifest.json").write_bytes(manifest.encode())
    assert manifests.read(scratch) == manifest


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    os.truncate(tmp_path / "step-4" / "model.pt", 5)
    folders.prune(tmp_path, 2, JOB, tmp_path / "step-5")
    assert sorted(os.listdir(tmp_path)) == ["step-3", "step-4", "step-5"]


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    """Whatever the others' numbers say: they could not be read when it got its own."""
    for step in range(1, 4):
        write(tmp_path, step)
    folders.prune(tmp_path, 1, JOB, tmp_path / "step-1")
    assert "step-1" in os.listdir(tmp_path)


@pytest.mark.parametrize("how", ["killed", "busy"])
def test_what_is_cut_short_while_an_old_one_is_removed_looks_like_none_and_is_tried_again(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 4):
        write(tmp_path, step)

    def stopped(path: Path) -> None:
        (path / "model.pt").unlink()
        raise KeyboardInterrupt if how == "killed" else OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt) if how == "killed" else nullcontext():
            folders.prune(tmp_path, 2, JOB, tmp_path / "step-3")
    assert [each.path.name for each in folders.stored_in(tmp_path)] == ["step-3", "step-2"]
    assert len(os.listdir(tmp_path)) == 3
    if how == "killed":
        folders.clear(tmp_path)  # the next job
    else:
        folders.clear_lost(tmp_path, JOB)  # this one, before its next checkpoint
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does when a host has just come back: nothing begins anew there, and nothing gets a lower number."""
    write(tmp_path, 1)
    draft = Draft(tmp_path, JOB, 2, 2)

    def away(_: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", away)
        for call in (lambda: Checkpointer.latest(tmp_path), lambda: draft.complete(1), lambda: folders.clear(tmp_path)):
            with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be listed .*Stale file handle"):
                call()
    assert draft.complete(1).manifest.number == 1
    assert Checkpointer.latest(tmp_path / "nothing") is None


def test_a_number_is_above_that_of_the_last_one_though_that_cannot_be_read(tmp_path: Path) -> None:
    last = Draft(tmp_path, JOB, 1, 1).complete(1, after=5)
    assert last.manifest.number == 6
    (last.path / "manifest.json").unlink()
    assert Draft(tmp_path, JOB, 2, 2).complete(1, after=6).manifest.number == 7


def test_one_that_is_removed_while_it_is_read_is_not_the_end_of_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keep=1 the writer removes it when the next one is there."""
    write(tmp_path, 1)
    real = manifests.check

    def check(folder: Path, *more: Any) -> None:
        if folder.name == "step-1":
            folders.prune(tmp_path, 1, JOB, write(tmp_path, 2))
        real(folder, *more)

    monkeypatch.setattr(manifests, "check", check)
    assert Checkpointer.latest(tmp_path) == tmp_path / "step-2"


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".file.tmp").symlink_to(tmp_path / "theirs")
    folders.write_whole(tmp_path / "file", b"ours")
    assert [(tmp_path / name).read_text() for name in ("theirs", "file")] == ["theirs", "ours"]
    (tmp_path / "step-1").mkdir()
    os.mkfifo(tmp_path / "step-1" / "manifest.json")
    assert Checkpointer.latest(tmp_path) is None


def test_where_names_are_not_on_disk_the_earlier_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power the rename may not have been, and the removal may."""
    real = os.fsync
    for number in (errno.EIO, errno.EINVAL):

        def fsync(descriptor: int, number: int = number) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            if number == errno.EINVAL:  # this file system cannot do it
                write(tmp_path, number)
            else:
                with pytest.raises(OSError, match="Input/output error"):
                    write(tmp_path, number)


# --- kills ------------------------------------------------------------------------------------------------------------

WRITES = """
import os
import sys
import torch
from hvd_shadowsync import Checkpointer, ShadowSync
from hvd_shadowsync.comm.local import LocalCommunicator, run

folder, numel = sys.argv[1], int(sys.argv[2])
weights = torch.nn.Parameter(torch.zeros(numel))
model = torch.nn.Module()
model.weights = weights
optimizer = torch.optim.SGD([weights], lr=1.0, momentum=0.5)
sync = run(1, lambda comm: ShadowSync(optimizer, model=model, communicator=comm), timeout_s=60.0)[0]
checkpointer = Checkpointer(folder, model, sync, every_steps=1, keep=2)
checkpointer.load_latest()
print("ready", os.getpid(), flush=True)
while True:
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    checkpointer._writer.wait()
"""


FORKS = """
import os
import sys
import torch
import hvd_shadowsync.checkpointing  # for all children at once: this, and what torch imports late, takes seconds
import hvd_shadowsync.comm.local
torch.compiler.disable(print)
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

for _ in sys.stdin:
    if (pid := os.fork()) == 0:
        exec(sys.argv[3])
    os.waitpid(pid, 0)
    print("ended", flush=True)
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Return what starts a process that writes into `tmp_path`, one after the other, and what kills it."""
    command = [sys.executable, "-c", FORKS, str(tmp_path), "300000", WRITES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        told, said = parent.stdin, parent.stdout
        assert told is not None
        assert said is not None
        pids: list[int] = []

        def start() -> None:
            told.write("one more\n")
            told.flush()
            ready, pid = said.readline().split()
            assert ready == "ready"
            pids.append(int(pid))

        def kill() -> None:
            os.kill(pids[-1], signal.SIGKILL)
            assert said.readline() == "ended\n"

        yield start, kill


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_latest_good(
    tmp_path: Path, processes: tuple[Callable[[], None], Callable[[], None]]
) -> None:
    """Each process goes on from what the last one left, which was killed at another moment of its writing."""
    chance, good, longest_s = random.Random(5), 0, 0.15
    start, kill = processes
    for number in itertools.count():
        if number >= 8:
            if good > 0:
                break
            longest_s *= 1.5  # a slow machine, which has written none yet
        start()
        time.sleep(chance.uniform(0.0, longest_s))
        kill()
        complete = [path for path in tmp_path.iterdir() if folders.COMPLETE.fullmatch(path.name)]
        for path in complete:
            if (path / "manifest.json").exists():  # else: it was being removed
                manifests.check(path, manifests.read(path))
        latest = Checkpointer.latest(tmp_path)
        assert latest is not None or not complete
        if latest is not None:
            content = checkpoint.read(latest / "model.pt")
            assert bool((content["model"]["weights"] == content["model"]["weights"][0]).all())
            good += 1
    left = [path for path in tmp_path.iterdir() if folders.UNDER_WAY.fullmatch(path.name)]
    assert len(left) <= 1, "those of earlier processes were removed"


ENDS = """
import sys
import torch
exec(sys.argv[3].partition("checkpointer.load_latest()")[0])
weights.grad = torch.ones_like(weights)
optimizer.step()
"""


def test_leaving_without_close_finishes_what_is_being_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS, str(tmp_path), "3000000", WRITES]
    subprocess.run(command, timeout=60, check=True)
    latest = Checkpointer.latest(tmp_path)
    assert latest == tmp_path / "step-1"
    assert torch.equal(checkpoint.read(latest / "model.pt")["model"]["weights"], -torch.ones(3_000_000))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_file_that_may_not_grow_is_a_failure_like_a_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, in a process of its own: the write fails in the middle of the dense file."""
    limited = (
        WRITES.partition("checkpointer.load_latest()")[0]
        + """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for _ in range(3):
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    checkpointer._writer.wait()
print(checkpointer.metrics()["checkpoint_failures"], checkpointer.last_error)
checkpointer.close()
"""
    )
    command = [sys.executable, "-c", limited, str(tmp_path), "1000000"]
    done = subprocess.run(command, timeout=60, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("3 OSError(27"), done.stdout + done.stderr
    assert os.listdir(tmp_path) == []
