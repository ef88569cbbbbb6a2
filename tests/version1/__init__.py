"""A node as it was with protocol version 1: its frames and its link, byte for byte, in today's tick.

`Tick1` is today's `Tick` over links of version 1. Every frame goes through bytes both ways, so that what such a node
reads is what its own decoder makes of it, and what it cannot read is dropped as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from broker_free import frames as frames_now
from broker_free import link as link_now
from broker_free.errors import InvalidInput
from broker_free.frames import Frame
from broker_free.limits import Limits
from broker_free.link import Action, Ledger
from broker_free.tick import Tick
from tests.version1 import frames, link


class _Ledger:
    """Today's store, asked the questions of version 1."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def in_doubt(self, peer: str, limit: int) -> list[str]:
        return [message_id for message_id, _ in self._ledger.in_doubt(peer, limit)]

    def queued_after(self, peer: str, row: int, *, messages: int, size: int) -> list[link.Queued]:
        rows = self._ledger.queued_after(peer, row, messages=messages, size=size)
        return [link.Queued(row=one.row, id=one.id, meta=one.meta, body=one.body) for one in rows]

    def held(self, peer: str, ids: Sequence[str]) -> list[tuple[int, int]]:
        return self._ledger.held(peer, ids, ()).have

    def last_acked(self, peer: str) -> tuple[str, int] | None:
        return self._ledger.last_acked(peer)

    def lacks(self, peer: str, message_id: str, row: int) -> bool:
        return self._ledger.lacks(peer, message_id, row)


class Link1:
    """`broker_free.link.Link` to look at, version 1 inside."""

    is_blocked = False
    is_eager = True  # it always was
    version = 1

    def __init__(
        self,
        *,
        me: str,
        boot: int,
        peer: str,
        about: Callable[[], Mapping[str, Any]],
        ledger: Ledger,
        limits: Limits,
        random: Random,
        steady: Callable[[], int] = lambda: 0,
    ) -> None:
        self.peer = peer
        self._limits = limits
        self._old = link.Link(
            me=me, boot=boot, peer=peer, about=about, ledger=_Ledger(ledger), limits=limits, random=random
        )

    def __getattr__(self, name: str) -> Any:
        """Hand on what is the same: is_open, conn, cursor, wants_dial, dialling, hold_back, redial_now …"""
        return getattr(self._old, name)

    @property
    def credit(self) -> tuple[int, int]:
        session = self._old._session
        return (session.credit_messages, session.credit_bytes) if session else (0, 0)

    def has(self, feature: str) -> bool:
        return False

    def may_have_left(self, row: int) -> bool:
        return True

    def want(self) -> None:
        """It dials anyway."""

    def idle_ms(self, now_ms: int) -> int:
        return 0

    def grant(self, messages: int, kib: int) -> list[Action]:
        return []

    def ephemeral(self, meta: bytes, body: bytes) -> list[Action]:
        return []

    def offer(self, queued: link_now.Queued) -> bool:
        return self._old.offer(link.Queued(row=queued.row, id=queued.id, meta=queued.meta, body=queued.body))

    def on_frame(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        try:
            old = frames.decode(frames_now.encode(frame), self._limits)
        except InvalidInput:
            return []
        return self._now(self._old.on_frame(conn, old, now_ms))

    def on_unsent(self, conn: int, now_ms: int) -> list[Action]:
        return self._now(self._old.drop("could not send", now_ms)) if self._old.conn == conn else []

    def on_connected(self, conn: int, now_ms: int) -> list[Action]:
        return self._now(self._old.on_connected(conn, now_ms))

    def on_closed(self, conn: int, reason: str, now_ms: int) -> list[Action]:
        return self._now(self._old.on_closed(conn, reason, now_ms))

    def on_tick(self, now_ms: int) -> list[Action]:
        return self._now(self._old.on_tick(now_ms))

    def ping(self, now_ms: int) -> list[Action]:
        return self._now(self._old.ping(now_ms))

    def pump(self) -> list[Action]:
        return self._now(self._old.pump())

    def flush(self) -> list[Action]:
        return self._now(self._old.flush())

    def drop(self, reason: str, now_ms: int) -> list[Action]:
        return self._now(self._old.drop(reason, now_ms))

    def committed(self, *, session: int, seq: int, row: int, at: int) -> list[Action]:
        return self._now(self._old.committed(session=session, seq=seq, row=row, at=at))

    def reject(self, *, session: int, seq: int, reason: str) -> list[Action]:
        return self._now(self._old.reject(session=session, seq=seq, reason=reason))

    def tell(
        self, kind: int, body: bytes, meta: Mapping[str, Any] | None = None, *, flags: int = 0
    ) -> list[Action]:
        if kind not in (frames.INTEREST, frames.REGISTRY) or flags:
            return []  # it did not know of anything else
        return self._now(self._old.tell(kind, body, meta))

    def _now(self, actions: Sequence[link.Action]) -> list[Action]:
        return [self._one(action) for action in actions]

    def _one(self, action: link.Action) -> Action:
        match action:
            case link.Send(conn, frame):
                return link_now.Send(conn, frames_now.decode(frames.encode(frame), self._limits))
            case link.Rejected(_, message_id, reason):
                return link_now.Rejected(message_id, reason)
            case link.Control(frame):
                return link_now.Control(frames_now.decode(frames.encode(frame), self._limits))
        same = getattr(link_now, type(action).__name__)
        values = (getattr(action, name) for name in type(action).__slots__)
        return same(*values)  # type: ignore[no-any-return]  # one of today's, by name


class Tick1(Tick):
    """A node of version 1."""

    link_type = Link1  # type: ignore[assignment]  # it has what a tick asks for
