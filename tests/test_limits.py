"""Every limit of a node, hit through its public door: a typed error, a counter, and everything else goes on.

Others have theirs beside what they bound: sessions, greetings, joins and invitations (`test_mesh.py`,
`test_security.py`), credit and backlog (`test_node_link.py`), the registry (`test_registry.py`), large bodies
(`test_blob.py`), the floor of free disk (`test_disk.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from broker_free import Limits, Node, Tx
from broker_free.errors import BrokerFreeError, InvalidInput, OutboxFull, PairingRefused, TooLarge
from broker_free.limits import DAY_MS, KIB, MIB
from broker_free.message import Envelope
from broker_free.storefile import looking_into
from tests.nodes import run, until

DESIGN = {
    "body_bytes_max": MIB,
    "metadata_bytes_max": 16 * KIB,
    "outbox_messages_max": 10_000,
    "outbox_bytes_max": 256 * MIB,
    "outboxes_bytes_max": 1024 * MIB,
    "ttl_ms_default": 7 * DAY_MS,
    "ttl_ms_max": 14 * DAY_MS,
    "peers_max": 1_024,
    "sessions_max": 256,
    "interest_patterns_max": 1_000,
    "deliveries_max": 10,
    "recipients_max": 1_000,
    "disk_free_bytes_min": 256 * MIB,
}


def test_the_defaults_are_those_of_the_design() -> None:
    limits = Limits()
    assert {name: getattr(limits, name) for name in DESIGN} == DESIGN


async def known_and_gone(node: Node, home: Path, *names: str) -> list[str]:
    """Make members that are not there: what is sent to them waits."""
    ids = []
    for name in names:
        async with Node(name, home=home / name) as other:
            await other.join((await node.invite()).encode())
            ids.append(other.node_id)
    await until(lambda: all(peer.link == "closed" for peer in node.peers()))
    return ids


Attempt = Callable[[Node, list[str]], Coroutine[Any, Any, object]]


async def send(node: Node, to: list[str], body: bytes = b"", **more: Any) -> object:
    return await node.publish("t.x", body, to=to, **more)


@pytest.mark.parametrize(
    ("limits", "fits", "beyond", "error"),
    [
        (
            Limits(body_bytes_max=1_000),
            lambda a, to: send(a, to, bytes(1_000)),
            lambda a, to: send(a, to, bytes(1_001)),
            TooLarge,
        ),
        (
            Limits(metadata_bytes_max=500),
            lambda a, to: send(a, to, headers={"k": "x" * 400}),
            lambda a, to: send(a, to, headers={"k": "x" * 500}),
            TooLarge,
        ),
        (
            Limits(ttl_ms_max=1_000),
            lambda a, to: send(a, to, ttl_ms=1_000),
            lambda a, to: send(a, to, ttl_ms=1_001),
            InvalidInput,
        ),
        (
            Limits(recipients_max=1),
            send,
            lambda a, to: send(a, [*to, a.node_id]),
            TooLarge,
        ),
    ],
    ids=["body", "metadata", "lifetime", "recipients"],
)
def test_one_message_beyond_a_limit_is_refused_and_the_next_goes_through(
    tmp_path: Path,
    limits: Limits,
    fits: Attempt,
    beyond: Attempt,
    error: type[BrokerFreeError],
) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a", limits=limits) as a:
            to = await known_and_gone(a, tmp_path, "b")
            await fits(a, to)
            with pytest.raises(error):
                await beyond(a, to)
            await fits(a, to)
            assert await a.read(lambda db: db.execute_sql("SELECT count(*) FROM outbox").fetchone()) == (2,)
            assert (await a.refused()).get("too-large", 0) == (1 if error is TooLarge else 0)

    run(main())


@pytest.mark.parametrize(
    "limits",
    [Limits(outbox_messages_max=3), Limits(outbox_bytes_max=3_500)],
    ids=["messages", "bytes"],
)
def test_a_full_outbox_refuses_more_for_that_peer_and_for_no_other(tmp_path: Path, limits: Limits) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a", limits=limits) as a:
            b, c = await known_and_gone(a, tmp_path, "b", "c")
            for _ in range(3):
                await send(a, [b], bytes(1_000))
            with pytest.raises(OutboxFull):
                await send(a, [b], bytes(1_000))
            with pytest.raises(OutboxFull):
                await send(a, [c, b], bytes(1_000))
            await send(a, [c], bytes(1_000))
            assert (await a.refused())["outbox-full"] == 2

    run(main())


def test_all_outboxes_together_have_a_limit_and_count_a_body_for_several_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a", limits=Limits(outboxes_bytes_max=3_500)) as a:
            b, c = await known_and_gone(a, tmp_path, "b", "c")
            await send(a, [b, c], bytes(1_000))
            await send(a, [b, c], bytes(1_000))
            await send(a, [b], bytes(1_000))
            with pytest.raises(OutboxFull, match="all peers together"):
                await send(a, [c], bytes(1_000))
            assert (await a.refused())["outbox-full"] == 1

            arrived: list[Envelope] = []
            there = Node("b", home=tmp_path / "b")
            there.effect("t.x", lambda tx, one: tx.after_commit(lambda: arrived.append(one)))
            async with there:
                await until(lambda: len(arrived) == 3)
                async with asyncio.timeout(30):
                    while True:  # the two that c waits for are what is left
                        try:
                            await send(a, [c], bytes(1_000))
                            break
                        except OutboxFull:
                            await asyncio.sleep(0.02)
            with pytest.raises(OutboxFull):
                await send(a, [c], bytes(1_000))

    run(main())


def test_patterns_beyond_the_limit_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a", limits=Limits(interest_patterns_max=2)) as a:
            async with a.subscribe("a.x", durable="one"), a.subscribe("a.y", durable="two"):
                with pytest.raises(TooLarge, match="more than 2 patterns"):
                    await a.subscribe("a.z", durable="three").__aenter__()
                async with a.subscribe("a.y", durable="four"):
                    pass
            names = await a.read(lambda db: db.execute_sql("SELECT name FROM consumer ORDER BY 1").fetchall())
            assert names == [("four",), ("one",), ("two",)]
            assert (await a.refused())["too-large"] == 1

    run(main())


def test_an_effect_that_fails_is_given_up_after_as_many_tries_as_allowed(tmp_path: Path) -> None:
    async def main() -> None:
        tries = 0

        def fail(tx: Tx, envelope: Envelope) -> None:
            nonlocal tries
            tries += 1
            raise RuntimeError("poison")

        node = Node("a", home=tmp_path / "a", limits=Limits(deliveries_max=1))
        node.effect("t.x", fail)
        async with node as a:
            await a.publish("t.x", b"", to=[a.node_id])
            await until(lambda: tries)
            assert await a.read(lambda db: db.execute_sql("SELECT state FROM inbox").fetchone()) == (3,)

    run(main())


def test_members_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a", limits=Limits(peers_max=1)) as a:
            code = (await a.invite()).encode()  # while there was room
            await known_and_gone(a, tmp_path, "b")
            with pytest.raises(BrokerFreeError, match="the most it can hold"):
                await a.invite()
            async with Node("c", home=tmp_path / "c") as c:
                with pytest.raises(PairingRefused, match="mesh is full"):
                    await c.join(code)
            assert [peer.name for peer in a.peers()] == ["b"]
        with looking_into(tmp_path / "a" / "store.db") as conn:
            assert conn.execute("SELECT kind, detail FROM event").fetchall() == [
                ("join-refused", "this mesh is full")
            ]

    run(main())
