"""The model: values of the interaction, the unknown row, that it learns, and that its two kinds of tables are alike."""

from __future__ import annotations

import pytest
import torch
from dlrm import DLRM, sharded_tables
from ranks_as_threads import on_ranks
from torch.nn.functional import binary_cross_entropy_with_logits

from hvd_shadowsync.comm.base import Communicator

SIZES = [5, 7, 40]
PLACEMENTS = ["auto", "table-wise", "row-wise", "row-wise hashed", "column-wise"]


def test_interaction_is_the_dot_of_every_pair_once() -> None:
    torch.manual_seed(0)
    model = DLRM(3, [5, 7], embedding_dim=4)
    dense, ids = torch.randn(6, 3), torch.tensor([[i % 5, i % 7] for i in range(6)])
    seen: list[torch.Tensor] = []
    model.top.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = model(dense, ids)
    bottom = model.bottom(dense)
    first, second = model.embedding.weight[ids[:, 0]], model.embedding.weight[5 + ids[:, 1]]
    dots = [(first * bottom).sum(1), (second * bottom).sum(1), (second * first).sum(1)]
    assert logits.shape == (6,)
    torch.testing.assert_close(seen[0], torch.cat([bottom, torch.stack(dots, 1)], dim=1))


def test_unknown_values_start_at_zero_and_others_do_not() -> None:
    model = DLRM(2, [5, 7])
    assert not model.embedding.weight[[0, 5]].any()
    assert model.embedding.weight[[1, 4, 6, 11]].abs().sum(1).gt(0).all()


def test_every_parameter_is_trained_and_the_loss_falls() -> None:
    torch.manual_seed(1)  # from some starts this problem takes much longer
    model = DLRM(2, [9, 9], embedding_dim=4)
    before = {name: value.clone() for name, value in model.named_parameters()}
    dense, ids = torch.randn(512, 2), torch.randint(0, 9, (512, 2))
    labels = ((ids[:, 0] > ids[:, 1]) ^ (dense[:, 0] > 0)).float()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(dense, ids), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())


def problem(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense features, ids and labels."""
    torch.manual_seed(1)
    ids = torch.stack([torch.randint(0, size, (rows,)) for size in SIZES], dim=1)
    return torch.randn(rows, 3), ids, torch.randint(0, 2, (rows,)).float()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_sharded_tables_begin_as_the_matrix_does(placement: str) -> None:
    dense, ids, _ = problem(64)
    torch.manual_seed(0)
    expected = DLRM(3, SIZES, embedding_dim=4)(dense, ids)

    def program(comm: Communicator) -> torch.Tensor:
        torch.manual_seed(0)
        embedding = sharded_tables(SIZES, 4, lr=0.1, placement=placement, communicator=comm)
        return DLRM(3, SIZES, embedding_dim=4, embedding=embedding)(dense, ids)

    (logits,) = on_ranks(1, program)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_sharded_tables_learn_as_the_matrix_does_with_the_whole_batch(placement: str) -> None:
    dense, ids, labels = problem(64)
    model = DLRM(3, SIZES, embedding_dim=4)
    weight = model.embedding.weight
    start = {f"table{i}": part.detach().clone() for i, part in enumerate(weight.split(SIZES))}
    others = {name: value for name, value in model.state_dict().items() if "embedding" not in name}

    def program(comm: Communicator) -> torch.Tensor:
        embedding = sharded_tables(SIZES, 4, lr=0.1, placement=placement, communicator=comm)
        embedding.load_global_state_dict(start)
        model = DLRM(3, SIZES, embedding_dim=4, embedding=embedding)
        model.load_state_dict(others, strict=False)
        mine = slice(comm.rank, None, comm.size)
        for batch in embedding.prefetch([ids[mine]] * 3, depth=0):
            binary_cross_entropy_with_logits(model(dense[mine], batch), labels[mine]).backward()
        with torch.no_grad():
            logits = model(dense, ids)
        embedding.close()
        return logits

    optimizer = torch.optim.Adagrad([weight], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(dense, ids), labels).backward()
        optimizer.step()
    for logits in on_ranks(2, program):
        torch.testing.assert_close(logits, model(dense, ids).detach(), rtol=1e-4, atol=1e-5)
