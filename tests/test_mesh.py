"""Who belongs to a mesh of real nodes: joining, removal, another key. Each node edits only itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from broker_free import Node
from broker_free.errors import InvalidInput, MeshFull, PairingRefused, TooLarge, UnknownPeer
from broker_free.limits import Limits
from broker_free.mesh import Mesh
from broker_free.security import NodeKeys, load_or_create_keys
from broker_free.transport import new_keypair
from tests.nodes import PATIENCE_S, ROOT, collecting, run, until
from tests.nodes import pair as paired


async def join(inviting: Node, joining: Node) -> None:
    await joining.join((await inviting.invite()).encode())


def knows(node: Node, *others: Node) -> bool:
    opened = {peer.node_id for peer in node.peers() if peer.link == "open"}
    return {other.node_id for other in others} <= opened


async def all_linked(nodes: Iterable[Node]) -> None:
    every = list(nodes)
    await until(lambda: all(knows(one, *(other for other in every if other is not one)) for one in every))


def names(node: Node) -> set[str]:
    return {peer.name for peer in node.peers()}


@contextlib.asynccontextmanager
async def mesh(folder: Path, *letters: str, limits: Limits | None = None) -> AsyncIterator[list[Node]]:
    """Nodes that have joined one after another, each at the first, and are all linked."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = [Node(one, home=folder / one, limits=limits) for one in letters]
        for node in nodes:
            await stack.enter_async_context(node)
        for node in nodes[1:]:
            await join(nodes[0], node)
        await all_linked(nodes)
        yield nodes


# -- joining --------------------------------------------------------------------------------------------------


def test_a_tenth_node_joins_once_and_all_ten_write_to_each_other(tmp_path: Path) -> None:
    async def main() -> None:
        first = "abcdefghi"
        arrived: dict[str, list[str]] = {one: [] for one in [*first, "j"]}
        async with contextlib.AsyncExitStack() as stack:
            nodes = [Node(one, home=tmp_path / one) for one in [*first, "j"]]
            for node in nodes:
                node.effect(
                    "t.x",
                    lambda tx, envelope, to=node.name: arrived[to].append(envelope.body.decode()),  # type: ignore[misc]
                )
                await stack.enter_async_context(node)
            for before, node in pairwise(nodes[:-1]):  # a chain: nobody introduces everybody
                await join(before, node)
            await all_linked(nodes[:-1])
            tenth = nodes[-1]
            began = time.monotonic()
            await join(nodes[4], tenth)
            await until(lambda: knows(tenth, *nodes[:-1]) and all(knows(node, tenth) for node in nodes[:-1]))
            print(f"ten nodes linked {time.monotonic() - began:.2f} s after one join")
            receipts = [await tenth.publish("t.x", b"j", to=[node.node_id for node in nodes[:-1]])]
            receipts += [
                await node.publish("t.x", node.name.encode(), to=[tenth.node_id]) for node in nodes[:-1]
            ]
            for receipt in receipts:
                await receipt.delivered(PATIENCE_S)
            assert sorted(arrived["j"]) == sorted(first)
            assert all(arrived[one] == ["j"] for one in first)
            by = {peer.name: peer.introduced_by for peer in nodes[0].peers()}
            assert (by["j"], by["c"]) == (nodes[4].node_id, nodes[1].node_id)

    run(main())


def test_two_meshes_become_one_by_one_join(tmp_path: Path) -> None:
    async def main() -> None:
        async with mesh(tmp_path, "a", "b") as left, mesh(tmp_path, "c", "d") as right:
            await join(left[1], right[1])
            await all_linked([*left, *right])

    run(main())


def test_a_member_is_pending_until_somebody_has_met_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            await join(a, b)
            await until(lambda: a.peers()[0].link == "open" and not a.peers()[0].is_pending)
            owner = a._owner
            assert owner is not None
            stranger = owner.mesh.members[b.node_id]
            keys = NodeKeys(current=new_keypair())
            absent = replace(
                stranger, node_id=keys.node_id, public_key=keys.public, name="absent", endpoints=()
            )
            await a.transact(owner.mesh.introduce, absent)
            await until(lambda: names(b) == {"a", "absent"})
            assert {peer.name: peer.is_pending for peer in b.peers()} == {"a": False, "absent": True}

    run(main())


@pytest.mark.parametrize("point", ["member-admitted", "member-saved"])
def test_an_inviter_killed_around_its_answer_costs_nothing(tmp_path: Path, point: str) -> None:
    async def main() -> None:
        inviter = await worker(tmp_path / "a", "receiver", fault=f"{point}:kill")
        hello = await said(inviter)
        code = (await said(inviter))["code"]
        async with Node("b", home=tmp_path / "b") as b:
            joining = asyncio.ensure_future(b.join(code))
            assert await inviter.wait() == -signal.SIGKILL
            inviter = await worker(tmp_path / "a", "again", listen=hello["endpoint"])
            try:
                joined = await joining
                assert joined.node_id == hello["node_id"]
                await until(lambda: [peer.link for peer in b.peers()] == ["open"])
                receipt = await b.publish("number", b"1", to=[joined.node_id])
                await receipt.delivered(PATIENCE_S)
            finally:
                inviter.terminate()
                await inviter.wait()

    run(main())


@pytest.mark.parametrize("point", ["join-sent:kill+300", "inviter-saved:kill"])
def test_a_joiner_killed_before_it_took_the_answer_in_is_a_member_when_it_is_back(
    tmp_path: Path, point: str
) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            code = (await a.invite()).encode()
            joiner = await worker(tmp_path / "b", "join", code, fault=point)
            assert await joiner.wait() == -signal.SIGKILL
            await until(a.peers)
            joiner = await worker(tmp_path / "b", "again")
            try:
                await until(lambda: [peer.link for peer in a.peers()] == ["open"])
                receipt = await a.publish("number", b"1", to=[a.peers()[0].node_id])
                await receipt.delivered(PATIENCE_S)
            finally:
                joiner.terminate()
                await joiner.wait()

    run(main())


def test_the_same_code_again_on_the_node_that_used_it_is_answered_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            code = (await a.invite()).encode()
            assert (await b.join(code)).name == (await b.join(code)).name == "a"

    run(main())


# -- invitations ----------------------------------------------------------------------------------------------


def test_a_one_time_key_hears_no_beats_and_says_nothing_but_join(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            owner = a._owner
            assert owner is not None
            await a.invite()
            (key,) = owner.pairing._invited
            assert owner._admit(key) is not None
            assert owner.mesh.admit(key) is None  # what the PUB socket asks

    run(main())


def test_limits_of_invitations_and_members_are_typed_errors(tmp_path: Path) -> None:
    async def main() -> None:
        limits = Limits(invitations_max=2, peers_max=1)
        async with (
            Node("a", home=tmp_path / "a", limits=limits) as a,
            Node("b", home=tmp_path / "b") as b,
            Node("c", home=tmp_path / "c") as c,
        ):
            first, second = [(await a.invite()).encode() for _ in range(2)]
            with pytest.raises(TooLarge, match="2 invitations"):
                await a.invite()
            await b.join(first)
            with pytest.raises(PairingRefused, match="full"):
                await c.join(second)
            with pytest.raises(MeshFull, match="1 other nodes"):
                await a.invite()
            assert (await a.refused())["mesh-full"] == 1
            assert names(a) == {"b"}

    run(main())


def test_tries_with_one_code_are_bounded_and_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            Node("a", home=tmp_path / "a", limits=Limits(joins_of_a_key_max=1)) as a,
            Node("b", home=tmp_path / "b") as b,
        ):
            code = (await a.invite()).encode()
            b.name = "not\nprintable"
            assert b._owner is not None
            b._owner.mesh.name = "not\nprintable"
            with pytest.raises(PairingRefused, match="malformed"):
                await b.join(code)
            b._owner.mesh.name = "b"
            with pytest.raises(PairingRefused, match="too often"):
                await b.join(code)
            with pytest.raises(PairingRefused, match="refused this code"):
                await b.join(code)  # such a code is void
            refused = await a.refused()
            assert (refused["join-malformed"], refused["join-rate"]) == (1, 1)
            assert a.peers() == []

    run(main())


@pytest.mark.parametrize("whose", ["a member's", "the inviter's"])
def test_nobody_joins_under_the_key_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    async def main() -> None:
        async with mesh(tmp_path, "a", "b") as (a, b), Node("m", home=tmp_path / "m") as m:
            assert a._owner is not None
            assert b._owner is not None
            assert m._owner is not None
            of_b, of_m = b._owner.mesh.keys.public.decode(), m._owner.mesh.keys.public.decode()
            stolen = of_b if whose == "a member's" else a._owner.mesh.keys.public.decode()
            code = (await a.invite()).encode()
            monkeypatch.setattr(
                "broker_free.pairing.keys_of", lambda member: {"key": stolen, "first_key": of_m}
            )
            with pytest.raises(PairingRefused, match="belongs to another"):
                await m.join(code)
            assert a._owner.mesh.admit(of_b.encode()) == b.node_id
            assert names(a) == {"b"}

    run(main())


# -- removal --------------------------------------------------------------------------------------------------


def test_a_removed_node_is_out_everywhere_its_mail_is_dead_and_the_others_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with mesh(tmp_path, "a", "b", "c", "d") as (a, b, c, d):
            dead: list[tuple[str, str, str]] = []
            c.on_dead(dead.extend)
            home, gone = d.home, d.node_id
            assert await a.remove_peer(gone) == "d"
            began = time.monotonic()
            await until(lambda: all("d" not in names(node) for node in (a, b, c)))
            print(f"removed everywhere after {time.monotonic() - began:.3f} s")
            await until(lambda: d.removed_by == a.node_id)
            with pytest.raises(UnknownPeer):
                await b.publish("t.x", b"", to=[gone])
            await all_linked([a, b, c])
            receipt = await b.publish("t.x", b"", to=[a.node_id, c.node_id])
            await receipt.delivered(PATIENCE_S)
            # It cannot come back by itself, not even as another process on the same home.
            await d.close()
            async with Node("d", home=home) as again:
                assert again.removed_by == a.node_id
                before = (await b.refused()).get("unknown-key", 0)
                owner = again._owner
                assert owner is not None
                await owner.ask(lambda: dial_anyway(owner.mesh, b.node_id))
                async with asyncio.timeout(PATIENCE_S):
                    while (await b.refused()).get("unknown-key", 0) <= before:
                        await asyncio.sleep(0.02)
                assert "d" not in names(b)

    run(main())


def test_mail_that_waits_for_a_removed_node_is_dead_with_a_reason_and_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            dead: list[tuple[str, str, str]] = []
            a.on_dead(dead.extend)
            async with Node("b", home=tmp_path / "b") as b:
                await paired(a, b)
            await until(lambda: a.peers()[0].link == "closed")
            receipts = [await a.publish("t.x", b"", to=[b.node_id]) for _ in range(3)]
            await a.remove_peer(b.node_id)
            with pytest.raises(InvalidInput, match="b was removed from the mesh by a"):
                await receipts[-1].delivered(PATIENCE_S)
            assert [(message_id, peer) for message_id, peer, _ in dead] == [
                (receipt.id, b.node_id) for receipt in receipts
            ]
            kept = await a.read(
                lambda db: db.execute_sql(
                    "SELECT count(*), min(reason) FROM outbox WHERE state = 4"
                ).fetchone()
            )
            assert kept == (3, "b was removed from the mesh by a")

    run(main())


def test_nothing_accepted_is_lost_when_the_others_connections_are_cut_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        arrived: list[int] = []
        a = Node("a", home=tmp_path / "a")
        a.effect("t.n", lambda tx, envelope: arrived.append(int(envelope.body)))
        async with a, Node("b", home=tmp_path / "b") as b, Node("c", home=tmp_path / "c") as c:
            await join(a, b)
            await join(a, c)
            await all_linked([a, b, c])
            receipts = []
            for number in range(300):
                receipts.append(await b.publish("t.n", str(number).encode(), to=[a.node_id]))
                if number == 100:
                    await a.remove_peer(c.node_id)
            for receipt in receipts:
                await receipt.delivered(PATIENCE_S)
            assert arrived == list(range(300))

    run(main())


def test_a_node_that_was_away_at_the_removal_hears_of_it_at_its_first_contact(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            async with Node("b", home=tmp_path / "b") as b, Node("c", home=tmp_path / "c") as c:
                await join(a, b)
                await join(a, c)
                await all_linked([a, b, c])
                endpoint, removed = b.endpoints[0], c.node_id
            await a.remove_peer(removed)  # neither of the two is there
            async with (
                Node("c", home=tmp_path / "c") as c,
                Node("b", home=tmp_path / "b", listen=endpoint) as b,
            ):
                # c may reach b before b hears of it; either way both end where a is.
                await until(lambda: names(b) == {"a"})
                await until(
                    lambda: [peer.why_closed for peer in c.peers() if peer.name == "a"] == ["refused"]
                )
                assert names(a) == {"b"}

    run(main())


def test_a_node_may_leave_and_come_back_by_a_new_code(tmp_path: Path) -> None:
    async def main() -> None:
        async with mesh(tmp_path, "a", "b", "c") as (a, b, c):
            await c.remove_peer(c.node_id)
            await until(lambda: names(a) == {"b"} and names(b) == {"a"})
            assert c.removed_by == c.node_id
            await join(b, c)
            await all_linked([a, b, c])
            assert c.removed_by is None

    run(main())


def test_allowed_removed_and_allowed_again_five_times(tmp_path: Path) -> None:
    async def main() -> None:
        async with mesh(tmp_path, "a", "b", "c") as (a, b, c):
            arrived: list[int] = []
            for number in range(5):
                began = time.monotonic()
                await a.remove_peer(c.node_id)
                await until(lambda: "c" not in names(a) and "c" not in names(b))
                out = time.monotonic()
                await join(b, c)
                await all_linked([a, b, c])
                receipt = await a.publish("t.x", str(number).encode(), to=[c.node_id])
                await receipt.delivered(PATIENCE_S)
                arrived.append(number)
                print(f"removed after {out - began:.3f} s, in again after {time.monotonic() - out:.3f} s")
            assert arrived == [0, 1, 2, 3, 4]

    run(main())


def test_a_removal_that_a_crash_cut_short_is_finished_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            async with Node("b", home=tmp_path / "b") as b:
                await join(a, b)
            waiting = await a.publish("t.x", b"", to=[b.node_id])
            with monkeypatch.context() as patched:
                patched.setattr(Mesh, "_bury", lambda *_: None)
                await a.remove_peer(b.node_id)
                await until(lambda: not a.peers())
        a = Node("a", home=tmp_path / "a")
        dead: list[tuple[str, str, str]] = []
        a.on_dead(dead.extend)
        async with a:
            await until(lambda: dead)
            assert dead == [(waiting.id, b.node_id, "b was removed from the mesh")]
            assert a.peers() == []

    run(main())


def test_nobody_is_removed_who_is_no_member(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            with pytest.raises(UnknownPeer, match="nobody"):
                await a.remove_peer("nobody")

    run(main())


# -- another key ----------------------------------------------------------------------------------------------


def test_a_key_is_changed_while_one_member_is_away_and_no_mail_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        a, b, c = (Node(one, home=tmp_path / one) for one in "abc")
        at_a, at_b = collecting(a), collecting(b)
        async with a, b:
            async with c:
                await join(a, b)
                await join(a, c)
                await all_linked([a, b, c])
                at = c.endpoints[0]
            await until(lambda: [peer.link for peer in a.peers() if peer.name == "c"] == ["closed"])
            waiting = await a.publish("t.x", b"for c", to=[c.node_id])
            old = load_or_create_keys(a.home / "node.keys", new_keypair)
            assert await a.rotate_key() == ([b.node_id], [c.node_id])
            new = load_or_create_keys(a.home / "node.keys", new_keypair)
            assert new.public != old.public
            assert (new.node_id, new.former) == (old.node_id, old.current)
            await until(lambda: knows(a, b) and knows(b, a))
            await (await b.publish("t.x", b"to a", to=[a.node_id])).delivered(PATIENCE_S)
            await (await a.publish("t.x", b"to b", to=[b.node_id])).delivered(PATIENCE_S)
            with pytest.raises(InvalidInput, match="has not reached c"):
                await a.rotate_key()
            c = Node("c", home=tmp_path / "c", listen=at)
            at_c = collecting(c)
            async with c:
                await waiting.delivered(PATIENCE_S)
                await all_linked([a, b, c])
                await until(lambda: load_or_create_keys(a.home / "node.keys", new_keypair).former is None)
                assert [one.body for one in at_c] == [b"for c"]
                # The former key opens no door any more, and a newcomer learns the present one.
                for node in (b, c):
                    assert node._owner is not None
                    assert node._owner.mesh.admit(old.public) is None
                async with Node("d", home=tmp_path / "d") as d:
                    await join(c, d)
                    await all_linked([a, b, c, d])
        assert [one.body for one in at_a] == [b"to a"]
        assert [one.body for one in at_b] == [b"to b"]
        assert {one.sender for one in at_b} == {a.node_id}

    run(main())


def test_a_node_killed_in_the_middle_of_a_change_goes_on_with_the_new_key(tmp_path: Path) -> None:
    async def main() -> None:
        changing = await worker(tmp_path / "a", "rotate", fault="keys-replaced:kill")
        hello = await said(changing)
        code = (await said(changing))["code"]
        async with Node("b", home=tmp_path / "b") as b:
            await b.join(code)
            assert changing.stdin is not None
            changing.stdin.write(b"rotate\n")
            assert await changing.wait() == -signal.SIGKILL
            changing = await worker(tmp_path / "a", "again", listen=hello["endpoint"])
            try:
                assert (await said(changing))["node_id"] == hello["node_id"]
                receipt = await b.publish("number", b"1", to=[hello["node_id"]])
                await receipt.delivered(PATIENCE_S)
            finally:
                changing.terminate()
                await changing.wait()

    run(main())


def test_open_invitations_are_void_after_a_change_of_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            await a.invite()
            assert await a.rotate_key() == ([], [])
            assert a._owner is not None
            await until(lambda: a._owner is not None and not a._owner.pairing._invited)

    run(main())


# -- helpers --------------------------------------------------------------------------------------------------


def dial_anyway(mesh_: Mesh, peer: str) -> None:
    """Dial as a node would that does not care about its removal."""
    member = mesh_.members[peer]
    mesh_.transport.dial(member.endpoints[0], server_key=member.public_key)


async def worker(
    home: Path,
    command: str,
    *args: str,
    fault: str = "",
    listen: str = "tcp://127.0.0.1:0",
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.node_worker",
        str(home),
        command,
        *args,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "BROKER_FREE_FAULT": fault, "LISTEN": listen},
        cwd=ROOT,
    )


async def said(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stdout is not None
    line: dict[str, str] = json.loads(await process.stdout.readline())
    return line
