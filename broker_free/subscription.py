"""Durable consumers as an application sees them: a subscription on the loop, and the jobs it yields.

The rules of leases are in `consumer.py`, kept by the owner thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from broker_free.consumer import Lease
from broker_free.errors import InvalidInput
from broker_free.message import Envelope
from broker_free.subject import check_pattern
from broker_free.tick import Tx

if TYPE_CHECKING:
    from broker_free.node import Node

T = TypeVar("T")

_LOOK_AGAIN_S = 1.0  # delayed jobs become due, and leases run out, without anything arriving


class Job:
    """A message handed to one durable consumer, under a lease. It comes back unless it is settled in time.

    Every method that settles raises LeaseLost, and writes nothing, when the job is not this consumer's any more: the
    lease is over, the subscription was closed, or the job was settled before.
    """

    def __init__(self, subscription: Subscription, envelope: Envelope, attempts: int, lease: Lease) -> None:
        self.envelope = envelope
        self.attempts = attempts  # earlier tries
        self._subscription = subscription
        self._lease = lease

    @property
    def subject(self) -> str:
        return self.envelope.subject

    @property
    def body(self) -> bytes:
        return self.envelope.body

    async def ack(self) -> None:
        """Say that the work is done. Returns once that is on disk."""
        await self.commit(_nothing)

    def commit(self, fn: Callable[..., T], *args: Any) -> Coroutine[Any, Any, T]:  # Any: handed through to fn
        """Run `fn(tx, *args)` and settle the job in one transaction: what `fn` writes happens exactly once.

        `fn` is a plain function and runs only while the lease is still this consumer's. If it raises, nothing is
        written and the job stays leased. Returns what `fn` returned, once it is on disk.
        """
        return self._subscription.node.commit_job(self._lease, fn, *args)

    async def nak(self, delay_ms: int = 0) -> None:
        """Give it back, to be handed out again after a delay."""
        await self._subscription.node.return_job(self._lease, delay_ms)

    async def progress(self) -> None:
        """Start the lease anew, because the work takes longer."""
        await self._subscription.node.extend_lease(self._lease, self._subscription.lease_ms)


def _nothing(tx: Tx) -> None:
    """An ack writes nothing of its own."""


class Subscription:
    """A durable consumer: an async context manager and an async iterator over jobs, oldest first.

    Several may be open under one durable name: each job goes to one of them at a time.
    """

    def __init__(self, node: Node, pattern: str, *, durable: str, lease_ms: int, number: int) -> None:
        check_pattern(pattern)
        if lease_ms <= 0:
            raise InvalidInput(f"a lease of {lease_ms} ms; it must be positive")
        self.node = node
        self.pattern = pattern
        self.durable = durable
        self.lease_ms = lease_ms
        self.number = number  # among the subscriptions of this node
        self._consumer = 0
        self._fetched: deque[Job] = deque()
        self._fetching: asyncio.Task[list[tuple[Envelope, int, Lease]]] | None = None
        self._wake = asyncio.Event()

    async def __aenter__(self) -> Subscription:
        self._consumer = await self.node.open_consumer(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
        self._fetched.clear()
        self.node.close_consumer(self)

    def __aiter__(self) -> AsyncIterator[Job]:
        return self

    async def __anext__(self) -> Job:
        while not self._fetched:
            self._wake.clear()
            await self._fetch()
            if not self._fetched:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(_LOOK_AGAIN_S, self.lease_ms / 1_000)):
                        await self._wake.wait()
        job = self._fetched.popleft()
        self.node.start_lease(job._lease, self.lease_ms)
        return job

    def notify(self) -> None:
        self._wake.set()

    async def _fetch(self) -> None:
        """Have free jobs reserved. A caller that is cancelled meanwhile leaves them to the next call."""
        if self._fetching is None:
            self._fetching = asyncio.ensure_future(self.node.fetch_jobs(self._consumer, self.number))
            self._fetching.add_done_callback(self._take)
        await asyncio.shield(self._fetching)

    def _take(self, fetching: asyncio.Task[list[tuple[Envelope, int, Lease]]]) -> None:
        self._fetching = None
        if not fetching.cancelled() and fetching.exception() is None:
            self._fetched.extend(Job(self, *found) for found in fetching.result())
