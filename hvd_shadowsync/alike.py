"""Replicas that start alike: which tensors of a model that takes, and giving all ranks those of one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator
from hvd_shadowsync.comm.poll import Poller
from hvd_shadowsync.owned import is_owned
from hvd_shadowsync.replica import NamedTensor, Replica


def whole_model(replica: Replica, model: torch.nn.Module | None, *, buffers: bool) -> list[Replica]:
    """Return what is synchronised, and what is not but has to start alike: frozen parameters, and other `buffers`."""
    known = {id(each.tensor) for each in replica.tensors + replica.integers}
    everything = {} if model is None else model.state_dict(keep_vars=True)
    tensors = {n: t for n, t in everything.items() if isinstance(t, Tensor) and not is_owned(t)}
    rest = [NamedTensor(n, t) for n, t in tensors.items() if id(t) not in known]
    if buffers:
        return [replica, Replica([], rest)]
    frozen = [each for each in rest if isinstance(each.tensor, torch.nn.Parameter)]
    return [Replica(replica.params), Replica([], frozen)]


def bytes_everywhere(comm: Communicator, poller: Poller, own: bytes) -> bytes:
    """Return the bytes of rank 0 on every rank (collective)."""
    size = torch.tensor([len(own)], dtype=torch.int64)
    poller.wait([comm.ibcast(size)])
    content = torch.empty(int(size), dtype=torch.uint8)
    if own:
        content.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    poller.wait([comm.ibcast(content)])
    return content.numpy().tobytes()


Values = list[tuple[Tensor, Tensor]]
"""Of each replica its flat vector and its integers."""


def values_of(replicas: Iterable[Replica]) -> Values:
    """Return what the live tensors hold."""
    values = [(each, each.empty(), each.empty_integers()) for each in replicas]
    for replica, flat, integers in values:
        replica.read(flat, integers)
    return [(flat, integers) for _, flat, integers in values]


def values_everywhere(comm: Communicator, poller: Poller, values: Values, *, root: int) -> Values:
    """Return the values of rank `root` on every rank (collective)."""
    given = [(flat.clone(), integers.clone()) for flat, integers in values]
    for pair in given:
        poller.wait([comm.ibcast(tensor, root) for tensor in pair])
    return given
