"""Jobs with faults at random moments: how many hang, end with a wrong code, lose a checkpoint or differ in weights.

    python benchmarks/faults.py --jobs 200 --seed 0
    python benchmarks/faults.py --jobs 1 --seed 17        # the job of seed 17 again

Each job has 2 to 4 ranks on this machine, a random algorithm, pacing and wire dtype, in the background or not, with a
Checkpointer or without one, with sharded tables (of which there are copies, or checkpoints) or without, and one fault,
all drawn by the job's seed; when exactly a signal hits is up to the machine. A job is right if it ends in time, with
the code that it should have, with the same weights and rows on all ranks that are left, and with a newest checkpoint
that loads and is no older than the last one that was reported as written. Of a hang it is printed where each process
is. Raw results are kept in benchmarks/raw/faults.json. Needs Open MPI 5.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

RAW = Path(__file__).parent / "raw" / "faults.json"
PROGRAM = Path(__file__).parent / "faults_job.py"
MARK = "SHADOWSYNC_FAULTS_JOB"
LOST_CODE = 3
WEIGHTS = {
    "kill": 5, "kill two": 3, "kill all": 1, "stop": 2, "terminate": 3, "kill in a write": 3, "exception": 2,
    "exit": 1, "full disk": 2, "corrupt": 2,
}  # fmt: skip
"""Kinds of faults, and how often each is drawn."""
WITH_CHECKPOINTS = {"terminate", "kill in a write", "full disk", "corrupt"}
Settings = dict[str, Any]
Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first job; the next ones have the next numbers")
    parser.add_argument("--kinds", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="only these faults")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a job counts as hanging")
    parser.add_argument("--json", type=Path, default=RAW, help="where the raw results are kept")
    arguments = parser.parse_args()
    records: list[Record] = []
    for seed in range(arguments.seed, arguments.seed + arguments.jobs):
        settings = drawn(random.Random(seed), arguments.kinds)
        record = {"seed": seed, **run(settings, random.Random(-1 - seed), arguments.limit)}
        records.append(record)
        print(line(record), flush=True)
        arguments.json.parent.mkdir(exist_ok=True)
        arguments.json.write_text(json.dumps(summary(records), indent=1) + "\n", encoding="utf-8")
    print(table(records))
    if failed := [each["seed"] for each in records if each["wrong"]]:
        sys.exit(f"failed, to be run again with --jobs 1 --seed: {', '.join(map(str, failed))}")


# --- what is drawn ----------------------------------------------------------------------------------------------------


def drawn(choice: random.Random, kinds: list[str]) -> Settings:
    """Return the settings of a job (pure)."""
    kind = choice.choices(kinds, [WEIGHTS[each] for each in kinds])[0]
    size = choice.choice([2, 3, 4] if kind != "kill two" else [3, 4])
    algorithm, foreground = choice.choice(["S-MA", "S-EASGD", "S-BMUF"]), choice.random() < 0.3
    pacing: Settings = {"sync_every": choice.choice([1, 2, 7])}
    if not foreground:
        pacing = choice.choice([pacing, pacing, {"sync_interval_ms": choice.choice([5, 50])}, {"cpu_budget": 0.2}])
    by_steps = "sync_every" in pacing and not foreground
    settings: Settings = {
        "size": size,
        "algorithm": algorithm,
        "foreground": foreground,
        **pacing,
        "apply": "hogwild" if by_steps and choice.random() < 0.15 else "boundary",
        "wire_dtype": choice.choice([None, None, "float16", "bfloat16"]) if algorithm != "S-EASGD" else None,
        "warmup_steps": choice.choice([0, 0, 0, 60]),
        "meets": choice.choice(["nothing", "gather", "metrics", "optimizer", "weights"]),
        "steps": choice.choice([150, 300]),
        "checkpoints": kind in WITH_CHECKPOINTS or choice.random() < 0.5,
        "every_steps": choice.choice([5, 20, 40]),
        "strict": choice.random() < 0.3,
    }
    settings["tables"] = choice.choice([None, None, None, "copies", "checkpoint", "served"])
    if settings["tables"] in ("checkpoint", "served"):
        settings["checkpoints"] = True
    if kind == "exit":  # others' collective calls do not go with its end, which is an error on all ranks
        settings |= {"checkpoints": False, "meets": "nothing", "tables": None}
    return {**settings, "fault": fault(kind, settings, choice)}


def fault(kind: str, settings: Settings, choice: random.Random) -> Settings:
    """Return what is to happen: to which ranks, and when: as a step, or as a share of the time that training takes."""
    steps, size = settings["steps"], settings["size"]
    made: Settings = {"kind": kind, "rank": choice.randrange(size), "moment": choice.uniform(0.0, 1.4)}
    if kind == "kill two":
        made |= {"second": choice.choice([r for r in range(size) if r != made["rank"]])}
        made |= {"later_s": choice.choice([0.0, 0.0, choice.uniform(0.0, 1.0)])}
    elif kind == "stop":
        made |= {"stopped_s": choice.uniform(0.2, 4.0)}
    elif kind == "kill in a write":
        made |= {"rank": 0, "write": choice.choice([1, 2, 3])}
    elif kind in ("exception", "exit"):
        made |= {"step": choice.randrange(1, steps), "code": 7}
    elif kind == "full disk":
        made |= {"step": choice.randrange(steps // 2), "steps": choice.randrange(10, steps)}
    elif kind == "corrupt":
        made |= {"damage": choice.choice(["flip", "truncate", "no manifest", "empty manifest"])}
    return made


# --- a job ------------------------------------------------------------------------------------------------------------


def run(settings: Settings, choice: random.Random, limit_s: float) -> Record:
    """Run a job, and another one where the first one's newest checkpoint is damaged; return what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    begun = time.monotonic()
    try:
        checkpoints = str(folder / "checkpoints") if settings["checkpoints"] else None
        job = Job({**settings, "checkpoints": checkpoints}, folder / "job", limit_s)
        wrong = job.wait(choice)
        if settings["fault"]["kind"] == "corrupt" and not wrong:
            damaged = damage(Path(str(checkpoints)), settings["fault"]["damage"])
            job = Job({**settings, "checkpoints": checkpoints}, folder / "again", limit_s)
            wrong = job.wait(choice)
            loaded = {each["path"] for each in job.events("loaded")}
            if not wrong and (len(loaded) != 1 or not loaded - {None, str(damaged)}):
                wrong = [f"after damage to {damaged} the ranks loaded {loaded}"]
        record = {"settings": settings, "code": job.code, "seconds": round(time.monotonic() - begun, 1), "wrong": wrong}
        return {**record, "errors": job.errors()[-6000:]} if wrong else record
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Job:
    """A running job and what its ranks have said."""

    def __init__(self, settings: Settings, folder: Path, limit_s: float) -> None:
        self.settings, self.folder = settings, folder
        self.fault = settings["fault"]
        folder.mkdir()
        (folder / "tmp").mkdir()
        self.mark = uuid.uuid4().hex
        self.deadline = time.monotonic() + limit_s
        self.code: int | None = None
        strict = ["--strict"] if settings["strict"] else []
        options = ["-np", str(settings["size"]), "--fault-tolerant", *strict, "--threads", "1"]
        told = json.dumps({**settings, "folder": str(folder)})
        command = [sys.executable, "-m", "hvd_shadowsync.run", *options, "python", str(PROGRAM), told]
        variables = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm", "TMPDIR": str(folder / "tmp"), MARK: self.mark}
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            self.process = subprocess.Popen(
                command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, choice: random.Random) -> list[str]:
        """Let the fault happen, wait for the end, and return all that is wrong with it."""
        try:
            self.disturb()
            if not self.until(lambda: False, self.deadline):
                return [f"hang\n{self.whereabouts()}"]
            self.code = self.process.returncode
            return [*self.wrong_end(), *self.wrong_checkpoints()]
        finally:
            self.kill()

    # --- the fault ----------------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Do what comes from outside."""
        kind, size, moment = self.fault["kind"], self.settings["size"], self.fault["moment"]
        if kind not in ("kill", "kill two", "kill all", "stop", "terminate"):
            return
        first = "trains" if kind == "terminate" else "begin"
        self.until(lambda: len(self.events(first)) == size, self.deadline)
        steps_s = self.settings["steps"] * 0.006 + (2.0 if first == "begin" else 0.0)
        self.until(lambda: False, min(self.deadline, time.monotonic() + moment * steps_s))
        if kind == "kill all":
            for rank in range(size):
                self.signal(rank, signal.SIGKILL)
            return
        number = {"stop": signal.SIGSTOP, "terminate": signal.SIGTERM}.get(kind, signal.SIGKILL)
        self.signal(self.fault["rank"], number)
        if kind == "kill two":
            time.sleep(self.fault["later_s"])
            self.signal(self.fault["second"], signal.SIGKILL)
        if kind == "stop":
            time.sleep(self.fault["stopped_s"])
            self.signal(self.fault["rank"], signal.SIGCONT)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Signal a rank, if it is there."""
        for each in self.events("begin"):
            if each["rank"] == rank and each["pid"] in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(each["pid"], number)
                with open(self.folder / "faults.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"event": number.name, "rank": rank}) + "\n")

    # --- what is wrong ------------------------------------------------------------------------------------------------

    def wrong_end(self) -> list[str]:
        """Return what is wrong with the exit code and with the weights."""
        kind, size, wrong = self.fault["kind"], self.settings["size"], []
        if self.has_lost_rows():
            return [] if self.code == 1 else [f"exit code {self.code} instead of 1, where rows are lost"]
        ended = {each["rank"]: each for each in self.events("ended")}
        killed = {each["rank"] for each in self.events("SIGKILL")}
        if kind in ("kill in a write", "exception"):
            killed |= {each["rank"] for each in self.events("fails")}
        dead = killed - set(ended)
        if self.code not in (codes := self.right_codes(killed, ended)):
            wrong.append(f"exit code {self.code} instead of {' or '.join(map(str, codes))}")
        if kind == "exception" and self.code == 1:
            return wrong  # before the rounds had begun
        expected = set() if kind == "terminate" else set(range(size)) - dead
        if kind == "exit":
            expected -= {each["rank"] for each in self.events("fails")}
        if missing := expected - set(ended):
            wrong.append(f"ranks {sorted(missing)} did not come to their end")
        left = [each for each in ended.values() if each["rank"] not in killed]
        alike = [each["digest"] for each in left if each["size"] == min(one["size"] for one in left)]
        if len({each["rows"] for each in left}) > 1:
            wrong.append("the replicas differ in the rows of sharded tables")
        if len(set(alike)) > 1:
            wrong.append(f"the replicas differ after synchronize(): {[each['digest'][:8] for each in left]}")
        return wrong

    def has_lost_rows(self) -> bool:
        """Tell whether rows of sharded tables are lost, which all ranks say, and how it may be so.

        Two ranks may have been lost at once, or one before there was a checkpoint.
        """
        said = "and with it the rows of the sharded tables that were its own" in self.errors()
        early = len(self.events("trains")) < self.settings["size"]
        return said and (self.fault["kind"] in ("kill two", "kill all") or early)

    def right_codes(self, killed: set[int], ended: dict[int, Record]) -> list[int]:
        """Return the codes that are right; several where a rank was killed between its end and what it says of it."""
        kind, size = self.fault["kind"], self.settings["size"]
        if kind == "exit" and self.events("fails"):
            return [self.fault["code"]]
        if kind == "exception" and self.settings["warmup_steps"] > self.fault["step"]:
            return [1]  # an exception before the rounds begin ends the whole job
        if len(killed - set(ended)) == size:
            return [1, 137]  # the latter where none had begun
        codes = [0, 1] if len(killed) == size else [0]
        if not self.settings["strict"] or not killed:
            return codes
        noticed = [each for each in ended.values() if each["lost"]] or killed - set(ended)
        return [LOST_CODE, *codes[1:]] if noticed else [*codes, LOST_CODE]

    def wrong_checkpoints(self) -> list[str]:
        """Return what is wrong with the newest checkpoint."""
        if self.settings["checkpoints"] is None:
            return []
        import torch

        from hvd_shadowsync import Checkpointer

        saved = sorted(self.events("saved"), key=lambda each: float(each["time"]))
        latest = Checkpointer.latest(self.settings["checkpoints"])
        if latest is None:
            came = self.fault["kind"] == "terminate" and self.code == 0
            return ["no checkpoint is left"] if saved or came else []
        content = torch.load(latest / "model.pt", weights_only=True)
        step = int(re.sub(r"step-(\d+).*", r"\1", latest.name))
        if not {"model", "optimizer"} <= set(content):
            return [f"{latest} has only {list(content)}"]
        return [f"the newest is of step {step}, reported was {saved[-1]['step']}"] if self.is_older(step, saved) else []

    def is_older(self, step: int, saved: list[Record]) -> bool:
        """Tell whether there is a newer one than `step`: a new rank 0 may have taken fewer steps than the last one."""
        return bool(saved) and step < saved[-1]["step"] and len({each["rank"] for each in saved}) == 1

    # --- processes ----------------------------------------------------------------------------------------------------

    def until(self, done: Callable[[], bool], deadline: float) -> bool:
        """Wait until `done()`, or the job's end, or `deadline`; tell whether it was in time."""
        while time.monotonic() < deadline:
            if self.process.poll() is not None or done():
                return True
            time.sleep(0.02)
        return False

    def events(self, event: str) -> list[Record]:
        found = []
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [json.loads(each) for each in lines if each.endswith("}")]
        return [each for each in found if each["event"] == event]

    def errors(self) -> str:
        return (self.folder / "err").read_text(errors="replace")

    def processes(self) -> list[int]:
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self.owns(pid)]

    def owns(self, pid: int) -> bool:
        try:
            return f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    def whereabouts(self) -> str:
        """Say where each process of the job is: state, what its threads wait for in the kernel, Python's stacks."""
        alive = self.processes()
        ranks = {each["pid"]: each["rank"] for each in self.events("begin")}
        for pid in set(alive) & set(ranks):
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1.0)
        lines = []
        for pid in alive:
            lines.append(f"pid {pid}, rank {ranks.get(pid, '-')}: {_read(f'/proc/{pid}/cmdline')[:60]}")
            for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
                state = _read(f"{task}/stat").rpartition(")")[2].split()[:1]
                lines.append(f"  {_read(f'{task}/comm')}: {''.join(state)} in {_read(f'{task}/wchan')}")
            if pid in ranks:
                lines.append(_read(str(self.folder / f"rank{ranks[pid]}.stacks")))
        return "\n".join(lines)

    def kill(self) -> None:
        """End what is left of the job."""
        deadline = time.monotonic() + 10.0
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            self.process.poll()
        self.process.wait()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return "?"


def damage(folder: Path, how: str) -> Path | None:
    """Damage the newest checkpoint; return it."""
    from hvd_shadowsync import Checkpointer

    newest: Path | None = Checkpointer.latest(folder)
    if newest is None:
        return None
    if how == "no manifest":
        (newest / "manifest.json").unlink()
    elif how == "empty manifest":
        (newest / "manifest.json").write_bytes(b"")
    else:
        file = newest / "model.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content[: len(content) // 2] if how == "truncate" else content)
    return newest


# --- what came of it --------------------------------------------------------------------------------------------------


def line(record: Record) -> str:
    settings = record["settings"]
    ways = ["foreground" if settings["foreground"] else "background", settings["wire_dtype"], settings["apply"]]
    told = f"{settings['size']} x {settings['algorithm']} {' '.join(filter(None, ways))}, {settings['fault']['kind']}"
    told += "" if settings["tables"] is None else f", tables ({settings['tables']})"
    verdict = "ok" if not record["wrong"] else "WRONG: " + "; ".join(record["wrong"])
    return f"seed {record['seed']}: {told}: code {record['code']}, {record['seconds']} s: {verdict}"


def summary(records: list[Record]) -> Record:
    return {"counts": counts(records), "jobs": records}


def counts(records: list[Record]) -> Record:
    """Return by kind of fault how many jobs there were, and how many were wrong in which way."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        kind = found.setdefault(record["settings"]["fault"]["kind"], Counter())
        kind["jobs"] += 1
        kind.update({which(each) for each in record["wrong"]})
    return {kind: dict(counter) for kind, counter in found.items()}


def which(wrong: str) -> str:
    """Return the name of the way in which a job is wrong."""
    ways = {"hang": "hangs", "exit code|ranks": "wrong codes", "the replicas differ": "other weights"}
    return next((name for pattern, name in ways.items() if re.match(pattern, wrong)), "lost checkpoints")


def table(records: list[Record]) -> str:
    ways = ["jobs", "hangs", "wrong codes", "other weights", "lost checkpoints"]
    lines = ["| fault | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    by_kind = counts(records)
    for kind in [each for each in WEIGHTS if each in by_kind]:
        lines.append(f"| {kind} | " + " | ".join(str(by_kind[kind].get(way, 0)) for way in ways) + " |")
    total = [str(sum(each.get(way, 0) for each in by_kind.values())) for way in ways]
    return "\n".join([*lines, "| **all** | " + " | ".join(total) + " |"])


if __name__ == "__main__":
    main()
