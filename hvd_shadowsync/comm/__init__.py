"""Transports: one small interface, over MPI and over threads of one process."""

from hvd_shadowsync.comm.base import Communicator, Message, Request, SharedMemory

__all__ = ["Communicator", "Message", "Request", "SharedMemory"]
