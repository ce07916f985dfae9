"""The options of the command: what they mean, the setting that they make, and messages about them."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from hvd_shadowsync.capacity.setting import ALGORITHMS, Chunking, Cluster, Costs, Job, Setting, Unevenness
from hvd_shadowsync.pacing import Pacing


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one such as 40") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one such as 100") from None


OPTION_OF = {"dense_bytes": "dense_mb", "chunk_bytes": "chunk_mb"}
"""Those in 10^6 bytes, by attribute."""
OF_RECORDS = ("dense_mb", "step_ms", "batch", "hosts", "ranks_per_host", "gbps", "fixed_every", "plot", "seed")
"""Options that do not go with `--validate`: records say these, or nothing is drawn."""
METAVARS = {_number: "X", _whole: "N", str: "NAME"}
JOB, CLUSTER, COSTS, EVEN = Job(1.0, 1.0), Cluster(hosts=1), Costs(), Unevenness()
SETTING = Setting(JOB, CLUSTER)
OPTIONS: dict[str, list[tuple[str, Any, Any, str]]] = {
    "the job": [
        ("--dense-mb", _number, None, "weights that are synchronised, 10^6 bytes"),
        ("--step-ms", _number, None, "a training step without synchronisation"),
        ("--batch", _number, JOB.batch, "examples in a step of a rank"),
    ],
    "the hosts": [
        ("--hosts", _whole, None, "number of hosts"),
        ("--ranks-per-host", _whole, CLUSTER.ranks_per_host, "ranks of each"),
        ("--gbps", _number, CLUSTER.gbps, "rate of a host's link in each direction, Gbit/s"),
        ("--latency-us", _number, CLUSTER.latency_us, "a small message from host to host, one way"),
        ("--goodput", _number, CLUSTER.goodput, "share of the rate that payload gets"),
        ("--memory-gbs", _number, CLUSTER.memory_gbs, "what a rank's thread moves in memory, 10^9 bytes/s"),
        ("--cores-per-host", _number, None, "cores that ranks and communicator threads share; default: none is short"),
        ("--cores", _number, None, "with --validate: cores of the machine that all hosts are emulated on"),
        (
            "--algorithm",
            str,
            CLUSTER.algorithm,
            f"of allreduces: {', '.join(ALGORITHMS)} (the faster); rounds set the ring",
        ),
    ],
    "costs of a rank": [
        ("--cpu-s-per-gb", _number, COSTS.cpu_s_per_gb, "CPU seconds for a GB on the wire: TCP, sums"),
        ("--round-cpu-s-per-gb", _number, COSTS.round_cpu_s_per_gb, "CPU seconds of a round for a GB of weights"),
        ("--merge-cpu-s-per-gb", _number, COSTS.merge_cpu_s_per_gb, "CPU seconds of training to merge a GB of weights"),
        (
            "--cpu-us-per-look",
            _number,
            COSTS.cpu_us_per_look,
            "CPU microseconds to look whether a reduction is through",
        ),
        ("--cpu-us-per-message", _number, COSTS.cpu_us_per_message, "CPU microseconds for a message"),
        ("--cpu-us-per-round", _number, COSTS.cpu_us_per_round, "CPU microseconds of a round, however few its bytes"),
    ],
    "ways": [
        ("--overlap", _number, SETTING.overlap, "share of a step in which per-step allreduce hides behind backward"),
        ("--fixed-every", _whole, SETTING.fixed_every, "steps from round to round at a fixed rate"),
        ("--cpu-budget", _number, None, "share of a core for shadow rounds; default: 0.02, where nothing else paces"),
        ("--sync-every", _whole, None, "steps that a shadow round waits for"),
        ("--sync-interval-ms", _number, None, "from shadow round to shadow round"),
        ("--chunk-mb", _number, None, "one of a round's reductions, 10^6 bytes; default: 1 to 4 MiB, by ranks"),
        ("--in-flight", _whole, SETTING.chunking.in_flight, "reductions of a round under way at a time"),
    ],
    "unevenness": [
        ("--jitter", _number, EVEN.jitter, "coefficient of variation of steps, which are lognormal"),
        ("--slow-share", _number, EVEN.slow_share, "share of ranks that are slow"),
        ("--slow-factor", _number, EVEN.slow_factor, "how many times longer their steps take"),
        ("--stall-share", _number, EVEN.stall_share, "share of steps that stall"),
        ("--stall-ms", _number, EVEN.stall_ms, "milliseconds of a stall"),
        ("--seed", _whole, 0, "of the simulation"),
    ],
}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m hvd_shadowsync.capacity",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, kind, default, meaning in options:
            known = f" (default: {default})" if default is not None else ""
            group.add_argument(flag, type=kind, help=meaning + known, metavar=METAVARS[kind])
    group = parser.add_argument_group("output")
    group.add_argument("--plot", type=Path, metavar="FILE.png", help="examples/s and sync gap over 1 to 10,000 hosts")
    group.add_argument("--json", type=Path, metavar="FILE", help="the table as JSON")
    group.add_argument("--validate", type=Path, nargs="+", metavar="FILE", help="measured runs, beside predicted ones")
    return parser


def setting_of(args: argparse.Namespace) -> Setting:
    """Return what the options ask about; raises where one of them is wrong."""

    def given(kind: Any, **more: Any) -> Any:
        named = {each.name: getattr(args, each.name, None) for each in fields(kind)} | more
        return kind(**{name: value for name, value in named.items() if value is not None})

    chunking = given(Chunking, chunk_bytes=None if args.chunk_mb is None else 1e6 * args.chunk_mb)
    parts = {"cluster": Cluster, "costs": Costs, "unevenness": Unevenness, "pacing": Pacing}
    job = given(Job, dense_bytes=1e6 * args.dense_mb)
    setting: Setting = given(Setting, job=job, chunking=chunking, **{name: given(kind) for name, kind in parts.items()})
    return setting


def as_option(message: str) -> str:
    """Return a message about an attribute as one about the option that it comes from."""
    found = re.match(r"(\w+)=(\S+) (.*)", message, re.DOTALL)
    if not found:
        return message
    name, value, rest = found.groups()
    if name in OPTION_OF:
        return f"--{OPTION_OF[name].replace('_', '-')} {float(value) / 1e6:g} {rest}"
    return f"--{name.replace('_', '-')} {value} {rest}"
