"""What may be passed to `ShardedEmbeddingBag`, what is refused, and calls of ranks that do or do not go together."""

from __future__ import annotations

import copy
import errno
import gc
import os
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from embeddings import Problem, make, placements, whole_tables
from ranks_as_threads import on_ranks
from torch import Tensor, nn

from hvd_shadowsync import (
    Checkpointer,
    CheckpointError,
    EmbeddingError,
    ModelAveraging,
    ReplicaMismatchError,
    ShadowSync,
    ShadowSyncError,
    checkpoint,
)
from hvd_shadowsync.broadcast import broadcast_parameters
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding import (
    SGD,
    Adagrad,
    Adam,
    EmbeddingTable,
    Jagged,
    Padded,
    Placement,
    Plan,
    RowWiseAdagrad,
    ShardedEmbeddingBag,
    files,
    routing,
)
from hvd_shadowsync.embedding.optimizers import SparseOptimizer
from hvd_shadowsync.owned import is_owned

pytestmark = pytest.mark.usefixtures("hosts")

PROBLEM = Problem(sizes=(4,))
ONE = (EmbeddingTable("a", 10, 4), EmbeddingTable("b", 6, 2))


def one_rank(problem: Problem = PROBLEM, **more: Any) -> Callable[[Callable[[ShardedEmbeddingBag], Any]], Any]:
    def run(use: Callable[[ShardedEmbeddingBag], Any]) -> Any:
        def program(comm: Communicator) -> Any:
            with_plan = placements(problem, "table-wise", 1)
            module = make(comm, problem, with_plan, SGD(0.5), **more)
            try:
                return use(module)
            finally:
                module.close()

        return on_ranks(1, program)[0]

    return run


def on_two(use: Callable[[ShardedEmbeddingBag], Any], tables: Any = ONE, **more: Any) -> list[Any]:
    """Run `use` on two ranks; return results or what was raised, by rank."""

    def program(comm: Communicator) -> Any:
        module = ShardedEmbeddingBag(
            tables, {t.name: "table-wise" for t in tables}, SGD(0.5), communicator=comm, **more
        )
        try:
            result = use(module)
        except Exception as error:
            result = error
        try:
            module.close()
        except Exception as error:
            return result if isinstance(result, Exception) else error
        return result

    return on_ranks(2, program)


# --- forms of input ---------------------------------------------------------------------------------------------------


def test_all_forms_of_input_are_the_same() -> None:
    bags = PROBLEM.bags(0, 0)
    names = list(bags)
    lengths = {name: torch.diff(torch.cat([at, torch.tensor([len(ids)])])) for name, (ids, at, _) in bags.items()}
    values, counts = torch.cat([bags[n][0] for n in names]), torch.cat([lengths[n] for n in names])

    def padded(name: str) -> Padded:
        ids, at, _ = bags[name]
        width = max(int(lengths[name].max()), 1)
        matrix = torch.full((4, width), -1)
        for row, (first, count) in enumerate(zip(at.tolist(), lengths[name].tolist(), strict=True)):
            matrix[row, :count] = ids[first : first + count]
        return Padded(matrix, lengths[name])

    keyed = SimpleNamespace(
        keys=lambda: names, values=lambda: values, lengths=lambda: counts, weights_or_none=lambda: None
    )
    forms = {
        "offsets": {name: (ids, at) for name, (ids, at, _) in bags.items()},
        "int32": {name: (ids.int(), at.int()) for name, (ids, at, _) in bags.items()},
        "padded": {name: padded(name) for name in names},
        "jagged": Jagged(names, values, counts),
        "jagged in another order": Jagged(
            names[::-1], torch.cat([bags[n][0] for n in names[::-1]]), torch.cat([lengths[n] for n in names[::-1]])
        ),
        "torchrec's": keyed,
    }

    def use(module: ShardedEmbeddingBag) -> dict[str, Tensor]:
        with torch.no_grad():
            return {form: module(inputs) for form, inputs in forms.items()}

    found = one_rank()(use)
    assert found["offsets"].shape == (4, sum(table.embedding_dim for _, table in PROBLEM.features))
    assert found["offsets"].abs().sum() > 0
    assert [form for form, out in found.items() if not torch.equal(out, found["offsets"])] == []


def test_last_offsets_matrices_and_tensors_of_all_features() -> None:
    ids = torch.tensor([[1, 5], [9, 0], [3, 3]])

    def use(module: ShardedEmbeddingBag) -> list[Tensor]:
        columns = {"a": ids[:, 0], "b": ids[:, 1]}
        matrices = {"a": ids[:, :1], "b": (ids[:, 1:], None)}
        offsets = {"a": (ids[:, 0], torch.arange(4)), "b": (ids[:, 1], torch.arange(4))}
        with torch.no_grad():
            return [module(form) for form in (ids, ids.unsqueeze(2), columns, matrices, offsets)]

    tables = Problem(tables=(EmbeddingTable("a", 10, 4), EmbeddingTable("b", 6, 2)))
    found = one_rank(tables, include_last_offset=True)(use)
    assert found[0].shape == (3, 6)
    assert all(torch.equal(out, found[0]) for out in found[1:])


def test_output_by_feature() -> None:
    bags = {name: (ids, at) for name, (ids, at, _) in PROBLEM.bags(0, 0).items()}

    def use(module: ShardedEmbeddingBag) -> dict[str, Tensor]:
        found = module(bags)
        sum(each.sum() for each in found.values()).backward()
        return found

    found = one_rank(output="dict")(use)
    assert {name: out.shape for name, out in found.items()} == {
        name: (4, table.embedding_dim) for name, table in PROBLEM.features
    }


WRONG: dict[str, tuple[Any, str]] = {
    "too large": ({"a": torch.tensor([3, 10]), "b": torch.tensor([0, 0])}, r"'a' has the id 10 at place 1; .* 0 to 9"),
    "negative": ({"a": torch.tensor([3, 1]), "b": torch.tensor([0, -2])}, r"'b' has the id -2 at place 1; .* 0 to 5"),
    "dtype": ({"a": torch.tensor([3.0]), "b": torch.tensor([0])}, r"'a' is of torch.float32; give .*int64"),
    "no tensor": ({"a": [3], "b": torch.tensor([0])}, r"feature 'a' is a list; give ids"),
    "offsets back": (
        {"a": (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1])), "b": torch.tensor([0, 0, 0])},
        r"'a' has offsets that go back after bag 1, from 2 to 1",
    ),
    "offsets beyond": (
        {"a": (torch.tensor([1, 2]), torch.tensor([0, 5])), "b": torch.tensor([0, 0])},
        r"'a' has offsets that go back after bag 1, from 5 to 2",
    ),
    "offsets whose differences overflow": (
        {"a": (torch.tensor([1, 2, 3]), torch.tensor([0, 2**63 - 1, -2])), "b": torch.tensor([0, 0, 0])},
        r"'a' has offsets that go back after bag 1, from 9223372036854775807 to -2",
    ),
    "int32 offsets whose differences overflow": (
        {"a": (torch.tensor([1, 2, 3]), torch.tensor([0, 2**31 - 1, -2]).int()), "b": torch.tensor([0, 0, 0])},
        r"'a' has offsets that go back after bag 1, from 2147483647 to -2",
    ),
    "first offset": (
        {"a": (torch.tensor([1, 2]), torch.tensor([1, 2])), "b": torch.tensor([0, 0])},
        r"begin with 1; the first has to be 0",
    ),
    "no bags": ({"a": (torch.tensor([1]), torch.tensor([], dtype=torch.int64)), "b": torch.tensor([0])}, "for no bag"),
    "unknown feature": (
        {"a": torch.tensor([1]), "c": torch.tensor([1])}, r"feature 'c', which no table has; known are a, b"
    ),
    "missing feature": ({"a": torch.tensor([1])}, r"lacks the feature 'b'"),
    "samples": ({"a": torch.tensor([1]), "b": torch.tensor([1, 2])}, r"different numbers of samples \(a: 1, b: 2\)"),
    "weights dtype": (
        {"a": (torch.tensor([1]), torch.tensor([0]), torch.ones(1).double()), "b": torch.tensor([1])},
        r"weights of torch.float64; the tables are of torch.float32",
    ),
    "weights shape": (
        {"a": (torch.tensor([1]), torch.tensor([0]), torch.ones(2)), "b": torch.tensor([1])},
        r"weights \(2,\) for ids \(1,\)",
    ),
    "columns": (torch.zeros(3, 3, dtype=torch.int64), r"shape \(3, 3\); give \[batch, 2\]"),
    "jagged": (Jagged(["a", "b"], torch.tensor([1, 2]), torch.tensor([1, 2])), r"lengths sum to 3 where values has 2"),
    "jagged, lengths that overflow": (
        Jagged(["a", "b"], torch.tensor([1, 2]), torch.tensor([2**62, 2**62, 2**62, 2**62 + 2])),
        r"lengths has 4611686018427387906 where values has 2 ids",
    ),
    "padded": (
        {"a": Padded(torch.zeros(2, 3).long(), torch.tensor([1, 4])), "b": torch.tensor([1, 1])},
        r"lengths outside \[0, 3\]",
    ),
    "keys twice": (
        Jagged(["a", "b", "a"], torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1])), r"keys has 'a' 2 times; give each"
    ),
    "values of two dimensions": (
        Jagged(["a", "b"], torch.ones(2, 2).long(), torch.tensor([1, 1])), r"values has shape \(2, 2\); give the ids"
    ),
    "sparse": (torch.ones(2, 2, dtype=torch.int64).to_sparse(), r".*"),
    "sparse feature": (
        {"a": torch.ones(2, dtype=torch.int64).to_sparse(), "b": torch.tensor([1, 1])}, r"'a' is of torch.sparse_coo"
    ),
    "meta": ({"a": torch.ones(2, device="meta").long(), "b": torch.tensor([1, 1])}, r"'a' is a meta tensor"),
    "another thing": ("ids", r"inputs is a str; give"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_of_one_rank_is_the_same_error_on_all(case: str) -> None:
    wrong, message = WRONG[case]
    right = torch.zeros(2, 2, dtype=torch.int64)
    found = on_two(lambda module: module(wrong if module.rank == 1 else right))
    assert [type(each) for each in found] == [EmbeddingError] * 2
    assert str(found[0]) == str(found[1])
    assert re.search(f"^rank 1: .*{message}", str(found[0])), found[0]


def test_wrong_input_alone() -> None:
    with pytest.raises(EmbeddingError, match=r"^feature 'user' has the id 50 at place 0"):
        one_rank()(lambda m: m({n: torch.full((1,), 50 if n == "user" else 0) for n, _ in PROBLEM.features}))


def test_mean_and_weights_do_not_go_together() -> None:
    tables = (EmbeddingTable("a", 10, 4, "mean"),)
    found = on_two(lambda m: m({"a": (torch.tensor([1]), torch.tensor([0]), torch.ones(1))}), tables)
    assert all("weights need pooling='sum'" in str(each) for each in found)


# --- calls of ranks ---------------------------------------------------------------------------------------------------

IDS = torch.zeros(2, 2, dtype=torch.int64)


def both(first: Callable[[ShardedEmbeddingBag], Any], second: Callable[[ShardedEmbeddingBag], Any]) -> list[Any]:
    return on_two(lambda module: (first, second)[module.rank](module), debug=True)


def backward(module: ShardedEmbeddingBag) -> None:
    module(IDS).sum().backward()


def without_gradients(module: ShardedEmbeddingBag) -> None:
    with torch.no_grad():
        module(IDS)


def no_backward(module: ShardedEmbeddingBag) -> None:
    module(IDS)
    module(IDS)


def in_another_order(module: ShardedEmbeddingBag) -> None:
    first, second = module(IDS), module(IDS)
    (second if module.rank else first).sum().backward()


def test_different_calls() -> None:
    found = both(backward, no_backward)
    assert all(isinstance(each, EmbeddingError) for each in found), found
    assert all("rank 0 is in an update (backward) while rank 1 is in a lookup (forward)" in str(each) for each in found)
    found = both(backward, without_gradients)
    assert all("rank 0 looks up for training while rank 1 looks up without" in str(each) for each in found), found
    found = both(in_another_order, in_another_order)
    assert all("run backward in the same order" in str(each) for each in found), found


def test_weights_on_one_rank_only_are_seen_in_debug_mode() -> None:
    weighted = {"a": (torch.tensor([1]), torch.tensor([0]), torch.ones(1)), "b": torch.tensor([1])}
    plain = {"a": torch.tensor([1]), "b": torch.tensor([1])}
    found = both(lambda m: m(weighted), lambda m: m(plain))
    assert all("make different calls: meeting 1" in str(each) for each in found), found


def test_backward_twice() -> None:
    def twice(module: ShardedEmbeddingBag) -> None:
        loss = module(IDS).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    assert all("second time" in str(each) for each in on_two(twice))


def test_after_close() -> None:
    def late(module: ShardedEmbeddingBag) -> None:
        module.close()
        module.close()
        module(IDS)

    found = on_two(late)
    assert all(isinstance(each, ShadowSyncError) and "forward() came after close()" in str(each) for each in found)


def test_replicas_of_the_module_have_to_match() -> None:
    def program(comm: Communicator) -> str:
        changed: dict[str, Any] = {"optimizer": SGD(0.5 + comm.rank)}
        with pytest.raises(ReplicaMismatchError) as caught:
            ShardedEmbeddingBag(ONE, **changed, communicator=comm)
        return str(caught.value)

    found = on_ranks(2, program)
    assert found[0] == found[1] and "argument optimizer: SGD(lr=0.5) on rank 0, SGD(lr=1.5) on rank 1" in found[0]


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tables": ({"tables": ()}, ValueError, "tables is empty"),
    "no table": ({"tables": ("a",)}, TypeError, "tables has a str"),
    "names twice": ({"tables": (ONE[0], ONE[0])}, ValueError, "the table 'a' 2 times"),
    "features twice": (
        {"tables": (ONE[0], EmbeddingTable("c", 2, 2, features=["a"]))}, ValueError, "the feature 'a' 2 times"
    ),
    "no optimizer": ({"optimizer": None}, TypeError, "optimizer=None is no optimizer of rows; give"),
    "torch's optimizer": ({"optimizer": torch.optim.SGD}, TypeError, "is no optimizer of rows"),
    "the base": ({"optimizer": SparseOptimizer(0.1)}, TypeError, "is no optimizer of rows"),
    "output": ({"output": "list"}, ValueError, "output='list' is unknown; give one of 'concat', 'dict'"),
    "gradients": ({"gradients": "avg"}, ValueError, "gradients='avg' is unknown"),
    "dtype": ({"dtype": torch.float16}, ValueError, "dtype=torch.float16 is not supported; give torch.float32"),
    "wire": ({"wire_dtype": torch.float32}, ValueError, "wire_dtype=torch.float32 is not supported"),
    "kernel": ({"kernel": "fast"}, ValueError, "kernel='fast' is unknown"),
    "plan of others": ({"plan": Plan.of(ONE[:1], 1, {"a": "table-wise"})}, ValueError, "plan is for 1 tables"),
    "plan of another world": (
        {"plan": Plan.of(ONE, 2, dict.fromkeys("ab", "table-wise"))},
        ValueError,
        "a world of 2, not these 2 tables and 1",
    ),
    "plan": ({"plan": 3}, TypeError, "plan is a int; give a Plan"),
    "placement": ({"plan": {"a": "table-wise", "b": "tablewise"}}, ValueError, "strategy of table 'b'='tablewise'"),
    "no placement": ({"plan": {"a": "table-wise"}}, ValueError, "placements lacks table 'b'"),
    "rank": ({"plan": {"a": Placement("table-wise", (1,)), "b": "row-wise"}}, ValueError, "below the world size, 1"),
    "debug": ({"debug": 1}, TypeError, "debug=1 is neither True nor False"),
    "seed": ({"seed": -1}, ValueError, "seed=-1 is below 0"),
    "communicator": ({"communicator": 3}, TypeError, "communicator is a int"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments(case: str) -> None:
    changed, kind, message = ARGUMENTS[case]
    arguments = {"tables": ONE, "optimizer": SGD(0.1), **changed}

    def program(comm: Communicator) -> None:
        with pytest.raises(kind, match=message.replace("(", r"\(")):
            ShardedEmbeddingBag(**{"communicator": comm, **arguments})

    on_ranks(1, program)


def test_ids_may_be_changed_after_forward() -> None:
    def use(module: ShardedEmbeddingBag) -> float:
        ids, weights = torch.tensor([1, 2]), torch.ones(2)
        inputs = {"a": (ids, torch.tensor([0, 1]), weights), "b": ids.clone()}
        vectors = module(inputs)
        ids.fill_(10**9)
        weights.fill_(torch.nan)
        inputs["b"].fill_(-5)
        vectors.sum().backward()
        rows = [module.shards[i].weight for i in range(len(module.shards))]
        return float(sum(each.abs().sum() for each in rows))

    changed = on_two(use, TABLES_OF_SUMS)
    assert changed == [4.0, 4.0]  # two rows of 4 values moved by 0.5 on the owner of each table


def test_another_learning_rate_on_one_rank() -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        vectors = module(IDS)
        module.fused_optimizer.param_groups[0]["lr"] = 0.1 + module.rank
        vectors.sum().backward()

    rates = "of 'torch.float32 SGD(lr=0.1)' and of 'torch.float32 SGD(lr=1.1)'; make them alike"
    assert all(rates in str(each) for each in on_two(use))

    def negative(module: ShardedEmbeddingBag) -> None:
        vectors = module(IDS)
        module.fused_optimizer.param_groups[0]["lr"] = 0.1 - module.rank
        vectors.sum().backward()

    assert all("rank 1: fused_optimizer: lr=-0.9 is outside" in str(each) for each in on_two(negative))


def test_copies_and_pickles_are_refused() -> None:
    def use(module: ShardedEmbeddingBag) -> str:
        with pytest.raises(TypeError, match="cannot be copied or pickled; save"):
            copy.deepcopy(module)
        with pytest.raises(ValueError, match=r"cannot be of torch\.float32 on meta"):
            module.to("meta")
        return "refused"

    assert on_two(use) == ["refused"] * 2


def test_state_that_is_assigned_is_brought_into_form() -> None:
    def use(module: ShardedEmbeddingBag) -> bool:
        state = {
            name: value.half() if value.dtype.is_floating_point else value
            for name, value in module.state_dict().items()
        }
        module.load_state_dict(state, assign=True)
        module(IDS).sum().backward()
        buffers = [buffer for name, buffer in module.named_buffers() if name.endswith("weight")]
        return all(buffer.dtype is torch.float32 and is_owned(buffer) for buffer in buffers)

    assert on_two(use) == [True, True]


def test_an_initializer_that_does_not_work_in_place() -> None:
    tables = (EmbeddingTable("a", 3, 2, init=lambda rows, generator: torch.ones_like(rows)),)

    def program(comm: Communicator) -> None:
        with pytest.raises(ValueError, match="init of table 'a' leaves rows without a value; it has to fill"):
            ShardedEmbeddingBag(tables, optimizer=SGD(0.1), communicator=comm)

    on_ranks(1, program)


def test_prefetchers_are_not_nested() -> None:
    found = on_two(lambda module: module.prefetch(module.prefetch([IDS])))
    assert all("with several modules prefetch with one" in str(each) for each in found)


def test_a_replicated_table_with_the_name_of_an_attribute() -> None:
    def program(comm: Communicator) -> None:
        with pytest.raises(
            ValueError, match="table 'forward' is replicated, but no parameter can be called so; rename"
        ):
            tables = (EmbeddingTable("forward", 3, 2),)
            ShardedEmbeddingBag(tables, {"forward": "replicated"}, SGD(0.1), communicator=comm)

    on_ranks(1, program)


# --- uneven data, ahead -----------------------------------------------------------------------------------------------


def rows_after(comm: Communicator, module: ShardedEmbeddingBag) -> dict[str, Tensor]:
    found = whole_tables(comm, module)
    module.close()
    return found


def train_loop(module: ShardedEmbeddingBag, comm: Communicator, steps: int, depth: int | None) -> list[Tensor]:
    batches = [{n: (i, a) for n, (i, a, _) in PROBLEM.bags(comm.rank, step).items()} for step in range(steps)]
    outputs = []
    loop = batches if depth is None else module.prefetch(batches, depth=depth)
    for step, batch in enumerate(loop):
        vectors = module(batch)
        outputs.append(vectors.detach().clone())
        PROBLEM.loss(vectors, comm.rank, step).backward()
    if depth is None:
        module.join()
    return outputs


@pytest.mark.parametrize("steps", [(6, 6, 6), (6, 0, 3), (1, 5, 0)])
def test_prefetch_of_depth_0_changes_no_bit(steps: tuple[int, ...]) -> None:
    def program(comm: Communicator) -> Any:
        found = []
        for depth in (None, 0):
            module = make(comm, PROBLEM, placements(PROBLEM, "mixed", 3), RowWiseAdagrad(0.1))
            outputs = [train_loop(module, comm, steps[comm.rank], depth) for _ in range(2)]
            found.append((outputs, rows_after(comm, module)))
        return found

    for plain, ahead in on_ranks(3, program):
        assert all(
            torch.equal(a, b) for x, y in zip(plain[0], ahead[0], strict=True) for a, b in zip(x, y, strict=True)
        )
        assert all(torch.equal(plain[1][name], ahead[1][name]) for name in plain[1])


@pytest.mark.parametrize("rule", [SGD(1.0), Adagrad(1.0), Adam(1.0)])
def test_rows_of_a_rank_without_data_move_at_the_rate_of_the_others(rule: SparseOptimizer) -> None:
    def program(comm: Communicator) -> Tensor:
        module = ShardedEmbeddingBag([EmbeddingTable("a", 10, 4)], {"a": "row-wise"}, rule, communicator=comm)
        before = whole_tables(comm, module)["a"]
        schedule = torch.optim.lr_scheduler.StepLR(module.fused_optimizer, 1, 0.1)
        for _ in range(1 if comm.rank else 3):
            module({"a": torch.arange(10)}).sum().backward()
            schedule.step()
        module.join()
        return rows_after(comm, module)["a"] - before

    for moved in on_ranks(2, program):
        assert torch.allclose(moved, moved[:1].expand(10, -1), rtol=1e-4)


def test_rows_that_change_dtype_between_forward_and_backward() -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        vectors = module(IDS)
        module.double()
        vectors.sum().backward()

    for each in on_two(use):
        assert isinstance(each, EmbeddingError)
        assert "rows went from torch.float32 to torch.float64 between forward and backward" in str(each)


def loop_ahead(module: ShardedEmbeddingBag, steps: int = 12) -> None:
    for batch in module.prefetch([IDS.clone() for _ in range(steps)], depth=2):
        module(batch).sum().backward()


def test_what_is_loaded_or_converted_after_a_loop_waits_for_its_updates() -> None:
    def use(module: ShardedEmbeddingBag) -> bool:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        loop_ahead(module)
        module.load_state_dict(state)
        same = all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        loop_ahead(module)
        module.double()
        return same

    assert on_two(use) == [True, True]


def test_state_of_another_division_is_refused() -> None:
    def program(comm: Communicator) -> str:
        modules = [
            ShardedEmbeddingBag([EmbeddingTable("a", 10, 4)], {"a": strategy}, SGD(0.5), communicator=comm)
            for strategy in ("row-wise", "row-wise hashed")
        ]
        with pytest.raises(RuntimeError) as caught:
            modules[1].load_state_dict(modules[0].state_dict())
        for module in modules:
            module.close()
        return str(caught.value)

    for rank, said in enumerate(on_ranks(2, program)):
        assert f"rows_{5 * rank}_{5 * rank + 5}/columns_0_4" in said
        assert f"hash_{rank}_of_2/columns_0_4" in said


def test_saving_while_others_have_lookups_ahead(tmp_path: Path) -> None:
    """Rank 0 has no more batches; what rank 1 has looked up ahead when both save is still known to rank 0 then."""

    def use(module: ShardedEmbeddingBag) -> int:
        batches = [IDS.clone() for _ in range(4 + 4 * module.rank)]
        for step, batch in enumerate(module.prefetch(batches, depth=2)):
            module(batch).sum().backward()
            if step == 6:
                files.save(tmp_path, module)
        if module.rank == 0:
            files.save(tmp_path, module)
        module.join()
        module.wait()
        return len(module._exchange._served)  # type: ignore[union-attr]

    assert on_two(use) == [0, 0]


def test_a_rank_without_data_remembers_few_lookups() -> None:
    def use(module: ShardedEmbeddingBag) -> int:
        for _ in range(0 if module.rank else 3 * routing.KEPT):
            module(IDS)
        held = module(IDS) if module.rank == 0 else None
        module.join()
        module.wait()
        served = len(module._exchange._served)  # type: ignore[union-attr]
        return served if held is None else 0

    assert on_two(use) == [0, routing.KEPT]


def test_two_modules_of_which_one_looks_ahead_on_uneven_data() -> None:
    def program(comm: Communicator) -> int:
        ahead, beside = (
            ShardedEmbeddingBag(ONE, {t.name: "table-wise" for t in ONE}, SGD(0.5), communicator=comm) for _ in range(2)
        )
        for batch in ahead.prefetch([IDS.clone() for _ in range(3 + comm.rank)]):
            (ahead(batch).sum() + beside(IDS).sum()).backward()
        ahead.close()
        beside.close()
        return int(ahead.metrics()["updates"])

    assert on_ranks(2, program) == [4, 4]


def test_a_compiled_model_calls_the_module_as_it_is() -> None:
    def use(module: ShardedEmbeddingBag) -> bool:
        top = nn.Linear(6, 1)
        model = torch.compile(nn.Sequential(module, top), backend="aot_eager")
        compiled = model(IDS)
        compiled.sum().backward()
        return compiled.shape == (len(IDS), 1)

    assert on_two(use) == [True, True]


def stale_reference(depth: int, world: int, steps: tuple[int, ...]) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
    """Train in one process with lookups that see all updates but the last `depth`."""
    from embeddings import plain_modules

    modules = plain_modules(PROBLEM)
    history = []
    outputs: list[list[Tensor]] = [[] for _ in range(world)]
    for step in range(max(steps)):
        history.append({name: module.weight.detach().clone() for name, module in modules.items()})
        seen = history[max(step - depth, 0)]
        grads = {name: torch.zeros_like(weight) for name, weight in seen.items()}
        present = [rank for rank in range(world) if step < steps[rank]]
        for rank in present:
            weights = {name: weight.clone().requires_grad_() for name, weight in seen.items()}
            vectors = torch.cat(
                [
                    nn.functional.embedding_bag(
                        PROBLEM.bags(rank, step)[n][0], weights[t.name], PROBLEM.bags(rank, step)[n][1], mode=t.pooling
                    )
                    for n, t in PROBLEM.features
                ],
                1,
            )
            outputs[rank].append(vectors.detach())
            (PROBLEM.loss(vectors, rank, step) / len(present)).backward()
            for name, weight in weights.items():
                grads[name] += weight.grad
        with torch.no_grad():
            for name, module in modules.items():
                module.weight -= 0.5 * grads[name]
    return outputs, {name: module.weight.detach() for name, module in modules.items()}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("steps", [(6, 6), (7, 3), (1, 5), (0, 4)])
def test_prefetch_is_stale_by_exactly_its_depth(depth: int, steps: tuple[int, ...]) -> None:
    def program(comm: Communicator) -> Any:
        module = make(comm, PROBLEM, placements(PROBLEM, "mixed", 2), SGD(0.5))
        outputs = train_loop(module, comm, steps[comm.rank], depth)
        return outputs, rows_after(comm, module)

    outputs, tables = stale_reference(depth, 2, steps)
    for rank, found in enumerate(on_ranks(2, program)):
        for one, other in zip(found[0], outputs[rank], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        for name, table in tables.items():
            torch.testing.assert_close(found[1][name], table, rtol=1e-12, atol=1e-12)


def test_a_loop_that_is_left_early() -> None:
    def program(comm: Communicator) -> Any:
        module = make(comm, PROBLEM, placements(PROBLEM, "mixed", 2), SGD(0.5))
        batches = [{n: (i, a) for n, (i, a, _) in PROBLEM.bags(comm.rank, step).items()} for step in range(6)]
        for step, batch in enumerate(module.prefetch(batches, depth=2)):
            PROBLEM.loss(module(batch), comm.rank, step).backward()
            if comm.rank == 1 and step == 2:
                break
        return rows_after(comm, module)

    first, second = on_ranks(2, program)
    assert all(torch.equal(first[name], second[name]) and not first[name].isnan().any() for name in first)


def test_forward_of_another_batch_than_that_looked_up_ahead() -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        for batch in module.prefetch([IDS, IDS.clone()], depth=1):
            module(batch.clone())

    found = on_two(use)
    assert all("another object than the one that was looked up ahead" in str(each) for each in found), found


def test_wrong_input_ahead_is_an_error_on_all_ranks() -> None:
    def use(module: ShardedEmbeddingBag) -> None:
        wrong = IDS + 100 * (module.rank == 1)
        for batch in module.prefetch([IDS, wrong, IDS.clone()], depth=1):
            module(batch).sum().backward()

    found = on_two(use)
    assert all(
        isinstance(each, EmbeddingError) and "rank 1: feature 'a' has the id 100" in str(each) for each in found
    ), found


@pytest.mark.parametrize("depth", [-1, 9, 1.5])
def test_wrong_depths(depth: Any) -> None:
    found = on_two(lambda module: module.prefetch([], depth=depth))
    assert all(isinstance(each, (ValueError, TypeError)) and f"depth={depth}" in str(each) for each in found)


def test_gradients_of_weights_with_prefetch() -> None:
    def use(module: ShardedEmbeddingBag) -> list[Tensor]:
        weights = [torch.ones(2, requires_grad=True) for _ in range(3)]
        batches = [{"a": (torch.tensor([1, 2]), torch.tensor([0, 1]), w), "b": torch.tensor([1, 1])} for w in weights]
        for batch in module.prefetch(batches, depth=1):
            module(batch).sum().backward()
        return [weight.grad for weight in weights]

    for grads in on_two(use):
        assert all(grad is not None and grad.shape == (2,) and grad.abs().sum() > 0 for grad in grads)


# --- beside the dense part --------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, embedding: ShardedEmbeddingBag) -> None:
        super().__init__()
        self.embedding = embedding
        self.top = nn.Linear(6, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.embedding(ids))


def model_on(comm: Communicator, **plan: Placement | str) -> Model:
    chosen = {"a": "row-wise", "b": "table-wise", **plan}
    torch.manual_seed(comm.rank)
    return Model(ShardedEmbeddingBag(ONE, chosen, RowWiseAdagrad(0.1), communicator=comm))


@pytest.mark.parametrize("steps", [(5, 5), (8, 3), (0, 4)])
@pytest.mark.parametrize("foreground", [False, True])
def test_the_dense_wrapper_leaves_shards_alone(steps: tuple[int, int], foreground: bool) -> None:
    if foreground and len(set(steps)) > 1:
        pytest.skip("foreground rounds need equally many steps")

    def program(comm: Communicator) -> Any:
        model = model_on(comm)
        before = [buffer.clone() for buffer in model.embedding.shards.buffers()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pace = {"sync_every": 2, "foreground": True} if foreground else {"sync_every": 1}
        sync = ShadowSync(optimizer, model=model, algorithm=ModelAveraging(), communicator=comm, **pace)
        assert all(map(torch.equal, before, model.embedding.shards.buffers()))
        for step in range(steps[comm.rank]):
            optimizer.zero_grad()
            model(torch.full((2, 2), step % 6)).sum().backward()
            optimizer.step()
        sync.synchronize()
        dense = sync.gather(model.top.weight.detach().clone())
        sync.close()
        model.embedding.close()
        return dense, [buffer.clone() for buffer in model.embedding.shards.buffers()]

    found = on_ranks(2, program)
    assert torch.equal(*found[0][0])
    assert not torch.equal(found[0][1][0], found[1][1][0])


def test_replicated_tables_join_the_dense_replica() -> None:
    def program(comm: Communicator) -> Any:
        model = model_on(comm, b="replicated")
        names = [name for name, _ in model.named_parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sync = ShadowSync(optimizer, model=model, communicator=comm, sync_every=1)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 2), (step + comm.rank) % 6)).sum().backward()
            optimizer.step()
        sync.synchronize()
        table = model.embedding.replicated.b.detach().clone()
        sync.close()
        model.embedding.close()
        return names, table

    (names, first), (_, second) = on_ranks(2, program)
    assert names == ["embedding.replicated.b", "top.weight", "top.bias"]
    assert torch.equal(first, second)


def test_replicated_equals_divided() -> None:
    problem = Problem(sizes=(4,), weighted=frozenset({"user"}))
    from embeddings import train_sharded

    mixed = {"users": "replicated", "ads": "replicated", "words": "row-wise", "unused": "table-wise"}

    def program(comm: Communicator) -> Any:
        divided = train_sharded(comm, problem, placements(problem, "table-wise", 1), SGD(0.5), 3)
        whole = train_sharded(comm, problem, Plan.of(problem.tables, 1, mixed), SGD(0.5), 3)
        return divided, whole

    divided, whole = on_ranks(1, program)[0]
    assert all(map(torch.equal, divided.outputs[0], whole.outputs[0]))
    for one, other in zip(divided.weight_gradients[0], whole.weight_gradients[0], strict=True):
        assert torch.equal(one["user"], other["user"])


def test_what_the_module_shows() -> None:
    def program(comm: Communicator) -> Any:
        model = model_on(comm, b="replicated")
        embedding = model.embedding
        state = copy.deepcopy(model.state_dict())
        for buffer in embedding.shards.buffers():
            buffer.zero_()
        model.load_state_dict(state)
        restored = all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
        broadcast_parameters(model.state_dict(), communicator=comm)
        embedding.train()
        out_training = embedding(IDS)
        embedding.eval()
        out_evaluation = embedding(IDS)
        out_training.sum().backward()
        out_evaluation.sum().backward()
        model.double()
        wide = model(IDS)
        wide.sum().backward()
        model.to(torch.bfloat16)
        with torch.no_grad():
            half = model(IDS)
        dtypes = {each.dtype for each in embedding.shards.buffers()}
        embedding.close()
        return (
            sorted(state),
            restored,
            torch.equal(out_training, out_evaluation),
            wide.dtype,
            half.dtype,
            dtypes,
            repr(embedding),
        )

    for rank, (names, restored, same, wide, half, dtypes, shown) in enumerate(on_ranks(2, program)):
        held = f"rows_{5 * rank}_{5 * rank + 5}/columns_0_4"
        assert names == [
            "embedding.replicated.b", f"embedding.shards.a/{held}.steps", f"embedding.shards.a/{held}.sum",
            f"embedding.shards.a/{held}.weight", "top.bias", "top.weight",
        ]  # fmt: skip
        assert restored and same
        assert (wide, half) == (torch.float64, torch.bfloat16)
        assert dtypes == {torch.float64, torch.int64}
        assert "2 tables, 16 rows" in shown


def test_a_checkpoint_has_the_tables_beside_it(tmp_path: Path) -> None:
    """Saved on two ranks, loaded on three, under another placement."""
    path = tmp_path / "model.pt"

    def handle(comm: Communicator, **plan: Placement | str) -> tuple[Model, ShadowSync]:
        model = model_on(comm, **plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, ShadowSync(optimizer, model=model, communicator=comm, sync_every=1)

    def look(comm: Communicator, model: Model, sync: ShadowSync) -> Any:
        tables = whole_tables(comm, model.embedding)
        sync.close()
        model.embedding.close()
        return {**tables, "top": model.top.weight.detach().clone()}

    def saving(comm: Communicator) -> Any:
        model, sync = handle(comm)
        for step in range(3):
            sync.optimizer.zero_grad()
            model(torch.full((2, 2), (step + comm.rank) % 6)).sum().backward()
            sync.optimizer.step()
        checkpoint.save(path, model, sync, extra={"epoch": 1})
        return look(comm, model, sync)

    def loading(comm: Communicator) -> Any:
        model, sync = handle(comm, a="column-wise", b="row-wise hashed")
        assert checkpoint.load(path, model, sync) == {"epoch": 1}
        return look(comm, model, sync)

    saved, loaded = on_ranks(2, saving)[0], on_ranks(3, loading)
    assert (tmp_path / "model.pt.embedding" / "index.json").exists()
    assert all(torch.equal(each[name], saved[name]) for each in loaded for name in saved)
    assert not any("shards" in name for name in torch.load(path, weights_only=True)["model"])


@pytest.mark.parametrize(
    ("fails", "loads"),
    [
        ("extra", "the old one"),
        ("disk", "the old one"),
        ("end", "CheckpointError: rank 0: .*has the tables of another save; it was cut short"),
    ],
)
def test_a_save_that_is_cut_short_makes_no_mixture(
    fails: str, loads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older model and newer tables."""
    path = tmp_path / "model.pt"
    replace_file, sync_file = os.replace, os.fsync
    armed = threading.Event()

    def replace(source: Any, target: Any) -> None:
        if fails == "end" and armed.is_set() and target == path:
            raise OSError(errno.EIO, "Input/output error")
        replace_file(source, target)

    def fsync(descriptor: int) -> None:
        if (
            fails == "disk"
            and armed.is_set()
            and "model.pt." in os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2]
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync_file(descriptor)

    def job(comm: Communicator) -> str:
        model = model_on(comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1) as sync:
            checkpoint.save(path, model, sync, extra="the old one")
            before = whole_tables(comm, model.embedding)
            for step in range(3):
                optimizer.zero_grad()
                model(torch.full((2, 2), (step + comm.rank) % 6)).sum().backward()
                optimizer.step()
            armed.set()
            with pytest.raises(CheckpointError):
                checkpoint.save(path, model, sync, extra=range(3) if fails == "extra" else "the new one")
            try:
                found = checkpoint.load(path, model, sync)
                after = whole_tables(comm, model.embedding)
                assert all(torch.equal(before[name], after[name]) for name in before)
            except CheckpointError as error:
                found = f"CheckpointError: {error}"
        model.embedding.close()
        return str(found)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    for found in on_ranks(2, job):
        assert re.match(loads, found)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.pt", "model.pt.embedding"]


def test_modules_may_have_a_slash_in_their_names(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"

    def job(comm: Communicator) -> bool:
        tables = torch.nn.ModuleDict({name: model_on(comm).embedding for name in ("user/id", "ad/id", "ad%2Fid")})
        model = torch.nn.ModuleDict({"tables": tables, "top": torch.nn.Linear(2, 1)})
        optimizer = torch.optim.SGD(model["top"].parameters(), lr=0.1)
        with ShadowSync(optimizer, model=model["top"], communicator=comm, sync_every=1) as sync:
            for number, module in enumerate(tables.values()):
                module.load_global_state_dict({n: torch.full_like(w, number) for n, w in weights_of(comm, module)})
            checkpoint.save(path, model, sync)
            checkpointer = Checkpointer(tmp_path / "folder", model, sync)
            written = checkpointer.save_now()
            checkpointer.close()
            found = []
            for file in (path, written / "model.pt"):
                for module in tables.values():
                    module.load_global_state_dict({n: torch.full_like(w, 9) for n, w in weights_of(comm, module)})
                checkpoint.load(file, model, sync)
                for number, module in enumerate(tables.values()):
                    found.append(all(bool((weight == number).all()) for _, weight in weights_of(comm, module)))
        for module in tables.values():
            module.close()
        return all(found)

    assert on_ranks(2, job) == [True, True]


def weights_of(comm: Communicator, module: ShardedEmbeddingBag) -> list[tuple[str, Tensor]]:
    return list(whole_tables(comm, module).items())


def test_vectors_without_a_backward_are_let_go_at_once() -> None:
    def use(module: ShardedEmbeddingBag) -> bool:
        vectors = module(IDS)
        seen = weakref.ref(vectors)
        del vectors
        return seen() is None

    gc.disable()
    try:
        assert on_two(use) == [True, True]
    finally:
        gc.enable()


def test_schedulers_change_the_learning_rate_of_rows() -> None:
    def use(module: ShardedEmbeddingBag) -> list[float]:
        scheduler = torch.optim.lr_scheduler.StepLR(module.fused_optimizer, step_size=1, gamma=0.5)
        index, moved = next(((i, m) for i, m in enumerate(module.shards.owned) if m.table == 0), (None, None))
        found = []
        for _ in range(3):
            before = module.shards[index].weight[0].clone() if moved else None
            module(IDS).sum().backward()
            scheduler.step()
            if moved:
                found.append(float((before - module.shards[index].weight[0])[0]))
        return found

    moves = next(each for each in on_two(use, tables=TABLES_OF_SUMS) if each)
    assert moves == [1.0, 0.5, 0.25]


TABLES_OF_SUMS = tuple(EmbeddingTable(n, 8, 4, init=lambda rows, generator: rows.zero_()) for n in "ab")


@pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_wire(wire: torch.dtype) -> None:
    problem = Problem(sizes=(64,), exact=False, dtype=torch.float32)
    from embeddings import train_plain, train_sharded

    expected = train_plain(problem, 2, Adagrad(0.05), 10)
    plan = placements(problem, "mixed", 2)
    found = on_ranks(2, lambda comm: train_sharded(comm, problem, plan, Adagrad(0.05), 10, wire_dtype=wire))
    for name, table in expected.tables.items():
        difference = (found[0].tables[name].float() - table).abs()
        assert difference.max() < (0.02 if wire is torch.float16 else 0.15), name


def test_small_gradients_survive_half_precision() -> None:
    def use(module: ShardedEmbeddingBag) -> float:
        (module(IDS + module.rank).sum() * 1e-9).backward()
        return float(sum(module.shards[i].weight.abs().sum() for i in range(len(module.shards))))

    halved, whole = on_two(use, TABLES_OF_SUMS, wire_dtype=torch.float16), on_two(use, TABLES_OF_SUMS)
    assert halved == pytest.approx(whole, rel=1e-3) and min(whole) > 0


def test_what_is_sent_is_counted(hosts: str) -> None:
    def use(module: ShardedEmbeddingBag) -> dict[str, float]:
        module(torch.zeros(100, 2, dtype=torch.int64)).sum().backward()
        return module.metrics()

    metrics = on_two(use)
    assert all(each["lookups"] == each["updates"] == 1 for each in metrics)
    if hosts == "one host":  # three words of a head, the ids; vectors and gradients of 100 samples
        assert metrics[0]["id_bytes"] == metrics[1]["id_bytes"] == 4 * (3 + 100)
        assert metrics[0]["vector_bytes"] == metrics[1]["gradient_bytes"] == 1600
        assert metrics[1]["vector_bytes"] == metrics[0]["gradient_bytes"] == 800
        return
    # 100 times the same id travels once: three words of a head, the id; one row, one gradient.
    assert metrics[0]["id_bytes"] == metrics[1]["id_bytes"] == 16
    assert metrics[0]["vector_bytes"] == 16 and metrics[1]["vector_bytes"] == 8  # dims 4 and 2 of the owner's table
    assert metrics[0]["gradient_bytes"] == 8 and metrics[1]["gradient_bytes"] == 16
