"""Every engine that loads: against loops in Python, against the other engines, and against torch's own optimizers.

Values are small multiples of a power of two, so that sums are exact in any order: where engines add in different orders
they still have to agree to the last bit.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from hvd_shadowsync.embedding import SGD, Adagrad, Adam, RowWiseAdagrad, kernels
from hvd_shadowsync.embedding.kernels import compiled, fbgemm
from hvd_shadowsync.embedding.kernels.base import (
    Bags,
    Division,
    Gradient,
    Kernel,
    Pooling,
    Scattering,
    Update,
)
from hvd_shadowsync.embedding.optimizers import SparseOptimizer
from hvd_shadowsync.embedding.placement import RowHash, RowRange, hash_multiplier

ENGINES = ("compiled", "fbgemm", "plain")
DIMS = (1, 5, 8, 16, 32, 33, 64, 128)
DTYPES = (torch.float32, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)
NO_IDS = torch.empty(0, dtype=torch.int64)
ALL_RULES = [
    SGD(0.5),
    RowWiseAdagrad(0.3, eps=1e-3),
    RowWiseAdagrad(0.3, initial_accumulator=0.25),
    Adagrad(0.3, eps=1e-3),
    Adagrad(0.3, initial_accumulator=0.25),
    Adam(0.1, betas=(0.8, 0.9), eps=1e-3),
]
TOLERANCES = {torch.float32: {"rtol": 2e-5, "atol": 2e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


@pytest.fixture(params=ENGINES, scope="module")
def kernel(request: pytest.FixtureRequest) -> Kernel:
    try:
        return kernels.choose(request.param)
    except ValueError as error:
        if request.param == "compiled" and shutil.which(os.environ.get("CXX", "c++")):
            pytest.fail(f"there is a C++ compiler, but {error}")
        pytest.skip(str(error))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- bags with exact values -------------------------------------------------------------------------------------------


def exact(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return multiples of 1/8 between -2 and 2."""
    return torch.randint(-16, 17, shape, generator=generator).to(dtype) / 8


def strided(generator: torch.Generator, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Return [rows, dim] out of the middle of a wider matrix."""
    return exact(generator, rows, dim + 7, dtype=dtype)[:, 3 : dim + 3]


def many_bags(
    generator: torch.Generator, num_rows: int, num_bags: int, dtype: torch.dtype, id_dtype: torch.dtype,
    *, jagged: bool, weighted: bool,
) -> Bags:  # fmt: skip
    """Return bags of up to 6 ids, about a third of them empty and one that is large, or of one id each."""
    lengths = None
    if jagged:
        lengths = (torch.randint(-3, 7, (num_bags,), generator=generator)).clamp(min=0).int()
        lengths[num_bags // 2] = 100
    count = num_bags if lengths is None else int(lengths.sum())
    ids = torch.randint(0, num_rows, (count,), generator=generator).to(id_dtype)
    return Bags(ids, lengths, exact(generator, count, dtype=dtype) if weighted else None)


def eighths(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.integers(-16, 16).map(lambda value: value / 8), min_size=size, max_size=size)


@st.composite
def few_bags(draw: st.DrawFn, num_rows: int, dtype: torch.dtype) -> Bags:
    """Return any few bags: none, all empty, ids that repeat."""
    lengths = draw(st.none() | st.lists(st.integers(0, 4), max_size=5))
    count = draw(st.integers(0, 5)) if lengths is None else sum(lengths)
    ids = draw(st.lists(st.integers(0, num_rows - 1), min_size=count, max_size=count))
    weights = draw(st.none() | eighths(count))
    return Bags(
        torch.tensor(ids, dtype=draw(st.sampled_from(ID_DTYPES))),
        None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        None if weights is None else torch.tensor(weights, dtype=dtype),
    )


def bag_of_each_id(bags: Bags) -> list[int]:
    lengths = [1] * len(bags.ids) if bags.lengths is None else bags.lengths.tolist()
    assert sum(lengths) == len(bags.ids)
    return [bag for bag, length in enumerate(lengths) for _ in range(length)]


def matrix(bags: Bags, num_rows: int) -> Tensor:
    """Return [bags, rows]: the sum of the weights that a bag gives a row. Pooling is this times the rows."""
    weights = [1.0] * len(bags.ids) if bags.weights is None else bags.weights.tolist()
    sums = [[0.0] * num_rows for _ in range(bags.num_bags)]
    for bag, row, weight in zip(bag_of_each_id(bags), bags.ids.tolist(), weights, strict=True):
        sums[bag][row] += weight
    return torch.tensor(sums, dtype=torch.float64).view(bags.num_bags, num_rows)


# --- pool and scatter -------------------------------------------------------------------------------------------------


def check_pool_and_scatter(kernel: Kernel, poolings: list[Pooling]) -> None:
    """Pool, and scatter what was in the outputs before; nothing beside the outputs may change."""
    matrices = [matrix(bags, len(rows)) for rows, bags, _, _ in poolings]
    before = [pooling.out.clone() for pooling in poolings]
    around = [_whole(pooling.out).clone() for pooling in poolings]
    kernel.pool(poolings)
    for (rows, _, out, add), sums, old, whole in zip(poolings, matrices, before, around, strict=True):
        assert torch.equal(out.double(), sums @ rows.double() + add * old.double())
        whole[:, 3 : out.shape[1] + 3] = out
        assert torch.equal(whole, _whole(out)), "columns beside the output"
    scatterings = [
        Scattering(pooling.bags, vectors, torch.full_like(pooling.rows, 7.0))
        for pooling, vectors in zip(poolings, before, strict=True)
    ]
    kernel.scatter(scatterings)
    for (_, vectors, out), sums in zip(scatterings, matrices, strict=True):
        assert torch.equal(out.double(), sums.T @ vectors.double())


def _whole(part: Tensor) -> Tensor:
    assert part._base is not None
    return part._base


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("id_dtype", ID_DTYPES)
def test_many_bags_are_pooled_and_scattered(
    kernel: Kernel, id_dtype: torch.dtype, dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(dim)
    poolings = []
    for jagged, weighted, add in [(False, False, False), (True, False, True), (True, True, False), (False, True, True)]:
        bags = many_bags(generator, 40, 600, dtype, id_dtype, jagged=jagged, weighted=weighted)
        rows, out = exact(generator, 40, dim, dtype=dtype), strided(generator, 600, dim, dtype)
        poolings.append(Pooling(rows, bags, out, add))
    check_pool_and_scatter(kernel, poolings)


@hypothesis.given(st.data())
def test_any_bags_are_pooled_and_scattered(kernel: Kernel, data: st.DataObject) -> None:
    dtype, dim = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 40))
    num_rows = data.draw(st.integers(1, 9))
    all_bags = data.draw(st.lists(few_bags(num_rows, dtype), max_size=3))
    generator = torch.Generator().manual_seed(dim)
    poolings = [
        Pooling(exact(generator, num_rows, dim, dtype=dtype), bags, strided(generator, bags.num_bags, dim, dtype), add)
        for bags, add in zip(all_bags, data.draw(st.tuples(*[st.booleans()] * len(all_bags))), strict=True)
    ]
    check_pool_and_scatter(kernel, poolings)


# --- ids --------------------------------------------------------------------------------------------------------------

any_ids = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50)
small_ids = st.lists(st.integers(0, 9), max_size=50)


@hypothesis.given(small_ids | st.lists(st.integers(0, 2**31 - 1), max_size=50), st.sampled_from(ID_DTYPES))
def test_unique(kernel: Kernel, ids: list[int], id_dtype: torch.dtype) -> None:
    found, inverse = kernel.unique(torch.tensor(ids, dtype=id_dtype))
    assert found.dtype == inverse.dtype == torch.int32
    assert found.is_contiguous() and inverse.is_contiguous()
    assert sorted(found.tolist()) == sorted(set(ids))
    assert found[inverse].tolist() == ids


def test_many_ids_are_unique_again_and_again(kernel: Kernel) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (100_000, 10, 70_000):
        ids = torch.randint(0, 20_000, (count,), generator=generator)
        found, inverse = kernel.unique(ids)
        assert torch.equal(found.sort().values, torch.unique(ids).int())
        assert torch.equal(found[inverse], ids.int())


@hypothesis.given(any_ids | small_ids, st.integers(1, 10) | st.integers(1, 2**31), st.sampled_from(ID_DTYPES))
def test_first_outside(kernel: Kernel, ids: list[int], num_rows: int, id_dtype: torch.dtype) -> None:
    expected = next((at for at, row in enumerate(ids) if not 0 <= row < num_rows), -1)
    assert kernel.first_outside(torch.tensor(ids, dtype=id_dtype), num_rows) == expected


@pytest.mark.parametrize("wrong", [2**31, 2**32, -(2**32), 2**62, -(2**63)])
def test_ids_beyond_int32_are_outside(kernel: Kernel, wrong: int) -> None:
    assert kernel.first_outside(torch.tensor([0, 5, wrong, 5, wrong]), 6) == 2


def parts_of(num_rows: int, parts: int, *, hashed: bool) -> tuple[Division, list[RowRange | RowHash]]:
    """Return the division, and the parts as `placement` has them."""
    if hashed:
        where: list[RowRange | RowHash] = [RowHash(num_rows, part, parts) for part in range(parts)]
        return Division(num_rows, parts, hash_multiplier(num_rows)), where
    where = [RowRange(num_rows * part // parts, num_rows * (part + 1) // parts) for part in range(parts)]
    return Division(num_rows, parts, None), where


@hypothesis.given(st.data())
def test_split(kernel: Kernel, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 60))
    division, where = parts_of(num_rows, data.draw(st.integers(1, min(num_rows, 7))), hashed=data.draw(st.booleans()))
    bags = data.draw(few_bags(num_rows, data.draw(st.sampled_from(DTYPES))))
    place_of = {}
    for part, each in enumerate(where):
        place_of |= {i: (part, row) for i, row in zip(*(x.tolist() for x in each.within(0, num_rows)), strict=True)}
    found = kernel.split(bags, division)
    assert len(found) == division.parts
    bag_of = bag_of_each_id(bags)
    for part, (inside, places) in enumerate(found):
        expected = [at for at, row in enumerate(bags.ids.tolist()) if place_of[row][0] == part]
        assert places.tolist() == expected and places.dtype is torch.int64
        assert inside.ids.tolist() == [place_of[int(bags.ids[at])][1] for at in expected]
        assert inside.lengths is not None and inside.lengths.tolist() == [
            sum(bag_of[at] == bag for at in expected) for bag in range(bags.num_bags)
        ]
        assert inside.ids.dtype is inside.lengths.dtype is torch.int32
        assert (inside.weights is None) == (bags.weights is None)
        if bags.weights is not None and inside.weights is not None:
            assert torch.equal(inside.weights, bags.weights[places])


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(("num_rows", "parts"), [(2**31, 7), (2**31, 8), (2**31 - 1, 1000), (10_000_019, 3)])
def test_split_of_a_large_table(kernel: Kernel, num_rows: int, parts: int, hashed: bool) -> None:
    division, where = parts_of(num_rows, parts, hashed=hashed)
    ids = torch.cat([torch.arange(300), torch.arange(num_rows // 2, num_rows // 2 + 300)])
    ids = torch.cat([ids, torch.arange(num_rows - 300, num_rows)])
    found = kernel.split(Bags(ids), division)
    for (inside, places), each in zip(found, where, strict=True):
        blocks = [each.within(int(first), int(first) + 300) for first in ids[::300]]
        assert torch.equal(ids[places], torch.cat([block[0] for block in blocks]))
        assert torch.equal(inside.ids.long(), torch.cat([block[1] for block in blocks]))


# --- updates ----------------------------------------------------------------------------------------------------------


def make_state(rule: SparseOptimizer, rows: Tensor) -> tuple[Tensor, ...]:
    start = rule.initial_accumulator if isinstance(rule, (Adagrad, RowWiseAdagrad)) else 0.0
    return tuple(
        torch.full(rows.shape if per_weight else rows.shape[:1], start, dtype=rows.dtype)
        for per_weight in rule.slots.values()
    )


def updated(rule: SparseOptimizer, step: int, update: Update, touched: Tensor) -> list[Tensor]:
    """Return rows and state of the `touched` rows after `update`, in float64, as the docstrings of the rules say."""
    w, *s = (each[touched].double() for each in (update.rows, *update.state))
    g = torch.zeros(update.rows.shape, dtype=torch.float64)
    for bags, vectors, scale in update.gradients:
        g += scale * matrix(bags, len(g)).T @ vectors.double()
    g = g[touched]
    if isinstance(rule, SGD):
        w -= rule.lr * g
    elif isinstance(rule, RowWiseAdagrad):
        s[0] += (g * g).sum(1) / g.shape[1]
        w -= rule.lr * g / (s[0].sqrt() + rule.eps).unsqueeze(1)
    elif isinstance(rule, Adagrad):
        s[0] += g * g
        w -= rule.lr * g / (s[0].sqrt() + rule.eps)
    elif isinstance(rule, Adam):
        s[0] += (1 - rule.betas[0]) * (g - s[0])
        s[1] += (1 - rule.betas[1]) * (g * g - s[1])
        correction = (1 - rule.betas[1] ** step) ** 0.5 / (1 - rule.betas[0] ** step)
        w -= rule.lr * correction * s[0] / (s[1].sqrt() + rule.eps)
    return [w, *s]


def check_update(kernel: Kernel, rule: SparseOptimizer, step: int, updates: list[Update]) -> None:
    """Update, and compare with `updated`; rows that are not touched have to stay bit-identical."""
    ids = [torch.cat([NO_IDS, *(gradient.bags.ids for gradient in u.gradients)]) for u in updates]
    touched = [each.unique() for each in ids]
    expected = [updated(rule, step, *each) for each in zip(updates, touched, strict=True)]
    before = [[tensor.clone() for tensor in (update.rows, *update.state)] for update in updates]
    kernel.update(rule, step, updates)
    for update, rows, wanted, old in zip(updates, touched, expected, before, strict=True):
        for found, right, unchanged in zip((update.rows, *update.state), wanted, old, strict=True):
            torch.testing.assert_close(found[rows].double(), right, **TOLERANCES[found.dtype])
            unchanged[rows] = found[rows]
            assert torch.equal(found, unchanged), "rows that are not touched"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: type(rule).__name__)
def test_many_bags_update_over_several_steps(
    kernel: Kernel, rule: SparseOptimizer, dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(dim)
    tables = [exact(generator, num_rows, dim, dtype=dtype) for num_rows in (1, 50, 700)]
    states = [make_state(rule, rows) for rows in tables]
    for step in (1, 2, 3):
        updates = []
        for rows, state in zip(tables, states, strict=True):
            sources = [(True, False, 0.5, torch.int64), (step == 2, step == 2, 1.0, torch.int32)]
            gradients = [
                Gradient(
                    many_bags(generator, len(rows), 120, dtype, ids, jagged=jagged, weighted=weighted),
                    strided(generator, 120, dim, dtype),
                    scale,
                )
                for jagged, weighted, scale, ids in sources[: 1 if step == 3 else 2]
            ]
            updates.append(Update(rows, state, gradients))
        check_update(kernel, rule, step, updates)


@hypothesis.given(st.data())
def test_any_bags_update(kernel: Kernel, data: st.DataObject) -> None:
    dtype, dim = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 40))
    rule, step = data.draw(st.sampled_from(ALL_RULES)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(dim)
    updates = []
    for num_rows in data.draw(st.lists(st.integers(1, 9), max_size=3)):
        rows = exact(generator, num_rows, dim, dtype=dtype)
        state = tuple(each + exact(generator, *each.shape, dtype=dtype).square() for each in make_state(rule, rows))
        sources = data.draw(
            st.lists(st.tuples(few_bags(num_rows, dtype), st.sampled_from([1.0, 0.5, 3.0])), max_size=3)
        )
        gradients = [Gradient(bags, strided(generator, bags.num_bags, dim, dtype), scale) for bags, scale in sources]
        updates.append(Update(rows, state, gradients))
    check_update(kernel, rule, step, updates)


def test_gradients_of_a_row_are_summed_before_its_one_update(kernel: Kernel) -> None:
    """One bag twice the same row, another bag once, another source once: -1, and not four updates of Adagrad."""
    rows, state = torch.zeros(3, 2), (torch.zeros(3, 2),)
    here = Gradient(Bags(torch.tensor([1, 1, 1]), torch.tensor([2, 0, 1]).int()), torch.ones(3, 2), 1.0)
    there = Gradient(Bags(torch.tensor([1]).int()), torch.full((1, 2), 2.0), -2.0)
    kernel.update(Adagrad(1.0, eps=0.0), 1, [Update(rows, state, [here, there])])
    assert rows.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert state[0].tolist() == [[0, 0], [1, 1], [0, 0]]


TORCH_RULES: list[tuple[SparseOptimizer, Callable[[Any], torch.optim.Optimizer]]] = [
    (SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (Adagrad(0.1, initial_accumulator=0.2), lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2)),
    (Adagrad(0.1, eps=1e-2), lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-2)),
    (Adam(0.1, (0.7, 0.9), 1e-2), lambda p: torch.optim.SparseAdam(p, lr=0.1, betas=(0.7, 0.9), eps=1e-2)),
]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "optimizer"), TORCH_RULES, ids=lambda rule: type(rule).__name__)
def test_as_embedding_bag_with_an_optimizer_of_torch(
    kernel: Kernel, rule: SparseOptimizer, optimizer: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = nn.EmbeddingBag(50, 6, mode="sum", sparse=True, dtype=dtype)
    rows = module.weight.detach().clone()
    state, theirs = make_state(rule, rows), optimizer(list(module.parameters()))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        bags = many_bags(generator, 50, 8, dtype, torch.int64, jagged=True, weighted=step % 2 == 0)
        assert bags.lengths is not None
        out = torch.empty(8, 6, dtype=dtype)
        kernel.pool([Pooling(rows, bags, out)])
        expected = module(bags.ids, bags.lengths.cumsum(0) - bags.lengths, per_sample_weights=bags.weights)
        torch.testing.assert_close(out, expected.detach(), **TOLERANCES[dtype])
        gradient = exact(generator, 8, 6, dtype=dtype)
        theirs.zero_grad()
        expected.backward(gradient)
        theirs.step()
        kernel.update(rule, step, [Update(rows, state, [Gradient(bags, gradient, 1.0)])])
        torch.testing.assert_close(rows, module.weight.detach(), **TOLERANCES[dtype])


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ALL_RULES[::2] + ALL_RULES[-1:], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dim", [7, 32])
def test_results_do_not_depend_on_the_number_of_threads(
    kernel: Kernel, threads: Callable[[int], None], rule: SparseOptimizer, dtype: torch.dtype, dim: int
) -> None:
    """Here values are not exact, so that another order of summation would show."""
    found: dict[int, list[Tensor]] = {}
    for number in (1, 4):
        threads(number)
        generator = torch.Generator().manual_seed(3)
        tables = [torch.randn(num_rows, dim, dtype=dtype, generator=generator) for num_rows in (3, 500)]
        out = torch.empty(len(tables), 900, dim, dtype=dtype)
        scattered_out = [torch.empty_like(rows) for rows in tables]
        states = [make_state(rule, rows) for rows in tables]
        for step in (1, 2):
            bags = [
                many_bags(generator, len(r), 900, dtype, torch.int64, jagged=True, weighted=step > 1) for r in tables
            ]
            vectors = torch.randn(900, dim, dtype=dtype, generator=generator)
            kernel.pool([Pooling(*each) for each in zip(tables, bags, out, strict=True)])
            kernel.scatter([Scattering(b, vectors, s) for b, s in zip(bags, scattered_out, strict=True)])
            gradients = [[Gradient(b, vectors, 0.3), Gradient(b, out[i], 1.0)] for i, b in enumerate(bags)]
            kernel.update(rule, step, [Update(*each) for each in zip(tables, states, gradients, strict=True)])
        found[number] = [*tables, *scattered_out, out, *(each for state in states for each in state)]
    for one, four in zip(found[1], found[4], strict=True):
        if kernel.name == "compiled":
            assert torch.equal(one, four)
        torch.testing.assert_close(one, four, **TOLERANCES[dtype])


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_fbgemm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Return what puts a module with some code in FBGEMM's place. Engines are looked for anew, before and after."""

    def put(code: str) -> None:
        (tmp_path / "fbgemm_gpu.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.split(".")[0] == "fbgemm_gpu"]:
            monkeypatch.delitem(sys.modules, name)
        forget_engines()

    forget_engines()
    yield put
    sys.modules.pop("fbgemm_gpu", None)
    forget_engines()


def forget_engines() -> None:
    kernels.choose.cache_clear()
    fbgemm._why_not.cache_clear()


def test_each_engine_has_its_name(kernel: Kernel) -> None:
    assert kernel.name in ENGINES
    assert type(kernels.choose(kernel.name)) is type(kernel)


@pytest.mark.parametrize("wrong", ["cuda", "", None])
def test_an_unknown_engine(wrong: Any) -> None:
    known = "'auto', 'compiled', 'fbgemm', 'plain'"
    with pytest.raises(ValueError, match=f"kernel={wrong!r} is unknown; give one of {known}"):
        kernels.choose(wrong)


def test_auto_takes_the_first_that_there_is(
    fake_fbgemm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled.load() is not None:
        assert kernels.choose("auto").name == "compiled"
    monkeypatch.setattr(compiled, "load", lambda: None)
    forget_engines()
    assert kernels.choose("auto").name == ("plain" if fbgemm._why_not() else "fbgemm")
    fake_fbgemm("raise ImportError")
    assert kernels.choose("auto").name == "plain"
    with pytest.raises(ValueError, match="kernel='compiled' was not built; install the package with a C"):
        kernels.choose("compiled")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ModuleNotFoundError('no numpy')", "(ModuleNotFoundError: no numpy)"),
        ("raise OSError('no') from OSError('x.so: undefined symbol: y')", "(OSError: x.so: undefined symbol: y)"),
        ("raise RuntimeError", "(RuntimeError: )"),
        ("", "(AttributeError: "),
    ],
)
def test_a_fbgemm_that_does_not_load_is_not_there(fake_fbgemm: Callable[[str], None], code: str, reason: str) -> None:
    if not code and hasattr(torch.ops.fbgemm, "split_embedding_codegen_forward_cpu"):
        pytest.skip("FBGEMM's operators are loaded in this process already")
    fake_fbgemm(code)
    with pytest.raises(ValueError, match="kernel='fbgemm' needs a fbgemm_gpu that goes with torch") as raised:
        kernels.choose("fbgemm")
    assert reason in str(raised.value)
    assert "pip install 'hvd_shadowsync[fbgemm]'" in str(raised.value)


def test_a_fbgemm_that_computes_something_else_is_not_there(
    fake_fbgemm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_fbgemm("")
    monkeypatch.setattr(fbgemm, "_update", lambda *_: None)
    monkeypatch.setattr(fbgemm.FbgemmKernel, "pool", lambda self, poolings: poolings[0].out.fill_(1.0))
    assert fbgemm._why_not() == "RuntimeError: its SGD is another"


def test_what_fbgemm_logs_sets_up_no_logging(
    fake_fbgemm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    fake_fbgemm("import logging; logging.error('made for another torch'); raise OSError")
    assert fbgemm._why_not() == "OSError: "
    assert logging.getLogger().handlers == []


def test_a_rule_that_no_engine_knows(kernel: Kernel) -> None:
    class Lion(SparseOptimizer):
        pass

    gradients = [Gradient(Bags(torch.tensor([0])), torch.ones(1, 2), 1.0)]
    with pytest.raises(TypeError, match=r"Lion is not known to the (plain|compiled) kernel"):
        kernel.update(Lion(0.1), 1, [Update(torch.ones(1, 2), (), gradients)])
