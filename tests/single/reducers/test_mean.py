"""The weighted mean: its values, its bits, its slices, and what half precision on the wire costs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from ranks_as_threads import on_ranks
from recording import Recorded
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.reducers import AllReduceMean, OwnerMean, Reducer
from hvd_shadowsync.reducers.base import as_it_is

Kind = Callable[..., AllReduceMean | OwnerMean]
both = pytest.mark.parametrize("kind", [AllReduceMean, OwnerMean])
WIRES = [torch.float16, torch.bfloat16]


def snapshots(size: int, numel: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator, dtype=dtype) for _ in range(size)]


def reduced(reducer: Reducer, snapshot: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the whole vector that `reducer` yields in slices, each element exactly once."""
    out, times = torch.full_like(snapshot, float("nan")), torch.zeros(snapshot.numel())
    for part, values in reducer.reduce(snapshot, weights, as_it_is):
        assert values.shape == out[part].shape
        out[part] = values
        times[part] += 1
    assert (times == 1).all()
    return out


def means(kind: Kind, given: list[Tensor], weights: Sequence[float], **options: object) -> list[Tensor]:
    """Return what each rank gets for the snapshots `given`."""

    def program(comm: Communicator) -> Tensor:
        return reduced(kind(comm, Poller(), **options), given[comm.rank].clone(), weights)

    return on_ranks(len(given), program)


def weighted(given: list[Tensor], weights: Sequence[float]) -> np.ndarray:
    return np.average(np.stack([each.double().numpy() for each in given]), axis=0, weights=weights)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("numel", [0, 1, 4, 64, 65])
def test_the_mean(kind: Kind, dtype: torch.dtype, size: int, numel: int) -> None:
    given = snapshots(size, numel, dtype=dtype)
    for mean in means(kind, given, [1.0] * size, chunk_bytes=64):
        assert mean.dtype == dtype
        tolerance = 4 * size * torch.finfo(dtype).eps
        np.testing.assert_allclose(mean.numpy(), weighted(given, [1.0] * size), rtol=tolerance, atol=tolerance)


@both
@hypothesis.given(
    weights=strategies.lists(strategies.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=1, max_size=4).filter(any),
    numel=strategies.integers(0, 40),
    chunk_bytes=strategies.integers(1, 100),
    seed=strategies.integers(0, 99),
)
def test_any_weights_lengths_and_chunks(
    kind: Kind, weights: list[float], numel: int, chunk_bytes: int, seed: int
) -> None:
    given = snapshots(len(weights), numel, seed=seed, dtype=torch.float64)
    for mean in means(kind, given, weights, chunk_bytes=chunk_bytes):
        np.testing.assert_allclose(mean.numpy(), weighted(given, weights), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_a_rank_of_weight_0_does_not_matter(kind: Kind, value: float) -> None:
    given = snapshots(3, 10)
    given[1].fill_(value)
    expected = (given[0] + given[2]) / 2
    for mean in means(kind, given, [1.0, 0.0, 1.0], chunk_bytes=16):
        assert torch.equal(mean, expected)


@both
def test_the_snapshot_is_left_as_it_is(kind: Kind) -> None:
    def program(comm: Communicator) -> bool:
        snapshot = snapshots(3, 20)[comm.rank]
        before = snapshot.clone()
        reduced(kind(comm, Poller(), chunk_bytes=16), snapshot, [1.0, 0.5, 0.0])
        return torch.equal(snapshot, before)

    assert on_ranks(3, program) == [True] * 3


@both
def test_the_callers_may_write_into_slices_that_arrived(kind: Kind) -> None:
    """A round overwrites the snapshot slice by slice while the later ones are under way."""
    given = snapshots(3, 50)

    def program(comm: Communicator) -> Tensor:
        snapshot = given[comm.rank].clone()
        for part, values in kind(comm, Poller(), chunk_bytes=24).reduce(snapshot, [1.0] * 3, as_it_is):
            snapshot[part] = values
        return snapshot

    for mean in on_ranks(3, program):
        torch.testing.assert_close(mean, sum(given) / 3)


@both
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.0, 2.5)])
@pytest.mark.parametrize("numel", [2, 301])
def test_bit_identical_on_all_ranks(kind: Kind, weights: tuple[float, ...], numel: int) -> None:
    first, *others = means(kind, snapshots(3, numel), weights, chunk_bytes=128)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("wire_dtype", [None, *WIRES], ids=str)
def test_the_owners_sum_does_not_depend_on_who_comes_first(wire_dtype: torch.dtype | None) -> None:
    given = snapshots(3, 200)

    def program_for(order: tuple[int, ...]) -> Callable[[Communicator], Tensor]:
        def program(comm: Communicator) -> Tensor:
            time.sleep(0.004 * order.index(comm.rank))
            return reduced(
                OwnerMean(comm, Poller(), wire_dtype=wire_dtype, chunk_bytes=256), given[comm.rank], [1.0, 0.7, 1.3]
            )

        return program

    results = [on_ranks(3, program_for(order))[0] for order in itertools.permutations(range(3))]
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_owners_sum_is_formed_in_rank_order() -> None:
    """(a + b) + c, to the bit."""
    given = [torch.tensor([1e8]), torch.tensor([-1e8]), torch.tensor([1.0])]
    expected = ((given[0] + given[1]) + given[2]) / 3
    assert expected > 0
    assert torch.equal(means(OwnerMean, given, [1.0] * 3)[2], expected)


@both
def test_a_reducer_can_be_used_again_with_other_lengths(kind: Kind) -> None:
    lengths = [7, 30, 7, 55, 0, 30]

    def program(comm: Communicator) -> list[Tensor]:
        reducer = kind(comm, Poller(), chunk_bytes=40)
        return [reduced(reducer, snapshots(2, numel)[comm.rank], [1.0, 1.0]) for numel in lengths]

    for results in on_ranks(2, program):
        for numel, mean in zip(lengths, results, strict=True):
            torch.testing.assert_close(mean, sum(snapshots(2, numel)) / 2)


# --- slices under way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_as_many_chunks_under_way_as_asked_for(in_flight: int) -> None:
    def program(comm: Communicator) -> tuple[int, list[tuple[str, int]]]:
        recorded = Recorded(comm)
        reduced(AllReduceMean(recorded, Poller(), chunk_bytes=32, in_flight=in_flight), torch.ones(50), [1.0, 1.0])
        return recorded.record.most, recorded.record.calls

    expected = [("iallreduce", 32)] * 6 + [("iallreduce", 8)]
    assert on_ranks(2, program) == [(in_flight, expected)] * 2


def test_the_owners_next_blocks_are_under_way_while_one_is_summed() -> None:
    def program(comm: Communicator) -> tuple[int, list[str]]:
        recorded = Recorded(comm)
        reduced(OwnerMean(recorded, Poller(), chunk_bytes=32, in_flight=4), torch.ones(32), [1.0, 1.0])
        return recorded.record.most, [kind.removeprefix("iall") for kind, _ in recorded.record.calls]

    kinds = ["toall", "toall", "gather", "toall", "gather", "toall", "gather", "gather"]
    assert on_ranks(2, program) == [(4, kinds)] * 2


@both
def test_slices_of_the_snapshot_are_taken_just_before_they_travel(kind: Kind) -> None:
    """Late slices of the snapshot see what training did meanwhile."""
    numel, chunk, in_flight = 40, 8, 2

    def program(comm: Communicator) -> tuple[list[tuple[int, int]], Tensor]:
        live, snapshot, out = torch.zeros(numel), torch.full((numel,), float("nan")), torch.empty(numel)
        events: list[tuple[int, int]] = []

        def fill(part: slice) -> None:
            events.append((part.start, part.stop))
            snapshot[part] = live[part]

        reducer = kind(comm, Poller(), chunk_bytes=4 * chunk, in_flight=in_flight)
        assert reducer.sliced
        for part, values in reducer.reduce(snapshot, [1.0, 1.0], fill):
            out[part] = values
            assert events[-1][1] <= part.stop + in_flight * chunk
            live += 1
        return events, out

    filled = [(start, start + chunk) for start in range(0, numel, chunk)]
    expected = torch.tensor([0.0] * 16 + [1.0] * 8 + [2.0] * 8 + [3.0] * 8)
    for events, out in on_ranks(2, program):
        assert events == filled
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("size", "numel"), [(1, 10), (2, 40), (3, 40), (4, 1)])
def test_bytes_sent_by_a_ring_allreduce(size: int, numel: int) -> None:
    def program(comm: Communicator) -> int:
        reducer = AllReduceMean(comm, Poller(), chunk_bytes=48)
        for _ in range(2):
            reduced(reducer, torch.ones(numel), [1.0] * size)
        return reducer.bytes_sent

    chunks = [min(12, numel - start) for start in range(0, numel, 12)]
    expected = 2 * sum(2 * (size - 1) * 4 * chunk // size for chunk in chunks)
    assert on_ranks(size, program) == [expected] * size


@pytest.mark.parametrize(("wire_dtype", "width"), [(None, 4), (torch.float16, 2), (torch.bfloat16, 2)], ids=str)
@pytest.mark.parametrize(("size", "numel", "row"), [(2, 40, 20), (3, 40, 14), (4, 2, 1)])
def test_bytes_sent_by_the_owners(wire_dtype: torch.dtype | None, width: int, size: int, numel: int, row: int) -> None:
    """Each rank sends a row to each other rank, and its sum back to each; half precision sends half."""

    def program(comm: Communicator) -> tuple[int, int]:
        recorded = Recorded(comm)
        reducer = OwnerMean(recorded, Poller(), wire_dtype=wire_dtype)
        reduced(reducer, torch.ones(numel), [1.0] * size)
        sent = {"ialltoall": (size - 1) / size, "iallgather": size - 1}
        return reducer.bytes_sent, round(sum(nbytes * sent[kind] for kind, nbytes in recorded.record.calls))

    expected = 2 * (size - 1) * row * width
    assert on_ranks(size, program) == [(expected, expected)] * size


# --- half precision on the wire ---------------------------------------------------------------------------------------


def anchored(comm: Communicator, wire_dtype: torch.dtype, anchor: Tensor) -> OwnerMean:
    reducer = OwnerMean(comm, Poller(), wire_dtype=wire_dtype, chunk_bytes=128)
    reducer.rebase(anchor)
    return reducer


@pytest.mark.parametrize("wire_dtype", WIRES, ids=str)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.0, 2.5)])
def test_half_precision_rounds_distances_and_nothing_else(wire_dtype: torch.dtype, weights: tuple[float, ...]) -> None:
    """|error| <= u (mean |distance| + |mean distance|), u the unit roundoff: once on the way there, once back."""
    anchor = 100 * snapshots(1, 90, seed=7)[0]
    distances = snapshots(3, 90)
    given = [anchor + each for each in distances]

    def program(comm: Communicator) -> Tensor:
        return reduced(anchored(comm, wire_dtype, anchor), given[comm.rank], weights)

    distances = [each - anchor for each in given]
    roundoff = torch.finfo(wire_dtype).eps / 2
    bound = (
        1.01 * roundoff * (weighted([each.abs() for each in distances], weights) + np.abs(weighted(distances, weights)))
    )
    float32 = 4 * torch.finfo(torch.float32).eps * (anchor.abs() + 10).numpy()
    first, *others = on_ranks(3, program)
    error = np.abs(first.double().numpy() - weighted(given, weights))
    assert (error <= bound + float32).all()
    assert error.max() > roundoff / 10, "nothing was rounded, so nothing was narrow"
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("wire_dtype", WIRES, ids=str)
def test_small_steps_of_large_weights_are_not_rounded_away(wire_dtype: torch.dtype) -> None:
    """Steps of 0.001 on weights of 100, where half precision knows nothing below 0.06 or 0.5."""
    rounds, steps = 60, [0.001, 0.0003]
    start = torch.full((10,), 100.0)

    def program(comm: Communicator) -> Tensor:
        reducer, replica = anchored(comm, wire_dtype, start), start.clone()
        for _ in range(rounds):
            replica = reduced(reducer, replica + steps[comm.rank], [1.0, 1.0]).clone()
        return replica - start

    travelled = rounds * sum(steps) / 2
    assert (start + 0.001).to(wire_dtype).eq(100).all()
    for moved in on_ranks(2, program):
        error = torch.finfo(wire_dtype).eps * travelled + rounds * 8e-6
        torch.testing.assert_close(moved, torch.full((10,), travelled), rtol=0, atol=error)


@pytest.mark.parametrize("wire_dtype", WIRES, ids=str)
def test_rounding_errors_do_not_pile_up(wire_dtype: torch.dtype) -> None:
    """Replicas apart by 1 that stand still: the mean stays within the roundoff of 1 however many rounds there are."""
    given = [torch.linspace(5, 6, 30), torch.linspace(6, 5, 30)]

    def program(comm: Communicator) -> float:
        reducer = anchored(comm, wire_dtype, torch.zeros(30))
        errors = [reduced(reducer, given[comm.rank], [1.0, 1.0]).sub(5.5).abs().max().item() for _ in range(30)]
        return max(errors[1:])

    assert max(on_ranks(2, program)) <= torch.finfo(wire_dtype).eps


def test_a_distance_beyond_half_precision_takes_several_rounds() -> None:
    far = 3e5

    def program(comm: Communicator) -> list[float]:
        reducer = anchored(comm, torch.float16, torch.zeros(1))
        return [reduced(reducer, torch.tensor([far]), [1.0, 1.0]).item() for _ in range(8)]

    for positions in on_ranks(2, program):
        assert positions[0] == torch.finfo(torch.float16).max
        assert positions == sorted(positions)
        assert positions[-1] == far


@pytest.mark.parametrize("wire_dtype", WIRES, ids=str)
def test_what_is_not_a_number_is_not_hidden(wire_dtype: torch.dtype) -> None:
    def program(comm: Communicator) -> Tensor:
        return reduced(anchored(comm, wire_dtype, torch.zeros(2)), torch.tensor([float("nan"), 1.0]), [1.0, 1.0])

    for mean in on_ranks(2, program):
        assert mean.isnan().tolist() == [True, False]


def test_the_reference_is_a_copy_of_the_anchor() -> None:
    def program(comm: Communicator) -> Tensor:
        anchor = torch.full((4,), 7.0)
        reducer = anchored(comm, torch.bfloat16, anchor)
        reduced(reducer, anchor + 1, [1.0, 1.0])
        return anchor

    assert all(anchor.tolist() == [7.0] * 4 for anchor in on_ranks(2, program))
