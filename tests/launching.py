"""Starts real jobs for the tests: under mpirun or horovodrun, with a time-out that names the ranks that hang.

A job's processes are found by a variable in their environment, so nothing of it is left however it ended: launchers
put ranks in process groups and sessions of their own. Temporary files of a job go with it: an mpirun that is killed
leaves one under its pid, and the next one that happens to get this pid refuses to start.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hvd_shadowsync.launcher import finding
from hvd_shadowsync.launcher.command import LaunchError, Mpi

TESTS = Path(__file__).resolve().parent
MARK = "SHADOWSYNC_TEST_JOB"
STALL_S = 60.0
UNBOUND = ["--bind-to", "none", "--map-by", "slot:OVERSUBSCRIBE"]
FOREIGN = ("OMPI_", "PMI", "PRTE_", "OMP_", "HOROVOD_", "MPI4PY_", "MKL_")
OUTCOMES = ("passed", "failed", "skipped")
ONE_HOST = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm"}
"""Open MPI looks for no network then, which saves a second of each start."""


_mpi = functools.cache(finding.detect_mpi)
_horovodrun = functools.cache(finding.find_horovodrun)  # which imports Horovod in a process of its own


def find_mpi() -> Mpi:
    """Return the MPI of the tests; skip the test where there is none."""
    try:
        return _mpi()
    except LaunchError as error:
        pytest.skip(str(error))


def find_horovodrun(mpi: Mpi) -> str:
    """Return horovodrun; skip the test where it is missing or does not know this MPI."""
    if not mpi.known_to_horovod:
        pytest.skip(f"horovodrun does not recognise {mpi.mpirun}")
    try:
        return _horovodrun()
    except LaunchError as error:
        pytest.skip(str(error))


def mpirun(ranks: int) -> list[str]:
    """Return the beginning of a command that starts `ranks` ranks on this machine."""
    mpi = find_mpi()
    return [mpi.mpirun, "-np", str(ranks), *(UNBOUND if mpi.kind == "openmpi" else [])]


def shadowrun(ranks: int, *options: str) -> list[str]:
    """Return the beginning of a command for `shadowrun`; skip the test where the MPI does not know the options."""
    mpi = find_mpi()
    if "--fault-tolerant" in options and (mpi.kind != "openmpi" or mpi.version < (5,)):
        pytest.skip(f"needs Open MPI 5; {mpi.mpirun} is of {mpi.kind} {'.'.join(map(str, mpi.version))}")
    return [sys.executable, "-m", "hvd_shadowsync.run", "-np", str(ranks), *options]


def horovodrun(ranks: int) -> list[str]:
    """Return the same for horovodrun over MPI."""
    mpi = find_mpi()
    binding = [f"--binding-args={' '.join(UNBOUND)}"] if mpi.kind == "openmpi" else []
    return [find_horovodrun(mpi), "-np", str(ranks), "--mpi", *binding]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        code: exit code of the launcher; None where it had to be killed.
        output, errors: what all ranks and the launcher wrote.
        records: what each rank said (`ranks.say`), by rank.
        seconds: from the start of the launcher to its end.
        ended: wall-clock time of the end, as in `records`.
        verdict: why the job was killed, with the ranks that hung and their stacks; empty where it ended by itself.
        left_over: pids of processes of the job that were still there when the launcher had ended.
    """

    code: int | None
    output: str
    errors: str
    records: dict[int, list[dict[str, Any]]]
    seconds: float
    ended: float
    verdict: str = ""
    left_over: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What was written on both streams."""
        return self.output + self.errors

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the records of one kind, of all ranks."""
        return [each for rank in sorted(self.records) for each in self.records[rank] if each["event"] == event]

    def seconds_since(self, what: str) -> float:
        """Return the seconds from the last rank's event `what` to the end of the job."""
        times = [each["time"] for each in self.events(what)]
        assert times, f"no rank came as far as {what!r}: {self.text}"
        return float(self.ended - max(times))

    def require_success(self) -> Outcome:
        """Fail the test unless the job ended by itself with code 0 and left nothing behind."""
        failed = [f"[rank {each['rank']}] {each['what']}\n{each['text']}" for each in self.events("failed")]
        if self.verdict or failed or self.code != 0 or self.left_over:
            said = "\n\n".join(failed) or _last(self.text)
            ended = self.verdict or f"exit code {self.code}"
            pytest.fail(f"{ended}, left over: {self.left_over}\n{said}", pytrace=False)
        return self

    def results(self) -> dict[str, dict[int, str]]:
        """Return what became of each test of a suite, by test and rank."""
        found: dict[str, dict[int, str]] = {}
        for outcome in OUTCOMES:
            for each in self.events(outcome):
                found.setdefault(each["what"], {})[each["rank"]] = outcome
        return found


def launch(
    command: Sequence[str], folder: Path, *, timeout_s: float = 60.0, environ: Mapping[str, str] | None = None,
    during: Callable[[Job], None] | None = None,
) -> Outcome:  # fmt: skip
    """Run `command` in `folder` to its end, or to `timeout_s`, or until no rank has said anything for a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    with Job(command, folder, environ or {}) as job:
        if during is not None:
            during(job)
        return job.wait(timeout_s)


def launch_suite(
    launcher: Sequence[str], folder: Path, paths: Sequence[Path], *, timeout_s: float = 240.0,
    environ: Mapping[str, str] | None = None,
) -> Outcome:  # fmt: skip
    """Run pytest with the tests at `paths` on all ranks of one job; see `ranks`."""
    pytest_ = [sys.executable, "-m", "pytest", "-p", "ranks", "-p", "no:cacheprovider", "-o", "timeout=0", "-q"]
    return launch([*launcher, *pytest_, *map(str, paths)], folder, timeout_s=timeout_s, environ=environ)


class Job:
    """A running job."""

    def __init__(self, command: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self._scratch = tempfile.TemporaryDirectory(prefix="job", ignore_cleanup_errors=True)
        self.began = time.monotonic()
        self._files = [open(folder / name, "w+", errors="replace") for name in ("stdout", "stderr")]  # noqa: SIM115
        self._process = subprocess.Popen(
            command, env=self._environment(environ), cwd=folder, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self._files[0], stderr=self._files[1],
        )  # fmt: skip

    def wait(self, timeout_s: float) -> Outcome:
        """Wait for the end, or make one."""
        deadline = self.began + timeout_s
        while self._process.poll() is None:
            silent_s = time.time() - max([each["time"] for each in self.heard()] or [time.time()])
            if time.monotonic() > deadline or silent_s > STALL_S:
                return self._killed(f"no end after {time.monotonic() - self.began:.0f} s")
            time.sleep(0.02)
        ended = time.time()
        return self._outcome(self._process.returncode, ended, "", self._await_last())

    def heard(self) -> Iterator[dict[str, Any]]:
        """Iterate over what all ranks have said so far."""
        for records in self.records().values():
            yield from records

    def records(self) -> dict[int, list[dict[str, Any]]]:
        """Return what each rank has said so far."""
        found = {}
        for path in sorted(self.folder.glob("rank*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            found[int(path.stem.removeprefix("rank"))] = [json.loads(line) for line in lines if line.endswith("}")]
        return found

    def await_event(self, event: str, *, ranks: int, timeout_s: float = 60.0) -> list[int]:
        """Wait until `ranks` ranks have said `event`; return their pids by rank."""
        deadline = time.monotonic() + timeout_s
        while True:
            pids = {each["rank"]: each["pid"] for each in self.heard() if each["event"] == event}
            if len(pids) == ranks:
                return [pids[rank] for rank in sorted(pids)]
            assert self._process.poll() is None, f"the job ended before {event!r}: {self._read(1)}"
            assert time.monotonic() < deadline, f"only {len(pids)} of {ranks} ranks came as far as {event!r}"
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the launcher, as Ctrl-C or a batch system does."""
        self._process.send_signal(number)

    def processes(self) -> list[int]:
        """Return the pids of this job's processes, the launcher's as well."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._owns(pid)]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._scratch.cleanup()
        for file in self._files:
            file.close()

    def _owns(self, pid: int) -> bool:
        try:
            return f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (OSError, ProcessLookupError):
            return False

    def _await_last(self) -> list[int]:
        """Return who is still there some time after the launcher's end."""
        deadline = time.monotonic() + 5.0
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def _killed(self, why: str) -> Outcome:
        doing = self._hung()
        self._kill()
        return self._outcome(None, time.time(), f"{why}; still running: {doing}", [])

    def _hung(self) -> str:
        """Say what each rank that is still there is doing, with the stacks of its threads."""
        alive = set(self.processes())
        last = {rank: records[-1] for rank, records in self.records().items() if records[-1]["pid"] in alive}
        for each in last.values():
            os.kill(each["pid"], signal.SIGUSR1)
        time.sleep(0.5)
        return "\n".join(
            f"rank {rank}, {time.time() - each['time']:.0f} s after it said '{each['event']} {each['what']}':\n"
            f"{(self.folder / f'rank{rank}.stacks').read_text()}"
            for rank, each in sorted(last.items())
        ) or "no rank that said anything"  # fmt: skip

    def _kill(self) -> None:
        deadline = time.monotonic() + 10.0
        while (pids := self.processes()) and time.monotonic() < deadline:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
            self._process.poll()
        self._process.wait()

    def _outcome(self, code: int | None, ended: float, verdict: str, left_over: list[int]) -> Outcome:
        seconds = time.monotonic() - self.began
        return Outcome(code, self._read(0), self._read(1), self.records(), seconds, ended, verdict, left_over)

    def _read(self, index: int) -> str:
        self._files[index].seek(0)
        return self._files[index].read()

    def _environment(self, additions: Mapping[str, str]) -> dict[str, str]:
        """Return an environment in which launchers are found, whoever the user is, and no outer job shows."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        search = [str(Path(sys.executable).parent), own.get("PATH", os.defpath)]
        search = [str(Path(find_mpi().mpirun).parent), *search]
        paths = [str(TESTS.parent), str(TESTS), own.get("PYTHONPATH", "")]
        return {
            **own,
            "PATH": os.pathsep.join(search),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": self._scratch.name,
            "SHADOWSYNC_JOB_FOLDER": str(self.folder),
            MARK: self.mark,
            **additions,
        }


def is_running(pid: int) -> bool:
    """Tell whether process `pid` is there, and not merely waiting for somebody to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, ProcessLookupError):
        return False


def _last(text: str, lines: int = 60) -> str:
    return "\n".join(text.splitlines()[-lines:])
