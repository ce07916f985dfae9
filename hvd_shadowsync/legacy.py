"""What a rank that takes a lost one's place gets besides: optimizer state, and what of the model is not averaged."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from hvd_shadowsync.alike import values_of
from hvd_shadowsync.replica import Replica

ATTEMPTS = 20


class TrainingState:
    """The state of `optimizer` and the values of `rest`; implements `rounds.Legacy`.

    Read beside training, as snapshots are: some of it may be from before a step and some from after.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rest: Replica) -> None:
        self._optimizer, self._rest = optimizer, rest

    def give(self) -> bytes:
        """See `rounds.Legacy.give`."""
        file = io.BytesIO()
        torch.save({"optimizer": self._state(), "rest": values_of([self._rest])}, file)
        return file.getvalue()

    def take(self, given: bytes) -> None:
        """See `rounds.Legacy.take`."""
        saved = torch.load(io.BytesIO(given), map_location="cpu", weights_only=True)
        self._optimizer.load_state_dict(saved["optimizer"])
        [(flat, integers)] = saved["rest"]
        self._rest.write(flat, integers)

    def _state(self) -> dict[str, Any]:
        """Return what `optimizer.state_dict()` does, without its hooks, which are the training thread's."""
        groups: list[dict[str, Any]] = []
        params: list[Tensor] = []
        for group in self._optimizer.param_groups:
            indices = list(range(len(params), len(params) + len(group["params"])))
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": indices})
            params += group["params"]
        state = {index: self._state_of(param) for index, param in enumerate(params)}
        return {"state": {index: each for index, each in state.items() if each}, "param_groups": groups}

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        for attempt in range(ATTEMPTS):
            try:
                own = dict(self._optimizer.state[param]) if param in self._optimizer.state else {}
            except RuntimeError:  # the training thread has just made it
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            return {k: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in own.items()}
        raise AssertionError("not reached")
