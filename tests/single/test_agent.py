"""What starts daemons on other hosts: an error of ssh is one until the ranks have begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_shadowsync import agent

TIMEOUT_S = 60


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(command: list[str], begun: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = os.environ | ({agent.BEGUN: str(begun)} if begun else {})
    start = [sys.executable, agent.__file__, *command]
    return subprocess.run(start, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 137)])
def test_an_error_is_kept_from_the_launcher_once_ranks_have_begun(script: str, code: int, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    assert run(["sh", "-c", script]).returncode == code
    assert run(["sh", "-c", script], begun).returncode == code
    begun.touch()
    assert run(["sh", "-c", script], begun).returncode == 0


def test_arguments_and_output_are_those_of_ssh(tmp_path: Path) -> None:
    assert run(["sh", "-c", 'printf "<%s>" "$@"', "ssh", "-x", "h1", "a  b"]).stdout == "<-x><h1><a  b>"
    missing = run([str(tmp_path / "no-ssh")])
    assert missing.returncode == 127
    assert "no-ssh does not start (No such file or directory)" in missing.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a process with its parent")
def test_ssh_ends_with_it() -> None:
    start = [sys.executable, agent.__file__, "sh", "-c", "echo $$; exec sleep 99"]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ssh = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while is_running(ssh) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(ssh)
