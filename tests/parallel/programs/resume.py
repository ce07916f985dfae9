"""Train, and save or load on the way: resume.py [--load FILE] [--save FILE] [--algorithm NAME]."""

from __future__ import annotations

import argparse

import ranks
import torch
from problem import Data, content, identical_everywhere, make_model, same, train

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync, checkpoint

ALGORITHMS = {
    "ma": ModelAveraging(),
    "bmuf": BMUF(block_momentum=0.3, nesterov=True),
    "easgd": ElasticAveraging(),
}
STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--load")
    parser.add_argument("--save")
    options = parser.parse_args()
    ranks.begin()
    for name in ALGORITHMS:
        ranks.say("start", name)
        visit(name, options.load and f"{options.load}.{name}", options.save and f"{options.save}.{name}")
    ranks.say("passed", "all")


def visit(name: str, load: str | None, save: str | None) -> None:
    """Load and check, train, save and check."""
    model = make_model(77 + ranks.RANK)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    data = Data(ranks.RANK)
    options = {"algorithm": ALGORITHMS[name], "sync_every": 2, "foreground": name != "easgd"}
    with ShadowSync(optimizer, model=model, **options) as sync:
        if load:
            check_loaded(load, model, optimizer, sync)
        train(model, optimizer, data, STEPS)
        if save:
            checkpoint.save(save, model, sync, extra={"size": sync.size})
            assert identical_everywhere(sync, model)
            sync.gather("the file is there")
            written = checkpoint.read(save)
            assert same(written["model"], content(model))
            check_rounds(name, written["optimizer"], sync)
        sync.synchronize()
        assert identical_everywhere(sync, model)


def check_loaded(path: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, sync: ShadowSync) -> None:
    extra = checkpoint.load(path, model, sync)
    saved = checkpoint.read(path)
    assert extra["size"] != sync.size
    assert same(content(model), saved["model"])
    for index, state in saved["optimizer"]["state"].items():
        ours = optimizer.state_dict()["state"][index]
        assert all(torch.equal(ours[key], state[key]) for key in state)
    if sync.size > 1 and saved["optimizer"].get("shadow_sync"):
        rounds, ours = saved["optimizer"]["shadow_sync"], optimizer.state_dict()["shadow_sync"]
        assert ours["counters"] == rounds["counters"]
        assert ours["algorithm"] == rounds["algorithm"]
        for key in ("global_model", "velocity"):
            assert same(ours["state"].get(key, {}), rounds["state"].get(key, {}))


def check_rounds(name: str, state: dict[str, dict[str, dict[str, object]]], sync: ShadowSync) -> None:
    if sync.size == 1:
        return
    rounds = state["shadow_sync"]
    assert rounds["counters"]["steps"] >= STEPS
    assert rounds["counters"]["rounds"] >= 6 or name == "easgd"
    expected = {"ma": set(), "bmuf": {"global_model", "velocity"}, "easgd": {"center"}}
    assert set(rounds["state"]) == expected[name]
    if name == "bmuf":
        assert any(bool(tensor.any()) for tensor in rounds["state"]["velocity"].values())


main()
