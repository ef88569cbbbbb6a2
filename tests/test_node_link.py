"""The link between nodes as a user sees it: alarms, refusals, backpressure, withdrawal, lifetimes, versions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from broker_free import Alarm, Limits, Node
from broker_free import owner as owners
from broker_free.errors import Conflict, InvalidInput, TimedOut, UnknownMessage, UnknownPeer
from broker_free.message import new_id
from tests.nodes import collecting, pair, run, until
from tests.version1 import Tick1


def alarms_of(node: Node) -> list[Alarm]:
    raised: list[Alarm] = []
    node.on_alarm(raised.append)
    return raised


async def paired(hub: Node, home: Path) -> str:
    """Make a member of `hub` in a home of its own, and stop it again."""
    async with Node("twin", home=home) as twin:
        await pair(hub, twin)
        return twin.node_id


def test_two_nodes_on_copies_of_one_home_raise_an_alarm_everywhere_and_mail_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        quick = Limits(redial_ms_max=300, heartbeat_ms=100)  # the one that is refused tries again that soon
        hub = Node("hub", home=tmp_path / "hub", limits=quick)
        arrived = collecting(hub)
        at_hub = alarms_of(hub)
        async with hub:
            await paired(hub, tmp_path / "one")
            shutil.copytree(tmp_path / "one", tmp_path / "two")
            one = Node("one", home=tmp_path / "one", limits=quick)
            two = Node("two", home=tmp_path / "two", limits=quick)
            at_one, at_two = alarms_of(one), alarms_of(two)
            async with one, two:
                assert one.node_id == two.node_id
                await until(lambda: at_hub and at_one and at_two)
                assert {alarm.kind for alarm in (*at_hub, *at_one, *at_two)} == {"clone"}
                assert (await hub.alarms())["clone"] >= 1
                await until(lambda: [n for n in (one, two) if n.peers()[0].link == "open"])
                (linked,) = [node for node in (one, two) if node.peers()[0].link == "open"]
                receipts = [
                    await linked.publish("t.x", b"%d" % number, to=[hub.node_id]) for number in range(20)
                ]
                for receipt in receipts:
                    await receipt.delivered(20)
                await until(lambda: len(arrived) == 20)
                assert [int(envelope.body) for envelope in arrived] == list(range(20))

    run(main())


def test_an_id_used_again_for_other_content_is_dead_at_the_sender_and_an_alarm_at_both(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        b = Node("b", home=tmp_path / "b")
        arrived = collecting(b)
        at_b = alarms_of(b)
        message_id = new_id(0)
        async with b:
            async with Node("a", home=tmp_path / "a") as a:
                await pair(a, b)
                receipt = await a.publish("t.x", b"one", to=[b.node_id], message_id=message_id)
                await receipt.delivered(30)
                with pytest.raises(Conflict, match="used before"):
                    await a.publish("t.x", b"another", to=[b.node_id], message_id=message_id)
            async with Node("a", home=tmp_path / "a") as a:
                at_a = alarms_of(a)
                dead: list[tuple[str, str, str]] = []
                a.on_dead(dead.extend)
                # Its own outbox has forgotten that id, as after a day.
                await a.transact(lambda tx: a._owner._store._conn.execute("DELETE FROM outbox"))  # type: ignore[union-attr]  # it runs
                receipt = await a.publish("t.x", b"another", to=[b.node_id], message_id=message_id)
                with pytest.raises(InvalidInput, match="conflict"):
                    await receipt.delivered(30)
                await until(lambda: at_a and at_b and dead)
                assert ([one.kind for one in at_a], [one.kind for one in at_b]) == (
                    ["conflict"],
                    ["conflict"],
                )
                assert [(one, reason.split(":")[0]) for one, _, reason in dead] == [(message_id, "conflict")]
        assert [envelope.body for envelope in arrived] == [b"one"]

    run(main())


def test_a_message_larger_than_the_peer_takes_is_refused_with_the_reason_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        small = Limits(body_bytes_max=2_000, pack_messages_max=2)
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b", limits=small)
        arrived = collecting(b)
        lost: list[str] = []
        a.on_peer(lambda view: lost.append(view.link))
        async with a, b:
            await pair(a, b)
            lost.clear()
            sizes = [*[1_500] * 50, 200_000, *[1_500] * 50]
            receipts = [await a.publish("t.x", b"x" * size, to=[b.node_id]) for size in sizes]
            with pytest.raises(InvalidInput, match="too-large: a body of 200000 bytes; the peer takes 2000"):
                await receipts[50].delivered(30)
            for receipt in (*receipts[:50], *receipts[51:]):
                await receipt.delivered(30)
            await until(lambda: len(arrived) == 100)
            assert "closed" not in lost, "no session was lost by it"

    run(main())


def test_a_node_that_takes_no_messages_makes_its_peers_wait_and_nothing_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b")
        arrived = collecting(b)
        async with a, b:
            await pair(a, b)
            owner = b._owner
            assert owner is not None
            await owner.ask(lambda: owner.hold("low disk"))
            await until(lambda: a.peers()[0].is_blocked)
            receipts = [await a.publish("t.x", b"%d" % number, to=[b.node_id]) for number in range(300)]
            with pytest.raises(TimedOut):
                await receipts[0].delivered(0.1)
            assert arrived == []
            assert a.peers()[0].link == "open"
            await owner.ask(lambda: owner.release("low disk"))
            await receipts[-1].delivered(20)
            await until(lambda: len(arrived) == 300 and not a.peers()[0].is_blocked)
            assert [int(envelope.body) for envelope in arrived] == list(range(300))

    run(main())


def test_a_consumer_that_lags_stops_the_sender_and_lets_it_go_on_when_it_has_worked(tmp_path: Path) -> None:
    async def main() -> None:
        few = Limits(backlog_messages_max=10, credit_messages=5)
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b", limits=few)
        async with a, b, b.subscribe("work.*", durable="w") as jobs:
            await pair(a, b)
            for number in range(40):
                await a.publish("work.do", b"%d" % number, to=[b.node_id])
            await until(lambda: a.peers()[0].is_blocked)
            assert b._owner is not None
            assert b._owner._store.backlog < 40, "the rest waits at the sender"
            seen = []
            for _ in range(40):
                job = await anext(jobs)
                seen.append(int(job.body))
                await job.ack()
            assert seen == list(range(40))

    run(main())


@pytest.mark.parametrize("old", ["a", "b"])
def test_a_node_of_the_version_before_exchanges_mail_both_ways(
    tmp_path: Path, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b")
        at_a, at_b = collecting(a), collecting(b)

        async def start(node: Node) -> None:
            with monkeypatch.context() as patch:
                if node.name == old:
                    patch.setattr(owners, "Tick", Tick1)
                await node.start()

        await start(a)
        await start(b)
        try:
            await pair(a, b)
            there = [await a.publish("t.x", b"%d" % n, to=[b.node_id], ttl_ms=60_000) for n in range(300)]
            back = [await b.publish("t.x", b"%d" % n, to=[a.node_id]) for n in range(300)]
            for receipt in (there[-1], back[-1]):
                await receipt.delivered(20)
            await until(lambda: len(at_a) == len(at_b) == 300)
            assert [int(e.body) for e in at_a] == [int(e.body) for e in at_b] == list(range(300))
            for node in (a, b):
                link = next(iter(node._owner._tick.links.values()))  # type: ignore[union-attr]  # it runs
                assert link.version == 1
        finally:
            await a.close()
            await b.close()

    run(main())


def test_a_node_of_a_strange_version_is_an_alarm_and_no_endless_dialling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later major version cannot be read at all: its greeting is answered in its own version, by a BYE."""

    async def main() -> None:
        quick = Limits(heartbeat_ms=50)
        a = Node("a", home=tmp_path / "a", limits=quick)
        at_a = alarms_of(a)
        async with a:
            async with Node("b", home=tmp_path / "b", limits=quick) as b:
                await pair(a, b)
            send = owners.Owner.send

            def later(self: owners.Owner, conn: int, frame: owners.Frame) -> bool:
                if self._node.name == "b":
                    frame = replace(frame, version=7)
                return send(self, conn, frame)

            monkeypatch.setattr(owners.Owner, "send", later)
            b = Node("b", home=tmp_path / "b", limits=quick)
            at_b = alarms_of(b)
            async with b:
                await until(lambda: at_a and at_b)
                assert {(alarm.kind, alarm.peer) for alarm in at_a} == {("version", b.node_id)}
                assert {(alarm.kind, alarm.peer) for alarm in at_b} == {("version", a.node_id)}
                assert "protocol version 7; this node speaks 1 to 2" in at_a[0].detail
                assert (await a.refused())["frame-version"] <= 3

    run(main())


def pass_time(node: Node, ms: int) -> None:
    """Let so much time go by for a node's lifetimes, at once."""
    owner = node._owner
    assert owner is not None
    owner._steady.offset_ms += ms
    owner._transport.wake()


def test_a_lifetime_counts_down_in_the_outbox_and_goes_on_in_the_inbox(tmp_path: Path) -> None:
    async def main() -> None:
        a = Node("a", home=tmp_path / "a")
        dead: list[tuple[str, str, str]] = []
        a.on_dead(dead.extend)
        async with a:
            async with Node("b", home=tmp_path / "b") as b:
                await pair(a, b)
                peer, listen = b.node_id, b.endpoints[0]
            short = await a.publish("work.do", b"short", to=[peer], ttl_ms=60_000)
            await a.publish("work.do", b"long", to=[peer], ttl_ms=600_000)
            await a.publish("work.do", b"for ever", to=[peer])
            pass_time(a, 60_000)
            await until(lambda: dead)
            assert dead == [(short.id, peer, "expired")]
            async with (
                Node("b", home=tmp_path / "b", listen=listen) as b,
                b.subscribe("work.*", durable="w") as jobs,
            ):
                job = await anext(jobs)
                assert job.body == b"long"
                left = await b.read(
                    lambda db: db.execute_sql(
                        "SELECT l.expires_ms - i.arrived_ms FROM lifetime l JOIN inbox i USING (row)"
                    ).fetchall()
                )
                assert 400_000 < left[0][0] <= 540_000, "what remained when it left, not what it began with"
                await job.nak()
                pass_time(b, 540_000)
                job = await anext(jobs)
                assert job.body == b"for ever", "the other one is not handed out any more"
                await job.ack()
                await until(lambda: b._owner._store.backlog == 0)  # type: ignore[union-attr]  # it runs

    run(main())


def test_a_jump_of_utc_changes_no_lifetime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        real = owners.utc_ms
        month_ms = 30 * 86_400_000
        async with Node("a", home=tmp_path / "a") as a:
            async with Node("b", home=tmp_path / "b") as b:
                await pair(a, b)
                peer, listen = b.node_id, b.endpoints[0]
            await a.publish("t.x", b"", to=[peer], ttl_ms=60_000)
            owner = a._owner
            assert owner is not None
            for jump_ms in (month_ms, -month_ms):
                monkeypatch.setattr(owners, "utc_ms", lambda jump_ms=jump_ms: real() + jump_ms)
                anchor = None
                while anchor is None or abs(anchor.ahead_ms - jump_ms) > 60_000:  # written by house-keeping
                    owner._housekeeping_due_ms = 0
                    await a.transact(lambda tx: None)
                    anchor = await owner.ask(owner._store.anchor)
        monkeypatch.setattr(owners, "utc_ms", lambda: real() + month_ms)
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b", listen=listen)
        arrived = collecting(b)
        async with a, b:
            await until(lambda: arrived)
            (envelope,) = arrived
            assert envelope.ttl_ms is not None
            assert 0 < envelope.ttl_ms <= 60_000

    run(main())


def test_a_message_is_withdrawn_from_whoever_does_not_hold_it_and_never_half(tmp_path: Path) -> None:
    async def main() -> None:
        a, b, c = (Node(name, home=tmp_path / name) for name in "abc")
        at_b = collecting(b)
        dead: list[tuple[str, str, str]] = []
        a.on_dead(dead.extend)
        async with a, b:
            async with c:
                await pair(a, b)
                await pair(a, c)
                offline, listen = c.node_id, c.endpoints[0]
            both = await a.publish("t.x", b"both", to=[b.node_id, offline])
            await until(lambda: at_b)
            states = (await a.cancel(both.id, timeout=0.2)).states
            assert states == {b.node_id: "delivered", offline: "cancelled"}
            with pytest.raises(InvalidInput, match="cancelled"):
                await both.delivered(30)
            assert dead == [(both.id, offline, "cancelled")]
            with pytest.raises(UnknownMessage):
                await a.cancel(new_id(0))

            own_id = new_id(1)
            await a.publish("t.x", b"in doubt", to=[offline], message_id=own_id)
            later = await a.cancel(own_id, timeout=0.1)
            assert (later.pending, later.cancelled) == ((offline,), ())
        again = Node("a", home=tmp_path / "a")
        again.on_dead(dead.extend)
        c = Node("c", home=tmp_path / "c", listen=listen)
        at_c = collecting(c)
        async with again, c:
            await until(lambda: (own_id, offline, "cancelled") in dead)
            last = await again.publish("t.x", b"last", to=[offline])
            await last.delivered(30)
            await until(lambda: at_c)
            assert [envelope.body for envelope in at_c] == [b"last"]
            assert (await again.cancel(last.id)).held == (offline,)

    run(main())


def test_what_is_sent_without_being_stored_reaches_who_is_connected_and_listens(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b")
        heard: list[bytes] = []
        stop = b.on("news.*", lambda envelope: heard.append(envelope.body))
        async with a:
            async with b:
                await pair(a, b)
                peer = b.node_id
                while not await a.send("news.first", b"1"):
                    pass
                await until(lambda: heard)
                assert await a.send("other.subject", b"2") == ()
                assert await a.send("news.large", b"x" * 500_000, to=[peer]) == (peer,)
                await until(lambda: len(heard[-1]) == 500_000)
                stop()
                while await a.send("news.last", b"3"):
                    pass
                rows = await b.read(lambda db: db.execute_sql("SELECT count(*) FROM inbox").fetchall())
                assert rows == [(0,)]
            await until(lambda: a.peers()[0].link == "closed")
            assert await a.send("news.x", b"4", to=[peer]) == ()
            with pytest.raises(UnknownPeer):
                await a.send("news.x", b"5", to=["somebody"])

    run(main())


def test_a_receipt_tells_that_a_consumer_is_done_also_after_both_were_started_again(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b")
        async with b:
            async with a, b.subscribe("work.*", durable="w") as jobs:
                await pair(a, b)
                first = await a.publish("work.do", b"1", to=[b.node_id], receipt=True)
                second = await a.publish("work.do", b"2", to=[b.node_id], receipt=True)
                job = await anext(jobs)
                with pytest.raises(TimedOut):
                    await first.done(0.05)
                await job.ack()
                await first.done(10)
                listen = a.endpoints[0]
                await second.delivered(30)
            async with b.subscribe("work.*", durable="w") as jobs:
                await (await anext(jobs)).ack()  # its sender is away
        told: list[tuple[str, str, str]] = []
        a, b = Node("a", home=tmp_path / "a", listen=listen), Node("b", home=tmp_path / "b")
        a.on_receipt(told.extend)
        async with a, b:
            await until(lambda: told)
            assert told == [(second.id, b.node_id, "done")]

    run(main())


def test_what_a_caller_gets_wrong_does_not_end_the_node(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            with pytest.raises(TypeError):
                await a.send("news.x", b"1", to=[["not", "a", "name"]])  # type: ignore[list-item]  # what is tested
            await a.publish("news.x", b"2")

    run(main())
