"""Replicas on GPUs: copies, merges that wait for nothing, rounds of every algorithm; skipped where there is no GPU.

The ranks are threads that share one GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from embeddings import eighths
from ranks_as_threads import batch as host_batch
from ranks_as_threads import content, identical_everywhere, loss_of, make_model, on_ranks, same, sgd
from torch import Tensor

from hvd_shadowsync import (
    BMUF,
    ElasticAveraging,
    ModelAveraging,
    ShadowSync,
    broadcast_optimizer_state,
    broadcast_parameters,
    checkpoint,
)
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.ballot import Verdict
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.embedding import SGD, EmbeddingTable, ShardedEmbeddingBag
from hvd_shadowsync.gpus import PageLock
from hvd_shadowsync.replica import Merge, NamedTensor, Replica
from hvd_shadowsync.staged import Staged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

GPU = torch.device("cuda", 0)
ALGORITHMS: list[Algorithm] = [ModelAveraging(), ElasticAveraging(), BMUF(), BMUF(block_momentum=0.2, nesterov=True)]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
Step = Callable[[torch.nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]], None]


def plain_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    loss_of(model, data).backward()
    optimizer.step()


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, stream: int = 0, step: Step = plain_step
) -> None:
    device = next(model.parameters()).device
    for number in range(steps):
        inputs, targets = host_batch(stream, number)
        step(model, optimizer, (inputs.to(device), targets.to(device)))


def train_until(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, sync: ShadowSync, rounds: int, *, step: Step = plain_step
) -> None:
    while sync.metrics()["rounds"] < rounds:
        train(model, optimizer, 5, stream=sync.rank, step=step)


# --- the replica ------------------------------------------------------------------------------------------------------


def mixed_tensors(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights of many kinds and layouts, and buffers, all small whole numbers; every third is on the host."""
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    weights = [
        numbers(5, 4),
        numbers(7).half(),
        numbers(3, 2),
        numbers(4, 6).t(),
        numbers(2, 3, 4, 4).to(memory_format=torch.channels_last),
        numbers(300).bfloat16(),
        torch.complex(numbers(3), numbers(3)),
        numbers(0),
        torch.tensor(5.0),
        numbers(6, 6)[::2, 1::2],
    ]
    buffers = [numbers(3), torch.tensor(7), numbers(4) > 0, torch.arange(5, dtype=torch.uint8)]
    places = [each.to(device) if index % 3 < 2 else each for index, each in enumerate(weights + buffers)]
    return places[: len(weights)], places[len(weights) :]


def replica_on(device: torch.device, weights: list[Tensor], buffers: list[Tensor]) -> Replica:
    params = [NamedTensor(f"weight{index}", each.to(device)) for index, each in enumerate(weights)]
    return Replica(params, [NamedTensor(f"buffer{index}", each.to(device)) for index, each in enumerate(buffers)])


def contents(replica: Replica) -> list[Tensor]:
    return [each.tensor.cpu() for each in replica.tensors + replica.integers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_and_merges_are_those_of_the_host(dtype: torch.dtype) -> None:
    weights, buffers = mixed_tensors(GPU)
    if dtype is torch.float64:
        weights = [*weights, torch.tensor([1.0, 2.0], dtype=dtype, device=GPU)]
    named_weights = [NamedTensor(f"weight{index}", each) for index, each in enumerate(weights)]
    here = Replica(named_weights, [NamedTensor(f"buffer{index}", each) for index, each in enumerate(buffers)])
    there = replica_on(torch.device("cpu"), weights, buffers)
    places = [(each.tensor.data_ptr(), each.tensor.stride()) for each in here.tensors]
    assert here.gpus == [GPU]
    assert here.empty().is_pinned()
    assert here.fingerprint == there.fingerprint

    def snapshots() -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for replica in (here, there):
            flat, integers = replica.empty().fill_(math.nan), replica.empty_integers().fill_(-99)
            replica.snapshot(flat)
            replica.snapshot_integers(integers)
            pairs.append((flat, integers))
        return pairs

    for how, alpha in ((Merge.ADD, 1.0), (Merge.PULL, 0.5), (Merge.ASSIGN, 1.0)):
        (flat, integers), (expected, expected_integers) = snapshots()
        assert torch.equal(flat, expected)
        assert torch.equal(integers, expected_integers)
        staged, counts = flat * 2 + 2, integers + 1
        here.upload(staged.pin_memory(), counts)
        for replica in (here, there):
            replica.merge(staged, how, alpha)
            replica.assign_integers(counts)
        for left, right in zip(contents(here), contents(there), strict=True):
            assert torch.equal(left, right)
        head = here.head(64).get()
        assert head.numel() == 27, "the first two, which are on the GPU; then comes one on the host"
        assert torch.equal(head, there.head(27).get())
        for replica in (here, there):
            values, numbers = replica.empty(), replica.empty_integers()
            replica.read(values, numbers)
            replica.write(values + 1, numbers + 1)
        for left, right in zip(contents(here), contents(there), strict=True):
            assert torch.equal(left, right)
    assert places == [(each.tensor.data_ptr(), each.tensor.stride()) for each in here.tensors]


def test_a_snapshot_comes_after_the_steps_before_it_and_a_merge_before_those_after_it() -> None:
    """Kernels that take long are under way on the training thread's stream, the default one or another."""
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            weights = torch.zeros(1 << 20, device=GPU)
            replica = Replica([NamedTensor("weights", weights)])
            flat = replica.empty()
            replica.write(flat.fill_(1.0))
            for round_number in range(5):
                torch.cuda._sleep(50_000_000)
                weights.add_(1.0)
                replica.snapshot(flat)
                assert (flat == 2.0 + 2 * round_number).all()
                replica.upload(flat.fill_(1.0))
                torch.cuda._sleep(50_000_000)
                replica.merge(flat, Merge.ADD)
                flat.fill_(-7.0)
            stream.synchronize()
            assert (weights == 11.0).all()


def test_an_upload_waits_for_the_merge_of_the_one_before() -> None:
    weights = torch.zeros(1 << 20, device=GPU)
    replica = Replica([NamedTensor("weights", weights)])
    flat = replica.empty()
    replica.upload(flat.fill_(1.0))
    torch.cuda._sleep(200_000_000)
    replica.merge(flat, Merge.ADD)
    replica.upload(flat.fill_(100.0))
    torch.cuda.synchronize()
    assert (weights == 1.0).all()


def test_reading_and_writing_leave_what_was_uploaded() -> None:
    """The training thread may do so, for averaged weights say, while a result waits to be merged."""
    weights = torch.zeros(1 << 20, device=GPU)
    replica = Replica([NamedTensor("weights", weights)])
    flat, own = replica.empty(), replica.empty()
    replica.snapshot(flat)
    replica.upload(flat.fill_(1.0))
    replica.read(own)
    replica.write(own.fill_(5.0))
    replica.merge(flat, Merge.ADD)
    assert (weights == 6.0).all()


def test_a_merge_returns_while_the_gpu_is_busy() -> None:
    """Whoever waits for the GPU leaves it idle afterwards."""
    weights = torch.zeros(1 << 10, device=GPU)
    counter = torch.zeros(1, dtype=torch.int64, device=GPU)
    replica = Replica([NamedTensor("weights", weights)], [NamedTensor("counter", counter)])
    flat, integers = replica.empty(), replica.empty_integers()
    staged = Staged(replica, flat, integers, Merge.ADD, 1.0, Verdict.ROUND, 1, sample=torch.zeros(256))
    for _ in range(3):
        replica.snapshot(flat)
        replica.upload(flat.fill_(1.0), integers.fill_(5))
        torch.cuda._sleep(500_000_000)
        weights.add_(1.0)
        progress = staged.merge()
        after = torch.cuda.Event()
        after.record()
        assert not after.query(), "the merge came back only when the GPU was through"
        assert progress is not None
        assert math.isfinite(progress.surviving())
        torch.cuda.synchronize()
    assert (weights == 6.0).all()
    assert counter.item() == 5


def test_memory_that_is_page_locked_already_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    memory = torch.zeros(1 << 20)
    first = PageLock(memory, GPU)
    assert memory.is_pinned()
    second = PageLock(memory, GPU)
    assert "not page-locked" in caplog.text
    assert torch.zeros(4, device=GPU).add_(1).sum().item() == 4.0, "the error is forgotten"
    second.release()
    assert memory.is_pinned()
    first.release()
    first.release()
    assert not memory.is_pinned()


def test_memory_on_the_gpu_is_one_vector_more() -> None:
    weights = torch.zeros(64 << 20, device=GPU)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    replica = Replica([NamedTensor("weights", weights)])
    flat = replica.empty()
    for _ in range(3):
        replica.snapshot(flat)
        replica.upload(flat)
        replica.merge(flat, Merge.ADD)
    assert torch.cuda.max_memory_allocated() - before < 1.01 * weights.nbytes


# --- rounds -----------------------------------------------------------------------------------------------------------


@every_algorithm
def test_foreground_rounds_are_those_of_the_host(algorithm: Algorithm) -> None:
    def program(comm: Communicator) -> list[dict[str, Tensor]]:
        results = []
        for device in (torch.device("cpu"), GPU):
            model = make_model().to(device)
            optimizer = sgd(model, momentum=0.9)
            with ShadowSync(
                optimizer, model=model, communicator=comm, algorithm=algorithm, sync_every=2, foreground=True
            ) as sync:
                train(model, optimizer, 12, stream=comm.rank)
                sync.synchronize()
                assert identical_everywhere(sync, model)
            results.append({name: value.cpu() for name, value in content(model).items()})
        return results

    for host, gpu in on_ranks(2, program):
        for name, value in host.items():
            torch.testing.assert_close(gpu[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", [{}, {"apply": "hogwild"}, {"wire_dtype": torch.float16}], ids=str)
@every_algorithm
def test_background_rounds(algorithm: Algorithm, options: dict[str, Any]) -> None:
    if algorithm.asynchronous and "wire_dtype" in options:
        pytest.skip("the elastic center has one precision")

    def program(comm: Communicator) -> None:
        model = make_model(comm.rank).to(GPU)
        optimizer = sgd(model, momentum=0.5)
        with ShadowSync(
            optimizer, model=model, communicator=comm, algorithm=algorithm, sync_every=1, **options
        ) as sync:
            train_until(model, optimizer, sync, 8)
            assert all(torch.isfinite(value).all() for value in content(model).values())
            sync.synchronize()
            assert identical_everywhere(sync, model)
            with sync.averaged_weights():
                assert identical_everywhere(sync, model)

    on_ranks(2, program)


def test_the_delta_rule_keeps_the_progress_in_flight() -> None:
    def program(comm: Communicator) -> float:
        model = make_model(batch_norm=False).to(GPU)
        optimizer = sgd(model, lr=0.01)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1) as sync:
            while math.isnan(sync.metrics()["surviving_progress"]):
                train(model, optimizer, 20, stream=comm.rank)
            return sync.metrics()["surviving_progress"]

    assert on_ranks(2, program) == pytest.approx([1.0, 1.0], abs=1e-3)


def test_a_step_with_a_merge_does_not_wait_for_the_gpu() -> None:
    """A thread that waits for its GPU leaves it idle; torch raises here where one of its calls would."""

    def program(comm: Communicator) -> float:
        model = make_model(comm.rank).to(GPU)
        optimizer = sgd(model)
        data = [each.to(GPU) for each in host_batch(comm.rank, 0)]
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1) as sync:
            plain_step(model, optimizer, (data[0], data[1]))
            comm.allgather_object("ready")
            if comm.rank == 0:
                torch.cuda.set_sync_debug_mode("error")
            comm.allgather_object("set")
            try:
                while sync._course.metrics.rounds < 10:
                    plain_step(model, optimizer, (data[0], data[1]))
            finally:
                comm.allgather_object("done")
                torch.cuda.set_sync_debug_mode("default")
            return sync.metrics()["rounds"]

    assert min(on_ranks(2, program)) >= 10


def adam_fused(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, fused=True)


def adam_capturable(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, capturable=True)


@pytest.mark.parametrize("make", [adam_fused, adam_capturable])
def test_optimizers_for_gpus(make: Callable[[torch.nn.Module], torch.optim.Optimizer], tmp_path: Path) -> None:
    """They train, their state is averaged, saved and loaded again, and broadcast."""

    def program(comm: Communicator) -> None:
        model = make_model(comm.rank).to(GPU)
        broadcast_parameters(model.state_dict(), communicator=comm)
        optimizer = make(model)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1, warmup_steps=3) as sync:
            train_until(model, optimizer, sync, 4)
            checkpoint.save(tmp_path / "checkpoint.pt", model, sync)
            saved = content(model)
            train(model, optimizer, 3, stream=comm.rank)
            assert checkpoint.load(tmp_path / "checkpoint.pt", model, sync) is None
            assert same(content(model), saved)
            train_until(model, optimizer, sync, 8)
            sync.synchronize()
            assert identical_everywhere(sync, model)
        broadcast_optimizer_state(optimizer, communicator=comm)
        states = comm.allgather_object([state["exp_avg"].cpu() for state in optimizer.state.values()])
        assert all(torch.equal(left, right) for left, right in zip(states[0], states[1], strict=True))

    on_ranks(2, program)


def test_mixed_precision_with_a_gradient_scaler() -> None:
    def program(comm: Communicator) -> None:
        model = make_model(comm.rank).to(GPU)
        optimizer = sgd(model)
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0)

        def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = loss_of(model, data)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1) as sync:
            train_until(model, optimizer, sync, 5, step=step)
            sync.synchronize()
            assert identical_everywhere(sync, model)

    on_ranks(2, program)


def captured(model: torch.nn.Module, data: tuple[Tensor, Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a graph of a forward and a backward pass, and where it leaves the loss."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            loss_of(model, data).backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(model, data)
        loss.backward()
    return graph, loss


def test_a_graph_that_was_captured_before_the_optimizer_was_wrapped() -> None:
    """Merges are in place, so a captured forward and backward pass goes on with the merged weights."""

    def program(comm: Communicator) -> None:
        model = make_model(comm.rank, batch_norm=False).to(GPU)
        inputs, targets = (each.to(GPU) for each in host_batch(comm.rank, 0))
        for turn in range(comm.size):
            if turn == comm.rank:
                graph, loss = captured(model, (inputs, targets))
            comm.allgather_object("captured")
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1) as sync:
            while sync.metrics()["rounds"] < 5:
                graph.replay()
                optimizer.step()
            sync.synchronize()
            assert identical_everywhere(sync, model)
            graph.replay()
            assert loss.item() == pytest.approx(loss_of(model, (inputs, targets)).item(), rel=1e-5)

    on_ranks(2, program)


def test_a_model_over_the_gpu_and_the_host() -> None:
    class Split(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.bottom, self.top = make_model(seed)[0], make_model(seed)[1:].to(GPU)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.top(self.bottom(inputs.cpu()).to(GPU)).cpu()

    def program(comm: Communicator) -> None:
        model = Split(comm.rank)
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1) as sync:
            train_until(model, optimizer, sync, 5)
            sync.synchronize()
            assert identical_everywhere(sync, model)

    on_ranks(2, program)


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_a_dense_part_on_the_gpu_over_tables_in_the_hosts_memory() -> None:
    """The rows stay where they are; vectors arrive on the GPU and gradients leave it, with the values of the host."""
    tables = [EmbeddingTable("words", 40, 8, features=["text"], init=eighths)]

    def program(comm: Communicator) -> list[Tensor]:
        results = []
        for device in (torch.device("cpu"), GPU):
            module = ShardedEmbeddingBag(tables, optimizer=SGD(lr=0.125), communicator=comm).to(device)
            head = torch.nn.Linear(8, 1).to(device)
            with torch.no_grad():
                head.weight.fill_(0.25)
            for step in range(4):
                ids = (torch.arange(8) * (3 + step) + comm.rank) % 40
                vectors = module({"text": ids.to(device)})
                assert vectors.device == device
                head(vectors).sum().backward()
            rows = [block.values.clone() for block in module.global_state_dict(state=False)]
            results.append(torch.cat(rows))
            module.close()
        return results

    for host, gpu in on_ranks(2, program):
        assert torch.equal(host, gpu)
