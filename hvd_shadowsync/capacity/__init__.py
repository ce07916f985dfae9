"""The capacity model: what per-step allreduce, fixed-rate rounds and shadow rounds come to on so many hosts.

`python -m hvd_shadowsync.capacity --dense-mb 200 --step-ms 40 --hosts 1000 --gbps 25` prints a table. In Python:

    setting = Setting(Job(dense_bytes=200e6, step_ms=40, batch=256), Cluster(hosts=1000, gbps=25))
    predict(setting, "shadow").sync_gap_steps, simulate(setting, "shadow", seed=1).sync_gap_steps

It models time, not quality: how large a sync gap a model bears has to be tried. It leaves out sharded embeddings and
their traffic, switches that are fuller than a host's link, lost packets, stalls of communicator threads, and what a
framework does beside its reductions (Horovod's thread wakes every millisecond, say).
"""

from hvd_shadowsync.capacity.reduction import Reduction, background, foreground, per_step
from hvd_shadowsync.capacity.setting import Chunking, Cluster, Costs, Job, Setting, Unevenness
from hvd_shadowsync.capacity.simulation import simulate
from hvd_shadowsync.capacity.ways import WAYS, Prediction, predict

__all__ = [
    "WAYS",
    "Chunking",
    "Cluster",
    "Costs",
    "Job",
    "Prediction",
    "Reduction",
    "Setting",
    "Unevenness",
    "background",
    "foreground",
    "per_step",
    "predict",
    "simulate",
]
