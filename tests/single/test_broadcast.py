"""Starting alike: parameters and optimizer state from one rank to all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks_as_threads import batch, content, loss_of, make_model, on_ranks, same, sgd

from hvd_shadowsync import ReplicaMismatchError, broadcast_optimizer_state, broadcast_parameters
from hvd_shadowsync.comm.base import Communicator

ADAM = {"lr": 0.01, "betas": (0.8, 0.9)}


def told(comm: Communicator, call: Any, error: type[Exception] = ReplicaMismatchError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [0, 2])
@pytest.mark.parametrize("kind", ["state_dict", "named_parameters"])
def test_every_rank_gets_the_roots_values_in_place(root: int, kind: str) -> None:
    def program(comm: Communicator) -> tuple[dict[str, torch.Tensor], list[bool]]:
        model = make_model(seed=comm.rank)
        model[1].running_mean.fill_(comm.rank)
        places = [param.data_ptr() for param in model.parameters()]
        broadcast_parameters(getattr(model, kind)(), root, communicator=comm)
        return content(model), [
            param.data_ptr() == place for param, place in zip(model.parameters(), places, strict=True)
        ]

    wanted = content(make_model(seed=root))
    for rank, (found, in_place) in enumerate(on_ranks(3, program)):
        mean = root if kind == "state_dict" else rank
        wanted["1.running_mean"].fill_(mean)
        assert same(found, wanted)
        assert all(in_place)


def test_tensors_of_all_kinds() -> None:
    def tensors(rank: int) -> dict[str, Any]:
        return {
            "transposed": torch.full((2, 3), 1.0 + rank).t(),
            "half": torch.full((3,), 1.0 + rank, dtype=torch.bfloat16),
            "complex": torch.full((3,), complex(rank, 1)),
            "counter": torch.tensor(rank + 5),
            "mask": torch.tensor([rank == 0]),
            "empty": torch.empty(0),
            "gradient": torch.full((2,), float(rank), requires_grad=True),
        }

    def program(comm: Communicator) -> dict[str, Any]:
        found = tensors(comm.rank) | {"epoch": comm.rank}
        broadcast_parameters(found, 0, communicator=comm)
        assert found.pop("epoch") == comm.rank, "what is no tensor is passed over"
        return found

    for found in on_ranks(2, program):
        assert same(found, tensors(0))
        assert found["gradient"].requires_grad


def test_other_names_and_shapes_are_refused_on_every_rank() -> None:
    def program(comm: Communicator) -> list[str]:
        named = [("a", torch.ones(2)), ("b" if comm.rank < 2 else "c", torch.ones(3))]
        longer = [("a", torch.ones(2))] * (1 + comm.rank // 2)
        return [
            told(comm, lambda given=given: broadcast_parameters(given, communicator=comm)) for given in (named, longer)
        ]

    first, _, third = on_ranks(3, program)
    assert first[0].startswith("parameters of rank 2 (2) and rank 0 (2) differ: ('b', (3,), torch.float32) here")
    assert third[0].startswith("parameters of rank 0 (2) and rank 2 (2) differ: ('c', (3,), torch.float32) here")
    assert first[0].endswith("build the same model on every rank")
    assert first[1].startswith("parameters of rank 2 (2) and rank 0 (1) differ; ")


@pytest.mark.parametrize("root", [-1, 2, "0", None, 0.0])
def test_a_root_that_is_no_rank_is_refused(root: Any) -> None:
    def program(comm: Communicator) -> list[str]:
        model = make_model()
        calls = [
            lambda: broadcast_parameters(model.state_dict(), root, communicator=comm),
            lambda: broadcast_optimizer_state(sgd(model), root, communicator=comm),
        ]
        return [told(comm, call, ValueError) for call in calls]

    message = f"root_rank={root!r} is not a rank; give one of 0 to 1"
    assert on_ranks(2, program) == [[message, message]] * 2


# --- optimizer state --------------------------------------------------------------------------------------------------


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, stream: int) -> None:
    optimizer.zero_grad()
    loss_of(model, batch(stream, 0)).backward()
    optimizer.step()


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("root", [0, 1])
def test_every_rank_gets_the_roots_state_and_settings(root: int) -> None:
    """Also where the other ranks have no state yet, and no rank takes a step for it."""

    def program(comm: Communicator) -> tuple[Any, dict[str, torch.Tensor]]:
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), **ADAM)
        optimizer.param_groups[0]["lr"] = 0.5 + comm.rank
        if comm.rank == root:
            step(model, optimizer, 0)
        before = content(model)
        broadcast_optimizer_state(optimizer, root, communicator=comm)
        assert same(content(model), before)
        return plain(optimizer.state_dict()), optimizer.state_dict()

    results = on_ranks(3, program)
    for state, _ in results:
        assert state == results[root][0]
        assert state["param_groups"][0]["lr"] == 0.5 + root
        assert state["param_groups"][0]["betas"] == [0.8, 0.9]
        assert len(state["state"]) == 6
        assert state["state"][0]["step"] == 1.0


def test_training_goes_on_alike() -> None:
    def program(comm: Communicator) -> dict[str, torch.Tensor]:
        model = make_model(seed=comm.rank)
        optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
        for _ in range(1 + comm.rank):
            step(model, optimizer, comm.rank)
        broadcast_parameters(model.state_dict(), communicator=comm)
        broadcast_optimizer_state(optimizer, communicator=comm)
        step(model, optimizer, 0)
        return content(model)

    first, second = on_ranks(2, program)
    assert same(first, second)


def test_state_is_not_shared_between_ranks() -> None:
    def program(comm: Communicator) -> float:
        model = make_model()
        optimizer = sgd(model, momentum=0.9)
        step(model, optimizer, 0)
        broadcast_optimizer_state(optimizer, communicator=comm)
        buffer = optimizer.state[model[0].weight]["momentum_buffer"]
        buffer.fill_(float(comm.rank))
        comm.allgather_object(None)
        return float(buffer.mean())

    assert on_ranks(2, program) == [0.0, 1.0]


def test_other_groups_are_refused_on_every_rank() -> None:
    def program(comm: Communicator) -> str:
        model = make_model(batch_norm=False)
        optimizer = sgd(model) if comm.rank == 0 else torch.optim.SGD(model[0].parameters(), lr=0.1)
        return told(comm, lambda: broadcast_optimizer_state(optimizer, communicator=comm))

    message = "parameters per group differ between ranks: [[4], [2]]; build the same optimizer"
    assert on_ranks(2, program) == [message] * 2


def test_what_is_no_optimizer_is_refused() -> None:
    def program(comm: Communicator) -> str:
        return told(comm, lambda: broadcast_optimizer_state(make_model(), communicator=comm), TypeError)  # type: ignore[arg-type]

    assert on_ranks(1, program) == ["optimizer is a Sequential; pass a torch.optim.Optimizer"]
