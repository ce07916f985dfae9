"""A rank killed in the middle of training on the flights: without it, with it, and what Horovod makes of the same.

    python benchmarks/rank_death.py --json benchmarks/raw/rank_death.json

Runs examples/ctr.py on four ranks, in turns: as it is, and with `kill -9` of one rank after half of its steps (it does
so by itself, so that it is the same step in every run), for several seeds and victims; with Horovod's wrapper too. What
does not end in two minutes is reported as a hang.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "ctr.py"
RANKS = 4
TIMEOUT_S = 120.0
VICTIM, STEP = "RANK_DEATH_VICTIM", "RANK_DEATH_STEP"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, help="of a run; default: all of the ten months")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    records = []
    for seed in range(1, arguments.seeds + 1):
        for name in arguments.cases:
            for victim in (None, seed % RANKS):
                found = run(CASES[name], seed, victim, arguments)
                records.append({"case": name, "seed": seed, "victim": victim, **found})
                print(line_of(records[-1]), flush=True)
    report(records)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


CASES: dict[str, tuple[list[str], list[str]]] = {
    "S-MA": (["--fault-tolerant"], ["--sync", "shadow"]),
    "S-EASGD": (["--fault-tolerant"], ["--sync", "shadow", "--algorithm", "easgd"]),
    "S-BMUF": (["--fault-tolerant"], ["--sync", "shadow", "--algorithm", "bmuf"]),
    "Horovod": ([], ["--sync", "horovod"]),
}
"""Arguments of shadowrun, and of the example."""


def run(options: tuple[list[str], list[str]], seed: int, victim: int | None, arguments: Any) -> dict[str, Any]:
    """Return what came of one job."""
    launcher, example = options
    with tempfile.TemporaryDirectory() as folder:
        report_file = Path(folder) / "report.json"
        steps = ["--steps", str(arguments.steps)] if arguments.steps else []
        command = ["shadowrun", *launcher, "-np", str(RANKS), "--env", VICTIM, "--env", STEP, "python", __file__]
        command += [*example, "--seed", str(seed), "--report", str(report_file), *steps]
        environ = {
            **os.environ,
            VICTIM: str(-1 if victim is None else victim),
            STEP: str((arguments.steps or 266) // 2),
        }
        begun = time.monotonic()
        job = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, code = job.communicate(timeout=TIMEOUT_S)[0], job.returncode
        except subprocess.TimeoutExpired:
            job.terminate()
            output, code = job.communicate()[0], None
        found: dict[str, Any] = {"exit_code": code, "seconds": time.monotonic() - begun}
        if report_file.exists():
            record = json.loads(report_file.read_text())
            found |= {"auc": record["test"]["auc"], "longest_step_ms": record["longest_step_ms"]}
            found |= {name: record["sync"].get(name) for name in ("ranks_lost", "recovery_ms")}
        elif code:
            found["said"] = next((line for line in output.splitlines() if re.search("rror|signal|kill", line)), "")
    return found


def line_of(record: dict[str, Any]) -> str:
    what = "undisturbed" if record["victim"] is None else f"rank {record['victim']} killed"
    if "auc" not in record:
        ended = "hangs" if record["exit_code"] is None else f"ends with code {record['exit_code']}"
        return f"{record['case']}, seed {record['seed']}, {what}: {ended} after {record['seconds']:.1f} s, no result"
    return (
        f"{record['case']}, seed {record['seed']}, {what}: code {record['exit_code']}, AUC {record['auc']:.4f}, "
        f"longest step {record['longest_step_ms']:.0f} ms, recovery {record['recovery_ms'] or 0:.0f} ms"
    )


def report(records: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(each["case"] for each in records)
    print("\n| | finished | AUC | AUC less the undisturbed run's | longest step, ms | recovery, ms |")
    print("|---|---|---|---|---|---|")
    for name in names:
        alone = {each["seed"]: each for each in records if each["case"] == name and each["victim"] is None}
        for killed in (False, True):
            runs = [each for each in records if each["case"] == name and (each["victim"] is not None) == killed]
            done = [each for each in runs if "auc" in each]
            row = [f"{name}, {'a rank killed' if killed else 'undisturbed'}", f"{len(done)} of {len(runs)}"]
            if done:
                row += [spread([each["auc"] for each in done], ".4f")]
                row += [spread([each["auc"] - alone[each["seed"]]["auc"] for each in done], "+.4f") if killed else ""]
                row += [spread([each["longest_step_ms"] for each in done], ".0f")]
                row += [spread([each["recovery_ms"] or 0 for each in done], ".0f") if killed else ""]
            print("| " + " | ".join(row + [""] * (6 - len(row))) + " |")


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def be_rank() -> None:
    """Run the example; where this rank is the victim, die at the given step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    if os.environ.get("OMPI_COMM_WORLD_RANK") == os.environ[VICTIM]:
        last, taken = int(os.environ[STEP]), 0

        def count(*_: object) -> None:
            nonlocal taken
            taken += 1
            if taken == last:
                os.kill(os.getpid(), signal.SIGKILL)

        register_optimizer_step_post_hook(count)
    sys.path.insert(0, str(EXAMPLE.parent))
    sys.argv[0] = str(EXAMPLE)
    runpy.run_path(str(EXAMPLE), run_name="__main__")


if __name__ == "__main__":
    be_rank() if STEP in os.environ else main()
