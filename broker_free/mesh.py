"""The members in the owner thread: whose key is let in, where each is dialled, how a code pairs two nodes.

What a record means is decided in `membership.py`; sessions and messages are the tick's business. Everything here
runs in the owner thread, except `join`, which is the loop's side of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from broker_free import faults, frames
from broker_free.clock import mono_ms, utc_ms
from broker_free.errors import InvalidInput, PairingRefused, TimedOut
from broker_free.frames import Frame
from broker_free.futures import fail, succeed
from broker_free.membership import Member, member_from
from broker_free.security import Invitation, KeyPair, node_id_of
from broker_free.tick import Tick, Tx
from broker_free.transport import Transport, public_of
from broker_free.watch import Watch

if TYPE_CHECKING:
    from broker_free.store import Store

log = logging.getLogger("broker_free")

T = TypeVar("T")

JOIN_USER: Final = "join:"  # user id of a connection that holds a one-time key and may only send JOIN
_JOIN_TIMEOUT_S: Final = 10.0


class Host(Protocol):
    """What the owner thread lends to the mesh."""

    def transact(self, fn: Callable[..., object], *args: Any) -> None:  # Any: handed through to fn
        """Queue `fn(tx, *args)` for the next transaction."""
        ...

    def later(self, fn: Callable[[], object]) -> None:
        """Have the owner thread run `fn` between transactions. Any thread."""
        ...

    async def ask(self, fn: Callable[[], T]) -> T:
        """Run `fn` in the owner thread, between transactions; on the loop."""
        ...

    def tell(self, fn: Callable[..., object], *args: Any) -> None:  # Any: handed through to fn
        """Have the event loop run `fn(*args)`."""
        ...

    def view_changed(self, peer: str) -> None: ...
    def tell_views(self) -> None: ...


@dataclass(slots=True)
class _Joining:
    conn: int
    invitation: Invitation
    future: asyncio.Future[Member]


class Mesh:
    """The table of members, and pairing."""

    def __init__(self, *, host: Host, name: str, node_id: str, keys: KeyPair, store: Store) -> None:
        self.members: dict[str, Member] = {}
        self.endpoints: list[str] = []  # where this node listens
        self.advertise: tuple[str, ...] = ()  # where others reach it, if that is another place
        self.beat_endpoint = ""
        self.tick: Tick
        self.transport: Transport
        self.watch: Watch
        self._host = host
        self._name = name
        self._me = node_id
        self._keys = keys
        self._store = store
        self._by_key: dict[bytes, str] = {}  # public key -> node id
        self._invited: dict[bytes, int] = {}  # one-time public key -> expiry, UTC
        self._joining: _Joining | None = None
        self._dial_turn: dict[str, int] = {}

    def load(self) -> None:
        """Let in whom the store knows."""
        self._invited = self._store.invitations()
        for member in self._store.members():
            self.tick.interests[member.node_id] = member.interests
            self._let_in(member)
            if member.seen_ms:
                self.watch.seen_ms[member.node_id] = member.seen_ms

    # -- who is let in, and where each one is ---------------------------------------------------------------

    def admit(self, public_key: bytes) -> str | None:
        """Answer ZAP: the user id for a key, or None. Looked up at every handshake; anything unknown is refused."""
        node_id = self._by_key.get(public_key)
        if node_id is not None:
            return node_id
        if self._invited.get(public_key, 0) > utc_ms():
            return JOIN_USER + public_key.hex()
        log.warning("handshake refused", extra={"reason": "unknown key"})
        return None

    def dial(self, peer: str) -> int | None:
        member = self.members[peer]
        if not member.endpoints:
            return None
        turn = self._dial_turn.get(peer, 0)
        self._dial_turn[peer] = turn + 1
        endpoint = member.endpoints[turn % len(member.endpoints)]
        try:
            return self.transport.dial(endpoint, server_key=member.public_key)
        except InvalidInput as error:
            log.warning("cannot dial", extra={"peer": peer, "reason": error.message})
            return None

    def about(self) -> dict[str, Any]:
        """Say what this node tells of itself in greetings."""
        beat = next(iter(_reachable(self.beat_endpoint)), "")
        return {"name": self._name, "endpoints": self.reachable_at(), "beat": beat}

    def reachable_at(self) -> list[str]:
        """Return the endpoints at which another machine may reach this node, the likeliest first."""
        return list(self.advertise) or [one for endpoint in self.endpoints for one in _reachable(endpoint)]

    def note_whereabouts(self, peer: str, about: Mapping[str, Any]) -> None:
        """Take in what a peer said of itself in its greeting."""
        known = self.members[peer]
        if known.beat_endpoint:
            # A subscription that was refused never tries again by itself, and whoever has just paired may have been
            # let in only now: without this, the inviter never heard the beats of a member that joined.
            self.transport.unwatch(known.beat_endpoint)
            self.transport.watch(known.beat_endpoint, server_key=known.public_key)
        said = member_from(about, node_id=peer, public_key=known.public_key)
        if said is None or (said.name, said.endpoints, said.beat_endpoint) == (
            known.name,
            known.endpoints,
            known.beat_endpoint,
        ):
            return
        self._let_in(replace(said, interests=known.interests))
        self._host.transact(
            lambda tx: self._store.save_whereabouts(
                peer,
                name=said.name,
                endpoints=said.endpoints,
                beat_endpoint=said.beat_endpoint,
                now_ms=tx.now_ms,
            )
        )

    def _let_in(self, member: Member) -> None:
        self.members[member.node_id] = member
        self._by_key[member.public_key] = member.node_id
        self.tick.add_peer(member.node_id)
        self.watch.add(member)
        self._host.view_changed(member.node_id)

    # -- invitations ----------------------------------------------------------------------------------------

    def save_invitation(self, tx: Tx, public_key: bytes, expires_ms: int) -> None:
        self._store.save_invitation(public_key, expires_ms)
        self._invited[public_key] = expires_ms

    def has_expired(self, now_ms: int) -> bool:
        """Say whether an invitation is over and waits to be struck."""
        return any(now_ms >= expires_ms for expires_ms in self._invited.values())

    def strike_expired(self, now_ms: int) -> None:
        """Forget invitations that are over. Inside a transaction."""
        for public_key, expires_ms in list(self._invited.items()):
            if now_ms >= expires_ms:
                self._store.strike_invitation(public_key)
                del self._invited[public_key]

    # -- joining: this node uses a code ---------------------------------------------------------------------

    async def join(self, invitation: Invitation) -> Member:
        """Ask the inviter to be let in; on the loop."""
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        try:
            for endpoint in invitation.endpoints:
                await self._host.ask(partial(self._begin_join, endpoint, invitation, future))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_JOIN_TIMEOUT_S / len(invitation.endpoints)):
                        return await asyncio.shield(future)
        finally:
            await self._host.ask(partial(self._end_join, future))
        raise TimedOut(
            f"nobody answered at {', '.join(invitation.endpoints)}",
            hint="is the other node running and its port reachable from here? the code stays valid",
        )

    def _begin_join(self, endpoint: str, invitation: Invitation, future: asyncio.Future[Member]) -> None:
        if self._joining is not None and self._joining.future is not future:
            raise PairingRefused("another join is under way on this node", hint="wait for it, then try again")
        self._end_join(future)
        keys = KeyPair(public=public_of(invitation.secret), secret=invitation.secret)
        conn = self.transport.dial(endpoint, server_key=invitation.server_key, keys=keys)
        self._joining = _Joining(conn, invitation, future)

    def _end_join(self, future: asyncio.Future[Member]) -> None:
        if self._joining is not None and self._joining.future is future:
            self.transport.close(self._joining.conn)
            self._joining = None

    def connected(self, conn: int) -> bool:
        """Take in that a connection is up. False: it is none of a join."""
        if self._joining is None or self._joining.conn != conn:
            return False
        meta = {"node_id": self._me, "public_key": self._keys.public.decode(), "about": self.about()}
        self.transport.send(conn, frames.encode(Frame(kind=frames.JOIN, meta=meta)))
        faults.reach("join-sent")
        return True

    def closed(self, conn: int, reason: str) -> bool:
        """Take in that a connection has ended. False: it is none of a join."""
        joining = self._joining
        if joining is None or joining.conn != conn:
            return False
        self._joining = None
        if reason == "refused":  # anything else: the next endpoint, or the time-out, says so
            is_over = utc_ms() >= joining.invitation.expires_ms
            self._host.tell(
                fail,
                joining.future,
                PairingRefused(
                    "the other node refused this code:"
                    f" {'it has expired' if is_over else 'used before, or expired'}",
                    hint="make a new one there: each code works once and for a short time",
                ),
            )
        return True

    def frame(self, conn: int, user_id: str, frame: Frame) -> bool:
        """Take in a frame of a pairing, from either side of it. False: it is none."""
        if self._joining is not None and self._joining.conn == conn:
            self._on_join_ok(self._joining, frame)
        elif user_id.startswith(JOIN_USER):
            self._on_join(conn, bytes.fromhex(user_id.removeprefix(JOIN_USER)), frame)
        else:
            return False
        return True

    def _on_join_ok(self, joining: _Joining, frame: Frame) -> None:
        public_key = joining.invitation.server_key
        if frame.kind == frames.BYE:
            self._end_join(joining.future)
            reason = str(frame.meta.get("reason", "no reason given"))[:200]
            self._host.tell(
                fail,
                joining.future,
                PairingRefused(f"the other node refused: {reason}", hint="make a new code"),
            )
            return
        member = member_from(frame.meta.get("about"), node_id=node_id_of(public_key), public_key=public_key)
        if frame.kind != frames.JOIN_OK or member is None:
            return
        if not member.endpoints:
            member = replace(member, endpoints=joining.invitation.endpoints)
        self._end_join(joining.future)
        future = joining.future

        def save(tx: Tx) -> None:
            self._store.save_member(member, tx.now_ms)
            faults.reach("inviter-saved")
            tx.after_commit(lambda: self._host.later(lambda: self._joined(member, future)))

        self._host.transact(save)

    def _joined(self, member: Member, future: asyncio.Future[Member]) -> None:
        """The inviter is on disk here: it counts as a member from now on."""
        self._let_in(member)
        self.tick.want(member.node_id)
        faults.reach("inviter-admitted")
        self._host.tell_views()
        self._host.tell(succeed, future, member)

    # -- being joined: another node uses a code of this one -------------------------------------------------

    def _on_join(self, conn: int, one_time_key: bytes, frame: Frame) -> None:
        """Serve a connection that holds a one-time key. Its only right is one JOIN."""
        if frame.kind != frames.JOIN:
            return
        member = member_from(frame.meta.get("about"), node_id="", public_key=b"")
        try:
            public_key = str(frame.meta.get("public_key")).encode()
            node_id = node_id_of(public_key)
        except InvalidInput:
            member = None
        if member is None or node_id != frame.meta.get("node_id") or node_id == self._me:
            self._refuse_join(conn, "malformed JOIN")
            return
        if self._invited.get(one_time_key, 0) <= utc_ms():
            self._refuse_join(conn, "this invitation has been used or is over")
            return
        member = replace(member, node_id=node_id, public_key=public_key)
        self._host.transact(self._accept_join, conn, one_time_key, member)

    def _accept_join(self, tx: Tx, conn: int, one_time_key: bytes, member: Member) -> None:
        """Strike the key and take in the member, in one transaction; the answer leaves after it."""
        if not self._store.strike_invitation(one_time_key):
            self._refuse_join(conn, "this invitation has been used or is over")
            return
        self._store.save_member(member, tx.now_ms)
        faults.reach("member-saved")
        tx.after_commit(lambda: self._host.later(lambda: self._welcome(conn, one_time_key, member)))

    def _welcome(self, conn: int, one_time_key: bytes, member: Member) -> None:
        """A member that joined is on disk: let it in and answer."""
        self._invited.pop(one_time_key, None)
        self._let_in(member)
        faults.reach("member-admitted")
        # It does not know us before the answer, so it is the one to dial.
        self.tick.links[member.node_id].dial_failed(mono_ms())
        about = {"node_id": self._me, "about": self.about(), "members": []}
        self.transport.send(conn, frames.encode(Frame(kind=frames.JOIN_OK, meta=about)))
        log.info("member joined", extra={"peer": member.node_id, "peer_name": member.name})

    def _refuse_join(self, conn: int, reason: str) -> None:
        log.warning("join refused", extra={"reason": reason})
        self.transport.send(conn, frames.encode(Frame(kind=frames.BYE, meta={"reason": reason})))


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
