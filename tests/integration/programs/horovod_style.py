"""Scripts as Horovod's users have them, with the drop-in module in place; the case is named on the command line."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import ranks
import torch
from parallel.programs.problem import Data, content, identical_everywhere, loss_of, make_model, same, train


class Steps:
    """Counts the calls of `step()`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.taken = 0
        optimizer.register_step_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.taken += 1


def script(order: str) -> None:
    """The whole of a training script; `order` says who initialises MPI."""
    if order == "horovod":
        import horovod.torch

        horovod.torch.init()
    elif order == "mpi4py":
        from mpi4py import MPI

        assert MPI.COMM_WORLD.size == ranks.SIZE
    import hvd_shadowsync.torch as hvd

    hvd.init()
    assert (hvd.rank(), hvd.size()) == (ranks.RANK, ranks.SIZE)
    model = make_model(hvd.rank())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    if hvd.rank() == 0:
        train(model, optimizer, Data(0), 3)  # as after a restart: rank 0 has read a checkpoint
    steps = Steps(optimizer)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    begun, held_out = content(model), Data(99).batch(512)
    at_first = loss_of(model.eval(), held_out).item()
    model.train()
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), model=model)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert steps.taken == 0
    moments = [float(optimizer.state[param]["exp_avg"].abs().sum()) for param in model.parameters()]
    everyone = hvd.allgather_object((moments, begun))
    assert min(moments) > 0
    assert all(each[0] == moments and same(each[1], begun) for each in everyone)

    train(model, optimizer, Data(hvd.rank()), 150)
    assert steps.taken == 150
    while hvd.size() > 1 and optimizer.shadow.metrics()["rounds"] < 1:  # at the default pace
        train(model, optimizer, Data(hvd.rank()), 1)
    optimizer.shadow.synchronize()
    assert identical_everywhere(optimizer.shadow, model)
    metric = hvd.allreduce(torch.tensor(float(hvd.rank())), name="metric")
    assert float(metric) == (hvd.size() - 1) / 2
    loss = hvd.allreduce(loss_of(model.eval(), held_out).detach(), name="loss")
    assert float(loss) < 0.7 * at_first, (float(loss), at_first)
    optimizer.shadow.close()
    hvd.shutdown()
    ranks.say("through", order, str(math.fsum(float(value.sum()) for value in content(model).values())))


def offers(_: str) -> None:
    """One job that uses what Horovod offers, one after the other."""
    import hvd_shadowsync.torch as hvd

    pair = hvd.ProcessSet([0, 1])
    hvd.init(process_sets=[pair])
    compression(hvd)
    process_set(hvd, pair)
    clipping(hvd)
    shutdown(hvd)


def compression(hvd: Any) -> None:
    """Half precision on the wire: half the bytes of the same rounds, and identical replicas."""
    sent = {}
    for kind in (hvd.Compression.none, hvd.Compression.fp16):
        model = torch.nn.Linear(400, 100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer = hvd.DistributedOptimizer(
            optimizer, model.named_parameters(), compression=kind, sync_every=2, foreground=True
        )
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(8, 400)).square().mean().backward()
            optimizer.step()
        sent[kind] = optimizer.shadow.metrics()["bytes_sent"]
        assert optimizer.shadow.metrics()["rounds"] == 5
        optimizer.shadow.synchronize()
        assert identical_everywhere(optimizer.shadow, model)
        optimizer.shadow.close()
    assert 0.45 < sent[hvd.Compression.fp16] / sent[hvd.Compression.none] < 0.55
    ranks.say("through", "compression")


def process_set(hvd: Any, pair: Any) -> None:
    """The first two ranks keep together, the others train apart."""
    model = make_model(hvd.rank(), batch_norm=False)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05)
    if pair.included():
        optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), process_set=pair)
        assert optimizer.shadow.size == 2
    train(model, optimizer, Data(hvd.rank()), 40)
    if pair.included():
        optimizer.shadow.synchronize()
    found = hvd.allgather_object(content(model))
    assert same(found[0], found[1])
    assert not any(same(found[0], each) for each in found[2:])
    if pair.included():
        optimizer.shadow.close()
    ranks.say("through", "process_set")


def clipping(hvd: Any) -> None:
    """Horovod's recipe, in the warm-up, where it averages, and after it, where nothing waits."""
    model = make_model(hvd.rank(), batch_norm=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), warmup_steps=5, sync_every=2)
    data = Data(hvd.rank())
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model, data.batch()).backward()
        own = [param.grad.clone() for param in model.parameters()]
        optimizer.synchronize()
        averaged = not all(torch.equal(param.grad, mine) for param, mine in zip(model.parameters(), own, strict=True))
        assert averaged == (step < 5)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        before = [param.detach().clone() for param in model.parameters()]
        with optimizer.skip_synchronize():
            optimizer.step()
        if step < 5:
            pairs = zip(model.parameters(), before, strict=True)
            moved = torch.stack([(now.detach() - then).square().sum() for now, then in pairs]).sum().sqrt()
            assert float(moved) <= 0.05 * 0.1 * 1.001
    optimizer.shadow.synchronize()
    assert identical_everywhere(optimizer.shadow, model)
    optimizer.shadow.close()
    ranks.say("through", "clipping")


def shutdown(hvd: Any) -> None:
    """Handles that nobody closed, several of them, are closed before Horovod is gone."""
    models = [make_model(index) for index in range(5)]
    optimizers = [hvd.DistributedOptimizer(torch.optim.SGD(each.parameters(), lr=0.05)) for each in models]
    for _ in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, Data(hvd.rank()), 1)
    hvd.shutdown()
    assert not any(hasattr(optimizer, "shadow") for optimizer in optimizers)
    ranks.say("through", "shutdown")


def hasty(_: str) -> None:
    """Rank 0 has Horovod finalise the MPI that it initialised while the others make the last calls of `close()`."""
    import horovod.torch

    horovod.torch.init()
    import hvd_shadowsync.torch as hvd
    from hvd_shadowsync.comm.mpi import MpiCommunicator

    model = make_model(hvd.rank())
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), sync_every=1)
    train(model, optimizer, Data(hvd.rank()), 5)
    free = MpiCommunicator.free
    MpiCommunicator.free = lambda self: (time.sleep(0.7 * hvd.rank()), free(self))[1]
    optimizer.shadow.close()
    hvd.shutdown()
    ranks.say("through", "hasty")


def forgotten(_: str) -> None:
    """Tables and a handle that nobody closes; Horovod finalises MPI at exit."""
    import hvd_shadowsync.torch as hvd
    from hvd_shadowsync.embedding import SGD, EmbeddingTable, ShardedEmbeddingBag

    hvd.init()
    for _ in range(2):
        tables = ShardedEmbeddingBag([EmbeddingTable("a", 10, 4)], optimizer=SGD(0.1))
        tables({"a": torch.arange(10)}).sum().backward()
    handle = hvd.DistributedOptimizer(torch.optim.SGD(make_model(hvd.rank()).parameters(), lr=0.1))
    handle.step()
    ranks.say("through", "forgotten")


def gloo(_: str) -> None:
    """Started over Gloo, where there is no MPI job."""
    import hvd_shadowsync.torch as hvd
    from hvd_shadowsync import TransportError

    hvd.init()
    model = make_model(hvd.rank())
    try:
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    except TransportError as error:
        ranks.say("refused", f"of {hvd.size()}", str(error))
        raise


if __name__ == "__main__":
    ranks.begin()
    case, _, detail = sys.argv[1].partition(":")
    globals()[case](detail)
