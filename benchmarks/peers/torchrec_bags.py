"""TorchRec's sharded embedding bags on the CPU: forward, backward with a given gradient, and the fused update.

    launch/peers
    .venv-peers/bin/python benchmarks/peers/torchrec_bags.py --ids 20         # starts its two ranks itself
    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 .venv-peers/bin/python benchmarks/peers/torchrec_bags.py

26 tables of 32 floats, sum pooling, exact row-wise Adagrad fused into FBGEMM's backward pass; the planner places the
tables as `--sharding` says, the ranks exchange over Gloo. Batches are KeyedJaggedTensors made before the clock starts.

Freed memory is kept for the next step, as under jemalloc or tcmalloc, which PyTorch's tuning guide advises for the CPU:
glibc gives every large block back to the system and takes it anew, page by page, in each step. `--plain-malloc` leaves
it at that. What else was tried and brought nothing: starting the input exchange of the next batch before this one's
look-up, as TorchRec's TrainPipelineSparseDist does, and half precision on the wire.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from typing import cast

import torch
import torch.distributed as dist
from fbgemm_alone import DIM, EPS, GRADIENT, LR, join, measure, parse, start_ranks
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from synthetic import Synthetic
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, ParameterConstraints, TopologyFactory, TrainerConfig
from torchrec.distributed.types import ModuleSharder, ShardingEnv

DDR_BYTES = 64 << 30  # what the planner may think a rank has: the machine's memory is not what this measures
SHARDINGS = ("table_wise", "column_wise", "planner")  # TorchRec offers no row_wise on the CPU; planner: its own choice


def main() -> None:
    arguments = parse(__doc__, *SHARDINGS)
    if "RANK" not in os.environ:
        sys.exit(start_ranks(arguments.processes))
    join(arguments)
    device = torch.device("cpu")
    data = Synthetic(arguments.rows, arguments.ids)
    names = [f"feature_{table}" for table in range(len(data.table_sizes))]
    collection = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"table_{name}", embedding_dim=DIM, num_embeddings=size, feature_names=[name])
            for name, size in zip(names, data.table_sizes, strict=True)
        ],
        device=torch.device("meta"),
    )
    fused = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": LR,
        "eps": EPS,
        "bounds_check_mode": BoundsCheckMode.NONE if arguments.no_bounds_check else BoundsCheckMode.WARNING,
    }
    model = shard(collection, fused, arguments, device)
    kernels = fused_kernels(model)
    if not kernels or any(kernel.optimizer != EmbOptimType.EXACT_ROWWISE_ADAGRAD for kernel in kernels):
        sys.exit("torchrec_bags.py: FBGEMM's fused kernel is not in use")  # all ranks have tables

    rank, size = dist.get_rank(), dist.get_world_size()
    lengths = torch.full((len(names) * arguments.batch_size,), arguments.ids)
    ring = []
    for step in range(arguments.ring):
        bags = data.bags(arguments.batch_size, step, rank=rank, size=size)
        values = bags.transpose(0, 1).flatten()
        ring.append(KeyedJaggedTensor.from_lengths_sync(keys=names, values=values, lengths=lengths))
    gradient = torch.full((arguments.batch_size, len(names) * DIM), GRADIENT)

    def step(index: int) -> None:
        # TorchRec keeps what it learns of a batch's lengths in the batch; a shallow copy is as new as a loader's.
        model(copy.copy(ring[index])).values().backward(gradient)

    measure(f"torchrec {arguments.sharding}", arguments, step)
    dist.destroy_process_group()


def shard(
    collection: EmbeddingBagCollection, fused: dict[str, object], arguments: argparse.Namespace, device: torch.device
) -> DistributedModelParallel:
    """Shard by a plan that the planner makes and all ranks agree on."""
    size = dist.get_world_size()
    constraint = ParameterConstraints(
        compute_kernels=[EmbeddingComputeKernel.FUSED.value], pooling_factors=[float(arguments.ids)]
    )
    if arguments.sharding != "planner":
        constraint.sharding_types = [arguments.sharding]
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            TrainerConfig(world_size=size, local_world_size=size, ddr_cap_bytes=DDR_BYTES),
            kernel_config=KernelConfig(compute_device="cpu"),
        ),
        batch_size=arguments.batch_size,
        storage_reservation=FixedPercentageStorageReservation(0.1),
        constraints={config.name: constraint for config in collection.embedding_bag_configs()},
    )
    sharders = [cast(ModuleSharder[nn.Module], EmbeddingBagCollectionSharder(fused_params=fused))]
    group = dist.group.WORLD
    assert group is not None
    plan = planner.collective_plan(collection, sharders, group)
    return DistributedModelParallel(
        collection, env=ShardingEnv.from_process_group(group), device=device, plan=plan, sharders=sharders
    )


def fused_kernels(model: DistributedModelParallel) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's modules of this rank, which are no registered children of the sharded collection."""
    found = (module for lookup in model.module._lookups for module in lookup.modules())
    return [module for module in found if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)]


if __name__ == "__main__":
    main()
