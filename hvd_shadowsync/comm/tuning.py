"""MPI settings that must be in the environment before MPI is initialised; a setting of the user's is never touched."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

EAGER_BYTES = 512 << 10
"""What MPI is to send at once, without asking the receiver first."""
HEADER_BYTES = 4096

MPI_DEFAULTS: Mapping[str, str] = {
    # Same name and value in Open MPI 4 and 5; their own choice for large messages takes about twice the ring's time.
    "OMPI_MCA_coll_libnbc_iallreduce_algorithm": "ring",
    # What is longer is sent over TCP only once the other rank, which polls now and then, has answered, and the link
    # idles until then.
    "OMPI_MCA_btl_tcp_eager_limit": str(EAGER_BYTES + HEADER_BYTES),
}

MCA_PREFIX = "OMPI_MCA_"
FILE_LIST_PARAMETERS = ("mca_base_param_files", "mca_param_files")


def tune_environment(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Set each of `MPI_DEFAULTS` that the user has not set, and return those; call it before MPI is initialised.

    A parameter counts as set by the user when its variable is there (`mpirun --mca` makes one too), or when one of
    Open MPI's parameter files names it. Libraries other than Open MPI do not read these variables.
    """
    settings = missing_defaults(environ)
    environ.update(settings)
    return settings


def missing_defaults(environ: Mapping[str, str]) -> dict[str, str]:
    """Return those of `MPI_DEFAULTS` that neither `environ` nor one of Open MPI's parameter files sets."""
    absent = {name: value for name, value in MPI_DEFAULTS.items() if name not in environ}
    in_files = set(_parameters_in_files(environ)) if absent else set()
    return {name: value for name, value in absent.items() if name.removeprefix(MCA_PREFIX) not in in_files}


def parameter_files(environ: Mapping[str, str]) -> list[Path]:
    """Return the parameter files that Open MPI would read under `environ`, whether they exist or not."""
    for name in FILE_LIST_PARAMETERS:
        if listed := environ.get(MCA_PREFIX + name):
            return [Path(entry) for entry in re.split("[,:]", listed) if entry]
    prefixes = dict.fromkeys([environ.get("OPAL_PREFIX", ""), sys.prefix, "/etc/openmpi", "/usr/local"])
    system = [Path(prefix, *([] if prefix == "/etc/openmpi" else ["etc"])) for prefix in prefixes if prefix]
    home = [Path(environ["HOME"], ".openmpi", "mca-params.conf")] if "HOME" in environ else []
    return home + [folder / "openmpi-mca-params.conf" for folder in system]


def _parameters_in_files(environ: Mapping[str, str]) -> Iterator[str]:
    for path in parameter_files(environ):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        yield from re.findall(r"^[ \t]*(\w+)[ \t]*=", text, re.MULTILINE)
