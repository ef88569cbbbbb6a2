"""A node among strangers and bad members: it goes on, bounded, and counts what it turned away."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_free import Node, Tx, frames
from broker_free.errors import InvalidInput
from broker_free.flood import connections
from broker_free.limits import MIB, Limits
from broker_free.security import NodeKeys, load_or_create_keys
from broker_free.transport import new_keypair
from tests.hostile import STRANGERS, client, hello, random_frame, random_seed, strangers_at
from tests.nodes import PATIENCE_S, until
from tests.test_mesh import join, said, worker


def port_of(node: Node) -> int:
    return int(node.endpoints[0].rpartition(":")[2])


@given(st.lists(st.binary(max_size=200), max_size=6))
@settings(max_examples=300, deadline=None)
def test_no_frames_raise_anything_but_invalid_input(parts: list[bytes]) -> None:
    with contextlib.suppress(InvalidInput):
        frames.decode(parts, Limits())


@given(
    kind=st.integers(0, 255),
    fields=st.binary(min_size=24, max_size=24),
    meta=st.binary(max_size=60),
    body=st.binary(max_size=200),
)
@settings(max_examples=500, deadline=None)
def test_no_frame_with_a_right_head_raises_anything_but_invalid_input(
    kind: int, fields: bytes, meta: bytes, body: bytes
) -> None:
    with contextlib.suppress(InvalidInput):
        list(frames.records_of(frames.decode([b"BF\x01" + bytes((kind,)), fields, meta, body], Limits())))


async def round_trips(a: Node, to: str, *, seconds: float) -> list[float]:
    """Send one message after another and return how long each took to be on disk there, in ms."""
    times, until_s = [], time.monotonic() + seconds
    while time.monotonic() < until_s or len(times) < 20:
        began = time.monotonic()
        receipt = await a.publish("number", b"1", to=[to])
        await receipt.delivered(PATIENCE_S)
        times.append((time.monotonic() - began) * 1_000)
    return times


async def among_strangers(folder: Path, *, seconds: float) -> tuple[float, float, float, int]:
    """Attack a node process while another sends to it: (calm ms, attacked ms, MiB, attacks)."""
    seed = random_seed()
    print(f"seed {seed}")
    attacked = await worker(folder / "a", "receiver")
    try:
        about = await said(attacked)
        code = (await said(attacked))["code"]
        process = psutil.Process(attacked.pid)
        async with Node("b", home=folder / "b") as b:
            await b.join(code)
            calm = await round_trips(b, about["node_id"], seconds=seconds / 3)
            port = int(about["endpoint"].rpartition(":")[2])
            with strangers_at(port, seed=seed) as done:
                under_attack = await round_trips(b, about["node_id"], seconds=seconds)
                resident = process.memory_info().rss / MIB
            assert all(done[name] for name in STRANGERS)
        assert process.is_running()
        return statistics.median(calm), statistics.median(under_attack), resident, done.total()
    finally:
        attacked.terminate()
        await attacked.wait()


def test_mail_flows_and_memory_stays_while_strangers_attack(tmp_path: Path) -> None:
    calm, attacked, resident, attacks = asyncio.run(among_strangers(tmp_path, seconds=2))
    print(f"median {calm:.1f} ms calm, {attacked:.1f} ms attacked, {resident:.0f} MiB, {attacks} attacks")
    assert resident < 256


@pytest.mark.soak
def test_thirty_seconds_of_strangers_cost_less_than_twice_the_time(tmp_path: Path) -> None:
    calm, attacked, resident, attacks = asyncio.run(among_strangers(tmp_path, seconds=30))
    print(f"median {calm:.1f} ms calm, {attacked:.1f} ms attacked, {resident:.0f} MiB, {attacks} attacks")
    assert resident < 256
    assert attacked < 2 * calm


@contextlib.asynccontextmanager
async def with_bad_member(
    folder: Path, limits: Limits | None = None
) -> AsyncIterator[tuple[Node, Node, NodeKeys]]:
    """A node, an honest peer of it, and the keys of a member whose process has gone over to the attacker."""
    async with Node("a", home=folder / "a", limits=limits) as a, Node("b", home=folder / "b") as b:
        async with Node("m", home=folder / "m") as m:
            await join(a, b)
            await join(a, m)
        keys = load_or_create_keys(folder / "m" / "node.keys", new_keypair)
        await until(lambda: [peer.link for peer in a.peers() if peer.name == "m"] == ["closed"])
        yield a, b, keys


def as_member(a: Node, keys: NodeKeys, act: Callable[[zmq.Socket[bytes]], None]) -> threading.Thread:
    """Run the attack in a thread, with a connection of the bad member."""
    assert a._owner is not None
    port, server_key = port_of(a), a._owner.mesh.keys.public

    def attack() -> None:
        with zmq.Context() as context, client(context, port, server_key=server_key, keys=keys.current) as one:
            one.set(zmq.LINGER, 0)
            with contextlib.suppress(zmq.ZMQError):
                act(one)

    thread = threading.Thread(target=attack, daemon=True)
    thread.start()
    return thread


async def still_serves(a: Node, b: Node) -> None:
    for one, other in ((a, b), (b, a)):
        receipt = await one.publish("t.x", b"", to=[other.node_id])
        await receipt.delivered(PATIENCE_S)


def fuzz(folder: Path, *, count: int) -> None:
    async def main() -> None:
        seed = random_seed()
        print(f"seed {seed}")
        rng = random.Random(seed)
        # Many greetings: the rate at which one member may greet is another test's business.
        limits = Limits(hellos_burst=1_000_000)
        async with with_bad_member(folder, limits) as (a, b, keys):

            def act(one: zmq.Socket[bytes]) -> None:
                assert a._owner is not None
                port, server_key = port_of(a), a._owner.mesh.keys.public
                for number in range(count // 20):  # a connection that was told BYE is not heard any more
                    with zmq.Context() as context:
                        one = client(context, port, server_key=server_key, keys=keys.current)
                        one.send_multipart(hello(keys.node_id, number))
                        for _ in range(20):
                            one.send_multipart(random_frame(rng, node_id=keys.node_id, session=number))
                        one.poll(20)
                        one.close()

            attack = as_member(a, keys, act)
            while attack.is_alive():
                await still_serves(a, b)
            await still_serves(a, b)
            refused = await a.refused()
            print(refused)
            assert sum(refused.values()) > 0
            assert "internal" not in refused

    asyncio.run(asyncio.wait_for(main(), 600))


def test_a_member_that_sends_nonsense_is_counted_and_nobody_else_notices(tmp_path: Path) -> None:
    fuzz(tmp_path, count=2_000)


@pytest.mark.soak
def test_a_member_that_sends_nonsense_for_long(tmp_path: Path) -> None:
    fuzz(tmp_path, count=100_000)


def test_a_member_that_greets_without_end_is_heard_at_a_bounded_rate(tmp_path: Path) -> None:
    async def main() -> None:
        async with with_bad_member(tmp_path) as (a, b, keys):

            def act(one: zmq.Socket[bytes]) -> None:
                for session in range(500):
                    one.send_multipart(hello(keys.node_id, session))
                one.poll(500)

            attack = as_member(a, keys, act)
            while attack.is_alive():
                await still_serves(a, b)
            assert (await a.refused())["hello-rate"] > 300

    asyncio.run(asyncio.wait_for(main(), 100))


@pytest.mark.parametrize("has_greeted", [True, False])
def test_a_member_that_sends_far_more_than_is_read_is_cut_and_kept_out_for_a_while(
    tmp_path: Path, has_greeted: bool
) -> None:
    """As a message without an end does: unread bytes grow in a pipe of libzmq, where nothing else bounds them."""

    async def main() -> None:
        limits = Limits(unread_bytes_max=8 * MIB, block_ms=600_000)
        async with with_bad_member(tmp_path, limits) as (a, b, keys):
            is_connected, may_flood, is_sent = threading.Event(), threading.Event(), threading.Event()

            def act(one: zmq.Socket[bytes]) -> None:
                one.poll(20_000, zmq.POLLOUT)
                if has_greeted:
                    one.send_multipart(hello(keys.node_id, 7))
                    one.recv_multipart()
                is_connected.set()
                may_flood.wait(20)
                for _ in range(300):
                    one.send_multipart([b"BF", b"", b"", bytes(100_000)])
                is_sent.set()
                one.poll(60_000)

            def hold_up(tx: Tx) -> None:
                """Keep the owner thread from reading until enough is on the wire."""
                may_flood.set()
                is_sent.wait(20)
                assert a._owner is not None
                deadline = time.monotonic() + 20
                while unread(port_of(a)) < 20 * MIB and time.monotonic() < deadline:
                    time.sleep(0.01)
                # It looks before it reads again, and as if it had grown: here it may reuse memory that was freed.
                a._owner._resident = a._owner._memory_due_ms = 0

            as_member(a, keys, act)
            assert await asyncio.to_thread(is_connected.wait, 20)
            await a.transact(hold_up)
            async with asyncio.timeout(PATIENCE_S):
                while not (await a.refused()).get("flood"):
                    await asyncio.sleep(0.02)
            assert a._owner is not None
            assert a._owner.mesh.admit(keys.public) is None
            await still_serves(a, b)
            assert {peer.name for peer in a.peers()} == {"b", "m"}  # kept out, not removed

    asyncio.run(asyncio.wait_for(main(), 100))


def unread(port: int) -> int:
    """Return the most that any connection to a port has received."""
    return max((one.received for one in connections() if one.here[1] == port), default=0)
