"""How a flat vector is cut into shards, blocks and rows (`reducers.base`)."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies

from hvd_shadowsync.reducers import AllReduceMean, ElasticCenter, ElasticInTurn, OwnerMean, Reducer
from hvd_shadowsync.reducers.base import Shards, pack

vectors = hypothesis.given(
    numel=strategies.integers(0, 200), size=strategies.integers(1, 9), chunk=strategies.integers(1, 60)
)


@vectors
def test_shards_cover_the_vector_in_rank_order(numel: int, size: int, chunk: int) -> None:
    shards = [Shards(numel, size).of(rank) for rank in range(size)]
    assert [index for shard in shards for index in range(numel)[shard]] == list(range(numel))


@vectors
def test_shards_are_equal_but_for_the_last(numel: int, size: int, chunk: int) -> None:
    lengths = [shard.stop - shard.start for shard in map(Shards(numel, size).of, range(size))]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == -(-numel // size)
    assert len({length for length in lengths if 0 < length < lengths[0]}) <= 1


@vectors
def test_blocks_cover_each_shard_once(numel: int, size: int, chunk: int) -> None:
    shards = Shards(numel, size)
    covered: list[list[int]] = [[] for _ in range(size)]
    for rows in shards.blocks(chunk):
        assert len(rows) == size
        for rank, row in enumerate(rows):
            covered[rank] += range(numel)[row]
    assert covered == [list(range(numel)[shards.of(rank)]) for rank in range(size)]


@vectors
def test_a_block_is_no_larger_than_a_chunk(numel: int, size: int, chunk: int) -> None:
    sizes = [sum(row.stop - row.start for row in rows) for rows in Shards(numel, size).blocks(chunk)]
    assert all(0 < total <= max(chunk, size) for total in sizes)


@pytest.mark.parametrize(
    ("numel", "size", "expected"), [(7, 3, [(0, 3), (3, 6), (6, 7)]), (2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)])]
)
def test_shards_by_hand(numel: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert [(shard.start, shard.stop) for shard in map(Shards(numel, size).of, range(size))] == expected


def test_rows_are_padded_with_zeros() -> None:
    vector = torch.arange(1.0, 6.0)
    rows = [slice(0, 3), slice(3, 5), slice(5, 5)]
    assert pack(rows, [vector[row] for row in rows]).tolist() == [[1, 2, 3], [4, 5, 0], [0, 0, 0]]


def test_rows_keep_the_type_that_travels() -> None:
    packed = pack([slice(0, 1), slice(1, 2)], list(torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16)))
    assert packed.dtype == torch.bfloat16


def test_the_means_ask_for_the_snapshot_slice_by_slice() -> None:
    kinds: list[type[Reducer]] = [AllReduceMean, OwnerMean, ElasticCenter, ElasticInTurn]
    assert [kind.sliced for kind in kinds] == [True, True, False, False]
