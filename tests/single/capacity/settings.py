"""Settings whose outcomes can be reckoned by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hvd_shadowsync.capacity.setting import Chunking, Cluster, Costs, Job, Setting
from hvd_shadowsync.pacing import Pacing

FREE = Costs(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
WHOLE = Chunking(chunk_bytes=1e12, in_flight=1, pause_ms=0.0)
GB_A_SECOND = Cluster(hosts=4, gbps=8.0, goodput=1.0, latency_us=0.0)
PLAIN = Setting(
    Job(100e6, step_ms=50.0, batch=10.0), GB_A_SECOND, FREE, WHOLE, pacing=Pacing(sync_every=1), overlap=0.0
)
"""100 MB over links of 10^9 bytes/s in one piece, nothing else costs anything."""


def on(setting: Setting, **cluster: Any) -> Setting:
    """Return `setting` on another cluster."""
    return replace(setting, cluster=replace(setting.cluster, **cluster))
