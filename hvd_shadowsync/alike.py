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


def start_alike(comm: Communicator, poller: Poller, replicas: Iterable[Replica], *, root: int) -> None:
    """Give every rank the values of rank `root` (collective)."""
    for replica in replicas:
        flat, integers = replica.empty(), replica.empty_integers()
        replica.read(flat, integers)
        poller.wait([comm.ibcast(flat, root), comm.ibcast(integers, root)])
        replica.write(flat, integers)
