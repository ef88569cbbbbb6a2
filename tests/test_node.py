"""broker_free's promises through its public door: real sockets, real files, real killed processes."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker_free import Node, Tx, faults
from broker_free.errors import (
    AddressInUse,
    InvalidInput,
    NodeClosed,
    NodeInUse,
    PairingRefused,
    StoreBroken,
    TimedOut,
    UnknownPeer,
    UnsuitableHome,
)
from broker_free.limits import Limits
from broker_free.message import new_id
from tests.nodes import PATIENCE_S, Worker, collecting, pair, run, until


def test_an_invitation_makes_both_sides_each_others_peers(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            joined = await b.join((await a.invite()).encode())
            assert (joined.name, joined.state, joined.link) == ("a", "alive", "open")
            await until(lambda: all(peer.link == "open" for peer in a.peers()))
            assert [(p.name, p.node_id, p.state) for p in a.peers()] == [("b", b.node_id, "alive")]
            assert [(p.name, p.node_id, p.state) for p in b.peers()] == [("a", a.node_id, "alive")]

    run(main())


def test_both_sides_of_a_pairing_hear_each_others_beats(tmp_path: Path) -> None:
    limits = Limits(heartbeat_ms=100, suspect_after_ms=1_500, down_after_ms=3_000)

    async def main() -> None:
        async with (
            Node("a", home=tmp_path / "a", limits=limits) as a,
            Node("b", home=tmp_path / "b", limits=limits) as b,
        ):
            heard = {node.name: asyncio.Event() for node in (a, b)}
            for node in (a, b):
                take_in = node._running()._watch.on_beat
                node._running()._watch.on_beat = (  # type: ignore[method-assign]  # there is no public sign of one beat
                    lambda parts, now_ms, node=node, take_in=take_in: (
                        node._running()._loop.call_soon_threadsafe(heard[node.name].set),
                        take_in(parts, now_ms),
                    )
                )
            await pair(a, b)
            for event in heard.values():
                await asyncio.wait_for(event.wait(), PATIENCE_S)

    run(main())


def test_an_invitation_works_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            Node("a", home=tmp_path / "a") as a,
            Node("b", home=tmp_path / "b") as b,
            Node("c", home=tmp_path / "c") as c,
        ):
            code = (await a.invite()).encode()
            await b.join(code)
            with pytest.raises(PairingRefused, match="refused this code"):
                await c.join(code)
            assert [p.name for p in a.peers()] == ["b"]
            assert c.peers() == []

    run(main())


def test_an_expired_invitation_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            code = (await a.invite(ttl_ms=1)).encode()
            await asyncio.sleep(0.01)  # the one thing waited for is time itself
            with pytest.raises(PairingRefused, match="expired"):
                await b.join(code)
            assert (a.peers(), b.peers()) == ([], [])

    run(main())


def test_the_inviter_refuses_an_expired_code_whatever_the_code_itself_says(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            invitation = await a.invite(ttl_ms=1)
            forged = replace(invitation, expires_ms=invitation.expires_ms + 3_600_000)
            await asyncio.sleep(0.01)  # the one thing waited for is time itself
            with pytest.raises(PairingRefused, match="refused this code"):
                await b.join(forged.encode())
            assert (a.peers(), b.peers()) == ([], [])

    run(main())


def test_a_code_that_was_mistyped_or_is_ones_own_is_refused_before_anything_is_dialled(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            code = (await a.invite()).encode()
            with pytest.raises(PairingRefused, match="this very node"):
                await a.join(code)
            with pytest.raises(InvalidInput):
                await a.join(code[:-3] + "AAA")

    run(main())


def test_delivered_means_on_disk_at_the_peer_and_not_before(tmp_path: Path) -> None:
    async def main() -> None:
        a, b = Node("a", home=tmp_path / "a"), Node("b", home=tmp_path / "b")
        arrived = collecting(b)
        async with a, b:
            await pair(a, b)
            await a.publish("t.first", b"", to=[b.node_id])
            await until(lambda: arrived)

            with faults.hold("before-commit") as held:  # both owner threads pass this point
                sending = asyncio.ensure_future(a.publish("t.second", b"body", to=[b.node_id]))
                await until(held.reached.is_set)
                assert not sending.done()
                assert len(arrived) == 1
                held.release()
                receipt = await sending
            await receipt.delivered(30)
            await until(lambda: len(arrived) == 2)  # told right after the ack has left
            assert [(e.subject, e.body, e.sender) for e in arrived[1:]] == [("t.second", b"body", a.node_id)]

    run(main())


def test_mail_for_a_node_that_is_down_waits_and_arrives_in_order_when_it_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            async with Node("b", home=tmp_path / "b") as b:
                await pair(a, b)
                listen = b.endpoints[0]
            receipts = [await a.publish("t.x", str(n).encode(), to=[b.node_id]) for n in range(50)]
            with pytest.raises(TimedOut, match="1 of 1"):
                await receipts[0].delivered(0.05)
            again = Node("b", home=tmp_path / "b", listen=listen)
            arrived = collecting(again)
            async with again:
                for receipt in receipts:
                    await receipt.delivered(20)
                await until(lambda: len(arrived) == 50)
            assert [int(e.body) for e in arrived] == list(range(50))

    run(main())


def test_a_publish_without_recipients_goes_to_whoever_is_interested_offline_members_too(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        a = Node("a", home=tmp_path / "a")
        b = Node("b", home=tmp_path / "b")
        c = Node("c", home=tmp_path / "c")
        at_b, at_c = collecting(b, "orders.*"), collecting(c, "invoices.>")
        async with a:
            async with b, c:
                await pair(a, b)
                await pair(a, c)
                await until(lambda: len(a._owner._tick.interests) == 2)  # type: ignore[union-attr]
                receipt = await a.publish("orders.created", b"1")
                await receipt.delivered(30)
                await until(lambda: at_b)
                assert receipt.recipients == (b.node_id,)
            offline = await a.publish("invoices.sent.eu", b"2")
            assert offline.recipients == (c.node_id,)
        assert [e.subject for e in at_b] == ["orders.created"]
        assert at_c == []

    run(main())


def test_a_transaction_that_raises_leaves_nothing_and_one_beside_it_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        a = Node("a", home=tmp_path / "a")
        arrived = collecting(a)

        def bad(tx: Tx) -> None:
            tx.publish("t.bad", b"", to=[a.node_id])
            raise ValueError("no")

        def good(tx: Tx) -> str:
            return tx.publish("t.good", b"", to=[a.node_id])

        async with a:
            results = await asyncio.gather(a.transact(bad), a.transact(good), return_exceptions=True)
            await until(lambda: arrived)
            assert isinstance(results[0], ValueError)
            assert [e.id for e in arrived] == [results[1]]

    run(main())


def test_a_coroutine_is_no_transaction(tmp_path: Path) -> None:
    async def main() -> None:
        async def wrong(tx: Tx) -> None: ...

        async with Node("a", home=tmp_path / "a") as a:
            with pytest.raises(TypeError, match="plain function"):
                await a.transact(wrong)

    run(main())


def test_a_message_to_a_stranger_or_out_of_bounds_is_refused_before_anything_changes(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            with pytest.raises(UnknownPeer):
                await a.publish("t.x", b"", to=["somebody"])
            with pytest.raises(InvalidInput, match="1048577 bytes"):
                await a.publish("t.x", b"x" * (2**20 + 1), to=[])
            with pytest.raises(InvalidInput, match="not a subject"):
                await a.publish("t.*", b"")

    run(main())


def test_a_job_comes_back_until_it_is_acked_also_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, a.subscribe("work.*", durable="w") as jobs:
            for n in range(3):
                await a.publish("work.do", str(n).encode())
            first = await anext(jobs)
            await first.nak()
            assert [await body(jobs) for _ in range(3)] == [b"1", b"2", b"0"]
        async with (
            Node("a", home=tmp_path / "a") as a,
            a.subscribe("work.*", durable="w") as jobs,
        ):
            got = [await anext(jobs) for _ in range(3)]
            assert [(job.body, job.attempts) for job in got] == [(b"0", 1), (b"1", 0), (b"2", 0)]
            for job in got:
                await job.ack()
            await a.publish("work.do", b"3")
            assert await body(jobs) == b"3"

    async def body(jobs: Any) -> bytes:
        job = await anext(jobs)
        return bytes(job.body)

    run(main())


def test_a_registry_entry_reaches_the_peers_and_outlives_its_writer(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("b", home=tmp_path / "b") as b:
            team = b.registry("team")
            async with Node("a", home=tmp_path / "a") as a:
                await pair(a, b)
                await a.transact(lambda tx: tx.registry_put("team", "lead", {"name": "x"}))
                await until(lambda: team.get("lead"))
                assert [(e.key, e.value, e.origin) for e in team.entries()] == [
                    ("lead", {"name": "x"}, a.node_id)
                ]
                await team.put("lead", {"name": "y"})  # the bucket is shared: the last writer wins
                await until(lambda: a.registry("team").get("lead") == {"name": "y"})
        async with Node("b", home=tmp_path / "b") as b:
            assert b.registry("team").get("lead") == {"name": "y"}
            await b.registry("team").delete("lead")
        async with Node("b", home=tmp_path / "b") as b:
            assert b.registry("team").keys() == []

    run(main())


def test_a_watch_shows_what_is_there_then_every_change_and_its_last_value(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            jobs = a.registry("jobs")
            for number in range(3):
                await jobs.put(f"eu.{number}", {"n": number})
            await jobs.put("us.0", {"n": 9})
            before = jobs.revision
            async with jobs.watch("eu.*") as changes:
                assert [(await anext(changes)).key for _ in range(3)] == ["eu.0", "eu.1", "eu.2"]

                def burst(tx: Tx) -> None:
                    for number in range(500):
                        tx.registry_put("jobs", f"eu.{number % 7}", {"n": number})
                    tx.registry_put("jobs", "eu.0", None)
                    tx.registry_put("jobs", "us.0", None)

                await a.transact(burst)
                last = {}
                while len(last) < 7:
                    change = await anext(changes)
                    last[change.key] = change.value
            assert last == {"eu.0": None} | {f"eu.{n % 7}": {"n": n} for n in range(493, 500) if n % 7}
            assert jobs.keys("eu.*") == [f"eu.{n}" for n in range(1, 7)]
            assert jobs.keys() == jobs.keys("eu.>")
            assert jobs.revision > before
            idle = jobs.watch()
            assert [entry.key async for entry in _until_closed(a, idle)] == jobs.keys()

    async def _until_closed(node: Node, watch: Any) -> Any:
        for _ in range(6):
            yield await anext(watch)
        await node.close()
        async for entry in watch:
            yield entry

    run(main())


def test_a_second_node_on_one_home_says_who_holds_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a"):
            with pytest.raises(NodeInUse, match=f"already running, pid {os.getpid()}") as raised:
                await Node("again", home=tmp_path / "a").start()
            assert raised.value.pid == os.getpid()

    run(main())


def test_a_home_that_others_can_read_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(UnsuitableHome, match="not private") as raised:
        run(Node("a", home=shared).start())
    assert "chmod 700" in str(raised.value.hint)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=str(port)):
            run(Node("a", home=tmp_path / "a", listen=f"tcp://127.0.0.1:{port}").start())


# -- killed processes -------------------------------------------------------------------------------------------


def numbers_at(home: Path) -> list[int]:
    worker = Worker(home, "numbers")
    (said,) = worker.rest()
    worker.wait()
    return list(said["numbers"])


def paired(tmp_path: Path) -> tuple[Path, Path, str, str]:
    """Return the homes of a sender and a receiver that know each other, the receiver's id and its endpoint."""
    sender, receiver = tmp_path / "s", tmp_path / "r"
    host = Worker(receiver, "receiver")
    guest = Worker(sender, "join", host.read()["code"])
    assert guest.read() == {"joined": host.node_id}
    guest.wait()
    host.stop()
    return sender, receiver, host.node_id, host.endpoint


@pytest.mark.parametrize("victim", ["sender", "receiver", "both"])
def test_nothing_acknowledged_is_lost_or_doubled_when_processes_are_killed(
    tmp_path: Path, victim: str
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    sender_home, receiver_home, receiver_id, endpoint = paired(tmp_path)
    published: list[int] = []
    for round_ in range(4):
        first = round_ * 1_000
        receiver = Worker(receiver_home, "again", LISTEN=endpoint)
        sender = Worker(sender_home, "sender", receiver_id, str(first), "200")
        published += [sender.read()["published"] for _ in range(rng.randrange(1, 150))]
        if victim in ("receiver", "both"):
            receiver.kill()
        if victim in ("sender", "both"):
            published += [said["published"] for said in sender.kill()]
        else:
            published += [sender.read()["published"] for _ in range(first + 200 - published[-1] - 1)]
            sender.stop()
        if victim == "sender":
            receiver.stop()
    receiver = Worker(receiver_home, "again", LISTEN=endpoint)
    sender = Worker(sender_home, "sender", receiver_id, "99999", "1")
    published.append(sender.read()["published"])
    wait_for_number(receiver_home, 99_999)
    sender.stop()
    receiver.stop()
    arrived = numbers_at(receiver_home)
    assert len(arrived) == len(set(arrived)), "a message arrived twice"
    assert set(published) <= set(arrived), "an acknowledged message was lost"
    assert arrived == sorted(arrived), "one sender's messages arrived out of order"


def wait_for_number(home: Path, number: int) -> None:
    """Wait, reading the receiver's store from outside, until it has filed a number."""
    import sqlite3
    import time

    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with sqlite3.connect(f"file:{home / 'store.db'}?mode=ro", uri=True) as store:
            if store.execute("SELECT 1 FROM filed WHERE number = ?", (number,)).fetchone():
                return
        time.sleep(0.02)
    raise AssertionError(f"{number} has not arrived")


@pytest.mark.parametrize("point", ["before-commit", "after-commit"])
def test_a_receiver_killed_around_its_commit_files_each_message_once(tmp_path: Path, point: str) -> None:
    sender_home, receiver_home, receiver_id, endpoint = paired(tmp_path)
    sender = Worker(sender_home, "sender", receiver_id, "0", "20")
    published = [sender.read()["published"] for _ in range(20)]
    dying = subprocess.run(
        [sys.executable, "-m", "tests.node_worker", str(receiver_home), "again"],
        env={**os.environ, "LISTEN": endpoint, "BROKER_FREE_FAULT": f"{point}:kill"},
        stdout=subprocess.DEVNULL,
        timeout=30,
        check=False,
    )
    assert dying.returncode == -9
    receiver = Worker(receiver_home, "again", LISTEN=endpoint)
    wait_for_number(receiver_home, 19)
    receiver.stop()
    sender.stop()
    assert numbers_at(receiver_home) == published


def test_what_the_sockets_turn_away_is_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a, Node("b", home=tmp_path / "b") as b:
            code = (await a.invite(ttl_ms=60_000)).encode()
            await b.join(code)
            async with Node("c", home=tmp_path / "c") as c:
                with pytest.raises(PairingRefused):
                    await c.join(code)
            assert (await a.refused())["unknown-key"] >= 1

    run(main())


def test_whoever_waits_for_a_delivery_hears_that_the_node_has_closed(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            async with Node("b", home=tmp_path / "b") as b:
                await pair(a, b)
            receipt = await a.publish("t.x", b"", to=[b.node_id])
            waiting = asyncio.ensure_future(receipt.delivered())
            await asyncio.sleep(0)
        with pytest.raises(NodeClosed):
            await waiting

    run(main())


def test_whoever_asks_a_node_that_has_failed_is_told_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            owner = a._running()
            broken = asyncio.ensure_future(owner.ask(lambda: 1 // 0))
            behind_it = asyncio.ensure_future(a.refused())
            with pytest.raises(ZeroDivisionError):
                await broken
            with pytest.raises(NodeClosed):
                await behind_it
            with pytest.raises(NodeClosed):
                await a.refused()

    run(main())


def test_an_effect_beside_a_durable_consumer_leaves_the_job_to_it(tmp_path: Path) -> None:
    async def main() -> None:
        a = Node("a", home=tmp_path / "a")
        seen = collecting(a, "work.*")
        async with a, a.subscribe("work.*", durable="w") as jobs:
            await a.publish("work.do", b"1")
            job = await anext(jobs)
            assert len(seen) == 1
            state = "SELECT state FROM inbox WHERE row = ?"
            rows = await a.read(lambda db: db.execute_sql(state, (job.envelope.row,)).fetchall())
            assert rows == [(1,)], "claimed, not done: the job is still open"
            await job.ack()
            rows = await a.read(lambda db: db.execute_sql(state, (job.envelope.row,)).fetchall())
            assert rows == [(2,)]

    run(main())


def test_a_consumer_that_is_cancelled_while_it_asks_for_jobs_loses_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            Node("a", home=tmp_path / "a") as a,
            a.subscribe("t.>", durable="d") as jobs,
        ):
            await a.publish("t.x", b"one", to=[a.node_id])
            asking = asyncio.ensure_future(anext(jobs))
            await asyncio.sleep(0)  # it has asked, and the answer cannot be here yet
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            async with asyncio.timeout(10):
                assert (await anext(jobs)).body == b"one"

    run(main())


def test_whoever_waits_for_room_hears_that_the_node_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(tx: Tx) -> None:
        raise SystemExit

    async def main() -> None:
        monkeypatch.setattr("broker_free.node._WORK_MAX", 1)
        async with Node("a", home=tmp_path / "a") as a:
            ending = asyncio.ensure_future(a.transact(end))
            waiting = asyncio.ensure_future(a.publish("t.x", b"", to=[a.node_id]))
            await asyncio.sleep(0)
            with pytest.raises(NodeClosed):
                await ending
            async with asyncio.timeout(10):
                with pytest.raises(NodeClosed):
                    await waiting

    run(main())


def test_what_is_on_disk_is_no_failure_though_the_store_fails_right_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreBroken("no more")

    async def main() -> None:
        b = Node("b", home=tmp_path / "b")
        arrived = collecting(b)
        async with b:
            async with Node("a", home=tmp_path / "a") as a:
                await pair(a, b)
                monkeypatch.setattr(a._running()._store, "queued_after", fail)
                await a.transact(lambda tx: tx.publish("t.x", b"kept", to=[b.node_id]))
                await until(lambda: a.health.state == "failed")
            async with Node("a", home=tmp_path / "a"):
                await until(lambda: [one.body for one in arrived] == [b"kept"], 30)

    run(main())


def test_a_publish_again_under_the_same_id_waits_for_whoever_has_not_confirmed_yet(tmp_path: Path) -> None:
    async def main() -> None:
        async with Node("a", home=tmp_path / "a") as a:
            async with Node("b", home=tmp_path / "b") as b, Node("c", home=tmp_path / "c") as c:
                await pair(a, b)
                await pair(a, c)
                at = b.endpoints[0]
            one = new_id(1)
            await a.publish("t.x", b"", to=[b.node_id], message_id=one)
            again = await a.publish("t.x", b"", to=[b.node_id], message_id=one)
            await a.publish("t.x", b"", to=[c.node_id], message_id=one)
            only_b = new_id(2)
            await a.publish("t.x", b"", to=[b.node_id], message_id=only_b)
            assert again.recipients[0] == b.node_id
            with pytest.raises(TimedOut):
                await again.delivered(0.01)
            given_up = new_id(3)
            await a.publish("t.x", b"", to=[b.node_id], message_id=given_up)
            store = a._running()._store
            await a.transact(lambda tx: store.mark_dead(b.node_id, given_up, "too old", tx.steady_ms))
            with pytest.raises(InvalidInput, match="dead"):
                await (await a.publish("t.x", b"", to=[b.node_id], message_id=given_up)).delivered(10)
        async with Node("a", home=tmp_path / "a") as a:  # it has forgotten the receipts, not the messages
            after = await a.publish("t.x", b"", to=[b.node_id], message_id=only_b)
            with pytest.raises(TimedOut):
                await after.delivered(0.01)
            async with Node("b", home=tmp_path / "b", listen=at):
                await after.delivered(PATIENCE_S)
                last = await a.publish("t.x", b"", to=[b.node_id], message_id=only_b)
                await last.delivered(PATIENCE_S)

    run(main())
