"""Records of benchmarks beside predictions: what is taken from them, what they are compared with, what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from settings import FREE, PLAIN, on

from hvd_shadowsync.capacity.measured import Compared, NotPredicted, compare, load
from hvd_shadowsync.capacity.ways import predict
from hvd_shadowsync.pacing import Pacing

RUN = {"workload": "mlp", "dense_bytes": 100e6, "hosts": 4, "rate_mbit": 8000, "latency_ms": 0, "batch": 10}
NONE = {**RUN, "contender": "none", "step_ms": 50.0, "examples_per_s": {"median": 800.0}}
ASKED = replace(PLAIN, pacing=Pacing(sync_interval_ms=1000.0))


def run(contender: str, rate: float = 400.0, **more: Any) -> dict[str, Any]:
    spread = {"median": rate, "best": 1.1 * rate, "worst": 0.9 * rate}
    return {**RUN, "contender": contender, "step_ms": 1.0, "examples_per_s": spread, **more}


def compared(*records: dict[str, Any], cores: float | None = None) -> dict[str, Compared]:
    found = [each for each in compare(records, ASKED, cores) if isinstance(each, Compared)]
    return {each.figure: each for each in found}


def why_not(*records: dict[str, Any]) -> str:
    (last,) = compare(records, ASKED)[-1:]
    assert isinstance(last, NotPredicted)
    return last.why


@pytest.mark.parametrize(
    ("contender", "examples_per_s"),
    [
        ("horovod", 4 * 10 / 0.2),
        ("ddp", 4 * 10 / 0.2),
        ("horovod fp16", 4 * 10 / 0.125),
        ("FR-MA k=5", 4 * 10 * 5 / 0.4),
        ("FR-BMUF k=30", 4 * 10 * 30 / 1.65),
        ("post-local SGD k=5", 4 * 10 * 5 / 0.4),
        ("S-MA", 800.0),
        ("S-BMUF", 800.0),
    ],
)
def test_runs_of_training(contender: str, examples_per_s: float) -> None:
    found = compared(NONE, run(contender))["examples/s"]
    assert found.predicted == pytest.approx(examples_per_s)
    assert found.measured == 400.0
    assert found.ratio == pytest.approx(examples_per_s / 400)
    assert (found.worst, found.best) == pytest.approx((360.0, 440.0))
    assert found.run == f"mlp, 4 hosts, 8000 Mbit/s, {contender}"


def test_shadow_rounds_have_a_gap_and_a_time() -> None:
    found = compared(NONE, run("S-MA", sync_gap_steps=25.0, in_flight_ms=100.0))
    assert found["sync_gap_steps"].predicted == pytest.approx(1000 / 50)
    assert found["in_flight_ms"].ratio == pytest.approx(1.5)


def test_a_budget_in_the_name_is_that_of_the_run() -> None:
    asked = replace(ASKED, costs=replace(FREE, round_cpu_s_per_gb=10.0))
    results = compare([NONE, *(run(f"S-MA cpu_budget={share}", sync_gap_steps=1.0) for share in (0.05, 0.1))], asked)
    gaps = [each.predicted for each in results if isinstance(each, Compared) and each.figure == "sync_gap_steps"]
    assert gaps[0] == pytest.approx(2 * gaps[1])


def test_only_the_run_without_synchronisation_tells_the_step() -> None:
    slower = {**NONE, "step_ms": 100.0}
    assert compared(slower, run("S-MA"))["examples/s"].predicted == pytest.approx(400.0)
    other = {**NONE, "rate_mbit": 1000, "step_ms": 7.0}
    assert compared(NONE, other, run("S-MA"))["examples/s"].predicted == pytest.approx(800.0), "of another network"


def test_rate_and_latency_are_the_records() -> None:
    half = {"rate_mbit": 4000}
    assert compared({**NONE, **half}, run("horovod", **half))["examples/s"].predicted == pytest.approx(40 / 0.35)
    far = {"latency_ms": 5}
    slower = compared({**NONE, **far}, run("horovod", **far))["examples/s"].predicted
    assert slower == pytest.approx(40 / (0.2 + 6 * 2 * 0.005)), "6 messages over 2 links each"


def test_without_a_rate_all_ranks_are_on_one_host() -> None:
    here = {"rate_mbit": None}
    found = compared({**NONE, **here}, run("S-MA", in_flight_ms=1.0, **here))["in_flight_ms"]
    assert found.run == "mlp, 4 ranks, one host, S-MA"
    assert found.predicted == pytest.approx(2.25 * 100e6 / 10e9 * 1000, rel=0.01), "memory that they share"


def test_hosts_on_few_cores_share_them() -> None:
    asked = replace(ASKED, costs=replace(FREE, cpu_s_per_gb=1.0))
    (found,) = (each for each in compare([NONE, run("horovod")], asked, 2) if isinstance(each, Compared))
    assert found.predicted == pytest.approx(40 / (0.05 + 0.15 * 1.0 * 2)), "two ranks a core"


def test_a_slow_ranks_own_examples_do_not_count() -> None:
    slow = {"workload": "mlp-slow"}
    alone = {**NONE, **slow}
    assert compared(alone, run("S-MA", **slow))["examples/s"].predicted == pytest.approx(3 * 200.0)
    assert compared(alone, run("horovod", **slow))["examples/s"].predicted == pytest.approx(3 * 10 / (0.1 + 0.15))
    assert compared(alone, run("S-MA", sync_gap_steps=1.0, **slow))["sync_gap_steps"].predicted == pytest.approx(20)


def test_allreduces_by_themselves() -> None:
    record = {"mb": 100.0, "hosts": 4, "rate_mbit": 8000.0, "ms": {"median": 160.0}, "cpu_s_per_gb": 1.0}
    asked = replace(ASKED, costs=replace(FREE, cpu_s_per_gb=0.5, round_cpu_s_per_gb=9.0))
    results = compare([{**record, "contender": "ours"}], asked)
    found = {each.figure: each.predicted for each in results if isinstance(each, Compared)}
    assert {each.run for each in results} == {"100 MB, 4 hosts, 8000 Mbit/s, ours"}
    assert found == pytest.approx({"ms": 150.0, "CPU s/GB": 0.75}), "there is neither snapshot nor update"
    for contender, figures in (("ours, float16", {"ms": 75.0, "CPU s/GB": 0.375}), ("Horovod", {"ms": 150.0})):
        results = compare([{**record, "contender": contender}], asked)
        assert figures == pytest.approx({each.figure: each.predicted for each in results if isinstance(each, Compared)})


def test_allreduces_of_several_ranks_a_host() -> None:
    for contender, ms in (("ours, every rank on the network", 175.0), ("ours, hierarchical", 100.0)):
        record = {"mb": 100.0, "hosts": 2, "rate_mbit": 8000.0, "ms": {"median": 160.0}, "cpu_s_per_gb": 1.0}
        record["contender"] = contender
        assert "lacks 'ranks_per_host'" in why_not(record)
        found, _ = compare([{**record, "ranks_per_host": 4}], on(ASKED, memory_gbs=1e6))
        assert isinstance(found, Compared)
        assert found.predicted == pytest.approx(ms, rel=1e-3)


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([NONE], "it is what the step's time is taken from"),
        ([NONE, run("S-EASGD")], "there is no model of S-EASGD"),
        ([NONE, run("hivemind k=30")], "there is no model of hivemind k=30"),
        ([run("S-MA")], "no record 'none' of the same run"),
        ([NONE, {**RUN, "contender": "horovod", "not_run": "no root"}], "it was not run: no root"),
        (
            [NONE, {**RUN, "contender": "horovod", "runs": [{"failed": "exit code 1"}]}],
            "no run of it has come to its end",
        ),
        ([NONE, {key: value for key, value in run("S-MA").items() if key != "dense_bytes"}], "lacks 'dense_bytes'"),
        ([NONE, run("S-MA", dense_bytes=-1)], "dense_bytes=-1 is outside"),
        ([{"mb": 1, "hosts": 2, "rate_mbit": 1000, "contender": "NCCL"}], "there is no model of NCCL"),
        ([{}], "there is no model of ?"),
    ],
)
def test_what_is_not_predicted_is_said(records: list[dict[str, Any]], why: str) -> None:
    assert why in why_not(*records)


def test_every_record_has_a_result() -> None:
    records = [NONE, run("S-MA"), run("S-EASGD"), run("horovod")]
    assert [type(each) for each in compare(records, ASKED)] == [NotPredicted, Compared, NotPredicted, Compared]


def test_the_prediction_is_that_of_the_command() -> None:
    assert compared(NONE, run("horovod"))["examples/s"].predicted == predict(PLAIN, "allreduce").examples_per_s


def test_records_of_several_files(tmp_path: Path) -> None:
    for name, content in (("a", [NONE]), ("b", [run("S-MA"), run("horovod")])):
        (tmp_path / name).write_text(json.dumps(content))
    assert [each["contender"] for each in load([tmp_path / "a", tmp_path / "b"])] == ["none", "S-MA", "horovod"]


@pytest.mark.parametrize("content", [None, "{", "{}", "[1]"])
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "records.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"--validate .*records\.json .*; give what a benchmark wrote"):
        load([file])
