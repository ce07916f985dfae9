"""How good the trained model is: AUC and normalised entropy of every algorithm, 1 to 8 trainers, equal examples.

    python benchmarks/quality.py --list                  # what would run, and for how long
    python benchmarks/quality.py                         # all of it: an hour on 2 cores
    python benchmarks/quality.py --resume                # go on with what is missing in benchmarks/raw/quality.json
    python benchmarks/quality.py --report-only           # tables and plots of what is there
    python benchmarks/quality.py --quick                 # a look in two minutes, into runs/quality

The flights of examples/flights.py, the model, training and learning rate of examples/ctr.py; Horovod and the algorithms
of the goal at half and twice that rate as well. The figures are of the last two months, over 5 seeds. Every run is a
job of real ranks under mpirun (one start trains several configurations), and is kept as soon as it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import quality_plots
import quality_report
from quality_plan import (
    BATCH_SIZE,
    GOAL,
    MOST_TRAINERS,
    REST,
    Choice,
    Result,
    Run,
    jobs,
    stages,
)

HERE = Path(__file__).resolve().parent
QUICK = Choice(trainers=(2,), seeds=2, algorithms=GOAL, sweep=False, other_rates=())
QUICK_EXAMPLES = 40_960
RUN_S, START_S = 3.0, {1: 8.0, 2: 10.0, 4: 15.0, 8: 30.0}  # guesses of --list where nothing was measured yet


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    choice = Choice(**{field.name: getattr(args, field.name) for field in fields(Choice)})
    try:
        results = Results(args.results, {"batch_size": BATCH_SIZE, "examples": args.examples})
        if not args.report_only and not args.list and results.found and not args.resume:
            raise ValueError(f"{args.results} exists: go on with --resume, name another with --results, or remove it")
        if args.report_only and not results.found:
            raise FileNotFoundError(f"{args.results} does not exist: leave --report-only out to measure")
    except (FileNotFoundError, ValueError) as error:
        print(f"quality.py: {error}", file=sys.stderr)
        sys.exit(2)
    if args.list:
        print(listing(choice, results))
        return
    if not args.report_only:
        measure(choice, results, args.max_runs)
    for path in quality_plots.draw(choice, results.found, args.plots):
        print(f"{path} written", file=sys.stderr)
    print(quality_report.report(choice, results.found, results.about))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trainers", type=int, nargs="+", choices=[2, 4, 8], help="beside one process; default 2 4 8")
    add("--seeds", type=int, metavar="N", help="seeds 1 to N; default 5")
    add(
        "--algorithms",
        nargs="+",
        choices=[*GOAL, *REST],
        metavar="NAME",
        help=f"default all: {', '.join([*GOAL, *REST])}",
    )
    add("--sweep", action=argparse.BooleanOptionalAction, help="sync gaps from 1 to 1000 steps; default yes")
    add("--learning-rate", type=float, metavar="LR", help="default 0.02, the examples'")
    add("--other-rates", type=float, nargs="*", metavar="LR", help="compared at these as well; default 0.01 0.04")
    add("--examples", type=int, metavar="N", help="train on the first N rows only; default all")
    add("--quick", action="store_true", help="2 trainers, 2 seeds, 40,960 rows, one learning rate, no sweep")
    add("--list", action="store_true", help="say what would run and how long it may take, and end")
    add("--resume", action="store_true", help="keep the results that are there and run what is missing")
    add("--report-only", action="store_true", help="run nothing")
    add("--max-runs", type=int, metavar="N", help="end after so many runs; --resume goes on")
    add("--results", type=Path, metavar="FILE.json", help="default benchmarks/raw/quality.json")
    add("--plots", type=Path, metavar="FOLDER", help="default benchmarks/plots")
    args = parser.parse_args(argv)
    chunk = BATCH_SIZE * MOST_TRAINERS
    for name, least in (("seeds", 1), ("max_runs", 1), ("examples", chunk)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    for name, rates in (("learning-rate", [args.learning_rate]), ("other-rates", args.other_rates or [])):
        for rate in rates:
            if rate is not None and not 0 < rate < float("inf"):
                parser.error(f"--{name} {rate}: expected finite values above 0")
    for name, value in asdict(QUICK if args.quick else Choice()).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.quick and args.examples is None:
        args.examples = QUICK_EXAMPLES
    folder = HERE.parent / "runs/quality" if args.quick else HERE
    args.results = args.results or folder / ("quality.json" if args.quick else "raw/quality.json")
    args.plots = args.plots or folder / "plots"
    return args


class Results:
    """The file of results, written anew after each run; `about` says how and where they were measured."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.about = {"settings": settings, "machine": machine()}
        self.found: list[Result] = []
        if path.is_file():
            self._read(settings)

    def _read(self, settings: dict[str, Any]) -> None:
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            self.found, about = kept["runs"], kept["about"]
            for result in self.found:
                Run(**result["run"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.path} holds no results of this benchmark ({error!r}); remove it") from error
        if about["settings"] != settings:
            raise ValueError(
                f"{self.path} was measured with {about['settings']}, not {settings}; name another file with --results"
            )
        self.about = about

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs that have no result yet."""
        done = {Run(**result["run"]) for result in self.found}
        return [run for run in dict.fromkeys(runs) if run not in done]

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.found.append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(each) for each in self.found)
        text = f'{{"about": {json.dumps(self.about)},\n"runs": [\n{lines}\n]}}\n'
        written = self.path.with_suffix(".new")
        written.write_text(text, encoding="utf-8")
        written.replace(self.path)


def machine() -> str:
    """Return the processor and the versions of what trains on it."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "horovod", "mpi4py"))
    return f"{len(os.sched_getaffinity(0))} cores of {named[1] if named else platform.machine()}; {versions}"


# --- running ----------------------------------------------------------------------------------------------------------


def measure(choice: Choice, results: Results, max_runs: int | None) -> None:
    """Run what is missing, stage by stage."""
    left = sys.maxsize if max_runs is None else max_runs
    for runs in stages(choice).values():
        left -= perform(results, results.missing(runs)[:left])


def perform(results: Results, runs: Sequence[Run]) -> int:
    """Run, and keep each result; return how many."""
    for job in jobs(runs):
        for result in job_results(job, results.about["settings"]["examples"]):
            results.add(result)
            print(f"{time.strftime('%H:%M:%S')} {described(result)}", file=sys.stderr, flush=True)
    return len(runs)


def job_results(job: Sequence[Run], examples: int | None) -> Iterator[Result]:
    """Start a job and iterate over its results as they come; the end of the program where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "runs.json"
        asked.write_text(json.dumps([asdict(run) for run in job]), encoding="utf-8")
        command = [sys.executable, "-m", "hvd_shadowsync.run", "-np", str(job[0].trainers)]
        command += ["python", str(HERE / "quality_training.py"), str(asked), *([str(examples)] if examples else [])]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), environ.get("PYTHONPATH")]))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
    if process.returncode:
        sys.exit(f"quality.py: {' '.join(command)} ended with code {process.returncode}; --resume goes on after it")


def described(result: Result) -> str:
    run = Run(**result["run"])
    auc = "diverged" if result["auc"] is None else f"AUC {result['auc']:.4f}"
    every = f", every {run.sync_every} steps" if run.sync_every else ""
    return (
        f"{run.method}, {run.trainers} trainer(s), seed {run.seed}, lr {run.learning_rate:g}{every}"
        f": {auc} in {result['seconds']:.1f} s"
    )


def listing(choice: Choice, results: Results) -> str:
    """Return a table of the stages: runs, those that are missing, and a guess of the minutes that they need."""
    seconds = {n: [each["seconds"] for each in results.found if each["run"]["trainers"] == n] for n in START_S}
    lines = ["| stage | trainers | algorithms | runs | missing | minutes, about |", "|---|---|---|---|---|---|"]
    total_s = 0.0
    for stage, runs in stages(choice).items():
        for trainers in sorted({run.trainers for run in runs}):
            these = [run for run in runs if run.trainers == trainers]
            missing = results.missing(these)
            run_s = statistics.median(seconds[trainers]) + 1 if seconds[trainers] else RUN_S
            need_s = len(missing) * run_s + len(list(jobs(missing))) * START_S[trainers]
            total_s += need_s
            names = ", ".join(dict.fromkeys(run.method for run in these))
            lines.append(f"| {stage} | {trainers} | {names} | {len(these)} | {len(missing)} | {need_s / 60:.0f} |")
    return "\n".join([*lines, f"\nAbout {total_s / 60:.0f} minutes on an idle machine."])


if __name__ == "__main__":
    main()
