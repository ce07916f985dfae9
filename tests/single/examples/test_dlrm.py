"""The model: values of the interaction, the unknown row, and that it learns."""

from __future__ import annotations

import torch
from dlrm import DLRM
from torch.nn.functional import binary_cross_entropy_with_logits


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
    torch.manual_seed(0)
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
