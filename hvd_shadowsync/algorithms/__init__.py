"""The update rules: pure, one module each."""

from hvd_shadowsync.algorithms.base import Algorithm
from hvd_shadowsync.algorithms.bmuf import BMUF
from hvd_shadowsync.algorithms.easgd import ElasticAveraging
from hvd_shadowsync.algorithms.ma import ModelAveraging

__all__ = ["BMUF", "Algorithm", "ElasticAveraging", "ModelAveraging"]
