"""The link between this node and one peer: sessions, sequence, credit, acks, resync. Pure.

It takes connections, frames, commits and ticks, with the time passed in, and returns actions; it opens no socket
and writes no table. The node and the simulator in `broker_free.testing` drive the very same code.

    dialler                                             listener
    HELLO  node_id boot protocol features limits in_doubt last_acked  credit →
         ←  HELLO_OK  the same, and: have conflicts regressed nonce
    READY  nonce have conflicts regressed  →
    DATA seq = 1..n, within credit  →   [group commit]  →  ACK highest committed seq, its inbox row, credit
         ←  CREDIT, when the window changes and there is nothing to ack

Rules that hold the whole together, each found by breaking it in the simulator:

- One session a pair carries DATA, in both directions. Accepting a HELLO ends every older session at once.
- A sequence number lives for one session. Durability and duplicates rest on the message id alone.
- Frames and acks of any other session are dropped; the other side is told by BYE, so that it dials again.
- A gap ends the session: no reorder buffer, TCP does that.
- An ack is sent after the commit, never before; `committed()` is the only way to one.
- What is in doubt after a lost session is asked by id and digest, not by a highest number: the set held is no prefix.
  An id held with another digest is another message: this one is refused for good.
- The row number travels with each ack. A peer that later does not know that id under that row has a store that
  went back in time, and gets the retained window again.
- A start of the peer that another has replaced does not get its place back while the other's session is open: a
  copied home would take turns with its original, losing what is in flight each time. Whoever proves to be alive
  after it was replaced is a second live boot of one node id: alarm, here and at both of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, NamedTuple, Protocol

from broker_free import frames
from broker_free.errors import MalformedFrame
from broker_free.frames import Frame
from broker_free.limits import KIB, Limits

DIGEST_BYTES: Final = 16
_BOOTS_REMEMBERED: Final = 16  # former starts of one peer
_V1_DEFAULTS: Final = Limits()  # a node of version 1 does not say what it takes: these are its defaults
_NOTHING_MS: Final = 3_600_000  # nothing is due


@dataclass(slots=True, kw_only=True)  # not frozen: that costs 1 µs on every message
class Queued:
    """One outbox row on its way to one peer."""

    row: int
    id: str
    meta: bytes
    body: bytes
    lane: int = 0
    expires_ms: int = 0  # on the steady clock; 0: never
    is_timed: bool = (
        False  # the sender gave it a lifetime, which travels; else `expires_ms` only bounds the queue
    )


class Held(NamedTuple):
    """What a node has of a list of messages that it was asked about, by their place in that list."""

    have: list[tuple[int, int]]  # (index, inbox row)
    conflicts: list[int]  # the id is here, the message is another


class Ledger(Protocol):
    """What the link reads of the store. Every answer must be committed: an uncommitted row is not there yet."""

    def in_doubt(self, peer: str, limit: int) -> list[tuple[str, bytes]]:
        """Return (id, digest) of the oldest messages queued for `peer`."""
        ...

    def queued_after(self, peer: str, row: int, *, messages: int, size: int) -> list[Queued]:
        """Return the queued rows beyond `row` in order, at most so many messages and about so many bytes."""
        ...

    def held(self, peer: str, ids: Sequence[str], digests: Sequence[bytes]) -> Held:
        """Say which of these messages this node already holds from `peer`. Without digests: by id alone."""
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
    ttls: tuple[int, ...] = ()  # of each record what remains of its lifetime, 0 for none; empty: none has one


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
    """The peer will never take this message. `reason` begins with its code: too-large, malformed, conflict …"""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Expired:
    """The lifetime of this message ran out before it could leave."""

    id: str


@dataclass(frozen=True, slots=True)
class Regressed:
    """The peer's store went back in time: queue the retained delivered messages again."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """The peer takes no more (or takes some again). Nothing is wrong: what waits, waits."""

    is_blocked: bool


@dataclass(frozen=True, slots=True)
class Raised:
    """Something that a person should look at: `kind` is clone, conflict or version."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """A frame that means nothing here, to be counted under this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Control:
    """A frame of the open session that is not the link's own business (`frames.CONTROLS`)."""

    frame: Frame


Action = (
    Send
    | Close
    | Opened
    | Lost
    | Arrived
    | Acked
    | AckedIds
    | Rejected
    | Expired
    | Regressed
    | Blocked
    | Raised
    | Ignored
    | Control
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounds:
    """What the other side takes, or this side where that is less."""

    body_bytes: int
    metadata_bytes: int
    pack_messages: int
    pack_bytes: int


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
    version: int
    features: frozenset[str]
    bounds: _Bounds
    credit_messages: int
    credit_bytes: int
    about: Mapping[str, Any]
    greeted_ms: int
    progress_ms: int
    active_ms: int = 0  # something else than signs of life crossed it
    is_open: bool = False
    next_seq: int = 1
    cursor: int = 0  # outbox row sent last
    expected_seq: int = 1
    bytes_in_flight: int = 0
    is_blocked: bool = False  # as told to the owner
    ping_deadline_ms: int | None = None


@dataclass(slots=True)
class _Dial:
    conn: int
    deadline_ms: int
    session: int = 0  # once HELLO is sent
    greeted_ms: int = 0
    in_doubt: tuple[str, ...] = ()  # ids


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
        steady: Callable[[], int] = lambda: 0,
    ) -> None:
        """`about` gives what this node says of itself in greetings; `steady` is the clock of `Queued.expires_ms`."""
        self.peer = peer
        self._me = me
        self._about = about
        self._boot = boot
        self._ledger = ledger
        self._limits = limits
        self._random = random
        self._steady = steady
        self._granted = (limits.credit_messages, limits.credit_kib)
        self._sent_row = 0  # nothing queued in this process's life beyond it has ever been on the wire
        self._boot_now = 0  # the peer's start that proved last to be alive
        self._boots_before: dict[int, None] = {}  # those it has replaced
        self._challenge = (
            0  # made when it replaced the one before; only who is alive after that can repeat it
        )
        self._echo = 0  # the peer's own challenge, to be repeated
        self._barred_until_ms = 0  # the peer refused us for a reason that time alone does not cure
        self._session: _Session | None = None
        self._dial: _Dial | None = None
        self._sent: deque[_Sent] = deque()
        self._staged: list[Queued] = []
        self._stages_timed = False
        self._failures = 0
        self._dial_after_ms = 0
        self._caught_up = False  # every queued row of this peer is on the wire
        self.is_eager = True  # dial without a cause; in a large mesh only when there is something to say
        self._is_wanted = False

    # -- what the owner may ask -----------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._session is not None and self._session.is_open

    @property
    def conn(self) -> int | None:
        """The connection of the present session."""
        return self._session.conn if self._session else None

    @property
    def session(self) -> int | None:
        """The id of the open session."""
        return self._session.id if self._session and self._session.is_open else None

    @property
    def in_flight(self) -> int:
        return len(self._sent)

    @property
    def cursor(self) -> int:
        """The outbox row sent last in this session; nothing above it is on the wire."""
        return self._session.cursor if self._session else 0

    @property
    def is_blocked(self) -> bool:
        """The peer has said that it takes nothing now."""
        session = self._session
        return (
            session is not None and session.is_open and not (session.credit_messages and session.credit_bytes)
        )

    @property
    def credit(self) -> tuple[int, int]:
        """How many messages and bytes the peer lets be on the wire; (0, 0) without a session."""
        session = self._session
        return (session.credit_messages, session.credit_bytes) if session else (0, 0)

    @property
    def version(self) -> int:
        """The protocol version of the present session, 0 without one."""
        return self._session.version if self._session else 0

    def has(self, feature: str) -> bool:
        """Say whether both ends of the open session know a feature (`frames.FEATURES`)."""
        session = self._session
        return session is not None and session.is_open and feature in session.features

    def may_have_left(self, row: int) -> bool:
        """Say whether this process may have put a row, queued in its own life, on the wire in any session."""
        return row <= self._sent_row

    def wants_dial(self, now_ms: int) -> bool:
        return (
            self._session is None
            and self._dial is None
            and (self.is_eager or self._is_wanted)
            and now_ms >= self._dial_after_ms
        )

    def want(self) -> None:
        """There is something to say: dial, if there is no session. The waiting time after a failure still counts."""
        self._is_wanted = True

    def idle_ms(self, now_ms: int) -> int:
        """Return for how long nothing but signs of life has crossed a session that could be retired, else 0."""
        session = self._session
        if session is None or not session.is_open or self._sent or not self._caught_up:
            return 0
        return now_ms - session.active_ms

    def retire(self, now_ms: int) -> list[Action]:
        """End an idle session in good order; neither side dials again before there is something to say."""
        actions = self._end("idle", now_ms)
        self._is_wanted = False
        self._failures = 0
        return actions

    def next_wake_ms(self, now_ms: int) -> int:
        """Return when `on_tick` has something to do next, on the same clock."""
        if self._dial:
            return self._dial.deadline_ms
        if self._session is None:
            is_dialled = self.is_eager or self._is_wanted
            return max(now_ms, self._dial_after_ms) if is_dialled else now_ms + _NOTHING_MS
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
        if not self._barred_until_ms:
            self._failures = 0
            self._dial_after_ms = 0

    def on_connected(self, conn: int, now_ms: int) -> list[Action]:
        dial = self._dial
        if dial is None or dial.conn != conn:
            return [Close(conn)]
        dial.session = self._random.getrandbits(64)
        dial.greeted_ms = now_ms
        dial.deadline_ms = now_ms + self._limits.hello_timeout_ms
        in_doubt = self._in_doubt()
        dial.in_doubt = tuple(message_id for message_id, _ in in_doubt)
        more = {"echo": self._echo} if self._echo else {}
        return [Send(conn, self._greeting(frames.HELLO, dial.session, in_doubt, **more))]

    def on_unsent(self, conn: int, now_ms: int) -> list[Action]:
        """A frame could not be handed over: that connection is over, its greeting included."""
        if self._dial and self._dial.conn == conn:
            self._dial = None
            self._back_off(now_ms)
            return [Close(conn)]
        if self._session and self._session.conn == conn:
            return self._end("could not send", now_ms)
        return []

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
        if self._sent or self.is_blocked:
            return self._ping(now_ms)  # PONG carries the window: a peer that has room again cannot be missed
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
            session.active_ms = now_ms
            return self._on_data(session, frame, now_ms)
        if kind == frames.ACK:
            session.active_ms = now_ms
            return self._on_ack(session, frame, now_ms)
        if kind == frames.REJECT:
            return self._on_reject(session, frame, now_ms)
        if kind == frames.PING:
            return [Send(conn, self._granting(frames.PONG, session, seq=frame.seq))]
        if kind == frames.PONG:
            session.ping_deadline_ms = None
            session.progress_ms = now_ms
            return self._grant(session, frame) if frames.CREDITS in session.features else []
        if kind == frames.CREDIT:
            return self._grant(session, frame)
        if kind in frames.CONTROLS:
            if kind != frames.PROBE:
                session.active_ms = now_ms
            return [Control(frame)]
        return [Ignored("frame-type")]  # of a later version

    def _on_hello(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        greeting = _Greeting.parse(frame.meta)
        if greeting is None or greeting.node_id != self.peer:
            return [self._bye(conn, frame.session, "malformed HELLO"), Close(conn)]
        if greeting.version is None:
            return [*self._refuse_version(conn, frame.session, greeting), Close(conn)]
        if self.is_open and greeting.boot in self._boots_before:
            return self._refuse_boot(conn, frame, greeting, now_ms)
        if self._keeps_own_link(greeting.boot):
            refusal = self._bye(conn, frame.session, "duplicate")
            # The peer would not dial if it held our link: find out soon whether it is dead.
            return [refusal, *self._ping(now_ms)]
        actions: list[Action] = []
        if self._dial:
            actions.append(Close(self._dial.conn))
            self._dial = None
        if self._session:
            # A peer may greet twice over one connection; closing that would cut the new session too. Over another
            # one it is told: if it is alive, it is not the one that greets, and must not trust a dead session.
            is_other = self._session.conn != conn
            actions += self._end("superseded", now_ms, say_bye=is_other, close=is_other)
        in_doubt = self._in_doubt()
        session = self._begin(
            conn,
            frame,
            greeting,
            mine=False,
            in_doubt=[message_id for message_id, _ in in_doubt],
            greeted_ms=now_ms,
            now_ms=now_ms,
        )
        answer, raised = self._resync(greeting, frame.body)
        hello_ok = self._greeting(frames.HELLO_OK, session.id, in_doubt, nonce=session.nonce, **answer)
        return [*actions, Send(conn, hello_ok), *raised]

    def _refuse_version(self, conn: int, session: int, greeting: _Greeting) -> list[Action]:
        low, high = greeting.protocol
        reason = f"no common protocol version: {low} to {high} there, {frames.VERSION_MIN} to {frames.VERSION} here"
        return [self._bye(conn, session, reason, code="version"), Raised("version", reason)]

    def _refuse_boot(self, conn: int, frame: Frame, greeting: _Greeting, now_ms: int) -> list[Action]:
        """A start of the peer that another has replaced greets again: late, or a second live boot of one id."""
        session = self._session
        assert session is not None
        reason = "another boot of this node id is connected"
        actions: list[Action] = [
            self._bye(conn, frame.session, reason, code="clone", challenge=self._challenge)
        ]
        if self._challenge and greeting.echo == self._challenge:
            detail = f"two live boots of one node id: {greeting.boot:016x} and {session.boot:016x}"
            actions += [
                *self.tell(frames.ALARM, b"", {"kind": "clone", "detail": detail}),
                Raised("clone", detail),
            ]
        # The peer would be right if the open session were dead: find out.
        return [*actions, *self._ping(now_ms)]

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
        if greeting.version is None:
            self._bar(now_ms)
            return [*self._refuse_version(conn, frame.session, greeting), Close(conn)]
        session = self._begin(
            conn,
            frame,
            greeting,
            mine=True,
            in_doubt=list(dial.in_doubt),
            greeted_ms=dial.greeted_ms,
            now_ms=now_ms,
        )
        answer, raised = self._resync(greeting, frame.body)
        ready = self._granting(frames.READY, session, meta={"nonce": greeting.nonce, **answer})
        learned = self._learn(session, greeting)
        return [*learned, Send(conn, ready), *raised, *self._open(session, now_ms)]

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
            ttls = frames.ttls_of(frame)
        except MalformedFrame as error:
            return [Ignored(error.reason), *self._end(error.message, now_ms)]
        # Version 1 does not know what we take: it may pack all that its window lets it send.
        if len(records) > max(self._limits.pack_messages_max, self._limits.credit_messages) or not records:
            return [Ignored("frame-pack"), *self._end("a pack of the wrong size", now_ms)]
        session.expected_seq += len(records)
        return [Arrived(session.id, session.expected_seq - 1, frame.lane, records, ttls)]

    def _on_ack(self, session: _Session, frame: Frame, now_ms: int) -> list[Action]:
        row, at = frame.meta.get("row"), frame.meta.get("at")
        if frame.seq >= session.next_seq or not isinstance(row, int):
            return self._end("an ack for what was never sent", now_ms)
        changed = self._grant(session, frame)
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
            return changed
        if not newest:
            return self._end("an ack that names none of its messages", now_ms)
        return [Acked(tuple(acked), (newest, row)), *changed]

    def _on_reject(self, session: _Session, frame: Frame, now_ms: int) -> list[Action]:
        for sent in self._sent:
            if sent.seq == frame.seq:
                self._sent.remove(sent)
                session.bytes_in_flight -= sent.size
                session.progress_ms = now_ms
                return [Rejected(sent.id, str(frame.meta.get("reason", "refused"))[:200])]
        return self._end("a reject for what was never sent", now_ms)

    def _on_bye(self, conn: int, frame: Frame, now_ms: int) -> list[Action]:
        reason = str(frame.meta.get("reason", ""))[:100]
        if self._dial and self._dial.conn == conn and self._dial.session == frame.session:
            self._dial = None
            code, challenge = frame.meta.get("code"), frame.meta.get("challenge")
            if code not in ("clone", "version"):
                self._back_off(now_ms)
                return [Close(conn)]
            self._bar(now_ms)
            if isinstance(challenge, int):
                self._echo = challenge
            return [Close(conn), Raised(str(code), f"peer said: {reason}")]
        if self._session and self._session.conn == conn and self._session.id == frame.session:
            return self._end(f"peer said: {reason}", now_ms, say_bye=False)
        return []

    # -- sending --------------------------------------------------------------------------------------------

    def offer(self, queued: Queued) -> bool:
        """Take a row that is being committed in this tick onto the wire, if nothing older waits before it.

        False leaves it to `pump`. Either way call `flush` before the commit and `pump` after it.
        """
        if not (self._caught_up and self._has_room() and self._fits(queued)):
            self.hold_back()
            return False
        self._stage(queued)
        return True

    def hold_back(self) -> None:
        """A row was queued that must not leave before its commit; later ones wait behind it."""
        self._caught_up = False
        self._is_wanted = True

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
            now_ms = self._steady() if rows else 0
            for queued in rows:
                if not self._fits(queued):
                    session.cursor = queued.row
                    actions.append(Rejected(queued.id, self._misfit(queued)))
                elif 0 < queued.expires_ms <= now_ms:
                    session.cursor = queued.row
                    actions.append(Expired(queued.id))
                else:
                    self._stage(queued)
            actions += self.flush()
            self._caught_up = not rows
        return actions

    def committed(self, *, session: int, seq: int, row: int, at: int) -> list[Action]:
        """Records up to `seq` of that session are on disk; the highest inbox row is that of number `at`. Ack them."""
        current = self._session
        if current is None or current.id != session:
            return []  # the session has ended; the next one's resync tells
        return [Send(current.conn, self._granting(frames.ACK, current, seq=seq, meta={"row": row, "at": at}))]

    def grant(self, messages: int, kib: int) -> list[Action]:
        """Let the peer have so much on the wire from now on; told at once, and with every ack."""
        if (messages, kib) == self._granted:
            return []
        self._granted = (messages, kib)
        session = self._session
        if session is None or not session.is_open:
            return []
        if (
            frames.CREDITS not in session.features
        ):  # version 1 hears of its window in acks: one that acks nothing
            return [Send(session.conn, self._granting(frames.ACK, session, meta={"row": 0, "at": 0}))]
        return [Send(session.conn, self._granting(frames.CREDIT, session))]

    def reject(self, *, session: int, seq: int, reason: str) -> list[Action]:
        """Refuse one record for a permanent reason. Send before the ack that covers it."""
        current = self._session
        if current is None or current.id != session:
            return []
        refusal = Frame(
            kind=frames.REJECT, version=current.version, session=session, seq=seq, meta={"reason": reason}
        )
        return [Send(current.conn, refusal)]

    def tell(
        self,
        kind: int,
        body: bytes,
        meta: Mapping[str, Any] | None = None,
        *,
        seq: int = 0,
        lane: int = 0,
        flags: int = 0,
    ) -> list[Action]:
        """Send a frame of the kinds in `frames.CONTROLS` over the open session, if there is one."""
        session = self._session
        if session is None or not session.is_open:
            return []
        frame = Frame(
            kind=kind,
            version=session.version,
            session=session.id,
            seq=seq,
            lane=lane,
            flags=flags,
            meta=meta or {},
            body=body,
        )
        return [Send(session.conn, frame)]

    def ephemeral(self, meta: bytes, body: bytes) -> list[Action]:
        """Send a message that is never stored, if the peer has a session now and takes such messages of this size."""
        session = self._session
        if session is None or not self.has(frames.EPHEMERALS):
            return []
        if len(meta) > session.bounds.metadata_bytes or len(body) > session.bounds.body_bytes:
            return []
        frame = Frame(
            kind=frames.EPHEMERAL, version=session.version, session=session.id, raw_meta=meta, body=body
        )
        return [Send(session.conn, frame)]

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
        assert greeting.version is not None, "checked by those who call"
        self._session = _Session(
            conn=conn,
            id=frame.session,
            mine=mine,
            boot=greeting.boot,
            nonce=self._random.getrandbits(53),  # survives JSON readers that know only doubles
            in_doubt=in_doubt,
            version=greeting.version,
            features=greeting.features,
            bounds=self._bounds(greeting.limits),
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
        session.active_ms = now_ms
        self._is_wanted = False
        self._failures = 0
        self._barred_until_ms = 0
        opened: list[Action] = [Opened(session.about, now_ms - session.greeted_ms)]
        if session.boot != self._boot_now:
            opened += self._meet(session)
        return [*opened, *self._note_blocked(session)]

    def _meet(self, session: _Session) -> list[Action]:
        """Another start of the peer than before has proved that it is alive."""
        former, self._boot_now = self._boot_now, session.boot
        was_replaced = session.boot in self._boots_before
        self._boots_before.pop(session.boot, None)
        if not former:
            return []
        self._boots_before[former] = None
        while len(self._boots_before) > _BOOTS_REMEMBERED:
            del self._boots_before[next(iter(self._boots_before))]
        self._challenge = self._random.getrandbits(53)
        if not was_replaced:
            return []  # it was started again, as far as anybody can tell
        detail = f"two live boots of one node id: {session.boot:016x} and {former:016x}"
        return [*self.tell(frames.ALARM, b"", {"kind": "clone", "detail": detail}), Raised("clone", detail)]

    def _end(self, reason: str, now_ms: int, *, say_bye: bool = True, close: bool = True) -> list[Action]:
        session = self._session
        assert session is not None
        # Whoever dialled keeps the link up: the other side may not be able to dial back.
        self._is_wanted = bool(self._is_wanted or self._sent or not self._caught_up or session.mine)
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

    def _bar(self, now_ms: int) -> None:
        """Wait as long as ever before the next dial, whatever gives hope: the reason is not in the network."""
        self._back_off(now_ms)
        self._barred_until_ms = self._dial_after_ms = now_ms + self._limits.redial_ms_max

    def _in_doubt(self) -> list[tuple[str, bytes]]:
        return self._ledger.in_doubt(self.peer, min(self._limits.in_doubt_max, frames.IDS_MAX))

    def _greeting(
        self, kind: int, session: int, in_doubt: Sequence[tuple[str, bytes]], **more: object
    ) -> Frame:
        """Build HELLO or HELLO_OK, in the lowest version: what version 1 does not know, it does not look at."""
        limits = self._limits
        messages, kib = self._granted
        return Frame(
            kind=kind,
            session=session,
            credit_messages=messages,
            credit_kib=kib,
            meta={
                "node_id": self._me,
                "boot": self._boot,
                "about": dict(self._about()),
                "protocol": [frames.VERSION_MIN, frames.VERSION],
                "features": sorted(frames.FEATURES),
                "limits": {
                    "body_bytes": limits.body_bytes_max,
                    "metadata_bytes": limits.metadata_bytes_max,
                    "pack_messages": limits.pack_messages_max,
                    # The transport takes no frame beyond a body and a margin, a pack neither.
                    "pack_bytes": min(limits.pack_bytes_max, limits.body_bytes_max),
                },
                "last_acked": self._ledger.last_acked(self.peer),
                "in_doubt": [message_id for message_id, _ in in_doubt],
                **more,
            },
            body=b"".join(digest for _, digest in in_doubt),
        )

    def _granting(
        self, kind: int, session: _Session, *, seq: int = 0, meta: Mapping[str, Any] | None = None
    ) -> Frame:
        """Build a frame that tells the peer its window."""
        messages, kib = self._granted
        return Frame(
            kind=kind,
            version=session.version,
            session=session.id,
            seq=seq,
            credit_messages=messages,
            credit_kib=kib,
            meta=meta or {},
        )

    def _bounds(self, said: Mapping[str, int] | None) -> _Bounds:
        """Work out what may be sent to a peer that said this of its limits, or (version 1) nothing."""
        mine = self._limits
        pack_bytes = min(mine.pack_bytes_max, mine.body_bytes_max)
        if said is None:
            return _Bounds(
                body_bytes=mine.body_bytes_max,
                metadata_bytes=mine.metadata_bytes_max,
                pack_messages=min(mine.pack_messages_max, _V1_DEFAULTS.pack_messages_max),
                pack_bytes=min(pack_bytes, _V1_DEFAULTS.pack_bytes_max),
            )
        return _Bounds(
            body_bytes=said["body_bytes"],
            metadata_bytes=said["metadata_bytes"],
            pack_messages=min(mine.pack_messages_max, said["pack_messages"]),
            pack_bytes=min(pack_bytes, said["pack_bytes"]),
        )

    def _resync(self, greeting: _Greeting, body: bytes) -> tuple[dict[str, object], list[Action]]:
        """Answer the peer's questions: which of its doubtful messages are here, and is its last ack known?"""
        digests = digests_of(body)
        if len(digests) != len(greeting.in_doubt):
            digests = []  # version 1 sends none
        held = self._ledger.held(self.peer, greeting.in_doubt, digests)
        answer: dict[str, object] = {"have": held.have}
        raised: list[Action] = []
        if held.conflicts:
            answer["conflicts"] = held.conflicts
            raised = [
                Raised("conflict", f"{greeting.in_doubt[index]} is here as another message")
                for index in held.conflicts
            ]
        if greeting.last_acked and self._ledger.lacks(self.peer, *greeting.last_acked):
            answer["regressed"] = True
        return answer, raised

    def _learn(self, session: _Session, answer: _Resync) -> list[Action]:
        """Draw the conclusions from the peer's answers."""
        ids = session.in_doubt
        actions: list[Action] = [
            Rejected(ids[index], "conflict: the peer holds another message under this id")
            for index in answer.conflicts
            if index < len(ids)
        ]
        if answer.is_regressed:
            return [*actions, Regressed()]  # queues `in_doubt` again too; the peer knows what it holds
        held = [(ids[index], row) for index, row in answer.have if index < len(ids)]
        if held:
            last = max(held, key=lambda pair: pair[1])
            actions.append(AckedIds(tuple(message_id for message_id, _ in held), last))
        return actions

    def _grant(self, session: _Session, frame: Frame) -> list[Action]:
        session.credit_messages = frame.credit_messages
        session.credit_bytes = frame.credit_kib * KIB
        if session.is_blocked == (not (session.credit_messages and session.credit_bytes)):
            return []
        return self._note_blocked(session)

    def _note_blocked(self, session: _Session) -> list[Action]:
        is_blocked = not (session.credit_messages and session.credit_bytes)
        if not session.is_open or is_blocked == session.is_blocked:
            return []
        session.is_blocked = is_blocked
        return [Blocked(is_blocked)]

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
        if queued.is_timed:
            self._stages_timed = True
        self._sent_row = max(self._sent_row, queued.row)
        self._sent.append(_Sent(session.next_seq, queued.row, queued.id, size))
        session.next_seq += 1
        session.cursor = queued.row
        session.bytes_in_flight += size

    def _fits(self, queued: Queued) -> bool:
        """Say whether the peer takes a message of this size: one that it does not would end every session anew."""
        session = self._session
        assert session is not None
        bounds = session.bounds
        return len(queued.body) <= bounds.body_bytes and len(queued.meta) <= bounds.metadata_bytes

    def _misfit(self, queued: Queued) -> str:
        session = self._session
        assert session is not None
        bounds = session.bounds
        if len(queued.body) > bounds.body_bytes:
            return f"too-large: a body of {len(queued.body)} bytes; the peer takes {bounds.body_bytes}"
        return f"too-large: metadata of {len(queued.meta)} bytes; the peer takes {bounds.metadata_bytes}"

    def _pack(self, session: _Session, staged: list[Queued]) -> list[Action]:
        """Pack what leaves in one tick: fewer frames cost less on both sides."""
        first = session.next_seq - len(staged)
        bounds = session.bounds
        ttls: list[int] = []
        if self._stages_timed:
            self._stages_timed = False
            if frames.TTL in session.features:
                now_ms = self._steady()
                ttls = [_remaining_ms(queued, now_ms) for queued in staged]
        actions: list[Action] = []
        begin = size = 0
        for at, queued in enumerate(staged):
            length = len(queued.meta) + len(queued.body)
            if at > begin and (at - begin >= bounds.pack_messages or size + length > bounds.pack_bytes):
                actions.append(self._data(session, first + begin, staged[begin:at], ttls[begin:at]))
                begin, size = at, 0
            size += length
        actions.append(self._data(session, first + begin, staged[begin:], ttls[begin:]))
        return actions

    @staticmethod
    def _data(session: _Session, seq: int, some: list[Queued], ttls: list[int]) -> Send:
        records = [(queued.meta, queued.body) for queued in some]
        return Send(
            session.conn,
            frames.data_frame(
                session=session.id, seq=seq, lane=0, records=records, ttls=ttls, version=session.version
            ),
        )

    def _ping(self, now_ms: int) -> list[Action]:
        session = self._session
        if session is None or not session.is_open or session.ping_deadline_ms is not None:
            return []
        session.ping_deadline_ms = now_ms + self._limits.pong_timeout_ms
        return [Send(session.conn, Frame(kind=frames.PING, version=session.version, session=session.id))]

    @staticmethod
    def _bye(conn: int, session: int, reason: str, **more: object) -> Send:
        return Send(conn, Frame(kind=frames.BYE, session=session, meta={"reason": reason[:100], **more}))


def _remaining_ms(queued: Queued, now_ms: int) -> int:
    """Return what travels: 0 without a lifetime, and never less than 1 with one."""
    if not queued.is_timed:
        return 0
    return min(max(1, queued.expires_ms - now_ms), frames.TTL_MS_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Resync:
    """The answers in HELLO_OK and READY."""

    have: tuple[tuple[int, int], ...] = ()
    conflicts: tuple[int, ...] = ()
    is_regressed: bool = False

    @staticmethod
    def parse(meta: Mapping[str, Any]) -> _Resync | None:
        have, conflicts = pairs(meta.get("have", [])), meta.get("conflicts", [])
        if have is None or not _are_numbers(conflicts):
            return None
        return _Resync(have=have, conflicts=tuple(conflicts), is_regressed=meta.get("regressed") is True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Greeting(_Resync):
    """What HELLO and HELLO_OK say."""

    node_id: str
    boot: int
    about: Mapping[str, Any]
    protocol: tuple[int, int]  # the lowest and the highest version it speaks
    features: frozenset[str]  # that both know
    limits: Mapping[str, int] | None  # None: version 1 does not say
    in_doubt: tuple[str, ...]
    last_acked: tuple[str, int] | None
    nonce: int
    echo: int

    @property
    def version(self) -> int | None:
        """The version to speak with it; None when there is no common one."""
        low, high = self.protocol
        common = min(high, frames.VERSION)
        return common if common >= max(low, frames.VERSION_MIN) else None

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
        match meta.get("protocol", [1, 1]):
            case [int(low), int(high)]:
                pass
            case _:
                return None
        about, features, limits = meta.get("about", {}), meta.get("features", []), meta.get("limits")
        nonce, echo = meta.get("nonce", 0), meta.get("echo", 0)
        if resync is None or not isinstance(about, Mapping) or not _are_numbers((nonce, echo)):
            return None
        if not isinstance(features, list) or not all(isinstance(one, str) for one in [*in_doubt, *features]):
            return None
        if limits is not None and not _are_limits(limits):
            return None
        return _Greeting(
            have=resync.have,
            conflicts=resync.conflicts,
            is_regressed=resync.is_regressed,
            node_id=node_id,
            boot=boot,
            about=about,
            protocol=(low, high),
            features=frames.FEATURES.intersection(features),
            limits=limits,
            in_doubt=tuple(in_doubt),
            last_acked=last_acked,
            nonce=nonce,
            echo=echo,
        )


def _are_numbers(numbers: object) -> bool:
    return isinstance(numbers, (list, tuple)) and all(type(one) is int and one >= 0 for one in numbers)


def _are_limits(limits: object) -> bool:
    """Say whether a peer's limits are all there, and let at least one message at a time through."""
    return isinstance(limits, Mapping) and all(
        type(limits.get(name)) is int and limits[name] > 0
        for name in ("body_bytes", "metadata_bytes", "pack_messages", "pack_bytes")
    )


def digests_of(body: bytes) -> list[bytes]:
    """Cut the body of a HELLO, HELLO_OK or REVOKE into the digests it is made of; empty when it is not."""
    if len(body) % DIGEST_BYTES:
        return []
    return [body[at : at + DIGEST_BYTES] for at in range(0, len(body), DIGEST_BYTES)]


def pairs(have: object) -> tuple[tuple[int, int], ...] | None:
    """Read (index, row) pairs that a peer sent; None when they are none."""
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
