"""The registry between real nodes: two that cannot reach each other, behind a third that comes and goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker_free import Limits, Node
from broker_free.errors import NotOwner
from broker_free.registry import Entry
from tests.nodes import pair, run, until

NOWHERE = "127.0.0.1:9"  # where nobody listens: such a node can only dial out
LIMITS = Limits(redial_ms_max=500, registry_sync_ms=1_000)


def node(name: str, home: Path, **more: Any) -> Node:
    return Node(name, home=home / name, limits=LIMITS, **more)


def contents(*nodes: Node) -> list[list[Entry]]:
    return [[*one.registry("team").entries(), *one.registry("own.at").entries()] for one in nodes]


def are_alike(*nodes: Node) -> bool:
    first, *others = contents(*nodes)
    return all(each == first for each in others)


def are_linked(one: Node, other: Node) -> bool:
    return any(peer.node_id == other.node_id and peer.link == "open" for peer in one.peers())


def test_two_nodes_without_a_link_converge_through_a_third_that_comes_and_goes(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            node("a", tmp_path, advertise=(NOWHERE,)) as a,
            node("c", tmp_path, advertise=(NOWHERE,)) as c,
        ):
            async with node("b", tmp_path) as b:
                at = b.endpoints[0]
                await pair(b, a)
                await c.join((await b.invite()).encode())
                await a.registry("team").put("lead", {"name": "a"})
                await until(lambda: c.registry("team").get("lead"))
                await c.registry("own.at").put(f"{c.node_id}.desk", {"room": 7})
                await until(lambda: are_alike(a, b, c))
            # Parted: each goes on by itself, on the same keys and on others.
            await a.registry("team").put("lead", {"name": "a again"})
            await a.registry("team").put("only-a", {"n": 1})
            await c.registry("team").put("lead", {"name": "c"})
            for number in range(300):
                await c.registry("team").put(f"only-c.{number % 150}", {"n": number})
            await c.registry("own.at").delete(f"{c.node_id}.desk")
            assert not are_alike(a, c)
            async with node("b", tmp_path, listen=at) as b:
                changes = b.registry("team").watch("lead")
                assert (await anext(changes)).value == {"name": "a"}
                await until(lambda: are_alike(a, b, c))
                assert (await anext(changes)).value in ({"name": "a again"}, {"name": "c"})
                assert not are_linked(a, c)
                assert a.registry("team").get("lead") == {"name": "c"}  # written last
                assert len(a.registry("team").keys("only-c.*")) == 150
                assert a.registry("own.at").entries() == []
                assert c.registry("team").get("only-a") == {"n": 1}

    run(main())


def test_nobody_writes_where_another_node_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a, node("b", tmp_path) as b:
            await pair(a, b)
            await b.registry("own.at").put(f"{b.node_id}.desk", {"room": 1})
            await until(lambda: a.registry("own.at").get(f"{b.node_id}.desk"))
            with pytest.raises(NotOwner, match="belongs to node"):
                await a.registry("own.at").put(f"{b.node_id}.desk", {"room": 2})
            with pytest.raises(NotOwner):
                await a.registry("own.at").delete(f"{b.node_id}.desk")
            assert await a.registry("own.at").put(f"{a.node_id}.desk", {"room": 3})
            await until(lambda: are_alike(a, b))
            assert abs(a.peers()[0].skew_ms or 0) < 5_000

    run(main())


def test_a_registry_of_ten_thousand_reaches_a_new_member_while_mail_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a, node("b", tmp_path) as b:
            arrived: list[str] = []
            for begin in range(0, 10_000, 2_500):

                def write(tx: Any, begin: int = begin) -> None:
                    for number in range(begin, begin + 2_500):
                        tx.registry_put("big", f"k{number}", {"state": "online", "n": number})

                await a.transact(write)
            await b.join((await a.invite()).encode())
            while len(b.registry("big").keys()) < 10_000:
                receipt = await a.publish("mail.x", b"brief", to=[b.node_id])
                await receipt.delivered(timeout=30)
                arrived.append(receipt.id)
            assert len(arrived) > 3
            await until(lambda: a.registry("big").entries() == b.registry("big").entries())

    run(main())
