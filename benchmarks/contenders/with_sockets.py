"""No synchronisation, and beside it what an emulated network costs by itself: a replica's bytes, every k steps, through
plain sockets, without MPI, sums or weights that change.

Each rank sends as many bytes to the next as a ring allreduce does, 2 (P - 1) / P of the replica, and receives as many.
Where the cores that train carry the packets of emulated hosts as well, this is what the packets take of them.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from contender import Asked, Contender, Place

PORT = 29411
CONNECT_S = 30.0


class Ring:
    """Sends in one thread and receives in another, whenever `begin` says so and all of the last time has come.

    Args:
        place: this rank.
        num_bytes: to send, and to receive.
    """

    def __init__(self, place: Place, num_bytes: int) -> None:
        self._out, self._in = memoryview(bytearray(num_bytes)), memoryview(bytearray(num_bytes))
        self._following, self._previous = neighbours(place)
        self._due = threading.Semaphore(0)
        self._in_flight_s = 0.0
        self.paused = False
        self.asked = self.rounds = 0
        for work in (self._send, self._receive):
            threading.Thread(target=work, daemon=True).start()

    def begin(self) -> None:
        """Send a replica's bytes, unless the previous rank's of the last time have not come."""
        if self.asked <= self.rounds and not self.paused:
            self.asked += 1
            self._due.release()

    def pause(self) -> None:
        """Begin nothing more."""
        self.paused = True

    def resume(self) -> None:
        """Begin again."""
        self.paused = False

    def metrics(self) -> dict[str, float]:
        """Return the counters."""
        return {"rounds": self.rounds, "in_flight_ms": 1000 * self._in_flight_s / max(self.rounds, 1)}

    def close(self) -> None:
        """End the connections."""
        self._following.close()

    def _send(self) -> None:
        while self._due.acquire():
            try:
                self._following.sendall(self._out)
            except OSError:
                return

    def _receive(self) -> None:
        while True:
            received, begun = 0, 0.0
            while received < len(self._in):
                try:
                    count = self._previous.recv_into(self._in[received:])
                except OSError:
                    return
                if not count:
                    return
                begun = begun if received else time.monotonic()
                received += count
            self._in_flight_s += time.monotonic() - begun
            self.rounds += 1


def neighbours(place: Place) -> tuple[socket.socket, socket.socket]:
    """Return connections to the next rank and from the previous one."""
    hosts = [each.split("=")[0] for each in os.environ.get("SHADOW_EMULATED", "").split(",") if each]
    addresses = [(hosts[rank], PORT) if hosts else ("127.0.0.1", PORT + rank) for rank in range(place.size)]
    with socket.create_server(addresses[place.rank]) as listening:
        following = connected(addresses[(place.rank + 1) % place.size])
        previous, _ = listening.accept()
    return following, previous


def connected(address: tuple[str, int]) -> socket.socket:
    """Return a connection, once somebody listens there."""
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            return socket.create_connection(address, timeout=None)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def make(asked: Asked) -> Contender:
    """Return the model and its own optimizer, which begins to send every `asked.every` steps."""
    if asked.place.size == 1:
        raise ValueError("sockets join ranks; give at least 2 hosts")
    optimizer = asked.task.optimizer()
    replica_bytes = sum(each.nbytes for each in asked.task.model.parameters())
    ring = Ring(asked.place, 2 * (asked.place.size - 1) * replica_bytes // asked.place.size)
    steps = 0

    def stepped(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps % asked.every == 0:
            ring.begin()

    optimizer.register_step_post_hook(stepped)
    return Contender(
        asked.task.model, optimizer, period_steps=None, sync_gap_steps=None, metrics=ring.metrics, pause=ring.pause,
        resume=ring.resume, close=ring.close,
    )  # fmt: skip
