"""The transport over real sockets on 127.0.0.1: who gets in, what arrives in which order, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import zmq

from broker_free.errors import AddressInUse, InvalidInput
from broker_free.limits import Limits
from broker_free.security import KeyPair, node_id_of
from broker_free.transport import (
    ROUTES_PER_USER,
    Beat,
    Closed,
    Connected,
    Event,
    Received,
    Transport,
    new_keypair,
    public_of,
)

WITHIN_S = 30.0  # nothing here is a race: a loaded machine gets its time
LIMITS = Limits(dial_timeout_ms=1_000)


@dataclass
class Side:
    """One node's transport, the keys it lets in, and everything that its polls returned."""

    limits: Limits = LIMITS
    keys: KeyPair = field(default_factory=new_keypair)
    members: dict[bytes, str] = field(default_factory=dict)  # public key → user id
    events: list[Event] = field(default_factory=list)
    endpoint: str = ""
    beats: str = ""

    def __post_init__(self) -> None:
        self.transport = Transport(keys=self.keys, admit=self.admit, limits=self.limits)

    def admit(self, public: bytes) -> str | None:
        return self.members.get(public)

    def listen(self) -> Side:
        self.endpoint, self.beats = self.transport.bind("tcp://127.0.0.1:0")
        return self

    def let_in(self, other: Side) -> None:
        self.members[other.keys.public] = node_id_of(other.keys.public)

    def dial(self, other: Side, keys: KeyPair | None = None) -> int:
        return self.transport.dial(other.endpoint, server_key=other.keys.public, keys=keys)

    @property
    def node_id(self) -> str:
        return node_id_of(self.keys.public)

    def received(self) -> list[Received]:
        return [event for event in self.events if isinstance(event, Received)]

    def beats_seen(self) -> list[list[bytes]]:
        return [event.frames for event in self.events if isinstance(event, Beat)]

    def closed(self, conn: int) -> list[str]:
        return [event.reason for event in self.events if isinstance(event, Closed) and event.conn == conn]


Make = Callable[..., Side]


@pytest.fixture
def make() -> Iterator[Make]:
    sides: list[Side] = []

    def _make(limits: Limits = LIMITS) -> Side:
        sides.append(Side(limits=limits))
        return sides[-1]

    yield _make
    for side in sides:
        side.transport.close_all()


@pytest.fixture
def pair(make: Make) -> tuple[Side, Side]:
    """A listener and a client that it lets in."""
    server, client = make().listen(), make()
    server.let_in(client)
    return server, client


def pump(*sides: Side, until: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    """Poll all sides in turn until the condition holds; fail after the deadline."""
    deadline = time.monotonic() + within_s
    while not until():
        assert time.monotonic() < deadline, [side.events for side in sides]
        for side in sides:
            side.events.extend(side.transport.poll(5))


def connect(client: Side, server: Side, keys: KeyPair | None = None) -> int:
    conn = client.dial(server, keys)
    pump(client, server, until=lambda: Connected(conn) in client.events)
    return conn


def say(client: Side, server: Side, conn: int, *bodies: bytes) -> list[Received]:
    """Send messages of four frames over an open link and return what the other side received meanwhile."""
    before = len(server.received())
    for body in bodies:
        assert client.transport.send(conn, [b"BF", b"frame", b"{}", body])
    pump(client, server, until=lambda: len(server.received()) >= before + len(bodies))
    return server.received()[before:]


def plain_client(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    made = context.socket(kind)
    made.set(zmq.LINGER, 0)
    return made


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


# ── Talking ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_admitted_client_and_its_server_talk_both_ways_and_each_knows_the_other(
    pair: tuple[Side, Side],
) -> None:
    server, client = pair
    conn = connect(client, server)
    (request,) = say(client, server, conn, b"hello")
    assert (request.user_id, request.frames) == (client.node_id, [b"BF", b"frame", b"{}", b"hello"])

    assert server.transport.send(request.conn, [b"BF", b"frame", b"{}", b"welcome"])
    pump(client, server, until=lambda: bool(client.received()))
    assert client.received() == [Received(conn, server.node_id, [b"BF", b"frame", b"{}", b"welcome"])]


def test_the_order_of_a_connection_is_kept_in_both_directions(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = connect(client, server)
    numbers = [b"%d" % n for n in range(500)]
    (first, *_) = requests = say(client, server, conn, *numbers)
    for number in numbers:
        assert server.transport.send(first.conn, [number])
    pump(client, server, until=lambda: len(client.received()) == 500)
    assert [request.frames[3] for request in requests] == numbers
    assert [answer.frames[0] for answer in client.received()] == numbers


def test_connected_comes_before_the_first_message_of_a_link(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conns = [connect(client, server) for _ in range(ROUTES_PER_USER)]
    for conn in conns:
        assert client.transport.send(conn, [b"hello"])
    pump(server, client, until=lambda: len(server.received()) == len(conns))
    for request in server.received():
        assert server.transport.send(request.conn, [b"answer"])
    pump(client, until=lambda: len(client.received()) == len(conns))
    for conn in conns:
        assert [type(event) for event in client.events if getattr(event, "conn", None) == conn] == [
            Connected,
            Received,
        ]


def test_a_message_of_any_number_of_frames_is_delivered_for_the_link_layer_to_judge(
    pair: tuple[Side, Side],
) -> None:
    server, client = pair
    conn = connect(client, server)
    odd = [[b""], [b"one"], [b"a", b"", b"c"], [b"%d" % n for n in range(9)]]
    for frames in odd:
        assert client.transport.send(conn, frames)
    pump(client, server, until=lambda: len(server.received()) == len(odd))
    assert [request.frames for request in server.received()] == odd


def test_one_poll_returns_no_more_messages_than_its_limit_and_the_next_goes_on(make: Make) -> None:
    server, client = make(replace(LIMITS, poll_frames_max=10)).listen(), make()
    server.let_in(client)
    conn = connect(client, server)
    for n in range(25):
        assert client.transport.send(conn, [b"%d" % n])
    sizes: list[int] = []

    def all_there() -> bool:
        events = server.transport.poll(5)
        sizes.append(len(events))
        server.events.extend(events)
        return len(server.received()) == 25

    pump(client, until=all_there)
    assert max(sizes) <= 10
    assert [request.frames for request in server.received()] == [[b"%d" % n] for n in range(25)]


def test_a_node_can_dial_itself(make: Make) -> None:
    node = make().listen()
    node.let_in(node)
    conn = node.dial(node)
    pump(node, until=lambda: Connected(conn) in node.events)
    assert node.transport.send(conn, [b"note to self"])
    pump(node, until=lambda: bool(node.received()))
    assert node.received()[0].user_id == node.node_id


def test_a_message_whose_signal_was_swallowed_by_a_send_is_not_overlooked(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = connect(client, server)
    (request,) = say(client, server, conn, b"begin")
    inbound = server.transport._router
    assert inbound

    def is_signalled(within_s: float) -> bool:  # looked at from outside, since a poll would read the message
        return bool(select.select([inbound.fd], [], [], within_s)[0])

    assert client.transport.send(conn, [b"question"])
    assert is_signalled(WITHIN_S)
    deadline = time.monotonic() + WITHIN_S
    while is_signalled(0):  # libzmq looks for commands in a send once a millisecond
        assert server.transport.send(request.conn, [b"answer"])
        assert time.monotonic() < deadline
    pump(server, until=lambda: len(server.received()) == 2)


# ── Who gets in ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stranger_is_refused_and_counted_and_its_dial_closes_once(make: Make) -> None:
    server, stranger = make().listen(), make()
    conn = stranger.dial(server)
    pump(server, stranger, until=lambda: bool(stranger.closed(conn)))
    assert stranger.closed(conn) == ["refused"]
    assert server.transport.refused == {"unknown-key": 1}
    assert server.events == []
    assert not stranger.transport.send(conn, [b"anyway"])


def test_a_look_up_that_raises_refuses(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    def admit(public: bytes) -> str | None:
        raise RuntimeError("the table is gone")

    server, client = make(), make()
    server.transport.close_all()
    server.transport = Transport(keys=server.keys, admit=admit, limits=LIMITS)
    server.listen()
    conns = [client.dial(server), client.dial(server)]
    pump(server, client, until=lambda: all(client.closed(conn) for conn in conns))
    assert [client.closed(conn) for conn in conns] == [["refused"], ["refused"]]
    assert server.transport.refused == {"admit-failed": 2}
    assert len([record for record in caplog.records if record.exc_info]) == 1  # told once, not at every knock


def test_an_empty_user_id_refuses(make: Make) -> None:
    server, client = make().listen(), make()
    server.members[client.keys.public] = ""
    conn = client.dial(server)
    pump(server, client, until=lambda: bool(client.closed(conn)))
    assert client.closed(conn) == ["refused"]


def test_nobody_gets_in_before_the_owner_polls(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = client.dial(server)
    pump(client, until=lambda: bool(client.closed(conn)))
    assert client.closed(conn) == ["no-handshake"]


def test_a_key_that_was_let_in_later_is_admitted_by_a_fresh_dial(make: Make) -> None:
    server, client = make().listen(), make()
    refused = client.dial(server)
    pump(server, client, until=lambda: bool(client.closed(refused)))
    server.let_in(client)
    (request,) = say(client, server, connect(client, server), b"now")
    assert request.user_id == client.node_id


def test_a_one_time_key_identifies_the_dial_that_used_it(pair: tuple[Side, Side]) -> None:
    server, client = pair
    once = new_keypair()
    server.members[public_of(once.secret)] = "join:7"
    conn = connect(client, server, keys=once)
    (request,) = say(client, server, conn, b"JOIN")
    assert request.user_id == "join:7"


def test_each_of_many_clients_is_known_by_its_own_user_id(make: Make) -> None:
    server, client = make().listen(), make()
    keys = [new_keypair() for _ in range(40)]
    server.members = {key.public: f"user-{n}" for n, key in enumerate(keys)}
    conns = [client.dial(server, key) for key in keys]
    pump(client, server, until=lambda: all(Connected(conn) in client.events for conn in conns))
    for _ in range(3):
        for n, conn in enumerate(conns):
            assert client.transport.send(conn, [b"user-%d" % n])
    pump(client, server, until=lambda: len(server.received()) == 120)
    assert all(request.user_id.encode() == request.frames[0] for request in server.received())
    assert len({request.conn for request in server.received()}) == 40


def test_the_routing_id_of_a_gone_peer_does_not_lend_its_name_to_another(make: Make) -> None:
    server = make().listen()
    alice, mallory = new_keypair(), new_keypair()
    server.members = {alice.public: "alice", mallory.public: "mallory"}

    def knock(context: zmq.Context[zmq.Socket[bytes]], keys: KeyPair) -> zmq.Socket[bytes]:
        raw = plain_client(context, zmq.DEALER)
        raw.set(zmq.ROUTING_ID, b"chosen")
        raw.set(zmq.CURVE_SERVERKEY, server.keys.public)
        raw.set(zmq.CURVE_PUBLICKEY, keys.public)
        raw.set(zmq.CURVE_SECRETKEY, keys.secret)
        raw.connect(server.endpoint)
        raw.send(b"who am I?")
        return raw

    with zmq.Context() as context:
        raw = knock(context, alice)
        pump(server, until=lambda: len(server.received()) == 1)
        raw.close()
        deadline = time.monotonic() + WITHIN_S
        while (
            len(server.received()) == 1
        ):  # the id is not free at once: until then libzmq ignores the newcomer
            assert time.monotonic() < deadline
            raw = knock(context, mallory)
            for _ in range(10):
                server.events.extend(server.transport.poll(20))
            raw.close()
    first, second, *_ = server.received()
    assert [first.user_id, second.user_id] == ["alice", "mallory"]
    assert first.conn != second.conn


def test_nobody_can_foresee_the_routing_ids_of_a_listening_node() -> None:
    # A peer that took the next id for itself would make libzmq abort the process. The transport keeps the ids to
    # itself, so another ROUTER of the same process, numbered from the same place, is looked at.
    program = """
import zmq
from broker_free.limits import Limits
from broker_free.transport import Transport, new_keypair
transport = Transport(keys=new_keypair(), admit=lambda key: None, limits=Limits())
transport.bind("tcp://127.0.0.1:0")
with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
    router.bind("inproc://router")
    dealer.connect("inproc://router")
    dealer.send(b"")
    print(router.recv_multipart()[0].hex())
transport.close_all()
"""
    first, second = (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=30).stdout
        for _ in range(2)
    )
    assert first != second


def test_a_client_without_encryption_gets_nothing_through(pair: tuple[Side, Side]) -> None:
    server, client = pair
    with zmq.Context() as context:
        raw = plain_client(context, zmq.DEALER)
        raw.connect(server.endpoint)
        raw.send_multipart([b"BF", b"frame", b"{}", b"let me in"])
        pump(server, until=lambda: server.transport.refused.total() > 0)
        requests = say(client, server, connect(client, server), b"member")
        raw.close()
    assert [request.frames[3] for request in requests] == [b"member"]
    assert len(server.received()) == 1


def test_garbage_on_the_port_disturbs_nobody(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = connect(client, server)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01"  # ZMTP 3.1, then the mechanism and filler
    curve = greeting + b"CURVE".ljust(20, b"\0") + bytes(32)
    noise = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        b"\xff" * 10,
        random.Random(7).randbytes(4096),
        greeting + b"NULL".ljust(20, b"\0") + bytes(32),
        curve + b"\x04\xff" + bytes(255),
        curve + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192),
        curve + b"\x06" + b"\xff" * 8,  # a command of 2^64 - 1 bytes
    ]
    for n, garbage in enumerate(noise):
        with socket.create_connection(("127.0.0.1", port_of(server.endpoint)), WITHIN_S) as raw:
            with contextlib.suppress(OSError):  # it may hang up on us in the middle
                raw.sendall(garbage)
            assert len(say(client, server, conn, b"%d" % n)) == 1
    assert len(server.received()) == len(noise)
    requests = say(client, server, connect(client, server), b"a new link")
    assert requests[0].user_id == client.node_id


def test_a_connection_that_stays_silent_is_hung_up_on(make: Make) -> None:
    server = make(replace(LIMITS, dial_timeout_ms=200)).listen()
    with socket.create_connection(("127.0.0.1", port_of(server.endpoint)), WITHIN_S) as raw:
        pump(server, until=lambda: server.transport.refused["no-handshake"] == 1)
        raw.settimeout(WITHIN_S)
        while raw.recv(4096):  # the greeting, then the end
            pass


def test_silent_connections_hold_up_no_member(pair: tuple[Side, Side]) -> None:
    server, client = pair
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server.endpoint)), WITHIN_S))
        assert len(say(client, server, connect(client, server), b"hello")) == 1


def test_a_dial_that_expects_another_key_never_connects(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = client.transport.dial(server.endpoint, server_key=new_keypair().public)
    pump(server, client, until=lambda: bool(client.closed(conn)))
    assert Connected(conn) not in client.events
    assert len(client.closed(conn)) == 1


# ── Failing links ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_dial_to_a_closed_port_closes(make: Make) -> None:
    client = make()
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound but not listening: nobody else gets the port meanwhile
        endpoint = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        conn = client.transport.dial(endpoint, server_key=new_keypair().public)
        pump(client, until=lambda: bool(client.closed(conn)))
    assert client.closed(conn) == ["unreachable"]


def test_a_dial_to_a_port_that_accepts_but_never_speaks_closes(make: Make) -> None:
    client = make(replace(LIMITS, dial_timeout_ms=200))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        conn = client.transport.dial(endpoint, server_key=new_keypair().public)
        pump(client, until=lambda: bool(client.closed(conn)))
    assert client.closed(conn) == ["no-handshake"]


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="a full accept queue drops SYNs on Linux")
def test_a_dial_that_nobody_answers_closes(make: Make) -> None:
    client = make(replace(LIMITS, dial_timeout_ms=200))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        endpoint = f"tcp://127.0.0.1:{full.getsockname()[1]}"
        conn = client.transport.dial(endpoint, server_key=new_keypair().public)
        pump(client, until=lambda: bool(client.closed(conn)))
    assert client.closed(conn) == ["unreachable"]


@pytest.mark.parametrize(
    "endpoint", ["", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://*:1", "ipc:///tmp/x", "\n"]
)
def test_a_dial_to_what_is_no_endpoint_closes_instead_of_raising(make: Make, endpoint: str) -> None:
    client = make()
    conn = client.transport.dial(endpoint, server_key=new_keypair().public)
    assert client.transport.poll(0) == [Closed(conn, "invalid")]


def test_a_dial_to_what_is_no_key_closes_instead_of_raising(make: Make) -> None:
    client = make()
    conns = [
        client.transport.dial("tcp://127.0.0.1:9", server_key=key) for key in (b"", b"x" * 39, b"\xff" * 40)
    ]
    assert client.transport.poll(0) == [Closed(conn, "invalid") for conn in conns]


def test_a_link_whose_listener_goes_away_closes_once_and_sends_no_more(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = connect(client, server)
    server.transport.close_all()
    pump(client, until=lambda: bool(client.closed(conn)))
    assert client.closed(conn) == ["lost"]
    assert not client.transport.send(conn, [b"late"])
    client.events.extend(client.transport.poll(20))
    assert client.closed(conn) == ["lost"]


def test_closed_is_the_last_event_of_a_link_that_broke(make: Make) -> None:
    server, client = make().listen(), make(replace(LIMITS, poll_frames_max=1))
    server.let_in(client)
    conn = connect(client, server)
    (request,) = say(client, server, conn, b"begin")
    numbers = [b"%d" % n for n in range(200)]
    for number in numbers:
        assert server.transport.send(request.conn, [number])
    pump(client, until=lambda: len(client.received()) == 5)
    server.transport.close_all()
    pump(client, until=lambda: bool(client.closed(conn)))
    got = [event.frames[0] for event in client.received()]
    assert got == numbers[: len(got)]
    assert client.events[-1] == Closed(conn, "lost")
    assert client.transport.poll(20) == []


def test_sending_to_an_inbound_peer_that_vanished_says_false(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = connect(client, server)
    (request,) = say(client, server, conn, b"hello")
    client.transport.close_all()
    pump(server, until=lambda: not server.transport.send(request.conn, [b"still there?"]))
    assert not server.transport.send(request.conn, [b"and now?"])


def test_sending_to_a_conn_that_never_was_says_false(make: Make) -> None:
    assert not make().listen().transport.send(4711, [b"hello?"])


def test_sending_to_a_peer_that_does_not_read_says_false_instead_of_waiting(make: Make) -> None:
    server, client = make().listen(), make()
    server.let_in(client)
    conn = connect(client, server)
    (request,) = say(client, server, conn, b"begin")
    body = bytes(64 * 1024)
    sent = 0
    while server.transport.send(request.conn, [body]):  # nobody polls the client
        sent += 1
        assert sent < 100_000
    assert sent > 0


def test_a_link_takes_nothing_before_it_is_connected(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = client.dial(server)
    assert not client.transport.send(conn, [b"too early"])
    pump(client, server, until=lambda: Connected(conn) in client.events)
    (request,) = say(client, server, conn, b"now")
    assert request.frames[-1] == b"now"


def test_a_conn_that_we_closed_reports_nothing_more(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = connect(client, server)
    (request,) = say(client, server, conn, b"hello")
    client.transport.close(conn)
    client.transport.close(conn)
    pump(server, until=lambda: not server.transport.send(request.conn, [b"?"]))
    client.events.clear()
    client.events.extend(client.transport.poll(20))
    assert client.events == []
    assert not client.transport.send(conn, [b"late"])


def test_an_inbound_conn_that_we_closed_is_silent_until_the_peer_dials_again(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = connect(client, server)
    (request,) = say(client, server, conn, b"hello")
    server.transport.close(request.conn)
    assert not server.transport.send(request.conn, [b"late"])
    assert client.transport.send(conn, [b"late too"])
    (fresh,) = say(client, server, connect(client, server), b"hello again")
    assert [got.frames[-1] for got in server.received()] == [b"hello", b"hello again"]
    assert fresh.conn != request.conn


def test_a_user_with_too_many_connections_loses_its_oldest_and_nobody_elses(make: Make) -> None:
    server, client, other = make().listen(), make(), make()
    server.let_in(client)
    server.let_in(other)
    (bystander,) = say(other, server, connect(other, server), b"me")
    conns = [connect(client, server) for _ in range(ROUTES_PER_USER + 1)]
    inbound = [say(client, server, conn, b"%d" % n)[0].conn for n, conn in enumerate(conns)]
    assert [server.transport.send(conn, [b"?"]) for conn in inbound] == [False] + [True] * ROUTES_PER_USER
    assert server.transport.send(bystander.conn, [b"?"])


def test_a_frame_over_the_limit_ends_the_connection_of_its_sender_only(make: Make) -> None:
    server = make(replace(LIMITS, body_bytes_max=1024)).listen()
    client, other = make(), make()
    server.let_in(client)
    server.let_in(other)
    conn, bystander = connect(client, server), connect(other, server)
    assert client.transport.send(conn, [bytes(1024 + 64 * 1024 + 1)])
    pump(client, server, until=lambda: bool(client.closed(conn)))
    assert client.closed(conn) == ["lost"]
    assert len(say(other, server, bystander, b"fine")) == 1
    assert len(server.received()) == 1


# ── Listening ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "tcp://0.0.0.0:0"])
def test_binding_tells_the_ports_that_were_taken(make: Make, endpoint: str) -> None:
    node = make()
    node.endpoint, node.beats = node.transport.bind(endpoint)
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    assert port_of(node.endpoint) != port_of(node.beats)
    for bound in (node.endpoint, node.beats):
        assert bound.startswith(f"tcp://{host}:")
        with socket.create_connection(("127.0.0.1", port_of(bound)), WITHIN_S):
            pass


def test_a_port_in_use_is_named_and_the_way_out_too(make: Make) -> None:
    first, second = make().listen(), make()
    with pytest.raises(AddressInUse, match=str(port_of(first.endpoint))) as refusal:
        second.transport.bind(first.endpoint)
    assert refusal.value.hint == 'choose another with listen="tcp://HOST:PORT"; port 0 takes any free one'
    second.listen()  # and another address still works


@pytest.mark.parametrize(
    "endpoint",
    ["127.0.0.1:7400", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "udp://127.0.0.1:1", "tcp://192.0.2.1:0"],
)
def test_an_endpoint_that_cannot_be_listened_on_is_invalid(make: Make, endpoint: str) -> None:
    with pytest.raises(InvalidInput):
        make().transport.bind(endpoint)


def test_binding_again_drops_inbound_links_and_keeps_both_ports(pair: tuple[Side, Side]) -> None:
    server, client = pair
    conn = connect(client, server)
    (request,) = say(client, server, conn, b"hello")
    assert server.transport.bind(server.endpoint) == (server.endpoint, server.beats)
    pump(client, server, until=lambda: bool(client.closed(conn)))
    assert not server.transport.send(request.conn, [b"?"])
    assert len(say(client, server, connect(client, server), b"hello again")) == 1


# ── Beats ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_beats_reach_a_watcher_that_is_let_in_and_no_stranger(make: Make) -> None:
    node, watcher, stranger = make().listen(), make(), make()
    node.let_in(watcher)
    for side in (watcher, stranger):
        assert side.transport.watch(node.beats, server_key=node.keys.public)

    def beat_arrived() -> bool:
        node.transport.beat([b"beat", b"%d" % len(watcher.events)])
        return len(watcher.beats_seen()) >= 3

    pump(node, watcher, stranger, until=beat_arrived)
    assert watcher.beats_seen()[0][0] == b"beat"
    assert stranger.events == []
    assert node.transport.refused["unknown-key"] >= 1


def test_one_watcher_follows_several_nodes_and_can_stop_following_one(make: Make) -> None:
    watcher = make()
    nodes = [make().listen() for _ in range(3)]
    for node in nodes:
        node.let_in(watcher)
        assert watcher.transport.watch(node.beats, server_key=node.keys.public)

    def beat() -> None:
        for node in nodes:
            node.transport.beat([node.node_id.encode()])

    def heard() -> set[bytes]:
        beat()
        return {frames[0] for frames in watcher.beats_seen()}

    pump(watcher, *nodes, until=lambda: heard() == {node.node_id.encode() for node in nodes})
    watcher.transport.unwatch(nodes[0].beats)
    watcher.transport.poll(0)  # what was on its way
    watcher.events.clear()
    pump(watcher, *nodes, until=lambda: heard() >= {node.node_id.encode() for node in nodes[1:]})
    assert nodes[0].node_id.encode() not in heard()


def test_a_refused_watcher_hears_the_beats_after_it_is_let_in_and_watches_again(make: Make) -> None:
    node, watcher = make().listen(), make()
    watcher.transport.watch(node.beats, server_key=node.keys.public)
    pump(node, watcher, until=lambda: node.transport.refused["unknown-key"] > 0)
    node.let_in(watcher)
    watcher.transport.unwatch(node.beats)
    watcher.transport.watch(node.beats, server_key=node.keys.public)

    def beat_arrived() -> bool:
        node.transport.beat([b"beat"])
        return bool(watcher.events)

    pump(node, watcher, until=beat_arrived)
    assert watcher.beats_seen()[0] == [b"beat"]


def test_a_watcher_hears_the_beats_again_after_the_node_listens_anew(make: Make) -> None:
    node, watcher = make().listen(), make()
    node.let_in(watcher)
    watcher.transport.watch(node.beats, server_key=node.keys.public)

    def heard(beat: bytes) -> bool:
        node.transport.beat([beat])
        return [beat] in watcher.beats_seen()

    pump(node, watcher, until=lambda: heard(b"before"))
    node.transport.bind(node.endpoint)
    pump(node, watcher, until=lambda: heard(b"after"))


def test_what_cannot_be_watched_says_false(make: Make) -> None:
    watcher = make()
    assert not watcher.transport.watch("tcp://nowhere", server_key=new_keypair().public)
    assert not watcher.transport.watch("tcp://127.0.0.1:9", server_key=b"no key")
    watcher.transport.unwatch("tcp://nowhere")


def test_a_beat_of_a_node_that_listens_nowhere_goes_nowhere(make: Make) -> None:
    make().transport.beat([b"anybody?"])


# ── The owner's thread ──────────────────────────────────────────────────────────────────────────────────────


def test_wake_ends_a_poll_from_another_thread(make: Make) -> None:
    node = make()
    owner = threading.Thread(target=node.transport.poll, args=(60_000,), daemon=True)
    owner.start()
    node.transport.wake()
    owner.join(WITHIN_S)
    assert not owner.is_alive()


def test_many_wakes_before_a_poll_are_one(make: Make) -> None:
    node = make()
    for _ in range(100_000):
        node.transport.wake()
    assert node.transport.poll(60_000) == []
    owner = threading.Thread(target=node.transport.poll, args=(60_000,), daemon=True)
    owner.start()
    owner.join(0.1)
    assert owner.is_alive()  # nothing was left over
    node.transport.wake()
    owner.join(WITHIN_S)
    assert not owner.is_alive()


def test_a_wake_after_the_end_is_harmless(make: Make) -> None:
    node = make()
    node.transport.close_all()
    node.transport.close_all()
    with socket.socket() as unrelated:  # has a descriptor number that the transport had
        node.transport.wake()
        assert unrelated.fileno() >= 0


def test_dialling_and_closing_leaves_no_descriptor_behind(make: Make) -> None:
    server, client = make().listen(), make()
    stranger = new_keypair()
    server.let_in(client)
    client.transport.close(connect(client, server))
    settled: list[int] = []

    def is_settled() -> bool:  # sockets close in a thread of libzmq: wait until the number stands still
        settled.append(descriptors())
        return len(settled) > 10 and len(set(settled[-10:])) == 1

    pump(server, client, until=is_settled)
    before = descriptors()
    for n in range(500):
        if n % 5 == 0:  # closed while it connects
            client.transport.close(client.dial(server))
        elif n % 5 == 1:  # refused
            conn = client.dial(server, stranger)
            pump(client, server, until=lambda conn=conn: bool(client.closed(conn)))  # type: ignore[misc]  # bound default
        else:
            client.transport.close(connect(client, server))
        client.events.clear()
    pump(server, client, until=lambda: descriptors() <= before)
    assert len(say(client, server, connect(client, server), b"still here")) == 1


def test_the_end_leaves_no_thread_and_no_descriptor(make: Make) -> None:
    def threads() -> int:
        return (
            len(os.listdir("/proc/self/task"))
            if os.path.exists("/proc/self/task")
            else threading.active_count()
        )

    before = (descriptors(), threads())
    server, client = make().listen(), make()
    server.let_in(client)
    client.transport.watch(server.beats, server_key=server.keys.public)
    conn = connect(client, server)
    say(client, server, conn, b"hello")
    client.dial(server)
    client.transport.send(conn, [b"unsent"])
    for side in (client, server):
        side.transport.close_all()
    pump(until=lambda: (descriptors(), threads()) <= before)


def test_running_out_of_descriptors_closes_the_dial_and_not_the_node(make: Make) -> None:
    resource = pytest.importorskip("resource")
    server, client = make().listen(), make()
    server.let_in(client)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    conns = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 20, hard))
    try:
        conns = [client.dial(server) for _ in range(12)]
        pump(client, until=lambda: any("exhausted" in client.closed(conn) for conn in conns))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for conn in conns:
        client.transport.close(conn)
    assert len(say(client, server, connect(client, server), b"recovered")) == 1
