"""How a code pairs two nodes, in the owner thread. One side made the code, the other uses it.

    the joiner                                          the inviter
    connects with the one-time key of the code
    JOIN  its node id, its real key, about it  →        commits: the key struck, the member introduced
                                               ←        JOIN_OK  about the inviter, who belongs (registry entries)
    commits: the inviter introduced                     the mesh learns of the joiner from the registry

An answer that is lost costs nothing. The joiner wrote down that it asked, so it asks again, with its real key: that is
let in exactly if the inviter has committed, and then the same JOIN gets the same answer. Whether the process that asked
or the one that answers was killed in between makes no difference.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from broker_free import faults, frames
from broker_free.clock import mono_ms, utc_ms
from broker_free.errors import MeshFull, PairingRefused, TimedOut, TooLarge
from broker_free.frames import Frame
from broker_free.futures import fail, succeed
from broker_free.limits import Limits
from broker_free.membership import MEMBERS, WHEREABOUTS, Member, keys_from, keys_of, member_from
from broker_free.mesh import Host, Mesh
from broker_free.outside import Allowance, printable
from broker_free.registry import encode as encode_entries
from broker_free.security import Invitation, KeyPair
from broker_free.tick import Tx
from broker_free.transport import public_of

if TYPE_CHECKING:
    from broker_free.store import Store

log = logging.getLogger("broker_free")

JOIN_USER: Final = "join:"  # user id of a connection that holds a one-time key and may only send JOIN
_JOIN_TIMEOUT_S: Final = 10.0
_ANSWER_MS: Final = 3_000  # a JOIN that is not answered by then is asked again
_RETRY_MS: Final = 300
_RETRY_ALONE_MS: Final = 5_000  # when nobody waits for the outcome any more


@dataclass(slots=True)
class _Suit:
    """This node asks to be let in."""

    server_key: bytes
    endpoints: tuple[str, ...]
    expires_ms: int  # UTC
    one_time: KeyPair | None  # None after a restart: the code is not kept
    future: asyncio.Future[Member] | None
    conn: int | None = None
    due_ms: int = 0  # monotonic: of the next try, or of the answer
    tries: int = 0
    is_proving: bool = (
        False  # asks with the real key, since the one-time key may have been used up by this node
    )
    has_asked: bool = False
    refused: set[str] = field(default_factory=set)  # with which keys


class Pairing:
    """Invitations of this node, and the joins of this node at others."""

    def __init__(self, *, host: Host, mesh: Mesh, store: Store, limits: Limits) -> None:
        self._host = host
        self._mesh = mesh
        self._store = store
        self._limits = limits
        self._invited: dict[bytes, int] = {}  # one-time public key -> expiry, UTC
        self._tries: Counter[bytes] = Counter()  # JOINs of each one-time key
        self._allowance = Allowance(burst=limits.joins_burst, a_second=limits.joins_a_second_max, now_ms=0)
        self._suits: list[_Suit] = []

    def load(self) -> None:
        self._invited = self._store.invitations()
        self._suits = [
            _Suit(server_key, endpoints, expires_ms, None, None, is_proving=True)
            for server_key, endpoints, expires_ms in self._store.joinings()
        ]

    def admit(self, public_key: bytes) -> str | None:
        """Answer ZAP about a key that is no member's."""
        if self._invited.get(public_key, 0) > utc_ms():
            return JOIN_USER + public_key.hex()
        return None

    # -- invitations ----------------------------------------------------------------------------------------

    def save_invitation(self, tx: Tx, public_key: bytes, expires_ms: int) -> None:
        """Raises TooLarge for one more than may be open, MeshFull when nobody could use it."""
        if len(self._invited) >= self._limits.invitations_max:
            raise TooLarge(
                f"{len(self._invited)} invitations are open", hint="they expire by themselves: wait for that"
            )
        self._check_room()
        self._store.save_invitation(public_key, expires_ms)
        self._invited[public_key] = expires_ms

    def strike_all(self, tx: Tx) -> None:
        """Make every open invitation unusable."""
        for public_key in list(self._invited):
            self._strike(public_key)

    def has_expired(self, now_ms: int) -> bool:
        """Say whether an invitation is over and waits to be struck."""
        return any(now_ms >= expires_ms for expires_ms in self._invited.values())

    def strike_expired(self, now_ms: int) -> None:
        """Forget invitations that are over. Inside a transaction."""
        for public_key, expires_ms in list(self._invited.items()):
            if now_ms >= expires_ms:
                self._strike(public_key)

    def _strike(self, public_key: bytes) -> None:
        self._store.strike_invitation(public_key)
        self._invited.pop(public_key, None)
        self._tries.pop(public_key, None)

    def _check_room(self) -> None:
        if len(self._mesh.members) >= self._limits.peers_max:
            raise MeshFull(
                f"this mesh has {len(self._mesh.members)} other nodes, the most it can hold",
                hint="remove a node that is not used any more: zmail peers remove NAME",
            )

    # -- joining: this node uses a code ---------------------------------------------------------------------

    async def join(self, invitation: Invitation) -> Member:
        """Ask the inviter to be let in; on the loop."""
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        await self._host.ask(lambda: self._begin(invitation, future))
        try:
            async with asyncio.timeout(_JOIN_TIMEOUT_S):
                return await asyncio.shield(future)
        except TimeoutError:
            pass
        finally:
            future.cancel()
        if await self._host.ask(lambda: self._has_asked(future)):
            raise TimedOut(
                "the other node was reached but did not answer",
                hint="this node goes on asking until the code expires: see zmail peers",
            )
        raise TimedOut(
            f"nobody answered at {', '.join(invitation.endpoints)}",
            hint="is the other node running and its port reachable from here? the code stays valid",
        )

    def _begin(self, invitation: Invitation, future: asyncio.Future[Member]) -> None:
        if any(suit.future is not None and not suit.future.done() for suit in self._suits):
            raise PairingRefused("another join is under way on this node", hint="wait for it, then try again")
        for suit in [one for one in self._suits if one.server_key == invitation.server_key]:
            self._end(suit)
        one_time = KeyPair(public=public_of(invitation.secret), secret=invitation.secret)
        suit = _Suit(invitation.server_key, invitation.endpoints, invitation.expires_ms, one_time, future)
        self._suits.append(suit)
        self._try(suit)

    def _has_asked(self, future: asyncio.Future[Member]) -> bool:
        """Say whether a JOIN has left. One that never did is given up."""
        for suit in [one for one in self._suits if one.future is future]:
            suit.future = None
            if suit.has_asked:
                return True
            self._end(suit)
        return False

    def _try(self, suit: _Suit) -> None:
        endpoint = suit.endpoints[suit.tries % len(suit.endpoints)]
        suit.tries += 1
        suit.due_ms = mono_ms() + 2 * self._limits.dial_timeout_ms + _ANSWER_MS
        keys = None if suit.is_proving else suit.one_time
        suit.conn = self._mesh.transport.dial(endpoint, server_key=suit.server_key, keys=keys)

    def _again(self, suit: _Suit) -> None:
        """Ask once more a little later, of the next endpoint."""
        if suit.conn is not None:
            self._mesh.transport.close(suit.conn)
            suit.conn = None
        suit.due_ms = mono_ms() + (_RETRY_MS if suit.future else _RETRY_ALONE_MS)

    def next_wake_ms(self) -> int | None:
        return min(suit.due_ms for suit in self._suits) if self._suits else None

    def keep(self, now_ms: int) -> None:
        """Do what is due: try again, and give up what is over."""
        for suit in [one for one in self._suits if now_ms >= one.due_ms]:
            if utc_ms() >= suit.expires_ms and suit.future is None:
                self._host.transact(lambda _, key=suit.server_key: self._store.end_joining(key))
                self._end(suit)
            elif suit.conn is not None:  # connected, and no answer
                suit.is_proving = suit.has_asked
                self._again(suit)
            else:
                self._try(suit)

    def _end(self, suit: _Suit) -> None:
        if suit.conn is not None:
            self._mesh.transport.close(suit.conn)
            suit.conn = None
        if suit in self._suits:
            self._suits.remove(suit)

    def _suit_of(self, conn: int) -> _Suit | None:
        if not self._suits:  # asked for every frame
            return None
        return next((suit for suit in self._suits if suit.conn == conn), None)

    def connected(self, conn: int) -> bool:
        """Take in that a connection is up. False: it is none of a join."""
        suit = self._suit_of(conn)
        if suit is None:
            return False
        if suit.has_asked:
            self._say_join(suit, conn)
        else:  # written down before it is said: from then on the answer may be lost

            def save(tx: Tx) -> None:
                self._store.save_joining(suit.server_key, suit.endpoints, suit.expires_ms)
                tx.after_commit(lambda: self._host.later(lambda: self._say_join(suit, conn)))

            self._host.transact(save)
        return True

    def _say_join(self, suit: _Suit, conn: int) -> None:
        if suit.conn != conn:
            return
        suit.has_asked = True
        suit.due_ms = mono_ms() + _ANSWER_MS
        myself = self._mesh.myself
        meta = {"node_id": self._mesh.me, **keys_of(myself), "about": self._mesh.about()}
        self._send(conn, Frame(kind=frames.JOIN, meta=meta))
        faults.reach("join-sent")

    def closed(self, conn: int, reason: str) -> bool:
        """Take in that a connection has ended. False: it is none of a join."""
        suit = self._suit_of(conn)
        if suit is None:
            return False
        suit.conn = None
        if reason != "refused":
            suit.is_proving = suit.has_asked
        elif suit.is_proving:
            suit.refused.add("real key")
            suit.is_proving = suit.one_time is None
        else:  # used, perhaps by this node itself, whose answer was lost
            suit.refused.add("one-time key")
            suit.is_proving = True
        if len(suit.refused) < 2:
            self._again(suit)
            if reason == "refused" and suit.future:
                suit.due_ms = 0
            return True
        is_over = utc_ms() >= suit.expires_ms
        self._fail(
            suit,
            PairingRefused(
                f"the other node refused this code: {'it has expired' if is_over else 'used before, or expired'}",
                hint="make a new one there: each code works once and for a short time",
            ),
        )
        return True

    def _fail(self, suit: _Suit, error: PairingRefused) -> None:
        self._end(suit)
        self._host.transact(lambda _: self._store.end_joining(suit.server_key))
        if suit.future is not None:
            self._host.tell(fail, suit.future, error)

    def _on_answer(self, suit: _Suit, frame: Frame) -> None:
        if frame.kind == frames.BYE:
            reason = printable(frame.meta.get("reason", "no reason given"))
            self._fail(suit, PairingRefused(f"the other node refused: {reason}", hint="make a new code"))
            return
        said = {"key": suit.server_key.decode(), "first_key": frame.meta.get("first_key", "")}
        node_id = frame.meta.get("node_id")
        keys = keys_from(said, node_id=node_id)
        if frame.kind != frames.JOIN_OK or keys is None or not isinstance(node_id, str):
            return
        member = member_from(frame.meta.get("about"), node_id=node_id, public_key=keys[0], first_key=keys[1])
        if member is None:
            return
        if not member.endpoints:
            member = replace(member, endpoints=suit.endpoints)
        self._end(suit)
        self._mesh.tick.take_entries(frame.body)
        self._host.transact(self._save_inviter, suit, member)

    def _save_inviter(self, tx: Tx, suit: _Suit, member: Member) -> None:
        self._store.end_joining(suit.server_key)
        self._mesh.introduce(tx, member)
        faults.reach("inviter-saved")
        tx.after_commit(lambda: self._host.later(lambda: self._joined(member, suit.future)))

    def _joined(self, member: Member, future: asyncio.Future[Member] | None) -> None:
        """The inviter is on disk here: it counts as a member from now on."""
        self._mesh.tick.want(member.node_id)
        faults.reach("inviter-admitted")
        log.info("joined a mesh", extra={"peer": member.node_id, "peer_name": member.name})
        if future is not None:
            self._host.tell(succeed, future, member)

    # -- being joined: another node uses a code of this one -------------------------------------------------

    def frame(self, conn: int, user_id: str, frame: Frame) -> bool:
        """Take in a frame of a pairing, from either side of it. False: it is none."""
        if suit := self._suit_of(conn):
            self._on_answer(suit, frame)
        elif user_id.startswith(JOIN_USER):
            self._on_join(conn, bytes.fromhex(user_id.removeprefix(JOIN_USER)), frame)
        elif frame.kind == frames.JOIN:
            if user_id in self._mesh.members and self._allowance.take(mono_ms()):
                self._welcome(conn, user_id)  # the answer to its first JOIN was lost
        else:
            return False
        return True

    def _on_join(self, conn: int, one_time_key: bytes, frame: Frame) -> None:
        """Serve a connection that holds a one-time key. Its only right is one JOIN."""
        if frame.kind != frames.JOIN:
            self._host.refusals.add("not-a-join", mono_ms())
            return
        self._tries[one_time_key] += 1
        if not self._allowance.take(mono_ms()):
            self._refuse(conn, "too many nodes try to join just now", "join-rate")
            return
        if self._tries[one_time_key] > self._limits.joins_of_a_key_max:
            self._refuse(conn, "this invitation was tried too often", "join-rate")
            self._host.transact(lambda _: self._strike(one_time_key))
            return
        node_id = frame.meta.get("node_id")
        keys = keys_from(frame.meta, node_id=node_id)
        member = None
        if keys is not None and isinstance(node_id, str) and node_id != self._mesh.me:
            member = member_from(
                frame.meta.get("about"), node_id=node_id, public_key=keys[0], first_key=keys[1]
            )
        if member is None:
            self._refuse(conn, "malformed JOIN", "join-malformed")
            return
        known = self._mesh.members.get(member.node_id)
        if known is not None and known.public_key != member.public_key:
            self._refuse(conn, "this node is a member under another key; remove it first", "join-conflict")
            return
        if self._mesh.holder_of(member.public_key) not in (None, member.node_id):
            self._refuse(conn, "this key belongs to another node", "join-conflict")
            return
        if self._invited.get(one_time_key, 0) <= utc_ms():
            self._refuse(conn, "this invitation has been used or is over", "join-used")
            return
        self._host.transact(self._accept, conn, one_time_key, member)

    def _accept(self, tx: Tx, conn: int, one_time_key: bytes, member: Member) -> None:
        """Strike the key and introduce the member, in one transaction; the answer leaves after it."""
        if member.node_id not in self._mesh.members and len(self._mesh.members) >= self._limits.peers_max:
            self._refuse(conn, "this mesh is full", "mesh-full")
            return
        if not self._store.strike_invitation(one_time_key):
            self._refuse(conn, "this invitation has been used or is over", "join-used")
            return
        self._mesh.introduce(tx, member)
        faults.reach("member-saved")
        tx.after_commit(lambda: self._host.later(lambda: self._accepted(conn, one_time_key, member)))

    def _accepted(self, conn: int, one_time_key: bytes, member: Member) -> None:
        """A member that joined is on disk and let in: answer."""
        self._invited.pop(one_time_key, None)
        self._tries.pop(one_time_key, None)
        faults.reach("member-admitted")
        self._welcome(conn, member.node_id)
        log.info("member joined", extra={"peer": member.node_id, "peer_name": member.name})

    def _welcome(self, conn: int, peer: str) -> None:
        link = self._mesh.tick.links.get(peer)
        if link is not None and not link.is_open:
            link.dial_failed(mono_ms())  # it does not know us before the answer, so it is the one to dial
        myself, registry = self._mesh.myself, self._mesh.tick.registry
        meta = {
            "node_id": self._mesh.me,
            "first_key": keys_of(myself)["first_key"],
            "about": self._mesh.about(),
        }
        entries = [*registry.bucket(MEMBERS), *registry.bucket(WHEREABOUTS)]
        # What does not fit into one frame is handed over when the session opens.
        body = next(iter(encode_entries(entries, self._limits)), b"[]")
        self._send(conn, Frame(kind=frames.JOIN_OK, meta=meta, body=body))

    def _refuse(self, conn: int, reason: str, counted: str) -> None:
        self._host.refusals.add(counted, mono_ms())
        self._store.note("join-refused", reason)
        self._send(conn, Frame(kind=frames.BYE, meta={"reason": reason}))

    def _send(self, conn: int, frame: Frame) -> None:
        self._mesh.transport.send(conn, frames.encode(frame))
