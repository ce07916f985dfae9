"""The exceptions of hvd_shadowsync that are not a plain ValueError or TypeError."""

from __future__ import annotations


class ShadowSyncError(RuntimeError):
    """Background synchronisation failed; raised in the training thread, with the shadow thread's error as its cause."""


class ReplicaMismatchError(ShadowSyncError, ValueError):
    """The replicas of a job differ where they must agree; raised on every rank with the first difference named."""


class TransportError(ShadowSyncError):
    """MPI is missing, was started the wrong way, or lacks what the communicator thread needs."""


class RankLostError(TransportError):
    """A rank of a communicator is gone, or another one has found so; those that are left go on without it.

    Raised where the job outlives its ranks (`Communicator.outlives_ranks`); rounds deal with it themselves.
    """


class StallError(ShadowSyncError):
    """Ranks have held the others up for longer than `stall_timeout_s`; raised on every rank that is there."""

    raised = False
    """Whether the training thread has got it."""


class CutOffError(StallError):
    """This rank cannot reach most of the others, which go on without it: it ends, and harms nobody by that."""


class CheckpointError(ShadowSyncError, ValueError):
    """A checkpoint cannot be read, or does not fit the model that it is loaded into."""


class EmbeddingError(ShadowSyncError, ValueError):
    """A lookup or update of sharded embeddings cannot go on; raised on every rank, with the rank that it is about."""
