"""torchrec's DistributedModelParallel: tables sharded over the ranks by its planner, the dense part in DDP, over Gloo.

As in its documentation: a collective plan, FBGEMM's fused row-wise Adagrad for the rows, Adagrad for the dense part.
Its input pipelines are for GPUs; on the CPU they brought nothing (see benchmarks/peers/torchrec_bags.py).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from contender import Asked, Contender
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import KernelConfig, ParameterConstraints, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ModuleSharder, ShardingEnv
from workloads import DLRM_LR, EMBEDDING_DIM, criteo_table_sizes

DDR_BYTES = 64 << 30  # what the planner may think a rank has: the machine's memory is not what this measures


class Bags(nn.Module):
    """A collection of tables that takes one id a table, [batch, tables], and gives [batch, tables * dim]."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self._features = [f"feature{index}" for index in range(len(sizes))]
        self.collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"table{index}",
                    embedding_dim=EMBEDDING_DIM,
                    num_embeddings=rows,
                    feature_names=[self._features[index]],
                    weight_init_min=-0.01,
                    weight_init_max=0.01,
                )
                for index, rows in enumerate(sizes)
            ],
            device=torch.device("meta"),
        )

    def forward(self, ids: Tensor) -> Tensor:
        values = ids.t().flatten()
        lengths = torch.ones(values.numel(), dtype=torch.int32)
        keyed = KeyedJaggedTensor(keys=self._features, values=values, lengths=lengths)
        pooled: Tensor = self.collection(keyed).values()
        return pooled


def tables() -> nn.Module:
    """Return the tables, not yet sharded."""
    return Bags(criteo_table_sizes())


def make(asked: Asked) -> Contender:
    """Return the sharded model, and an optimizer of what is not sharded."""
    dist.init_process_group("gloo")
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": DLRM_LR, "eps": 1e-10}
    )
    sharders = [cast(ModuleSharder[nn.Module], sharder)]
    constraint = ParameterConstraints(compute_kernels=[EmbeddingComputeKernel.FUSED.value], pooling_factors=[1.0])
    trainers = TrainerConfig(world_size=asked.place.size, local_world_size=1, ddr_cap_bytes=DDR_BYTES)
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(trainers, kernel_config=KernelConfig(compute_device="cpu")),
        batch_size=asked.batch,
        constraints={f"table{index}": constraint for index in range(len(criteo_table_sizes()))},
    )
    group = dist.group.WORLD
    assert group is not None
    model = DistributedModelParallel(
        asked.task.model,
        env=ShardingEnv.from_process_group(group),
        device=torch.device("cpu"),
        plan=planner.collective_plan(asked.task.model, sharders, group),
        sharders=sharders,
    )
    dense = [param for name, param in model.named_parameters() if ".collection." not in name]
    optimizer = torch.optim.Adagrad(dense, lr=asked.task.lr)
    return Contender(model, optimizer, period_steps=1, sync_gap_steps=1.0, close=dist.destroy_process_group)
