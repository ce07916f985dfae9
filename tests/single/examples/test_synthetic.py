"""The synthetic data: sizes, streams that depend on nothing but their arguments, and labels with something to learn."""

from __future__ import annotations

import itertools

import pytest
import torch
from dlrm import DLRM, Batch
from synthetic import ID_EXPONENTS, Synthetic, hashed_words, table_sizes


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("total", [78, 79, 1000, 1_000_003, 10_000_000, 10**9])
def test_sizes_sum_exactly_and_fall(total: int) -> None:
    sizes = table_sizes(total)
    assert (len(sizes), sum(sizes)) == (26, total)
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] >= 3
    assert total < 1000 or 0.3 < sizes[0] / total < 0.35


def test_sizes_of_other_numbers_of_tables() -> None:
    assert table_sizes(10, 1) == [10] and sum(table_sizes(1001, 7)) == 1001
    with pytest.raises(ValueError, match="3 rows for each"):
        table_sizes(77)


def test_batches_are_shaped_and_typed_as_the_model_reads_them() -> None:
    data = Synthetic(5000, num_train_rows=1000)
    batches = list(data.train_batches(64))
    assert len(batches) == 1000 // 64
    for batch in batches:
        assert (batch.dense.shape, batch.ids.shape, batch.labels.shape) == ((64, 13), (64, 26), (64,))
        assert (batch.dense.dtype, batch.ids.dtype, batch.labels.dtype) == (torch.float32, torch.int64, torch.float32)
        assert (
            batch.ids.is_contiguous() and batch.ids.ge(0).all() and batch.ids.lt(torch.tensor(data.table_sizes)).all()
        )
        assert batch.dense.isfinite().all() and set(batch.labels.tolist()) <= {0.0, 1.0}


def test_stream_is_a_function_of_its_seed() -> None:
    first, again, other = (next(Synthetic(5000, seed=seed).train_batches(64)) for seed in (1, 1, 2))
    assert same(first, again)
    assert not torch.equal(first.ids, other.ids) and not torch.equal(first.dense, other.dense)


def test_values_stay_what_they_were() -> None:
    """Elsewhere and later: figures of one run can be compared with those of another."""
    assert hashed_words(torch.tensor([0, 1]).numpy().view("uint64")).tolist() == [
        16294208416658607535,  # splitmix64's first value of seed 0
        10451216379200822465,  # and of seed 1
    ]
    batch = next(Synthetic(5000).train_batches(4096))
    assert batch.ids[:2, :4].tolist() == [[956, 330, 277, 294], [538, 388, 60, 133]]
    assert batch.labels.sum().item() == 1043


def test_ranks_share_one_stream() -> None:
    data = Synthetic(5000, num_train_rows=64 * 3 * 5 + 100)
    whole = list(data.train_batches(64))
    ranks = [list(data.train_batches(64, rank=rank, size=3)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [5, 5, 5]
    together = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert all(same(one, other) for one, other in zip(together, whole, strict=False))


def test_stream_without_end_and_test_rows() -> None:
    data = Synthetic(5000, num_train_rows=None, num_test_rows=250)
    assert len(list(itertools.islice(data.train_batches(8), 100))) == 100
    tested = list(data.test_batches(100))
    assert [len(batch.labels) for batch in tested] == [100, 100, 50]
    assert not torch.equal(tested[0].ids, next(data.train_batches(100)).ids)


@pytest.mark.parametrize("rows", [78, 100_000])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_base_rate_is_about_a_quarter(rows: int, seed: int) -> None:
    labels = torch.cat([batch.labels for batch in Synthetic(rows, seed=seed).test_batches(10_000)])
    assert labels.mean().item() == pytest.approx(0.25, abs=0.015)


def test_ids_are_popular_by_a_power_law_and_scattered() -> None:
    data = Synthetic(1_000_000)
    ids = next(data.train_batches(20_000)).ids
    for table, exponent in ((0, ID_EXPONENTS[0]), (25, ID_EXPONENTS[1])):
        size = data.table_sizes[table]
        counts, popular = torch.bincount(ids[:, table], minlength=size).sort(descending=True)
        shares = torch.tensor([rank ** (1 - exponent) - (rank + 1) ** (1 - exponent) for rank in (1, 2, 3)])
        shares /= 1 - (size + 1) ** (1 - exponent)
        torch.testing.assert_close(counts[:3] / len(ids), shares, atol=0.005, rtol=0)
        assert popular[:100].max() > 0.9 * size and popular[:100].min() < 0.1 * size


def test_every_row_of_a_small_table_is_met() -> None:
    ids = next(Synthetic(78).train_batches(2000)).ids
    assert all(ids[:, table].unique().tolist() == [0, 1, 2] for table in range(26))


def test_bags_have_several_ids_and_are_the_ranks_own() -> None:
    data = Synthetic(5000, ids_per_feature=20)
    bags = data.bags(64, 3)
    assert (bags.shape, bags.dtype) == ((64, 26, 20), torch.int64)
    assert bags.amax((0, 2)).lt(torch.tensor(data.table_sizes)).all() and bags.min() >= 0
    assert torch.equal(bags, data.bags(64, 3)) and torch.equal(bags, data.bags(64, 1, rank=1, size=2))
    assert not torch.equal(bags, data.bags(64, 4))
    one = Synthetic(5000)
    assert torch.equal(one.bags(64, 0).squeeze(2), next(one.train_batches(64)).ids)
    with pytest.raises(ValueError, match="take the ids from bags"):
        next(data.train_batches(64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows_total": 77}, "3 rows for each"),
        ({"num_rows_total": 100, "ids_per_feature": 0}, "ids_per_feature=0"),
        ({"num_rows_total": 100, "seed": -1}, "seed=-1"),
        ({"num_rows_total": 100, "num_train_rows": 0}, "num_train_rows=0"),
        ({"num_rows_total": 100, "num_test_rows": 0}, "num_test_rows=0"),
        ({"num_rows_total": 100, "base_rate": 1.0}, "base_rate=1.0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Synthetic(**arguments)  # type: ignore[arg-type]


def test_labels_can_be_learned_from_both_kinds_of_features() -> None:
    torch.manual_seed(0)
    data = Synthetic(2000, num_test_rows=8192)

    def loss(*, dense: bool = True, ids: bool = True) -> float:
        """Of held-out rows, over the entropy of the base rate, with one kind of features blanked out."""
        model = DLRM(data.num_dense, data.table_sizes, embedding_dim=4)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)

        def of(batch: Batch) -> torch.Tensor:
            logits = model(batch.dense * dense, batch.ids * ids)
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)

        for batch in itertools.islice(data.train_batches(512), 250):
            optimizer.zero_grad()
            of(batch).backward()
            optimizer.step()
        with torch.no_grad():
            (tested,) = data.test_batches(8192)
            rate = tested.labels.mean()
            return (of(tested) / torch.nn.functional.binary_cross_entropy(rate.expand(8192), tested.labels)).item()

    only_dense, only_ids, both = loss(ids=False), loss(dense=False), loss()
    assert both < min(only_dense, only_ids) - 0.02 and max(only_dense, only_ids) < 0.98
