"""When a session is told of mail, how often, and never before the mail is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from broker_free import faults
from broker_free.errors import OutboxFull
from broker_free.limits import Limits
from tests.nodes import until
from tests.offices import Processes, Session, Site, homes, known, pair, site, states, two_sites
from zmail.identity import Caller
from zmail.push import BURST, REFILL_PER_S, Bucket, Push, Waiting, sender_of


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.end_all()


def test_a_brief_from_another_node_is_announced_and_not_read() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await two.act_as("bravo")
            await until(lambda: one.knows("bravo"))
            session = Session()
            two.push.attach("bravo", session)
            ident = await one.send(alpha, "bravo", title="Deploy?")

            await until(lambda: session.told)
            ((text, sender),) = session.told
            assert sender == "zmail:alpha"
            assert "alpha@server1" in text
            assert "Deploy?" in text
            assert ident in text

            await until(lambda: _is(one, alpha, ident, "announced"))
            (listed,) = (await two.call(bravo, "inbox"))["briefs"]
            assert (listed["state"], listed["door"]) == ("announced", "socket")
            assert (await two.call(bravo, "check"))["unread"] == 1
            (row,) = [each for each in (await two.call(bravo, "roster"))["callsigns"] if each["door"]]
            assert (row["callsign"], row["door"]) == ("bravo", "socket")

    asyncio.run(scenario())


def test_there_is_no_notice_before_the_commit() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha = await one.act_as("alpha")
                await one.act_as("bravo")
                session = Session()
                one.push.attach("bravo", session)
                await asyncio.sleep(0)
                with faults.hold("before-commit") as held:
                    sending = asyncio.create_task(one.send(alpha, "bravo"))
                    assert await asyncio.to_thread(held.reached.wait, 30)
                    # Everything of the brief is written, only the commit is missing. Nothing may come now, so there
                    # is no condition to wait for: give whoever would be too early the time to be.
                    await asyncio.sleep(0.3)
                    assert session.entered == 0
                    assert not sending.done()
                    held.release()
                    await until(lambda: session.told)
                    await sending

    asyncio.run(scenario())


def test_a_send_that_fails_for_one_recipient_reaches_and_announces_to_nobody() -> None:
    async def scenario() -> None:
        with homes(2) as (first, second):
            async with site("server1", first, limits=Limits(outbox_messages_max=1)) as one:
                async with site("server2", second) as two:
                    await pair(one, two)
                alpha, charlie = await one.act_as("alpha"), await one.act_as("charlie")
                session = Session()
                one.push.attach("charlie", session)
                await one.send(alpha, "bravo@server2")

                with pytest.raises(OutboxFull):
                    await one.send(alpha, "charlie", "bravo@server2", body="lost")
                await one.send(alpha, "charlie", body="kept")

                await until(lambda: session.told)
                assert ["kept" in text for text, _ in session.told] == [True]
                assert await one.titles(charlie) == ["kept"]
                assert (await one.call(None, "status"))["store"]["briefs"] == 2

    asyncio.run(scenario())


def test_what_comes_while_a_notice_is_under_way_goes_as_one_more() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha, charlie = await one.act_as("alpha"), await one.act_as("charlie")
                bravo = await one.act_as("bravo")
                session = Session()
                session.gate.clear()
                one.push.attach("bravo", session)
                first = await one.send(alpha, "bravo")
                await until(lambda: session.entered == 1)
                burst = [await one.send(who, "bravo") for who in (alpha, charlie, alpha, charlie)]
                session.gate.set()

                await until(lambda: len(session.told) == 2)
                assert first in session.told[0][0]
                text, sender = session.told[1]
                assert all(ident in text for ident in burst)
                assert sender == "zmail"  # of several
                await until(lambda: _all_announced(one, bravo))
                assert session.entered == 2

    asyncio.run(scenario())


def test_what_waits_is_announced_when_a_session_attaches_and_only_once(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            running = processes.session()
            async with site("server1", home) as one:
                alpha = await one.act_as("alpha")
                bravo = known(await one.office.enter(running, {"callsign": "bravo"}))
                for number in range(3):
                    await one.send(alpha, "bravo", body=f"brief {number}")
                session = Session()
                detach = one.push.attach("bravo", session)
                await until(lambda: _all_announced(one, bravo))
                assert len(session.told) == 1
                detach()

            # The same process comes back after the node was away: it has heard of these.
            async with site("server1", home) as one:
                await one.office.enter(running, {"callsign": "bravo"})
                again = Session()
                one.push.attach("bravo", again)
                last = await one.send(await one.act_as("alpha"), "bravo", body="new")
                await until(lambda: again.told)
                assert last in again.told[0][0]
                assert "brief 0" not in again.told[0][0]

    asyncio.run(scenario())


def test_the_next_holder_is_told_of_what_the_last_one_left_unread(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha, process = await one.act_as("alpha"), processes.start()
                await one.office.enter(processes.session(of=process), {"callsign": "bravo"})
                first = Session()
                detach = one.push.attach("bravo", first)
                ident = await one.send(alpha, "bravo")
                await until(lambda: first.told)
                detach()
                process.kill()
                process.wait()

                bravo = known(await one.office.enter(processes.session(), {"callsign": "bravo"}))
                second = Session()
                one.push.attach("bravo", second)
                await until(lambda: second.told)
                assert ident in second.told[0][0]
                (listed,) = (await one.call(bravo, "inbox"))["briefs"]
                assert listed["state"] == "announced"

    asyncio.run(scenario())


def test_a_notice_that_fails_leaves_the_brief_as_it_is_and_the_next_one_tells_of_it() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha, bravo = await one.act_as("alpha"), await one.act_as("bravo")
                broken = Session(works=False)
                detach = one.push.attach("bravo", broken)
                first = await one.send(alpha, "bravo")
                await until(lambda: broken.entered)
                assert await _states(one, bravo) == ["delivered"]

                tries = broken.entered
                second = await one.send(alpha, "bravo")
                await until(lambda: broken.entered > tries)
                detach()
                session = Session()
                one.push.attach("bravo", session)
                await until(lambda: session.told)
                assert first in session.told[0][0]
                assert second in session.told[0][0]

    asyncio.run(scenario())


def test_a_session_whose_inbox_opens_late_is_told_without_anything_else_happening() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha = await one.act_as("alpha")
                await one.act_as("bravo")
                session = Session(works=False)
                one.push.attach("bravo", session)
                ident = await one.send(alpha, "bravo")
                await until(lambda: session.entered)
                session.works = True
                await until(lambda: session.told)
                assert ident in session.told[0][0]

    asyncio.run(scenario())


def test_of_several_sessions_the_newest_is_told() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha = await one.act_as("alpha")
                await one.act_as("bravo")
                older, newer = Session(), Session()
                one.push.attach("bravo", older)
                detach = one.push.attach("bravo", newer)
                await one.send(alpha, "bravo")
                await until(lambda: newer.told)
                assert older.entered == 0
                detach()
                await one.send(alpha, "bravo")
                await until(lambda: older.told)
                assert one.push.door_of("bravo") == "socket"

    asyncio.run(scenario())


def test_a_brief_read_before_its_notice_is_not_announced_any_more() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha, bravo = await one.act_as("alpha"), await one.act_as("bravo")
                session = Session()
                session.gate.clear()
                one.push.attach("bravo", session)
                first, second = await one.send(alpha, "bravo"), ""
                await until(lambda: session.entered == 1)
                second = await one.send(alpha, "bravo")
                await one.call(bravo, "mark_read", ids=[first, second])
                third = await one.send(alpha, "bravo")
                session.gate.set()
                await until(lambda: len(session.told) == 2)
                assert second not in session.told[1][0]
                assert third in session.told[1][0]
                # The first was read while its notice was under way: announced never follows read.
                assert await _state(one, alpha, first) == "read"
                told = await one.call(alpha, "wait_state", id=first, state="read")
                assert states(told) == ["read"]

    asyncio.run(scenario())


# ---- the guard, and pieces ----


@dataclass
class Desk:
    """A ledger in memory, for the rules that need no store."""

    briefs: list[Waiting] = field(default_factory=list)

    async def waiting(self, callsign: str) -> Sequence[Waiting]:
        return list(self.briefs)

    async def announced(self, told: Sequence[Waiting], *, door: str) -> None:
        self.briefs = [each for each in self.briefs if each not in told]

    def left(self, callsign: str) -> None:
        pass


def test_no_more_notices_go_out_than_a_session_takes() -> None:
    bucket = Bucket(0.0)
    for _ in range(BURST):
        assert bucket.wait_s(0.0) == 0
        bucket.take(0.0)
    assert bucket.wait_s(0.0) == pytest.approx(1 / REFILL_PER_S)
    assert bucket.wait_s(1 / REFILL_PER_S) == pytest.approx(0)
    # A long silence fills it, and no further.
    assert bucket.wait_s(10_000.0) == 0
    for _ in range(BURST):
        bucket.take(10_000.0)
    assert bucket.wait_s(10_000.0) > 0


def test_beyond_the_burst_notices_wait_and_are_joined() -> None:
    async def scenario() -> None:
        desk, session = Desk(), Session()
        push = Push(clock=lambda: 0.0)  # a clock that stands still: nothing is refilled
        push.serve(desk)
        push.attach("bravo", session)
        for number in range(BURST):
            desk.briefs.append(_waiting(number))
            push.arrived("bravo")
            await until(lambda: not desk.briefs)
        assert len(session.told) == BURST
        for number in range(5):
            desk.briefs.append(_waiting(BURST + number))
            push.arrived("bravo")
            await asyncio.sleep(0)
        assert len(session.told) == BURST
        await push.close()

    asyncio.run(scenario())


def test_the_sender_of_a_notice_is_who_wrote_or_zmail_for_several() -> None:
    assert sender_of([_waiting(1), _waiting(2)]) == "zmail:alpha"
    assert sender_of([_waiting(1), _waiting(2, callsign="charlie")]) == "zmail"


def _waiting(number: int, *, callsign: str = "alpha") -> Waiting:
    return Waiting(
        delivery=number,
        lease_number=1,
        id=f"01a1fd3a-26c7-777c-b1a9-{number:012}",
        callsign=callsign,
        address=f"{callsign}@server1",
        sender_class="agent",
        title="A title",
        priority="normal",
    )


async def _state(where: Site, who: Caller, ident: str) -> str:
    return str((await where.call(who, "read", id=ident, peek=True))["state"])


async def _is(where: Site, who: Caller, ident: str, state: str) -> bool:
    return await _state(where, who, ident) == state


async def _states(where: Site, who: Caller) -> list[str]:
    return [each["state"] for each in (await where.call(who, "inbox"))["briefs"]]


async def _all_announced(where: Site, who: Caller) -> bool:
    return set(await _states(where, who)) == {"announced"}
