"""Large embedding tables in one whole script: train with lookups ahead, evaluate, save; with --resume it goes on.

    shadowrun -np 2 python examples/large_tables.py --save clicks.pt
    shadowrun -np 4 python examples/large_tables.py --save clicks.pt --resume     # with any number of ranks

The clicks are made up: a user clicks on an ad where the sum of their hidden values is positive.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import hvd_shadowsync.torch as hvd
from hvd_shadowsync import checkpoint
from hvd_shadowsync.embedding import EmbeddingTable, RowWiseAdagrad, ShardedEmbeddingBag

USERS, ADS, DIM = 20_000, 300, 16

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300, help="of each rank")
parser.add_argument("--batch-size", type=int, default=256, help="samples per rank and step")
parser.add_argument("--prefetch", type=int, default=1, help="batches looked up ahead")
parser.add_argument("--save", metavar="FILE", help="where the checkpoint goes, on a file system that all ranks see")
parser.add_argument("--resume", action="store_true", help="begin with the checkpoint of --save")
arguments = parser.parse_args()


class Clicks(Dataset[tuple[dict[str, torch.Tensor], torch.Tensor]]):
    """Batches of the ids of a user, of ten ads seen before, and of an ad; and whether it was clicked."""

    def __init__(self, stream: int, batches: int) -> None:
        self.stream, self.batches = stream, batches
        self.hidden = [torch.randn(rows, generator=torch.Generator().manual_seed(rows)) for rows in (USERS, ADS)]

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        generator = torch.Generator().manual_seed(batch * 1000 + self.stream)
        users = (USERS * torch.rand(arguments.batch_size, generator=generator) ** 4).long()  # a few are here often
        seen = torch.randint(ADS, (arguments.batch_size, 10), generator=generator)
        ads = torch.randint(ADS, (arguments.batch_size,), generator=generator)
        clicked = self.hidden[0][users] + self.hidden[1][ads] > 0
        return {"user": users, "seen": seen, "ad": ads}, clicked.float()


class Model(nn.Module):
    """Embeddings and an MLP: `user` and `ad` add rows up as they are, `seen` means over the same rows as `ad`."""

    def __init__(self) -> None:
        super().__init__()
        tables = [EmbeddingTable("user", USERS, DIM), EmbeddingTable("ads", ADS, DIM, "mean", features=["seen", "ad"])]
        self.tables = ShardedEmbeddingBag(tables, optimizer=RowWiseAdagrad(lr=0.1))
        self.top = nn.Sequential(nn.Linear(3 * DIM, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        scores: torch.Tensor = self.top(self.tables(ids)).squeeze(1)
        return scores


hvd.init()
model = Model()
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), model=model)
begun = 0
if arguments.resume:
    begun = checkpoint.load(arguments.save, model, optimizer.shadow)["steps"]

train = DataLoader(Clicks(1 + hvd.rank() + 100 * (begun > 0), arguments.steps), batch_size=None)
for ids, clicked in model.tables.prefetch(train, inputs=lambda batch: batch[0], depth=arguments.prefetch):
    optimizer.zero_grad()
    loss = nn.functional.binary_cross_entropy_with_logits(model(ids), clicked)
    loss.backward()
    optimizer.step()

optimizer.shadow.synchronize()  # the MLP is the same on all ranks now; rows are always
with torch.no_grad():  # all ranks together: a lookup is a collective call
    unseen = DataLoader(Clicks(999 + hvd.rank(), 20), batch_size=None)
    right = [((model(ids) > 0) == (clicked > 0)).float().mean() for ids, clicked in unseen]
accuracy = float(hvd.allreduce(torch.stack(right).mean(), name="accuracy"))
if hvd.rank() == 0:
    print(f"after {begun + arguments.steps} steps on {hvd.size()} ranks: {accuracy:.3f} of unseen clicks predicted")
if arguments.save:
    checkpoint.save(arguments.save, model, optimizer.shadow, extra={"steps": begun + arguments.steps})
model.tables.close()
optimizer.shadow.close()
