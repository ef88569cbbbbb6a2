"""The simulated schedules on the real store: every answer of `Store` is that of the dictionaries beside it.

Two things in one: the store keeps the core's promises under crashes and failing commits, and `SimJournal`, on which
the many schedules run, is faithful.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from broker_free import store as stores
from broker_free.limits import Limits
from broker_free.link import Held, Queued
from broker_free.membership import Member
from broker_free.message import Envelope, Message
from broker_free.registry import Entry
from broker_free.store import INBOX_DEAD, OUTBOX_STATES, Store
from broker_free.testing import SMALL, Cluster, Crashed, Faults, Image, SimJournal
from broker_free.tick import Accepted
from tests.simulate import quiet

UTC = 1_700_000_000_000


def the_same(simulated: Any, real: Any) -> Any:
    assert simulated == real
    return simulated


class TwinJournal(SimJournal):
    """Do everything twice, in dictionaries and in SQLite, and compare what both say."""

    folder: Path  # set by the fixture
    number = count()

    def __init__(self, me: str, *, limits: Limits = SMALL) -> None:
        super().__init__(me, limits=limits)
        self._path = self.folder / f"{next(self.number)}.db"
        self._members: Sequence[str] = ()
        self._effects: Any = lambda subject: ()
        self._files: list[tuple[Image, bytes]] = []
        self._reopen()

    def _reopen(self) -> None:
        self._store = Store(self._path, me=self._me, limits=self._limits)
        self._store.open()
        self._store.has_effect = self._effects

    def meet(self, members: Sequence[str], effects: Any) -> None:
        """Be told, as a node's store is, who belongs to the mesh and for which subjects there are effects."""
        self._members = members
        self._effects = self._store.has_effect = effects
        self._save_members()

    def _save_members(self) -> None:
        real = self.real
        real.begin()
        for name in self._members:
            real.save_member(Member(node_id=name, name=name, public_key=b"", endpoints=()), UTC)
        real.commit()

    @property
    def real(self) -> Store:
        """The store, with this thread's models bound to it: here several share a thread."""
        stores.CURRENT.obj = self._store._db
        return self._store

    def close(self) -> None:
        self.real.close()

    # -- transactions ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        super().begin()
        self.real.begin()

    def commit(self) -> None:
        try:
            super().commit()
        except Crashed:
            if self._undo is None:  # the crash came after the commit
                self.real.commit()
            raise
        self.real.commit()

    def rollback(self) -> None:
        super().rollback()
        self.real.rollback()

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        with super().savepoint(), self.real.savepoint():
            yield

    def crash(self) -> None:
        super().crash()
        self.close()
        self._reopen()

    def snapshot(self) -> Image:
        image = super().snapshot()
        self._files.append((image, self.real._conn.serialize()))
        return image

    def restore(self, image: Image | None) -> None:
        super().restore(image)
        self.close()
        for each in self.folder.glob(f"{self._path.name}*"):
            each.unlink()
        if image is not None:
            self._path.write_bytes(next(saved for kept, saved in self._files if kept is image))
        self._reopen()
        self._save_members()

    # -- what is written ------------------------------------------------------------------------------------

    def accept(
        self,
        sender: str,
        lane: int,
        records: Sequence[tuple[bytes, bytes]],
        now_ms: int,
        ttls: Sequence[int] = (),
    ) -> list[Accepted]:
        return the_same(  # type: ignore[no-any-return]  # what goes in comes out
            super().accept(sender, lane, records, now_ms, ttls),
            self.real.accept(sender, lane, records, now_ms, ttls),
        )

    def settle(self, row: int) -> None:
        super().settle(row)
        self.real.settle(row)

    def failed(self, row: int, reason: str, now_ms: int) -> None:
        super().failed(row, reason, now_ms)
        self.real.failed(row, reason, now_ms)

    def due(self, now_ms: int, limit: int) -> list[Envelope]:
        return the_same(super().due(now_ms, limit), self.real.due(now_ms, limit))  # type: ignore[no-any-return]  # as above

    def has_due(self, now_ms: int) -> bool:
        return bool(the_same(super().has_due(now_ms), self.real.has_due(now_ms)))

    def enqueue(
        self,
        message: Message,
        meta: bytes,
        recipients: Sequence[str],
        *,
        ttl_ms: int | None,
        now_ms: int,
        may_repeat: bool = True,
    ) -> list[tuple[str, int]]:
        rows = super().enqueue(message, meta, recipients, ttl_ms=ttl_ms, now_ms=now_ms, may_repeat=may_repeat)
        real = self.real.enqueue(
            message, meta, recipients, ttl_ms=ttl_ms, now_ms=now_ms, may_repeat=may_repeat
        )
        return the_same(rows, real)  # type: ignore[no-any-return]  # as above

    def write_queued(self) -> None:
        super().write_queued()
        self.real.write_queued()

    def mark_delivered(self, rows: Sequence[tuple[str, int]], now_ms: int) -> None:
        super().mark_delivered(rows, now_ms)
        self.real.mark_delivered(rows, now_ms)

    def mark_delivered_ids(self, peer: str, ids: Sequence[str], now_ms: int) -> None:
        super().mark_delivered_ids(peer, ids, now_ms)
        self.real.mark_delivered_ids(peer, ids, now_ms)

    def mark_dead(self, peer: str, message_id: str, reason: str, now_ms: int) -> bool:
        is_dead = super().mark_dead(peer, message_id, reason, now_ms)
        return bool(the_same(is_dead, self.real.mark_dead(peer, message_id, reason, now_ms)))

    def mark_expired(self, peer: str, message_id: str, now_ms: int) -> bool:
        is_over = super().mark_expired(peer, message_id, now_ms)
        return bool(the_same(is_over, self.real.mark_expired(peer, message_id, now_ms)))

    def note_receipt(self, row: int, state: str, now_ms: int) -> None:
        super().note_receipt(row, state, now_ms)
        self.real.note_receipt(row, state, now_ms)
        the_same(self.receipt_peers >= self.real.receipt_peers, True)
        self.real.receipt_peers.clear()

    def receipts(self, peer: str, limit: int) -> list[tuple[str, str]]:
        return the_same(super().receipts(peer, limit), self.real.receipts(peer, limit))  # type: ignore[no-any-return]  # as above

    def drop_receipts(self, peer: str, ids: Sequence[str]) -> None:
        super().drop_receipts(peer, ids)
        self.real.drop_receipts(peer, ids)

    def take_receipts(self, peer: str, receipts: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
        return the_same(super().take_receipts(peer, receipts), self.real.take_receipts(peer, receipts))  # type: ignore[no-any-return]  # as above

    @property
    def newest_outbox_row(self) -> int:
        return int(the_same(super().newest_outbox_row, self.real.newest_outbox_row))

    def outbox_of(self, message_id: str) -> list[tuple[str, int, str, bool]]:
        return the_same(super().outbox_of(message_id), self.real.outbox_of(message_id))  # type: ignore[no-any-return]  # as above

    def mark_cancelled(self, row: int, now_ms: int) -> None:
        super().mark_cancelled(row, now_ms)
        self.real.mark_cancelled(row, now_ms)

    def mark_revoking(self, row: int) -> None:
        super().mark_revoking(row)
        self.real.mark_revoking(row)

    def revoking(self, peer: str, limit: int) -> list[tuple[str, bytes]]:
        return the_same(super().revoking(peer, limit), self.real.revoking(peer, limit))  # type: ignore[no-any-return]  # as above

    def settle_revoked(
        self, peer: str, *, held: Sequence[str], free: Sequence[str], now_ms: int
    ) -> tuple[list[str], list[str]]:
        return the_same(  # type: ignore[no-any-return]  # as above
            super().settle_revoked(peer, held=held, free=free, now_ms=now_ms),
            self.real.settle_revoked(peer, held=held, free=free, now_ms=now_ms),
        )

    def unrevoke(self, peer: str) -> None:
        super().unrevoke(peer)
        self.real.unrevoke(peer)

    def note_acked(self, peer: str, message_id: str, row: int) -> None:
        super().note_acked(peer, message_id, row)
        self.real.note_acked(peer, message_id, row)

    def requeue(self, peer: str, now_ms: int) -> int:
        return int(the_same(super().requeue(peer, now_ms), self.real.requeue(peer, now_ms)))

    def expire(self, peer: str, *, beyond_row: int, now_ms: int) -> list[str]:
        return the_same(  # type: ignore[no-any-return]  # as above
            super().expire(peer, beyond_row=beyond_row, now_ms=now_ms),
            self.real.expire(peer, beyond_row=beyond_row, now_ms=now_ms),
        )

    def registry_save(self, entries: Sequence[Entry]) -> None:
        super().registry_save(entries)
        self.real.registry_save(entries)

    def registry_drop(self, keys: Sequence[tuple[str, str]]) -> None:
        super().registry_drop(keys)
        self.real.registry_drop(keys)

    def registry_note(self, name: str, value: int) -> None:
        super().registry_note(name, value)
        self.real.registry_note(name, value)

    def registry_notes(self) -> dict[str, int]:
        return the_same(super().registry_notes(), self.real.registry_notes())  # type: ignore[no-any-return]  # as above

    def save_interest(self, peer: str, patterns: Sequence[str]) -> None:
        super().save_interest(peer, patterns)
        self.real.save_interest(peer, patterns)

    # -- what is read ---------------------------------------------------------------------------------------

    def in_doubt(self, peer: str, limit: int) -> list[tuple[str, bytes]]:
        return the_same(super().in_doubt(peer, limit), self.real.in_doubt(peer, limit))  # type: ignore[no-any-return]  # as above

    def queued_after(self, peer: str, row: int, *, messages: int, size: int) -> list[Queued]:
        return the_same(  # type: ignore[no-any-return]  # as above
            super().queued_after(peer, row, messages=messages, size=size),
            self.real.queued_after(peer, row, messages=messages, size=size),
        )

    def held(self, peer: str, ids: Sequence[str], digests: Sequence[bytes]) -> Held:
        return the_same(super().held(peer, ids, digests), self.real.held(peer, ids, digests))  # type: ignore[no-any-return]  # as above

    def last_acked(self, peer: str) -> tuple[str, int] | None:
        return the_same(super().last_acked(peer), self.real.last_acked(peer))  # type: ignore[no-any-return]  # as above

    def lacks(self, peer: str, message_id: str, row: int) -> bool:
        return bool(the_same(super().lacks(peer, message_id, row), self.real.lacks(peer, message_id, row)))

    def registry_load(self) -> list[Entry]:
        simulated = {e.at: e for e in super().registry_load()}
        the_same(simulated, {e.at: e for e in self.real.registry_load()})
        return list(simulated.values())

    def interests(self) -> dict[str, tuple[str, ...]]:
        real = {member.node_id: member.interests for member in self.real.members() if member.interests}
        return the_same({peer: kept for peer, kept in super().interests().items() if kept}, real)  # type: ignore[no-any-return]  # as above

    def compare(self) -> None:
        """Compare what no question of the core reaches: the states of all rows."""
        real = self.real._conn
        outbox = dict(real.execute("SELECT row, state FROM outbox").fetchall())
        assert {row: kept.state for row, kept in self.outbox.items()} == {
            row: OUTBOX_STATES[state] for row, state in outbox.items()
        }
        inbox = dict(real.execute("SELECT row, state FROM inbox").fetchall())
        names = {stores.NEW: "new", stores.DONE: "done", INBOX_DEAD: "dead"}
        assert {row: kept.state for row, kept in self.inbox.items()} == {
            row: names[state] for row, state in inbox.items()
        }
        assert real.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.fixture
def journals(tmp_path: Path) -> type[TwinJournal]:
    class Here(TwinJournal):
        folder = tmp_path

    return Here


@pytest.mark.parametrize("seed", range(30))
def test_the_real_store_answers_as_the_simulated_one(seed: int, journals: type[TwinJournal]) -> None:
    faults = Faults(rollback=0.2 * (seed % 3 == 0))
    cluster = Cluster(seed, nodes=2 + seed % 2, journal=journals, faults=faults)
    twins = {name: node.journal for name, node in cluster.nodes.items()}
    for name, twin in twins.items():
        assert isinstance(twin, TwinJournal)
        node = cluster.nodes[name]
        twin.meet(node.members, lambda subject, node=node: node.tick and node.tick.effects_of(subject))
    with quiet():
        cluster.chaos(ms=1_000, operations=12)
        cluster.heal()
    cluster.check()
    for twin in twins.values():
        assert isinstance(twin, TwinJournal)
        twin.compare()
        twin.close()
