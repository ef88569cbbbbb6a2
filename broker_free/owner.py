"""The owner thread: the one place that touches sockets and the writing connection.

It drains what has arrived, runs one tick (`tick.py` has the order that the promises rest on), and wakes the event loop
once with everything there is to tell. The asyncio face over it is `node.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from broker_free import frames
from broker_free.errors import (
    BrokerFreeError,
    InvalidInput,
    NodeClosed,
    PairingRefused,
    TimedOut,
)
from broker_free.frames import Frame
from broker_free.home import lock, make_private
from broker_free.message import Envelope
from broker_free.presence import Presence, State
from broker_free.registry import Registry
from broker_free.security import Invitation, KeyPair, load_or_create_keys, node_id_of
from broker_free.store import Member, Store
from broker_free.tick import Effect, Outcome, Tick, Transact, Tx, Work
from broker_free.transport import Beat, Closed, Connected, Received, Transport, new_keypair, public_of

if TYPE_CHECKING:
    import peewee


if TYPE_CHECKING:
    from broker_free.node import Node

log = logging.getLogger("broker_free")

T = TypeVar("T")

_JOIN_USER: Final = "join:"  # user id of a connection that holds a one-time key and may only send JOIN
_HOUSEKEEPING_MS: Final = 5_000
_PRUNE_MS: Final = 3_600_000
_JOIN_TIMEOUT_S: Final = 10.0

Link = Literal["open", "closed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerView:
    """What is known of one peer now."""

    node_id: str
    name: str
    state: State
    link: Link
    rtt_ms: float | None  # of the last greeting
    last_seen_ms: int | None  # UTC
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """Something to do in the owner thread between transactions."""

    fn: Callable[[Owner], Any]
    future: asyncio.Future[Any]


@dataclass(slots=True)
class _Joining:
    conn: int
    invitation: Invitation
    future: asyncio.Future[Member]


class Owner:
    """The owner thread: the only one that touches sockets and the writing connection."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop) -> None:
        self.keys: KeyPair
        self._node = node
        self._loop = loop
        self._limits = node.limits
        self._queue: deque[Work | _Question] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="bf-owner", daemon=True)
        self._started: asyncio.Future[None] = loop.create_future()
        self._stopped = asyncio.Event()
        self._has_ended = False
        self._lock_fd = -1
        self._store: Store
        self._transport: Transport
        self._tick: Tick
        self._presence = Presence(node.limits)
        self._members: dict[str, Member] = {}
        self._by_key: dict[bytes, str] = {}  # public key -> node id
        self._invited: dict[bytes, int] = {}  # one-time public key -> expiry, UTC
        self._joining: _Joining | None = None
        self._beat_endpoint = ""
        self._dial_turn: dict[str, int] = {}
        self._rtt: dict[str, float] = {}
        self._seen_ms: dict[str, int] = {}
        self._beat_due_ms = 0
        self._housekeeping_due_ms = 0
        self._prune_due_ms = 0  # UTC
        self._dirty: set[str] = set()  # peers whose view has changed

    # -- called on the loop ---------------------------------------------------------------------------------

    async def start(
        self, listen: str, models: Sequence[type[peewee.Model]], effects: Sequence[tuple[str, Effect]]
    ) -> None:
        self._setup = (listen, models, effects)
        self._thread.start()
        await self._started

    async def stop(self) -> None:
        self._stopping = True
        self._transport.wake()
        await self._stopped.wait()
        self._thread.join()

    def submit(self, work: Work) -> None:
        if self._has_ended:
            raise NodeClosed("the node has failed", hint="see its log, then start it again")
        self._queue.append(work)
        self._transport.wake()

    def _later(self, fn: Callable[[Owner], object]) -> None:
        """Have the owner thread run `fn(owner)` between transactions; nobody waits for it."""
        self._queue.append(_Question(fn, self._loop.create_future()))
        self._transport.wake()

    async def ask(self, fn: Callable[[Owner], T]) -> T:
        """Run `fn(owner)` in the owner thread, between transactions."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.append(_Question(fn, future))
        self._transport.wake()
        return await future

    async def join(self, invitation: Invitation) -> Member:
        future: asyncio.Future[Member] = self._loop.create_future()
        try:
            for endpoint in invitation.endpoints:
                await self.ask(lambda owner, at=endpoint: owner._begin_join(at, invitation, future))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_JOIN_TIMEOUT_S / len(invitation.endpoints)):
                        return await asyncio.shield(future)
        finally:
            await self.ask(lambda owner: owner._end_join(future))
        raise TimedOut(
            f"nobody answered at {', '.join(invitation.endpoints)}",
            hint="is the other node running and its port reachable from here? the code stays valid",
        )

    def refused(self) -> dict[str, int]:
        return dict(self._transport.refused)

    def reachable_at(self) -> list[str]:
        """Return the endpoints at which another machine may reach this node, the likeliest first."""
        return [one for endpoint in self._node.endpoints for one in _reachable(endpoint)]

    # -- transactional functions (run inside a tick) --------------------------------------------------------

    def save_invitation(self, tx: Tx, public_key: bytes, expires_ms: int) -> None:
        self._store.save_invitation(public_key, expires_ms)
        self._invited[public_key] = expires_ms

    def open_consumer(self, tx: Tx, durable: str, pattern: str) -> int:
        number = self._store.consumer_open(durable, pattern)
        self._tick.add_interest(pattern)
        return number

    def settle_job(self, tx: Tx, consumer: int, row: int) -> None:
        self._store.job_done(consumer, row)

    def return_job(self, tx: Tx, consumer: int, row: int, delay_ms: int) -> None:
        self._store.job_again(consumer, row, tx.now_ms + delay_ms)

    def fetch_jobs(self, consumer: int, leased: set[int]) -> list[tuple[Envelope, int]]:
        return self._store.jobs(
            consumer, now_ms=utc_ms(), limit=self._limits.credit_messages, leave_out=leased
        )

    # -- the thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._open()
        except BaseException as error:  # noqa: BLE001  whatever it is, start() must raise it
            self._release()
            self._tell(fail, self._started, error)
            self._tell(self._stopped.set)
            return
        self._tell(succeed, self._started, None)
        try:
            self._loop_until_stopped()
        except BaseException as error:  # the last that can say why
            log.exception("the node has failed")
            self._tell(self._node.died, error)
        finally:
            self._has_ended = True
            self._release()
            self._tell(self._stopped.set)

    def _open(self) -> None:
        listen, models, effects = self._setup
        node = self._node
        make_private(node.home)
        self._lock_fd = lock(node.home / "node.lock")
        self.keys = load_or_create_keys(node.home / "node.keys", new_keypair)
        node.node_id = node_id_of(self.keys.public)
        self._store = Store(node.home / "store.db", me=node.node_id, limits=self._limits, models=models)
        self._store.open()
        self._transport = Transport(keys=self.keys, admit=self._admit, limits=self._limits)
        endpoint, self._beat_endpoint = self._transport.bind(listen)
        node.endpoints = [endpoint]
        entries = self._store.registry_load()
        self._tick = Tick(
            me=node.node_id,
            boot=node.boot,
            about=self._about,
            journal=self._store,
            wire=self,
            limits=self._limits,
            random=random.Random(secrets.randbits(64)),
            registry=Registry(node.node_id, entries),
        )
        for pattern, fn in effects:
            self._tick.add_effect(pattern, fn)
        self._store.has_effect = self._tick.effects_of
        for pattern in self._store.patterns():
            self._tick.add_interest(pattern)
        node._registry = Registry(node.node_id, entries)
        self._invited = self._store.invitations()
        for member in self._store.members():
            self._tick.interests[member.node_id] = member.interests
            if member.seen_ms:
                self._seen_ms[member.node_id] = member.seen_ms
            self._admit_member(member)
        self._tell_views()

    def _release(self) -> None:
        if (transport := getattr(self, "_transport", None)) is not None:
            transport.close_all()
        if (store := getattr(self, "_store", None)) is not None:
            store.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    def _loop_until_stopped(self) -> None:
        timeout_ms = 0
        while True:
            before_ms = mono_ms()
            events = self._transport.poll(timeout_ms)
            now_ms = mono_ms()
            self._presence.lagged(now_ms - before_ms - timeout_ms, now_ms)
            is_last = self._stopping
            self._tick.start(now_ms=now_ms, utc_ms=utc_ms())
            for event in events:
                self._on_event(event, now_ms)
            work = self._take_work()
            outcome = self._tick.run(work)
            self._follow(outcome)
            if is_last and not self._queue:
                self._tick.close()
                return
            self._keep_house(now_ms)
            timeout_ms = 0 if self._queue else self._sleep_ms()

    def _take_work(self) -> list[Work]:
        work: list[Work] = []
        while self._queue and len(work) < self._limits.tick_operations_max:
            one = self._queue.popleft()
            if isinstance(one, _Question):
                self._answer(one)
            else:
                work.append(one)
        return work

    def _answer(self, question: _Question) -> None:
        try:
            self._tell(succeed, question.future, question.fn(self))
        except BrokerFreeError as error:
            self._tell(fail, question.future, error)

    def _on_event(self, event: Connected | Closed | Received | Beat, now_ms: int) -> None:
        match event:
            case Received(conn, user_id, parts):
                self._on_frames(conn, user_id, parts, now_ms)
            case Connected(conn):
                if self._joining and self._joining.conn == conn:
                    self._say_join(self._joining)
                else:
                    self._tick.connected(conn)
            case Closed(conn, reason):
                if self._joining and self._joining.conn == conn:
                    self._join_closed(self._joining, reason)
                else:
                    self._tick.closed(conn, reason)
            case Beat(parts):
                self._on_beat(parts, now_ms)

    def _on_frames(self, conn: int, user_id: str, parts: list[bytes], now_ms: int) -> None:
        try:
            frame = frames.decode(parts, self._limits)
        except InvalidInput as error:
            log.warning("frame dropped", extra={"peer": user_id, "reason": error.message})
            return
        if self._joining and self._joining.conn == conn:
            self._on_join_ok(self._joining, frame)
        elif user_id.startswith(_JOIN_USER):
            self._on_join(conn, bytes.fromhex(user_id.removeprefix(_JOIN_USER)), frame)
        else:
            peer = user_id or self._tick.peer_of(conn)
            if peer in self._members:
                self._heard(peer, now_ms)
                self._tick.frame(peer, conn, frame)

    def _follow(self, outcome: Outcome) -> None:
        """Draw this side's conclusions from a tick, then tell the loop."""
        for peer, opened in outcome.opened:
            self._rtt[peer] = float(opened.rtt_ms)
            self._note_whereabouts(peer, opened.about)
            self._dirty.add(peer)
            log.info("session open", extra={"peer": peer, "peer_name": self._members[peer].name})
        for peer, reason in outcome.lost:
            self._dirty.add(peer)
            log.info("session lost", extra={"peer": peer, "reason": reason})
        if (
            outcome.results
            or outcome.failures
            or outcome.delivered
            or outcome.dead
            or outcome.arrivals
            or outcome.callbacks
            or outcome.entries
        ):
            self._tell(self._node.take, outcome)
        if self._dirty:
            self._tell_views()

    def _keep_house(self, now_ms: int) -> None:
        if now_ms >= self._beat_due_ms:
            self._beat_due_ms = now_ms + self._limits.heartbeat_ms
            self._transport.beat(
                [json.dumps({"node_id": self._node.node_id, "boot": self._node.boot}).encode()]
            )
            for peer, state in self._presence.changes(now_ms):
                self._dirty.add(peer)
                if state == "suspect":
                    self._tick.ping(peer)
            if self._dirty:
                self._tell_views()
        if now_ms >= self._housekeeping_due_ms:
            self._housekeeping_due_ms = now_ms + _HOUSEKEEPING_MS
            now_utc_ms = utc_ms()
            is_over = any(now_utc_ms >= expires_ms for expires_ms in self._invited.values())
            # An idle node writes nothing: a laptop's disk may sleep.
            if is_over or now_utc_ms >= self._prune_due_ms or self._store.has_expired(now_utc_ms):
                self._queue.append(Transact(fn=self._clean_up))

    def _clean_up(self, tx: Tx) -> None:
        """One slice of house-keeping, inside a transaction."""
        if tx.now_ms >= self._prune_due_ms and not self._store.prune(tx.now_ms):
            self._prune_due_ms = tx.now_ms + _PRUNE_MS
        for peer, link in self._tick.links.items():
            for message_id in self._store.expire(peer, beyond_row=link.cursor, now_ms=tx.now_ms):
                self._tell(self._node.take, Outcome(dead=[(message_id, peer, "expired")]))
        for public_key, expires_ms in list(self._invited.items()):
            if tx.now_ms >= expires_ms:
                self._store.strike_invitation(public_key)
                del self._invited[public_key]
        for peer, seen_ms in self._seen_ms.items():
            self._store.save_seen(peer, seen_ms)

    def _sleep_ms(self) -> int:
        due_ms = min(self._tick.next_wake_ms(), self._beat_due_ms, self._housekeeping_due_ms)
        return max(0, due_ms - mono_ms())

    def _tell(self, fn: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(fn, *args)

    # -- the wire, as the tick sees it ----------------------------------------------------------------------

    def send(self, conn: int, frame: Frame) -> bool:
        return self._transport.send(conn, frames.encode(frame))

    def close(self, conn: int) -> None:
        self._transport.close(conn)

    def dial(self, peer: str) -> int | None:
        member = self._members[peer]
        if not member.endpoints:
            return None
        turn = self._dial_turn.get(peer, 0)
        self._dial_turn[peer] = turn + 1
        endpoint = member.endpoints[turn % len(member.endpoints)]
        try:
            return self._transport.dial(endpoint, server_key=member.public_key)
        except InvalidInput as error:
            log.warning("cannot dial", extra={"peer": peer, "reason": error.message})
            return None

    # -- members and presence -------------------------------------------------------------------------------

    def _admit(self, public_key: bytes) -> str | None:
        """Answer ZAP: the user id for a key, or None. Looked up at every handshake; anything unknown is refused."""
        node_id = self._by_key.get(public_key)
        if node_id is not None:
            return node_id
        if self._invited.get(public_key, 0) > utc_ms():
            return _JOIN_USER + public_key.hex()
        log.warning("handshake refused", extra={"reason": "unknown key"})
        return None

    def _admit_member(self, member: Member) -> None:
        known = self._members.get(member.node_id)
        self._members[member.node_id] = member
        self._by_key[member.public_key] = member.node_id
        self._tick.add_peer(member.node_id)
        if known and known.beat_endpoint and known.beat_endpoint != member.beat_endpoint:
            self._transport.unwatch(known.beat_endpoint)
        if member.beat_endpoint and (known is None or known.beat_endpoint != member.beat_endpoint):
            self._transport.watch(member.beat_endpoint, server_key=member.public_key)
        self._dirty.add(member.node_id)

    def _note_whereabouts(self, peer: str, about: Mapping[str, Any]) -> None:
        """Take in what a peer said of itself in its greeting."""
        said = _member_from(about, node_id=peer, public_key=self._members[peer].public_key)
        known = self._members[peer]
        self._seen_ms[peer] = utc_ms()
        if said is None or (said.name, said.endpoints, said.beat_endpoint) == (
            known.name,
            known.endpoints,
            known.beat_endpoint,
        ):
            return
        self._admit_member(replace(said, interests=known.interests))
        self._queue.append(
            Transact(
                fn=lambda tx: self._store.save_whereabouts(
                    peer,
                    name=said.name,
                    endpoints=said.endpoints,
                    beat_endpoint=said.beat_endpoint,
                    now_ms=tx.now_ms,
                )
            )
        )

    def _on_beat(self, parts: list[bytes], now_ms: int) -> None:
        try:
            beat = json.loads(parts[0]) if len(parts) == 1 and len(parts[0]) <= 1_024 else {}
        except ValueError:
            return
        peer = beat.get("node_id") if isinstance(beat, dict) else None
        if isinstance(peer, str) and peer in self._members:
            self._heard(peer, now_ms)
            if not self._tick.links[peer].is_open:
                self._tick.redial_now(peer)  # it is there: no reason to wait out the back-off

    def _heard(self, peer: str, now_ms: int) -> None:
        was_alive = self._presence.state(peer) == "alive"
        self._presence.heard(peer, now_ms)
        self._seen_ms[peer] = utc_ms()
        if not was_alive:
            self._dirty.update(one for one, _ in self._presence.changes(now_ms))

    def _tell_views(self) -> None:
        views = [self._view(self._members[peer]) for peer in self._dirty if peer in self._members]
        gone = [peer for peer in self._dirty if peer not in self._members]
        self._dirty.clear()
        self._tell(self._node.take_views, views, gone)

    def _view(self, member: Member) -> PeerView:
        link = self._tick.links[member.node_id]
        return PeerView(
            node_id=member.node_id,
            name=member.name,
            state=self._presence.state(member.node_id),
            link="open" if link.is_open else "closed",
            rtt_ms=self._rtt.get(member.node_id),
            last_seen_ms=self._seen_ms.get(member.node_id),
            endpoints=member.endpoints,
        )

    def _about(self) -> dict[str, Any]:
        return {"name": self._node.name, "endpoints": self.reachable_at(), "beat": self._reachable_beat()}

    def _reachable_beat(self) -> str:
        return next(iter(_reachable(self._beat_endpoint)), "")

    # -- pairing --------------------------------------------------------------------------------------------

    def _begin_join(self, endpoint: str, invitation: Invitation, future: asyncio.Future[Member]) -> None:
        if self._joining is not None and self._joining.future is not future:
            raise PairingRefused("another join is under way on this node", hint="wait for it, then try again")
        self._end_join(future)
        keys = KeyPair(public=public_of(invitation.secret), secret=invitation.secret)
        conn = self._transport.dial(endpoint, server_key=invitation.server_key, keys=keys)
        self._joining = _Joining(conn, invitation, future)

    def _end_join(self, future: asyncio.Future[Member]) -> None:
        if self._joining is not None and self._joining.future is future:
            self._transport.close(self._joining.conn)
            self._joining = None

    def _say_join(self, joining: _Joining) -> None:
        frame = Frame(
            kind=frames.JOIN,
            meta={
                "node_id": self._node.node_id,
                "public_key": self.keys.public.decode(),
                "about": self._about(),
            },
        )
        self._transport.send(joining.conn, frames.encode(frame))

    def _join_closed(self, joining: _Joining, reason: str) -> None:
        self._joining = None
        if reason != "refused":
            return  # not reached: the next endpoint, or the time-out, says so
        is_over = utc_ms() >= joining.invitation.expires_ms
        self._tell(
            fail,
            joining.future,
            PairingRefused(
                f"the other node refused this code: {'it has expired' if is_over else 'used before, or expired'}",
                hint="make a new one there: each code works once and for a short time",
            ),
        )

    def _on_join(self, conn: int, one_time_key: bytes, frame: Frame) -> None:
        """Serve a connection that holds a one-time key. Its only right is one JOIN."""
        if frame.kind != frames.JOIN:
            return
        member = _member_from(frame.meta.get("about"), node_id="", public_key=b"")
        try:
            public_key = str(frame.meta.get("public_key")).encode()
            node_id = node_id_of(public_key)
        except InvalidInput:
            member = None
        if member is None or node_id != frame.meta.get("node_id") or node_id == self._node.node_id:
            self._refuse_join(conn, "malformed JOIN")
            return
        if self._invited.get(one_time_key, 0) <= utc_ms():
            self._refuse_join(conn, "this invitation has been used or is over")
            return
        member = replace(member, node_id=node_id, public_key=public_key)
        self._queue.append(Transact(fn=self._accept_join, args=(conn, one_time_key, member)))

    def _accept_join(self, tx: Tx, conn: int, one_time_key: bytes, member: Member) -> None:
        """Strike the key and take in the member, in one transaction; the answer leaves after it."""
        if not self._store.strike_invitation(one_time_key):
            self._refuse_join(conn, "this invitation has been used or is over")
            return
        self._store.save_member(member, tx.now_ms)
        tx.after_commit(lambda: self._later(lambda owner: owner._welcome(conn, one_time_key, member)))

    def _welcome(self, conn: int, one_time_key: bytes, member: Member) -> None:
        """A member that joined is on disk: let it in and answer."""
        self._invited.pop(one_time_key, None)
        self._admit_member(member)
        # It does not know us before the answer, so it is the one to dial.
        self._tick.links[member.node_id].dial_failed(mono_ms())
        about = {"node_id": self._node.node_id, "about": self._about(), "members": []}
        self.send(conn, Frame(kind=frames.JOIN_OK, meta=about))
        log.info("member joined", extra={"peer": member.node_id, "peer_name": member.name})

    def _refuse_join(self, conn: int, reason: str) -> None:
        log.warning("join refused", extra={"reason": reason})
        self.send(conn, Frame(kind=frames.BYE, meta={"reason": reason}))

    def _on_join_ok(self, joining: _Joining, frame: Frame) -> None:
        public_key = joining.invitation.server_key
        if frame.kind == frames.BYE:
            self._end_join(joining.future)
            reason = str(frame.meta.get("reason", "no reason given"))[:200]
            self._tell(
                fail,
                joining.future,
                PairingRefused(f"the other node refused: {reason}", hint="make a new code"),
            )
            return
        member = _member_from(frame.meta.get("about"), node_id=node_id_of(public_key), public_key=public_key)
        if frame.kind != frames.JOIN_OK or member is None:
            return
        if not member.endpoints:
            member = replace(member, endpoints=joining.invitation.endpoints)
        self._end_join(joining.future)
        future = joining.future

        def save(tx: Tx) -> None:
            self._store.save_member(member, tx.now_ms)
            tx.after_commit(lambda: self._later(lambda owner: owner._joined(member, future)))

        self._queue.append(Transact(fn=save))

    def _joined(self, member: Member, future: asyncio.Future[Member]) -> None:
        """The inviter is on disk here: it counts as a member from now on."""
        self._admit_member(member)
        self._tell_views()
        self._tell(succeed, future, member)


def _member_from(about: object, *, node_id: str, public_key: bytes) -> Member | None:
    """Read what a node says of itself. None when it is not of the right shape."""
    if not isinstance(about, Mapping):
        return None
    name, endpoints, beat = about.get("name"), about.get("endpoints"), about.get("beat", "")
    if not isinstance(name, str) or not isinstance(beat, str) or not isinstance(endpoints, list):
        return None
    if len(endpoints) > 16 or not all(isinstance(one, str) and len(one) <= 255 for one in [*endpoints, beat]):
        return None
    if not 0 < len(name) <= 64 or not name.isprintable():
        return None
    return Member(
        node_id=node_id, name=name, public_key=public_key, endpoints=tuple(endpoints), beat_endpoint=beat
    )


def _reachable(endpoint: str) -> list[str]:
    """Replace the wildcard host by the addresses that other machines may use, then loopback."""
    if not endpoint:
        return []
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if host not in ("0.0.0.0", "*", "[::]"):
        return [endpoint]
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: asks the routing table which address of ours faces the outside (192.0.2.0/24 is for examples).
        probe.connect(("192.0.2.1", 9))
        found.append(probe.getsockname()[0])
    return [f"tcp://{one}:{port}" for one in dict.fromkeys([*found, "127.0.0.1"])]


def succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def utc_ms() -> int:
    return time.time_ns() // 1_000_000


def mono_ms() -> int:
    return time.monotonic_ns() // 1_000_000
