"""What one process knows of spares, and says to others; MPI is a stand-in that keeps what is said."""

from __future__ import annotations

import os
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hvd_shadowsync import ElasticAveraging, ShadowSync, ending
from hvd_shadowsync.comm import mpi, spares
from hvd_shadowsync.comm.echo import EchoCommunicator
from hvd_shadowsync.comm.spares import MOST_HOSTS, Spares, Tag
from hvd_shadowsync.embedding import EmbeddingTable, RowWiseAdagrad, ShardedEmbeddingBag
from hvd_shadowsync.errors import ShadowSyncError, TransportError

HANDLE = 0


class Group(list[int]):
    """Processes, by their numbers in the world."""

    Incl = Free = lambda self, *_: self
    size = property(len)

    @staticmethod
    def Translate_ranks(own: Group, places: list[int], _: Group) -> list[int]:
        return [own[place] for place in places]


class World:
    """mpi4py's MPI, and its communicators, as one process of `size` sees them."""

    Exception, ANY_SOURCE, ANY_TAG, BYTE, GROUP_EMPTY = RuntimeError, -1, -1, None, Group()

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.group = rank, size, Group(range(size))
        self.COMM_WORLD = self.COMM_SELF = self.Comm = self
        self.Group, self.gone = Group, Group()
        self.inbox: list[tuple[int, Tag, bytes]] = []
        self.said: list[tuple[int, Tag, list[int]]] = []
        self.pairs = 0

    def Shrink(self) -> World:
        return self

    Dup = Shrink

    def Split(self, *_: int) -> World:
        return self

    def Create_group(self, *_: object) -> str:
        self.pairs += 1
        return "a pair"

    def Agree(self, done: int) -> int:
        return done

    def allgather(self, own: object) -> list[object]:
        return [own] * self.size

    def Get_processor_name(self) -> str:
        return "a host"

    def Status(self) -> SimpleNamespace:
        return SimpleNamespace()

    def Create_keyval(self, **_: object) -> None: ...

    def Set_attr(self, *_: object) -> None: ...

    def Get_failed(self) -> Group:
        return Group(self.gone)

    def Isend(self, buffer: list[Any], place: int, tag: int) -> SimpleNamespace:
        self.said.append((place, Tag(tag), list(struct.unpack(f"{len(buffer[0]) // 8}q", buffer[0]))))
        return SimpleNamespace(Test=lambda: True)

    def Improbe(self, _: int, __: int, status: SimpleNamespace) -> SimpleNamespace | None:
        if not self.inbox:
            return None
        status.source, status.tag, payload = self.inbox.pop(0)
        status.Get_count = lambda _: len(payload)

        def receive(buffer: list[Any]) -> None:
            buffer[0][:] = payload

        return SimpleNamespace(Recv=receive)

    def hear(self, source: int, tag: Tag, *values: int) -> None:
        self.inbox.append((source, tag, struct.pack(f"{len(values)}q", *values)))

    def told(self, tag: Tag) -> list[int]:
        """To whom that was said."""
        return [place for place, each, _ in self.said if each is tag]


@pytest.fixture(autouse=True)
def _is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spares, "_take_names", lambda *_: None)
    monkeypatch.setattr(spares.atexit, "register", lambda *_: None)  # type: ignore[attr-defined]
    monkeypatch.setenv(ending.SPEAKER_VARIABLE, str(os.getpid()))


def answer_all(world: World) -> None:
    """Let all that were asked answer, once."""
    for place, tag, values in list(world.said):
        if tag is Tag.ASK:
            world.hear(place, Tag.ANSWER, values[1])


def test_one_that_was_ready_is_a_candidate_once_it_has_answered() -> None:
    """And is taken in only if it answers again."""
    world = World(0, 4)
    known = Spares(world, 1)
    known.summon([1])
    assert world.told(Tag.CALL) == [3]
    assert known.candidate(HANDLE, [1]) is None
    world.hear(3, Tag.READY, HANDLE, 1)
    assert known.candidate(HANDLE, [1]) is None
    assert known.candidate(HANDLE, [1]) is None
    assert world.told(Tag.ASK) == [3]
    answer_all(world)
    assert known.candidate(HANDLE, [1]) == (3, 1)
    assert known.candidate(HANDLE, [2]) is None
    world.Isend = lambda buffer, place, tag: (  # type: ignore[method-assign]
        world.hear(3, Tag.ANSWER, struct.unpack("2q", buffer[0])[1]),
        SimpleNamespace(Test=lambda: True),
    )[1]
    assert known.answers(HANDLE, 3)


def test_one_that_does_not_answer_a_second_time_is_given_up_and_the_next_one_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spares, "ANSWER_S", 0.0)
    world = World(0, 5)
    known = Spares(world, 2)
    known.summon([1])
    world.hear(3, Tag.READY, HANDLE, 1)
    known.candidate(HANDLE, [1])
    answer_all(world)
    assert known.candidate(HANDLE, [1]) == (3, 1)
    assert not known.answers(HANDLE, 3)
    assert known.candidate(HANDLE, [1]) is None
    assert world.told(Tag.GIVEN_UP) == [3]
    known.summon([1])
    assert world.told(Tag.CALL) == [3, 4]


@pytest.mark.parametrize("was_ready", [False, True])
def test_one_that_takes_too_long_is_given_up_and_the_next_one_called(
    was_ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is ready, or until it answers."""
    world = World(0, 5)
    known = Spares(world, 2)
    known.summon([1])
    known.summon([1])
    if was_ready:
        world.hear(3, Tag.READY, HANDLE, 1)
        known.candidate(HANDLE, [1])
        known.summon([1])
    assert world.told(Tag.CALL) == [3]
    monkeypatch.setattr(spares, "READY_S", -1.0)
    known.summon([1])
    assert world.told(Tag.GIVEN_UP) == [3]
    assert world.told(Tag.CALL) == [3, 4]


def test_one_that_is_ready_and_not_wanted_yet_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 4)
    known = Spares(world, 1)
    known.summon([1])
    world.hear(3, Tag.READY, HANDLE, 1)
    monkeypatch.setattr(spares, "READY_S", -1.0)
    known.summon([1])
    assert world.told(Tag.GIVEN_UP) == []


def test_one_that_has_become_the_first_rank_does_not_give_itself_up(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(2, 4)
    known = Spares(world, 2)
    world.hear(0, Tag.CALL, 1)
    known.look()
    monkeypatch.setattr(spares, "READY_S", -1.0)
    known.summon([0])
    assert (world.told(Tag.CALL), world.told(Tag.GIVEN_UP)) == ([3], [])


def test_one_of_the_first_ranks_has_to_be_left() -> None:
    """Another has no communicator with a spare."""
    for rank, can in ((MOST_HOSTS - 1, True), (MOST_HOSTS, False)):
        world = World(rank, MOST_HOSTS + 3)
        known = Spares(world, 1)
        assert world.pairs == can
        world.hear(MOST_HOSTS + 2, Tag.READY, HANDLE, 1)
        known.candidate(HANDLE, [1])
        answer_all(world)
        assert (known.candidate(HANDLE, [1]) is not None) == can


def test_a_child_that_a_rank_has_forked_does_not_say_that_it_comes_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(0, 4)
    known = Spares(world, 1)
    monkeypatch.setenv(ending.SPEAKER_VARIABLE, str(os.getpid() + 1))
    known.leave()
    assert world.told(Tag.DONE) == []
    monkeypatch.setenv(ending.SPEAKER_VARIABLE, str(os.getpid()))
    known.leave()
    known.leave()
    assert world.told(Tag.DONE) == [1, 2, 3]


@pytest.fixture
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "load_mpi", lambda: SimpleNamespace(COMM_WORLD=None))
    monkeypatch.setattr(mpi, "check_launch", lambda _: None)


@pytest.mark.usefixtures("_no_launch")
@pytest.mark.parametrize(
    ("has_changed", "is_spare", "ranks"), [(True, False, None), (True, True, None), (False, False, [0, 1])]
)
def test_new_communicators_and_process_sets_are_refused(
    has_changed: bool, is_spare: bool, ranks: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SimpleNamespace(has_changed=has_changed, is_spare=is_spare, size=3)
    monkeypatch.setattr(spares, "here", lambda: known)
    with pytest.raises(TransportError, match="make handles and broadcasts at the start, without a process_set"):
        mpi.world(ranks)
    if ranks is None:
        model = torch.nn.Linear(1, 1)
        with pytest.raises(TransportError, match="make handles"):
            ShadowSync(torch.optim.SGD(model.parameters(), lr=0.1), model=model, algorithm=ElasticAveraging())


@pytest.mark.usefixtures("_no_launch")
def test_a_replacement_begins_alone_and_cannot_have_sharded_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(has_changed=False, is_spare=True, size=3)
    monkeypatch.setattr(spares, "here", lambda: known)
    assert isinstance(mpi.world(), EchoCommunicator)
    with pytest.raises(ShadowSyncError, match="lost"):
        ShardedEmbeddingBag([EmbeddingTable("users", 10, 4)], optimizer=RowWiseAdagrad(lr=0.1))
