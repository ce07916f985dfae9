"""The comparison without its runs: cases, commands, records, tables and plots of made-up records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import compare
import pytest
from comparison import records as keeping
from comparison.cases import DEFAULT, NETWORKS, WORKLOADS, Case, chosen
from comparison.catalogue import CATALOGUE, Contender, matching
from comparison.running import Settings, command, curve_of, execute, merged
from comparison.table import HEAD, cells, report, table

SETTINGS = Settings(0.3, 0.1, 60.0, Path("flights.pt"), Path("peers/python"))
CASE = Case(WORKLOADS["mlp-5mb"], NETWORKS["1gbit"], 2)


def contender(name: str) -> Contender:
    return next(each for each in CATALOGUE if each.name == name)


def record(name: str, rates: list[float], *, case: Case = CASE, gap: float | None = None) -> dict[str, Any]:
    made = keeping.blank(case, contender(name))
    for repeat, rate in enumerate(rates):
        curve = [[0.5 * index, rate * index, 1 / (index + 1)] for index in range(1, 6)]
        run = {"dense_bytes": 5_318_148, "examples_per_s": rate, "step_ms": 512_000 / rate, "steps": 10, "curve": curve}
        keeping.add(made, repeat, {**run, "sync_gap_steps": gap, "in_flight_ms": None if gap is None else 44.0})
    return made


@pytest.fixture
def made_up() -> list[dict[str, Any]]:
    failed = record("ddp", [])
    keeping.add(failed, 0, {"failed": "exit code 1\nfirst line\nRuntimeError: no route"})
    other = Case(CASE.workload, NETWORKS["loopback"], 2)
    return [
        record("S-MA", [900.0, 990.0, 980.0], gap=9.0),
        record("horovod", [300.0, 600.0, 500.0], gap=1.0),
        record("none", [1000.0, 1100.0, 1000.0]),
        failed,
        {**record("torchft DiLoCo k=30", []), "not_run": "not installed; install it with launch/peers"},
        record("none", [2000.0], case=other),
        record("S-MA", [1900.0], case=other, gap=4.0),
    ]


# --- what runs --------------------------------------------------------------------------------------------------------


def test_the_default_list_and_a_choice() -> None:
    assert [(each.workload.name, each.network.name, each.hosts) for each in chosen([], [], [])] == list(DEFAULT)
    assert {workload for workload, _, _ in DEFAULT} == set(WORKLOADS)
    assert {network for _, network, _ in DEFAULT} == set(NETWORKS)
    assert [each.name for each in chosen([], ["loopback"], [2, 4])] == ["mlp-5mb-loopback-2", "mlp-5mb-loopback-4"]


def test_the_default_list_takes_less_than_100_minutes() -> None:
    options = compare.parser().parse_args(["--peers", sys.executable])
    said = compare.listed(chosen([], [], []), matching([]), options).splitlines()[-1]
    hours, minutes, _ = said.removeprefix("3 repeats, about ").removesuffix(" in all").split(":")
    assert 60 * int(hours) + int(minutes) < 100


def test_contenders_are_chosen_by_name_or_pattern() -> None:
    assert [each.name for each in matching(["s-*", "HOROVOD"])] == ["horovod", "S-MA", "S-EASGD", "S-BMUF"]
    asked = {each.name for each in matching(["sockets k=8", "S-MA cpu_budget=0.1"])}
    assert asked == {"sockets k=8", "S-MA cpu_budget=0.1"}
    assert not asked & {each.name for each in matching([])}, "on request only"
    assert len([each for each in matching(["FR-*"]) if each.every in (5, 30)]) == 6
    with pytest.raises(ValueError, match="'nobody' names none; there are 'none', "):
        matching(["none", "nobody"])


def test_every_contender_has_a_file_and_a_reason_where_it_cannot_run() -> None:
    folder = Path(compare.__file__).parent / "contenders"
    for each in CATALOGUE:
        assert (folder / f"{each.module}.py").exists()
        assert f"k={each.every}" in each.name or not each.every
        assert not each.why_not("mlp-5mb") or not each.why_not("dlrm-criteo")
    assert "sharded tables" in contender("ddp").why_not("dlrm-criteo")


def test_mpi_jobs_are_started_by_shadowrun_and_others_by_start() -> None:
    ours = command(CASE, contender("FR-MA k=5"), SETTINGS, Path("folder"))
    assert ours[:7] == [sys.executable, "-m", "hvd_shadowsync.run", "--emulated=2", "--rate=1gbit", "-np", "2"]
    assert {"--module=with_shadowsync", "--variant=ma", "--every=5", "--batch=256", "--slow=-1"} <= set(ours)
    peer = command(CASE, contender("torchft DiLoCo k=30"), SETTINGS, Path("folder"))
    assert peer[1:6] == ["-m", "hvd_shadowsync.emulated", "--hosts=2", "--rate=1gbit", "--"]
    assert peer[peer.index("--ranks") + 3] == "peers/python"
    slow = Case(WORKLOADS["mlp-5mb-slow"], NETWORKS["loopback"], 2)
    alone = command(slow, contender("ddp"), SETTINGS, Path("folder"))
    assert alone[1].endswith("start.py")
    assert {"--workload=mlp-5mb", "--slow=1"} <= set(alone)
    far = Case(CASE.workload, NETWORKS["100mbit-20ms"], 2)
    assert "--latency=5ms" in command(far, contender("none"), SETTINGS, Path("folder"))


def test_each_repeat_has_every_contender_once_and_begins_with_the_next() -> None:
    running = [(contender(name), {}) for name in ("none", "horovod", "S-MA")]
    turns = [(repeat, each[0].name) for repeat, each in compare.turns(running, 2)]
    assert turns[:3] == [(0, "none"), (0, "horovod"), (0, "S-MA")]
    assert turns[3:] == [(1, "horovod"), (1, "S-MA"), (1, "none")]


def test_a_run_that_does_not_end_is_ended(tmp_path: Path) -> None:
    line = ["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; wait"]
    assert execute(line, tmp_path / "output", 0.5) is None
    state = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert execute(["sh", "-c", "echo said; exit 3"], tmp_path / "output", 60.0) == 3
    assert (tmp_path / "output").read_text() == "said\n"


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--hosts", "none"], ["--networks", "2gbit"]])
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


# --- what is kept -----------------------------------------------------------------------------------------------------


def rank(steps: int, seconds: float, gap: float | None) -> dict[str, Any]:
    curve = [[0.2 * index, index * steps, 1.0 / index] for index in range(1, 11)]
    return {"dense_bytes": 40, "steps": steps, "seconds": seconds, "sync_gap_steps": gap, "curve": curve}


def test_the_figures_of_ranks_become_those_of_a_run() -> None:
    ranks = [rank(10, 2.0, 4.0), rank(30, 3.0, None)]
    run = merged(ranks, CASE)
    assert (run["examples_per_s"], run["step_ms"], run["steps"]) == (256 * (5 + 10), 150.0, 40)
    assert (run["sync_gap_steps"], run["in_flight_ms"]) == (4.0, None)
    assert run["curve"][0] == [0.2, 256 * 40, 1.0]
    assert run["curve"][-1] == [2.0, 256 * 400, 0.1]
    without_the_slow_one = merged(ranks, Case(WORKLOADS["mlp-5mb-slow"], NETWORKS["loopback"], 2))
    assert (without_the_slow_one["examples_per_s"], without_the_slow_one["step_ms"]) == (256 * 5, 200.0)


def test_what_the_same_processes_do_while_paused() -> None:
    ranks = [{**rank(10, 2.0, None), "paused_steps_per_s": 10.0, "resumed_steps_per_s": speed} for speed in (9.0, 8.0)]
    assert merged(ranks, CASE)["to_paused"] == 0.85
    assert "to_paused" not in merged([ranks[0], rank(10, 2.0, None)], CASE)
    made = keeping.blank(CASE, contender("S-MA"))
    for repeat, share in enumerate((0.9, 0.97, 0.95)):
        keeping.add(made, repeat, {**merged(ranks, CASE), "to_paused": share})
    assert cells(made, {})[7:10] == ["0.950", "0.900", "0.970"]


def test_a_rank_without_a_curve_leaves_none() -> None:
    assert curve_of([rank(10, 2.0, None), {**rank(10, 2.0, None), "curve": []}], 256) == []


def test_records_are_kept_and_found(tmp_path: Path, made_up: list[dict[str, Any]]) -> None:
    path = tmp_path / "raw" / "compare.json"
    keeping.save(path, made_up)
    kept = keeping.load(path)
    assert kept == made_up
    found = keeping.find(kept, CASE, contender("horovod"))
    assert found is not None
    assert found["examples_per_s"] == {"median": 500.0, "best": 600.0, "worst": 300.0}
    assert (found["workload"], found["hosts"], found["rate_mbit"], found["latency_ms"]) == ("mlp-5mb", 2, 1000, 0.0)
    assert keeping.find(kept, CASE, contender("S-BMUF")) is None
    assert keeping.load(tmp_path / "nothing.json") == []


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is no .*give another file with --json"):
        keeping.load(tmp_path / "other.json")


def test_resuming_keeps_runs_and_beginning_anew_does_not(made_up: list[dict[str, Any]]) -> None:
    old = keeping.find(made_up, CASE, contender("S-MA"))
    assert compare.opened(made_up, CASE, contender("S-MA"), resume=True) is old
    new = compare.opened(made_up, CASE, contender("S-MA"), resume=False)
    assert (new["runs"], len(made_up), keeping.find(made_up, CASE, contender("S-MA"))) == ([], 7, new)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_repeat(made_up: list[dict[str, Any]]) -> None:
    ours, horovod, none = made_up[:3]
    assert keeping.ratios(ours, none) == {"median": 0.9, "best": 0.98, "worst": 0.9}
    assert keeping.ratios(ours, horovod) == {"median": 1.96, "best": 3.0, "worst": 1.65}
    assert keeping.ratios(ours, None) is None
    keeping.add(ours, 7, {"failed": "exit code 1"})
    assert keeping.ratios(ours, none) == {"median": 0.9, "best": 0.98, "worst": 0.9}


def test_a_table_has_all_contenders_in_order_and_says_what_is_missing(made_up: list[dict[str, Any]]) -> None:
    lines = table({each["contender"]: each for each in made_up[:5]}).splitlines()
    assert lines[0] == "### mlp-5mb: 2 hosts, 1 Gbit/s"
    assert "5.32 MB replicated" in lines[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == HEAD
    assert {len(row) for row in rows} == {len(HEAD)}
    assert [row[0] for row in rows[2:]] == ["none", "horovod", "ddp", "torchft DiLoCo k=30", "S-MA"]
    assert rows[-1][1:] == [
        "980",
        "900",
        "990",
        "0.900",
        "0.900",
        "0.980",
        "-",
        "-",
        "-",
        "1.96",
        "522.4",
        "9.0",
        "44.0",
        "3",
    ]
    assert rows[4][1] == "failed"
    assert rows[4][-1] == "1, 1 failed"
    assert rows[5][1] == "not run"
    text = "\n".join(lines)
    assert "- ddp, repeat 0: exit code 1\n" in text
    assert "RuntimeError: no route" in text
    assert "- torchft DiLoCo k=30: not run: not installed; install it with launch/peers" in text


def test_who_did_not_synchronise_is_named() -> None:
    rows = {name: record(name, [1000.0]) for name in ("none", "none (peers)", "hivemind")}
    notes = [line for line in table(rows).splitlines() if line.startswith("- ")]
    assert notes == ["- hivemind: no synchronisation fell into the time that was measured"]


def test_a_case_without_its_limit_has_no_ratios(made_up: list[dict[str, Any]]) -> None:
    assert cells(made_up[0], {"S-MA": made_up[0]})[4:11] == ["-"] * 7


def test_there_is_a_table_for_each_case(made_up: list[dict[str, Any]]) -> None:
    headings = [line for line in report(made_up).splitlines() if line.startswith("###")]
    assert headings == ["### mlp-5mb: 2 hosts, 1 Gbit/s", "### mlp-5mb: 2 ranks on one host"]


def test_plots_are_drawn(tmp_path: Path, made_up: list[dict[str, Any]]) -> None:
    plots = pytest.importorskip("comparison.plots")
    names = {path.name for path in plots.draw_all(made_up, tmp_path)}
    assert names == {
        "rate-mlp-5mb-2.png",
        *(
            f"{kind}-mlp-5mb-{network}-2.png"
            for kind in ("loss-time", "loss-examples", "gap")
            for network in ("1gbit", "loopback")
        ),
    }
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_a_legend_has_a_row_for_each_contender_and_axes_have_units(made_up: list[dict[str, Any]]) -> None:
    plots = pytest.importorskip("comparison.plots")
    figure = plots.over_rate("mlp-5mb", 2, plots.by_workload(made_up)["mlp-5mb", 2])
    [axes] = figure.axes
    assert axes.get_title(loc="left") == "this project, in the background"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "horovod", "S-MA"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1 Gbit/s", "one host"]
    assert axes.get_ylabel() == "examples/s, all ranks"


def test_every_contender_has_a_panel_and_none_looks_like_another() -> None:
    plots = pytest.importorskip("comparison.plots")
    panels = plots.panels_of([each.name for each in CATALOGUE])
    shown = [name for members in panels.values() for name in members]
    assert sorted(set(shown)) == sorted(each.name for each in CATALOGUE)
    assert all(members[0] == "none" and "horovod" in members for members in panels.values())
    assert len(shown) == len(CATALOGUE) + 2 * (len(panels) - 1)
    assert len({str(plots.style_of(each.name)) for each in CATALOGUE}) == len(CATALOGUE)
    assert plots.panels_of(["none"]) == {"": ["none"]}
