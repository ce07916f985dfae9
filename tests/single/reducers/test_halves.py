"""Half precision's conversions: the compiled ones against plain torch, to the bit."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hypothesis
import pytest
import torch
from hypothesis import strategies
from ranks_as_threads import on_ranks
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.reducers import OwnerMean, halves
from hvd_shadowsync.reducers.halves import add_widened, mean_of_rows, narrow_distance

CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
SIZES = [0, 1, 7, 8, 1029, 1_000_003]
WEIGHTS = [[1.0], [1.0, 1.0, 1.0], [0.0, 0.3, 0.0, 2.5], [0.7, 1.3, 0.0]]
wires = pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(params=CAPABILITIES)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """Return the library that is loaded on a machine of this capability."""
    here = torch.backends.cpu.get_cpu_capability()
    if request.param not in (CAPABILITIES[: CAPABILITIES.index(here) + 1] if here in CAPABILITIES else ["DEFAULT"]):
        pytest.skip(f"this machine does not have {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
        found = halves.load.__wrapped__()
    if found is None:
        pytest.skip("the library was not built")
    return found


class Counted:
    """A library that counts calls and computes nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        self.calls += 1
        return lambda *_: None


@contextmanager
def using(library: object) -> Iterator[None]:
    """Let the functions take `library`, or plain torch for None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halves, "load", lambda: library)
        yield


def distance(library: object, snapshot: Tensor, reference: Tensor, wire: torch.dtype) -> Tensor:
    out = torch.full((snapshot.numel() + 1,), 7, dtype=wire)
    with using(library):
        narrow_distance(snapshot, reference, out[1:])
    assert out[0] == 7
    return out[1:]


def mean(library: object, rows: Tensor, weights: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(rows.shape[1], dtype=rows.dtype)
    with using(library):
        mean_of_rows(rows, weights, out, dtype)
    return out


def added(library: object, reference: Tensor, values: Tensor) -> Tensor:
    out = reference.clone()
    with using(library):
        add_widened(out, values)
    return out


def one_by_one(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the mean with every operation rounded to float32."""
    (first, weight), *others = [
        (row.float(), torch.tensor(weight)) for row, weight in zip(rows, weights, strict=True) if weight
    ]
    total = first * weight
    for row, weight in others:
        total = total + row * weight
    return (total / torch.tensor(sum(weights))).to(rows.dtype)


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    """Bits are the same, but for what a nan carries."""
    assert one.dtype == other.dtype
    same = {2: torch.int16, 4: torch.int32}[one.element_size()]
    wrong = (one.view(same) != other.view(same)) & ~(one.isnan() & other.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} differ, as {one[wrong][:5]} and {other[wrong][:5]}"


def all_halves(wire: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(wire)


def values(numel: int, seed: int) -> Tensor:
    """Return float32 values of all magnitudes, a few of them none."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (numel,), generator=generator).to(torch.int32).view(torch.float32)
    usual = torch.randn(numel, generator=generator) * torch.tensor([1e-7, 1e-3, 1.0, 1e5])[torch.arange(numel) % 4]
    return torch.where(torch.rand(numel, generator=generator) < 0.3, bits, usual)


def rows_of(wire: torch.dtype, num_rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(num_rows, length, generator=generator).to(wire)


# --- compiled against plain torch -------------------------------------------------------------------------------------


@wires
@pytest.mark.parametrize("numel", SIZES)
def test_distances_are_those_of_torch(library: ctypes.CDLL, wire: torch.dtype, numel: int) -> None:
    snapshot, reference = values(numel + 1, 1), values(numel + 1, 2)
    for start in (0, 1):
        given = snapshot[start:], reference[start:]
        assert_same_bits(distance(library, *given, wire), distance(None, *given, wire))


@wires
def test_every_half_and_what_lies_between_two_is_rounded_as_torch_does(library: ctypes.CDLL, wire: torch.dtype) -> None:
    exact = all_halves(wire).float()
    around = torch.cat([exact, (exact[1:].double() + exact[:-1].double()).div(2).float()])
    given = torch.cat([around, *(around.nextafter(torch.tensor(end)) for end in (float("inf"), -float("inf")))])
    zeros = torch.zeros_like(given)
    assert_same_bits(distance(library, given, zeros, wire), distance(None, given, zeros, wire))


@wires
def test_what_is_too_large_is_cut_and_infinity_is_nan(library: ctypes.CDLL, wire: torch.dtype) -> None:
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(wire).max
    snapshot = torch.tensor([3e38, -3e38, 2.0, inf, -inf, nan, inf, -inf, 0.0, -0.0, 1e-45])
    reference = torch.tensor([-3e38, 3e38, -inf, 0.0, inf, 0.0, inf, -inf, -0.0, 0.0, 0.0])
    found = distance(library, snapshot, reference, wire)
    assert found[:3].tolist() == [largest, -largest, largest]
    assert found[3:6].isnan().all()
    assert found[6:10].tolist() == [0.0] * 4
    assert_same_bits(found, distance(None, snapshot, reference, wire))


@wires
@pytest.mark.parametrize("numel", SIZES)
def test_additions_are_those_of_torch(library: ctypes.CDLL, wire: torch.dtype, numel: int) -> None:
    reference, given = values(numel + 1, 1), values(numel + 1, 2).to(wire)
    for start in (0, 1):
        both = reference[start:], given[start:]
        assert_same_bits(added(library, *both), added(None, *both))


@wires
def test_every_half_is_widened_as_torch_does(library: ctypes.CDLL, wire: torch.dtype) -> None:
    given = all_halves(wire)
    for reference in (torch.full((given.numel(),), -0.0), torch.ones(given.numel())):
        assert_same_bits(added(library, reference, given), reference + given.float())


@wires
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_means_are_summed_in_order(library: ctypes.CDLL, wire: torch.dtype, weights: list[float], length: int) -> None:
    rows = rows_of(wire, len(weights), length)
    found = mean(library, rows, weights)
    assert_same_bits(found, one_by_one(rows, weights))
    torch.testing.assert_close(found, mean(None, rows, weights), rtol=torch.finfo(wire).eps, atol=1e-6)


@wires
def test_means_of_all_halves(library: ctypes.CDLL, wire: torch.dtype) -> None:
    every = all_halves(wire)
    rows = torch.stack([every, every.roll(12_345), every.flip(0)])
    for weights in ([1.0, 0.5, 0.1], [0.0, 3.0, 1.0]):
        assert_same_bits(mean(library, rows, weights), one_by_one(rows, weights))


@wires
def test_means_do_not_depend_on_where_a_row_is_cut(library: ctypes.CDLL, wire: torch.dtype) -> None:
    rows, weights = rows_of(wire, 3, 2000), [0.3, 1.0, 0.9]
    whole = mean(library, rows, weights)
    for cut in (1, 7, 513, 1999):
        parts = [mean(library, rows[:, :cut].contiguous(), weights), mean(library, rows[:, cut:].contiguous(), weights)]
        assert_same_bits(torch.cat(parts), whole)


floats = strategies.floats(width=32)


@pytest.mark.skipif(halves.load() is None, reason="the library was not built")
@wires
@hypothesis.given(data=strategies.lists(strategies.tuples(floats, floats), max_size=40))
@hypothesis.settings(deadline=None)
def test_any_values(wire: torch.dtype, data: list[tuple[float, float]]) -> None:
    found = halves.load()
    snapshot, reference = (torch.tensor([pair[index] for pair in data], dtype=torch.float32) for index in (0, 1))
    narrow = distance(found, snapshot, reference, wire)
    assert_same_bits(narrow, distance(None, snapshot, reference, wire))
    assert_same_bits(added(found, reference, narrow), added(None, reference, narrow))


# --- which of the two -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_the_library_is_used_where_it_is_there(there: bool) -> None:
    counted = Counted()
    narrow = torch.ones(4, dtype=torch.float16)
    used = counted if there else None
    distance(used, torch.ones(4), torch.ones(4), torch.float16)
    mean(used, narrow.view(2, 2), [1.0, 1.0])
    added(used, torch.ones(4), narrow)
    assert counted.calls == 3 * there


def test_other_dtypes_and_layouts_go_through_torch() -> None:
    counted = Counted()
    half, spread = torch.ones(4, dtype=torch.bfloat16), torch.ones(8)[::2]
    assert distance(counted, torch.full((4,), 3.0).double(), torch.ones(4).double(), torch.float16).tolist() == [2] * 4
    assert distance(counted, spread + 1, spread, torch.float16).tolist() == [1] * 4
    assert added(counted, torch.ones(4).double(), half).tolist() == [2] * 4
    assert added(counted, torch.ones(4), torch.ones(4)).tolist() == [2] * 4
    assert added(counted, torch.ones(4), torch.ones(8, dtype=torch.float16)[::2]).tolist() == [2] * 4
    assert mean(counted, half.view(2, 2), [1.0, 3.0], torch.float64).tolist() == [1] * 2
    assert mean(counted, torch.ones(2, 2), [1.0, 3.0]).tolist() == [1] * 2
    assert counted.calls == 0


def test_lengths_that_do_not_go_together_are_not_read_beyond() -> None:
    counted = Counted()
    with pytest.raises(RuntimeError):
        distance(counted, torch.ones(4), torch.ones(3), torch.float16)
    with pytest.raises(RuntimeError):
        added(counted, torch.ones(4), torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match="zip"):
        mean(counted, torch.ones(2, 3, dtype=torch.float16), [1.0])
    assert counted.calls == 0


@pytest.mark.parametrize("there", [True, False])
def test_no_row_that_counts(there: bool) -> None:
    with pytest.raises(ValueError, match="the weights are all 0; give at least one row another one"):
        mean(Counted() if there else None, torch.ones(2, 3, dtype=torch.float16), [0.0, 0.0])


@wires
def test_ranks_with_and_without_the_library_have_the_same_mean(
    library: ctypes.CDLL, wire: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, anchor, numel = threading.local(), values(3000, 1).nan_to_num(0.0, 1.0, -1.0).clamp(-1e6, 1e6), 3000
    monkeypatch.setattr(halves, "load", lambda: here.library)

    def program(comm: Communicator) -> Tensor:
        here.library = library if comm.rank % 2 else None
        reducer = OwnerMean(comm, Poller(), wire_dtype=wire, chunk_bytes=4000)
        reducer.rebase(anchor)
        found = torch.empty(numel)
        for part, mean in reducer.reduce(anchor + values(numel, comm.rank).nan_to_num(0.0), [1.0, 0.7, 0.0, 1.3]):
            found[part] = mean
        return found

    first, *others = on_ranks(4, program)
    assert not first.equal(anchor)
    for other in others:
        assert_same_bits(other, first)
