"""A whole mesh in one thread, under one seed: for testing broker_free, and systems that are built on it.

`Cluster(seed)` runs the very `Tick` that a real node runs, over stores in dictionaries (`SimJournal`) and a network
that loses, delays and cuts (`SimNetwork`). Time is simulated, so an hour of faults takes milliseconds, and a seed
replays the same schedule every time. `check` holds the promises against what happened.

    cluster = Cluster(seed=7, nodes=3)
    cluster.effect("orders.*", file_order)                  # the function under test, on every node
    cluster.run(500)                                        # the nodes start and find each other
    cluster.publish("n0", "orders.created", b"...", to=["n1", "n2"])
    cluster.chaos(ms=3_000, operations=30)                  # publishes, crashes, cuts, failing commits, partitions
    cluster.heal()
    cluster.check()                                         # raises Violation, naming the invariant

An effect under test is the plain function that `Node.effect` takes; it may `tx.publish` and `tx.registry_put`. What it
keeps elsewhere must be kept by node and undone with the transaction, as an application's tables are in a real node;
look at `inbox` rather than at lists of your own. Let it draw nothing but from `cluster.random` and iterate over no
sets, or a seed will not replay. Work of your own runs by `publish` and `transact`, faults of your own by `crash`,
`part`, `go_back` and `SimNode.journal.fail`; `run` lets time pass. `Faults` says how often `chaos` does what,
`counts` what really happened, and `Cluster(seed, trace=print)` tells it line by line. `examples/simulated.py` is a
whole test. Failing commits are logged as in a real node: quiet the logger "broker_free" if they are not news.

What is simulated is what a process can meet: a frame, a connection, a commit, a clock. Not simulated: SQLite, the
disk, ZeroMQ and threads; they have tests of their own. Nothing here reads the wall clock or opens a file.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any, Final, Literal, NamedTuple

from broker_free import frames
from broker_free.errors import Conflict, InvalidInput, OutcomeUnknown, StoreFailed
from broker_free.frames import Frame
from broker_free.limits import Limits
from broker_free.link import Held, Queued
from broker_free.message import CONFLICT, Envelope, Message, digest_of, parse_metadata, refusal_of
from broker_free.registry import Entry, Registry
from broker_free.tick import CANCELLED, Accepted, Effect, Outcome, Publish, Tick, Transact, Tx, Work

EPOCH_MS: Final = 1_700_000_000_000  # UTC at the start of every simulation

# Small bounds, so that a short schedule meets every one of them: a full credit, a resync that cannot list all.
SMALL: Final = Limits(
    credit_messages=4,
    credit_kib=1,
    in_doubt_max=3,
    pack_messages_max=3,
    pack_bytes_max=512,
    registry_frame_bytes_max=300,
)

# I6. After the last fault, the slowest way back: a message in flight over a connection that died without a sign.
# 15 s without progress, 5 s for the PONG; the redial is refused by a peer that still trusts the dead connection and
# takes 5 s more to find out; then a beat (2 s) or the first back-off (0.25 s), dial, greeting, and the backlog.
DRAIN_MS_MAX: Final = 30_000


class Violation(AssertionError):
    """A promise was broken. `invariant` is its number in the protocol document (I1, I2, …)."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}")
        self.invariant = invariant


class Crashed(BaseException):
    """The simulated process ends here. Not an Exception: nothing in a node may catch it."""


class FakeClock:
    """A monotonic and a UTC clock that move only when told to."""

    def __init__(self, *, ms: int = 0, utc_ms: int = EPOCH_MS) -> None:
        self.now_ms = ms  # monotonic
        self._utc_offset_ms = utc_ms - ms

    def ms(self) -> int:
        return self.now_ms

    def utc_ms(self) -> int:
        return self.now_ms + self._utc_offset_ms

    def advance(self, *, ms: int) -> None:
        assert ms >= 0, "monotonic time does not go back"
        self.now_ms += ms

    def jump(self, *, ms: int) -> None:
        """Set UTC forward or, with a negative number, back, as an administrator or NTP does."""
        self._utc_offset_ms += ms


# The store -------------------------------------------------------------------------------------------------------


class OutboxRow(NamedTuple):
    peer: str
    queued: Queued
    expires_ms: int
    state: Literal["queued", "revoking", "delivered", "expired", "cancelled", "dead"] = "queued"
    settled_ms: int = 0
    reason: str = ""
    may_repeat: bool = True


class InboxRow(NamedTuple):
    sender: str
    id: str
    lane: int
    meta: bytes
    body: bytes
    subject: str
    state: Literal["new", "done", "dead"] = "new"
    attempts: int = 0


@dataclass(slots=True)
class Attempt:
    """One try to queue one message for one peer. Outlives crashes: it is the observer's knowledge, not the node's."""

    sender: str
    peer: str
    id: str
    meta: bytes
    body: bytes
    row: int
    state: Literal["open", "kept", "undone", "void", "forgotten"] = "open"
    # kept: committed · undone: rolled back, though it may have left early · void: rolled back and never left
    # forgotten: was kept, then the store was restored to an older state


class Image(NamedTuple):
    """The committed state of a journal at one moment."""

    inbox: dict[int, InboxRow]
    known: dict[tuple[str, str], int]
    due: dict[int, int]
    lifetimes: dict[int, int]
    outbox: dict[int, OutboxRow]
    rows_of: dict[tuple[str, str], int]
    queued: dict[str, dict[int, Queued]]
    acked: dict[str, tuple[str, int]]
    receipts_due: dict[tuple[str, str], str]
    receipts_taken: dict[tuple[str, str], str]
    registry: dict[tuple[str, str], Entry]
    registry_notes: dict[str, int]
    interests: dict[str, tuple[str, ...]]


_MISSING: Final = object()


class SimJournal:
    """`tick.Journal` in dictionaries. Writes go into the tables at once and into an undo log, like SQLite's.

    Attributes of the test, not of the store: `fail` (where the next transaction fails), `history` (all attempts
    to queue), and the two hooks around the commit.
    """

    def __init__(self, me: str, *, limits: Limits = SMALL) -> None:
        self._me = me
        self._limits = limits
        self._load(_empty())
        self.receipt_peers: set[str] = set()
        self._undo: list[tuple[dict[Any, Any], Any, Any]] | None = None  # Any: tables of every kind
        self._open: list[Attempt] = []
        self.fail: Literal["", "begin", "write", "commit"] = ""
        self.history: list[Attempt] = []
        self.counts: Counter[str] = Counter()  # what happened, for the test to see
        self.undone: list[Attempt] = []  # of the transaction that was rolled back last
        self.before_commit: Callable[[], None] = _nothing
        self.after_commit: Callable[[], None] = _nothing

    def _load(self, image: Image) -> None:
        self.inbox = image.inbox
        self.known = image.known
        self._due = image.due
        self.lifetimes = image.lifetimes
        self.outbox = image.outbox
        self._rows_of = image.rows_of
        self.queued = image.queued
        self.acked = image.acked
        self.receipts_due = image.receipts_due
        self.receipts_taken = image.receipts_taken
        self._registry = image.registry
        self._registry_notes = image.registry_notes
        self._interests = image.interests
        self._number_on()
        self.inbox_committed = self._numbers["inbox"] - 1  # the newest committed row

    def _number_on(self) -> None:
        """Go on behind the newest row, as a store does that has just been opened or rolled back."""
        self._numbers = {
            "inbox": next(reversed(self.inbox), 0) + 1,
            "outbox": next(reversed(self.outbox), 0) + 1,
        }

    # -- transactions ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        assert self._undo is None, "a transaction inside a transaction"
        self._fail_at("begin")
        self._undo = []

    def commit(self) -> None:
        self._fail_at("commit")
        self.before_commit()
        self._undo = None
        self.inbox_committed = self._numbers["inbox"] - 1
        for attempt in self._open:
            attempt.state = "kept"
        self._open = []
        self.after_commit()

    def rollback(self) -> None:
        if self._undo is not None:
            self._undo_to(0)
            self._undo = None
        self._number_on()
        for attempt in self._open:
            attempt.state = "undone"
        self.undone, self._open = self._open, []

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        assert self._undo is not None
        mark, opened = len(self._undo), len(self._open)
        try:
            yield
        except BaseException:
            self._undo_to(mark)
            for attempt in self._open[opened:]:
                attempt.state = "void"
            del self._open[opened:]
            raise

    def crash(self) -> None:
        """Lose what is not committed."""
        self.rollback()
        self.fail = ""

    def snapshot(self) -> Image:
        """Copy the committed state."""
        assert self._undo is None
        queued = {peer: dict(rows) for peer, rows in self.queued.items()}
        return Image(
            inbox=dict(self.inbox),
            known=dict(self.known),
            due=dict(self._due),
            lifetimes=dict(self.lifetimes),
            outbox=dict(self.outbox),
            rows_of=dict(self._rows_of),
            queued=queued,
            acked=dict(self.acked),
            receipts_due=dict(self.receipts_due),
            receipts_taken=dict(self.receipts_taken),
            registry=dict(self._registry),
            registry_notes=dict(self._registry_notes),
            interests=dict(self._interests),
        )

    def restore(self, image: Image | None) -> None:
        """Go back to a snapshot, or to an empty store: an old backup, a lost disk."""
        self.crash()
        given_up = {
            number for number, row in self.outbox.items() if row.state in ("cancelled", "expired", "dead")
        }
        self._load(image or _empty())
        self._load(self.snapshot())  # the image stays as it is, for another time
        claimed: set[int] = set()
        for attempt in reversed(self.history):
            if attempt.state in ("kept", "forgotten"):  # a backup may know what an older one did not
                is_known = self._remembers(attempt) and attempt.row not in claimed
                attempt.state = "kept" if is_known else "forgotten"
                if is_known and attempt.peer != self._me:
                    claimed.add(attempt.row)
        # What was withdrawn after the backup is queued in it: it is sent, for the first time now, behind the rest.
        for attempt in list(self.history):
            is_given_up = attempt.state == "kept" and attempt.peer != self._me and attempt.row in given_up
            if is_given_up and self.outbox[attempt.row].state in ("queued", "revoking"):
                self.history.append(replace(attempt))
                attempt.state = "forgotten"

    def _remembers(self, attempt: Attempt) -> bool:
        if attempt.peer == self._me:
            return (self._me, attempt.id) in self.known
        row = self.outbox.get(attempt.row)
        return row is not None and (row.peer, row.queued.id) == (attempt.peer, attempt.id)

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:  # Any: tables of every kind
        assert self._undo is not None, "a write outside a transaction"
        self._undo.append((table, key, table.get(key, _MISSING)))
        table[key] = value

    def _delete(self, table: dict[Any, Any], key: Any) -> None:  # Any: tables of every kind
        assert self._undo is not None, "a write outside a transaction"
        if key in table:
            self._undo.append((table, key, table.pop(key)))

    def _undo_to(self, mark: int) -> None:
        assert self._undo is not None
        for table, key, old in reversed(self._undo[mark:]):
            if old is _MISSING:
                del table[key]
            else:
                table[key] = old
        del self._undo[mark:]
        for rows in self.queued.values():  # what came back is at the end
            ordered = sorted(rows.items())
            rows.clear()
            rows.update(ordered)

    def _number(self, table: str) -> int:
        """Give out a row number. One that a savepoint takes back is not used again, as with the real store."""
        number = self._numbers[table]
        self._numbers[table] = number + 1
        return number

    def _fail_at(self, point: str) -> None:
        if self.fail == point:
            self.fail = ""
            raise StoreFailed(f"simulated failure at {point}")

    # -- the inbox ------------------------------------------------------------------------------------------

    def accept(
        self,
        sender: str,
        lane: int,
        records: Sequence[tuple[bytes, bytes]],
        now_ms: int,
        ttls: Sequence[int] = (),
    ) -> list[Accepted]:
        self._fail_at("write")
        accepted = [self._accept(sender, lane, meta, body) for meta, body in records]
        for one, ttl_ms in zip(accepted, ttls, strict=bool(ttls)):
            if ttl_ms and one.envelope is not None:
                one.envelope = replace(one.envelope, ttl_ms=ttl_ms)
                self._set(self.lifetimes, one.row, now_ms + ttl_ms)
        return accepted

    def _accept(self, sender: str, lane: int, meta: bytes, body: bytes) -> Accepted:
        try:
            message = parse_metadata(meta, body, self._limits)
        except InvalidInput as error:
            return Accepted(refused=refusal_of(error))
        first = self.known.get((sender, message.id))
        if first is not None:
            known = self.inbox[first]
            self.counts["duplicate recognised"] += 1
            is_same = (known.lane, known.meta, known.body) == (lane, meta, body)
            return Accepted(row=first) if is_same else Accepted(refused=CONFLICT)
        row = self._number("inbox")
        self._set(self.inbox, row, InboxRow(sender, message.id, lane, meta, body, message.subject))
        self._set(self.known, (sender, message.id), row)
        if sender == self._me:
            self._note(message, meta, self._me, row)
        return Accepted(row=row, envelope=_envelope(row, sender, message))

    def settle(self, row: int) -> None:
        self._set(self.inbox, row, self.inbox[row]._replace(state="done"))

    def failed(self, row: int, reason: str, now_ms: int) -> None:
        attempts = self.inbox[row].attempts + 1
        is_dead = attempts >= self._limits.deliveries_max
        self._set(
            self.inbox, row, self.inbox[row]._replace(attempts=attempts, state="dead" if is_dead else "new")
        )
        if is_dead:
            self.note_receipt(row, "dead", now_ms)
        else:
            self._set(self._due, row, now_ms + min(1_000 << attempts, 300_000))

    def has_due(self, now_ms: int) -> bool:
        return bool(self._due) and min(self._due.values()) <= now_ms

    def due(self, now_ms: int, limit: int) -> list[Envelope]:
        if not self.has_due(now_ms):
            return []
        for row in [row for row, due_ms in self._due.items() if due_ms <= now_ms]:
            if self.lifetimes.get(row, now_ms + 1) <= now_ms:
                self._delete(self._due, row)
                self._set(self.inbox, row, self.inbox[row]._replace(state="dead"))
        rows = sorted(row for row, due_ms in self._due.items() if due_ms <= now_ms)[:limit]
        envelopes = []
        for row in rows:
            self.counts["effect tried again"] += 1
            self._delete(self._due, row)
            kept = self.inbox[row]
            envelopes.append(_envelope(row, kept.sender, parse_metadata(kept.meta, kept.body, self._limits)))
        return envelopes

    @property
    def backlog(self) -> int:
        return len(self._due)

    def waits(self, row: int) -> bool:
        """Say whether the effect of an inbox row is to be tried again later."""
        return row in self._due

    # -- the outbox -----------------------------------------------------------------------------------------

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
        self._fail_at("write")
        expires_ms = now_ms + (ttl_ms or self._limits.ttl_ms_default)
        rows: list[tuple[str, int]] = []
        for peer in recipients:
            known = self.outbox.get(self._rows_of.get((peer, message.id), 0))
            if known is not None and (known.queued.meta, known.queued.body) != (meta, message.body):
                raise Conflict(f"{message.id} was used before")
        for peer in recipients:
            if (peer, message.id) in self._rows_of:
                assert may_repeat, "an id that was just made is not new"
                continue
            row = self._number("outbox")
            queued = Queued(
                row=row,
                id=message.id,
                meta=meta,
                body=message.body,
                expires_ms=expires_ms,
                is_timed=ttl_ms is not None,
            )
            self._set(self.outbox, row, OutboxRow(peer, queued, expires_ms, may_repeat=may_repeat))
            self._set(self._rows_of, (peer, message.id), row)
            self._set(self._queued_for(peer), row, queued)
            self._note(message, meta, peer, row)
            rows.append((peer, row))
        return rows

    def has_sent(self, peer: str, message_id: str) -> bool:
        """Say whether a message is in the outbox for `peer` or, sent to this node itself, in the inbox."""
        return (peer, message_id) in (self.known if peer == self._me else self._rows_of)

    def _queued_for(self, peer: str) -> dict[int, Queued]:
        return self.queued.setdefault(peer, {})

    def _note(self, message: Message, meta: bytes, peer: str, row: int) -> None:
        attempt = Attempt(sender=self._me, peer=peer, id=message.id, meta=meta, body=message.body, row=row)
        self._open.append(attempt)
        self.history.append(attempt)

    def _settle_out(
        self, number: int, state: Literal["delivered", "expired", "cancelled", "dead"], now_ms: int
    ) -> bool:
        row = self.outbox.get(number)
        if row is None or row.state not in ("queued", "revoking"):
            return False
        self._set(self.outbox, number, row._replace(state=state, settled_ms=now_ms))
        self._delete(self._queued_for(row.peer), number)
        return True

    def write_queued(self) -> None:
        """Nothing is put off here; this is one more place to fail at, the last before anything leaves."""
        self._fail_at("write")

    def mark_delivered(self, rows: Sequence[tuple[str, int]], now_ms: int) -> None:
        self._fail_at("write")
        for _, row in rows:
            self._settle_out(row, "delivered", now_ms)

    def mark_delivered_ids(self, peer: str, ids: Sequence[str], now_ms: int) -> None:
        for message_id in ids:
            row = self._rows_of.get((peer, message_id))
            if row is not None:
                self._settle_out(row, "delivered", now_ms)

    # -- receipts -------------------------------------------------------------------------------------------

    def note_receipt(self, row: int, state: str, now_ms: int) -> None:
        kept = self.inbox[row]
        if kept.sender != self._me and parse_metadata(kept.meta, kept.body, self._limits).wants_receipt:
            self._set(self.receipts_due, (kept.sender, kept.id), state)
            self.receipt_peers.add(kept.sender)

    def receipts(self, peer: str, limit: int) -> list[tuple[str, str]]:
        due = sorted((one, state) for (sender, one), state in self.receipts_due.items() if sender == peer)
        return due[:limit]

    def drop_receipts(self, peer: str, ids: Sequence[str]) -> None:
        for one in ids:
            self._delete(self.receipts_due, (peer, one))

    def take_receipts(self, peer: str, receipts: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
        new: list[str] = []
        unknown: list[str] = []
        for message_id, state in receipts:
            if (peer, message_id) not in self._rows_of:
                unknown.append(message_id)
            elif (peer, message_id) not in self.receipts_taken:
                self._set(self.receipts_taken, (peer, message_id), state)
                new.append(message_id)
        return new, unknown

    def mark_dead(self, peer: str, message_id: str, reason: str, now_ms: int) -> bool:
        return self._settle_out(self._rows_of.get((peer, message_id), 0), "dead", now_ms)

    def mark_expired(self, peer: str, message_id: str, now_ms: int) -> bool:
        return self._settle_out(self._rows_of.get((peer, message_id), 0), "expired", now_ms)

    @property
    def newest_outbox_row(self) -> int:
        return self._numbers["outbox"] - 1

    def outbox_of(self, message_id: str) -> list[tuple[str, int, str, bool]]:
        return [
            (row.peer, number, row.state, row.may_repeat)
            for number, row in sorted(self.outbox.items())
            if row.queued.id == message_id
        ]

    def mark_cancelled(self, row: int, now_ms: int) -> None:
        self._settle_out(row, "cancelled", now_ms)

    def mark_revoking(self, row: int) -> None:
        kept = self.outbox[row]
        self._set(self.outbox, row, kept._replace(state="revoking"))
        self._delete(self._queued_for(kept.peer), row)

    def _revoking(self, peer: str) -> list[tuple[int, OutboxRow]]:
        return sorted(
            (number, row)
            for number, row in self.outbox.items()
            if row.state == "revoking" and row.peer == peer
        )

    def revoking(self, peer: str, limit: int) -> list[tuple[str, bytes]]:
        return [(row.queued.id, self._digest(row.queued)) for _, row in self._revoking(peer)[:limit]]

    def settle_revoked(
        self, peer: str, *, held: Sequence[str], free: Sequence[str], now_ms: int
    ) -> tuple[list[str], list[str]]:
        numbers = {row.queued.id: number for number, row in self._revoking(peer)}
        delivered = [one for one in held if one in numbers]
        cancelled = [one for one in free if one in numbers]
        for one in delivered:
            self._settle_out(numbers[one], "delivered", now_ms)
        for one in cancelled:
            self._settle_out(numbers[one], "cancelled", now_ms)
        return delivered, cancelled

    def unrevoke(self, peer: str) -> None:
        queued = self._queued_for(peer)
        for number, row in self._revoking(peer):
            self._set(self.outbox, number, row._replace(state="queued"))
            self._set(queued, number, row.queued)
        ordered = sorted(queued.items())
        queued.clear()
        queued.update(ordered)

    def _digest(self, queued: Queued) -> bytes:
        return digest_of(sender=self._me, lane=0, meta=queued.meta, body=queued.body)

    def note_acked(self, peer: str, message_id: str, row: int) -> None:
        if row > self.acked.get(peer, ("", 0))[1]:
            self._set(self.acked, peer, (message_id, row))

    def requeue(self, peer: str, now_ms: int) -> int:
        self._delete(self.acked, peer)
        oldest_ms = now_ms - self._limits.retained_ms
        retained = [
            (number, row)
            for number, row in self.outbox.items()
            if row.peer == peer
            and row.state == "delivered"
            and row.settled_ms > oldest_ms
            and row.queued.expires_ms > now_ms
        ]
        retained = sorted(retained)[-self._limits.retained_messages :]
        queued = self._queued_for(peer)
        for number, row in retained:
            self._set(self.outbox, number, row._replace(state="queued", settled_ms=0))
            self._set(queued, number, row.queued)
        ordered = sorted(queued.items())
        queued.clear()
        queued.update(ordered)
        return len(retained)

    def expire(self, peer: str, *, beyond_row: int, now_ms: int) -> list[str]:
        """Expire queued rows past their time that are not on the wire, as a node's house-keeping does."""
        late = [
            number
            for number in self._queued_for(peer)
            if number > beyond_row and self.outbox[number].expires_ms <= now_ms
        ]
        late += [number for number, row in self._revoking(peer) if row.expires_ms <= now_ms]
        for number in late:
            self._settle_out(number, "expired", now_ms)
            self.counts["message expired"] += 1
        return [self.outbox[number].queued.id for number in late]

    # -- what the link reads --------------------------------------------------------------------------------

    def in_doubt(self, peer: str, limit: int) -> list[tuple[str, bytes]]:
        return [
            (queued.id, self._digest(queued)) for queued in islice(self._queued_for(peer).values(), limit)
        ]

    def queued_after(self, peer: str, row: int, *, messages: int, size: int) -> list[Queued]:
        found: list[Queued] = []
        for number, queued in self._queued_for(peer).items():
            if number <= row:
                continue
            found.append(queued)
            size -= len(queued.meta) + len(queued.body)
            if size <= 0 or len(found) >= messages:
                break
        return found

    def held(self, peer: str, ids: Sequence[str], digests: Sequence[bytes]) -> Held:
        held = Held([], [])
        for index, message_id in enumerate(ids):
            number = self.known.get((peer, message_id))
            if number is None:
                continue
            row = self.inbox[number]
            digest = digest_of(sender=peer, lane=row.lane, meta=row.meta, body=row.body)
            if not digests or digests[index] == digest:
                held.have.append((index, number))
            else:
                held.conflicts.append(index)
        return held

    def last_acked(self, peer: str) -> tuple[str, int] | None:
        return self.acked.get(peer)

    def lacks(self, peer: str, message_id: str, row: int) -> bool:
        return self.known.get((peer, message_id)) != row

    # -- the rest -------------------------------------------------------------------------------------------

    def registry_save(self, entries: Sequence[Entry]) -> None:
        self.counts["registry written"] += len(entries)
        for entry in entries:
            self._set(self._registry, entry.at, entry)

    def registry_drop(self, keys: Sequence[tuple[str, str]]) -> None:
        for at in keys:
            self._delete(self._registry, at)

    def registry_note(self, name: str, value: int) -> None:
        self._set(self._registry_notes, name, value)

    def registry_notes(self) -> dict[str, int]:
        return dict(self._registry_notes)

    def registry_load(self) -> list[Entry]:
        return list(self._registry.values())

    def save_interest(self, peer: str, patterns: Sequence[str]) -> None:
        self._set(self._interests, peer, tuple(patterns))

    def interests(self) -> dict[str, tuple[str, ...]]:
        return dict(self._interests)


def _empty() -> Image:
    return Image({}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {})


def _nothing() -> None:
    """A hook that nobody uses."""


def _envelope(row: int, sender: str, message: Message) -> Envelope:
    return Envelope(
        row=row,
        sender=sender,
        id=message.id,
        subject=message.subject,
        body=message.body,
        headers=message.headers,
        reply_to=message.reply_to,
        wants_receipt=message.wants_receipt,
    )


# Time and network --------------------------------------------------------------------------------------------


class Timeline:
    """What happens when. Everything in a cluster is a call at a moment; equal moments keep their order."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self._calls: list[tuple[int, int, Callable[..., object], tuple[Any, ...]]] = []  # Any: the call's own
        self._number = 0

    def after(self, ms: int, fn: Callable[..., object], *args: Any) -> None:  # Any: passed through
        self._number += 1
        heapq.heappush(self._calls, (self.clock.now_ms + ms, self._number, fn, args))

    def run(self, ms: int) -> None:
        clock, calls = self.clock, self._calls
        end_ms = clock.now_ms + ms
        while calls and calls[0][0] <= end_ms:
            clock.now_ms, _, fn, args = heapq.heappop(calls)
            fn(*args)
        clock.now_ms = end_ms


_NO_CUT: Final = 1 << 60


class _Connection:
    """One TCP connection. Side 0 dialled, side 1 listens; each pair is indexed by the side that sends."""

    __slots__ = (
        "arrived",
        "closed",
        "cutoff",
        "dead",
        "ends",
        "haunts",
        "held",
        "is_late",
        "is_lossy",
        "is_up",
        "lives",
        "number",
        "pair",
        "path",
        "ready_ms",
        "sent",
    )

    def __init__(self, number: int, dialler: SimNode, listener: SimNode, path: int) -> None:
        self.number = number
        self.path = path  # which of the listener's two addresses was dialled
        self.ends = (dialler, listener)
        self.pair = frozenset((dialler.name, listener.name))
        self.lives = (dialler.life, listener.life)
        self.is_up = True
        self.is_lossy = False
        self.closed = [False, False]  # by this side's own will
        self.dead = [False, False]  # broken, and this side knows
        self.sent = [0, 0]
        self.arrived = [0, 0]
        self.cutoff = [_NO_CUT, _NO_CUT]  # frames beyond this number are lost
        self.is_late = [False, False]  # broken, and what was under way arrives after newer frames
        self.haunts = False  # frames reach even a side that has closed it
        self.ready_ms = [0, 0]  # FIFO: nothing arrives before this
        self.held: deque[tuple[int, Frame]] = deque()  # under way while the two ends are parted


class SimNetwork:
    """Connections between nodes: in order and whole as long as they last, which is not long.

    Every node has two addresses, and either may be cut off without the other: then a node that finds the second way
    gets what the first one still held afterwards.

    A connection that breaks loses a suffix of what is under way, and what is left may arrive much later, amidst the
    frames of newer connections, which is when it does most harm. Its ends notice at different times: the dialler is
    told; the listener finds out when it sends.
    """

    def __init__(self, timeline: Timeline, random: Random) -> None:
        self._timeline = timeline
        self._random = random
        self._connections: dict[int, _Connection] = {}
        self._parted: dict[tuple[frozenset[str], int], None] = {}  # (pair, path); a dict keeps its order
        self._next = 1
        self.nodes: dict[str, SimNode] = {}
        self.dial_failure = 0.0  # probability
        self._late: dict[frozenset[str], list[tuple[_Connection, int, Frame]]] = {}
        self._ambush: int | None = None  # kind of frame after which its connection breaks
        self.stale = 0.0  # probability that a connection's frames reach even a side that has closed it
        self.latency_ms = 20
        self.through_bytes = False  # encode and decode every frame, as real sockets do
        self.counts: Counter[str] = Counter()  # what went wrong, and how often
        self.observe: Callable[[SimNode, SimNode, Frame], None] | None = None
        self.trace: Callable[[str], None] | None = None

    # -- what a node's sockets do -----------------------------------------------------------------------------

    def dial(self, node: SimNode, peer: str) -> int:
        number, self._next = self._next, self._next + 1
        listener, draw = self.nodes[peer], self._random.random
        conn, path = number * 2, int(draw() * 2)
        if self._parted and (frozenset((node.name, peer)), path) in self._parted:
            self._timeline.after(3_000, node.receive, (_CLOSED, "timeout", conn), node.life)
        elif not listener.is_up or draw() < self.dial_failure:
            self._timeline.after(1 + int(draw() * 30), node.receive, (_CLOSED, "refused", conn), node.life)
        else:
            connection = self._connections[number] = _Connection(number, node, listener, path)
            connection.haunts = draw() < self.stale
            self._timeline.after(self._delay_ms(), node.receive, (_CONNECTED, "", conn), node.life)
        return conn

    def send(self, conn: int, frame: Frame) -> bool:
        connection, side = self._connections.get(conn >> 1), conn & 1
        if connection is None or connection.closed[side] or connection.dead[side]:
            return False
        sender, receiver, draw = connection.ends[side], connection.ends[1 - side], self._random.random
        if self.observe is not None:
            self.observe(sender, receiver, frame)
        if self.trace is not None:
            self.trace(f"{sender.name} → {receiver.name}  {_told(connection, frame)}")
        if connection.is_lossy and draw() < 0.3:
            self.counts["frame dropped"] += 1
            return True
        if connection.is_up:
            if self.through_bytes:
                frame = frames.decode(frames.encode(frame), sender.limits)
            connection.sent[side] += 1
            now_ms = self._timeline.clock.now_ms
            at_ms = max(connection.ready_ms[side], now_ms + self._delay_ms())
            connection.ready_ms[side] = at_ms
            self._timeline.after(at_ms - now_ms, self._arrive, connection, side, connection.sent[side], frame)
            if frame.kind == self._ambush:
                self._ambush = None
                self._break(connection, 300)
            elif self._late and draw() < (0.7 if frame.kind == frames.DATA else 0.2):
                self._timeline.after(self._delay_ms(), self._release, connection.pair)
        return True

    def close(self, conn: int) -> None:
        """End a connection from one side: the dialler's socket is cut; the listener's is only forgotten."""
        connection, side = self._connections.get(conn >> 1), conn & 1
        if connection is None or connection.closed[side]:
            return
        connection.closed[side] = True
        if side == 0:
            self._break(connection, self._delay_ms())

    # -- what goes wrong --------------------------------------------------------------------------------------

    def cut(self, *, notice_ms: int) -> None:
        """Break a connection, if possible one with something under way. Its ends notice within `notice_ms`."""
        up = self._up()
        up = [one for one in up if one.sent != one.arrived] or up
        if up:
            self._break(up[int(self._random.random() * len(up))], notice_ms)

    def ambush(self, kind: int) -> None:
        """Break the next connection that carries a frame of this kind, while the frame is under way."""
        self._ambush = kind

    def corrupt(self, *, for_ms: int) -> None:
        """Have one connection lose frames from its middle, until it breaks."""
        up = self._up()
        if up:
            connection = up[int(self._random.random() * len(up))]
            connection.is_lossy = True
            self._timeline.after(for_ms, self._break, connection, 100)

    def part(self, one: str, other: str, paths: Sequence[int] = (0, 1)) -> None:
        """Let nothing pass between two nodes, or not by one way. What is under way waits, as in TCP's buffers."""
        self._parted |= {(frozenset((one, other)), path): None for path in paths}

    def join(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        for path in (0, 1):
            self._parted.pop((pair, path), None)
        for connection in list(self._connections.values()):
            if connection.pair == pair:
                while connection.held:
                    self._hand_over(connection, *connection.held.popleft())

    def is_parted(self, one: str, other: str) -> bool:
        pair = frozenset((one, other))
        return (pair, 0) in self._parted and (pair, 1) in self._parted

    def heal(self) -> None:
        """End all that is wrong, except that a lost frame stays lost and a broken connection broken."""
        self.dial_failure = 0.0
        self._ambush = None
        for connection in self._connections.values():
            if connection.is_lossy and connection.is_up:
                self._break(connection, 100)
        for pair, _ in list(self._parted):
            self.join(*pair)

    def ended(self, node: SimNode, *, notice_ms: int) -> None:
        """Break the connections of a node that is gone."""
        for connection in list(self._connections.values()):
            if node in connection.ends:
                self._break(connection, notice_ms)

    # -- what links ask ---------------------------------------------------------------------------------------

    def is_live(self, conn: int) -> bool:
        connection = self._connections.get(conn >> 1)
        return connection is not None and connection.is_up and not any(connection.closed)

    # -- inside -----------------------------------------------------------------------------------------------

    def _up(self) -> list[_Connection]:
        return [one for one in self._connections.values() if one.is_up]

    def _delay_ms(self) -> int:
        draw = self._random.random()
        return 1 + int(draw * draw * self.latency_ms)

    def _break(self, connection: _Connection, notice_ms: int) -> None:
        if not connection.is_up:
            return
        connection.is_up = False
        draw, after = self._random.random, self._timeline.after
        if self.trace is not None:
            names = " – ".join(end.name for end in connection.ends)
            self.trace(f"connection {connection.number} breaks: {names}")
        for side in (0, 1):
            under_way = connection.sent[side] - connection.arrived[side]
            connection.cutoff[side] = connection.arrived[side] + int(draw() * (under_way + 1))
            connection.is_late[side] = under_way > 0 and draw() < 0.5
            after(1 + int(draw() * notice_ms), self._notice, connection, side)
        after(20_000, self._forget, connection)

    def _notice(self, connection: _Connection, side: int) -> None:
        connection.dead[side] = True
        if side == 0 and not connection.closed[0]:
            connection.ends[0].receive((_CLOSED, "disconnected", connection.number * 2), connection.lives[0])

    def _forget(self, connection: _Connection) -> None:
        self._connections.pop(connection.number, None)

    def _arrive(self, connection: _Connection, side: int, number: int, frame: Frame) -> None:
        if number > connection.cutoff[side]:
            self.counts["frame dropped"] += 1
            return
        connection.arrived[side] = number
        if connection.is_late[side]:
            self._late.setdefault(connection.pair, []).append((connection, side, frame))
        elif connection.held or (self._parted and (connection.pair, connection.path) in self._parted):
            connection.held.append((side, frame))
        else:
            self._hand_over(connection, side, frame)

    def _release(self, pair: frozenset[str]) -> None:
        """Deliver what comes late between two nodes, now that a newer connection of theirs is in use."""
        for connection, side, frame in self._late.pop(pair, ()):
            self._hand_over(connection, side, frame)

    def _hand_over(self, connection: _Connection, side: int, frame: Frame) -> None:
        there = 1 - side
        if connection.closed[there] and not connection.haunts:
            return
        sender, receiver = connection.ends[side], connection.ends[there]
        conn = connection.number * 2 + there
        tick = receiver.tick
        if tick is not None and frame.kind != frames.HELLO:
            current = tick.links[sender.name].conn
            if current is not None and current != conn:
                self.counts["frame of an old connection"] += 1
                newer = self._connections.get(current >> 1)
                if newer is not None and newer.path != connection.path:
                    self.counts["frame by the second path"] += 1
        receiver.receive((_FRAME, sender.name, conn, frame), connection.lives[there])


def _told(connection: _Connection, frame: Frame) -> str:
    size = f" {len(frame.body)} bytes" if frame.body else ""
    return f"[{connection.number}] {frame}{size}"


class SimWire:
    """`tick.Wire` of one node."""

    def __init__(self, network: SimNetwork, node: SimNode) -> None:
        self._network = network
        self._node = node

    def send(self, conn: int, frame: Frame) -> bool:
        self._node.reach("send")
        return self._network.send(conn, frame)

    def close(self, conn: int) -> None:
        self._network.close(conn)

    def dial(self, peer: str) -> int | None:
        return self._network.dial(self._node, peer)


# A node ------------------------------------------------------------------------------------------------------

_CONNECTED: Final = 0
_CLOSED: Final = 1
_FRAME: Final = 2

Point = Literal["send", "before-commit", "after-commit"]


class SimNode:
    """One node: a journal that stays, a Tick that lives from start to crash, and what waits for its next tick."""

    def __init__(
        self,
        name: str,
        *,
        timeline: Timeline,
        network: SimNetwork,
        random: Random,
        limits: Limits,
        journal: SimJournal,
        tick: type[Tick],
    ) -> None:
        self.name = name
        self.limits = limits
        self.journal = journal
        self.effects: list[tuple[str, Effect]] = []
        self.members: list[str] = []
        self.life = 0  # grows with every start; what was meant for an older one is dropped
        self.utc_skew_ms = 0
        self.tick: Tick | None = None
        self.images: list[Image | None] = []
        self.doom: Point | None = None  # where this process will crash
        self.has_gone_back = False
        self.finished: Callable[[SimNode, Outcome], None] = _nobody
        self.lost: Callable[[SimNode, Sequence[Work]], None] = _nobody
        self._timeline = timeline
        self._network = network
        self._random = random
        self._tick_type = tick
        self._wire = SimWire(network, self)
        self._events: list[tuple[Any, ...]] = []  # Any: (kind, peer or reason, conn[, frame])
        self._work: list[Work] = []
        self._due_ms: int | None = None  # when the next tick runs
        self._armed: set[int] = (
            set()
        )  # moments at which the timeline calls `_run`; only that of `_due_ms` counts
        journal.before_commit = lambda: self.reach("before-commit")
        journal.after_commit = lambda: self.reach("after-commit")

    @property
    def is_up(self) -> bool:
        return self.tick is not None

    @property
    def is_busy(self) -> bool:
        """Something is waiting for the next tick, or sent and not acked: what a crash leaves in doubt."""
        return not self.is_idle or bool(self.tick and any(one.in_flight for one in self.tick.links.values()))

    @property
    def is_idle(self) -> bool:
        return not self._events and not self._work

    def can_tell_receipts(self, peer: str) -> bool:
        """Say whether this node and a peer speak of receipts; version 1 does not."""
        return self.tick is not None and self.tick.links[peer].has(frames.RECEIPTS)

    # -- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Boot from the committed state, as a node does."""
        if self.tick is not None:
            return
        self.life += 1
        journal = self.journal
        notes = journal.registry_notes()
        tick = self._tick_type(
            me=self.name,
            boot=self._random.getrandbits(53),
            about=lambda: {"name": self.name},
            journal=journal,
            wire=self._wire,
            limits=self.limits,
            random=self._random,
            registry=Registry(
                self.name, journal.registry_load(), clock=notes.get("clock", 0), limits=self.limits
            ),
            synced_ms=notes.get("synced_ms", 0),
        )
        for pattern, fn in self.effects:
            tick.add_effect(pattern, fn)
        tick.interests.update(journal.interests())
        for peer in self.members:
            tick.add_peer(peer)
        self.tick = tick
        self._due_ms = None
        self._armed.clear()
        self.wake(0)

    def crash(self, *, notice_ms: int = 100) -> None:
        """End as by kill -9 or, with a long `notice_ms`, as by a power cut: nobody is told for so long."""
        if self.tick is None:
            return
        self.tick = None
        self.doom = None
        self.journal.crash()
        work, self._work = self._work, []
        self._events = []
        self.lost(self, work)
        self._network.ended(self, notice_ms=notice_ms)

    def stop(self) -> None:
        """End as asked to, saying goodbye."""
        if self.tick is None:
            return
        try:
            self.tick.start(now_ms=self._timeline.clock.now_ms, utc_ms=self.utc_ms, steady_ms=self.steady_ms)
            self.tick.close()
        except Crashed:
            pass
        self.crash()

    def restore(self, image: Image | None) -> None:
        """Put an older store, or an empty one, under a node that is down."""
        assert self.tick is None, "a store is exchanged while its node is down"
        counts, journal = self._network.counts, self.journal
        counts["sender's store went back"] += bool(journal.outbox) and (
            not image or image.outbox != journal.outbox
        )
        counts["recipient's store went back"] += bool(journal.inbox) and (
            not image or image.inbox != journal.inbox
        )
        self.has_gone_back = True
        self.journal.restore(image)

    def reach(self, point: Point) -> None:
        if self.doom == point and (point != "send" or self._random.random() < 0.3):
            self._network.counts[f"crash at {point}"] += 1
            raise Crashed

    # -- ticks ------------------------------------------------------------------------------------------------

    @property
    def utc_ms(self) -> int:
        return self._timeline.clock.utc_ms() + self.utc_skew_ms

    @property
    def steady_ms(self) -> int:
        """What no jump of UTC moves."""
        return self._timeline.clock.now_ms + EPOCH_MS

    def submit(self, work: Work) -> None:
        assert self.tick is not None, f"{self.name} is down"
        self._work.append(work)
        self.wake(0)

    def ping(self, peer: str) -> None:
        """Ask a peer for a sign of life, as a node does that has not heard it for a while."""
        if self.tick is not None:
            try:
                self.tick.ping(peer)
                self.wake(0)
            except Crashed:
                self.crash()

    def hold(self, *, for_ms: int) -> None:
        """Take no messages for a while, as a node with a slow store or full consumers does."""
        if self.tick is not None:
            try:
                self.tick.hold("simulated", for_ms=for_ms)
                self.wake(0)
            except Crashed:
                self.crash()

    def receive(self, event: tuple[Any, ...], life: int) -> None:  # Any: see _events
        if life == self.life and self.tick is not None:
            self._events.append(event)
            self.wake(int(self._random.random() * 3))

    def wake(self, ms: int) -> None:
        """Run a tick at the latest so much later."""
        due_ms = self._timeline.clock.now_ms + ms
        if self._due_ms is None or due_ms < self._due_ms:
            self._due_ms = due_ms
            if due_ms not in self._armed:
                self._armed.add(due_ms)
                self._timeline.after(ms, self._run, due_ms, self.life)

    def _run(self, due_ms: int, life: int) -> None:
        if life != self.life:
            return
        self._armed.discard(due_ms)
        tick = self.tick
        if due_ms != self._due_ms or tick is None:
            return
        self._due_ms = None
        events, self._events = self._events, []
        work, self._work = self._work, []
        if len(work) > self.limits.tick_operations_max:
            self._work = work[self.limits.tick_operations_max :]
            del work[self.limits.tick_operations_max :]
        try:
            tick.start(now_ms=due_ms, utc_ms=self.utc_ms, steady_ms=self.steady_ms)
            for event in events:
                if event[0] == _FRAME:
                    tick.frame(event[1], event[2], event[3])
                elif event[0] == _CONNECTED:
                    tick.connected(event[2])
                else:
                    tick.closed(event[2], event[1])
            outcome = tick.run(work)
        except Crashed:
            self._work = [*work, *self._work]
            self.crash()
            return
        self.finished(self, outcome)
        self.wake(0 if self._work else max(1, tick.next_wake_ms() - due_ms))


def _nobody(node: SimNode, what: object) -> None:
    """A hook that nobody uses."""


# What must hold ----------------------------------------------------------------------------------------------


class Oracle:
    """Hold a mesh to its promises. Sees every frame that leaves, and reads the stores when all is calm.

    I1   every committed send is in the recipient's inbox, or queued, expired or dead at the sender
    I2   no (sender, id) twice in an inbox
    I3   the messages of one sender stand in an inbox in the order in which they were tried; a message that its
         sender tried again stands where one of its tries explains
    I4   what an ACK covers, and what a resync says is held, has a committed row at that moment
    I5   every inbox row is a real send: the same bytes, and not one that was undone or reported as refused
    I6   nothing is queued any more once the mesh had time to heal
    I10  sent = delivered + expired + dead, and whoever is told "delivered" is told the truth
    once each effect that ran left exactly one trace
    registry  all nodes hold the same entries once the mesh had time to heal, whatever was cut or put back

    When a store goes back in time, what it forgot is no send of its node any more: the sender does not owe it, and a
    recipient may still have it. All the rest stands: I1 within the retained window and a message's lifetime, because
    the regression check queues again what the restored recipient lost; I2, I4 and I5 for every row; and I3 for what
    is in the inbox in the end, provided that the stores put back are of one history: whoever restores an old backup,
    lets the node send, and then restores a newer one, gives that node two pasts, between which there is no order.
    """

    def __init__(self, nodes: Mapping[str, SimNode], counts: Counter[str]) -> None:
        self._nodes = nodes
        self.counts = counts
        self._data: dict[tuple[int, str], deque[tuple[int, str]]] = defaultdict(
            deque
        )  # (session, sender) -> sent
        self.plain: set[str] = set()  # ids of plain publishes, which may leave before their commit
        self.conflicts: set[str] = set()  # ids that their caller used again for other content
        self.traces: dict[str, str] = {}  # id of what an effect published -> what it answers to

    # -- on the wire ------------------------------------------------------------------------------------------

    def saw(self, sender: SimNode, receiver: SimNode, frame: Frame) -> None:
        if frame.kind == frames.DATA:
            sent = self._data[frame.session, sender.name]
            for seq, (meta, _) in enumerate(frames.records_of(frame), start=frame.seq):
                sent.append((seq, meta[7:43].decode()))  # metadata begins with {"id":"
        elif frame.kind == frames.ACK:
            sent = self._data[frame.session, receiver.name]
            while sent and sent[0][0] <= frame.seq:
                seq, message_id = sent.popleft()
                row = sender.journal.known.get((receiver.name, message_id))
                if row is None or row > sender.journal.inbox_committed:
                    raise Violation(
                        "I4", f"{sender.name} acked {message_id} (seq {seq}) of {receiver.name} without a row"
                    )
        elif frame.kind == frames.BYE:
            if frame.meta.get("reason") == "duplicate":
                self.counts["both dialled at once"] += 1
        elif "have" in frame.meta:
            for _, row in frame.meta["have"]:
                kept = sender.journal.inbox.get(row)
                if kept is None or kept.sender != receiver.name or row > sender.journal.inbox_committed:
                    raise Violation(
                        "I4", f"{sender.name} told {receiver.name} of row {row}, which is not there"
                    )

    def refused(self, node: SimNode, message_id: str) -> None:
        """The caller was told that this try did not happen."""
        for attempt in node.journal.undone:
            if attempt.id == message_id:
                attempt.state = "void"

    def returned(self, node: SimNode, message_id: str, peers: Iterable[str]) -> None:
        """The caller was told that this send is on disk."""
        for peer in peers:
            if not node.journal.has_sent(peer, message_id):
                raise Violation("I1", f"{node.name} returned {message_id} for {peer} without a committed row")

    def delivered(self, node: SimNode, message_id: str, peer: str) -> None:
        """The caller was told that the recipient has it on disk."""
        receiver = self._nodes[peer]
        row = receiver.journal.known.get((node.name, message_id))
        is_held = row is not None and row <= receiver.journal.inbox_committed
        if not is_held and not receiver.has_gone_back:
            raise Violation("I10", f"{node.name} calls {message_id} delivered, and {peer} does not have it")

    def cancelled(self, node: SimNode, message_id: str, peer: str) -> None:
        """The caller was told that the recipient will never have it."""
        # Content that the caller used this id for by mistake may be there: it was another message that was withdrawn.
        is_held = (node.name, message_id) in self._nodes[peer].journal.known
        if is_held and message_id not in self.conflicts and not node.has_gone_back:
            raise Violation("I1", f"{node.name} calls {message_id} cancelled, and {peer} has it")

    # -- when all is calm -------------------------------------------------------------------------------------

    def check(self) -> None:
        attempts: dict[tuple[str, str], dict[str, list[tuple[int, Attempt]]]] = {}
        for node in self._nodes.values():
            for number, attempt in enumerate(node.journal.history):
                of_pair = attempts.setdefault((attempt.sender, attempt.peer), {})
                of_pair.setdefault(attempt.id, []).append((number, attempt))
        for node in self._nodes.values():
            self._check_inbox(node, attempts)
        for node in self._nodes.values():
            self._check_outbox(node)

    def _check_inbox(
        self,
        node: SimNode,
        attempts: Mapping[tuple[str, str], Mapping[str, list[tuple[int, Attempt]]]],
    ) -> None:
        seen: set[tuple[str, str]] = set()
        last: dict[str, int] = {}
        for number in sorted(node.journal.inbox):
            row = node.journal.inbox[number]
            where = f"{row.id} from {row.sender}, row {number} of {node.name}"
            if (row.sender, row.id) in seen:
                raise Violation("I2", f"{where}, is there twice")
            seen.add((row.sender, row.id))
            tries = [
                (order, one)
                for order, one in attempts.get((row.sender, node.name), {}).get(row.id, ())
                if self._may_arrive(one)
            ]
            if not any((one.meta, one.body) == (row.meta, row.body) for _, one in tries):
                raise Violation("I5", f"{where}, was never sent like that")
            after = last.get(row.sender, -1)
            order = next((order for order, _ in tries if order > after), None)
            if order is None:
                raise Violation("I3", f"{where}, was sent before the one in front of it")
            last[row.sender] = order

    def _may_arrive(self, attempt: Attempt) -> bool:
        if attempt.state == "undone":
            return (
                attempt.id in self.plain
            )  # what comes from inside a transaction never leaves before the commit
        return attempt.state in ("kept", "forgotten")

    def _check_outbox(self, node: SimNode) -> None:
        journal, kept = node.journal, 0
        for attempt in journal.history:
            if attempt.state != "kept":
                continue
            receiver = self._nodes[attempt.peer].journal
            is_held = (node.name, attempt.id) in receiver.known
            where = f"{attempt.id} from {node.name} to {attempt.peer}"
            if attempt.peer == node.name:
                if not is_held:
                    raise Violation("I1", f"{where} is lost")
                continue
            kept += 1
            row = journal.outbox.get(attempt.row)
            if row is None:
                raise Violation("I10", f"{where} has no row at its sender")
            # What a recipient forgets after its lifetime is not sent again, and no loss.
            is_over = self._nodes[attempt.peer].has_gone_back and row.expires_ms <= node.steady_ms
            if row.state == "delivered" and not is_held and not is_over:
                raise Violation("I1", f"{where} is lost: delivered, says its sender")
            wants_receipt = b'"receipt":true' in attempt.meta and not self._nodes[attempt.peer].has_gone_back
            can_tell = node.can_tell_receipts(attempt.peer) and not node.has_gone_back
            if wants_receipt and row.state == "delivered" and can_tell:
                there = receiver.inbox[receiver.known[node.name, attempt.id]]
                if there.state == "done" and (attempt.peer, attempt.id) not in journal.receipts_taken:
                    raise Violation("I1", f"{where} is done with, and its sender was not told")
            if row.state == "cancelled" and is_held and attempt.id not in self.conflicts:
                raise Violation("I1", f"{where} is cancelled, says its sender, and was delivered")
            if row.state == "dead" and attempt.id not in self.conflicts:
                raise Violation("I1", f"{where} is dead: {row.reason}")
        if kept != len(journal.outbox):
            raise Violation("I10", f"{node.name} has {len(journal.outbox)} rows for {kept} sends")

    def check_effects(self, pattern_start: str) -> None:
        """Check that each settled message of a subject left exactly one trace. Not for stores that went back."""
        count = Counter(
            self.traces[one.id]
            for node in self._nodes.values()
            for one in node.journal.history
            if one.state == "kept" and one.id in self.traces
        )
        for node in self._nodes.values():
            for number, row in node.journal.inbox.items():
                if row.subject.startswith(pattern_start) and row.state != "dead":
                    found = count[f"{node.name} {row.sender} {row.id}"]
                    due = 0 if node.journal.waits(number) else 1
                    if found != due or (row.state == "done") != bool(due):
                        raise Violation("once", f"the effect of {row.id} at {node.name} ran {found} times")


# The whole ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often things go wrong: weights beside one ordinary operation each, and a few probabilities."""

    crash: float = 0.10  # at a random moment, or at a marked point of a tick
    stop: float = 0.02  # as asked to, with goodbye
    cut: float = 0.10  # a connection breaks, and both ends know soon
    ambush: float = 0.10  # the same, just behind a frame of a kind
    silence: float = 0.02  # a connection dies without a sign
    corrupt: float = 0.04  # a connection loses frames from its middle before it breaks
    part: float = 0.04  # two nodes cannot reach each other for a while
    detour: float = 0.02  # one of the two ways between two nodes is cut off for a while; the other one works
    commit: float = 0.08  # a transaction fails at its beginning, at a statement or at its end
    hold: float = 0.04  # a node takes no messages for a while: credit 0
    doubt: float = 0.04  # a commit fails when its message has left; the caller repeats it behind a newer one
    clock: float = 0.02  # UTC jumps by up to six hours
    rollback: float = 0.0  # a node's store is replaced by an older one, or by an empty one, while it is down
    backup: float = 0.0  # a store, or as often all of them, are backed up, for a rollback to go back to
    disaster: float = 0.0  # probability that, soon after such a node is back, a peer's store is replaced too
    effect_failure: float = 0.25  # probability that the built-in effect raises
    dial_failure: float = 0.1  # probability
    stale: float = 0.5  # probability that a connection's frames reach even a side that has closed it


_CALM: Final = Faults(
    crash=0,
    stop=0,
    cut=0,
    ambush=0,
    silence=0,
    corrupt=0,
    part=0,
    detour=0,
    commit=0,
    hold=0,
    doubt=0,
    clock=0,
    effect_failure=0,
    dial_failure=0,
)
_BEAT_MS: Final = 2_000
_HOUR_MS: Final = 3_600_000


class Cluster:
    """A mesh of simulated nodes n0, n1, … that all know each other. One `Random(seed)` decides everything."""

    def __init__(
        self,
        seed: int,
        *,
        nodes: int = 5,
        limits: Limits = SMALL,
        faults: Faults = Faults(),
        tick: type[Tick] = Tick,
        journal: type[SimJournal] = SimJournal,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        """`tick` and `journal` let a test break the code on purpose; `trace` gets a line for all that happens."""
        self.random = Random(seed)
        self.clock = FakeClock()
        self.faults = faults
        self.nodes: dict[str, SimNode] = {}
        self._timeline = Timeline(self.clock)
        self._network = SimNetwork(self._timeline, self.random)
        self._trace = trace
        self.healed_ms = 0  # how long the last `heal` took
        self._next_id = 0
        self._unsure: list[
            tuple[SimNode, Publish]
        ] = []  # not returned: may have happened, may be tried again
        self._published: deque[tuple[SimNode, str]] = deque(maxlen=6)
        self._chances: list[tuple[float, Callable[[], None]]] = []
        for number in range(nodes):
            name = f"n{number}"
            node = SimNode(
                name,
                timeline=self._timeline,
                network=self._network,
                random=self.random,
                limits=limits,
                journal=journal(name, limits=limits),
                tick=tick,
            )
            node.finished, node.lost = self._finished, self._lost
            self.nodes[name] = node
        self._all = list(self.nodes.values())
        self.oracle = Oracle(self.nodes, self._network.counts)
        self._network.nodes = self.nodes
        self._network.observe = self.oracle.saw
        self.counts = self._network.counts
        for node in self.nodes.values():
            node.journal.counts = self.counts
        self._network.stale = faults.stale
        self._network.latency_ms = (5, 30, 200)[self._below(3)]
        self._network.through_bytes = self.random.random() < 0.1  # the codec has tests of its own
        if trace is not None:
            self._network.trace = self._say
        for node in self.nodes.values():
            node.members = [name for name in self.nodes if name != node.name]
            self._timeline.after(self._below(50), node.start)
        self._timeline.after(_BEAT_MS, self._beat)

    # -- what a test asks for ---------------------------------------------------------------------------------

    def effect(self, pattern: str, fn: Effect) -> None:
        """Have every node run `fn` in the transaction in which a message arrives. Call it before the first `run`."""
        for node in self.nodes.values():
            node.effects.append((pattern, fn))

    def new_id(self) -> str:
        self._next_id += 1
        return f"00000000-0000-7000-8000-{self._next_id:012x}"

    def publish(
        self,
        node: str,
        subject: str,
        body: bytes,
        *,
        to: Sequence[str] | None,
        ttl_ms: int | None = None,
        message_id: str | None = None,
        wants_receipt: bool = False,
    ) -> str:
        """Ask a node that is up to publish at its next tick, and return the message's id."""
        message = Message(
            id=message_id or self.new_id(), subject=subject, body=body, wants_receipt=wants_receipt
        )
        may_repeat = message_id is not None  # as a node has it: an id that was just made is in no table
        self._submit(self.nodes[node], Publish(message, to, ttl_ms, may_repeat=may_repeat))
        return message.id

    def transact(self, node: str, fn: Callable[..., Any], *args: Any) -> None:  # Any: the caller's own
        """Ask a node that is up to run `fn(tx, *args)` in the transaction of its next tick."""
        self.nodes[node].submit(Transact(fn, args))

    def inbox(self, node: str) -> list[InboxRow]:
        """Return what has arrived at a node, in order."""
        journal = self.nodes[node].journal
        return [journal.inbox[row] for row in sorted(journal.inbox)]

    def run(self, ms: int) -> None:
        self._timeline.run(ms)

    def crash(self, node: str, *, restart_ms: int | None = None, notice_ms: int = 100) -> None:
        """Kill a node; start it again after `restart_ms`, if given. Its peers notice within `notice_ms`."""
        self._say(f"{node} crashes")
        self.counts["crash with work waiting" if self.nodes[node].is_busy else "crash at rest"] += 1
        self.nodes[node].crash(notice_ms=notice_ms)
        if restart_ms is not None:
            self._timeline.after(restart_ms, self.start, node)

    def start(self, node: str) -> None:
        if not self.nodes[node].is_up:
            self._say(f"{node} starts")
            self.nodes[node].start()

    def go_back(self, node: str, image: Image | None) -> None:
        """Crash a node and put an older store under it, or none at all; start it again with `start`."""
        self.crash(node)
        self._say(f"{node}'s store goes back to {'an older one' if image else 'nothing'}")
        self.nodes[node].restore(image)

    def part(self, one: str, other: str, *, for_ms: int) -> None:
        """Let two nodes not reach each other for a while."""
        self._say(f"{one} and {other} are parted")
        self._network.part(one, other)
        self.counts["parted"] += 1
        self._timeline.after(for_ms, self._network.join, one, other)

    def chaos(self, *, ms: int, operations: int, in_bursts: bool = True) -> None:
        """Run for `ms` with so many random operations, and faults between them as `faults` says.

        In bursts, what goes wrong together, while the links are still busy, goes wrong worse. Evenly spread over a
        long time, each thing is over before the next one: what a store remembers of it goes wrong.
        """
        self._prepare_chaos()
        total = operations + int(operations * sum(chance for chance, _ in self._chances))
        bursts = [self._below(ms) for _ in range(1 + total // 8)] if in_bursts else []
        for _ in range(total):
            at_ms = self._below(ms)
            if bursts:
                at_ms = bursts[self._below(len(bursts))] + int(self.random.random() ** 2 * 300)
            self._timeline.after(at_ms, self._happen)
        self.run(ms)

    def heal(self, *, within_ms: int = DRAIN_MS_MAX) -> int:
        """End every fault and wait until all has settled; return how long it took, `within_ms` at most."""
        self._say("healing")
        self._chances = []
        self.faults = _CALM
        self._network.heal()
        for node in self.nodes.values():
            node.journal.fail = ""
            node.doom = None
            node.start()
        began_ms = self.clock.now_ms
        while not self.is_settled and self.clock.now_ms - began_ms < within_ms:
            self.run(50)
        self.healed_ms = self.clock.now_ms - began_ms
        return self.healed_ms

    def close(self) -> None:
        """Let go of everything. Whoever runs thousands of clusters saves a fifth of the time by it.

        A cluster is full of cycles; left alone, it waits for the garbage collector, which visits every object.
        """
        for node in self._all:
            if node.tick is not None:
                vars(node.tick).clear()
            vars(node).clear()
        for part in (self._timeline, self._network, self.oracle, self):
            vars(part).clear()

    def check(self) -> None:
        """Raise Violation unless every invariant holds. Call it after `heal`."""
        self.oracle.check()
        for node in self.nodes.values():
            states = ("queued", "revoking")
            if waiting := [row.queued.id for row in node.journal.outbox.values() if row.state in states]:
                raise Violation("I6", f"{node.name} still has {waiting} queued")
        if not self.is_settled:
            if not self._are_alike():
                raise Violation("registry", "the nodes' registries differ")
            raise Violation("I6", f"links that are not open at both ends: {self._links_not_settled()}")
        if not self._has_gone_back():
            self.oracle.check_effects("relay")

    @property
    def is_settled(self) -> bool:
        """Nothing is queued or waiting, every pair has one session that both ends know, registries are alike."""
        for node in self.nodes.values():
            journal = node.journal
            if (
                any(node.can_tell_receipts(sender) for sender, _ in journal.receipts_due)
                or any(journal.queued.values())
                or any(row.state == "revoking" for row in journal.outbox.values())
            ):
                return False
            if not node.is_up or not node.is_idle:
                return False
            if journal.has_due(node.steady_ms + DRAIN_MS_MAX):
                return False
        return not self._links_not_settled() and self._are_alike()

    # -- inside -----------------------------------------------------------------------------------------------

    def _links_not_settled(self) -> list[str]:
        return [
            f"{node.name}-{peer}"
            for node in self.nodes.values()
            for peer in node.members
            if node.name < peer and not self._is_linked(node, self.nodes[peer])
        ]

    def _is_linked(self, one: SimNode, other: SimNode) -> bool:
        if one.tick is None or other.tick is None:
            return False
        here, there = one.tick.links[other.name], other.tick.links[one.name]
        return (
            here.is_open
            and there.is_open
            and here.conn is not None
            and there.conn is not None
            and here.conn ^ 1 == there.conn
            and self._network.is_live(here.conn)
        )

    def _are_alike(self) -> bool:
        return len({node.tick.registry.root for node in self.nodes.values() if node.tick}) == 1

    def _has_gone_back(self) -> bool:
        return any(node.has_gone_back for node in self._all)

    def _say(self, text: str) -> None:
        if self._trace is not None:
            self._trace(f"{self.clock.now_ms / 1000:8.3f}  {text}")

    def _below(self, limit: int) -> int:
        return int(self.random.random() * limit)

    def _submit(self, node: SimNode, work: Publish) -> None:
        self.oracle.plain.add(work.message.id)
        self._published.append((node, work.message.id))
        self._say(f"{node.name} publishes {work.message.id[-4:]} to {work.recipients}")
        node.submit(work)

    def _finished(self, node: SimNode, outcome: Outcome) -> None:
        for work, result in outcome.results:
            if isinstance(work, Publish):
                self.oracle.returned(node, work.message.id, work.recipients or result)
                if self.random.random() < 0.05:  # a caller that did not get the answer
                    self._unsure.append((node, work))
        for message_id, peer, reason in outcome.dead:
            if reason == CANCELLED:
                self.counts["message cancelled"] += 1
                self.oracle.cancelled(node, message_id, peer)
        for message_id, peer in outcome.delivered:
            self.oracle.delivered(node, message_id, peer)
        if outcome.lost or outcome.regressed:
            self.counts["regression found"] += len(outcome.regressed)
            self.counts["session lost"] += len(outcome.lost)
        for work, error in outcome.failures:
            if isinstance(error, Conflict) and self._is_conflict(work):
                continue  # the caller's own mistake, told to the caller
            if not isinstance(error, (StoreFailed, _Refused)):
                raise error
            self.counts[f"{type(error).__name__.strip('_')} raised"] += 1
            if isinstance(work, Publish):
                if not isinstance(error, OutcomeUnknown):
                    self.oracle.refused(node, work.message.id)
                self._unsure.append((node, work))
        if self._trace is not None:
            for peer, reason in outcome.lost:
                self._say(f"{node.name} lost its session with {peer}: {reason}")
            for work, error in outcome.failures:
                what = f"publish {work.message.id[-4:]}" if isinstance(work, Publish) else "transact"
                self._say(f"{node.name} could not {what}: {error}")

    def _is_conflict(self, work: Work) -> bool:
        return isinstance(work, Publish) and work.message.id in self.oracle.conflicts

    def _lost(self, node: SimNode, work: Sequence[Work]) -> None:
        self._unsure += [(node, one) for one in work if isinstance(one, Publish)]

    def _beat(self) -> None:
        """Heartbeats and house-keeping, as in a node: a beat that is heard ends the waiting before the next dial."""
        self._timeline.after(_BEAT_MS, self._beat)
        for node in self.nodes.values():
            if node.tick is None:
                continue
            for peer, link in list(node.tick.links.items()):
                if (
                    not link.is_open
                    and self.nodes[peer].is_up
                    and not self._network.is_parted(node.name, peer)
                ):
                    node.tick.redial_now(peer)
                    node.wake(self._below(200))
                elif self.random.random() < 0.05:
                    node.ping(peer)
            if node.is_up and self.random.random() < 0.3:
                node.submit(Transact(self._expire, (node,)))  # house-keeping
            if node.journal.has_due(node.steady_ms):
                node.wake(0)

    # -- chaos ------------------------------------------------------------------------------------------------

    def _prepare_chaos(self) -> None:
        faults, draw = self.faults, self.random.random
        self._network.dial_failure = faults.dial_failure
        kinds = (
            (faults.crash, self._crash_one),
            (faults.stop, self._stop_one),
            (faults.cut, self._cut_one),
            (faults.ambush, self._ambush_one),
            (faults.silence, self._silence_one),
            (faults.corrupt, self._corrupt_one),
            (faults.part, self._part_two),
            (faults.detour, self._detour_two),
            (faults.commit, self._fail_one),
            (faults.hold, self._hold_one),
            (faults.doubt, self._doubt_one),
            (faults.clock, self._jump_one),
            (faults.backup, self._keep_image),
            (faults.rollback, self._go_back_one),
        )
        # Each schedule leaves some kinds out and has more of others: what hides one bug shows another.
        self._chances = [(chance * 2 * draw(), fn) for chance, fn in kinds if chance and draw() < 0.8]
        if not any(pattern == "relay.>" for node in self.nodes.values() for pattern, _ in node.effects):
            for node in self.nodes.values():
                node.effects += [
                    ("relay.>", self._relay_at(node)),
                    ("route.>", self._pass_on_at(node)),
                    ("news.>", _read),
                ]
                if node.tick is not None:
                    for pattern, fn in node.effects[-3:]:
                        node.tick.add_effect(pattern, fn)

    def _happen(self) -> None:
        point = self.random.random() * (1 + sum(chance for chance, _ in self._chances))
        for chance, fn in self._chances:
            point -= chance
            if point < 0:
                fn()
                return
        self._operate()

    def _any_up(self) -> SimNode | None:
        up = [node for node in self._busy() if node.is_up]
        return up[self._below(len(up))] if up else None

    def _busy(self) -> list[SimNode]:
        """Mostly the first two nodes: what happens between the same two meets itself."""
        return self._all[:2] if self.random.random() < 0.7 else self._all

    def _some(self, sender: SimNode) -> list[str]:
        """Draw one or two recipients, rarely the sender itself."""
        others = [node.name for node in self._busy() if node is not sender]
        first = others[self._below(len(others))]
        point = self.random.random()
        if point < 0.75:
            return [first]
        return [first, sender.name] if point < 0.85 else list(dict.fromkeys((first, *self._some(sender))))

    def _operate(self) -> None:
        node = self._any_up()
        if node is None:
            return
        point = self.random.random()
        if point < 0.36:
            self._publish_one(node, ttl_ms=1 + self._below(300) if point < 0.08 else None)
        elif point < 0.46:
            to = self._some(node)
            for _ in range(2 + self._below(9)):
                self.publish(node.name, "mail.x", b"one of many", to=to)
        elif point < 0.50:
            self.publish(node.name, "news.x", b"to whoever listens", to=None, wants_receipt=True)
        elif point < 0.58:
            self.publish(node.name, "relay.x", self._some(node)[0].encode(), to=self._some(node))
        elif point < 0.60:
            # To all of the route at once: what a node passes on reaches the next one a second time.
            route = [*self.random.sample(node.members, len(node.members)), node.name]
            self.publish(node.name, "route.x", " ".join(route).encode(), to=node.members)
        elif point < 0.75:
            self._transact(node)
        elif point < 0.80 and self._published:
            self._cancel_one()
        elif point < 0.90 and self._unsure:
            self._try_again()
        elif point < 0.95:
            value = {"at": self.clock.now_ms} if point < 0.94 else None
            self.transact(node.name, lambda tx: tx.registry_put("b", f"k{self._below(3)}", value))
        else:
            self.transact(node.name, self._expire, node)

    def _publish_one(self, node: SimNode, ttl_ms: int | None = None) -> None:
        self.publish(node.name, "mail.x", b"plain", to=self._some(node), ttl_ms=ttl_ms)

    def _cancel_one(self) -> None:
        """Withdraw one of the messages that were published last: queued, on the wire, in doubt or delivered."""
        node, message_id = self._published[self._below(len(self._published))]
        if node.is_up:
            self._say(f"{node.name} withdraws {message_id[-4:]}")
            self.transact(node.name, lambda tx: node.tick and node.tick.cancel(tx, message_id))

    def _publish_on(self, node: SimNode) -> None:
        """Publish into what goes wrong now, and to the same recipients a little later."""
        to = self._some(node)

        def publish() -> None:
            if node.is_up:
                self.publish(node.name, "mail.x", b"again and again", to=to)

        publish()
        self._timeline.after(self._pause_ms(), publish)

    def _try_again(self) -> None:
        """A caller repeats a publish under its own id, rarely with other content, which is a mistake of the caller."""
        node, work = self._unsure.pop(self._below(len(self._unsure)))
        if not node.is_up:
            return
        if work.message.subject == "mail.x" and self.random.random() < 0.1:
            work = replace(work, message=replace(work.message, body=b"other content"))
            self.oracle.conflicts.add(work.message.id)
        self._submit(node, replace(work, may_repeat=True))

    def _transact(self, node: SimNode) -> None:
        planned = [(self.new_id(), self._some(node)) for _ in range(1 + self._below(3))]
        raises = self.random.random() < 0.1

        def write(tx: Tx) -> None:
            for message_id, to in planned:
                tx.publish("mail.x", b"from inside", to=to, message_id=message_id)
            if raises:
                raise _Refused("the caller's own error")

        self._say(f"{node.name} transacts {[(one[-4:], to) for one, to in planned]}")
        self.transact(node.name, write)

    def _expire(self, tx: Tx, node: SimNode) -> None:
        assert node.tick is not None
        for peer, link in node.tick.links.items():
            node.journal.expire(peer, beyond_row=link.cursor, now_ms=tx.steady_ms)

    def _relay_at(self, node: SimNode) -> Effect:
        def relay(tx: Tx, envelope: Envelope) -> None:
            """Publish one message for the one that arrived, and sometimes fail after that."""
            message_id = self.new_id()
            self.oracle.traces[message_id] = f"{node.name} {envelope.sender} {envelope.id}"
            tx.publish("mail.relayed", b"", to=[envelope.body.decode()], message_id=message_id)
            if self.random.random() < self.faults.effect_failure:
                self.counts["effect failed"] += 1
                raise _Refused("an effect that fails now and then")

        return relay

    def _pass_on_at(self, node: SimNode) -> Effect:
        def pass_on(tx: Tx, envelope: Envelope) -> None:
            """Send what arrives to the next node of its route, under the same id and with the same content."""
            route = envelope.body.decode().split()
            place = route.index(node.name)
            if place + 1 < len(route):
                self.counts["passed on under the same id"] += 1
                tx.publish(envelope.subject, envelope.body, to=[route[place + 1]], message_id=envelope.id)

        return pass_on

    def _pause_ms(self) -> int:
        return 20 + int(self.random.random() ** 2 * 1_500)

    def _crash_one(self) -> None:
        node = self._any_up()
        if node is None:
            return
        point = self._below(6)
        restart_ms = self._pause_ms()
        if point < 3:
            node.doom = ("send", "before-commit", "after-commit")[point]
            self._timeline.after(restart_ms, self.start, node.name)
            self._publish_on(node)
        else:
            self.crash(node.name, restart_ms=restart_ms, notice_ms=10_000 if point == 5 else 100)

    def _stop_one(self) -> None:
        node = self._any_up()
        if node is not None:
            self._say(f"{node.name} stops")
            node.stop()
            self._timeline.after(self._pause_ms(), self.start, node.name)

    def _cut_one(self) -> None:
        self._network.cut(notice_ms=300)

    def _ambush_one(self) -> None:
        kinds = (frames.DATA, frames.ACK, frames.ACK, frames.HELLO, frames.HELLO_OK, frames.READY)
        self._network.ambush(kinds[self._below(len(kinds))])

    def _silence_one(self) -> None:
        self._network.cut(notice_ms=15_000)

    def _corrupt_one(self) -> None:
        self._network.corrupt(for_ms=100 + self._below(1_000))

    def _part_two(self) -> None:
        self.part(*self._two(), for_ms=200 + self._below(3_000))

    def _detour_two(self) -> None:
        one, other = self._two()
        path = self._below(2)
        self._say(f"way {path} between {one} and {other} is cut off")
        self.counts["one path cut off"] += 1
        self._network.part(one, other, paths=(path,))
        self._timeline.after(2_000 + self._below(25_000), self._network.join, one, other)

    def _two(self) -> tuple[str, str]:
        one = self._busy()[0]
        return one.name, one.members[self._below(len(one.members))]

    def _fail_one(self) -> None:
        node = self._any_up()
        if node is not None:
            node.journal.fail = ("begin", "write", "commit", "commit")[self._below(4)]
            self._publish_on(node)

    def _hold_one(self) -> None:
        node = self._any_up()
        if node is not None:
            self._say(f"{node.name} takes no messages for a while")
            self.counts["credit withheld"] += 1
            node.hold(for_ms=50 + self._below(3_000))

    def _doubt_one(self) -> None:
        node = self._any_up()
        if node is None:
            return
        to, newer_ms = self._some(node), self._pause_ms()
        node.journal.fail = "commit"
        message_id = self.publish(node.name, "mail.x", b"in doubt", to=to)

        def publish(message_id: str, body: bytes) -> None:
            if node.is_up:
                self.publish(node.name, "mail.x", body, to=to, message_id=message_id)

        self._timeline.after(newer_ms, publish, self.new_id(), b"newer")
        self._timeline.after(newer_ms + self._pause_ms(), publish, message_id, b"in doubt")

    def _jump_one(self) -> None:
        node = self._any_up()
        if node is not None:
            skew_ms = self._below(12 * _HOUR_MS) - 6 * _HOUR_MS
            self.counts[f"clock jumped {'back' if skew_ms < node.utc_skew_ms else 'forward'}"] += 1
            node.utc_skew_ms = skew_ms
            self.transact(node.name, self._expire, node)

    def _keep_image(self) -> None:
        """Back up one store or, as often, those of a whole site at the same moment."""
        node = self._any_up()
        if node is not None:
            for one in (node,) if self.random.random() < 0.5 else self._all:
                if one.is_up:
                    one.images.append(one.journal.snapshot())

    def _go_back_one(self) -> None:
        node = self._any_up()
        if node is None:
            return
        if self.random.random() >= self.faults.disaster:
            if self.random.random() < 0.5:  # what it acks just before is not written down at the sender yet
                peer = self.nodes[node.members[self._below(len(node.members))]]
                if peer.is_up:
                    self.publish(peer.name, "mail.x", b"just before", to=[node.name])
            self._timeline.after(self._below(150), self._restore, node)
            return
        # One loses its disk, and while that is made good, a peer is put back to its backup.
        node.images.clear()
        restart_ms = self._restore(node)
        peer = self.nodes[node.members[self._below(len(node.members))]]
        self._timeline.after(restart_ms + self._below(500), self._restore, peer)

    def _restore(self, node: SimNode) -> int:
        """Put an earlier store under a node, mostly the newest backup. Returns in how many ms it starts again."""
        if self.random.random() < 0.4:
            kept = self._below(len(node.images) + 1)
            del node.images[kept:]  # stores that go back belong to one history
        self.go_back(node.name, node.images[-1] if node.images else None)
        restart_ms = self._pause_ms() if self.random.random() < 0.7 else self._below(40)
        self._timeline.after(restart_ms, self.start, node.name)
        return restart_ms


class _Refused(Exception):
    """What the simulated application raises."""


def _read(tx: Tx, envelope: Envelope) -> None:
    """An effect that does nothing: it only makes the node interested."""
