"""Ranks that are stopped or slow: who is said to be missing, who is given up, and training that waits at a gap."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks_as_threads import TIMEOUT_S, batch, flat, identical_everywhere, loss_of, make_model, on_ranks, sgd, train

from hvd_shadowsync import (
    BMUF,
    DistributedOptimizer,
    ElasticAveraging,
    ModelAveraging,
    ReplicaMismatchError,
    ShadowSync,
)
from hvd_shadowsync.algorithms import Algorithm
from hvd_shadowsync.comm import attendance, local
from hvd_shadowsync.comm.attendance import Attendance, Person, StallRules
from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.whereabouts import VOTE, Wait, Whereabouts, Word
from hvd_shadowsync.embedding import SGD, EmbeddingTable, ShardedEmbeddingBag
from hvd_shadowsync.errors import StallError

ALGORITHMS: list[Algorithm] = [ModelAveraging(), ElasticAveraging(), BMUF(block_momentum=0.2, nesterov=True)]
WARNING_S, TIMEOUT = 60.0, 300.0


# --- who is missing, by a clock of the test ---------------------------------------------------------------------------


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Sent:
    """A request that is complete."""

    def test(self) -> bool:
        return True


class Ranks:
    """Ranks of one thread, which look when the test lets time pass; `hosts` says who is on which machine."""

    def __init__(
        self, size: int, rules: StallRules, hosts: list[int] | None = None, launcher: int | None = None
    ) -> None:
        self.clock = Clock()
        self.errors: dict[int, StallError] = {}
        self.lost: set[int] = set()
        self.stopped: set[int] = set()
        self.killed: list[int] = []
        self.under_way: list[Callable[[], Any]] = []
        self.tick_s = rules.tick_s
        self.steps = [0] * size
        hosts = hosts or [0] * size
        people = [
            Person(rank, f"host{hosts[rank]}", 100 + rank, f"host{hosts[rank]}", "", hosts[rank] == launcher)
            for rank in range(size)
        ]
        self.cut_off: dict[int, set[int]] = {rank: set() for rank in range(size)}
        self.sides: list[set[int]] = [set(range(size))]
        self.whereabouts = [Whereabouts(self.clock) for _ in range(size)]
        self.comms = local.world(size, kill={})
        self.attendances = []
        for rank, (comm, where) in enumerate(zip(self.comms, self.whereabouts, strict=True)):
            where.steps = lambda rank=rank: self.steps[rank]
            comm.kill = lambda rank, _: self.killed.append(rank)  # type: ignore[method-assign]
            comm.declare_lost = self._declaring(rank)  # type: ignore[method-assign]
            comm.isend = self._sending(rank, comm.isend)  # type: ignore[method-assign]
            self.attendances.append(
                Attendance(comm, people, where, rules, lost=lambda: self.lost, fail=self._failing(rank))
            )

    def _failing(self, rank: int) -> Callable[[StallError], None]:
        return lambda error: self.errors.setdefault(rank, error)

    def _declaring(self, own: int) -> Callable[[int], bool]:
        def declare_lost(rank: int) -> bool:
            self.cut_off[own].add(rank)
            return True

        return declare_lost

    def _sending(self, own: int, isend: Callable[..., Any]) -> Callable[..., Any]:
        """Keep a message on its way for as long as the network is apart, as TCP does."""

        def send(tensor: torch.Tensor, dest: int, tag: int) -> Any:
            if any({own, dest} <= side for side in self.sides):
                return isend(tensor, dest, tag)
            self.under_way.append(lambda: isend(tensor, dest, tag))
            return Sent()

        return send

    def part(self, *sides: set[int]) -> None:
        """Have messages go no further than one of the sides."""
        self.sides = list(sides)

    def mend(self) -> None:
        """Have all ranks reach one another again, and what was sent meanwhile."""
        self.sides = [set(range(len(self.comms)))]
        for send in self.under_way:
            send()
        self.under_way.clear()

    def wait(self, *ranks: int, place: str = VOTE) -> None:
        """Let ranks wait in `place` from now on."""
        for rank in ranks:
            self.whereabouts[rank]._wait = Wait(place, self.clock())

    def go_on(self, *ranks: int) -> None:
        for rank in ranks:
            self.whereabouts[rank]._wait = None

    def call(self, *ranks: int) -> None:
        for rank in ranks:
            self.whereabouts[rank]._call = Wait("synchronize()", self.clock())

    def pass_s(self, seconds: float, training: tuple[int, ...] = ()) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now += self.tick_s
            for rank in training:
                self.steps[rank] += 1
            for rank, each in enumerate(self.attendances):
                if rank not in self.stopped and rank not in self.killed:
                    each.look()

    def sent(self) -> int:
        return sum(len(mailbox) for mailbox in self.comms[0]._shared.mailboxes)


@pytest.fixture(autouse=True)
def _processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "_born", lambda _: "")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_nothing_is_sent_before_a_wait_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(3, StallRules(WARNING_S))
    sends: list[int] = []
    for comm in ranks.comms:
        monkeypatch.setattr(comm, "isend", lambda *_: sends.append(1))
    ranks.wait(0, 1)
    ranks.pass_s(50.0, training=(2,))
    ranks.go_on(0, 1)
    ranks.pass_s(50.0, training=(0, 1, 2))
    ranks.wait(0, 1)
    ranks.pass_s(50.0, training=(2,))
    assert sends == []


def test_a_stopped_rank_is_reported_once_by_the_first_that_waits_and_again_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ranks = Ranks(4, StallRules(WARNING_S), hosts=[0, 0, 1, 1])
    ranks.stopped = {2}
    ranks.wait(0, 1, 3)
    ranks.pass_s(100.0)
    assert warnings(caplog) == [
        f"rank 0 on host0 (pid 100) has waited for 60 s in {VOTE} for rank 2 on host1 (pid 102), which has not "
        "answered for 4 s: stopped, or its host is away"
    ]
    ranks.pass_s(400.0)
    assert [text.split(" in the vote")[0] for text in warnings(caplog)] == [
        f"rank 0 on host0 (pid 100) has waited for {seconds} s" for seconds in (60, 120, 240, 480)
    ]
    caplog.clear()
    ranks.stopped = set()
    ranks.go_on(0, 1, 3)
    ranks.pass_s(10.0)
    assert warnings(caplog) == [f"rank 2 on host1 (pid 102) is back; {VOTE} was held up for 501 s"]
    ranks.pass_s(100.0)
    assert len(warnings(caplog)) == 1


def test_the_next_rank_asks_where_the_first_one_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(4, StallRules(WARNING_S))
    ranks.stopped = {0}
    ranks.wait(1, 2, 3)
    ranks.pass_s(100.0)
    assert len(warnings(caplog)) == 1
    assert "rank 1 on host0 (pid 101) has waited" in warnings(caplog)[0]
    assert "for rank 0 on host0 (pid 100), which has not answered" in warnings(caplog)[0]


def test_a_slow_rank_is_said_to_train_and_how_far_it_is_and_has_come_in_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ranks = Ranks(2, StallRules(WARNING_S))
    ranks.steps[1] = 7
    ranks.pass_s(3.0)
    ranks.wait(0)
    ranks.pass_s(61.0)
    assert warnings(caplog)[0].endswith("for rank 1 on host0 (pid 101), training, at step 7 since 58 s")
    ranks.go_on(0)
    ranks.pass_s(10.0, training=(0, 1))
    assert warnings(caplog)[1:] == [f"rank 1 on host0 (pid 101) has come; {VOTE} was held up for 62 s"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (Word(idle_s=70.0), "training, no step in 70 s"),
        (Word(steps=4, idle_s=70.0, paused=True), "paused, at step 4 since 70 s"),
        (Word(place="a round", place_s=9.0, steps=4, idle_s=1.0), "waiting in a round since 9 s, at step 4 since 1 s"),
        (Word(place="a round", place_s=9.0, call="close()", call_s=80.0), "in close() since 80 s"),
    ],
)
def test_what_a_rank_says_of_itself(word: Word, said: str) -> None:
    assert str(word) == said


def test_in_a_call_those_are_missing_that_are_not_in_one(caplog: pytest.LogCaptureFixture) -> None:
    """Rounds go on meanwhile: nobody waits in a vote for long."""
    ranks = Ranks(3, StallRules(WARNING_S, 90.0))
    ranks.call(0, 1)
    ranks.pass_s(300.0, training=(2,))
    assert len(warnings(caplog)) == 3
    assert all("in synchronize() for rank 2 on host0 (pid 102), training, at step" in text for text in warnings(caplog))
    assert ranks.errors == {}


def test_where_all_are_there_the_network_is_asked_after(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(2, StallRules(WARNING_S, 90.0))
    ranks.wait(0, 1, place="a round")
    ranks.pass_s(100.0)
    assert "though all ranks are there and wait as well" in warnings(caplog)[0]
    assert ranks.errors == {}


def test_without_a_warning_only_the_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(3, StallRules(None, TIMEOUT))
    ranks.stopped = {1}
    ranks.wait(0, 2)
    ranks.pass_s(295.0)
    assert (warnings(caplog), ranks.errors) == ([], {})
    ranks.pass_s(10.0)
    assert sorted(ranks.errors) == [0, 2]


# --- who is given up --------------------------------------------------------------------------------------------------


def test_a_stopped_rank_ends_the_job_with_the_same_error_everywhere() -> None:
    ranks = Ranks(4, StallRules(WARNING_S, TIMEOUT))
    ranks.stopped = {1}
    ranks.wait(0, 2)  # rank 3 has not come to its vote yet
    ranks.pass_s(298.0, training=(3,))
    assert ranks.errors == {}
    ranks.pass_s(5.0, training=(3,))
    assert sorted(ranks.errors) == [0, 2, 3]
    texts = {str(each) for each in ranks.errors.values()}
    assert len(texts) == 1
    assert "held up for 300 s (stall_timeout_s) by rank 1 on host0 (pid 101), which has not answered" in texts.pop()
    assert ranks.killed == []


def test_a_rank_that_comes_back_in_time_is_not_given_up() -> None:
    ranks = Ranks(2, StallRules(WARNING_S, TIMEOUT))
    ranks.stopped = {1}
    ranks.wait(0)
    ranks.pass_s(290.0)
    ranks.stopped = set()
    ranks.pass_s(5.0)
    ranks.go_on(0)
    ranks.pass_s(400.0, training=(0, 1))
    assert ranks.errors == {}


@pytest.mark.parametrize(
    ("training", "paused", "given_up"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_a_rank_that_answers_is_given_up_if_it_takes_no_step(training: bool, paused: bool, given_up: bool) -> None:
    ranks = Ranks(2, StallRules(WARNING_S, TIMEOUT))
    ranks.whereabouts[1].paused = paused
    ranks.wait(0)
    ranks.pass_s(400.0, training=(1,) if training else ())
    assert bool(ranks.errors) is given_up


def test_a_rank_stopped_long_after_a_call_began_has_the_whole_time() -> None:
    ranks = Ranks(2, StallRules(WARNING_S, TIMEOUT))
    ranks.call(0)
    ranks.pass_s(1000.0, training=(1,))
    ranks.stopped = {1}
    ranks.wait(0)
    ranks.pass_s(280.0)
    assert ranks.errors == {}
    ranks.pass_s(40.0)
    assert list(ranks.errors) == [0]


@pytest.mark.parametrize(("stopped", "by"), [({1}, "itself"), ({0}, "the next one")])
def test_a_stopped_rank_is_dropped_by_one_of_its_host(
    stopped: set[int], by: str, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(4, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=[0, 0, 1, 1])
    ranks.stopped = stopped
    ranks.wait(*set(range(4)) - stopped)
    ranks.pass_s(310.0)
    assert (ranks.killed, ranks.errors) == (list(stopped), {})
    assert any("is dropped: held up for 300 s" in text for text in warnings(caplog))
    ranks.pass_s(600.0)
    assert ranks.killed == list(stopped)


def test_another_rank_of_its_host_drops_it_when_asked() -> None:
    ranks = Ranks(4, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=[0, 0, 1, 1])
    ranks.stopped = {2}
    ranks.wait(0, 1, 3)
    ranks.pass_s(310.0)
    assert (ranks.killed, ranks.errors) == ([2], {})


def test_a_slow_rank_ends_itself_when_told() -> None:
    ranks = Ranks(2, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=[0, 1])
    ranks.wait(0)
    ranks.pass_s(310.0)
    assert (ranks.killed, ranks.errors) == ([1], {})


def ends(ranks: Ranks) -> dict[int, str]:
    return {rank: type(error).__name__ for rank, error in sorted(ranks.errors.items())}


@pytest.mark.parametrize("stopped", [{2, 3}, {2}])
def test_the_others_go_on_without_ranks_that_nobody_can_end(
    stopped: set[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Ranks(4, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=[0, 0, 1, 1])
    ranks.stopped = set(stopped)

    def refuse(rank: int, pid: int) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(ranks.comms[3], "kill", refuse)
    others = set(range(4)) - stopped
    ranks.wait(*others)
    ranks.pass_s(340.0)
    assert (ranks.killed, ranks.errors) == ([], {})
    assert [ranks.cut_off[rank] for rank in others] == [stopped] * len(others)
    assert any(
        "rank 2 is cut off: held up for 300 s (stall_timeout_s) by rank 2 on" in each for each in warnings(caplog)
    )
    ranks.lost = set(stopped)
    ranks.stopped = set()
    ranks.pass_s(10.0)
    assert ends(ranks) == dict.fromkeys(stopped, "CutOffError"), "they have heard that the others went on"


@pytest.mark.parametrize(
    ("sides", "launcher", "left"),
    [
        (({0, 1}, {2}), 0, {2}),
        (({0}, {1, 2}), None, {0}),
        (({0, 1}, {2, 3}), None, {2, 3}),
        (({0, 1}, {2, 3}), 0, {2, 3}),
        (({0, 3}, {1, 2}), None, {1, 2}),
        (({0, 1, 2}, {3}, {4}), 0, {3, 4}),
    ],
    ids=str,
)
def test_the_smaller_side_leaves(sides: tuple[set[int], ...], launcher: int | None, left: set[int]) -> None:
    size = sum(map(len, sides))
    ranks = Ranks(size, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=list(range(size)), launcher=launcher)
    ranks.part(*sides)
    ranks.wait(*range(size))
    ranks.pass_s(400.0)
    assert ends(ranks) == dict.fromkeys(sorted(left), "CutOffError")
    stay = set(range(size)) - left
    assert [ranks.cut_off[rank] for rank in stay] == [left] * len(stay)
    ranks.lost = left
    ranks.mend()
    ranks.pass_s(400.0)
    assert ends(ranks) == dict.fromkeys(sorted(left), "CutOffError"), "what comes from the other side has no effect"


@pytest.mark.parametrize(
    ("sides", "launcher", "reason"),
    [
        (({0}, {1, 2}), 0, "most ranks are away"),
        (({0, 1}, {2, 3}), 3, "mpirun's host is away"),
    ],
    ids=str,
)
def test_where_no_side_can_go_on_all_end(sides: tuple[set[int], ...], launcher: int | None, reason: str) -> None:
    size = sum(map(len, sides))
    ranks = Ranks(size, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=list(range(size)), launcher=launcher)
    ranks.part(*sides)
    ranks.wait(*range(size))
    ranks.pass_s(400.0)
    assert ends(ranks) == dict.fromkeys(range(size), "StallError")
    assert reason in str(ranks.errors[0])
    assert not any(ranks.cut_off.values())


def test_of_three_sides_none_goes_on() -> None:
    """Those that cannot tell whether the others reach one another leave; who is beside the launcher ends the job."""
    ranks = Ranks(6, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=list(range(6)), launcher=0)
    ranks.part({0, 1}, {2, 3}, {4, 5})
    ranks.wait(*range(6))
    ranks.pass_s(400.0)
    assert ends(ranks) == {0: "StallError", 1: "StallError"} | dict.fromkeys(range(2, 6), "CutOffError")


def test_ranks_that_may_be_back_soon_are_waited_for_before_sides_are_taken() -> None:
    ranks = Ranks(4, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=[0, 1, 2, 3])
    ranks.part({0, 1, 3}, {2})
    ranks.wait(0, 1, 3)
    ranks.pass_s(290.0)
    ranks.stopped = {3}
    ranks.pass_s(30.0)
    assert not any(ranks.cut_off.values())
    ranks.stopped = set()
    ranks.pass_s(20.0)
    assert [ranks.cut_off[rank] for rank in (0, 1, 3)] == [{2}] * 3
    assert ranks.errors == {}


def test_the_next_rank_decides_where_the_lowest_does_not() -> None:
    ranks = Ranks(3, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=[0, 1, 2])
    ranks.part({0, 1}, {2})
    ranks.wait(1)
    ranks.pass_s(590.0, training=(0,))
    assert not any(ranks.cut_off.values())
    ranks.pass_s(60.0, training=(0,))
    assert ranks.cut_off[0] == ranks.cut_off[1] == {2}


def test_where_mpi_cannot_be_told_the_job_ends() -> None:
    ranks = Ranks(3, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=[0, 1, 2])
    ranks.stopped = {2}
    for comm in ranks.comms:
        comm.declare_lost = lambda _: False  # type: ignore[method-assign]
    ranks.wait(0, 1)
    ranks.pass_s(310.0)
    assert ends(ranks) == {0: "StallError", 1: "StallError"}
    assert "this MPI cannot go on without ranks that it does not know to be lost" in str(ranks.errors[0])


def test_a_rank_that_is_cut_off_leaves_the_job_where_its_training_does_not_see_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone: list[str] = []
    monkeypatch.setattr(attendance.job, "leave_job", gone.append)
    ranks = Ranks(3, StallRules(WARNING_S, TIMEOUT, "drop"), hosts=[0, 1, 2])
    monkeypatch.setattr(ranks.comms[2], "spans_processes", True)
    ranks.part({0, 1}, {2})
    ranks.wait(2)
    ranks.pass_s(320.0)
    assert len(gone) >= 1
    assert gone[0].startswith("this rank leaves the job: held up for 300 s")


def test_a_pid_that_another_process_has_by_now_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2, StallRules(WARNING_S, TIMEOUT, "drop"))
    monkeypatch.setattr(attendance, "_born", lambda _: "later")
    ranks.stopped = {1}
    ranks.wait(0)
    ranks.pass_s(310.0)
    assert (ranks.killed, ranks.errors) == ([], {})


def test_the_job_is_ended_where_the_training_thread_does_not_see_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(attendance.job, "end_job", ended.append)
    for seen in (True, False):
        ranks = Ranks(2, StallRules(WARNING_S, TIMEOUT))
        monkeypatch.setattr(ranks.comms[0], "spans_processes", True)
        ranks.stopped = {1}
        ranks.wait(0)
        ranks.pass_s(301.0)
        ranks.errors[0].raised = seen
        assert ended == []
        ranks.pass_s(10.0)
        assert bool(ended) is not seen
        ended.clear()


# --- handles ----------------------------------------------------------------------------------------------------------


def stop(sync: ShadowSync) -> None:
    """Let this rank answer no more, as if it were stopped; its training thread is the caller's to hold."""
    assert sync._course.watch.attendance is not None
    sync._course.watch.attendance.look = lambda: None  # type: ignore[method-assign]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S - 5.0
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.01)


@pytest.mark.parametrize("algorithm", [ModelAveraging(), BMUF()], ids=lambda each: type(each).__name__)
def test_the_others_train_on_and_end_with_the_same_weights_once_it_is_back(
    algorithm: Algorithm, caplog: pytest.LogCaptureFixture
) -> None:
    """With S-EASGD nobody waits for a slow rank, only for one whose thread does not answer (real processes)."""
    reported = threading.Event()

    def program(comm: Communicator) -> bool:
        model = make_model(comm.rank)
        optimizer = sgd(model)
        with ShadowSync(
            optimizer, model=model, algorithm=algorithm, communicator=comm, sync_every=1, stall_warning_s=0.4
        ) as sync:
            train(model, optimizer, 5, stream=comm.rank)
            if comm.rank == 2:
                reported.wait(TIMEOUT_S)
            else:
                steps, wanted = 0, re.compile("for rank 2 on .*training, at step 5")
                while not any(map(wanted.search, warnings(caplog))) and steps < 10_000:
                    train(model, optimizer, 1, stream=comm.rank)
                    time.sleep(0.001)
                    steps += 1
                reported.set()
            train(model, optimizer, 5, stream=comm.rank)
            sync.synchronize()
            return identical_everywhere(sync, model)

    assert on_ranks(3, program) == [True] * 3
    assert any("for rank 2 on" in text and "training, at step 5" in text for text in warnings(caplog))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.leaves_threads
def test_at_the_time_out_the_error_is_raised_where_training_goes_on_and_where_it_waits(algorithm: Algorithm) -> None:
    done = threading.Event()

    def program(comm: Communicator) -> str:
        model = make_model(comm.rank)
        optimizer = sgd(model)
        sync = ShadowSync(
            optimizer, model=model, algorithm=algorithm, communicator=comm, sync_every=1,
            stall_warning_s=None, stall_timeout_s=3.0,
        )  # fmt: skip
        train(model, optimizer, 3, stream=comm.rank)
        sync.gather(None)
        if comm.rank == 2:
            stop(sync)
            sync.pause()
            done.wait(TIMEOUT_S)
            return "stopped"
        try:
            if comm.rank == 1:
                sync.synchronize()
            while not done.is_set():
                train(model, optimizer, 1, stream=comm.rank)
                time.sleep(0.001)
        except StallError as error:
            time.sleep(0.2)
            assert sync._course.watch.attendance is not None
            sync._course.watch.attendance.stop()
            return str(error)
        return "nothing"

    def ends(comm: Communicator) -> str:
        try:
            return program(comm)
        finally:
            if comm.rank == 0:
                done.set()

    first, second, _ = on_ranks(3, ends)
    assert first == second
    assert "held up for 3 s (stall_timeout_s) by rank 2 on" in first


@pytest.mark.parametrize("driver", [{"sync_every": 1}, {"sync_every": 1, "foreground": True}], ids=["back", "fore"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.leaves_threads
def test_a_dropped_rank_is_a_lost_one(algorithm: Algorithm, driver: dict[str, Any]) -> None:
    def program(comm: Communicator) -> Any:
        assert isinstance(comm, local.LocalCommunicator)
        model = make_model(comm.rank)
        optimizer = sgd(model)
        with ShadowSync(
            optimizer, model=model, algorithm=algorithm, communicator=comm,
            stall_warning_s=None, stall_timeout_s=3.0, on_stall="drop", **driver,
        ) as sync:  # fmt: skip
            train(model, optimizer, 3, stream=comm.rank)
            sync.gather(None)
            if comm.rank == 1:
                stop(sync)
                wait_for(lambda: comm.is_dead)
                sync.synchronize()
            while sync.size == 3:
                train(model, optimizer, 1, stream=comm.rank)
                if driver.get("foreground") or isinstance(algorithm, ElasticAveraging):
                    sync.gather(None)
                time.sleep(0.001)
            sync.synchronize()
            return sync.size, flat(model)

    first, dropped, second = local.run(3, program, timeout_s=TIMEOUT_S, kill={})
    assert dropped is None
    assert (first[0], second[0]) == (2, 2)
    assert torch.equal(first[1], second[1])


def test_a_handle_that_watches_nobody_has_no_thread_for_it() -> None:
    before = set(threading.enumerate())

    def program(comm: Communicator) -> int:
        optimizer = sgd(make_model())
        with ShadowSync(optimizer, communicator=comm, sync_every=1, stall_warning_s=None):
            comm.allgather_object(None)
            return len({each for each in threading.enumerate() if each.name == "shadow-attendance"} - before)

    assert on_ranks(2, program) == [0, 0]


def test_who_is_missing_in_a_lookup_is_said_as_well(caplog: pytest.LogCaptureFixture) -> None:
    reported = threading.Event()

    def program(comm: Communicator) -> None:
        table = EmbeddingTable("users", 10, 2, pooling="sum")
        module = ShardedEmbeddingBag([table], {"users": "row-wise"}, SGD(lr=0.1), communicator=comm)
        optimizer = sgd(model := torch.nn.Linear(2, 1))
        with ShadowSync(optimizer, model=model, communicator=comm, sync_every=1000, stall_warning_s=0.4):
            for step in range(3):
                if step == 2 and comm.rank == 1:
                    wait_for(lambda: any("in a lookup (forward) for rank 1 on" in text for text in warnings(caplog)))
                    reported.set()
                optimizer.zero_grad()
                model(module({"users": torch.arange(3)})).sum().backward()
                optimizer.step()
        module.close()

    on_ranks(2, program)
    assert reported.is_set()


# --- training that waits at a gap -------------------------------------------------------------------------------------


def gaps(sync: ShadowSync) -> int:
    metrics = sync.metrics()
    return int(metrics["steps"] - sync._course.driver._steps_merged) if sync._course.driver is not None else 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("apply", ["boundary", "hogwild"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("bound", [1, 3])
def test_slow_rounds_hold_training_at_the_bound(
    algorithm: Algorithm, bound: int, apply: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds are slow, and the budget and the interval would put them off for minutes."""
    from hvd_shadowsync import shadow

    run = shadow.Rounds.run

    def slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(shadow.Rounds, "run", slowly)

    def program(comm: Communicator) -> tuple[int, float, bool]:
        model = make_model(comm.rank)
        optimizer = sgd(model)
        widest = 0
        with ShadowSync(
            optimizer, model=model, algorithm=algorithm, communicator=comm, apply=apply, max_sync_gap=bound,
            sync_interval_ms=60_000, cpu_budget=1e-6,
        ) as sync:  # fmt: skip
            for step in range(12):
                train(model, optimizer, 1, stream=comm.rank, first=step)
                widest = max(widest, gaps(sync))
            sync.synchronize()
            return widest, sync.metrics()["gap_wait_ms"], identical_everywhere(sync, model)

    for widest, waited_ms, alike in on_ranks(2, program):
        assert widest <= bound
        assert waited_ms > 0
        assert alike


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("case", ["synchronize", "close", "gather", "no data", "pause", "add", "uneven", "reload"])
def test_nobody_waits_at_a_gap_for_ever(case: str, algorithm: Algorithm) -> None:
    """One rank does something else early, while the other one takes many steps at the bound."""

    def program(comm: Communicator) -> bool:
        model, more = make_model(comm.rank), torch.nn.Linear(2, 2)
        optimizer = sgd(model)
        other = comm.rank == 1
        with ShadowSync(
            optimizer, algorithm=algorithm, communicator=comm, sync_every=2, max_sync_gap=2, warmup_steps=1
        ) as sync:
            if not (other and case == "no data"):
                train(model, optimizer, 4, stream=comm.rank)
            if case == "pause":
                sync.pause()
                train(model, optimizer, 10, stream=comm.rank)
                sync.resume()
            if case == "add" and other:
                optimizer.add_param_group({"params": list(more.parameters())})
            if other and case == "close":
                return True
            if not (other and case in ("synchronize", "gather", "no data", "uneven")):
                train(model, optimizer, 20, stream=comm.rank)
            if case == "add" and not other:
                optimizer.add_param_group({"params": list(more.parameters())})
                train(model, optimizer, 3, stream=comm.rank)
            if case == "gather":
                assert sync.gather(comm.rank) == [0, 1]
            if case == "reload":
                sync.load_state_dict(sync.state_dict())
                train(model, optimizer, 10 if other else 14, stream=comm.rank)
            if case != "close":
                sync.synchronize()
            return True

    assert on_ranks(2, program) == [True, True]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: type(each).__name__)
@pytest.mark.leaves_threads
def test_a_lost_rank_does_not_hold_training_at_the_bound(algorithm: Algorithm) -> None:
    def program(comm: Communicator) -> Any:
        model = make_model(comm.rank)
        optimizer = sgd(model)
        with ShadowSync(optimizer, model=model, algorithm=algorithm, communicator=comm, max_sync_gap=1) as sync:
            for step in range(15):
                optimizer.zero_grad()
                loss_of(model, batch(comm.rank, step)).backward()
                optimizer.step()
            sync.synchronize()
            return flat(model)

    for call in range(20, 120, 9):
        first, _, third = local.run(3, program, timeout_s=TIMEOUT_S, kill={1: call})
        assert torch.equal(first, third), f"call {call}"


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"stall_warning_s": 0}, ValueError, r"stall_warning_s=0 is outside \(0, inf\)"),
        ({"stall_warning_s": "60"}, TypeError, "stall_warning_s='60' is not a number"),
        ({"stall_timeout_s": -1.0}, ValueError, r"stall_timeout_s=-1.0 is outside"),
        ({"stall_timeout_s": float("inf")}, ValueError, r"stall_timeout_s=inf is outside"),
        ({"on_stall": "kill"}, ValueError, "on_stall='kill' is unknown; give one of 'end', 'drop'"),
        ({"on_stall": "drop"}, ValueError, "on_stall='drop' needs stall_timeout_s"),
        ({"on_stall": "drop", "stall_timeout_s": 9.0}, ValueError, "launch it with `shadowrun --fault-tolerant`"),
        ({"max_sync_gap": 0}, ValueError, "max_sync_gap=0 is below 1"),
        ({"max_sync_gap": 2.0}, TypeError, "max_sync_gap=2.0 is not a whole number"),
        ({"max_sync_gap": 4, "sync_every": 5}, ValueError, "max_sync_gap=4 is below sync_every=5"),
        ({"max_sync_gap": 4, "sync_every": 1, "foreground": True}, ValueError, "no meaning in the foreground"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception], says: str) -> None:
    def program(comm: Communicator) -> None:
        with pytest.raises(error, match=says):
            ShadowSync(sgd(make_model()), communicator=comm, **options)

    on_ranks(2, program)


def test_tables_in_lockstep_are_refused_where_training_waits_at_a_gap() -> None:
    def program(comm: Communicator) -> None:
        table = EmbeddingTable("users", 10, 2, pooling="sum")
        module = ShardedEmbeddingBag([table], {"users": "row-wise"}, SGD(lr=0.1), communicator=comm)
        model = torch.nn.Sequential(module, torch.nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        with pytest.raises(ValueError, match="max_sync_gap=4 does not go with mode='alltoall' of the table 'users'"):
            ShadowSync(optimizer, model=model, communicator=comm, max_sync_gap=4)
        module.close()

    on_ranks(2, program)


@pytest.mark.parametrize("differs", ["stall_warning_s", "stall_timeout_s", "max_sync_gap"])
def test_they_are_the_same_on_every_rank(differs: str) -> None:
    def program(comm: Communicator) -> None:
        with pytest.raises(ReplicaMismatchError, match=r"argument (stalls|max_sync_gap)"):
            ShadowSync(sgd(make_model()), communicator=comm, **{differs: 5 + comm.rank})

    on_ranks(2, program)


def test_distributed_optimizer_passes_them_on() -> None:
    optimizer = DistributedOptimizer(
        sgd(make_model()), max_sync_gap=3, stall_warning_s=5.0, stall_timeout_s=9.0, on_stall="drop"
    )
    with optimizer.shadow as sync:
        assert sync._course.settings.stalls == StallRules(5.0, 9.0, "drop")
        assert sync._course.settings.max_sync_gap == 3


def test_alone_they_change_nothing() -> None:
    model = make_model()
    optimizer = sgd(model)
    (comm,) = local.world(1)
    with ShadowSync(optimizer, model=model, communicator=comm, max_sync_gap=1, stall_timeout_s=3.0, on_stall="drop"):
        train(model, optimizer, 10)
