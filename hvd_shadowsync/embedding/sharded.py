"""`ShardedEmbeddingBag`: embedding tables that live once, divided over all ranks."""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from hvd_shadowsync import agree
from hvd_shadowsync.checks import check_count, check_flag, check_folder, choice
from hvd_shadowsync.comm import job, mpi, spares
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.comm.survivors import Survivors
from hvd_shadowsync.embedding import kernels, whole
from hvd_shadowsync.embedding.exchange import Exchange
from hvd_shadowsync.embedding.holding import BLOCK_ROWS, Group
from hvd_shadowsync.embedding.inputs import Batch, read_batch
from hvd_shadowsync.embedding.layout import Layout
from hvd_shadowsync.embedding.optimizer import FusedOptimizer
from hvd_shadowsync.embedding.optimizers import SparseOptimizer
from hvd_shadowsync.embedding.placement import Placement, Plan
from hvd_shadowsync.embedding.planner import plan as make_plan
from hvd_shadowsync.embedding.prefetch import Prefetcher
from hvd_shadowsync.embedding.recovery import Source, take_over
from hvd_shadowsync.embedding.replicas import Replicas, copies_of
from hvd_shadowsync.embedding.routing import Lookup, Router, Traffic
from hvd_shadowsync.embedding.served import Served
from hvd_shadowsync.embedding.shards import ROW_DTYPES, Shards, table_seed, whole_blocks
from hvd_shadowsync.embedding.tables import EmbeddingTable, check_tables
from hvd_shadowsync.embedding.whole import Block
from hvd_shadowsync.embedding.worker import HomePoller, Worker
from hvd_shadowsync.errors import EmbeddingError, RankLostError, ShadowSyncError

logger = logging.getLogger(__name__)

T = TypeVar("T")

MODES = ("alltoall", "served")
OUTPUTS = ("concat", "dict")
GRADIENTS = ("mean", "sum")
WIRE_DTYPES = (None, torch.float16, torch.bfloat16)

_OPEN: weakref.WeakValueDictionary[int, ShardedEmbeddingBag] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class ShardedEmbeddingBag(nn.Module):
    """Embedding tables of which every row exists once, on the rank that the plan gives it to.

    A lookup sends ids to the rows' owners and gets pooled vectors back; backward sends gradients, and the owners update
    their rows at once, each with its total gradient over all ranks. So there is nothing to synchronise, and no dense
    optimizer has the rows: they are no parameters. Tables that the plan replicates are parameters, for the dense
    optimizer and its wrapper.

    Forward and backward are collective, and so are `join`, `close` and the saving and loading of whole tables: all
    ranks make the same calls in the same order, in the training thread. Batches may differ in size and be empty. A rank
    whose data are used up calls `join()`; the collective calls of `ShadowSync` do so by themselves.

    Args:
        tables: the tables.
        plan: a `Plan`, a placement (or its strategy) by table name, or None (default): what `plan` finds balanced.
        optimizer: `SGD`, `Adagrad`, `RowWiseAdagrad` or `Adam` of this package, with a learning rate; see
            `fused_optimizer` for schedules.
        mode: "alltoall" (default): lookups and updates of all ranks together, as exact as one process with the whole
            batch. "served": each rank's on their own, answered by the owners' threads: a slow rank holds nobody up, and
            rows are as they happen to be. Then no call waits for other ranks but construction, saving, loading and
            `close`, a wrong input is an error of its rank alone, and a rank's gradients count 1/ranks.
        output: "concat" (default): forward returns [batch, sum of dims], features in the order of the tables; "dict":
            [batch, dim] by feature.
        gradients: "mean" (default): losses are means over each rank's samples; a rank's gradients count as its share of
            the samples of all, so that rows move as under one process with the whole batch. "sum": losses are sums, and
            gradients are added up.
        dtype: of the rows, torch.float32 (default) or torch.float64.
        wire_dtype: torch.float16 or torch.bfloat16 for vectors and gradients on their way; default None, no change.
        include_last_offset: as for `nn.EmbeddingBag`; default False.
        kernel: what looks rows up and updates them: "auto" (default), "compiled" (ours), "fbgemm" or "plain" (torch).
        share_memory: whether ranks that are all on one host exchange through memory that they share, in place of
            messages; default True. Not in mode "served", nor with a `wire_dtype`.
        seed: of the initial values; default 0.
        communicator: over which ranks; default all of MPI's. It is duplicated, and stays the caller's.
        recover_from: where rows of a rank that is lost come from (`shadowrun --fault-tolerant`): the folder of a
            checkpoint, as `files.save` writes it, on a file system that all ranks see; or a function that returns the
            newest one, None where there is none yet, called on the first rank that is left in whichever thread
            exchanges. Default None; a `Checkpointer` gives its own. May be assigned later.
        replication: 2: each rank has a copy of the rows of the rank before as well, with their state, and goes on with
            them where that is lost (`shadowrun --fault-tolerant`). Takes twice the memory, and a message a step with
            the rows that an update has changed. Not in mode "served". Default 1, no copies.
        debug: each exchange also carries a fingerprint of the call; default False.

    Raises:
        TypeError, ValueError: an argument is not what it should be; names it and the remedy.
        ReplicaMismatchError: the ranks gave different arguments; raised on every rank.
        TransportError: no usable MPI.

    When a rank is lost the others take its parts over, with rows and optimizer state of the copies (`replication=2`) or
    else of the checkpoint, and the batches that were under way update no rows. Without either that is an
    `EmbeddingError` on every rank, in whatever call comes next: lost rows never begin anew.

    Rows are updated where backward runs through the output; `torch.autograd.grad` towards other tensors does not.

    Source: the embedding parameter servers of Zheng et al. 2020, arXiv 2003.03477, placed on the trainers themselves.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingTable],
        plan: Plan | Mapping[str, Placement | str] | None = None,
        optimizer: SparseOptimizer | None = None,
        *,
        mode: str = "alltoall",
        output: str = "concat",
        gradients: str = "mean",
        dtype: torch.dtype = torch.float32,
        wire_dtype: torch.dtype | None = None,
        include_last_offset: bool = False,
        kernel: str = "auto",
        share_memory: bool = True,
        seed: int = 0,
        communicator: Communicator | None = None,
        recover_from: Source = None,
        replication: int = 1,
        debug: bool = False,
    ) -> None:
        super().__init__()
        self.tables = check_tables(tables)
        if not isinstance(optimizer, SparseOptimizer) or type(optimizer) is SparseOptimizer:
            raise TypeError(
                f"optimizer={_named(optimizer)} is no optimizer of rows; give "
                "hvd_shadowsync.embedding.RowWiseAdagrad(lr=0.01), or SGD, Adagrad, Adam of the same module"
            )
        self._mode = choice("mode", mode, MODES)
        self._output, self._gradients = choice("output", output, OUTPUTS), choice("gradients", gradients, GRADIENTS)
        if dtype not in ROW_DTYPES:
            raise ValueError(f"dtype={dtype} is not supported; give torch.float32 or torch.float64")
        if wire_dtype not in WIRE_DTYPES:
            raise ValueError(f"wire_dtype={wire_dtype} is not supported; give torch.float16, torch.bfloat16 or None")
        check_flag("include_last_offset", include_last_offset)
        check_flag("share_memory", share_memory)
        check_flag("debug", debug)
        _check_replication(replication, mode)
        if recover_from is not None and not callable(recover_from):
            check_folder("recover_from", recover_from)
        check_count("seed", seed, least=0)
        if communicator is not None and not isinstance(communicator, Communicator):
            raise TypeError(
                f"communicator is a {type(communicator).__name__}; give a Communicator of this package, or None"
            )
        self._include_last_offset = include_last_offset
        self._kernel = kernels.choose(kernel)
        _refuse_if_new()
        comm = mpi.world() if communicator is None else communicator.dup()
        self._ranks, self.recover_from = Survivors(comm), recover_from
        plan = _plan_of(self.tables, plan, comm.size, optimizer)
        self._layout = Layout(plan)
        self.fused_optimizer = FusedOptimizer(optimizer)
        self.replicated = nn.Module()
        for index in plan.replicated:
            _require_usable_name(self.tables[index].name)
            self.replicated.register_parameter(
                self.tables[index].name, _whole_table(self.tables[index], dtype, table_seed(seed, index))
            )
        self._dtype, self._out_dtype, self._out_device = dtype, dtype, torch.device("cpu")
        self._closed = self._trails = False
        self._number, self._owner = next(_NUMBERS), threading.current_thread()
        self._wire_dtype, self._share_memory, self._debug, self._poller = wire_dtype, share_memory, debug, HomePoller()
        self._serves, self._view = mode == "served" and comm.size > 1, 0
        self._end: EmbeddingError | None = None
        self._replication = replication
        self._ranks.together(functools.partial(self._begin_together, plan, comm.members, optimizer, seed))()
        self._worker = Worker(f"shadow-embedding-{self._number}", self._serve_some if self._serves else None)
        self._ahead: deque[tuple[Any, Future[Lookup]]] = deque()
        _OPEN[self._number] = self
        _keep_compilers_out()
        self.register_state_dict_pre_hook(_wait_before_state)  # type: ignore[no-untyped-call]
        self._release: Callable[[], object] = self._ranks.free
        if comm.spans_processes and comm.size > 1:
            atexit.register(self._close_at_exit)
        elif comm.spans_processes:  # MPI wants it back though there is nobody to close with
            self._release = weakref.finalize(self, self._ranks.free)
            atexit.register(self._release)

    @property
    def rank(self) -> int:
        """This rank, among those that hold the tables."""
        return self.group.comm.rank

    @property
    def size(self) -> int:
        """The number of ranks that hold the tables."""
        return self.group.comm.size

    @property
    def plan(self) -> Plan:
        """Where the tables lie; another one once a rank was lost."""
        return self.group.plan

    @property
    def mode(self) -> str:
        """How ranks exchange: "alltoall" or "served"."""
        return self._mode

    def forward(self, inputs: Any) -> Tensor | dict[str, Tensor]:
        """Look `inputs` up; the output takes part in autograd (collective).

        Args:
            inputs: a dict by feature, of ids [batch] (one a sample), of matrices of ids [batch, ids of a bag], of
                `(ids, offsets)` or `(ids, offsets, weights)` as for `nn.EmbeddingBag` (weights of the tables' dtype,
                for pooling "sum"; they may want gradients), or of `Padded`; or `Jagged`, torchrec's
                `KeyedJaggedTensor`, a tensor [batch, features] or [batch, features, ids]. Ids are int64 or int32, and
                copied.

        Returns:
            [batch, sum of dims] or a dict of [batch, dim], as `output` says; of the tables' dtype, in host memory, or
            of the dtype and on the device to which the module was moved (`.half()` changes the output alone).

        Raises:
            EmbeddingError: the input of a rank is wrong, or ranks make different calls; raised on every rank.
        """
        self._require_open("forward()")
        trains = torch.is_grad_enabled()
        lookup = self._looked_up_ahead(inputs) if self._ahead else self._do(self._begin(inputs, trains=trains))
        batch, vectors = lookup.batch, lookup.out
        if trains:
            order = list(batch.learned)
            anchor = torch.empty(0, requires_grad=True)
            weights = [batch.learned[index] for index in order]
            vectors = _Exchanged.apply(anchor, self, lookup, order, *weights)  # type: ignore[no-untyped-call]
        return self._finish(batch, vectors)

    def prefetch(
        self, loader: Iterable[T], inputs: Callable[[T], Any] | None = None, *, depth: int = 1
    ) -> Prefetcher[T]:
        """Return the batches of `loader`, looked up ahead: `for batch in embedding.prefetch(loader): ...`.

        See `prefetch.Prefetcher` for the arguments, and for the staleness that `depth` brings.
        """
        return Prefetcher(self, loader, inputs, depth=depth)

    def join_all(self) -> None:
        """`join()` every open module that this one's thread made, in order (collective)."""
        join_all(self._owner)

    def join(self) -> None:
        """Begin to take part, without data, in what the others do, until all ranks are here (collective).

        Returns at once: a thread serves the others. The next lookup waits until all have joined, and so does `wait()`.
        In mode "served" there is nothing to do: nobody waits for a rank's batches.
        """
        if self.size > 1 and not self._closed and not self._serves:
            self._worker.submit(functools.partial(self._serve, closing=False))

    def wait(self) -> None:
        """Return when all that was begun in the background is done: after `join()`, when all ranks have joined."""
        self._worker.wait()

    def close(self) -> None:
        """`join()`, wait for all, give the communicator back (collective; idempotent). Weights stay readable."""
        if not self._closed:
            self._closed = True
            _OPEN.pop(self._number, None)
            atexit.unregister(self._close_at_exit)
            try:
                if self.size > 1:
                    self._worker.submit(functools.partial(self._serve, closing=True))
                self._worker.wait()
            finally:
                self._worker.stop()
            self._exchange.free()
            self._release()

    def global_state_dict(
        self, *, block_rows: int = BLOCK_ROWS, state: bool = True, root: int | None = None
    ) -> Iterator[Block]:
        """Iterate over whole tables in blocks of rows, none ever whole on a rank; see `whole.global_state_dict`."""
        return whole.global_state_dict(self, block_rows=block_rows, state=state, root=root)

    def load_global_state_dict(self, blocks: Iterable[Block] | Mapping[str, Tensor]) -> None:
        """Take this rank's rows out of blocks, or of whole tables by name; see `whole.load_global_state_dict`."""
        whole.load_global_state_dict(self, blocks)

    def metrics(self) -> dict[str, float]:
        """Return what this rank has sent, in bytes: ids, vectors, gradients; copies; and all but copies per lookup."""
        traffic = self._exchange.traffic
        total = traffic.id_bytes + traffic.vector_bytes + traffic.gradient_bytes
        return {
            "lookups": traffic.lookups,
            "updates": traffic.updates,
            "id_bytes": traffic.id_bytes,
            "vector_bytes": traffic.vector_bytes,
            "gradient_bytes": traffic.gradient_bytes,
            "replica_bytes": traffic.replica_bytes,
            "bytes_per_step": total / max(traffic.lookups, 1),
            "ranks_lost": len(self._ranks.lost),
        }

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a ShardedEmbeddingBag is one rank's part of a job and cannot be copied or pickled; save state_dict(), or "
            "all tables with hvd_shadowsync.embedding.files.save(folder, module)"
        )

    def extra_repr(self) -> str:
        """Return the number of tables, rows and ranks for the printed module."""
        rows = sum(table.num_embeddings for table in self.tables)
        return f"{len(self.tables)} tables, {rows} rows, rank {self.rank} of {self.size}, kernel={self._kernel.name}"

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.wait()
        super()._load_from_state_dict(*arguments)

    # --- ahead of the training thread: for `prefetch.Prefetcher` ------------------------------------------------------

    def look_up_ahead(self, inputs: Any) -> None:
        """Begin to look `inputs` up in another thread, for the forward that is given this very object (collective)."""
        self._require_open("prefetch()")
        self._ahead.append((inputs, self._worker.submit(self._begin(inputs, trains=torch.is_grad_enabled()))))

    def no_more_ahead(self) -> None:
        """Say that no lookup of this rank comes before the updates of those that were begun ahead."""
        self._trails = bool(self._ahead)

    def drop_ahead(self) -> None:
        """Forget lookups that were begun ahead and not used."""
        self._trails = False
        while self._ahead:
            self._worker.submit(functools.partial(self._leave_unused, self._ahead.popleft()[1]))

    def _leave_unused(self, lookup: Future[Lookup]) -> None:
        self._exchange.leave_unused(lookup.result())

    def _looked_up_ahead(self, inputs: Any) -> Lookup:
        expected, lookup = self._ahead[0]
        if expected is not inputs:
            raise EmbeddingError(
                "forward got another object than the one that was looked up ahead; let prefetch's argument inputs=... "
                "return the very object that the model passes on, and look up nothing else inside the loop"
            )
        self._ahead.popleft()
        return lookup.result()

    def _begin_together(
        self, plan: Plan, members: tuple[int, ...], rule: SparseOptimizer, seed: int, comm: Communicator
    ) -> Callable[[], None]:
        """Get all ready for the first lookup; return what sets this object up once all ranks are as far.

        A rank that is lost meanwhile has learned nothing that its heirs have not from the seed.
        """
        self._require_same(comm, plan, rule, seed)
        if comm.members != members:
            plan = plan.handed_on([comm.members.index(each) if each in comm.members else None for each in members])
        shards = Shards(plan, comm.rank, rule, self._dtype, seed)
        traffic = Traffic()
        replicas = self._make_replicas(comm, plan, shards, traffic, seed)
        exchange = self._make_exchange(comm, Layout(plan), shards, traffic, replicas)

        def begin() -> None:
            self.shards, self._replicas, self._exchange = shards, replicas, exchange
            self.group = Group(comm, plan, shards, exchange.meetings)

        return begin

    # --- inside -------------------------------------------------------------------------------------------------------

    def _make_exchange(
        self,
        comm: Communicator,
        layout: Layout,
        shards: Shards,
        traffic: Traffic,
        replicas: Replicas | None,
        view: int = 0,
    ) -> Exchange | Served:
        router = Router(layout, comm.rank, shards, self._kernel)
        sums = self._gradients == "sum"
        if self._serves:
            return Served(
                comm, router, Poller(), dtype=self._dtype, wire_dtype=self._wire_dtype,
                scale=1.0 if sums else 1.0 / comm.size, debug=self._debug, owner=self._owner, view=view,
                traffic=traffic,
            )  # fmt: skip
        return Exchange(
            comm, router, self._poller, wire_dtype=self._wire_dtype, sum_gradients=sums,
            share_memory=self._share_memory, debug=self._debug, owner=self._owner, replicas=replicas, view=view,
            traffic=traffic,
        )  # fmt: skip

    def _make_replicas(
        self, comm: Communicator, plan: Plan, shards: Shards, traffic: Traffic, seed: int | None
    ) -> Replicas | None:
        if self._replication == 1 or comm.size == 1:
            return None
        copies = copies_of(plan, comm.rank, shards, seed)
        return Replicas(comm, self._poller, self._kernel, shards, copies, traffic)

    def _begin(self, inputs: Any, *, trains: bool) -> Callable[[], Lookup]:
        """Read `inputs`; return what is to be done then, where a wrong input makes all ranks fail."""
        try:
            batch = read_batch(
                inputs, self._layout.features, self._dtype, self._kernel, include_last_offset=self._include_last_offset
            )
        except Exception as error:  # whatever it is, the other ranks have to know
            message = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {error}"
            if self._serves:
                raise EmbeddingError(message) from error
            return functools.partial(self._fail, message)
        return lambda: self._together(
            lambda: self._exchange.lookup(batch, wants_gradient=trains, dtype=self._dtype), looks_up=True
        )

    def _fail(self, message: str) -> NoReturn:
        self._together(lambda: self._exchange.meetings.fail(message))
        raise AssertionError("a failed meeting raises")

    def _backward(self, lookup: Lookup, gradient: Tensor) -> dict[int, Tensor]:
        self._require_open("backward()")
        if lookup.out.dtype is not self._dtype:
            return self._do(functools.partial(
                self._fail,
                f"rows went from {lookup.out.dtype} to {self._dtype} between forward and backward; convert the module "
                "before forward or after backward",
            ))  # fmt: skip
        gradient = gradient.detach().to("cpu", self._dtype)
        try:
            rule = self.fused_optimizer.rule
        except (TypeError, ValueError) as error:
            return self._do(functools.partial(self._fail, f"fused_optimizer: {error}"))
        self.fused_optimizer.step()
        found = Router.weight_gradients(lookup, gradient)
        later = bool(self._ahead) or self._trails or self._serves
        with torch.no_grad():
            staged = self._exchange.stage(lookup, gradient, keep=later)
        if later:
            self._worker.submit(functools.partial(self._update, lookup, staged, rule, trails=self._trails))
        else:
            self._do(lambda: self._update(lookup, staged, rule, trails=False))
        return found

    def _do(self, task: Callable[[], T]) -> T:
        """Do `task` after all that was begun: here, or where there is a serving thread, in that."""
        if self._serves:
            return self._worker.submit(task).result()
        self._worker.wait()
        with torch.no_grad():
            return task()

    def _update(self, lookup: Lookup, gradient: Tensor, rule: SparseOptimizer, *, trails: bool) -> None:
        self.shards.rule = rule
        self._together(lambda: self._exchange.update(lookup, gradient, trails=trails))

    def _serve(self, *, closing: bool) -> None:
        self._together(lambda: self._exchange.serve(self._dtype, closing=closing, agree=self._agree))

    def _agree(self) -> None:
        """Raise `RankLostError` on all ranks that are left unless all have come here (collective)."""
        self._ranks.agreed(lambda _: None)

    def _serve_some(self) -> bool:
        return self._together(lambda: isinstance(self._exchange, Served) and self._exchange.serve_some())

    # --- lost ranks ---------------------------------------------------------------------------------------------------

    def together(self, call: Callable[[], T]) -> T:
        """Do what all ranks do together, in the training thread; again where a rank is lost meanwhile (for `whole`)."""
        while self._serves:
            try:
                return call()
            except RankLostError:  # the serving thread goes on without it
                self._worker.submit(lambda: self._together(self._check)).result()
        return self._together(call)

    def all_are_through(self, group: Group) -> bool:
        """Tell whether all ranks of `group` have come here, and none is lost meanwhile (collective; for `whole`)."""

        def agree() -> bool:
            try:
                if self.group is group:
                    self._agree()
            except RankLostError:  # the next call goes on without it
                return False
            return self.group is group

        return self._do(agree)

    def _together(self, call: Callable[[], T], *, looks_up: bool = False) -> T:
        """Do what all ranks do together, in the thread that exchanges; again where a rank is lost meanwhile.

        With `looks_up` it is a lookup of this rank.
        """
        while True:
            if self._end is not None:
                raise self._end
            try:
                return call()
            except RankLostError as lost:
                self._go_on(lost, looks_up=looks_up)

    def _go_on(self, lost: RankLostError, *, looks_up: bool) -> None:
        """Take over, with all that are left, what the lost ranks had.

        Ranks are at most one call apart. Where some are through with a lookup, and some are not, those make it once
        more, and the others serve them; all updates that were under way are void.
        """
        if not self.group.comm.outlives_ranks:
            raise lost
        self._let_others_watch()
        serves = False
        while True:
            try:
                serves = self._ranks.go_on(functools.partial(self._take_over, looks_up=looks_up, served=serves))()
                if serves and isinstance(self._exchange, Exchange):
                    self._exchange.serve_lookup(self._dtype)
                return
            except RankLostError:
                continue
            except EmbeddingError as error:
                gone = ", ".join(f"rank {number}" for number in self._ranks.lost)
                self._end = EmbeddingError(
                    f"a rank was lost ({gone}), and with it the rows of the sharded tables that were its own; {error}; "
                    "start the job again from its last checkpoint"
                )
                raise self._end from None

    def _let_others_watch(self) -> None:
        """Let the other modules of the training thread, where this is that, notice losses by themselves from now on.

        Ranks are a call apart: one may wait in its call of another module for this rank, which would not come there.
        """
        if threading.current_thread() is self._owner:
            for module in open_modules(self._owner):
                if module is not self and module.size > 1 and not module._serves:
                    module._worker.watch(functools.partial(module._together, module._check))

    def _check(self) -> None:
        self.group.comm.check()

    def _take_over(self, comm: Communicator, *, looks_up: bool, served: bool) -> Callable[[], bool]:
        """Get all ready; return what changes this object once all ranks are as far, and tells whether to serve.

        With `served` another rank was lost while this one served a lookup, with which it is through itself.
        """
        usable = None if self._replicas is None else self._replicas.usable
        plan, shards = take_over(comm, self.group, usable, self.recover_from)
        traffic = replace(self._exchange.traffic)
        replicas = self._make_replicas(comm, plan, shards, traffic, None)
        if replicas is not None:
            replicas.renew([True] * comm.size)
        done = traffic.lookups + served
        everyone: list[tuple[int, bool]] = comm.allgather_object((done, looks_up and not self._serves))
        most = done if self._serves else max(each for each, _ in everyone)
        again = [late and each < most for each, late in everyone]
        traffic.lookups = most - any(again)
        view = self._view + 1
        exchange = self._make_exchange(comm, Layout(plan), shards, traffic, replicas, view)

        def begin() -> bool:
            self.shards, self._replicas, self._exchange, self._view = shards, replicas, exchange, view
            self.group = Group(comm, plan, shards, exchange.meetings)
            return any(again) and not again[comm.rank]

        return begin

    def _finish(self, batch: Batch, vectors: Tensor) -> Tensor | dict[str, Tensor]:
        vectors = vectors.to(self._out_device, self._out_dtype)
        if not self._layout.local and self._output == "concat":
            return vectors
        names = [feature.name for feature in self._layout.features]
        found = {name: vectors[:, slice(*column)] for name, column in zip(names, self._layout.columns, strict=True)}
        for index in self._layout.local:
            found[names[index]] = self._look_up_locally(index, batch).to(self._out_device, self._out_dtype)
        return found if self._output == "dict" else torch.cat(list(found.values()), 1)

    def _look_up_locally(self, index: int, batch: Batch) -> Tensor:
        table, bags = self._layout.features[index].table, batch.features[index]
        weight = getattr(self.replicated, table.name)
        ids, weights = bags.ids.to(weight.device), batch.learned.get(index, bags.weights)
        ends = torch.arange(len(ids)) if bags.lengths is None else bags.lengths.cumsum(0) - bags.lengths
        weights = None if weights is None else weights.to(weight.device, weight.dtype)
        return embedding_bag(ids.long(), weight, ends.to(weight.device), mode=table.pooling, per_sample_weights=weights)

    def _require_same(self, comm: Communicator, plan: Plan, rule: SparseOptimizer, seed: int) -> None:
        if comm.size > 1:
            settings: dict[str, Any] = {f"table {table.name!r}": _described(table) for table in self.tables}
            settings |= {"plan": plan.placements, "optimizer": rule, "gradients": self._gradients}
            settings |= {"mode": self._mode, "dtype": self._dtype, "wire_dtype": self._wire_dtype, "seed": seed}
            settings |= {"share_memory": self._share_memory, "replication": self._replication, "debug": self._debug}
            agree.require_same(comm, agree.describe_settings(settings))

    def _close_at_exit(self) -> None:
        if job.is_forked():
            return
        logger.info("close() was not called; serving until all ranks are done")
        try:
            self.join_all()  # others may need any of them before they close this one
            self.close()
        except ShadowSyncError:
            logger.exception("the exchange of embeddings ended with an error")
            job.end_job("the exchange of embeddings failed")

    def _require_open(self, call: str) -> None:
        if self._closed:
            raise ShadowSyncError(f"{call} came after close(); make a new ShardedEmbeddingBag to go on")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedEmbeddingBag:
        probe = fn(torch.empty(0, dtype=self._out_dtype, device=self._out_device))
        if probe.is_meta or not probe.is_floating_point():
            raise ValueError(
                f"a ShardedEmbeddingBag cannot be of {probe.dtype} on {probe.device}; its rows have values"
            )
        if self._serves and probe.dtype in ROW_DTYPES and probe.dtype != self._dtype:
            raise ValueError(
                f"mode='served' cannot change dtype from {self._dtype} to {probe.dtype}, while other ranks look up; "
                f"give ShardedEmbeddingBag(dtype={probe.dtype})"
            )
        self.wait()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._replicas is not None:
            self._replicas.copies._apply(fn)
        self._out_dtype, self._out_device = probe.dtype, probe.device
        self._dtype = probe.dtype if probe.dtype in ROW_DTYPES else self._dtype
        return self


@functools.cache
def _keep_compilers_out() -> None:
    """Let `torch.compile` call `forward` as it is; not at import, where it would take a second for all."""
    ShardedEmbeddingBag.forward = torch.compiler.disable(  # type: ignore[method-assign, no-untyped-call]
        ShardedEmbeddingBag.forward
    )


class _Exchanged(torch.autograd.Function):
    """The vectors of a lookup; backward is the exchange of their gradients and the update of the rows."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, module: ShardedEmbeddingBag, lookup: Lookup, order: list[int], *weights: Tensor
    ) -> Tensor:
        vectors, lookup.out = lookup.out, lookup.out.new_empty(0)  # which would be held by what it holds
        ctx.module, ctx.lookup, ctx.order = module, lookup, order
        return vectors

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.lookup is None:
            raise EmbeddingError("backward ran a second time through one lookup, whose rows are updated; look up again")
        lookup, ctx.lookup = ctx.lookup, None
        found = ctx.module._backward(lookup, gradient)
        return (None, None, None, None, *(found[index] for index in ctx.order))


def _named(optimizer: Any) -> str:
    return f"{type(optimizer).__name__}(...)" if isinstance(optimizer, torch.optim.Optimizer) else repr(optimizer)


def _require_usable_name(name: str) -> None:
    if hasattr(nn.Module(), name):
        raise ValueError(f"table {name!r} is replicated, but no parameter can be called so; rename the table")


def _check_replication(replication: int, mode: str) -> None:
    check_count("replication", replication, least=1)
    if replication > 2:
        raise ValueError(f"replication={replication} is not supported; give 1 (no copies) or 2")
    if replication == 2 and mode == "served":
        raise ValueError(
            "replication=2 needs mode='alltoall', where updates come together; with mode='served' let a Checkpointer "
            "keep the rows (recover_from)"
        )


def _wait_before_state(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(module, ShardedEmbeddingBag)
    if not keep_vars:  # with keep_vars it is no copy in time anyway
        module.wait()


def _plan_of(tables: tuple[EmbeddingTable, ...], plan: Any, size: int, rule: SparseOptimizer) -> Plan:
    if plan is None:
        return make_plan(tables, size, optimizer=rule)
    if isinstance(plan, Plan):
        if plan.tables != tables or plan.world_size != size:
            raise ValueError(
                f"plan is for {len(plan.tables)} tables and a world of {plan.world_size}, not these {len(tables)} "
                f"tables and {size} ranks; make it anew with plan(tables, {size})"
            )
        return plan
    if isinstance(plan, Mapping):
        return Plan.of(tables, size, plan)
    raise TypeError(f"plan is a {type(plan).__name__}; give a Plan, a dict of placements by table name, or None")


def _described(table: EmbeddingTable) -> tuple[Any, ...]:
    return (table.num_embeddings, table.embedding_dim, table.pooling, table.features)


def _whole_table(table: EmbeddingTable, dtype: torch.dtype, seed: int) -> nn.Parameter:
    return nn.Parameter(torch.cat([block for _, block in whole_blocks(table, seed, dtype)]))


def open_modules(owner: threading.Thread) -> list[ShardedEmbeddingBag]:
    """Return every open `ShardedEmbeddingBag` that the thread `owner` made, in order."""
    modules = [each for reference in _OPEN.valuerefs() if (each := reference()) is not None and each._owner is owner]
    return sorted(modules, key=lambda each: each._number)


def _refuse_if_new() -> None:
    """Raise where this process takes the place of a lost rank, whose rows others have taken over."""
    if (known := spares.here()) is not None and known.is_spare:
        raise EmbeddingError(
            "this process takes the place of a lost rank (--respawn), but those that are left have its rows of "
            "sharded tables, and go on without it; leave --respawn out, or use --restarts"
        )


def join_all(owner: threading.Thread) -> None:
    """`join()` every open `ShardedEmbeddingBag` that the thread `owner` made, in order (collective)."""
    for module in open_modules(owner):
        module.join()
