"""MPI settings made before MPI starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvd_shadowsync.comm.tuning import MPI_DEFAULTS, missing_defaults, parameter_files, tune_environment

RING = "OMPI_MCA_coll_libnbc_iallreduce_algorithm"
EAGER = {"OMPI_MCA_btl_tcp_eager_limit": str(512 * 1024 + 4096)}


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """An environment whose parameter files are all in an empty folder."""
    return {"OMPI_MCA_mca_base_param_files": str(tmp_path / "params.conf")}


def test_sets_the_ring_and_sends_long_messages_at_once(nowhere: dict[str, str]) -> None:
    assert tune_environment(nowhere) == {RING: "ring", **EAGER}
    assert nowhere[RING] == "ring"
    assert tune_environment(nowhere) == {}


def test_leaves_the_users_variable_alone(nowhere: dict[str, str]) -> None:
    nowhere[RING] = "rabenseifner"
    assert tune_environment(nowhere) == EAGER
    assert nowhere[RING] == "rabenseifner"


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("coll_libnbc_iallreduce_algorithm = 3\n", EAGER),
        ("btl_tcp_eager_limit = 65536\n", {RING: "ring"}),
        ("# a comment\n  coll_libnbc_iallreduce_algorithm=3", EAGER),
        ("# coll_libnbc_iallreduce_algorithm = 3\n", dict(MPI_DEFAULTS)),
        ("coll_libnbc_ibcast_algorithm = 3\n", dict(MPI_DEFAULTS)),
    ],
)
def test_reads_the_users_parameter_file(nowhere: dict[str, str], text: str, settings: dict[str, str]) -> None:
    Path(nowhere["OMPI_MCA_mca_base_param_files"]).write_text(text)
    assert missing_defaults(nowhere) == settings


def test_parameter_files_default_to_home_and_prefix(tmp_path: Path) -> None:
    files = parameter_files({"HOME": str(tmp_path), "OPAL_PREFIX": "/opt/ompi"})
    assert files[0] == tmp_path / ".openmpi" / "mca-params.conf"
    assert Path("/opt/ompi/etc/openmpi-mca-params.conf") in files
    assert Path("/etc/openmpi/openmpi-mca-params.conf") in files


def test_home_file_counts(tmp_path: Path) -> None:
    (tmp_path / ".openmpi").mkdir()
    (tmp_path / ".openmpi" / "mca-params.conf").write_text("coll_libnbc_iallreduce_algorithm = binomial\n")
    assert missing_defaults({"HOME": str(tmp_path)}) == EAGER


def test_imports_neither_mpi_nor_torch() -> None:
    path = Path(sys.modules["hvd_shadowsync.comm.tuning"].__file__ or "")
    check = "sys.exit(not {'torch', 'mpi4py'}.isdisjoint(sys.modules))"
    program = f"import runpy, sys; runpy.run_path({str(path)!r}); {check}"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
