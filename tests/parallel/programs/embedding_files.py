"""Train sharded embeddings, save or load: embedding_files.py [--load FOLDER] [--save FOLDER] [--die RANK].

What was saved stands in FOLDER.pt as well, whole, for those that load. With --die that rank is killed while it saves.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import ranks
import torch
from torch import Tensor

from hvd_shadowsync.embedding import SGD, Adagrad, Adam, EmbeddingTable, RowWiseAdagrad, ShardedEmbeddingBag, files
from hvd_shadowsync.embedding.optimizers import SparseOptimizer

RULES: dict[str, SparseOptimizer] = {
    "sgd": SGD(0.5),
    "rowwise": RowWiseAdagrad(0.3),
    "adagrad": Adagrad(0.3),
    "adam": Adam(0.1),
}
PLACEMENTS = {
    "table": "table-wise",
    "rows": "row-wise",
    "hashed": "row-wise hashed",
    "columns": "column-wise",
    "everywhere": "replicated",
}
TABLES = [
    EmbeddingTable("table", 301, 8, "mean"),
    EmbeddingTable("rows", 1000, 4),
    EmbeddingTable("hashed", 777, 16),
    EmbeddingTable("columns", 123, 12),
    EmbeddingTable("everywhere", 20, 4),
]
Content = dict[tuple[str, str], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--die", type=int)
    options = parser.parse_args()
    ranks.begin()
    if options.die == ranks.RANK:
        die_at_the_end_of_saving()
    for name, rule in RULES.items():
        ranks.say("start", name)
        module = ShardedEmbeddingBag(TABLES, PLACEMENTS, rule)
        if options.load:
            check_loaded(options.load / name, module)
        train(module)
        if options.save:
            save(options.save / name, module)
        module.close()
    ranks.say("passed", "all")


def train(module: ShardedEmbeddingBag) -> None:
    for step in range(3):
        generator = torch.Generator().manual_seed(1000 * step + module.rank)
        inputs = {t.name: torch.randint(0, t.num_embeddings, (16, 3), generator=generator) for t in TABLES}
        module(inputs).square().mean().backward()


def save(folder: Path, module: ShardedEmbeddingBag) -> None:
    content = whole(module)
    files.save(folder, module)
    if module.rank == 0:
        torch.save(content, f"{folder}.pt")


def check_loaded(folder: Path, module: ShardedEmbeddingBag) -> None:
    """Load files, and blocks in memory, and compare bits with what was saved."""
    files.load(folder, module)
    found, saved = whole(module), torch.load(f"{folder}.pt", weights_only=True)
    assert found.keys() == saved.keys()
    for key in found:
        if key != ("columns", "sum") or found[key].shape == saved[key].shape:
            assert torch.equal(found[key], saved[key]), key
    blocks = list(module.global_state_dict(block_rows=100))
    train(module)
    module.load_global_state_dict(blocks)
    again = whole(module)
    assert all(torch.equal(again[key], found[key]) for key in found)


def whole(module: ShardedEmbeddingBag) -> Content:
    """Return everything, and see that it is the same for one rank alone."""
    found, alone = (gathered(module, block_rows=256, root=root) for root in (None, module.size - 1))
    if module.rank == module.size - 1:
        assert all(torch.equal(found[key], alone[key]) for key in found)
    else:
        assert not alone
    return found


def gathered(module: ShardedEmbeddingBag, **options: Any) -> Content:
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for block in module.global_state_dict(**options):
        parts.setdefault((block.table, block.slot), []).append(block.values)
    return {key: torch.cat(values) for key, values in parts.items()}


def die_at_the_end_of_saving() -> None:
    """Kill this process as it is about to put a file where readers look: the index on rank 0, else its rows."""
    replace = os.replace
    last = "index.json" if ranks.RANK == 0 else f"-{ranks.RANK:05d}-00000.safetensors"

    def die(source: Path, target: Path) -> None:
        if str(target).endswith(last):
            ranks.say("dies", str(target))
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = die  # type: ignore[assignment]


main()
