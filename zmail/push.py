"""Tell a running session that briefs are waiting: when, how often, and as one notice for several.

A notice is a hint. What is unread lives in the store, behind `Ledger`; a notice that is lost costs time, never mail.
So the order is: committed, posted into the session, written down as announced. This file knows no table, no wire
and no socket: a `PushSession` posts, the `Ledger` (postoffice.py) says what is waiting and keeps what was told.
Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from broker_free.errors import NodeClosed
from zmail.render import notice_text

log = logging.getLogger(__name__)

SOCKET = "socket"  # the name of this door: the session's own inbox socket

# Claude Code drops, silently, what exceeds a bucket of 30 posts for each sender, refilled at one every two seconds
# (2.1.329). One bucket for each mailbox, whoever sends, stays inside that whatever the mix of senders is.
BURST = 30
REFILL_PER_S = 0.5
RETRY_S = 15.0  # a session's inbox may open late, or be back after a while; a try costs one line
NOTIFY_TIMEOUT_S = 10.0  # a relay answers in milliseconds; one that does not is as good as gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What a notice says about one brief."""

    delivery: int  # its number in the mailbox
    lease_number: int  # of the holder that is to be told: the next one has not heard of it
    id: str
    callsign: str  # of the sender
    address: str  # of the sender, with its node
    sender_class: str
    title: str
    priority: str

    def shape(self) -> dict[str, str]:
        """The keys of a brief's JSON shape that a notice shows."""
        return {
            "id": self.id,
            "from": self.address,
            "sender_class": self.sender_class,
            "title": self.title,
            "priority": self.priority,
        }


class PushSession(Protocol):
    """A way into one running session."""

    async def notify(self, text: str, sender: str) -> bool:
        """Post a notice. True once it has been written to the session, False when it cannot be."""
        ...


class Ledger(Protocol):
    """The store as push needs it."""

    async def waiting(self, callsign: str) -> Sequence[Waiting]:
        """Return the unread briefs that the present holder of `callsign` was not told of, oldest first."""
        ...

    def left(self, callsign: str) -> None:
        """The last session of `callsign` has gone."""
        ...

    async def announced(self, told: Sequence[Waiting], *, door: str) -> None:
        """Write down that a notice of these briefs went through `door`."""
        ...


class Bucket:
    """A token bucket. Pure: time comes in as seconds of a monotonic clock."""

    def __init__(self, now_s: float) -> None:
        self._tokens = float(BURST)
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Return how long until there is a token; 0 when there is one."""
        self._refill(now_s)
        return max(0.0, (1.0 - self._tokens) / REFILL_PER_S)

    def take(self, now_s: float) -> None:
        self._refill(now_s)
        self._tokens -= 1.0

    def _refill(self, now_s: float) -> None:
        self._tokens = min(float(BURST), self._tokens + (now_s - self._at_s) * REFILL_PER_S)
        self._at_s = now_s


class Push:
    """The sessions that can be told, by callsign. The newest session of a callsign gets the notices."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, retry_s: float = RETRY_S) -> None:
        self._clock = clock
        self._retry_s = retry_s
        self._ledger: Ledger | None = None
        self._desks: dict[str, _Desk] = {}
        self._buckets: dict[str, Bucket] = {}  # outlive a reconnect: the session's guard does too

    def serve(self, ledger: Ledger) -> None:
        """Say whose briefs are announced; the post office does this once, before any session attaches."""
        self._ledger = ledger

    def attach(self, callsign: str, session: PushSession) -> Callable[[], None]:
        """Announce the briefs of `callsign` to `session`, those already waiting first. Returns how to stop."""
        assert self._ledger is not None, "serve() comes before attach()"
        if (desk := self._desks.get(callsign)) is None:
            bucket = self._buckets.setdefault(callsign, Bucket(self._clock()))
            desk = self._desks[callsign] = _Desk(callsign, self._ledger, bucket, self._clock, self._retry_s)
        desk.sessions.append(session)
        desk.wanted.set()

        def detach() -> None:
            if session in desk.sessions:
                desk.sessions.remove(session)
            if not desk.sessions and self._desks.get(callsign) is desk:
                del self._desks[callsign]
                desk.task.cancel()
                desk.ledger.left(callsign)

        return detach

    def arrived(self, callsign: str) -> None:
        """There is something new for `callsign`, and it is on disk."""
        if desk := self._desks.get(callsign):
            desk.wanted.set()

    def door_of(self, callsign: str) -> str | None:
        """Name the door through which a notice would go now."""
        return SOCKET if callsign in self._desks else None

    async def close(self) -> None:
        """Stop announcing. What is waiting stays waiting."""
        tasks = [desk.task for desk in self._desks.values()]
        self._desks.clear()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


class _Desk:
    """One callsign's sessions and the one task that tells them, so that there is one notice at a time."""

    def __init__(
        self, callsign: str, ledger: Ledger, bucket: Bucket, clock: Callable[[], float], retry_s: float
    ) -> None:
        self.sessions: list[PushSession] = []
        self.wanted = asyncio.Event()
        self._callsign = callsign
        self.ledger = ledger
        self._bucket = bucket
        self._clock = clock
        self._retry_s = retry_s
        self.task = asyncio.get_running_loop().create_task(self._run(), name=f"push {callsign}")

    async def _run(self) -> None:
        """While a notice is on its way, what arrives waits and goes as the next one."""
        while True:
            await self.wanted.wait()
            self.wanted.clear()
            if (pause_s := self._bucket.wait_s(self._clock())) > 0:
                await asyncio.sleep(pause_s)
            try:
                await self._announce()
            except NodeClosed:
                return
            except Exception:  # keeps the other notices of this mailbox coming
                log.exception("a notice failed", extra={"callsign": self._callsign})

    async def _announce(self) -> None:
        waiting = await self.ledger.waiting(self._callsign)
        if not waiting or not self.sessions:
            return
        self._bucket.take(self._clock())
        if await self._notify(self.sessions[-1], waiting):
            await self.ledger.announced(waiting, door=SOCKET)
            log.info("announced", extra={"callsign": self._callsign, "briefs": len(waiting), "door": SOCKET})
        else:
            # They stay as they are, and are told of again: after a while, with the next brief or at the next attach.
            asyncio.get_running_loop().call_later(self._retry_s, self.wanted.set)
            log.warning("a notice did not reach the session", extra={"callsign": self._callsign})

    async def _notify(self, session: PushSession, waiting: Sequence[Waiting]) -> bool:
        try:
            async with asyncio.timeout(NOTIFY_TIMEOUT_S):
                return await session.notify(
                    notice_text([each.shape() for each in waiting]), sender_of(waiting)
                )
        except (TimeoutError, OSError):
            return False


def sender_of(waiting: Sequence[Waiting]) -> str:
    """Name whom the notice comes from: the sender, or zmail itself when there are several."""
    callsigns = {brief.callsign for brief in waiting}
    return f"zmail:{callsigns.pop()}" if len(callsigns) == 1 else "zmail"
