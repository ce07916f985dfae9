"""Examples/s of this project beside Horovod, DDP, post-local SGD, torchft, hivemind and torchrec, and beside no
synchronisation at all: the same model, data and hosts, in turns, repeated.

    launch/setup && launch/peers                          # the project's environment, and the peers' in .venv-peers
    python benchmarks/compare.py --list                   # what would run, and how long it takes
    python benchmarks/compare.py                          # all of it; tables, benchmarks/raw/compare.json, plots
    python benchmarks/compare.py --resume                 # goes on where it was interrupted
    python benchmarks/compare.py --report-only            # tables and plots of the file, without a run
    python benchmarks/compare.py --networks loopback 1gbit --hosts 2 4 --contenders none 'S-*' horovod

Needs the packages of the extra `examples`; hosts are emulated (Linux, root or user namespaces; see
`hvd_shadowsync.emulated`). In each repeat every contender of a case runs once, the next repeat begins with the next
contender. Every run has processes of its own, one thread of computation each, and a time-out; one that fails is
reported with its last lines. "none" is measured in both environments, to see that they are alike: both have the same
torch. What each peer's configuration is, and why, is said in its file in benchmarks/contenders.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from comparison import records as keeping
from comparison.cases import NETWORKS, WORKLOADS, Case, chosen
from comparison.catalogue import Contender, matching
from comparison.records import Record
from comparison.running import HERE, ROOT, Settings, environment, run_once, why_no_network
from comparison.table import report

START_S = 3.5  # of a rank on a core of its own, from its launcher to its first step
PEERS_MISSING = "not installed; install it with launch/peers"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        cases = chosen(options.workloads, options.networks, options.hosts)
        contenders = matching(options.contenders)
        records = keeping.load(options.json)
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    if options.list:
        print(listed(cases, contenders, options))
        return 0
    if not options.report_only:
        if any(case.workload.base == "dlrm-flights" for case in cases):
            prepare_flights(options.flights)
        run_all(cases, contenders, records, options)
    write_report(records, options)
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--workloads", nargs="+", choices=list(WORKLOADS), default=[], help="default, where nothing is chosen: --list")
    add("--networks", nargs="+", choices=list(NETWORKS), default=[], help="default, with another choice: 1gbit")
    add("--hosts", nargs="+", type=positive(int), default=[], help="default, with another choice: 2")
    add("--contenders", nargs="+", default=[], metavar="NAME", help="or patterns such as 'FR-*'; default all")
    add("--repeats", type=positive(int), default=3)
    add("--seconds", type=positive(float), default=4.0, help="of training that each run measures")
    add("--warmup", type=positive(float), default=1.5, help="seconds of training before that")
    add("--timeout", type=positive(float), default=180.0, help="seconds of a run, from its start")
    add("--list", action="store_true", help="say what would run, and how long it takes")
    add("--resume", action="store_true", help="leave out the runs that are in the file; else they are made anew")
    add("--report-only", action="store_true", help="make tables and plots of the file")
    add("--json", type=Path, default=HERE / "raw/compare.json", help="where all runs are kept")
    add("--table", type=Path, help="a file for the tables, besides the output")
    add("--plots", type=Path, default=HERE / "plots", help="folder")
    add("--peers", type=Path, default=ROOT / ".venv-peers/bin/python", help="Python of the peers' environment")
    add("--flights", type=Path, default=ROOT / "runs/compare/flights.pt", help="where the flights are kept as tensors")
    return result


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
        return value

    read.__name__ = f"{kind.__name__} above 0"
    return read


# --- what runs --------------------------------------------------------------------------------------------------------


def listed(cases: list[Case], contenders: list[Contender], options: argparse.Namespace) -> str:
    """Return the cases, the contenders that run them, and the time that they take about."""
    lines, total_s = [], 0.0
    for case in cases:
        running = [each for each in contenders if not why_not(case, each, options)]
        case_s = options.repeats * sum(estimate_s(case, each, options) for each in running)
        total_s += case_s
        lines.append(f"{case.title}: {case_s / 60:.0f} min\n    {', '.join(each.name for each in running)}")
        for each in contenders:
            if reason := why_not(case, each, options):
                lines.append(f"    not {each.name}: {reason}")
    lines.append(f"{options.repeats} repeats, about {timedelta(seconds=round(total_s))} in all")
    return "\n".join(lines)


def estimate_s(case: Case, contender: Contender, options: argparse.Namespace) -> float:
    """Return about how long a run takes: its start, its warm-up, and a period of steps if that is longer."""
    crowd = max(1.0, case.hosts / len(os.sched_getaffinity(0)))
    period_s = contender.every * case.workload.step_s * crowd * (2 if case.workload.slow else 1)
    warm_s = max(options.warmup, contender.warm_s, period_s)
    measured_s = max(options.seconds, contender.least_s, period_s) + contender.pauses * options.seconds
    return START_S * crowd + warm_s + measured_s


def why_not(case: Case, contender: Contender, options: argparse.Namespace) -> str:
    """Return why a contender does not run a case here; empty where it does."""
    if contender.peers and not options.peers.exists():
        return PEERS_MISSING
    return contender.why_not(case.workload.base)


def run_all(cases: list[Case], contenders: list[Contender], records: list[Record], options: argparse.Namespace) -> None:
    """Make all runs, in turns, and keep each at once."""
    settings = Settings(options.seconds, options.warmup, options.timeout, options.flights.resolve(), options.peers)
    for case in cases:
        unreachable = why_no_network(case)
        running: list[tuple[Contender, Record]] = []
        for contender in contenders:
            record = opened(records, case, contender, resume=options.resume)
            if reason := unreachable or why_not(case, contender, options):
                record["not_run"] = reason
            else:
                running.append((contender, record))
        keeping.save(options.json, records)
        for repeat, (contender, record) in turns(running, options.repeats):
            if repeat in {run["repeat"] for run in record["runs"]}:
                continue
            run = run_once(case, contender, settings)
            keeping.add(record, repeat, run)
            keeping.save(options.json, records)
            said = run["failed"].splitlines()[0] if "failed" in run else f"{run['examples_per_s']:.0f} examples/s"
            print(f"{datetime.now():%H:%M:%S} {case.name}, repeat {repeat}, {contender.name}: {said}", flush=True)


def opened(records: list[Record], case: Case, contender: Contender, *, resume: bool) -> Record:
    """Return the record that takes the runs: the old one to go on with, or a new one in its place."""
    old = keeping.find(records, case, contender)
    if old is not None and resume:
        return old
    new = keeping.blank(case, contender)
    if old is None:
        records.append(new)
    else:
        records[records.index(old)] = new
    return new


def turns(running: list[tuple[Contender, Record]], repeats: int) -> Iterator[tuple[int, tuple[Contender, Record]]]:
    """Yield each contender once in each repeat, beginning with the next one each time."""
    for repeat in range(repeats):
        first = repeat % max(len(running), 1)
        for each in running[first:] + running[:first]:
            yield repeat, each


def prepare_flights(path: Path) -> None:
    """Write the flights as tensors, once."""
    if path.exists():
        return
    code = "import sys, pathlib, workloads; workloads.save_flights(pathlib.Path(sys.argv[1]))"
    environ = {**environment(), "PYTHONPATH": str(HERE / "contenders")}
    subprocess.run([sys.executable, "-c", code, str(path)], env=environ, check=True)


def write_report(records: list[Record], options: argparse.Namespace) -> None:
    text = report(records)
    print(text)
    if options.table:
        options.table.write_text(text, encoding="utf-8")
    try:
        from comparison.plots import draw_all
    except ModuleNotFoundError as error:
        print(f"compare.py: no plots: {error.name} is missing (pip install '.[examples]')", file=sys.stderr)
        return
    for path in draw_all(records, options.plots):
        print(path, file=sys.stderr)


def end(*_: object) -> None:
    """End as after an exception, so that the run under way ends as well."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    sys.exit(main())
