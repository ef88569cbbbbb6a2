# As released with protocol version 1; only the imports differ. Not to be changed: it is what other nodes run.
"""The link between this node and one peer: sessions, sequence, credit, acks, resync. Pure.

It takes connections, frames, commits and ticks, with the time passed in, and returns actions; it opens no socket
and writes no table. The node and the simulator in `broker_free.testing` drive the very same code.

    dialler                                             listener
    HELLO  node_id boot in_doubt last_acked  credit →
         ←  HELLO_OK  node_id boot have regressed in_doubt last_acked nonce  credit
    READY  nonce have regressed  →
    DATA seq = 1..n, within credit  →   [group commit]  →  ACK highest committed seq, its inbox row, credit

Rules that hold the whole together, each found by breaking it in the simulator:

- One session a pair carries DATA, in both directions. Accepting a HELLO ends every older session at once.
- A sequence number lives for one session. Durability and duplicates rest on the message id alone.
- Frames and acks of any other session are dropped; the other side is told by BYE, so that it dials again.
- A gap ends the session: no reorder buffer, TCP does that.
- An ack is sent after the commit, never before; `committed()` is the only way to one.
- What is in doubt after a lost session is asked by id, not by a highest number: the set held is no prefix.
- The row number travels with each ack. A peer that later does not know that id under that row has a store that
  went back in time, and gets the retained window again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from broker_free.errors import InvalidInput
from broker_free.limits import KIB, Limits
from tests.version1 import frames
from tests.version1.frames import Frame


@dataclass(slots=True, kw_only=True)  # not frozen: that costs 1 µs on every message
class Queued:
    """One outbox row on its way to one peer."""

    row: int
    id: str
    meta: bytes
    body: bytes
    lane: int = 0


class Ledger(Protocol):
    """What the link reads of the store. Every answer must be committed: an uncommitted row is not there yet."""

    def in_doubt(self, peer: str, limit: int) -> list[str]:
        """Return the oldest ids queued for `peer`."""
        ...

    def queued_after(self, peer: str, row: int, *, messages: int, size: int) -> list[Queued]:
        """Return the queued rows beyond `row` in order, at most so many messages and about so many bytes."""
        ...

    def held(self, peer: str, ids: Sequence[str]) -> list[tuple[int, int]]:
        """Return (index into `ids`, inbox row) of those that this node already holds from `peer`."""
        ...

    def last_acked(self, peer: str) -> tuple[str, int] | None:
        """Return the newest id that `peer` acked, with its row there."""
        ...

    def lacks(self, peer: str, message_id: str, row: int) -> bool:
        """Say whether a message that this node once acked to `peer` under `row` is not there (any more)."""
        ...


# Actions, in the order they are to be carried out ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    conn: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class Close:
    conn: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A session is open in both directions."""

    about: Mapping[str, Any]  # what the peer says of itself: name, endpoints, beat; JSON, not checked yet
    rtt_ms: int  # from greeting to answer


@dataclass(frozen=True, slots=True)
class Lost:
    reason: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """Records to commit to the inbox; then call `committed` with the same session and seq."""

    session: int
    seq: int  # of the last record
    lane: int
    records: tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Acked:
    """The peer holds these outbox rows on disk. `last` is the newest of them with its row there."""

    rows: tuple[tuple[int, str], ...]
    last: tuple[str, int]


@dataclass(frozen=True, slots=True)
class AckedIds:
    """The same, learned by a resync: only the ids are known."""

    ids: tuple[str, ...]
    last: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Rejected:
    row: int
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Regressed:
    """The peer's store went back in time: queue the retained delivered messages again."""


@dataclass(frozen=True, slots=True)
class Control:
    """An INTEREST or REGISTRY frame of the open session."""

    frame: Frame


Action = Send | Close | Opened | Lost | Arrived | Acked | AckedIds | Rejected | Regressed | Control


@dataclass(slots=True)
class _Sent:
    seq: int
    row: int
    id: str
    size: int


@dataclass(slots=True)
class _Session:
    conn: int
    id: int
    mine: bool  # dialled by this node
    boot: int  # the peer's
    nonce: int
    in_doubt: list[str]  # what this side asked about
    credit_messages: int
    credit_bytes: int
    about: Mapping[str, Any]
    greeted_ms: int
    progress_ms: int
    is_open: bool = False
    next_seq: int = 1
    cursor: int = 0  # outbox row sent last
    expected_seq: int = 1
    bytes_in_flight: int = 0
    ping_deadline_ms: int | None = None


@dataclass(slots=True)
class _Dial:
    conn: int
    deadline_ms: int
    session: int = 0  # once HELLO is sent
    greeted_ms: int = 0
    in_doubt: tuple[str, ...] = ()


class Link:
    """Everything between this node and one peer. One owner, no locks, no I/O."""

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
    ) -> None:
        """`about` gives what this node says of itself in greetings: its name and where it listens."""
        self.peer = peer
        self._me = me
        self._about = about
        self._boot = boot
        self._ledger = ledger
        self._limits = limits
        self._random = random
        self._session: _Session | None = None
        self._dial: _Dial | None = None
        self._sent: deque[_Sent] = deque()
        self._staged: list[Queued] = []
        self._failures = 0
        self._dial_after_ms = 0
        self._caught_up = False  # every queued row of this peer is on the wire

    # -- what the owner may ask -----------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._session is not None and self._session.is_open

    @property
    def conn(self) -> int | None:
        """The connection of the present session."""
        return self._session.conn if self._session else None

    @property
    def in_flight(self) -> int:
        return len(self._sent)

    @property
    def cursor(self) -> int:
        """The outbox row sent last in this session; nothing above it is on the wire."""
        return self._session.cursor if self._session else 0

    def wants_dial(self, now_ms: int) -> bool:
        return self._session is None and self._dial is None and now_ms >= self._dial_after_ms

    def next_wake_ms(self, now_ms: int) -> int:
        """Return when `on_tick` has something to do next, on the same clock."""
        if self._dial:
            return self._dial.deadline_ms
        if self._session is None:
            return max(now_ms, self._dial_after_ms)
        session = self._session
        if session.ping_deadline_ms is not None:
            return session.ping_deadline_ms
        if not session.is_open:
            return session.progress_ms + self._limits.hello_timeout_ms
        return session.progress_ms + self._limits.ack_silence_ms

    # -- connections ----------------------------------------------------------------------------------------

    def dialling(self, conn: int, now_ms: int) -> None:
        """A connection to the peer has been started."""
        assert self._session is None
        assert self._dial is None
        self._dial = _Dial(conn=conn, deadline_ms=now_ms + self._limits.dial_timeout_ms)

    def dial_failed(self, now_ms: int) -> None:
        """No connection could even be started."""
        self._back_off(now_ms)

    def ping(self, now_ms: int) -> list[Action]:
        """Ask the peer for a sign of life over the open session, if there is one and none was asked for."""
        return self._ping(now_ms)

    def redial_now(self) -> None:
        """Forget the waiting time: there is reason to believe that the peer can be reached."""
        self._failures = 0
        self._dial_after_ms = 0

    def on_connected(self, conn: int, now_ms: int) -> list[Action]:
        dial = self._dial
        if dial is None or dial.conn != conn:
            return [Close(conn)]
        dial.session = self._random.getrandbits(64)
        dial.greeted_ms = now_ms
        dial.deadline_ms = now_ms + self._limits.hello_timeout_ms
        dial.in_doubt = tuple(self._ledger.in_doubt(self.peer, self._limits.in_doubt_max))
        return [Send(conn, self._greeting(frames.HELLO, dial.session, dial.in_doubt))]

    def on_closed(self, conn: int, reason: str, now_ms: int) -> list[Action]:
        if self._dial and self._dial.conn == conn:
            self._dial = None
            self._back_off(now_ms)
            return []
        if self._session and self._session.conn == conn:
            return self._end(reason, now_ms, say_bye=False)
        return []

    def on_tick(self, now_ms: int) -> list[Action]:
        """Apply the time-outs."""
        if self._dial and now_ms >= self._dial.deadline_ms:
            conn = self._dial.conn
            self._dial = None
            self._back_off(now_ms)
            return [Close(conn)]
        session = self._session
        if session is None:
            return []
        if session.ping_deadline_ms is not None:
            return self._end("no answer to PING", now_ms) if now_ms >= session.ping_deadline_ms else []
        silence_ms = now_ms - session.progress_ms
        if not session.is_open:
            return self._end("no READY", now_ms) if silence_ms >= self._limits.hello_timeout_ms else []
        if silence_ms < self._limits.ack_silence_ms:
            return []
        if self._sent:
            return self._ping(now_ms)
        session.progress_ms = now_ms
        return []

    # -- frames ---------------------------------------------------------------------------------------------

    def on_frame(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        kind = frame.kind
        if kind == frames.HELLO:
            return self._on_hello(conn, frame, now_ms)
        if kind == frames.HELLO_OK:
            return self._on_hello_ok(conn, frame, now_ms)
        if kind == frames.BYE:
            return self._on_bye(conn, frame, now_ms)
        session = self._session
        if session is None or session.id != frame.session or session.conn != conn:
            # Of another session: never acted on. Told by BYE, which names that session, a half-open peer notices.
            return [
                Send(conn, Frame(kind=frames.BYE, session=frame.session, meta={"reason": "no such session"}))
            ]
        if kind == frames.READY:
            return self._on_ready(session, frame, now_ms)
        if not session.is_open:
            return self._end("a frame before READY", now_ms)
        if kind == frames.DATA:
            return self._on_data(session, frame, now_ms)
        if kind == frames.ACK:
            return self._on_ack(session, frame, now_ms)
        if kind == frames.REJECT:
            return self._on_reject(session, frame, now_ms)
        if kind == frames.PING:
            return [Send(conn, Frame(kind=frames.PONG, session=session.id, seq=frame.seq))]
        if kind == frames.PONG:
            session.ping_deadline_ms = None
            session.progress_ms = now_ms
            return []
        if kind in (frames.INTEREST, frames.REGISTRY):
            return [Control(frame)]
        return []  # of a later version

    def _on_hello(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        greeting = _Greeting.parse(frame.meta)
        if greeting is None or greeting.node_id != self.peer:
            return [self._bye(conn, frame.session, "malformed HELLO"), Close(conn)]
        if self._keeps_own_link(greeting.boot):
            refusal = self._bye(conn, frame.session, "duplicate")
            # The peer would not dial if it held our link: find out soon whether it is dead.
            return [refusal, *self._ping(now_ms)]
        actions: list[Action] = []
        if self._dial:
            actions.append(Close(self._dial.conn))
            self._dial = None
        if self._session:
            # A peer may greet twice over one connection; closing that would cut the new session too.
            actions += self._end("superseded", now_ms, say_bye=False, close=self._session.conn != conn)
        in_doubt = self._ledger.in_doubt(self.peer, self._limits.in_doubt_max)
        session = self._begin(
            conn, frame, greeting, mine=False, in_doubt=in_doubt, greeted_ms=now_ms, now_ms=now_ms
        )
        answer = self._greeting(
            frames.HELLO_OK, session.id, in_doubt, nonce=session.nonce, **self._resync(greeting)
        )
        actions.append(Send(conn, answer))
        return actions

    def _keeps_own_link(self, peer_boot: int) -> bool:
        """If both sides dialled, the link dialled by the smaller node id stays."""
        if self._me > self.peer:
            return False
        if self._dial is not None:
            return self._dial.session != 0  # before HELLO nothing says that our way works at all
        session = self._session
        return session is not None and session.mine and session.boot == peer_boot

    def _on_hello_ok(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        dial = self._dial
        if dial is None or dial.conn != conn or dial.session != frame.session:
            return [self._bye(conn, frame.session, "no such session")]
        greeting = _Greeting.parse(frame.meta)
        if greeting is None or greeting.node_id != self.peer:
            self._dial = None
            self._back_off(now_ms)
            return [self._bye(conn, frame.session, "malformed HELLO_OK"), Close(conn)]
        self._dial = None
        session = self._begin(
            conn,
            frame,
            greeting,
            mine=True,
            in_doubt=list(dial.in_doubt),
            greeted_ms=dial.greeted_ms,
            now_ms=now_ms,
        )
        ready = Frame(
            kind=frames.READY,
            session=session.id,
            credit_messages=self._limits.credit_messages,
            credit_kib=self._limits.credit_kib,
            meta={"nonce": greeting.nonce, **self._resync(greeting)},
        )
        return [*self._learn(session, greeting), Send(conn, ready), *self._open(session, now_ms)]

    def _on_ready(self, session: _Session, frame: Frame, now_ms: int) -> list[Action]:
        answer = _Resync.parse(frame.meta)
        if session.mine or session.is_open or answer is None or frame.meta.get("nonce") != session.nonce:
            return self._end("malformed READY", now_ms)
        session.progress_ms = now_ms
        session.ping_deadline_ms = None
        self._grant(session, frame)
        return [*self._learn(session, answer), *self._open(session, now_ms)]

    def _on_data(self, session: _Session, frame: Frame, now_ms: int) -> list[Action]:
        if frame.seq != session.expected_seq:
            return self._end(f"gap: expected {session.expected_seq}, got {frame.seq}", now_ms)
        try:
            records = tuple(frames.records_of(frame))
        except InvalidInput as error:
            return self._end(error.message, now_ms)
        if len(records) > self._limits.pack_messages_max or not records:
            return self._end("a pack of the wrong size", now_ms)
        session.expected_seq += len(records)
        return [Arrived(session.id, session.expected_seq - 1, frame.lane, records)]

    def _on_ack(self, session: _Session, frame: Frame, now_ms: int) -> list[Action]:
        row, at = frame.meta.get("row"), frame.meta.get("at")
        if frame.seq >= session.next_seq or not isinstance(row, int):
            return self._end("an ack for what was never sent", now_ms)
        self._grant(session, frame)
        session.progress_ms = now_ms
        session.ping_deadline_ms = None
        acked: list[tuple[int, str]] = []
        newest = ""
        while self._sent and self._sent[0].seq <= frame.seq:
            sent = self._sent.popleft()
            session.bytes_in_flight -= sent.size
            acked.append((sent.row, sent.id))
            if sent.seq == at:
                newest = sent.id
        if not acked:
            return []
        if not newest:
            return self._end("an ack that names none of its messages", now_ms)
        return [Acked(tuple(acked), (newest, row))]

    def _on_reject(self, session: _Session, frame: Frame, now_ms: int) -> list[Action]:
        for sent in self._sent:
            if sent.seq == frame.seq:
                self._sent.remove(sent)
                session.bytes_in_flight -= sent.size
                session.progress_ms = now_ms
                return [Rejected(sent.row, sent.id, str(frame.meta.get("reason", "refused"))[:200])]
        return self._end("a reject for what was never sent", now_ms)

    def _on_bye(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        reason = str(frame.meta.get("reason", ""))[:100]
        if self._dial and self._dial.conn == conn and self._dial.session == frame.session:
            self._dial = None
            self._back_off(now_ms)
            return [Close(conn)]
        if self._session and self._session.conn == conn and self._session.id == frame.session:
            return self._end(f"peer said: {reason}", now_ms, say_bye=False)
        return []

    # -- sending --------------------------------------------------------------------------------------------

    def offer(self, queued: Queued) -> bool:
        """Take a row that is being committed in this tick onto the wire, if nothing older waits before it.

        False leaves it to `pump`. Either way call `flush` before the commit and `pump` after it.
        """
        if not (self._caught_up and self._has_room()):
            self._caught_up = False
            return False
        self._stage(queued)
        return True

    def hold_back(self) -> None:
        """A row was queued that must not leave before its commit; later ones wait behind it."""
        self._caught_up = False

    def flush(self) -> list[Action]:
        """Turn what `offer` took into frames."""
        staged, self._staged = self._staged, []
        if not staged or self._session is None:
            return []
        return self._pack(self._session, staged)

    def pump(self) -> list[Action]:
        """Send committed rows as far as credit reaches. Call after every commit and every ack."""
        session = self._session
        if session is None or not session.is_open or self._caught_up:
            return []
        actions: list[Action] = []
        while not self._caught_up and self._has_room():
            wanted = min(session.credit_messages - len(self._sent), self._limits.pack_messages_max)
            size = session.credit_bytes - session.bytes_in_flight
            rows = self._ledger.queued_after(self.peer, session.cursor, messages=wanted, size=size)
            for queued in rows:
                self._stage(queued)
            actions += self.flush()
            self._caught_up = not rows
        return actions

    def committed(self, *, session: int, seq: int, row: int, at: int) -> list[Action]:
        """Records up to `seq` of that session are on disk; the highest inbox row is that of number `at`. Ack them."""
        current = self._session
        if current is None or current.id != session:
            return []  # the session has ended; the next one's resync tells
        ack = Frame(
            kind=frames.ACK,
            session=session,
            seq=seq,
            credit_messages=self._limits.credit_messages,
            credit_kib=self._limits.credit_kib,
            meta={"row": row, "at": at},
        )
        return [Send(current.conn, ack)]

    def reject(self, *, session: int, seq: int, reason: str) -> list[Action]:
        """Refuse one record for a permanent reason. Send before the ack that covers it."""
        current = self._session
        if current is None or current.id != session:
            return []
        return [
            Send(current.conn, Frame(kind=frames.REJECT, session=session, seq=seq, meta={"reason": reason}))
        ]

    def tell(self, kind: int, body: bytes, meta: Mapping[str, Any] | None = None) -> list[Action]:
        """Send a control frame (INTEREST, REGISTRY) over the open session, if there is one."""
        session = self._session
        if session is None or not session.is_open:
            return []
        return [Send(session.conn, Frame(kind=kind, session=session.id, meta=meta or {}, body=body))]

    def drop(self, reason: str, now_ms: int) -> list[Action]:
        """End the session from this side: a failed send, a failed commit, a removed peer, a node that closes."""
        if self._dial:
            conn, self._dial = self._dial.conn, None
            self._back_off(now_ms)
            return [Close(conn)]
        return self._end(reason, now_ms) if self._session else []

    # -- inside ---------------------------------------------------------------------------------------------

    def _begin(
        self,
        conn: int,
        frame: Frame,
        greeting: _Greeting,
        *,
        mine: bool,
        in_doubt: list[str],
        greeted_ms: int,
        now_ms: int,
    ) -> _Session:
        self._sent.clear()
        self._staged.clear()
        self._caught_up = False
        self._session = _Session(
            conn=conn,
            id=frame.session,
            mine=mine,
            boot=greeting.boot,
            nonce=self._random.getrandbits(53),  # survives JSON readers that know only doubles
            in_doubt=in_doubt,
            credit_messages=0,
            credit_bytes=0,
            about=greeting.about,
            greeted_ms=greeted_ms,
            progress_ms=now_ms,
        )
        self._grant(self._session, frame)
        return self._session

    def _open(self, session: _Session, now_ms: int) -> list[Action]:
        session.is_open = True
        self._failures = 0
        return [Opened(session.about, now_ms - session.greeted_ms)]

    def _end(self, reason: str, now_ms: int, *, say_bye: bool = True, close: bool = True) -> list[Action]:
        session = self._session
        assert session is not None
        self._session = None
        self._sent.clear()
        self._staged.clear()
        self._caught_up = False
        self._back_off(now_ms)
        actions: list[Action] = [self._bye(session.conn, session.id, reason)] if say_bye else []
        if close:
            actions.append(Close(session.conn))
        return [*actions, Lost(reason)]

    def _back_off(self, now_ms: int) -> None:
        """Full jitter: two nodes that lost each other do not dial in step."""
        ceiling = min(self._limits.redial_ms_max, self._limits.redial_ms_min << min(self._failures, 16))
        self._dial_after_ms = now_ms + self._random.randint(0, ceiling)
        self._failures += 1

    def _greeting(self, kind: int, session: int, in_doubt: Sequence[str], **more: object) -> Frame:
        return Frame(
            kind=kind,
            session=session,
            credit_messages=self._limits.credit_messages,
            credit_kib=self._limits.credit_kib,
            meta={
                "node_id": self._me,
                "boot": self._boot,
                "about": dict(self._about()),
                "last_acked": self._ledger.last_acked(self.peer),
                "in_doubt": list(in_doubt),
                **more,
            },
        )

    def _resync(self, greeting: _Greeting) -> dict[str, object]:
        """Answer the peer's questions: which of its doubtful messages are here, and is its last ack known?"""
        answer: dict[str, object] = {"have": self._ledger.held(self.peer, greeting.in_doubt)}
        if greeting.last_acked and self._ledger.lacks(self.peer, *greeting.last_acked):
            answer["regressed"] = True
        return answer

    def _learn(self, session: _Session, answer: _Resync) -> list[Action]:
        """Draw the conclusions from the peer's answers."""
        if answer.is_regressed:
            return [Regressed()]  # queues `in_doubt` again too; the peer knows what it holds
        held = [(session.in_doubt[index], row) for index, row in answer.have if index < len(session.in_doubt)]
        if not held:
            return []
        return [AckedIds(tuple(message_id for message_id, _ in held), max(held, key=lambda pair: pair[1]))]

    def _grant(self, session: _Session, frame: Frame) -> None:
        session.credit_messages = frame.credit_messages
        session.credit_bytes = frame.credit_kib * KIB

    def _has_room(self) -> bool:
        session = self._session
        return (
            session is not None
            and session.is_open
            and len(self._sent) < session.credit_messages
            and session.bytes_in_flight < session.credit_bytes
        )

    def _stage(self, queued: Queued) -> None:
        session = self._session
        assert session is not None
        assert queued.row > session.cursor, "rows leave in order"
        size = len(queued.meta) + len(queued.body)
        self._staged.append(queued)
        self._sent.append(_Sent(session.next_seq, queued.row, queued.id, size))
        session.next_seq += 1
        session.cursor = queued.row
        session.bytes_in_flight += size

    def _pack(self, session: _Session, staged: list[Queued]) -> list[Action]:
        """Pack what leaves in one tick: fewer frames cost less on both sides."""
        first = session.next_seq - len(staged)
        limits = self._limits
        actions: list[Action] = []
        records: list[tuple[bytes, bytes]] = []
        size = 0
        for queued in staged:
            length = len(queued.meta) + len(queued.body)
            if records and (
                len(records) >= limits.pack_messages_max or size + length > limits.pack_bytes_max
            ):
                actions.append(self._data(session, first, records))
                first += len(records)
                records, size = [], 0
            records.append((queued.meta, queued.body))
            size += length
        actions.append(self._data(session, first, records))
        return actions

    @staticmethod
    def _data(session: _Session, seq: int, records: list[tuple[bytes, bytes]]) -> Send:
        return Send(session.conn, frames.data_frame(session=session.id, seq=seq, lane=0, records=records))

    def _ping(self, now_ms: int) -> list[Action]:
        session = self._session
        if session is None or not session.is_open or session.ping_deadline_ms is not None:
            return []
        session.ping_deadline_ms = now_ms + self._limits.pong_timeout_ms
        return [Send(session.conn, Frame(kind=frames.PING, session=session.id))]

    @staticmethod
    def _bye(conn: int, session: int, reason: str) -> Send:
        return Send(conn, Frame(kind=frames.BYE, session=session, meta={"reason": reason[:100]}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resync:
    """The answers in HELLO_OK and READY."""

    have: tuple[tuple[int, int], ...] = ()
    is_regressed: bool = False

    @staticmethod
    def parse(meta: Mapping[str, Any]) -> _Resync | None:
        have = _pairs(meta.get("have", []))
        if have is None:
            return None
        return _Resync(have=have, is_regressed=meta.get("regressed") is True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Greeting(_Resync):
    """What HELLO and HELLO_OK say."""

    node_id: str
    boot: int
    about: Mapping[str, Any]
    in_doubt: tuple[str, ...]
    last_acked: tuple[str, int] | None
    nonce: int

    @staticmethod
    def parse(meta: Mapping[str, Any]) -> _Greeting | None:
        resync = _Resync.parse(meta)
        match meta:
            case {"node_id": str(node_id), "boot": int(boot), "in_doubt": list(in_doubt)}:
                pass
            case _:
                return None
        match meta.get("last_acked"):
            case None:
                last_acked = None
            case [str(message_id), int(row)]:
                last_acked = (message_id, row)
            case _:
                return None
        about, nonce = meta.get("about", {}), meta.get("nonce", 0)
        if resync is None or not isinstance(about, Mapping) or not isinstance(nonce, int):
            return None
        if not all(isinstance(one, str) for one in in_doubt):
            return None
        return _Greeting(
            have=resync.have,
            is_regressed=resync.is_regressed,
            node_id=node_id,
            boot=boot,
            about=about,
            in_doubt=tuple(in_doubt),
            last_acked=last_acked,
            nonce=nonce,
        )


def _pairs(have: object) -> tuple[tuple[int, int], ...] | None:
    if not isinstance(have, (list, tuple)):
        return None
    pairs: list[tuple[int, int]] = []
    for pair in have:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            return None
        index, row = pair
        if not (isinstance(index, int) and isinstance(row, int) and index >= 0):
            return None
        pairs.append((index, row))
    return tuple(pairs)
