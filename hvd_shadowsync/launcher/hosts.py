"""Hosts with their slots, as a command line or a file says them."""

from __future__ import annotations

import re

from hvd_shadowsync.launcher.command import Host, LaunchError


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Parse `h0:2,h1`; the slots may be left out.

    Raises:
        LaunchError: an entry is not NAME or NAME:SLOTS, or a host comes twice.
    """
    return _checked_hosts([_parse_host(entry.strip(), source=f"--hosts {text}") for entry in text.split(",")])


def parse_hostfile(text: str) -> tuple[Host, ...]:
    """Parse the lines of a host file, `h0 slots=2` (Open MPI, Horovod) or `h0:2` (MPICH); # begins a comment.

    Raises:
        LaunchError: a line is neither, or a host comes twice.
    """
    lines = [line for raw in text.splitlines() if (line := raw.split("#")[0].strip())]
    entries = [re.sub(r"\s+slots\s*=\s*", ":", line).split()[0] for line in lines]
    return _checked_hosts([_parse_host(entry, source="the host file") for entry in entries])


def _parse_host(entry: str, *, source: str) -> Host:
    match = re.fullmatch(r"([^\s:]+)(?::(\d+))?", entry)
    if match is None or match[2] == "0":
        raise LaunchError(f"{entry!r} in {source} is not a host; write NAME or NAME:SLOTS, slots at least 1")
    return Host(match[1], int(match[2]) if match[2] else None)


def _checked_hosts(hosts: list[Host]) -> tuple[Host, ...]:
    names = [host.name for host in hosts]
    if not hosts or len(set(names)) < len(names):
        raise LaunchError(f"hosts {','.join(names)!r}: name at least one, and each once (NAME:SLOTS for more ranks)")
    return tuple(hosts)
