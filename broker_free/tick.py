"""One tick of a node: what has arrived and what was asked for, one transaction, then the consequences. Pure.

The order is the guarantee (`tick` reads like this list):

1. Frames go through the links. What they say of the store is read before the transaction, so it is committed.
2. BEGIN. Arrivals into the inbox, effects, acks seen, publishes: every statement, every constraint.
3. DATA of plain publishes leaves now, so that the peer syncs its disk while this node syncs its own.
4. COMMIT.
5. ACKs and REJECTs, DATA that came from inside a transaction, and then everybody who waits is told.

A publish made inside an effect or a `transact` never leaves before the commit: the effect might be run again
after a crash, under new ids. When the COMMIT fails, every session that this tick used ends, and the resync of the
next one finds out what the peer really holds.

The store and the wire are Protocols: SQLite and ZeroMQ in a node, dictionaries and a seeded network in
`broker_free.testing`.
"""

from __future__ import annotations

import contextlib
import heapq
import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol, TypeVar

from broker_free import faults
from broker_free import link as links
from broker_free.antientropy import Findings, Say, Sync
from broker_free.errors import (
    DiskFloor,
    InvalidInput,
    OutboxFull,
    OutcomeUnknown,
    StoreBroken,
    StoreFailed,
    TooLarge,
    TransactionMisused,
    UnknownPeer,
)
from broker_free.frames import (
    ALARM,
    CHUNK,
    CHUNK_GET,
    EPHEMERAL,
    EPHEMERALS,
    FLAG_ANSWER,
    FLAG_EPHEMERAL,
    INTEREST,
    PROBE,
    RECEIPT,
    RECEIPTS,
    REGISTRY,
    REVOCATION,
    REVOKE,
    Frame,
)
from broker_free.limits import Limits
from broker_free.link import Held, Ledger, Link, Queued
from broker_free.message import Envelope, Message, check_message, id_to_bytes, new_id, parse_metadata
from broker_free.outside import load_json
from broker_free.registry import Entry, Key, Registry
from broker_free.registry import decode as decode_entries
from broker_free.subject import check_pattern, matches

log = logging.getLogger("broker_free")

T = TypeVar("T")

_SUBJECTS_REMEMBERED = 10_000
_WAKE_MS_MAX = 60_000
_ALARMS_REMEMBERED = 10_000
CANCELLED = "cancelled"  # the reason of a message that its sender withdrew
_IDS_A_FRAME_MAX = 128  # in one frame, so that both the question and its answer fit
EXPIRED = "expired"  # the reason of a message whose lifetime ran out while it waited
_LAGGING = "consumers lag behind"
_DONE = ("done", "dead")  # what a receipt may say; a tuple, because what a peer sends need not be hashable
_UNDECIDED = frozenset({"queued", "revoking"})  # states of a message that may still be delivered


@dataclass(slots=True, kw_only=True)  # not frozen, like all that is made once a message: it would cost 1 µs
class Accepted:
    """What became of one record that arrived."""

    row: int = 0  # of the inbox, that of the first copy for a duplicate; 0 when refused
    envelope: Envelope | None = None  # None for a duplicate
    refused: str | None = None  # why, beginning with a code: too-large, malformed, conflict …


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that a person should look at. Everything goes on as well as it can meanwhile."""

    # clone: two live boots of one node id · conflict: one message id for two messages · regression: a peer's store
    # went back in time · version: no common protocol version
    kind: str
    peer: str
    detail: str


class Journal(Ledger, Protocol):
    """The store as a tick needs it. Every method but begin, commit and rollback runs inside a transaction.

    Every `now_ms` is steady time (`clock.py`): what is on disk must not age by an hour because UTC was set.
    """

    def begin(self) -> None: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def savepoint(self) -> AbstractContextManager[None]: ...

    def accept(
        self,
        sender: str,
        lane: int,
        records: Sequence[tuple[bytes, bytes]],
        now_ms: int,
        ttls: Sequence[int] = (),
    ) -> list[Accepted]:
        """Insert what is new, recognise what is not, refuse what never can be.

        `ttls` holds what remains of each one's lifetime, 0 for none. After it the message is not handed out any more.
        """
        ...

    def settle(self, row: int) -> None:
        """An effect has dealt with this inbox row."""
        ...

    @property
    def backlog(self) -> int:
        """How many messages wait here for consumers, or for an effect to be tried again. Costs next to nothing."""
        ...

    def failed(self, row: int, reason: str, now_ms: int) -> None:
        """An effect has failed on this inbox row; it is tried again later, or dead after too many tries."""
        ...

    def due(self, now_ms: int, limit: int) -> list[Envelope]:
        """Return inbox rows whose effect is to be tried again."""
        ...

    def has_due(self, now_ms: int) -> bool:
        """Say cheaply whether `due` would return anything. Called outside transactions too."""
        ...

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
        """Store one body and an outbox row for each recipient; return (peer, row) pairs.

        A recipient that already has this id is left out: a retry under the caller's own id is no second message.
        """
        ...

    def write_queued(self) -> None:
        """Run the inserts of `enqueue`, which may have been put off to run as one."""
        ...

    def mark_delivered(self, rows: Sequence[tuple[str, int]], now_ms: int) -> None: ...
    def mark_delivered_ids(self, peer: str, ids: Sequence[str], now_ms: int) -> None: ...
    def mark_dead(self, peer: str, message_id: str, reason: str, now_ms: int) -> bool:
        """Give a queued message up; False when it is not queued any more."""
        ...

    def mark_expired(self, peer: str, message_id: str, now_ms: int) -> bool:
        """The lifetime of a queued message is over; False when it is not queued any more."""
        ...

    def note_acked(self, peer: str, message_id: str, row: int) -> None:
        """Remember what `peer` acked under its highest row so far; a lower row changes nothing."""
        ...

    @property
    def receipt_peers(self) -> set[str]:
        """Whom to tell of receipts that this transaction noted; emptied by whoever told them."""
        ...

    def note_receipt(self, row: int, state: str, now_ms: int) -> None:
        """Keep a receipt for the sender of this inbox row, if it wants one and no consumer has yet to do with it."""
        ...

    def receipts(self, peer: str, limit: int) -> list[tuple[str, str]]:
        """Return (message id, state) of the receipts that `peer` has not confirmed."""
        ...

    def drop_receipts(self, peer: str, ids: Sequence[str]) -> None:
        """`peer` has them."""
        ...

    def take_receipts(self, peer: str, receipts: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
        """Record receipts of `peer`; return the ids that are news, and those that nobody here knows."""
        ...

    @property
    def newest_outbox_row(self) -> int:
        """The highest row number given out so far."""
        ...

    def outbox_of(self, message_id: str) -> list[tuple[str, int, str, bool]]:
        """Return (peer, row, state, whether its caller may have tried it before) of every recipient of a message."""
        ...

    def mark_cancelled(self, row: int, now_ms: int) -> None:
        """A queued message that has never left will not."""
        ...

    def mark_revoking(self, row: int) -> None:
        """Keep a queued message from being sent (again) until its recipient has said whether it holds it."""
        ...

    def revoking(self, peer: str, limit: int) -> list[tuple[str, bytes]]:
        """Return (id, digest) of the messages that `peer` is to be asked about."""
        ...

    def settle_revoked(
        self, peer: str, *, held: Sequence[str], free: Sequence[str], now_ms: int
    ) -> tuple[list[str], list[str]]:
        """Take in the answer; return which of them became delivered, and which cancelled."""
        ...

    def unrevoke(self, peer: str) -> None:
        """Queue them again: this peer cannot be asked."""
        ...

    def requeue(self, peer: str, now_ms: int) -> int:
        """Queue the retained delivered window of a peer again, and forget what it last acked."""
        ...

    def registry_save(self, entries: Sequence[Entry]) -> None:
        """Write entries over what their keys hold."""
        ...

    def registry_drop(self, keys: Sequence[Key]) -> None:
        """Forget keys altogether, as if they had never been."""
        ...

    def registry_note(self, name: str, value: int) -> None:
        """Keep a number of the registry's own: "synced_ms", "clock"."""
        ...

    def save_interest(self, peer: str, patterns: Sequence[str]) -> None: ...


class Wire(Protocol):
    """The sockets as a tick needs them."""

    def send(self, conn: int, frame: Frame) -> bool:
        """Hand a frame over without blocking. False: it could not leave, and the session is over."""
        ...

    def close(self, conn: int) -> None: ...
    def dial(self, peer: str) -> int | None:
        """Start a fresh connection; None when no address is known."""
        ...


class Tx:
    """What a transactional effect may do. Valid only while its function runs."""

    def __init__(self, tick: Tick, now_ms: int, *, is_effect: bool = False) -> None:
        self.now_ms = now_ms  # UTC
        self.steady_ms = tick.steady_ms  # what lifetimes and retries count in: see `clock.py`
        self._is_effect = is_effect
        self.node_id = tick.me
        self._of: Tick | None = tick
        self.held_back: list[str] = []  # peers with rows that leave after the commit
        self.entries: list[Entry] = []
        self.arrivals: list[Envelope] = []  # what it published to this node itself
        self.callbacks: list[Callable[[], None]] = []

    def publish(
        self,
        subject: str,
        body: bytes,
        *,
        to: Sequence[str] | None = None,
        headers: Mapping[str, str] | None = None,
        ttl_ms: int | None = None,
        message_id: str | None = None,
        blobs: Sequence[str] = (),
        settles: bool = False,
    ) -> str:
        """Queue a message in this transaction and return its id. It leaves only after the commit.

        `to` names node ids; without it, whoever is interested in the subject. Raises DiskFloor when room is short,
        unless it `settles` something: what answers for a message that was accepted before may use the last room, and
        so may every effect.
        """
        if not settles:
            self.check_room(len(body))
        message = Message(
            id=message_id or new_id(self.now_ms),
            subject=subject,
            body=body,
            headers=headers or {},
            blobs=tuple(blobs),
        )
        rows, arrivals = self._tick().queue(message, to, ttl_ms, may_repeat=message_id is not None)
        self.held_back += [peer for peer, _ in rows]
        self.arrivals += arrivals
        return message.id

    def check_room(self, size: int) -> None:
        """Raise DiskFloor when room is so short that nothing new may be written. Of no matter to effects."""
        if not self._is_effect:
            self._tick().admit(size)

    def registry_get(self, bucket: str, key: str) -> Mapping[str, Any] | None:
        """Return a key's value, as this transaction has written it or else as it is committed."""
        for made in reversed(self.entries):
            if made.at == (bucket, key):
                return made.value
        entry = self._tick().registry.entry((bucket, key))
        return entry.value if entry else None

    def registry_put(self, bucket: str, key: str, value: Mapping[str, Any] | None) -> Entry:
        """Write a replicated entry in this transaction; None deletes it. Peers hear of it after the commit.

        In an owned bucket the key begins with `node_id` and a dot. Raises InvalidInput and RegistryFull.
        """
        made = self._tick().registry.make(bucket, key, value, now_ms=self.now_ms, pending=len(self.entries))
        self.entries.append(made)
        return made

    def after_commit(self, fn: Callable[[], None]) -> None:
        """Have `fn` called on the event loop once this transaction is on disk."""
        self._tick()
        self.callbacks.append(fn)

    def _tick(self) -> Tick:
        if self._of is None:
            raise TransactionMisused(
                "this transaction is over: its function has returned",
                hint="keep nothing of tx; what comes later is a transaction of its own",
            )
        return self._of

    def end(self) -> None:
        """Its function has returned or raised."""
        self._of = None


@dataclass(slots=True, eq=False)
class Publish:
    """A plain publish: it may be on the wire while its own commit runs."""

    message: Message
    # None: whoever is interested when the transaction runs, offline ones included
    recipients: Sequence[str] | None
    ttl_ms: int | None = None
    may_repeat: bool = True  # False for an id that was just made: no table holds it yet
    meta: bytes | None = None  # of `message`, if check_message has returned it already
    ended: Mapping[str, str] | None = (
        None  # of a repeated one: for whom it can never be delivered, and its state
    )


@dataclass(frozen=True, slots=True, eq=False)
class Transact:
    """A function to run in the transaction, in a savepoint of its own."""

    fn: Callable[..., Any]  # Any: the caller's own arguments and result
    args: tuple[Any, ...] = ()


Work = Publish | Transact
Effect = Callable[[Tx, Envelope], object]  # what it returns is ignored; a coroutine is refused


@dataclass(slots=True)
class Outcome:
    """What a tick has to tell. All of it is on disk, here or at the peer that said so."""

    results: list[tuple[Work, Any]] = field(default_factory=list)  # Any: what the work's function returned
    failures: list[tuple[Work, BaseException]] = field(default_factory=list)
    arrivals: list[Envelope] = field(default_factory=list)
    callbacks: list[Callable[[], None]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    delivered: list[tuple[str, str]] = field(default_factory=list)  # (message id, peer)
    dead: list[tuple[str, str, str]] = field(default_factory=list)  # (message id, peer, reason)
    opened: list[tuple[str, links.Opened]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)  # (peer, reason)
    regressed: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)  # peers that began or ceased to take messages
    alarms: list[Alarm] = field(default_factory=list)
    receipts: list[tuple[str, str, str]] = field(default_factory=list)  # (message id, peer, done or dead)
    ephemerals: list[Envelope] = field(default_factory=list)  # never stored; row 0
    probes: list[tuple[str, bytes]] = field(default_factory=list)  # (peer, message of `presence`)
    chunks: list[tuple[str, Frame]] = field(default_factory=list)  # (peer, CHUNK_GET or CHUNK)
    error: StoreFailed | None = None  # why the transaction failed; the first five lists are empty then

    def extend(self, later: Outcome) -> None:
        """Append what a later part of the same tick has to tell, except an error."""
        for name in _OUTCOMES:
            if told := getattr(later, name):
                getattr(self, name).extend(told)


_OUTCOMES = tuple(name for name in Outcome.__slots__ if name != "error")


@dataclass(slots=True)
class _Arrival:
    peer: str
    arrived: links.Arrived
    accepted: list[Accepted] = field(default_factory=list)


@dataclass(slots=True)
class _Asked:
    """A REVOKE that waits for this tick's commit."""

    peer: str
    ids: list[str]
    digests: list[bytes]
    held: Held | None = None


@dataclass(slots=True)
class _Inputs:
    """What the frames of this tick ask the transaction for."""

    arrivals: list[_Arrival] = field(default_factory=list)
    resynced: list[tuple[str, links.AckedIds]] = field(default_factory=list)
    rejected: list[tuple[str, links.Rejected]] = field(default_factory=list)
    expired: list[tuple[str, links.Expired]] = field(default_factory=list)
    regressed: list[str] = field(default_factory=list)
    asked: list[_Asked] = field(default_factory=list)  # do we hold these messages that a peer wants back?
    # (peer, id -> inbox row of what it holds, ids that it does not hold)
    answered: list[tuple[str, dict[str, int], list[str]]] = field(default_factory=list)
    unrevoked: list[str] = field(default_factory=list)  # peers that cannot be asked
    receipts: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)  # (peer, (id, state))
    confirmed: list[tuple[str, list[str]]] = field(default_factory=list)  # (peer, ids of receipts it has)
    registry: Findings = field(default_factory=Findings)
    interests: dict[str, tuple[str, ...]] = field(default_factory=dict)
    has_opened: bool = False  # acks seen earlier are written before a new session's pump reads

    def __bool__(self) -> bool:
        return bool(
            self.arrivals
            or self.resynced
            or self.rejected
            or self.expired
            or self.regressed
            or self.asked
            or self.answered
            or self.unrevoked
            or self.receipts
            or self.confirmed
            or self.registry
            or self.interests
            or self.has_opened
        )


class Tick:
    """The engine of a node: its links, its effects, and the order in which things happen."""

    refused: Counter[str]  # what peers sent that means nothing here, by reason
    alarms: Counter[str]  # by kind, those included that were not told again
    link_type: type[Link] = Link  # the simulator leaves rules out here, one at a time

    def __init__(
        self,
        *,
        me: str,
        boot: int,
        about: Callable[[], Mapping[str, Any]],
        journal: Journal,
        wire: Wire,
        limits: Limits,
        random: Random,
        registry: Registry,
        synced_ms: int = 0,
    ) -> None:
        """`synced_ms` is the UTC time at which this node last compared registries, 0 for never."""
        self.me = me
        self.registry = registry
        self.interest: tuple[str, ...] = ()  # this node's own patterns
        self.interests: dict[str, tuple[str, ...]] = {}  # of each peer
        self.links: dict[str, Link] = {}
        self.refused = registry.refused = Counter()
        self.alarms = Counter()
        self._told_ms: dict[tuple[str, str], int] = {}  # (kind, peer) of alarms -> when it was told last
        self._holds: dict[str, int | None] = {}  # why this node takes no messages -> until when
        self._controls: dict[int, Callable[[str, Frame], None]] = {
            REGISTRY: self._on_registry,
            INTEREST: self._on_interest,
            PROBE: self._on_probe,
            ALARM: self._on_alarm,
            CHUNK_GET: self._on_chunk,
            CHUNK: self._on_chunk,
            REVOKE: self._on_revoke,
            RECEIPT: self._on_receipt,
            EPHEMERAL: self._on_ephemeral,
        }
        self._row_at_start: dict[
            str, int
        ] = {}  # of each peer: rows up to it may have left in an earlier life
        self._to_revoke: set[str] = set()  # peers to be asked once this tick is committed
        self.listening: tuple[str, ...] = ()  # subjects of messages that are never stored
        self.listeners: dict[str, tuple[str, ...]] = {}  # of each connected peer
        self._boot = boot
        self._sync = Sync(me=me, registry=registry, limits=limits, random=random, synced_ms=synced_ms)
        self._utc_ms = 0
        self._about = lambda: {**about(), **self._sync.about(self._utc_ms)}
        self._journal = journal
        self._wire = wire
        self._limits = limits
        self._random = random
        # Raises DiskFloor instead of letting bytes in; called before anything is written or sent.
        self.admit: Callable[[int], None] = lambda size: None
        self._effects: list[tuple[str, Effect]] = []
        self._effects_by_subject: dict[str, tuple[Effect, ...]] = {}
        self._dialled: dict[int, str] = {}  # connections opened here -> peer
        self._is_eager = True
        # A tick visits only links with something to do: those that were touched since the last one, and those whose
        # time has come. Whoever calls a link that may then have to act stirs it; `_do` does.
        self._stirred: set[str] = set()
        self._talk_due_ms = 0  # when registries are to be compared, found at the end of each tick
        self._places = 0
        self._place: dict[str, int] = {}  # of each peer: the order in which links are visited
        self._alarms: list[
            tuple[int, int, str]
        ] = []  # heap of (monotonic time, place, peer), stale ones included
        self._alarm_ms: dict[
            str, int
        ] = {}  # of each peer: the one alarm that counts, never later than it must be
        self._marks: list[tuple[str, int]] = []  # acks seen, not yet written: they ride on the next commit
        self._marks_last: dict[str, tuple[str, int]] = {}
        self._marks_due_ms: int | None = None
        self._inputs = _Inputs()
        self._outcome = Outcome()
        self._now_ms = 0  # monotonic
        self._steady_ms = 0

    # -- set-up ---------------------------------------------------------------------------------------------

    def add_effect(self, pattern: str, fn: Effect) -> None:
        check_pattern(pattern)
        self._effects.append((pattern, fn))
        self._effects_by_subject.clear()
        self.interest = tuple(sorted({*self.interest, pattern}))

    def add_interest(self, pattern: str) -> None:
        """Add a subscription's pattern and tell the peers. Raises TooLarge when there are too many."""
        self.check_interest(pattern)
        self.interest = tuple(sorted({*self.interest, pattern}))
        for peer in self.links:
            self._tell_interest(peer)

    def check_interest(self, pattern: str) -> None:
        check_pattern(pattern)
        if len({*self.interest, pattern}) > self._limits.interest_patterns_max:
            raise TooLarge(
                f"more than {self._limits.interest_patterns_max} patterns",
                hint="listen to fewer, wider ones: a.> covers a.b and a.c",
            )

    def add_peer(self, peer: str) -> None:
        if peer in self.links or peer == self.me:
            return
        self.links[peer] = self.link_type(
            me=self.me,
            boot=self._boot,
            peer=peer,
            about=self._about,
            ledger=self._journal,
            limits=self._limits,
            random=self._random,
            steady=lambda: self._steady_ms,
        )
        if self._holds:
            self._do(peer, self.links[peer].grant(0, 0))
        self.links[peer].is_eager = self._is_eager
        if not self._is_eager and self._journal.in_doubt(peer, 1):
            self.links[peer].want()
        self._row_at_start[peer] = self._journal.newest_outbox_row
        self._places += 1
        self._place[peer] = self._places
        self._stirred.add(peer)

    def redial_now(self, peer: str) -> None:
        """Dial at the next tick, without waiting any longer: there is reason to believe that the peer is there."""
        self._stirred.add(peer)
        self.links[peer].redial_now()

    def probe(self, peer: str, body: bytes) -> bool:
        """Send a message of `presence`. False: there is no session, and one is dialled at the next tick."""
        link = self.links.get(peer)
        if link is None:
            return False
        if not link.is_open:
            self.want(peer)
            return False
        self._do(peer, link.tell(PROBE, body))
        return True

    def be_eager(self, is_eager: bool) -> None:
        """Dial every peer, or only those that there is something to say to."""
        self._is_eager = is_eager
        for peer, link in self.links.items():
            link.is_eager = is_eager
            self._stirred.add(peer)
            if self._journal.in_doubt(peer, 1):
                link.want()

    def retire_idle(self, *, keep: int, idle_ms: int) -> None:
        """End the longest idle sessions while more than `keep` are open."""
        idle = {peer: link.idle_ms(self._now_ms) for peer, link in self.links.items() if link.is_open}
        excess = max(0, len(idle) - keep)
        for peer in sorted(idle, key=idle.__getitem__, reverse=True)[:excess]:
            if idle[peer] >= idle_ms:
                self._do(peer, self.links[peer].retire(self._now_ms))

    def want(self, peer: str) -> None:
        """Dial a peer in a large mesh too: there is something to say to it."""
        self.links[peer].want()
        self._stirred.add(peer)

    def skew_ms(self, peer: str) -> int | None:
        """Return how far a peer's clock was ahead of this node's at its last greeting, None if it did not say."""
        return self._sync.skews_ms.get(peer)

    def ping(self, peer: str) -> None:
        link = self.links.get(peer)
        if link is not None:
            self._do(peer, link.ping(self._now_ms))

    def hold(self, reason: str, *, for_ms: int | None = None) -> None:
        """Take no more messages from any peer until `release(reason)`, or for a time. Peers are told, and wait.

        Backpressure, not an error: what is under way still arrives, and what waits loses nothing by it.
        """
        if reason not in self._holds:
            log.warning("taking no more messages", extra={"reason": reason})
        self._holds[reason] = None if for_ms is None else self._now_ms + for_ms
        self._grant_all()

    def release(self, reason: str) -> None:
        """Take messages again, unless there is another reason not to."""
        if reason in self._holds:
            del self._holds[reason]
            log.info("taking messages again", extra={"reason": reason})
            self._grant_all()

    @property
    def steady_ms(self) -> int:
        return self._steady_ms

    @property
    def holds(self) -> tuple[str, ...]:
        """Why this node takes no messages now; empty when it does."""
        return tuple(self._holds)

    def _grant_all(self) -> None:
        window = (0, 0) if self._holds else (self._limits.credit_messages, self._limits.credit_kib)
        for peer, link in self.links.items():
            actions = link.grant(*window)
            if actions:
                self._do(peer, actions)

    def remove_peer(self, peer: str) -> None:
        link = self.links.get(peer)
        if link:
            self._do(peer, link.drop("removed", self._now_ms))
            del self.links[peer]
            del self._place[peer]
            self._stirred.discard(peer)
            self._alarm_ms.pop(peer, None)
            self.interests.pop(peer, None)

    def session(self, peer: str) -> int | None:
        """Return the id of the open session with a peer."""
        link = self.links.get(peer)
        return link.session if link is not None else None

    def speaks(self, peer: str, feature: str) -> bool:
        """Say whether the open session with a peer has a feature (`frames.FEATURES`)."""
        link = self.links.get(peer)
        return link is not None and link.has(feature)

    def tell(
        self, peer: str, kind: int, *, seq: int, lane: int, meta: Mapping[str, Any], body: bytes = b""
    ) -> None:
        """Send a frame that is no mail over the open session, if there is one. Called after `run`."""
        link = self.links.get(peer)
        if link is not None:
            was_stirred = peer in self._stirred
            if self._do(peer, link.tell(kind, body, meta, seq=seq, lane=lane)) and not was_stirred:
                self._stirred.discard(peer)  # the link is as it was: no tick has to follow

    def drop_inbound(self, reason: str) -> None:
        """End the sessions over connections that peers have opened: those connections are gone."""
        for peer, link in self.links.items():
            if link.conn is not None and link.conn not in self._dialled:
                self._do(peer, link.on_closed(link.conn, reason, self._now_ms))

    def drop(self, peer: str, reason: str) -> None:
        """End the session with a peer from this side. It is dialled again after a pause."""
        link = self.links.get(peer)
        if link is not None:
            self._do(peer, link.drop(reason, self._now_ms))

    def take_entries(self, body: bytes) -> None:
        """Take in registry entries that came outside a session, from a node that is trusted with that."""
        with contextlib.suppress(InvalidInput):
            entries = decode_entries(body, self._limits)
            self.registry.judge(entries, now_ms=self._utc_ms, into=self._inputs.registry.entries)

    def peer_of(self, conn: int) -> str:
        """Return the peer of a connection dialled here, or an empty string."""
        return self._dialled.get(conn, "")

    # -- what has arrived -----------------------------------------------------------------------------------

    def start(self, *, now_ms: int, utc_ms: int, steady_ms: int | None = None) -> None:
        """Begin a tick. `now_ms` is monotonic and rules time-outs, `utc_ms` is for people and for stamps.

        `steady_ms` (`clock.py`) is what lifetimes and retries count in; without it, UTC.
        """
        self._now_ms, self._utc_ms = now_ms, utc_ms
        self._steady_ms = utc_ms if steady_ms is None else steady_ms

    def connected(self, conn: int) -> None:
        peer = self._dialled.get(conn)
        if peer is None or peer not in self.links:
            self._wire.close(conn)
            return
        self._do(peer, self.links[peer].on_connected(conn, self._now_ms))

    def closed(self, conn: int, reason: str) -> None:
        peer = self._dialled.pop(conn, None)
        if peer is not None and peer in self.links:
            self._do(peer, self.links[peer].on_closed(conn, reason, self._now_ms))

    def frame(self, peer: str, conn: int, frame: Frame) -> None:
        link = self.links.get(peer)
        if link is not None:
            self._do(peer, link.on_frame(conn, frame, self._now_ms))

    # -- the tick itself ------------------------------------------------------------------------------------

    def run(self, work: Sequence[Work]) -> Outcome:
        """Finish the tick: one transaction if there is anything to write, then its consequences."""
        self._stir_due()
        if self._holds:
            self._release_due()
        if self._stirred:
            for peer in self._to_visit():
                actions = self.links[peer].on_tick(self._now_ms)
                if actions:
                    self._do(peer, actions)
        self._sync.keep_house(now_ms=self._now_ms, utc_ms=self._utc_ms, into=self._inputs.registry)
        if work or self._inputs or self._marks_are_due() or self._journal.has_due(self._steady_ms):
            self._transaction(work)
        self._weigh_backlog()
        self._talk_due_ms = self._sync.next_wake_ms(self._now_ms)
        if self._talk_due_ms <= self._now_ms:
            self._converse()
            self._talk_due_ms = self._sync.next_wake_ms(self._now_ms)
        if self._stirred:
            self._follow_up()
        return self.take_outcome()

    def take_outcome(self) -> Outcome:
        """Return what there is to tell. `run` does; after one that raised, what it had done until then."""
        outcome, self._outcome = self._outcome, Outcome()
        return outcome

    def _release_due(self) -> None:
        over = [
            reason
            for reason, until_ms in self._holds.items()
            if until_ms is not None and self._now_ms >= until_ms
        ]
        for reason in over:
            self.release(reason)

    def _weigh_backlog(self) -> None:
        """Stop the peers when consumers here lag too far behind, and let them go on at half of that."""
        waiting, most = self._journal.backlog, self._limits.backlog_messages_max
        if waiting >= most:
            if _LAGGING not in self._holds:
                self.hold(_LAGGING)
        elif self._holds and _LAGGING in self._holds and waiting <= most // 2:
            self.release(_LAGGING)

    def _follow_up(self) -> None:
        visited = self._to_visit()
        for peer in visited:
            actions = self.links[peer].pump()
            if actions:
                self._do(peer, actions)
        for peer in visited:
            link = self.links[peer]
            if link.wants_dial(self._now_ms):
                self._dial(peer, link)
            self._set_alarm(peer, link.next_wake_ms(self._now_ms))
        self._stirred.clear()

    def _to_visit(self) -> list[str]:
        """Return the peers of the stirred links in the order in which they were added."""
        if len(self._stirred) < 2:
            return list(self._stirred)
        return sorted(self._stirred, key=self._place.__getitem__)

    def _set_alarm(self, peer: str, at_ms: int) -> None:
        """Visit a link at `at_ms`. An earlier alarm stays: setting it anew with each frame would cost more."""
        if at_ms < self._alarm_ms.get(peer, at_ms + 1):
            self._alarm_ms[peer] = at_ms
            heapq.heappush(self._alarms, (at_ms, self._place[peer], peer))

    def _stir_due(self) -> None:
        alarms = self._alarms
        while alarms and alarms[0][0] <= self._now_ms:
            at_ms, _, peer = heapq.heappop(alarms)
            if self._alarm_ms.get(peer) == at_ms:
                del self._alarm_ms[peer]
                self._stirred.add(peer)

    def next_wake_ms(self) -> int:
        """Return the monotonic time at which `run` has something to do though nothing arrives."""
        if self._stirred or self._inputs:
            return self._now_ms
        alarms = self._alarms
        while alarms and self._alarm_ms.get(alarms[0][2]) != alarms[0][0]:
            heapq.heappop(alarms)
        wake_ms = alarms[0][0] if alarms else self._now_ms + _WAKE_MS_MAX
        for until_ms in self._holds.values():
            wake_ms = wake_ms if until_ms is None else min(wake_ms, until_ms)
        if self._talk_due_ms < wake_ms:
            wake_ms = max(self._now_ms, self._talk_due_ms)
        return wake_ms if self._marks_due_ms is None else min(wake_ms, self._marks_due_ms)

    def close(self) -> None:
        """Write what is pending and say goodbye, so that peers dial again at once when this node is back."""
        if self._marks:
            self._transaction(())
        self.end_sessions("closing")

    def end_sessions(self, reason: str) -> None:
        """Say goodbye to every peer."""
        for peer, link in self.links.items():
            self._do(peer, link.drop(reason, self._now_ms))

    def _transaction(self, work: Sequence[Work]) -> None:
        inputs, self._inputs = self._inputs, _Inputs()
        outcome = Outcome()
        # Peers, in the order of the work. No set: its order is another in each process, and a seed must replay.
        offered: dict[str, None] = {}
        sent_early = is_committing = False
        try:
            self._journal.begin()
            self._write_inputs(inputs, outcome)
            for one in work:
                self._perform(one, outcome, offered)
            self._journal.write_queued()  # every constraint is checked before anything leaves
            for peer in offered:
                sent_early = self._do(peer, self.links[peer].flush()) or sent_early
            if sent_early:
                faults.reach("early-data-sent")
            self._write_marks()  # after the wire: nobody waits for these, and the peer is already at work
            is_committing = True
            self._journal.commit()
        except StoreFailed as error:
            # A sync that failed proves nothing: the log may hold the whole of it, and a restart would find it.
            is_unknown = sent_early or (is_committing and isinstance(error, StoreBroken))
            broken = self._rolled_back()
            self._fail(work, error, is_unknown)
            self._outcome.error = broken or error
            return
        self._marks.clear()
        self._marks_last.clear()
        self._marks_due_ms = None
        try:
            self._acknowledge(inputs)
            self._answer_asked(inputs)
            self._exchange_receipts(inputs)
            to_revoke, self._to_revoke = self._to_revoke, set()
            for peer in sorted(to_revoke):
                self._ask_back(peer)
        finally:  # some of that reads the store, which may fail; what is on disk is told all the same
            outcome.entries = self._spread(outcome.entries, inputs)
            outcome.regressed += inputs.regressed
            self._outcome.extend(outcome)

    def _rolled_back(self) -> StoreFailed | None:
        """Undo the transaction; return why that failed, if it did."""
        try:
            self._journal.rollback()
        except StoreFailed as error:
            return error
        return None

    def _write_inputs(self, inputs: _Inputs, outcome: Outcome) -> None:
        journal, steady_ms = self._journal, self._steady_ms
        for arrival in inputs.arrivals:
            arrival.accepted = journal.accept(
                arrival.peer, arrival.arrived.lane, arrival.arrived.records, steady_ms, arrival.arrived.ttls
            )
            self._apply_effects([one.envelope for one in arrival.accepted if one.envelope], outcome)
        for peer, resync in inputs.resynced:
            journal.mark_delivered_ids(peer, resync.ids, steady_ms)
            journal.note_acked(peer, *resync.last)
            faults.reach("in-resync")
        for peer, rejected in inputs.rejected:
            if journal.mark_dead(peer, rejected.id, rejected.reason, steady_ms):
                outcome.dead.append((rejected.id, peer, rejected.reason))
                if rejected.reason.startswith("conflict"):
                    self.raise_alarm("conflict", peer, f"{rejected.id}: {rejected.reason}")
        for peer, expired in inputs.expired:
            if journal.mark_expired(peer, expired.id, steady_ms):
                outcome.dead.append((expired.id, peer, EXPIRED))
        for peer, held, free in inputs.answered:
            delivered, cancelled = journal.settle_revoked(peer, held=list(held), free=free, now_ms=steady_ms)
            if delivered:  # an ack like any other: it is what shows later that the peer's store went back
                journal.note_acked(peer, *max(held.items(), key=lambda one: one[1]))
            outcome.delivered += [(message_id, peer) for message_id in delivered]
            outcome.dead += [(message_id, peer, CANCELLED) for message_id in cancelled]
        for peer in inputs.unrevoked:
            journal.unrevoke(peer)
        for peer, ids in inputs.confirmed:
            journal.drop_receipts(peer, ids)
        for peer, receipts in inputs.receipts:
            new, unknown = journal.take_receipts(peer, receipts)
            self.refused["receipt-unknown"] += len(unknown)  # normal after a store went back, or a day
            outcome.receipts += [(one, peer, state) for one, state in receipts if one in new]
        for asked in inputs.asked:  # after the arrivals: what came before the question counts as held
            asked.held = journal.held(asked.peer, asked.ids, asked.digests)
        for peer in inputs.regressed:
            count = journal.requeue(peer, steady_ms)
            faults.reach("in-requeue")
            detail = f"its store went back in time; {count} delivered messages are queued again"
            self.raise_alarm("regression", peer, detail)
        if inputs.registry:
            self._write_findings(inputs.registry)
        for peer, patterns in inputs.interests.items():
            journal.save_interest(peer, patterns)
        self._apply_effects(journal.due(steady_ms, self._limits.tick_operations_max), outcome)

    def _write_findings(self, found: Findings) -> None:
        journal = self._journal
        if found.drops:
            journal.registry_drop(found.drops)
        if found.entries:
            journal.registry_save(list(found.entries.values()))
        for name, value in found.notes.items():
            journal.registry_note(name, value)

    def _write_marks(self) -> None:
        if self._marks:
            self._journal.mark_delivered(self._marks, self._steady_ms)
        for peer, (message_id, row) in self._marks_last.items():
            self._journal.note_acked(peer, message_id, row)

    def _perform(self, work: Work, outcome: Outcome, offered: dict[str, None]) -> None:
        try:
            if isinstance(work, Publish):
                outcome.results.append((work, self._publish(work, outcome, offered)))
            else:
                tx = Tx(self, self._utc_ms)
                with self._journal.savepoint():
                    result = _call(work.fn, tx, *work.args)
                    tx.end()
                    self._write_entries(tx)
                self._absorb(tx, outcome)
                outcome.results.append((work, result))
        except DiskFloor as error:
            self.refused[error.code] += 1
            outcome.failures.append((work, error))
        except StoreFailed:
            raise
        except Exception as error:  # noqa: BLE001  the caller's function may raise anything; its savepoint is undone
            if isinstance(error, TooLarge | OutboxFull):
                self.refused[error.code] += 1
            outcome.failures.append((work, error))

    def _publish(self, work: Publish, outcome: Outcome, offered: dict[str, None]) -> list[str]:
        """Queue a plain publish and offer it to the links at once. Returns the peers it was queued for."""
        meta = work.meta or check_message(work.message, self._limits)
        self.admit(len(meta) + len(work.message.body))
        rows, arrivals = self._queue(
            work.message, meta, work.recipients, work.ttl_ms, may_repeat=work.may_repeat
        )
        for peer, row in rows:
            link = self.links.get(peer)
            if link is None:
                continue
            self._stirred.add(peer)
            queued = Queued(row=row, id=work.message.id, meta=meta, body=work.message.body)
            if work.ttl_ms:
                queued.expires_ms, queued.is_timed = self._steady_ms + work.ttl_ms, True
            if link.offer(queued):
                offered[peer] = None
        self._apply_effects(arrivals, outcome)
        recipients = [peer for peer, _ in rows]
        return recipients + self._awaited(work, recipients) if work.may_repeat else recipients

    def _awaited(self, work: Publish, fresh: Sequence[str]) -> list[str]:
        """Return who else has not confirmed a message that was published before under the same id."""
        self._write_marks()  # whoever is known to hold it is not waited for
        earlier = {
            peer: state
            for peer, _, state, _ in self._journal.outbox_of(work.message.id)
            if peer not in fresh and (work.recipients is None or peer in work.recipients)
        }
        work.ended = {
            peer: state for peer, state in earlier.items() if state not in _UNDECIDED | {"delivered"}
        }
        return [peer for peer, state in earlier.items() if state in _UNDECIDED]

    def _interested(self, subject: str) -> list[str]:
        """Return the members, offline ones included, whose interest covers a subject."""
        everybody = {self.me: self.interest, **self.interests}
        return [
            peer for peer, patterns in everybody.items() if any(matches(one, subject) for one in patterns)
        ]

    def queue(
        self, message: Message, recipients: Sequence[str] | None, ttl_ms: int | None, *, may_repeat: bool
    ) -> tuple[list[tuple[str, int]], list[Envelope]]:
        """Queue a message from inside a transaction: (peer, outbox row) pairs and what arrived here by it."""
        meta = check_message(message, self._limits)
        return self._queue(message, meta, recipients, ttl_ms, may_repeat=may_repeat)

    def _queue(
        self,
        message: Message,
        meta: bytes,
        recipients: Sequence[str] | None,
        ttl_ms: int | None,
        *,
        may_repeat: bool,
    ) -> tuple[list[tuple[str, int]], list[Envelope]]:
        if ttl_ms is not None and not 0 < ttl_ms <= self._limits.ttl_ms_max:
            raise InvalidInput(
                f"a lifetime of {ttl_ms} ms; it must be positive and at most {self._limits.ttl_ms_max}"
            )
        if recipients is None:
            recipients = self._interested(message.subject)
        if len(recipients) > self._limits.recipients_max:
            raise TooLarge(f"{len(recipients)} recipients; the limit is {self._limits.recipients_max}")
        for peer in recipients:
            self._check_member(peer)
        remote = [peer for peer in dict.fromkeys(recipients) if peer != self.me]
        rows = self._journal.enqueue(
            message, meta, remote, ttl_ms=ttl_ms, now_ms=self._steady_ms, may_repeat=may_repeat
        )
        arrivals: list[Envelope] = []
        if self.me in recipients:
            accepted = self._journal.accept(
                self.me, 0, [(meta, message.body)], self._steady_ms, (ttl_ms,) if ttl_ms else ()
            )
            arrivals = [one.envelope for one in accepted if one.envelope]
        return rows, arrivals

    def _apply_effects(self, envelopes: Iterable[Envelope], outcome: Outcome) -> None:
        """Run the effects of new messages, those included that an effect publishes to this node itself.

        All of a batch share a savepoint, which costs as much as an insert; if one raises, each has its own.
        """
        batch = list(envelopes)
        outcome.arrivals += batch
        batch = [envelope for envelope in batch if self.effects_of(envelope.subject)]
        if not batch:
            return
        done: list[Tx] | None = None
        try:
            done = self._run_effects(batch)
        except StoreFailed:
            raise
        except Exception:  # noqa: BLE001  told below, once it is known whose it is
            pass
        if done is None:
            done = [tx for envelope in batch for tx in self._run_alone(envelope)]
        for tx in done:
            self._absorb(tx, outcome)

    def _run_effects(self, batch: Sequence[Envelope]) -> list[Tx]:
        done: list[Tx] = []
        with self._journal.savepoint():
            for envelope in batch:
                tx = Tx(self, self._utc_ms, is_effect=True)
                for effect in self.effects_of(envelope.subject):
                    _call(effect, tx, envelope)
                tx.end()
                self._write_entries(tx)
                self._journal.settle(envelope.row)
                if envelope.wants_receipt:
                    self._journal.note_receipt(envelope.row, "done", self._steady_ms)
                done.append(tx)
                faults.reach("effect-applied")
        return done

    def _run_alone(self, envelope: Envelope) -> list[Tx]:
        """One bad message must not stop the others: it is kept, tried again, and dead after too many tries."""
        try:
            return self._run_effects([envelope])
        except StoreFailed:
            raise
        except Exception as error:
            log.exception("effect failed", extra={"id": envelope.id, "subject": envelope.subject})
            self._journal.failed(envelope.row, f"{type(error).__name__}: {error}"[:200], self._steady_ms)
            return []

    def effects_of(self, subject: str) -> tuple[Effect, ...]:
        """Return what is to run for messages of a subject."""
        found = self._effects_by_subject.get(subject)
        if found is None:
            if len(self._effects_by_subject) >= _SUBJECTS_REMEMBERED:
                self._effects_by_subject.clear()  # subjects come from outside: bounded
            found = tuple(fn for pattern, fn in self._effects if matches(pattern, subject))
            self._effects_by_subject[subject] = found
        return found

    def _write_entries(self, tx: Tx) -> None:
        if tx.entries:
            self._journal.registry_save(tx.entries)

    def _absorb(self, tx: Tx, outcome: Outcome) -> None:
        """Take over what a function did, now that its savepoint is released."""
        for peer in tx.held_back:
            link = self.links.get(peer)
            if link is not None:
                self._stirred.add(peer)
                link.hold_back()
        outcome.entries += tx.entries
        outcome.callbacks += tx.callbacks
        self._apply_effects(tx.arrivals, outcome)

    def _acknowledge(self, inputs: _Inputs) -> None:
        """Ack what is on disk now: rejects first, then one ack for the last record of each session."""
        acks: dict[tuple[str, int], tuple[int, int, int]] = {}  # -> last seq, highest row, its seq
        for arrival in inputs.arrivals:
            link, arrived = self.links.get(arrival.peer), arrival.arrived
            if link is None:
                continue
            first = arrived.seq - len(arrival.accepted) + 1
            _, row, at = acks.get((arrival.peer, arrived.session), (0, 0, 0))
            for seq, accepted in enumerate(arrival.accepted, start=first):
                if accepted.refused is not None:
                    if accepted.refused.startswith("conflict"):
                        self.raise_alarm("conflict", arrival.peer, f"refused a message: {accepted.refused}")
                    self._do(
                        arrival.peer, link.reject(session=arrived.session, seq=seq, reason=accepted.refused)
                    )
                if accepted.row > row:  # a duplicate has the row of its first copy: not always the highest
                    row, at = accepted.row, seq
            acks[arrival.peer, arrived.session] = (arrived.seq, row, at)
        if acks:
            faults.reach("before-ack")
        for (peer, session), (seq, row, at) in acks.items():
            self._do(peer, self.links[peer].committed(session=session, seq=seq, row=row, at=at))
        if acks:
            faults.reach("after-ack")

    def _spread(self, own: Sequence[Entry], inputs: _Inputs) -> list[Entry]:
        """Make registry entries and interests count, and tell the peers. Returns the entries in their order."""
        registry, found = self.registry, inputs.registry
        self.interests.update(inputs.interests)
        if not (own or found):
            self._say(self._sync.committed(()))
            return []
        gone = [
            replace(entry, value=None)
            for at in found.drops
            if at not in found.entries and (entry := registry.entry(at)) and entry.value is not None
        ]
        registry.drop(found.drops)
        registry.apply(own, own=True)
        registry.apply(found.entries.values())
        written = [entry for entry in found.entries.values() if entry.origin == self.me]
        self._say(self._sync.committed([*own, *written]))
        return [*gone, *found.entries.values(), *own]

    def _converse(self) -> None:
        turns = self._sync.turns
        self._say(self._sync.converse(now_ms=self._now_ms, utc_ms=self._utc_ms))
        if self._sync.turns > turns and not self._is_eager and self.links:
            # Where sessions are dialled on demand, comparing is one: greetings show whether there is more to say.
            self.want(list(self.links)[int(self._random.random() * len(self.links))])

    def _say(self, says: Iterable[Say]) -> None:
        for peer, meta, body in says:
            self._do(peer, self.links[peer].tell(REGISTRY, body, meta))

    def _fail(self, work: Sequence[Work], error: StoreFailed, is_unknown: bool) -> None:
        """Nothing of this tick is on disk. End every session: what was sent early is found out by the resync."""
        log.error("transaction failed", extra={"error": error.message})
        self._sync.forget()
        self.end_sessions("commit failed")
        cause: StoreFailed = error
        if is_unknown:
            cause = OutcomeUnknown(
                f"the commit failed, and it may have happened all the same: {error.message}",
                hint="publish again under the same message id; a copy that did arrive is recognised",
            )
        self._outcome.failures += [(one, cause) for one in work]

    # -- carrying out what the links say --------------------------------------------------------------------

    def _do(self, peer: str, actions: Iterable[links.Action]) -> bool:
        """Carry out a link's actions in order. Returns whether any frame left."""
        self._stirred.add(peer)
        has_sent = False
        for action in actions:
            match action:
                case links.Send(conn, frame):
                    if self._wire.send(conn, frame):
                        has_sent = True
                    else:
                        self._do(peer, self.links[peer].on_unsent(conn, self._now_ms))
                case links.Close(conn):
                    self._dialled.pop(conn, None)
                    self._wire.close(conn)
                case links.Arrived():
                    self._inputs.arrivals.append(_Arrival(peer, action))
                case links.Acked(rows, last):
                    self._marks += [(peer, row) for row, _ in rows]
                    self._marks_last[peer] = max(
                        last, self._marks_last.get(peer, last), key=lambda acked: acked[1]
                    )
                    self._marks_due_ms = self._marks_due_ms or self._now_ms + self._limits.marks_delay_ms
                    self._outcome.delivered += [(message_id, peer) for _, message_id in rows]
                case links.AckedIds(ids, _):
                    self._inputs.resynced.append((peer, action))
                    self._outcome.delivered += [(message_id, peer) for message_id in ids]
                case links.Rejected():
                    self._inputs.rejected.append((peer, action))
                case links.Expired():
                    self._inputs.expired.append((peer, action))
                case links.Regressed():
                    self._inputs.regressed.append(peer)
                case links.Opened():
                    self._on_opened(peer, action)
                case links.Lost(reason):
                    self._forget_marks(peer)
                    self.listeners.pop(peer, None)
                    self._sync.lost(peer)
                    self._outcome.lost.append((peer, reason))
                case links.Blocked():
                    self._outcome.blocked.append(peer)
                case links.Raised(kind, detail):
                    self.raise_alarm(kind, peer, detail)
                case links.Ignored(reason):
                    self.refused[reason] += 1
                case links.Control(frame):
                    self._on_control(peer, frame)
        return has_sent

    def _on_opened(self, peer: str, opened: links.Opened) -> None:
        self._inputs.has_opened = True
        self._outcome.opened.append((peer, opened))
        # First, because telling may fail and end the session, and then the comparison ends with it.
        self._sync.opened(peer, opened.about, now_ms=self._now_ms, utc_ms=self._utc_ms)
        self._tell_interest(peer)
        if self.listening:
            self._tell_listening(peer)
        self._ask_back(peer)
        self._tell_receipts(peer)

    def _tell_interest(self, peer: str) -> None:
        body = json.dumps(self.interest).encode()
        self._do(peer, self.links[peer].tell(INTEREST, body))

    def _on_control(self, peer: str, frame: Frame) -> None:
        handler = self._controls.get(frame.kind)
        if handler is None:
            self.refused["frame-type"] += 1
            return
        try:
            handler(peer, frame)
        except InvalidInput as error:
            self.refused["frame-metadata"] += 1
            self._do(peer, self.links[peer].drop(error.message, self._now_ms))

    def _on_registry(self, peer: str, frame: Frame) -> None:
        self._sync.take(
            peer,
            frame.meta,
            frame.body,
            now_ms=self._now_ms,
            utc_ms=self._utc_ms,
            into=self._inputs.registry,
        )

    def _on_interest(self, peer: str, frame: Frame) -> None:
        patterns = _patterns_of(frame.body, self._limits)
        if frame.flags & FLAG_EPHEMERAL:
            self.listeners[peer] = patterns  # for as long as this session lasts
            return
        if patterns != self.interests.get(peer):
            self._inputs.interests[peer] = patterns

    def _on_probe(self, peer: str, frame: Frame) -> None:
        self._outcome.probes.append((peer, frame.body))

    def _on_chunk(self, peer: str, frame: Frame) -> None:
        self._outcome.chunks.append((peer, frame))  # after the mail of this tick

    # -- messages that are never stored ---------------------------------------------------------------------

    def listen(self, patterns: Sequence[str]) -> None:
        """Say which subjects this node wants to hear of while it is connected."""
        for pattern in patterns:
            check_pattern(pattern)
        self.listening = tuple(sorted(set(patterns)))
        for peer in self.links:
            self._tell_listening(peer)

    def _tell_listening(self, peer: str) -> None:
        link = self.links[peer]
        if link.has(EPHEMERALS):
            self._do(peer, link.tell(INTEREST, json.dumps(self.listening).encode(), flags=FLAG_EPHEMERAL))

    def send(self, message: Message, to: Sequence[str] | None) -> list[str]:
        """Hand a message to peers that are connected now, stored nowhere, at most once; return to whom."""
        meta = check_message(message, self._limits)
        if to is None:
            everybody = {self.me: self.listening, **self.listeners}
            to = [
                peer
                for peer, patterns in everybody.items()
                if any(matches(one, message.subject) for one in patterns)
            ]
        for peer in to:
            self._check_member(peer)
        reached: list[str] = []
        for peer in dict.fromkeys(to):
            if peer == self.me:
                self._outcome.ephemerals.append(_ephemeral(self.me, message))
                reached.append(peer)
                continue
            for action in self.links[peer].ephemeral(meta, message.body):
                # Not through `_do`: a full pipe drops this message, not the session.
                if isinstance(action, links.Send) and self._wire.send(action.conn, action.frame):
                    reached.append(peer)
        return reached

    def _check_member(self, peer: str) -> None:
        if peer != self.me and peer not in self.links:
            raise UnknownPeer(f"no member {peer!r} in this mesh", hint="pair with it by an invitation first")

    def _on_ephemeral(self, peer: str, frame: Frame) -> None:
        try:
            message = parse_metadata(frame.raw_meta, frame.body, self._limits)
        except InvalidInput:
            self.refused["ephemeral-malformed"] += 1
            return
        self._outcome.ephemerals.append(_ephemeral(peer, message))

    # -- receipts: that a message was not only delivered but done with ----------------------------------------

    def _tell_receipts(self, peer: str) -> None:
        link = self.links.get(peer)
        if link is None or not link.has(RECEIPTS):
            return  # they stay on disk until there is such a session
        receipts = self._journal.receipts(peer, _IDS_A_FRAME_MAX)
        if receipts:
            meta = {"ids": [one for one, _ in receipts], "states": [state for _, state in receipts]}
            self._do(peer, link.tell(RECEIPT, b"", meta))

    def _on_receipt(self, peer: str, frame: Frame) -> None:
        ids = _short_ids(frame)
        if frame.flags & FLAG_ANSWER:
            self._inputs.confirmed.append((peer, ids))
            return
        states = frame.meta.get("states")
        if not isinstance(states, list) or len(states) != len(ids) or any(one not in _DONE for one in states):
            raise InvalidInput("a RECEIPT without a state for each id")
        self._inputs.receipts.append((peer, list(zip(ids, states, strict=True))))

    def _exchange_receipts(self, inputs: _Inputs) -> None:
        """Confirm the receipts that are on disk here, and tell those that this node has noted for others."""
        for peer, receipts in inputs.receipts:
            link = self.links.get(peer)
            if link is not None:
                meta = {"ids": [one for one, _ in receipts]}
                self._do(peer, link.tell(RECEIPT, b"", meta, flags=FLAG_ANSWER))
        if not (inputs.confirmed or self._journal.receipt_peers):
            return
        told = self._journal.receipt_peers | {peer for peer, _ in inputs.confirmed}  # there may be more
        self._journal.receipt_peers.clear()
        for peer in sorted(told):
            self._tell_receipts(peer)

    # -- withdrawing a message ------------------------------------------------------------------------------

    def cancel(self, tx: Tx, message_id: str) -> tuple[dict[str, str], list[str]]:
        """Withdraw a message from those who do not hold it yet.

        Return its state for each recipient, and those for whom it was cancelled just now.

        cancelled: it will never arrive · delivered: it has · revoking: it may have, and the peer is asked as soon as it
        can be; until then it is not sent · queued: the peer speaks version 1 and cannot be asked. Runs inside a
        transaction. What has never been on the wire needs no question.
        """
        self._write_marks()  # what is known to be delivered is not asked about
        states: dict[str, str] = {}
        cancelled: list[str] = []
        for peer, row, state, may_repeat in self._journal.outbox_of(message_id):
            states[peer] = state
            link = self.links.get(peer)
            if state != "queued":
                continue
            # A try before this one may have left early, and its commit failed: then it left under another row.
            if not may_repeat and not self._may_have_left(peer, row):
                self._journal.mark_cancelled(row, self._steady_ms)
                states[peer] = CANCELLED
                cancelled.append(peer)
            elif link is None or not link.is_open or link.has(REVOCATION):
                self._journal.mark_revoking(row)
                self._to_revoke.add(peer)
                states[peer] = "revoking"
        if self._journal.held(self.me, [message_id], ()).have:
            states[self.me] = "delivered"
        return states, cancelled

    def _may_have_left(self, peer: str, row: int) -> bool:
        link = self.links.get(peer)
        return link is None or row <= self._row_at_start[peer] or link.may_have_left(row)

    def _ask_back(self, peer: str) -> None:
        """Ask a peer which of the messages to be withdrawn it holds."""
        link = self.links.get(peer)
        if link is None or not link.is_open:
            return
        wanted = self._journal.revoking(peer, _IDS_A_FRAME_MAX)
        if not wanted:
            return
        if not link.has(REVOCATION):
            self._inputs.unrevoked.append(peer)
            link.hold_back()
            return
        meta = {"ids": [message_id for message_id, _ in wanted]}
        self._do(peer, link.tell(REVOKE, b"".join(digest for _, digest in wanted), meta))

    def _on_revoke(self, peer: str, frame: Frame) -> None:
        ids = _short_ids(frame)
        if frame.flags & FLAG_ANSWER:
            held = dict(links.pairs(frame.meta.get("have")) or ())
            self._inputs.answered.append(
                (
                    peer,
                    {one: held[index] for index, one in enumerate(ids) if index in held},
                    [one for index, one in enumerate(ids) if index not in held],
                )
            )
            self._to_revoke.add(peer)  # there may be more
            return
        digests = links.digests_of(frame.body)
        if len(digests) != len(ids):
            raise InvalidInput("a REVOKE without a digest for each id")
        self._inputs.asked.append(_Asked(peer, ids, digests))

    def _answer_asked(self, inputs: _Inputs) -> None:
        """Say which of the messages that a peer wants back are on disk here. The others will never be accepted.

        Its DATA and this question came in order, so what is not here by now was lost with an earlier session or
        refused; and the peer does not send it again.
        """
        for asked in inputs.asked:
            link = self.links.get(asked.peer)
            if link is not None and asked.held is not None:
                meta = {"ids": asked.ids, "have": asked.held.have}
                self._do(asked.peer, link.tell(REVOKE, b"", meta, flags=FLAG_ANSWER))

    def _on_alarm(self, peer: str, frame: Frame) -> None:
        """A peer has noticed something that concerns this node."""
        if frame.meta.get("kind") == "clone":
            self.raise_alarm("clone", peer, f"peer said: {str(frame.meta.get('detail'))[:200]}")
        else:
            self.refused["frame-type"] += 1

    def raise_alarm(self, kind: str, peer: str, detail: str) -> None:
        """Count an alarm, and tell it unless the same was told a short while ago."""
        self.alarms[kind] += 1
        told_ms = self._told_ms.get((kind, peer))
        if told_ms is not None and self._now_ms - told_ms < self._limits.alarm_repeat_ms:
            return
        if len(self._told_ms) >= _ALARMS_REMEMBERED:
            self._told_ms.clear()
        self._told_ms[kind, peer] = self._now_ms
        log.warning("alarm", extra={"kind": kind, "peer": peer, "detail": detail})
        self._outcome.alarms.append(Alarm(kind=kind, peer=peer, detail=detail))

    def _dial(self, peer: str, link: Link) -> None:
        conn = self._wire.dial(peer)
        if conn is None:
            link.dial_failed(self._now_ms)
            return
        self._dialled[conn] = peer
        link.dialling(conn, self._now_ms)

    def _forget_marks(self, peer: str) -> None:
        """Leave what a lost session acked in doubt: the next greeting asks again, of the store as it is then."""
        self._marks = [mark for mark in self._marks if mark[0] != peer]
        self._marks_last.pop(peer, None)
        if not self._marks:
            self._marks_due_ms = None

    def _marks_are_due(self) -> bool:
        return self._marks_due_ms is not None and (
            self._now_ms >= self._marks_due_ms or len(self._marks) >= self._limits.tick_operations_max
        )


def _call(fn: Callable[..., T], tx: Tx, *args: Any) -> T:  # Any: handed through
    """Run a caller's function. A coroutine function is none, and what raises has used its tx up."""
    try:
        result = fn(tx, *args)
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError("a transaction takes a plain function, not a coroutine function")
    except BaseException:
        tx.end()
        raise
    return result


def _short_ids(frame: Frame) -> list[str]:
    """Read the ids that a REVOKE or RECEIPT names."""
    ids = frame.meta.get("ids")
    if not isinstance(ids, list) or len(ids) > _IDS_A_FRAME_MAX:
        raise InvalidInput("a frame without a short list of ids")
    for one in ids:
        id_to_bytes(one)
    return ids


def _ephemeral(sender: str, message: Message) -> Envelope:
    return Envelope(
        row=0,
        sender=sender,
        id=message.id,
        subject=message.subject,
        body=message.body,
        headers=message.headers,
        reply_to=message.reply_to,
    )


def _patterns_of(body: bytes, limits: Limits) -> tuple[str, ...]:
    patterns = load_json(body, depth_max=1, bytes_max=limits.body_bytes_max)
    if not isinstance(patterns, list) or len(patterns) > limits.interest_patterns_max:
        raise InvalidInput("interest that is not a short list")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InvalidInput("an interest that is not text")
        check_pattern(pattern)
    return tuple(patterns)
