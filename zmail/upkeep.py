"""What the post office does without being asked: acks written down, dead sessions noticed, lifetimes ended.

Nothing here is needed for mail to arrive. It keeps what people are shown true, and whatever it misses while no node
runs it finds at the next start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from broker_free import Node, Tx
from broker_free.errors import NodeClosed
from zmail import filing, leases
from zmail.directory import BUCKET
from zmail.leases import Judge
from zmail.models import UNREAD, Brief, Delivery
from zmail.receipts import Moves
from zmail.states import DEAD, DELIVERED, EXPIRED
from zmail.wire import Receipt

log = logging.getLogger(__name__)

SLICE = 50  # rows a transaction, at half a millisecond each: everybody else waits meanwhile
TEND_S = 15.0  # how long a session that died without a word may look alive


class Upkeep:
    """Two loops over one node. `start` runs them, `close` ends them."""

    def __init__(self, node: Node, *, judge: Judge, moves: Callable[[Tx], Moves]) -> None:
        self.wanted = asyncio.Event()  # set it to have the house kept now
        self._node = node
        self._judge = judge
        self._moves = moves
        self._settled: list[tuple[str, str, str, str | None]] = []  # (message id, peer, state, reason)
        self._settled_some = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._roster_at = -1  # the revision of the registry that was last compared with the mailboxes
        node.on_delivered(self._on_delivered)
        node.on_dead(self._on_dead)

    async def start(self) -> None:
        """Catch up with what happened while no node ran, then keep at it."""
        await self._catch_up()
        await self.tend()
        for work in (self._follow_settled, self._keep_house):
            self._tasks.append(asyncio.create_task(work(), name=f"upkeep: {work.__name__}"))

    async def close(self) -> None:
        """Stop. What is left to do is found again by the next start."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()

    def _on_delivered(self, acked: list[tuple[str, str]]) -> None:
        self._settled += [(message_id, peer, DELIVERED, None) for message_id, peer in acked]
        self._settled_some.set()

    def _on_dead(self, dead: list[tuple[str, str, str]]) -> None:
        self._settled += [
            (message_id, peer, EXPIRED if reason == "expired" else DEAD, reason)
            for message_id, peer, reason in dead
        ]
        self._settled_some.set()

    async def _follow_settled(self) -> None:
        """Write down what became of messages at their nodes. What comes while one batch is written is the next."""
        while True:
            await self._settled_some.wait()
            self._settled_some.clear()
            settled, self._settled = self._settled, []
            await self._survive(self._settle(settled))

    async def _settle(self, settled: Sequence[tuple[str, str, str, str | None]]) -> None:
        queued = await self._node.read(lambda _: filing.queued_here({each[0] for each in settled}))
        ours = [each for each in settled if (each[0], each[1]) in queued]
        for start in range(0, len(ours), SLICE):
            await self._node.transact(self._write_settled, ours[start : start + SLICE])

    def _write_settled(self, tx: Tx, settled: Sequence[tuple[str, str, str, str | None]]) -> None:
        moves = self._moves(tx)
        for message_id, peer, state, reason in settled:
            receipt = Receipt(brief=message_id, callsign=None, state=state, at_ms=tx.now_ms, reason=reason)
            moves.hear(peer, [receipt])

    async def _catch_up(self) -> None:
        """Find acks that came just before the last node ended, after its store had them and before we did."""
        settled = await self._node.read(filing.settled_unnoticed)
        for start in range(0, len(settled), SLICE):
            await self._node.transact(self._write_settled, settled[start : start + SLICE])

    async def _keep_house(self) -> None:
        while True:
            with suppress(TimeoutError):
                # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the event.
                async with asyncio.timeout(TEND_S):
                    await self.wanted.wait()
            self.wanted.clear()
            await self._survive(self.tend())

    async def tend(self) -> None:
        """Show as offline whose session has died, and let briefs expire whose lifetime is over."""
        now_ms = time.time_ns() // 1_000_000
        fallen = await self._node.read(lambda _: leases.fallen(self._judge))
        if fallen:
            await self._node.transact(leases.take_offline, fallen, self._judge)
        await self._set_roster_right()
        is_over = UNREAD & (Delivery.expires_ms <= now_ms)
        while await self._node.read(lambda _: Delivery.select().where(is_over).exists()):
            await self._node.transact(self._expire, now_ms)

    async def _set_roster_right(self) -> None:
        callsigns = self._node.registry(BUCKET)
        if callsigns.revision == self._roster_at:
            return
        self._roster_at = callsigns.revision
        mine = f"{self._node.node_id}."
        told = {each.key.removeprefix(mine): each.value or {} for each in callsigns.entries(f"{mine}>")}
        if astray := await self._node.read(lambda _: leases.astray(told)):
            await self._node.transact(leases.set_right, astray)

    def _expire(self, tx: Tx, now_ms: int) -> None:
        moves = self._moves(tx)
        for delivery in Delivery.select().where(UNREAD, Delivery.expires_ms <= now_ms).limit(SLICE):
            moves.move(Brief.get_by_id(delivery.brief), delivery, EXPIRED)
        moves.tell()

    async def _survive(self, work: Awaitable[None]) -> None:
        """The edge of both loops: an error in one round must not end them."""
        try:
            await work
        except NodeClosed:
            pass
        except Exception:
            log.exception("house-keeping failed")
