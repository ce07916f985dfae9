"""The command: its table, its files, and what it says of options that are wrong."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_shadowsync.capacity.__main__ import main

ASKED = ["--dense-mb", "200", "--step-ms", "40", "--hosts", "64"]
RUN = {"workload": "mlp", "dense_bytes": 5.3e6, "hosts": 2, "rate_mbit": 1000, "latency_ms": 0, "batch": 256}
SPREAD = {"median": 16800.0, "worst": 16000.0, "best": 17000.0}
RECORDS = [
    {**RUN, "contender": "none", "step_ms": 30.0, "examples_per_s": {"median": 17000.0}},
    {**RUN, "contender": "S-MA", "step_ms": 30.5, "examples_per_s": SPREAD, "sync_gap_steps": 12.0},
    {**RUN, "contender": "S-EASGD", "step_ms": 30.5, "examples_per_s": {"median": 16800.0}},
]


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of a printed table by what is in the first column."""
    lines = (line.rsplit(maxsplit=7) for line in text.split("\n\n")[0].splitlines()[1:])
    return {name.strip(): cells for name, *cells in lines}


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_a_row_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASKED, "--fixed-every", "7"])
    out = capsys.readouterr().out
    table = rows(out)
    assert list(table) == ["no synchronisation", "per-step allreduce", "fixed rate, k=7", "shadow"]
    assert [cells[2] for cells in table.values()][:3] == ["0.0", "1.0", "7.0"]
    assert float(table["per-step allreduce"][4]) < float(table["fixed rate, k=7"][4]) < float(table["shadow"][4])
    assert "allreduces: ring" in out
    assert "with halving: per-step" in out, "what is not assumed"
    assert "is that of the CPU budget" in out
    assert "with --chunk-mb" in out, "64 ranks' messages take longer than 4 MiB"


def test_hierarchical_rows_where_hosts_have_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASKED, "--ranks-per-host", "8"])
    table = rows(out := capsys.readouterr().out)
    assert len(table) == 7
    assert "with halving (hierarchical): per-step" in out
    flat, shared = (float(table[f"fixed rate, k=5, {kind}"][0]) for kind in ("flat", "hierarchical"))
    assert shared < flat


def test_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*ASKED, "--jitter", "0.1", "--seed", "5", "--algorithm", "best", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["setting"]["job"]["dense_bytes"] == 200e6
    assert found["setting"]["cluster"]["algorithm"] == "best"
    shown = rows(capsys.readouterr().out.replace("written", "\n\nwritten"))
    for name, each in found["predicted"].items():
        assert f"{each['examples_per_s']:.0f}" == shown[name][3]
        assert f"{found['simulated'][name]['examples_per_s']:.0f}" == shown[name][6]
    assert found["simulated"]["per-step allreduce"] != found["predicted"]["per-step allreduce"]


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main([*ASKED, "--ranks-per-host", "2", "--plot", str(tmp_path / "hosts.png")])
    assert (tmp_path / "hosts.png").read_bytes().startswith(b"\x89PNG")
    assert "hosts.png" in capsys.readouterr().out


def test_a_picture_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit) as exit_:
        main([*ASKED, "--plot", str(tmp_path / "hosts.png")])
    assert exit_.value.code == 2
    assert "--plot needs matplotlib" in (err := capsys.readouterr().err)
    assert "pip install matplotlib" in err


def test_predicted_beside_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.json").write_text(json.dumps(RECORDS))
    main(["--validate", str(tmp_path / "runs.json"), "--cores", "2", "--json", str(tmp_path / "out.json")])
    out = capsys.readouterr().out
    assert "mlp, 2 hosts, 1000 Mbit/s, S-EASGD: there is no model of S-EASGD" in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert [each["figure"] for each in found["compared"]] == ["examples/s", "sync_gap_steps"]
    assert [each["measured"] for each in found["compared"]] == [16800.0, 12.0]
    speed, ratio = (found["compared"][0][key] for key in ("predicted", "ratio"))
    assert f"{speed:.0f} 16800 16000 17000 {ratio:.2f}" in " ".join(out.split())
    assert f"sync_gap_steps: predicted over measured {found['compared'][1]['ratio']:.2f} to " in out
    assert len(found["not_predicted"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dense-mb", "-2"], "--dense-mb -2 is outside [1e-09, 1e+18]; give a number in that interval"),
        (["--step-ms", "0"], "--step-ms 0.0 is outside [1e-09, 1e+18]; give"),
        (["--hosts", "0"], "--hosts 0 is below 1; give a whole number of at least 1"),
        (["--hosts", "2.5"], "argument --hosts: '2.5' is not a whole number; give one such as 100"),
        (["--gbps", "fast"], "argument --gbps: 'fast' is not a number; give one such as 40"),
        (
            ["--hosts", "1000000000000"],
            "--hosts 1000000000000 with 1 ranks each are more than 1000000 ranks; give fewer",
        ),
        (["--gbps", "1e-320"], "is outside [1e-09, 1e+18]"),
        (["--plot", "hosts"], "--plot hosts: give a file that ends in .png, .pdf, .svg"),
        (["--plot", "/"], "--plot / is a folder; give a file in it"),
        (["--gbps", "nan"], "--gbps nan is outside [1e-09, 1e+18]"),
        (["--overlap", "1.5"], "--overlap 1.5 is outside [0, 1]"),
        (["--jitter", "-0.1"], "--jitter -0.1 is outside [0, 10]"),
        (["--slow-factor", "0.5"], "--slow-factor 0.5 is outside [1, inf)"),
        (["--cpu-budget", "2"], "--cpu-budget 2.0 is outside (0, 1]"),
        (["--sync-every", "0"], "--sync-every 0 is below 1"),
        (["--chunk-mb", "0"], "--chunk-mb 0 is outside [1e-09, 1e+18]"),
        (["--in-flight", "0"], "--in-flight 0 is below 1"),
        (["--seed", "-1"], "--seed -1 is below 0"),
        (["--algorithm", "tree"], "--algorithm 'tree' is unknown; give one of 'ring', 'halving', 'best'"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: there is no folder nowhere; make it, or give another"),
        (["--plot", "nowhere/a.png"], "--plot nowhere/a.png: there is no folder nowhere"),
        (["--cores", "2"], "--cores 2 goes with --validate; give --cores-per-host here"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_an_option_that_is_wrong_is_named(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert message in fails(capsys, *ASKED, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--validate nowhere.json cannot be read"),
        (["--gbps", "10"], "--gbps 10.0 does not go with --validate; leave one of them out"),
        (["--plot", "a.png"], "--plot a.png does not go with --validate"),
        (["--seed", "0"], "--seed 0 does not go with --validate"),
        (["--cores", "2", "--cores-per-host", "1"], "--cores 2 and --cores-per-host 1 say the same; give one"),
        (["--cores", "-2"], "--cores -2.0 is outside"),
    ],
)
def test_options_that_do_not_go_with_records(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in fails(capsys, "--validate", "nowhere.json", *options)


@pytest.mark.parametrize("missing", ["--dense-mb", "--step-ms", "--hosts"])
def test_an_option_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], missing: str) -> None:
    at = ASKED.index(missing)
    assert f"{missing} is missing; give it" in fails(capsys, *ASKED[:at], *ASKED[at + 2 :])


def test_as_a_program() -> None:
    line = [sys.executable, "-m", "hvd_shadowsync.capacity"]
    done = subprocess.run([*line, *ASKED], capture_output=True, text=True, timeout=60, check=True)
    assert "shadow" in done.stdout and done.stderr == ""
    told = subprocess.run([*line, *ASKED, "--hosts", "-1"], capture_output=True, text=True, timeout=60, check=False)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == "capacity: --hosts -1 is below 1; give a whole number of at least 1\n"


def test_what_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--dense-mb", "1", "--step-ms", "1", "--hosts", "2", "--json", "/dev/full"])
    assert "--json /dev/full cannot be written (No space left on device); give another" in capsys.readouterr().err
