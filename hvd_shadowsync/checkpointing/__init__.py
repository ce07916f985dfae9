"""Checkpoints beside training: written in the background, whole or not at all, found again after whatever happened."""

from hvd_shadowsync.checkpointing.checkpointer import Checkpointer
from hvd_shadowsync.checkpointing.folder import latest

__all__ = ["Checkpointer", "latest"]
