"""Who acts as whom: leases of real processes, judged by the process table, kept over restarts of the node."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from broker_free import faults
from tests.nodes import until
from tests.offices import (
    IDENTITY,
    Processes,
    Site,
    a_person,
    a_script,
    homes,
    known,
    pair,
    site,
    two_sites,
)
from zmail import leases
from zmail.directory import Place
from zmail.errors import CallsignTaken, InvalidBrief
from zmail.identity import Holder, Liveness, Resolution
from zmail.identity import Session as ClaudeSession
from zmail.models import Lease

CLI = {"kind": "cli"}


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.end_all()


def test_a_session_keeps_its_callsign_for_as_long_as_it_lives(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            session = processes.session()
            async with site("server1", home) as one:
                first = known(await one.office.enter(session, {**CLI, "callsign": "alpha"}))
                assert (first.callsign, first.sender_class, first.holder) == (
                    "alpha",
                    "agent",
                    session.holder,
                )
                # Whatever it asks for later, and also after /clear, it is the same process.
                for hints in ({"callsign": "other"}, {"session_id": "another"}, {}):
                    assert known(await one.office.enter(session, {**CLI, **hints})).callsign == "alpha"
                assert await _number(one, "alpha") == 1
            async with site("server1", home) as one:
                assert known(await one.office.enter(session, CLI)).callsign == "alpha"
                assert await _number(one, "alpha") == 1

    asyncio.run(scenario())


def test_a_second_live_process_is_told_of_a_free_name_and_gets_the_lease_when_the_first_is_dead(
    processes: Processes,
) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                first = processes.start()
                await one.office.enter(processes.session(of=first), {**CLI, "callsign": "alpha"})
                second = processes.session()
                for _ in range(2):
                    with pytest.raises(CallsignTaken) as refused:
                        await one.office.enter(second, {**CLI, "callsign": "alpha"})
                    assert refused.value.hint == "free: alpha-2"
                assert await _number(one, "alpha") == 1

                first.kill()
                first.wait()
                taken = known(await one.office.enter(second, {**CLI, "callsign": "alpha"}))
                assert (taken.callsign, taken.holder) == ("alpha", second.holder)
                assert await _number(one, "alpha") == 2

    asyncio.run(scenario())


def test_a_holder_that_cannot_be_judged_keeps_its_callsign(processes: Processes) -> None:
    # A pid that names no single process, as the kernel tells of one in another pid namespace.
    hidden = Holder(boot_id=IDENTITY.boot_id, pid=0, start_ticks=1)

    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                assert IDENTITY.liveness(hidden) is Liveness.UNKNOWN
                await one.office.enter(
                    replace(processes.session(), holder=hidden), {**CLI, "callsign": "alpha"}
                )
                with pytest.raises(CallsignTaken):
                    await one.office.enter(processes.session(), {**CLI, "callsign": "alpha"})
                with pytest.raises(CallsignTaken):
                    await one.act_as("alpha")

    asyncio.run(scenario())


def test_who_lost_the_lease_can_no_longer_act_by_it(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                first = processes.start()
                old = known(await one.office.enter(processes.session(of=first), {**CLI, "callsign": "alpha"}))
                bravo = await one.act_as("bravo")
                ident = await one.send(bravo, "alpha")
                first.kill()
                first.wait()
                new = known(await one.office.enter(processes.session(), {**CLI, "callsign": "alpha"}))

                with pytest.raises(CallsignTaken):
                    await one.send(old, "bravo")
                with pytest.raises(CallsignTaken):
                    await one.call(old, "read", id=ident)
                assert await one.titles(bravo) == []
                await one.send(new, "bravo")

    asyncio.run(scenario())


def test_a_resumed_session_gets_its_callsign_back_if_it_is_free(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                first = processes.start()
                before = await one.office.enter(
                    _in_session(processes.session(of=first), "s-1"), {**CLI, "callsign": "alpha"}
                )
                # Claude Code lets a second terminal resume a session that still runs.
                beside = known(await one.office.enter(_in_session(processes.session(), "s-1"), CLI))
                assert beside.callsign != known(before).callsign

            async with site("server1", home) as one:
                first.kill()
                first.wait()
                resumed = known(await one.office.enter(_in_session(processes.session(), "s-1"), CLI))
                assert resumed.callsign == "alpha"

    asyncio.run(scenario())


def test_a_new_session_is_named_after_its_project_or_from_the_configured_list(
    processes: Processes, tmp_path: Path
) -> None:
    (tmp_path / "My Shop" / ".git").mkdir(parents=True)
    hints = {**CLI, "project_dir": str(tmp_path / "My Shop"), "session_id": "0f9e8d7c-aaaa"}

    async def scenario() -> None:
        with homes(3) as folders:
            async with site("server1", folders[0]) as one:
                caller = known(await one.office.enter(processes.session(), hints))
                assert (caller.callsign, caller.project) == ("my-shop-0f9e8d7c", "my-shop")
            async with site("server2", folders[1], callsigns=("ops", "dev")) as two:
                assert [
                    known(await two.office.enter(processes.session(), {**hints, "session_id": each})).callsign
                    for each in ("0f9e8d7c", "1f9e8d7c", "2f9e8d7c")
                ] == ["ops", "dev", "my-shop-2f9e8d7c"]
            async with (
                site("server1", folders[0], naming="spelling") as one,
                site("server3", folders[2], naming="spelling") as three,
            ):
                await pair(one, three)
                assert known(await one.office.enter(processes.session(), CLI)).callsign == "alpha"
                await until(lambda: three.knows("alpha"))
                # A made name avoids those of other nodes: alpha alone would no longer say who is meant.
                assert known(await three.office.enter(processes.session(), CLI)).callsign == "bravo"

    asyncio.run(scenario())


def test_a_script_may_act_under_any_name_that_no_live_process_holds(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                assert (await one.act_as("robot")).sender_class == "script"
                process = processes.start()
                session = processes.session(of=process)
                await one.office.enter(session, {**CLI, "callsign": "alpha"})

                with pytest.raises(CallsignTaken) as refused:
                    await one.act_as("alpha")
                assert "zmail --as alpha-2" in str(refused.value.hint)
                # The session's own shell may: it is that session.
                own = known(await one.office.enter(session, {**CLI, "as": "alpha"}))
                assert own.sender_class == "agent"
                other = known(await one.office.enter(session, {**CLI, "as": "robot"}))
                assert (other.callsign, other.sender_class, other.holder) == ("robot", "script", None)

                process.kill()
                process.wait()
                assert (await one.act_as("alpha")).callsign == "alpha"
                for wrong in ("Not A Name", "all", "x" * 100):
                    with pytest.raises(InvalidBrief):
                        await one.act_as(wrong)

    asyncio.run(scenario())


def test_a_relay_with_a_name_of_its_own_holds_it_for_as_long_as_it_runs(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                relay = processes.start()
                resolution = replace(a_script(), caller=IDENTITY.resolve(relay.pid, {}).caller)
                hints = {"kind": "mcp", "as": "alpha"}
                caller = known(await one.office.enter(resolution, hints))
                assert (caller.holder, caller.sender_class) == (resolution.caller, "script")
                assert one.office.directory().state(_place(one, "alpha")) == "online"
                with pytest.raises(CallsignTaken):
                    await one.act_as("alpha")

                relay.kill()
                relay.wait()
                one.office.left("alpha")
                await until(lambda: one.office.directory().state(_place(one, "alpha")) == "offline")
                await one.act_as("alpha")

    asyncio.run(scenario())


def test_a_person_has_the_mailbox_of_their_name_and_no_session_can_take_it(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                person = known(await one.office.enter(a_person("dana"), CLI))
                assert (person.callsign, person.sender_class, person.holder) == ("dana", "human", None)
                with pytest.raises(CallsignTaken):
                    await one.office.enter(processes.session(), {**CLI, "callsign": "dana"})

                await one.office.enter(processes.session(), {**CLI, "callsign": "erin"})
                with pytest.raises(CallsignTaken):
                    await one.office.enter(a_person("erin"), CLI)

    asyncio.run(scenario())


def test_a_session_that_dies_is_shown_as_offline_on_every_node(processes: Processes) -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            process = processes.start()
            await one.office.enter(processes.session(of=process), {**CLI, "callsign": "alpha"})
            await until(lambda: two.knows("alpha"))
            place = _place(one, "alpha")
            assert two.office.directory().state(place) == "online"
            process.kill()
            process.wait()
            one.office.left("alpha")
            await until(lambda: two.office.directory().state(place) == "offline")
            bravo = await two.act_as("bravo")
            sent = await two.call(bravo, "send", to=["alpha"], body="x")
            assert sent["warnings"] == [
                "alpha@server1 is not running (last seen just now): the brief waits for it"
            ]

    asyncio.run(scenario())


def test_a_caller_that_is_known_costs_no_transaction(processes: Processes) -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                callers: list[tuple[Resolution, dict[str, str]]] = [
                    (processes.session(), CLI),
                    (a_person(), CLI),
                    (a_script(), {"as": "robot"}),
                ]
                entered = [await one.office.enter(*each) for each in callers]
                with faults.hold("before-commit"):  # nothing can be written any more
                    async with asyncio.timeout(30):
                        assert [await one.office.enter(*each) for each in callers] == entered

    asyncio.run(scenario())


def test_a_resolution_without_a_name_is_nobody() -> None:
    assert leases.wish_of(a_script(), {**CLI, "callsign": "alpha", "claude_pid": os.getpid()}) is None


def _in_session(resolution: Resolution, session_id: str) -> Resolution:
    session = ClaudeSession(session_id=session_id, cwd=None, messaging_socket=None, name=None, status=None)
    return replace(resolution, session=session)


def _place(where: Site, callsign: str) -> Place:
    return next(place for place in where.office.directory().residents if place.callsign == callsign)


async def _number(where: Site, callsign: str) -> int:
    return await where.node.read(lambda _: Lease.get_by_id(callsign).number)
