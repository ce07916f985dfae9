"""What an algorithm is: a frozen dataclass of hyper-parameters with pure `init` and `update`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from hvd_shadowsync.checks import check_interval


class NoState(NamedTuple):
    """The state of an algorithm that remembers nothing."""


State = Any
"""A named tuple of flat tensors, each with one element per weight; who runs rounds owns it, the checkpoint saves it."""


@dataclass(frozen=True)
class Algorithm(ABC):
    """A synchronisation algorithm: how replicas are reduced to one vector, and what that vector makes of the anchor.

    `init` and `update` are pure and element-wise: `update` is called with matching slices of the reduced vector and
    of every state tensor, one slice after the other, so that a slice can be updated while the next is under way.
    No algorithm knows threads, MPI or time.

    Attributes:
        alpha: share of the way to the anchor that a replica goes in a round, in (0, 1].
    """

    alpha: float

    asynchronous: ClassVar[bool] = False
    """Whether a rank exchanges with a center on its own, without meeting the others (ElasticAveraging)."""

    def __post_init__(self) -> None:
        check_interval("alpha", self.alpha, low=0.0, high=1.0, low_included=False)

    def describe(self) -> dict[str, Any]:
        """Return its name and hyper-parameters, as a checkpoint has them."""
        return {"name": type(self).__name__, **asdict(self)}

    @abstractmethod
    def init(self, params: Tensor) -> State:
        """Return the state before the first round, for the weights `params` (flat) that all replicas start from."""

    @abstractmethod
    def update(self, reduced: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the anchor that replicas are pulled to, and the new state; `reduced` comes from the reducer."""

    def rebase(self, mean: Tensor, state: State) -> State:
        """Return the state after all replicas were set to `mean` (flat)."""
        return state

    @abstractmethod
    def surviving_progress(self, merge: str, size: int) -> float:
        """Return the share of the steps made while a round is in flight that survives, rounds back to back.

        Closed forms for `size` replicas that all move alike, with `merge` "delta" or "interpolate".
        """


def slices(state: State, part: slice) -> State:
    """Return `state` with each tensor narrowed to `part` (views)."""
    return type(state)(*(tensor[part] for tensor in state))


def named(state: State) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the names and tensors of `state`."""
    return iter(zip(state._fields, state, strict=True))
