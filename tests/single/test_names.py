"""Names of parameters, buffers and optimizer state, and what cannot be named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from ranks_as_threads import batch, loss_of, make_model, sgd
from torch import Tensor

from hvd_shadowsync.names import checked_names, name_state, name_tensors
from hvd_shadowsync.replica import NamedTensor


def names(tensors: Iterable[NamedTensor]) -> list[str]:
    return [each.name for each in tensors]


# --- parameters and buffers -------------------------------------------------------------------------------------------


def test_the_model_names_its_parameters_and_buffers() -> None:
    model = make_model()
    params, buffers = name_tensors(sgd(model), model, None)
    assert {each.name: each.tensor for each in params}.keys() == dict(model.named_parameters()).keys()
    assert all(each.tensor is model.get_parameter(each.name) for each in params)
    assert names(buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert buffers[0].tensor is model[1].running_mean


def test_parameters_come_in_the_optimizers_order() -> None:
    model = make_model(batch_norm=False)
    optimizer = torch.optim.SGD([{"params": model[2].parameters()}, {"params": [model[0].bias]}], lr=0.1)
    params, _ = name_tensors(optimizer, model, None)
    assert names(params) == ["2.weight", "2.bias", "0.bias"]


def test_without_a_model_the_place_in_the_optimizer_is_the_name() -> None:
    model = make_model(batch_norm=False)
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    params, buffers = name_tensors(optimizer, None, None)
    assert names(params) == ["group0.0", "group0.1", "group1.0", "group1.1"]
    assert buffers == []


def test_parameters_that_the_model_lacks() -> None:
    model, extra = make_model(batch_norm=False), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    assert names(name_tensors(optimizer, model, None)[0])[-1] == "group0.4"


def test_named_parameters_name_them_as_well() -> None:
    model = make_model(batch_norm=False)
    given = {f"net.{name}": param for name, param in model.named_parameters()}
    assert names(name_tensors(sgd(model), None, given)[0]) == list(given)


def test_the_models_names_go_before_named_parameters() -> None:
    model = make_model(batch_norm=False)
    given = {f"net.{name}": param for name, param in model.named_parameters()}
    assert names(name_tensors(sgd(model), model, given)[0]) == list(dict(model.named_parameters()))


def test_shared_parameters_are_there_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    params, _ = name_tensors(sgd(model), model, None)
    assert names(params) == ["0.weight", "0.bias", "1.bias"]


def test_buffers_that_are_not_saved_are_synchronised_too() -> None:
    model = make_model(batch_norm=False)
    model.register_buffer("scale", torch.ones(2), persistent=False)
    assert names(name_tensors(sgd(model), model, None)[1]) == ["scale"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(2, device="meta"), "0.weight is on the meta device; only dense tensors with values"),
        (torch.eye(2).to_sparse(), "0.weight is of layout torch.sparse_coo; only dense tensors with values"),
    ],
)
def test_tensors_without_dense_values_are_refused(tensor: Tensor, message: str) -> None:
    param = torch.nn.Parameter(tensor)
    with pytest.raises(TypeError, match=re.escape(message)):
        name_tensors(torch.optim.SGD([param], lr=0.1), None, {"0.weight": param})


# --- named_parameters -------------------------------------------------------------------------------------------------


def test_pairs_become_a_dict() -> None:
    model = make_model()
    assert checked_names(model.named_parameters(), sgd(model)) == dict(model.named_parameters())


def test_more_names_than_parameters_are_fine() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    assert len(checked_names(model.named_parameters(), optimizer)) == len(list(model.parameters()))


def test_a_name_twice_is_refused() -> None:
    model = make_model()
    pairs = [*model.named_parameters(), ("0.weight", torch.ones(1))]
    with pytest.raises(ValueError, match=r"named_parameters has the name '0\.weight' twice; names have to be unique"):
        checked_names(pairs, sgd(model))


def test_parameters_without_a_name_are_refused() -> None:
    model = make_model(batch_norm=False)
    pairs = [pair for pair in model.named_parameters() if pair[0].endswith("bias")]
    with pytest.raises(
        ValueError, match=r"lacks 2 of the optimizer's 4 parameters \(the first has shape \(5, 3\)\); pass"
    ):
        checked_names(pairs, sgd(model))


@pytest.mark.parametrize(
    ("pairs", "kind"),
    [
        ([torch.ones(1)], "Tensor"),
        (["weight"], "str"),
        ([("a", 1)], "tuple"),
        ([(torch.ones(1), "a")], "tuple"),
        ([()], "tuple"),
    ],
)
def test_what_is_no_pair_is_refused(pairs: list[Any], kind: str) -> None:
    message = rf"named_parameters has {kind} where a pair \(name, tensor\) is wanted; pass model.named_parameters\(\)"
    with pytest.raises(TypeError, match=message):
        checked_names(pairs, sgd(make_model()))


# --- optimizer state --------------------------------------------------------------------------------------------------


def state_of(make: Any, **options: Any) -> tuple[torch.optim.Optimizer, list[NamedTensor]]:
    model = make_model(batch_norm=False)
    optimizer = make(model.parameters(), **options)
    loss_of(model, batch(0, 0)).backward()
    optimizer.step()
    return optimizer, name_state(optimizer, name_tensors(optimizer, model, None)[0])


def test_state_is_named_after_parameters_and_sorted() -> None:
    optimizer, state = state_of(torch.optim.SGD, lr=0.1, momentum=0.9)
    found = ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert names(state) == [f"{name}.momentum_buffer" for name in found]
    assert {id(each.tensor) for each in state} == {id(each["momentum_buffer"]) for each in optimizer.state.values()}


def test_state_of_adam() -> None:
    _, state = state_of(torch.optim.Adam)
    assert names(state)[:3] == ["0.bias.exp_avg", "0.bias.exp_avg_sq", "0.bias.step"]
    assert len(state) == 12


def test_without_a_step_there_is_no_state() -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    assert name_state(optimizer, name_tensors(optimizer, model, None)[0]) == []


def test_state_that_is_no_dense_floating_point_tensor_is_left_out() -> None:
    model = make_model(batch_norm=False)
    optimizer = sgd(model)
    optimizer.state[model[0].bias] = {
        "count": torch.tensor(3),
        "name": "x",
        "none": None,
        "sparse": torch.eye(2).to_sparse(),
        "kept": torch.ones(5),
    }
    assert names(name_state(optimizer, name_tensors(optimizer, model, None)[0])) == ["0.bias.kept"]
