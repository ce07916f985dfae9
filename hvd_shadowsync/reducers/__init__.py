"""Reducers: one vector out of the snapshots of all ranks, slice by slice, over a communicator."""

from hvd_shadowsync.reducers.base import Reducer
from hvd_shadowsync.reducers.elastic import ElasticCenter, ElasticInTurn, gather_center
from hvd_shadowsync.reducers.hierarchical import HierarchicalMean, Hosts
from hvd_shadowsync.reducers.host import HostMean, HostMemory
from hvd_shadowsync.reducers.mean import AllReduceMean, ChunkedMean, OwnerMean

__all__ = [
    "AllReduceMean",
    "ChunkedMean",
    "ElasticCenter",
    "ElasticInTurn",
    "HierarchicalMean",
    "HostMean",
    "HostMemory",
    "Hosts",
    "OwnerMean",
    "Reducer",
    "gather_center",
]
