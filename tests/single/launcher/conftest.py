"""Programs for a PATH of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Executable = Callable[[str, str], Path]


@pytest.fixture
def executable(tmp_path: Path) -> Executable:
    """Makes an executable file that prints a text: `executable("bin/mpirun", text)`."""

    def make(name: str, body: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, executable: Executable) -> Path:
    """A machine whose Python stands alone: no MPI, no Horovod; returns the folder that is PATH."""
    python = executable("alone/python3", "exit 1")
    (tmp_path / "path").mkdir()
    monkeypatch.setattr(sys, "executable", str(python))
    for name in [name for name in os.environ if name.startswith(("OMPI_", "OMP_", "MKL_", "SLURM_", "SHADOWRUN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_MCA_mca_base_param_files", "/nonexistent")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return tmp_path / "path"
