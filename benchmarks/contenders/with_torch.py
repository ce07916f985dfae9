"""PyTorch's own, over Gloo: DistributedDataParallel, and post-local SGD with a PeriodicModelAverager.

DDP reduces buckets of 25 MB while backward() goes on; gradients are views of the buckets, which its documentation
recommends, and the graph is static, for which it promises more overlap.

Post-local SGD as in the example of PostLocalSGDOptimizer: a communication hook that reduces within a subgroup, and an
averager of the parameters every k steps. There the subgroup is a host's ranks; here it is this rank alone, on one host
too, so that nothing but the averager communicates. The steps with averaged gradients at the beginning, which the
example has 100 of, are left out: they would be DDP.
"""

from __future__ import annotations

import torch.distributed as dist
from contender import Asked, Contender
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel


def make(asked: Asked) -> Contender:
    """Return the model in DDP; its gradients, or its parameters every `asked.every` steps, are averaged."""
    dist.init_process_group("gloo")
    if asked.variant == "ddp":
        model = DistributedDataParallel(asked.task.model, gradient_as_bucket_view=True, static_graph=True)
        optimizer = asked.task.optimizer()
        return Contender(model, optimizer, period_steps=1, sync_gap_steps=1.0, close=dist.destroy_process_group)
    alone, _ = dist.new_subgroups(group_size=1)
    model = DistributedDataParallel(asked.task.model, gradient_as_bucket_view=True)
    model.register_comm_hook(PostLocalSGDState(None, alone, start_localSGD_iter=0), post_localSGD_hook)
    averager = PeriodicModelAverager(period=asked.every, warmup_steps=0)
    optimizer = PostLocalSGDOptimizer(asked.task.optimizer(), averager)
    every = asked.every
    return Contender(
        model, optimizer, period_steps=every, sync_gap_steps=float(every), close=dist.destroy_process_group
    )
