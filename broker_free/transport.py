"""Sockets between nodes: CURVE links, the ZAP socket that guards them, and the beats. The only importer of zmq.

Knows nothing of sessions, messages or members: frames go in and out as lists of bytes, and whom to let in is the
`admit` function's word. One thread, the owner, does everything here except `wake`.

How it is read. Every ZeroMQ socket signals through one descriptor, edge-triggered in spirit: the descriptor says
"a command came in", not "there are messages", and any call on the socket may swallow that signal. So the rules are:

  - a socket that has signalled is an inlet in `_ready` until it says that nothing is left (which clears the signal);
  - a socket that we wrote to, connected or bound is in `_touched`, and is asked before the next wait;
  - the wait itself is one epoll over the descriptors: 0.5 µs for 4 or 512 sockets, where zmq.Poller takes 4 µs
    for 4 and 360 µs for 512 (two sockets a link: the DEALER and its monitor).

Where the time goes. `send_multipart` and `recv_multipart` call enums for every frame. The compiled `send` with plain
int flags takes 0.2 of the time (five frames); receiving frames as `Frame`, whose `.more` costs nothing, takes 0.6,
with the user id of each message read into the bargain. Caching user ids by routing id would make that 0.55 and would
be wrong: a member may choose the routing id of its connection, so it could take over a name that is still cached.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Final, NamedTuple

import zmq
from zmq import zmq_poll

from broker_free.errors import AddressInUse, InvalidInput
from broker_free.flood import Address, address_of, connections
from broker_free.limits import KIB, Limits
from broker_free.security import KeyPair, key_bytes_of, node_id_of, z85_of

log = logging.getLogger(__name__)

# Bounds that belong to the sockets themselves, with the reason of each.
HIGH_WATER_MARK: Final = 1_000  # messages a pipe holds; credit stops a sender long before
FRAME_MARGIN_BYTES: Final = 64 * KIB  # the largest frame is a body and what surrounds it
BEAT_BYTES_MAX: Final = 64 * KIB  # a beat is a few hundred bytes; a subscription less
BACKLOG: Final = 1_024  # the default of 100 makes a mesh that starts at once wait for SYN retries
KEEPALIVE_S: Final = 15  # a silent connection is asked after this: a machine may be gone without a FIN
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_TRIES: Final = 3
UNACKED_MS_MAX: Final = 15_000  # sent, and not even the peer's kernel has it
REWATCH_MS: Final = 1_000  # the SUB socket reconnects by itself, from here
REWATCH_MS_MAX: Final = 30_000  # up to here
BIND_PATIENCE_S: Final = 1.0  # a listener that was closed leaves its port a moment later
BIND_RETRY_S: Final = 0.02
ROUTES_PER_USER: Final = 8  # connections of one user id that are told apart; a peer needs one or two
FRAME_OVERHEAD_BYTES: Final = 64  # a frame on the wire is larger than what it holds: CURVE, lengths (at most)
SILENT_REMEMBERED: Final = 64
BURST: Final = 64  # messages read from one socket before the next has its turn

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
LINK_DOMAIN: Final = b"broker-free"  # of the ROUTER
BEAT_DOMAIN: Final = b"broker-free-beats"  # of the PUB: a key may have the right to one and not to the other

# pyzmq turns an option or flag that is an enum into one again at every call; plain ints are free.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_NOBLOCK_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN: Final = int(zmq.POLLIN)

_HANDSHAKE_SUCCEEDED: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_LINK_FAILURES: Final = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "refused",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "not-a-peer",
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "no-handshake",
    int(zmq.EVENT_CLOSED): "unreachable",
    int(zmq.EVENT_DISCONNECTED): "lost",
}
_LINK_EVENTS: Final = sum(_LINK_FAILURES) | _HANDSHAKE_SUCCEEDED
# AUTH is left out: the ZAP answer has counted it. PROTOCOL must be: libzmq 4.3.5 reports a message that cannot be
# decrypted before it looks at errno, and reporting may leave EAGAIN there. Then it takes the forgery for back pressure,
# and keeps a connection that nobody reads or closes.
_LISTENER_FAILURES: Final = {int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "no-handshake"}
_LISTENER_EVENTS: Final = sum(_LISTENER_FAILURES)
_MONITOR_HEAD: Final = struct.Struct("=Hi")  # event, value

_ENDPOINT: Final = re.compile(r"tcp://(\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%\w+)?\]):(\*|[0-9]{1,5})")

_Socket = zmq.Socket[bytes]


def new_keypair() -> KeyPair:
    """Make a CURVE key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public=public, secret=secret)


def public_of(secret: bytes) -> bytes:
    """Compute the public half (Z85) of a secret key (Z85)."""
    key_bytes_of(secret)  # InvalidInput rather than libzmq's EINVAL
    return zmq.curve_public(secret)


# What poll() returns. Named tuples, because `Received` is made for every message: as immutable as a frozen
# dataclass at a third of its price (0.33 against 0.89 µs).


class Connected(NamedTuple):
    """A dial finished its handshake: the other side holds the key we dialled, and lets ours in."""

    conn: int


class Closed(NamedTuple):
    """A dial failed or its link broke; the conn is gone. Comes once for every dial that we did not close.

    It is the last event of its conn. Messages that had come but were not read may be lost with the link (libzmq
    drops them), so what matters needs an answer. The reasons:

    refused: the other side does not let our key in · not-a-peer: it does not speak our protocol ·
    no-handshake: it hung up or stayed silent before the handshake was over (a wrong server key looks like this) ·
    unreachable: nobody listens there, or nobody answered in time · lost: the link was up and broke ·
    silent: none of these came in time · unresolved: the host name has no address, or nobody said so in time ·
    invalid: no such endpoint or key can be dialled ·
    exhausted: this process is out of descriptors or sockets.
    """

    conn: int
    reason: str


class Received(NamedTuple):
    """One message, its frames as they came: how many there should be is not the transport's business.

    `user_id` is proven: what `admit` answered for the key of this connection, or, on a link that we dialled,
    the node id of the server key.
    """

    conn: int
    user_id: str
    frames: list[bytes]


class Beat(NamedTuple):
    """What a watched node published. It comes from a node that holds a watched key, but not which one is told."""

    frames: list[bytes]


Event = Connected | Closed | Received | Beat


class _Inlet:
    """A socket that is read. `drain(events, burst)` reads up to `burst` messages, returns how many: fewer = empty."""

    __slots__ = ("asked", "drain", "fd", "socket")

    def __init__(self, socket_: _Socket, drain: Callable[[list[Event], int], int]) -> None:
        self.socket = socket_
        self.drain = drain
        self.fd = socket_.FD
        self.asked = [(socket_, _POLLIN)]  # for zmq_poll


class _Link:
    """One dial: a DEALER, its monitor and what is known of it. Lives until `Closed` or `close`."""

    __slots__ = (
        "broken",
        "conn",
        "deadline",
        "endpoint",
        "inlet",
        "is_open",
        "monitor",
        "read_bytes",
        "send",
        "user_id",
    )

    def __init__(self, conn: int, user_id: str, deadline: float) -> None:
        self.conn = conn
        self.user_id = user_id
        self.deadline = deadline  # of the handshake, on the monotonic clock
        self.is_open = False
        self.broken: str | None = None  # why; what is left of its messages is read before Closed
        self.endpoint = ""  # of the address that was dialled
        self.read_bytes = 0  # about: what the sender needed for what was read
        self.inlet: _Inlet
        self.monitor: _Inlet
        self.send: Callable[[bytes, int], object]


class _Route:
    """One inbound connection, known by the routing id that the ROUTER gave it."""

    __slots__ = ("address", "conn", "is_muted", "read_bytes", "routing_id", "user_id")

    def __init__(self, conn: int, routing_id: bytes, user_id: str, address: Address | None) -> None:
        self.conn = conn
        self.routing_id = routing_id
        self.user_id = user_id
        self.address = address  # of the far end
        self.read_bytes = 0  # about: what the sender needed for what was read
        self.is_muted = False  # closed by the owner: what still comes in is dropped


class Transport:
    """All ZeroMQ sockets of one node, in a private context (there is one ZAP handler for each context)."""

    def __init__(
        self,
        *,
        keys: KeyPair,
        admit: Callable[[bytes], str | None],
        admit_watcher: Callable[[bytes], str | None] | None = None,
        limits: Limits,
    ) -> None:
        """Open what needs no address.

        admit(public key, Z85) is asked at each handshake, in the owner thread: the user id to stamp on every
        message of that connection, or None to refuse. It fails closed: raising or an empty name refuses too.
        `admit_watcher` is asked in its place about who wants to hear the beats.
        """
        self.refused: Counter[str] = Counter()  # handshakes refused, by reason
        self._keys = keys
        self._admit = {LINK_DOMAIN: admit, BEAT_DOMAIN: admit_watcher or admit}
        self._limits = limits
        self._numbers = itertools.count(1)
        self._context: zmq.Context[_Socket] = zmq.Context()
        # A dial takes three: the DEALER and both ends of its monitor. The default of 1,023 is 340 dials.
        self._context.set(zmq.MAX_SOCKETS, 3 * limits.peers_max + 64)

        self._inlets: dict[int, _Inlet] = {}  # by descriptor
        self._ready: dict[_Inlet, None] = {}  # may hold something; a dict is a set that keeps its order
        self._touched: set[_Inlet] = set()
        self._owed: list[Closed] = []  # known before the poll that will tell it
        self._waiter = _Waiter()
        self._waker = _Waker()
        self._waiter.add(self._waker.fd)
        self._resolver = Resolver(limits, wake=self.wake)

        self._links: dict[int, _Link] = {}
        self._dialling: dict[int, _Link] = {}  # without a finished handshake, oldest first
        self._routes: dict[bytes, _Route] = {}  # by routing id, oldest first
        self._routes_of: dict[str, dict[bytes, _Route]] = {}  # by user id
        self._route_of_conn: dict[int, _Route] = {}

        # Bound before any tcp socket: libzmq lets everybody in while there is no handler and no enforced domain.
        zap = self._socket(zmq.ROUTER)
        zap.bind(ZAP_ENDPOINT)
        self._zap = self._open_inlet(zap, self._drain_zap)
        self._look_due = 0.0  # when beats are read next, on the monotonic clock
        self._sub = self._open_inlet(self._subscriber(), self._drain_sub, wakes=False)
        self._silent: dict[str, str] = {}  # user ids that were let in and have said nothing → their addresses
        self._watched: dict[str, bytes] = {}  # endpoint → server key
        self._watched_at: dict[str, str] = {}  # endpoint → the address it is connected to

        self._router: _Inlet | None = None
        self._router_send: Callable[[bytes, int], object]
        self._pub: _Socket | None = None
        self._endpoint = self._pub_endpoint = self._host = ""
        self._listener_monitors: list[_Inlet] = []

    # ── Listening ───────────────────────────────────────────────────────────────────────────────────────────

    def bind(self, endpoint: str) -> tuple[str, str]:
        """Listen: the ROUTER at `endpoint` (port 0 or * takes any free one), beats at any free port of that host.

        Returns both endpoints as bound. Called again, it drops every inbound connection first (libzmq has no
        way to cut a single one) and keeps the port of the beats. AddressInUse after a second of trying;
        InvalidInput for an endpoint that this machine cannot listen on.
        """
        host, port = _parse(endpoint)
        kept = self._pub_endpoint if self._host == host else ""
        self._close_listeners()
        _scatter_routing_ids()
        try:
            router, bound = self._listen(zmq.ROUTER, f"tcp://{host}:{port or '*'}")
            self._router = self._open_inlet(router, self._drain_router)
            self._router_send = _fast_send(router)
            self._touched.add(self._router)
            self._pub, self._pub_endpoint = self._listen(zmq.PUB, kept or f"tcp://{host}:*")
            self._host, self._endpoint = host, bound
        except BaseException:
            self._close_listeners()
            raise
        return bound, self._pub_endpoint

    def relisten(self) -> None:
        """Listen anew where we listen, dropping every inbound connection. Raises what `bind` raises."""
        self.bind(self._endpoint)

    def rekey(self, keys: KeyPair) -> None:
        """Be known by other keys from now on: listen, dial and watch with them. Inbound connections are dropped."""
        self._keys = keys
        self._close_inlet(self._sub)
        self._sub = self._open_inlet(self._subscriber(), self._drain_sub, wakes=False)
        watched, self._watched = self._watched, {}
        self._watched_at.clear()
        for endpoint, server_key in watched.items():
            self.watch(endpoint, server_key=server_key)
        self.relisten()

    def _listen(self, kind: int, endpoint: str) -> tuple[_Socket, str]:
        listener = self._socket(kind)
        try:
            if kind == zmq.ROUTER:
                listener.set(zmq.ROUTER_MANDATORY, 1)  # a send to nobody is an error, not a silent loss
                domain, frame_bytes_max = LINK_DOMAIN, self._limits.body_bytes_max + FRAME_MARGIN_BYTES
            else:
                domain, frame_bytes_max = BEAT_DOMAIN, BEAT_BYTES_MAX
            listener.set(zmq.BACKLOG, BACKLOG)
            listener.set(zmq.CURVE_SERVER, 1)
            listener.set(zmq.CURVE_SECRETKEY, self._keys.secret)
            listener.set(zmq.ZAP_DOMAIN, domain)
            listener.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it strangers come in while no handler is bound
            self._prepare_tcp(listener, endpoint, frame_bytes_max=frame_bytes_max)
            self._listener_monitors.append(
                self._open_inlet(self._monitor(listener, _LISTENER_EVENTS), self._drain_listener_monitor)
            )
            _bind_patiently(listener, endpoint)
            bound = listener.get(zmq.LAST_ENDPOINT)
            assert isinstance(bound, bytes)
            return listener, bound.decode("ascii")
        except BaseException:
            listener.monitor(None, 0)
            listener.close()
            raise

    def _close_listeners(self) -> None:
        for listener in (self._router.socket if self._router else None, self._pub):
            if listener:
                listener.monitor(None, 0)
        for monitor in self._listener_monitors:
            self._close_inlet(monitor)
        if self._router:
            self._close_inlet(self._router)
        if self._pub:
            self._pub.close()
        self._listener_monitors.clear()
        self._router = self._pub = None
        self._routes.clear()
        self._routes_of.clear()
        self._route_of_conn.clear()

    # ── Dialling ────────────────────────────────────────────────────────────────────────────────────────────

    def dial(
        self, endpoint: str, *, server_key: bytes, user_id: str = "", keys: KeyPair | None = None
    ) -> int:
        """Open a fresh link to the node that holds `server_key` and return its conn; Connected or Closed follows.

        `keys` replaces our own client identity, for a one-time key; `user_id` is stamped on what comes in, by
        default the hash of the server key. Nothing that a peer may have told us (endpoint,
        key) can make this raise: it becomes Closed. One socket is one TCP connection, which never reconnects by
        itself, so nothing stale crosses sessions. A host *name* is looked up in a thread of its own: libzmq would
        do it in its only I/O thread, which holds up every link meanwhile.
        """
        conn = next(self._numbers)
        try:
            _parse(endpoint, dial=True)
            user_id = user_id or node_id_of(server_key)
        except InvalidInput:
            self._owed.append(Closed(conn, "invalid"))
            return conn

        def go(address: str | None) -> None:
            if address is None:
                self._owed.append(Closed(conn, "unresolved"))
                return
            # Connecting and the handshake each have their own timer in libzmq; this one is for what has none there.
            deadline = time.monotonic() + (2 * self._limits.dial_timeout_ms + 500) / 1000
            try:
                self._links[conn] = self._connect(_Link(conn, user_id, deadline), address, server_key, keys)
            except (zmq.ZMQError, OSError) as error:
                is_full = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
                self._owed.append(Closed(conn, "exhausted" if is_full else "invalid"))
                return
            self._dialling[conn] = self._links[conn]

        self._resolver.resolve(endpoint, key=conn, then=go)
        return conn

    def _connect(self, link: _Link, endpoint: str, server_key: bytes, keys: KeyPair | None) -> _Link:
        dealer = self._socket(zmq.DEALER)
        try:
            dealer.set(zmq.IMMEDIATE, 1)  # a send before the handshake fails instead of waiting in a queue
            dealer.set(zmq.RECONNECT_IVL, -1)
            dealer.set(zmq.CONNECT_TIMEOUT, self._limits.dial_timeout_ms)
            self._prepare_client(dealer, keys or self._keys, server_key)
            frame_bytes_max = self._limits.body_bytes_max + FRAME_MARGIN_BYTES
            self._prepare_tcp(dealer, endpoint, frame_bytes_max=frame_bytes_max)
            # The monitor is connected before there is anything to report: libzmq's I/O thread would wait for it.
            monitor = self._monitor(dealer, _LINK_EVENTS)
        except BaseException:
            dealer.close()
            raise
        link.send = _fast_send(dealer)
        link.endpoint = endpoint
        link.inlet = self._open_inlet(dealer, lambda events, burst: self._drain_link(link, events, burst))
        link.monitor = self._open_inlet(monitor, lambda events, _: self._drain_monitor(link, events))
        try:
            dealer.connect(endpoint)
        except BaseException:
            self._release(link)
            raise
        self._touched.add(link.inlet)
        return link

    def _release(self, link: _Link) -> None:
        """Close the sockets of a link. First the monitoring, because an event without a reader blocks libzmq."""
        link.inlet.socket.monitor(None, 0)
        self._close_inlet(link.monitor)
        self._close_inlet(link.inlet)

    # ── Sending ─────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, conn: int, frames: Sequence[bytes]) -> bool:
        """Hand one message to a connection without waiting. False: that session is over, whatever the cause.

        True is no promise: what is handed over may still be lost with the connection. False is: the conn is
        unknown or closed, the peer is gone, or it has let `HIGH_WATER_MARK` messages pile up.
        """
        link = self._links.get(conn)
        if link:
            return self._send(link.inlet, link.send, frames)
        route = self._route_of_conn.get(conn)
        if route is None or self._router is None:
            return False
        try:
            return self._send(self._router, self._router_send, (route.routing_id, *frames))
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self._forget(route)
            return False

    def _send(self, inlet: _Inlet, send: Callable[[bytes, int], object], frames: Sequence[bytes]) -> bool:
        self._touched.add(inlet)
        *heads, last = frames
        try:
            # Only the first frame can fail: the rest follow it into the pipe, or with a broken one, nowhere.
            for frame in heads:
                send(frame, _NOBLOCK_MORE)
            send(last, _NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self, conn: int) -> None:
        """End a connection; no Closed follows, though events of the current poll may still name it.

        A link that we dialled is closed. An inbound one cannot be cut (libzmq 4.3.5), so it is forgotten: what
        still comes in on it is dropped until the peer dials again.
        """
        link = self._links.pop(conn, None)
        if link:
            self._dialling.pop(conn, None)
            self._release(link)
        route = self._route_of_conn.pop(conn, None)
        if route:
            route.is_muted = True
        self._resolver.forget(conn)
        if self._owed:
            self._owed = [closed for closed in self._owed if closed.conn != conn]

    # ── Beats ───────────────────────────────────────────────────────────────────────────────────────────────

    def beat(self, frames: Sequence[bytes]) -> None:
        """Publish to every node that watches this one. A watcher that lags behind loses beats."""
        if self._pub:
            self._pub.send_multipart(frames, _NOBLOCK)

    def watch(self, endpoint: str, *, server_key: bytes) -> bool:
        """Receive the beats of the node that holds `server_key`; its PUB endpoint. Watching twice changes nothing.

        False: no such endpoint or key can be watched (a peer may have told us anything). The socket reconnects
        by itself, except after a refusal: unwatch and watch again once we are let in.
        """
        if self._watched.get(endpoint) == server_key:
            return True
        try:
            _parse(endpoint, dial=True)
            key_bytes_of(server_key)
        except InvalidInput:
            return False
        self.unwatch(endpoint)
        self._watched[endpoint] = server_key

        def go(address: str | None) -> None:
            if address is None:
                self._watched.pop(endpoint, None)  # the next call of `watch` tries again
                return
            self._watched_at[endpoint] = address
            subscriber = self._sub.socket
            # Options count for the connections made after they are set: one socket can watch many keys.
            subscriber.set(zmq.CURVE_SERVERKEY, server_key)
            subscriber.set(zmq.IPV6, int("[" in address))
            subscriber.connect(address)
            self._touched.add(self._sub)

        self._resolver.resolve(endpoint, key=endpoint, then=go)
        return True

    def unwatch(self, endpoint: str) -> None:
        """Stop receiving the beats of an endpoint; nothing happens if it was not watched."""
        self._resolver.forget(endpoint)
        self._watched.pop(endpoint, None)
        address = self._watched_at.pop(endpoint, None)
        if address is None:
            return
        try:
            self._sub.socket.disconnect(address)
        except zmq.ZMQError as error:
            if error.errno != errno.ENOENT:  # libzmq drops the endpoint of a refused connection by itself
                raise
        self._touched.add(self._sub)

    # ── Receiving ───────────────────────────────────────────────────────────────────────────────────────────

    def poll(self, timeout_ms: int) -> list[Event]:
        """Wait until something has come, at most `timeout_ms`, and return all of it.

        At most `limits.poll_frames_max` messages; the next poll goes on with the rest, without waiting. Order is
        kept within a connection, Connected is the first event of a link and Closed the last. Sockets take turns,
        so that none starves another. Handshakes are answered first: they die after `limits.dial_timeout_ms`
        without a poll. Returns early, with nothing, for `wake`, for handshakes and for libzmq's own signals.
        """
        if self._touched:
            self._recheck_touched()
        for fd in self._waiter.wait(self._patience_ms(timeout_ms)):
            if fd == self._waker.fd:
                self._waker.clear()
            else:
                self._ready[self._inlets[fd]] = None

        now = time.monotonic()
        if self._watched and now >= self._look_due:
            # Beats are read in batches: waking for each of a large mesh's was most of what an idle node cost.
            self._look_due = now + self._limits.heartbeat_ms / 4_000
            self._ready[self._sub] = None
        if self._resolver.is_busy:
            self._resolver.deliver(now)
        events: list[Event] = [*self._owed]
        self._owed.clear()
        ready = self._ready
        if self._zap in ready:
            del ready[self._zap]
            if self._zap.drain(events, self._limits.poll_frames_max) == self._limits.poll_frames_max:
                ready[self._zap] = None
        room = self._limits.poll_frames_max
        while ready and room > 0:
            inlet = next(iter(ready))
            del ready[inlet]
            burst = min(room, BURST)
            read = inlet.drain(events, burst)
            room -= read
            if read == burst:
                ready[inlet] = None  # there may be more: to the end of the queue
        if self._dialling:
            self._expire_dials(events)
        return events

    def wake(self) -> None:
        """Make the current or next poll return at once. Any thread, at any time, also after `close_all`."""
        self._waker.set()

    def _patience_ms(self, timeout_ms: int) -> float:
        if self._ready or self._owed:
            return 0
        patience_s, now = timeout_ms / 1000, time.monotonic()
        if self._watched:
            patience_s = min(patience_s, self._look_due - now)
        if self._dialling:
            patience_s = min(patience_s, next(iter(self._dialling.values())).deadline - now)
        deadline = self._resolver.deadline if self._resolver.is_busy else None
        if deadline is not None:
            patience_s = min(patience_s, deadline - now)
        return max(0.0, patience_s * 1000)

    def _recheck_touched(self) -> None:
        asked = [(inlet.socket, _POLLIN) for inlet in self._touched]
        holding = {found for found, _ in zmq_poll(asked, 0)}
        self._ready.update((inlet, None) for inlet in self._touched if inlet.socket in holding)
        self._touched.clear()

    def _expire_dials(self, events: list[Event]) -> None:
        now = time.monotonic()
        for link in list(itertools.takewhile(lambda link: link.deadline <= now, self._dialling.values())):
            self._finish(link, link.broken or "silent", events)

    # Each _drain reads until nothing is left or `burst` messages, appends to events and returns how many it read.

    def _drain_zap(self, _events: list[Event], burst: int) -> int:
        socket_ = self._zap.socket
        read = 0
        try:
            while read < burst:
                request = socket_.recv_multipart(_NOBLOCK)
                read += 1
                answer = self._zap_answer(request)
                if answer:
                    socket_.send_multipart(answer, _NOBLOCK)
        except zmq.Again:
            pass
        return read

    def _zap_answer(self, request: list[bytes]) -> list[bytes] | None:
        """Answer one ZAP 1.0 request (ZeroMQ RFC 27), or None for what libzmq never asks.

        request  routing id, "", version, request id, domain, address, identity, mechanism, credential
        answer   routing id, "", version, request id, status, text, user id, metadata
        """
        if len(request) < 9 or request[2] != b"1.0":
            self.refused["malformed"] += 1
            return None
        _, _, version, request_id, domain, address, _, mechanism, *credentials = request
        user_id, reason = None, "malformed"
        admit = self._admit.get(domain)
        if admit and mechanism == b"CURVE" and [len(key) for key in credentials] == [32]:
            user_id, reason = self._admitted(admit, z85_of(credentials[0]))
        if user_id:
            if domain == LINK_DOMAIN:
                self._note_silent(user_id, address.decode("ascii", "replace"))
            return [*request[:2], version, request_id, b"200", b"OK", user_id.encode("utf-8"), b""]
        self.refused[reason] += 1
        log.debug(
            "handshake refused", extra={"reason": reason, "address": address.decode("ascii", "replace")}
        )
        return [*request[:2], version, request_id, b"400", b"refused", b"", b""]

    def _note_silent(self, user_id: str, address: str) -> None:
        """Remember who was let in and has said nothing yet, the latest only."""
        self._silent.pop(user_id, None)
        self._silent[user_id] = address
        if len(self._silent) > SILENT_REMEMBERED:
            del self._silent[next(iter(self._silent))]

    def cut_floods(self) -> dict[str, bool] | None:
        """Cut the connections that hold more unread bytes than `limits.unread_bytes_max`; return whose they are.

        None when none does. A connection that never completed a message cannot be told from others of its kind: then
        all at that address who were let in and have said nothing are suspected, and the value is False.
        """
        routes = {route.address: route for route in self._routes.values()}
        links = {link.endpoint: link for link in self._links.values()}
        watched = {
            address: self._watched[at] for at, address in self._watched_at.items() if at in self._watched
        }
        port, beat_port = (_port_of(one) for one in (self._endpoint, self._pub_endpoint))
        culprits: dict[str, bool] = {}
        has_cut = False
        for connection in connections():
            far = _endpoint_of(connection.there)
            link, server_key = links.get(far), watched.get(far)
            route = routes.get(connection.there) if connection.here[1] == port else None
            if connection.here[1] not in (port, beat_port) and link is None and server_key is None:
                continue  # of the application
            read_bytes = route.read_bytes if route else link.read_bytes if link else 0
            if connection.received - read_bytes <= self._limits.unread_bytes_max:
                continue
            connection.cut()
            has_cut = True
            if route or link:
                culprits[(route or link).user_id] = True  # type: ignore[union-attr]  # one of them is there
            elif connection.here[1] == port:
                silent = [one for one, address in self._silent.items() if address == connection.there[0]]
                culprits.update({one: culprits.get(one, False) for one in silent})
            elif server_key is not None:
                culprits[node_id_of(server_key)] = True
        return culprits if has_cut else None

    def _admitted(self, admit: Callable[[bytes], str | None], public: bytes) -> tuple[str | None, str]:
        try:
            return admit(public), "unknown-key"
        except Exception:
            # Protects the node: a look-up that fails must refuse, and nothing more. Its traceback is told once.
            if not self.refused["admit-failed"]:
                log.exception("the look-up of a key failed; the connection is refused")
            return None, "admit-failed"

    def _drain_router(self, events: list[Event], burst: int) -> int:
        assert self._router
        recv = self._router.socket.recv
        asked = self._router.asked
        routes = self._routes
        read = 0
        try:
            while read < burst:
                routing_id = recv(_NOBLOCK)
                frame = recv(_NOBLOCK, False)
                user_id = frame.get(b"User-Id")  # of the connection, from the ZAP answer; on every frame
                frames = [frame.bytes]
                while frame.more:
                    frame = recv(_NOBLOCK, False)
                    frames.append(frame.bytes)
                read += 1
                route = routes.get(routing_id)
                if route is None or route.user_id != user_id:
                    route = self._new_route(routing_id, user_id, frame)
                route.read_bytes += sum(map(len, frames)) + len(frames) * FRAME_OVERHEAD_BYTES
                if not route.is_muted:
                    events.append(Received(route.conn, user_id, frames))
                # A lone message is the common case: asking is cheaper than running into EAGAIN (5 to 13 µs, cold).
                if read == 1 and not zmq_poll(asked, 0):
                    break
        except zmq.Again:
            pass
        return read

    def _new_route(self, routing_id: bytes, user_id: str, frame: zmq.Frame) -> _Route:
        """Number an inbound connection. libzmq does not tell when one ends, so two bounds keep the table small.

        Of one user id the newest `ROUTES_PER_USER` are known, so that nobody can push out others; and in all no
        more than every peer may have. A connection that was pushed out is as good as closed: sending to it
        fails, and what it still sends has a new conn.
        """
        former = self._routes.get(routing_id)
        if former:  # the same routing id under another key: that connection is gone
            self._forget(former)
        siblings = self._routes_of.get(user_id, {})
        if len(siblings) >= ROUTES_PER_USER:
            self._forget(next(iter(siblings.values())))
        if len(self._routes) >= ROUTES_PER_USER * self._limits.peers_max:
            self._forget(next(iter(self._routes.values())))
        fd = frame.get("__fd")  # of the connection, when the frame was read
        route = _Route(
            next(self._numbers), routing_id, user_id, address_of(int(fd)) if isinstance(fd, str) else None
        )
        self._silent.pop(user_id, None)
        self._routes[routing_id] = route
        self._routes_of.setdefault(user_id, {})[routing_id] = route
        self._route_of_conn[route.conn] = route
        return route

    def _forget(self, route: _Route) -> None:
        del self._routes[route.routing_id]
        siblings = self._routes_of[route.user_id]
        del siblings[route.routing_id]
        if not siblings:
            del self._routes_of[route.user_id]
        self._route_of_conn.pop(route.conn, None)

    def _drain_link(self, link: _Link, events: list[Event], burst: int) -> int:
        recv = link.inlet.socket.recv
        asked = link.inlet.asked
        read = 0
        try:
            while read < burst:
                frame = recv(_NOBLOCK, False)
                frames = [frame.bytes]
                while frame.more:
                    frame = recv(_NOBLOCK, False)
                    frames.append(frame.bytes)
                read += 1
                if not link.is_open:  # the handshake was reported before this message came: tell it first
                    self._drain_monitor(link, events)
                link.read_bytes += sum(map(len, frames)) + len(frames) * FRAME_OVERHEAD_BYTES
                events.append(Received(link.conn, link.user_id, frames))
                # Not once it is broken: asking makes libzmq drop what was not read yet.
                if read == 1 and not link.broken and not zmq_poll(asked, 0):
                    break
        except zmq.Again:
            pass
        if link.broken and read < burst:
            self._finish(link, link.broken, events)
        return read

    def _drain_monitor(self, link: _Link, events: list[Event]) -> int:
        for event in _monitored(link.monitor.socket):
            if event == _HANDSHAKE_SUCCEEDED:
                link.is_open = True
                self._dialling.pop(link.conn, None)
                events.append(Connected(link.conn))
            elif not link.broken:  # the first reason is the cause, the others follow from it
                link.broken = _LINK_FAILURES[event]
            # Reading the link makes libzmq attach its pipe, and after a failure finds the end of what is left.
            self._ready[link.inlet] = None
        return 0

    def _finish(self, link: _Link, reason: str, events: list[Event]) -> None:
        self.close(link.conn)
        events.append(Closed(link.conn, reason))

    def _drain_listener_monitor(self, _events: list[Event], _burst: int) -> int:
        for inlet in self._listener_monitors:
            for event in _monitored(inlet.socket):
                self.refused[_LISTENER_FAILURES[event]] += 1
        return 0

    def _drain_sub(self, events: list[Event], burst: int) -> int:
        read = 0
        try:
            while read < burst:
                events.append(Beat(self._sub.socket.recv_multipart(_NOBLOCK)))
                read += 1
        except zmq.Again:
            pass
        return read

    # ── Sockets ─────────────────────────────────────────────────────────────────────────────────────────────

    def _socket(self, kind: int) -> _Socket:
        made = self._context.socket(kind)
        made.set(zmq.LINGER, 0)  # what is not sent when a session ends is sent again in the next
        made.set(zmq.SNDTIMEO, 0)  # a ROUTER with ROUTER_MANDATORY waits for room for ever by default
        made.set(zmq.SNDHWM, HIGH_WATER_MARK)
        made.set(zmq.RCVHWM, HIGH_WATER_MARK)
        return made

    def _subscriber(self) -> _Socket:
        subscriber = self._socket(zmq.SUB)
        subscriber.set(zmq.SUBSCRIBE, b"")
        subscriber.set(zmq.RECONNECT_IVL, REWATCH_MS)
        subscriber.set(zmq.RECONNECT_IVL_MAX, REWATCH_MS_MAX)
        subscriber.set(zmq.CONNECT_TIMEOUT, self._limits.dial_timeout_ms)
        self._prepare_client(subscriber, self._keys, self._keys.public)
        self._prepare_tcp(subscriber, "", frame_bytes_max=BEAT_BYTES_MAX)
        return subscriber

    def _prepare_client(self, socket_: _Socket, keys: KeyPair, server_key: bytes) -> None:
        socket_.set(zmq.CURVE_PUBLICKEY, keys.public)
        socket_.set(zmq.CURVE_SECRETKEY, keys.secret)
        socket_.set(zmq.CURVE_SERVERKEY, server_key)

    def _prepare_tcp(self, socket_: _Socket, endpoint: str, *, frame_bytes_max: int) -> None:
        socket_.set(zmq.MAXMSGSIZE, frame_bytes_max)
        # The default of 30 s is what a slow handshake may hold a descriptor for.
        socket_.set(zmq.HANDSHAKE_IVL, self._limits.dial_timeout_ms)
        # Not ZMTP's heartbeats: when input has stopped and the connection then breaks, libzmq 4.3.5 keeps the engine
        # until the input goes on, and its heartbeat timer aborts the process (`Assertion failed: !_io_error`).
        socket_.set(zmq.TCP_KEEPALIVE, 1)
        socket_.set(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
        socket_.set(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
        socket_.set(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_TRIES)
        socket_.set(zmq.TCP_MAXRT, UNACKED_MS_MAX)
        socket_.set(zmq.IPV6, int("[" in endpoint))

    def _monitor(self, socket_: _Socket, events: int) -> _Socket:
        endpoint = f"inproc://monitor.{next(self._numbers)}"
        socket_.monitor(endpoint, events)
        try:
            monitor = self._context.socket(zmq.PAIR)
        except BaseException:
            socket_.monitor(None, 0)
            raise
        monitor.set(zmq.LINGER, 0)
        monitor.set(zmq.RCVHWM, 0)  # unbounded, since a full pipe would block libzmq's I/O thread
        monitor.connect(endpoint)
        return monitor

    def _open_inlet(
        self, socket_: _Socket, drain: Callable[[list[Event], int], int], *, wakes: bool = True
    ) -> _Inlet:
        """Read a socket from now on. `wakes`: poll returns when something comes; else it is looked at now and then."""
        inlet = _Inlet(socket_, drain)
        if wakes:
            self._inlets[inlet.fd] = inlet
            self._waiter.add(inlet.fd)
        self._touched.add(inlet)
        return inlet

    def _close_inlet(self, inlet: _Inlet) -> None:
        self._ready.pop(inlet, None)
        self._touched.discard(inlet)
        if self._inlets.pop(inlet.fd, None) is not None:
            self._waiter.remove(inlet.fd)
        inlet.socket.close()

    def close_all(self) -> None:
        """Close every socket, descriptor and thread of this transport, dropping what is unsent. May be repeated."""
        if self._context.closed:
            return
        for conn in list(self._links):
            self.close(conn)
        self._close_listeners()
        self._close_inlet(self._sub)
        self._close_inlet(self._zap)  # last: until then every tcp socket has its guard
        self._context.term()
        self._waiter.close()
        self._waker.close()


def _scatter_routing_ids() -> None:
    """Let the next ROUTER number its peers from a place that nobody can foresee.

    libzmq counts from C's rand(), which it never seeds, so that every process starts at 0x6b8b4567. A member may
    choose its own routing id; one that chose the id which comes next would make libzmq fail an assertion, and
    abort this process, when the next peer connects (seen with 4.3.5).
    """
    import ctypes  # 3 ms that only a listening node has to pay

    ctypes.CDLL(None).srand(ctypes.c_uint(int.from_bytes(os.urandom(4), "big")))


def _fast_send(socket_: _Socket) -> Callable[[bytes, int], object]:
    """The compiled `send`, without pyzmq's Python layer on top, which is there for draft sockets."""
    return super(zmq.Socket, socket_).send


def _monitored(monitor: _Socket) -> Iterable[int]:
    try:
        while True:
            head, _endpoint = monitor.recv_multipart(_NOBLOCK)
            yield _MONITOR_HEAD.unpack(head)[0]
    except zmq.Again:
        return


def _bind_patiently(listener: _Socket, endpoint: str) -> None:
    """Bind, waiting up to a second for the port: a closed listener leaves it asynchronously."""
    give_up = time.monotonic() + BIND_PATIENCE_S
    while True:
        try:
            listener.bind(endpoint)
            return
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE:
                raise InvalidInput(
                    f"cannot listen on {endpoint}: {error.strerror}",
                    hint='choose an address of this machine with listen="tcp://HOST:PORT"',
                ) from error
            if time.monotonic() >= give_up:
                raise AddressInUse(
                    f"port {endpoint.rpartition(':')[2]} is in use: cannot listen on {endpoint}",
                    hint='choose another with listen="tcp://HOST:PORT"; port 0 takes any free one',
                ) from error
        time.sleep(BIND_RETRY_S)  # nothing signals that a port became free


def _parse(endpoint: str, *, dial: bool = False) -> tuple[str, int]:
    """Split an endpoint into host and port (0: any), or raise InvalidInput. To dial, both must be definite."""
    found = _ENDPOINT.fullmatch(endpoint)
    if found:
        host, port = found[1], 0 if found[2] == "*" else int(found[2])
        if port <= 65_535 and not (dial and (port == 0 or host == "*")):
            return host, port
    raise InvalidInput(
        f"{endpoint!r} is no endpoint", hint="write it as tcp://HOST:PORT, such as tcp://127.0.0.1:7400"
    )


def _port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2] or 0)


def _endpoint_of(address: Address) -> str:
    host, port = address
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class Resolver:
    """Host names → addresses, each looked up in a thread of its own. Asked and answered in the owner thread.

    getaddrinfo cannot be given up, so a name that nobody answers holds its thread for as long as the system waits;
    the asker gets None after `limits.resolve_timeout_ms`, and only so many names are looked up at once.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        wake: Callable[[], None],
        look_up: Callable[[str, int], list[str]] | None = None,
    ) -> None:
        self._limits = limits
        self._wake = wake
        self._look_up = look_up
        self._asked: dict[object, tuple[str, float, Callable[[str | None], None]]] = {}  # endpoint, deadline
        self._under_way: set[str] = set()  # endpoints
        self._answers: SimpleQueue[tuple[str, list[str]]] = SimpleQueue()
        self._turn = itertools.count()

    def resolve(self, endpoint: str, *, key: object, then: Callable[[str | None], None]) -> None:
        """Call `then` with the endpoint of an address: at once for one that has none to look up, else in `deliver`."""
        host, port = _parse(endpoint, dial=True)
        if _is_address(host):
            then(endpoint)
            return
        self._asked[key] = (endpoint, time.monotonic() + self._limits.resolve_timeout_ms / 1000, then)
        if endpoint not in self._under_way and len(self._under_way) < self._limits.resolvers_max:
            self._under_way.add(endpoint)
            look_up = self._look_up or addresses_of
            threading.Thread(
                target=self._run, args=(look_up, endpoint, host, port), name="bf-resolve", daemon=True
            ).start()

    def _run(self, look_up: Callable[[str, int], list[str]], endpoint: str, host: str, port: int) -> None:
        try:
            found = look_up(host, port)
        except (OSError, UnicodeError):
            found = []
        self._answers.put((endpoint, found))
        self._wake()

    @property
    def is_busy(self) -> bool:
        """Say whether there is anything to wait for or to deliver."""
        return bool(self._asked or self._under_way)

    @property
    def deadline(self) -> float | None:
        return min((deadline for _, deadline, _ in self._asked.values()), default=None)

    def deliver(self, now: float) -> None:
        """Answer those who asked for what is known by now, or have waited long enough."""
        found: dict[str, list[str]] = {}
        while not self._answers.empty():
            endpoint, addresses = self._answers.get()
            self._under_way.discard(endpoint)
            found[endpoint] = addresses
        for key, (endpoint, deadline, then) in list(self._asked.items()):
            if endpoint in found or now >= deadline:
                del self._asked[key]
                known = found.get(endpoint)
                then(known[next(self._turn) % len(known)] if known else None)

    def forget(self, key: object) -> None:
        self._asked.pop(key, None)


def addresses_of(host: str, port: int) -> list[str]:
    """Ask the system for the endpoints of a host name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    hosts = [str(where[0]) for *_, where in found]
    return list(
        dict.fromkeys(f"tcp://[{one}]:{port}" if ":" in one else f"tcp://{one}:{port}" for one in hosts)
    )


def _is_address(host: str) -> bool:
    if host.startswith("["):
        return True
    try:
        socket.inet_pton(socket.AF_INET, host)
    except OSError:
        return False
    return True


class _Waiter:
    """Which descriptors can be read: epoll, whose cost does not grow with their number, or poll where it is missing."""

    if sys.platform == "linux":

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def add(self, fd: int) -> None:
            self._epoll.register(fd, select.EPOLLIN)

        def remove(self, fd: int) -> None:
            self._epoll.unregister(fd)

        def wait(self, timeout_ms: float) -> list[int]:
            return [fd for fd, _ in self._epoll.poll(timeout_ms / 1000)]

        def close(self) -> None:
            self._epoll.close()

    else:

        def __init__(self) -> None:
            self._poll = select.poll()

        def add(self, fd: int) -> None:
            self._poll.register(fd, select.POLLIN)

        def remove(self, fd: int) -> None:
            self._poll.unregister(fd)

        def wait(self, timeout_ms: float) -> list[int]:
            return [fd for fd, _ in self._poll.poll(timeout_ms)]

        def close(self) -> None:
            """Nothing is held."""


class _Waker:
    """A descriptor that any thread can make readable. Many `set` before one `clear` are one system call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # after close() the number may belong to somebody else's descriptor
        self._is_set = False
        self._is_closed = False
        if sys.platform == "linux":
            self.fd = self._write_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            reader, writer = socket.socketpair()
            self.fd, self._write_fd = reader.detach(), writer.detach()
            os.set_blocking(self.fd, False)

    def set(self) -> None:
        if self._is_set:
            return  # the owner has yet to clear it, and looks at its work after that
        with self._lock:
            if not self._is_set and not self._is_closed:
                self._is_set = True
                os.write(self._write_fd, struct.pack("=Q", 1))  # eight bytes: what an eventfd adds

    def clear(self) -> None:
        with self._lock:
            self._is_set = False
            os.read(self.fd, 8)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for fd in {self.fd, self._write_fd}:
                os.close(fd)
