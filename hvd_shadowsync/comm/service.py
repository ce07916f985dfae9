"""Requests answered by the owner's communicator thread: two-sided messages, no collectives, no lockstep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_shadowsync.comm.base import Communicator, Request
from hvd_shadowsync.comm.poll import Poller

Answer = Callable[[int, int, Tensor], Tensor]
"""(source rank, tag, receive buffer) -> reply; the payload begins the buffer, its length follows from the tag."""

Ask = tuple[int, int, Tensor] | tuple[int, int, Tensor, Tensor]
"""(owner, tag, payload), and memory for the reply where it is not as long as the payload."""


@dataclass(eq=False)
class _Call:
    """A request on its way in or a reply on its way out, with the buffer it needs."""

    request: Request
    source: int
    tag: int
    buffer: Tensor


@dataclass
class Service:
    """Both sides of a request/response exchange between ranks, for one thread per rank.

    As a client, `call` sends payloads to their owners and yields the replies as they arrive, a bounded number in
    flight. As a server, `serve` answers what has come in; it must be called all the time by the thread that owns the
    service, and is called while `call` waits. Requests and replies travel on communicators of their own, so that a
    rank may be client and server at once.

    Attributes:
        requests, replies: communicators used by this service alone.
        answer: makes a reply; runs in the serving thread.
        largest: a tensor as long as the longest payload, of its dtype (the template of receive buffers, which are used
            again); None: payloads of any length are received as bytes, in buffers of their own.
        in_flight: calls of this client under way at a time.
    """

    requests: Communicator
    replies: Communicator
    answer: Answer
    largest: Tensor | None
    poller: Poller
    in_flight: int = 8
    _incoming: list[_Call] = field(default_factory=list)
    _outgoing: list[_Call] = field(default_factory=list)
    _spare: list[Tensor] = field(default_factory=list)

    def call(self, calls: Iterable[Ask]) -> Iterator[tuple[int, Tensor]]:
        """Send each `(owner, tag, payload)`; yield `(tag, reply)` as the replies arrive, each as long as its payload.

        A fourth element is memory for a reply of another length. The calls under way to one owner have different tags;
        payloads stay untouched until their reply is there.
        """
        waiting = iter(calls)
        flying: list[_Flight] = []
        polls = 0
        while True:
            while len(flying) < self.in_flight and (call := next(waiting, None)) is not None:
                flying.append(self._send(*call))
            if not flying:
                return
            landed = [flight for flight in flying if flight.test()]
            flying = [flight for flight in flying if flight not in landed]
            for flight in landed:
                yield flight.tag, flight.reply
            worked = self.serve() or bool(landed)
            polls = 0 if worked else polls + 1
            self.poller.pause(polls)

    def serve(self) -> bool:
        """Take in requests, answer the complete ones, let go of delivered replies; tell whether anything was done."""
        worked = self._take_in()
        for call in [call for call in self._incoming if call.request.test()]:
            self._incoming.remove(call)
            reply = self.answer(call.source, call.tag, call.buffer)
            call.request = self.replies.isend(reply, call.source, call.tag)
            self._outgoing.append(call)
            worked = True
        for call in [call for call in self._outgoing if call.request.test()]:
            self._outgoing.remove(call)
            if self.largest is not None:
                self._spare.append(call.buffer)
        return worked

    @property
    def idle(self) -> bool:
        """Whether nothing is under way on the server's side."""
        return not self._incoming and not self._outgoing

    def _take_in(self) -> bool:
        taken = False
        while (message := self.requests.probe()) is not None:
            if self.largest is None:
                buffer = torch.empty(message.num_bytes, dtype=torch.uint8)
            else:
                buffer = self._spare.pop() if self._spare else self.largest.new_empty(self.largest.shape)
            self._incoming.append(_Call(message.irecv(buffer), message.source, message.tag, buffer))
            taken = True
        return taken

    def _send(self, owner: int, tag: int, payload: Tensor, reply: Tensor | None = None) -> _Flight:
        reply = payload.new_empty(payload.shape) if reply is None else reply
        received = self.replies.irecv(reply, owner, tag)
        return _Flight(tag, reply, [self.requests.isend(payload, owner, tag), received])


@dataclass(eq=False)
class _Flight:
    tag: int
    reply: Tensor
    requests: list[Request]

    def test(self) -> bool:
        self.requests = [request for request in self.requests if not request.test()]
        return not self.requests
