"""The mail side end to end: real nodes in one process, paired, CURVE on loopback tcp."""

from __future__ import annotations

import asyncio
import json

import pytest
from peewee import Database

from broker_free import Tx
from broker_free.errors import InvalidInput, NotOwner, PairingRefused, TimedOut, TooLarge
from broker_free.message import id_to_bytes
from tests.nodes import until
from tests.offices import Site, a_script, homes, pair, site, states, two_sites
from zmail import wire
from zmail.directory import BUCKET, Place, key_of
from zmail.errors import (
    AmbiguousAddress,
    AmbiguousId,
    InvalidBrief,
    NoIdentity,
    NotFound,
    UnknownAddress,
)
from zmail.identity import Caller
from zmail.models import Brief, Recipient

NO_SUCH_ID = "01a1fd3a-26c7-777c-b1a9-2c05421f113f"

# ---- from one node to the other ----


def test_a_brief_travels_is_read_and_its_receipts_come_back() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await two.act_as("bravo")
            await until(lambda: one.knows("bravo"))

            sent = await one.call(alpha, "send", to=["bravo"], body="# Hello\nworld", title="Greeting")
            assert states(sent) == ["queued"]
            assert sent["recipients"][0]["address"] == "bravo@server2"
            told = await one.call(alpha, "wait_state", id=sent["id"], state="delivered", timeout_ms=30_000)
            assert states(told) == ["delivered"]

            brief = await two.call(bravo, "read", id=sent["id"])
            assert (brief["from"], brief["title"], brief["body"]) == (
                "alpha@server1",
                "Greeting",
                "# Hello\nworld",
            )
            assert (brief["state"], brief["thread"], brief["sender_class"]) == ("read", sent["id"], "script")
            told = await one.call(alpha, "wait_state", id=sent["id"], state="read", timeout_ms=30_000)
            assert states(told) == ["read"]

    asyncio.run(scenario())


def test_looking_consumes_nothing_and_reading_twice_is_fine() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, _):
            alpha, bravo = await one.act_as("alpha"), await one.act_as("bravo")
            ident = await one.send(alpha, "bravo")

            for _ in range(2):
                assert (await one.call(bravo, "check"))["unread"] == 1
                assert (await one.call(bravo, "inbox"))["total"] == 1
                assert (await one.call(bravo, "read", id=ident, peek=True))["state"] == "delivered"
            assert states(await one.call(alpha, "wait_state", id=ident)) == ["delivered"]

            for _ in range(2):
                assert (await one.call(bravo, "read", id=ident))["state"] == "read"
            assert (await one.call(bravo, "check"))["unread"] == 0
            assert await one.titles(bravo) == []
            assert await one.titles(bravo, all=True) == ["a text"]

    asyncio.run(scenario())


def test_a_reply_goes_to_the_sender_keeps_the_thread_and_settles_what_it_answers() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await two.act_as("bravo")
            await until(lambda: one.knows("bravo"))
            asked = await one.send(alpha, "bravo", title="Deploy?")
            await until(lambda: _has_unread(two, bravo))

            answered = await two.call(bravo, "reply", id=asked[-6:], body="done")
            assert answered["thread"] == asked
            await until(lambda: _has_unread(one, alpha))
            (brief,) = (await one.call(alpha, "inbox"))["briefs"]
            assert (brief["title"], brief["thread"], brief["reply_to"]) == ("Re: Deploy?", asked, asked)
            assert brief["from"] == "bravo@server2"

            again = await one.call(alpha, "reply", id=brief["id"], body="thanks")
            assert again["thread"] == asked
            assert await _state(one, alpha, asked) == "done"

            onward = await one.call(alpha, "reply", id=asked, body="one more thing")
            assert [each["address"] for each in onward["recipients"]] == ["bravo@server2"]

    asyncio.run(scenario())


def test_all_reaches_everybody_on_every_node_but_the_sender() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await one.act_as("bravo")
            charlie, delta = await two.act_as("charlie"), await two.act_as("delta")
            await until(lambda: one.knows("charlie", "delta"))

            sent = await one.call(alpha, "send", to=["all", "bravo"], body="everybody")
            assert sorted(each["address"] for each in sent["recipients"]) == [
                "bravo@server1",
                "charlie@server2",
                "delta@server2",
            ]
            await one.call(alpha, "wait_state", id=sent["id"], timeout_ms=30_000)
            for where, who in ((one, bravo), (two, charlie), (two, delta)):
                assert await where.titles(who) == ["everybody"]
            assert await one.titles(alpha) == []

            there = await one.call(alpha, "send", to=["@server2"], body="only there", cc=["bravo", "delta"])
            assert [each["address"] for each in there["recipients"]] == [
                "charlie@server2",
                "delta@server2",
                "bravo@server1",
            ]

    asyncio.run(scenario())


def test_mail_for_a_node_that_is_down_leaves_when_it_is_back() -> None:
    async def scenario() -> None:
        with homes(2) as (first, second):
            async with site("server1", first) as one:
                async with site("server2", second) as two:
                    await pair(one, two)
                    await two.act_as("bravo")
                    await until(lambda: one.knows("bravo"))
                alpha = await one.act_as("alpha")
                await until(lambda: one.node.peers()[0].link == "closed")

                for number in range(5):
                    await one.send(alpha, "bravo", body=f"brief {number}")
                last = await one.call(alpha, "send", to=["bravo"], body="brief 5")
                assert states(last) == ["queued"]
                assert last["recipients"][0]["last_seen"] is not None

                async with site("server2", second) as two:
                    await one.call(alpha, "wait_state", id=last["id"], timeout_ms=20_000)
                    bravo = await two.act_as("bravo")
                    assert await two.titles(bravo) == [f"brief {number}" for number in (5, 4, 3, 2, 1, 0)]

    asyncio.run(scenario())


def test_a_restart_keeps_the_mail_that_waits_and_the_callsigns() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha = await one.act_as("alpha")
                await one.act_as("bravo")
                ident = await one.send(alpha, "bravo", body="before the restart\n- [ ] look at it")
            async with site("server1", home) as one:
                assert one.knows("alpha", "bravo")
                bravo = await one.act_as("bravo")
                brief = await one.call(bravo, "read", id=ident)
                assert brief["title"] == "before the restart"
                assert [each["text"] for each in brief["actions"]] == ["look at it"]

    asyncio.run(scenario())


def test_the_roster_tells_what_the_mailboxes_say_whatever_stands_in_the_registry() -> None:
    async def scenario() -> None:
        with homes(2) as (first, second):
            async with site("server1", first) as one:
                await one.act_as("alpha")
                await one.act_as("a..strange-name")
                # As after a store that was put back: the registry knows of a callsign that no mailbox has, and
                # of another state than the mailbox's.
                there = [Place(callsign, one.node.node_id) for callsign in ("alpha", "ghost")]

                def go_astray(tx: Tx) -> None:
                    for place in there:
                        tx.registry_put(BUCKET, key_of(place), {"kind": "human", "state": "online"})

                await one.node.transact(go_astray)
                assert one.knows("ghost")
            async with site("server1", first) as one, site("server2", second) as two:
                await pair(one, two)
                await until(lambda: two.knows("alpha", "a..strange-name"))
                assert not one.knows("ghost")
                assert not two.knows("ghost")
                mine, theirs = one.office.directory(), two.office.directory()
                assert mine.residents == theirs.residents
                assert mine.residents[there[0]].kind == "script"

    asyncio.run(scenario())


def test_nobody_writes_a_callsign_of_another_node() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            await two.act_as("bravo")
            await until(lambda: one.knows("bravo"))
            for callsign in ("bravo", "intruder"):
                key = key_of(Place(callsign, two.node.node_id))
                with pytest.raises(NotOwner):
                    await one.node.transact(lambda tx, key=key: tx.registry_put(BUCKET, key, {}))
            assert one.office.directory().residents == two.office.directory().residents

    asyncio.run(scenario())


def test_an_ack_that_nobody_was_told_of_is_found_at_the_next_start() -> None:
    async def scenario() -> None:
        with homes(2) as (first, second):
            async with site("server2", second) as two:
                async with site("server1", first) as one:
                    await pair(one, two)
                    await two.act_as("bravo")
                    await until(lambda: one.knows("bravo"))
                    alpha = await one.act_as("alpha")
                    # The node ends between the ack and what follows from it: nobody listens any more.
                    await one.office.close()
                    ident = await one.send(alpha, "bravo")
                    bravo = await two.act_as("bravo")
                    await until(lambda: _has_unread(two, bravo))
                    assert await _state(one, alpha, ident) == "queued"
                    await until(lambda: _is_acked(one, ident))
                async with site("server1", first) as one:
                    assert await _state(one, await one.act_as("alpha"), ident) == "delivered"

    asyncio.run(scenario())


def test_a_brief_for_the_same_node_never_touches_the_wire() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha, bravo = await one.act_as("alpha"), await one.act_as("bravo")
                sent = await one.call(alpha, "send", to=["bravo"], body="here")
                assert states(sent) == ["delivered"]
                assert await one.titles(bravo) == ["here"]

    asyncio.run(scenario())


# ---- addresses ----


def test_an_unknown_name_is_refused_with_the_nearest_ones_and_nothing_is_sent() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await one.act_as("bravo")
            await two.act_as("brave")
            await until(lambda: one.knows("brave"))

            with pytest.raises(UnknownAddress) as refused:
                await one.send(alpha, "bravo", "bravoo")
            assert refused.value.hint is not None
            assert "'bravo'" in refused.value.hint
            assert "'brave'" in refused.value.hint
            assert await one.titles(bravo) == []

    asyncio.run(scenario())


def test_one_name_on_two_nodes_is_ambiguous_even_when_one_of_them_is_here() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha = await one.act_as("alpha")
            await one.act_as("bravo")
            there = await two.act_as("bravo")
            await until(lambda: len(one.office.directory().residents) == 3)

            with pytest.raises(AmbiguousAddress) as refused:
                await one.send(alpha, "bravo")
            assert "bravo@server1" in str(refused.value.hint)
            assert "bravo@server2" in str(refused.value.hint)

            ident = await one.send(alpha, "bravo@server2")
            await one.call(alpha, "wait_state", id=ident, timeout_ms=30_000)
            assert await two.titles(there) == ["a text"]

    asyncio.run(scenario())


def test_a_name_at_a_known_node_is_taken_and_comes_back_dead_if_there_is_none() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha = await one.act_as("alpha")
            sent = await one.call(alpha, "send", to=["nobody@server2"], body="is there anybody?")
            assert states(sent) == ["queued"]
            await until(lambda: _is_dead(one, alpha, sent["id"]))
            assert await _reasons(one, sent["id"]) == ["no-such-callsign"]
            assert states(await one.call(alpha, "wait_state", id=sent["id"])) == ["dead"]

            by_id = await one.call(alpha, "send", to=[f"nobody@{two.node.node_id[:8]}"], body="x")
            assert by_id["recipients"][0]["address"] == "nobody@server2"

            here = await one.call(alpha, "send", to=["nobody@server1"], body="x")
            assert states(here) == ["dead"]
            assert here["warnings"] == ["nobody is called nobody at server1"]

    asyncio.run(scenario())


def test_an_unknown_node_a_group_and_an_empty_mesh_are_refused() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha = await one.act_as("alpha")
                for address in ("bravo@server9", "@server9"):
                    with pytest.raises(UnknownAddress, match="no node is called 'server9'"):
                        await one.send(alpha, address)
                with pytest.raises(UnknownAddress, match="nobody else"):
                    await one.send(alpha, "all")
                with pytest.raises(InvalidBrief, match="groups are not available"):
                    await one.send(alpha, "#ops")
                with pytest.raises(InvalidBrief, match="for nobody"):
                    await one.call(alpha, "send", body="x")
                with pytest.raises(InvalidBrief, match="malformed"):
                    await one.send(alpha, "no such@@thing")

    asyncio.run(scenario())


# ---- what may be sent ----


def test_what_is_no_brief_is_refused_and_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha, bravo = await one.act_as("alpha"), await one.act_as("bravo")
                with pytest.raises(InvalidBrief, match="title is empty"):
                    await one.call(alpha, "send", to=["bravo"], body="x", title="  ")
                with pytest.raises(InvalidBrief, match="at most"):
                    await one.call(alpha, "send", to=["bravo"], body="x" * 2_000_000)
                with pytest.raises(InvalidBrief):
                    await one.call(alpha, "send", markdown="---\nto: [bravo\n---\ntext")
                with pytest.raises(TooLarge, match="bytes"):  # every character is two on the wire
                    await one.call(alpha, "send", to=["bravo"], title="t", body="\n" * 900_000)
                with pytest.raises(InvalidInput, match="no such verb"):
                    await one.call(alpha, "shout")
                for wrong in ({"limit": -1}, {"limit": "many"}, {"all": "yes"}, {"since": "yesterday"}):
                    with pytest.raises(InvalidInput):
                        await one.call(bravo, "inbox", **wrong)
                assert (await one.call(bravo, "inbox", all=True))["total"] == 0
                assert (await one.call(None, "status"))["store"]["briefs"] == 0

    asyncio.run(scenario())


def test_a_file_goes_out_with_its_frontmatter_and_comes_back_as_one() -> None:
    text = (
        "---\ntitle: Deploy Blocker — DB Migration\nto: bravo\ncc: alpha\npriority: high\nproject: shop\n"
        "due: 2026-04-01\nttl: 2d\nintent: ask\ntags: [db]\naction: Review the migration\nMood: calm\n---\n"
        "The migration adds a column.\n- [ ] @bravo fix the lock !urgent\n"
    )

    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await two.act_as("bravo")
            await until(lambda: one.knows("bravo"))
            ident = (await one.call(alpha, "send", markdown=text))["id"]
            await one.call(alpha, "wait_state", id=ident, timeout_ms=30_000)

            brief = await two.call(bravo, "read", id=ident, raw=True)
            assert brief["to"] == ["bravo@server2", "alpha@server1"]
            assert [(each["number"], each["text"], each["priority"]) for each in brief["actions"]] == [
                (1, "Review the migration", "high"),
                (2, "fix the lock", "urgent"),
            ]
            assert {each["due"] for each in brief["actions"]} == {"2026-04-01"}
            for line in (
                "from: alpha (server1)",
                "to: bravo (server2)",
                "cc: alpha (server1)",
                "ttl: 2d",
                "Mood: calm",
            ):
                assert line in brief["markdown"].splitlines()
            assert brief["markdown"].endswith(brief["body"])

    asyncio.run(scenario())


def test_ids_may_be_shortened_from_the_front_and_say_when_that_is_not_enough() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await two.act_as("bravo")
            await until(lambda: one.knows("bravo"))
            ident = await one.send(alpha, "bravo")
            await one.call(alpha, "wait_state", id=ident, timeout_ms=30_000)

            assert (await two.call(bravo, "read", id=ident[-6:].upper()))["id"] == ident
            assert (await one.call(alpha, "read", id=ident[-8:]))["state"] == "read"  # its sender, too
            with pytest.raises(InvalidInput, match="not an id"):
                await two.call(bravo, "read", id=ident[-5:])
            with pytest.raises(NotFound):
                await two.call(bravo, "read", id=NO_SUCH_ID)
            with pytest.raises(NotFound):  # somebody else's
                await two.call(await two.act_as("charlie"), "read", id=ident)

            # Another brief whose id ends alike, as one in sixteen million does.
            twin = f"01a1fd3a-0000-7000-8000-000000{ident[-6:]}"
            letter = wire.decode_letter(
                json.dumps(
                    {
                        "from": "alpha",
                        "sent_ms": 1,
                        "to": [["bravo", two.node.node_id, "to"]],
                        "draft": {"title": "twin"},
                    }
                ).encode()
            )
            await one.node.publish(
                wire.BRIEF, wire.encode_letter(letter), to=[two.node.node_id], message_id=twin
            )
            await until(lambda: _has_unread(two, bravo))
            with pytest.raises(AmbiguousId) as refused:
                await two.call(bravo, "read", id=ident[-6:])
            assert ident in str(refused.value.hint)
            assert twin in str(refused.value.hint)

    asyncio.run(scenario())


def test_the_inbox_is_newest_first_counts_before_it_cuts_and_filters() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo, charlie = (
                await one.act_as("alpha"),
                await one.act_as("bravo"),
                await two.act_as("charlie"),
            )
            await until(lambda: two.knows("alpha", "bravo"))
            for number in range(25):
                await one.send(alpha, "bravo", body=f"brief {number}")
            last = await two.send(charlie, "bravo", body="from afar")
            await two.call(charlie, "wait_state", id=last, timeout_ms=30_000)

            listed = await one.call(bravo, "inbox")
            assert (listed["total"], len(listed["briefs"])) == (26, 20)
            assert [each["title"] for each in listed["briefs"][:3]] == ["from afar", "brief 24", "brief 23"]
            assert len((await one.call(bravo, "inbox", limit=0))["briefs"]) == 26
            assert await one.titles(bravo, from_="charlie") == ["from afar"]
            assert await one.titles(bravo, from_="@server2") == ["from afar"]
            assert await one.titles(bravo, from_="charlie@server1") == []
            assert await one.titles(bravo, since="2030-01-01") == []
            assert (await one.call(bravo, "inbox", since="1h"))["total"] == 26

            counted = await one.call(bravo, "check")
            assert counted["by_sender"] == {"alpha@server1": 25, "charlie@server2": 1}

    asyncio.run(scenario())


# ---- what others send ----


@pytest.mark.parametrize(
    "body",
    [
        b"\xff not JSON",
        b"[]",
        b"{}",
        b'{"from":"alpha","sent_ms":1,"to":[["bravo"]],"draft":{"title":"x"}}',
        b'{"from":"Not A Name","sent_ms":1,"to":[],"draft":{"title":"x"}}',
        b'{"from":"alpha","sent_ms":-5,"to":[],"draft":{"title":"x"}}',
        b'{"from":"alpha","sent_ms":1,"to":[],"draft":{"title":""}}',
        b'{"from":"alpha","sent_ms":1,"to":[],"draft":{"title":"\\ud800"}}',
        b'{"from":"alpha","sent_ms":1,"to":[],"draft":{"title":"x","extra":{"a":'
        + b"[" * 300
        + b"]" * 300
        + b"}}}",
    ],
)
def test_a_brief_that_cannot_be_read_comes_back_dead_and_stops_nobody(body: bytes) -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await two.act_as("bravo")
            await until(lambda: one.knows("bravo"))
            await one.node.publish(wire.BRIEF, body, to=[two.node.node_id])
            await one.node.publish(wire.RECEIPT, body, to=[two.node.node_id])
            ident = await one.send(alpha, "bravo", body="after it")
            await one.call(alpha, "wait_state", id=ident, timeout_ms=30_000)

            assert await two.titles(bravo) == ["after it"]
            assert two.office.refused[wire.BRIEF] == 1

    asyncio.run(scenario())


def test_a_node_cannot_speak_for_another_or_about_briefs_it_never_got() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, _ = await one.act_as("alpha"), await one.act_as("bravo")
            ident = await one.send(alpha, "bravo")
            forged = wire.Receipt(brief=ident, callsign="bravo", state="read", at_ms=1)
            unknown = wire.Receipt(brief=NO_SUCH_ID, callsign=None, state="dead", at_ms=1)
            await two.node.publish(
                wire.RECEIPT, wire.encode_receipts([forged, unknown]), to=[one.node.node_id]
            )
            # The next message of that node is behind it, so the receipts have been taken in.
            charlie = await two.act_as("charlie")
            await until(lambda: two.knows("alpha"))
            await two.send(charlie, "alpha")
            await until(lambda: _has_unread(one, alpha))
            assert await _state(one, alpha, ident) == "delivered"

    asyncio.run(scenario())


def test_a_lifetime_that_is_over_ends_what_nobody_has_read() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await two.act_as("bravo")
            await until(lambda: one.knows("bravo"))
            short = await one.send(alpha, "bravo", body="soon over", ttl="1s")
            lasting = await one.send(alpha, "bravo", body="stays")
            await one.call(alpha, "wait_state", id=lasting, timeout_ms=30_000)

            async def is_over() -> bool:
                two.office.left("bravo")  # have the house kept now, not in fifteen seconds
                return await _state(one, alpha, short) == "expired"

            await until(is_over)
            assert await two.titles(bravo) == ["stays"]
            assert sorted(await two.titles(bravo, all=True)) == ["soon over", "stays"]

    asyncio.run(scenario())


# ---- who may ask what ----


def test_nobody_in_particular_may_look_at_the_mesh_but_has_no_mail() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                await one.act_as("alpha")
                assert await one.office.enter(a_script(), {"kind": "cli"}) is None
                for verb in ("roster", "status", "peers", "node-status"):
                    await one.call(None, verb)
                assert (await one.call(None, "status"))["inbox"] is None
                for verb in ("send", "reply", "check", "inbox", "read", "mark_read", "wait_state"):
                    with pytest.raises(NoIdentity) as refused:
                        await one.call(None, verb, id=NO_SUCH_ID, ids=[NO_SUCH_ID], body="x", to=["alpha"])
                    assert refused.value.hint == "say who you are: zmail --as NAME …"

    asyncio.run(scenario())


def test_the_roster_tells_of_every_node_and_of_what_waits_for_you() -> None:
    async def scenario() -> None:
        async with two_sites() as (one, two):
            alpha, bravo = await one.act_as("alpha"), await two.act_as("bravo")
            await until(lambda: one.knows("bravo") and two.knows("alpha"))
            first = await two.send(bravo, "alpha", body="first")
            await two.call(bravo, "wait_state", id=first, timeout_ms=30_000)
            await one.call(alpha, "read", id=first)
            last = await two.send(bravo, "alpha", body="second")
            await two.call(bravo, "wait_state", id=last, timeout_ms=30_000)

            told = await one.call(alpha, "roster")
            assert [(each["name"], each["state"]) for each in told["nodes"]] == [
                ("server1", "alive"),
                ("server2", "alive"),
            ]
            mine, theirs = told["callsigns"]
            assert (mine["callsign"], mine["node"], mine["unread"], mine["read_coverage"]) == (
                "alpha",
                "server1",
                1,
                0.5,
            )
            assert (theirs["callsign"], theirs["node"], theirs["pending_for_you"]) == ("bravo", "server2", 1)
            assert theirs["unread"] is None  # only its own node knows
            assert set(mine) == {
                "callsign",
                "node",
                "project",
                "state",
                "last_seen",
                "unread",
                "read_coverage",
                "door",
                "pending_for_you",
            }

    asyncio.run(scenario())


def test_a_code_works_once_and_a_wrong_one_changes_nothing() -> None:
    async def scenario() -> None:
        with homes(3) as (first, second, third):
            async with (
                site("server1", first) as one,
                site("server2", second) as two,
                site("server3", third) as three,
            ):
                made = await one.call(None, "invite", ttl="10m")
                assert set(made) == {"code", "expires_at"}
                with pytest.raises(InvalidInput):
                    await two.call(None, "join", code=made["code"][:-4] + "AAAA")
                joined = await two.call(None, "join", code=made["code"])
                assert joined["node"] == "server1"
                with pytest.raises(PairingRefused):
                    await three.call(None, "join", code=made["code"])
                assert [each["name"] for each in (await one.call(None, "peers"))["peers"]] == ["server2"]
                assert (await three.call(None, "peers"))["peers"] == []

    asyncio.run(scenario())


def test_waiting_for_a_state_ends_with_the_time_and_only_for_ones_own_briefs() -> None:
    async def scenario() -> None:
        with homes(1) as (home,):
            async with site("server1", home) as one:
                alpha, bravo = await one.act_as("alpha"), await one.act_as("bravo")
                ident = await one.send(alpha, "bravo")
                with pytest.raises(TimedOut):
                    await one.call(alpha, "wait_state", id=ident, state="read", timeout_ms=1)
                with pytest.raises(NotFound):
                    await one.call(bravo, "wait_state", id=ident)
                with pytest.raises(InvalidInput):
                    await one.call(alpha, "wait_state", id=ident, state="done")

                waiting = asyncio.create_task(
                    one.call(alpha, "wait_state", id=ident, state="read", timeout_ms=30_000)
                )
                await one.call(bravo, "mark_read", ids=[ident])
                assert states(await waiting) == ["read"]

    asyncio.run(scenario())


# ---- pieces ----


async def _has_unread(where: Site, who: Caller) -> bool:
    return bool((await where.call(who, "check"))["unread"])


async def _state(where: Site, who: Caller, ident: str) -> str:
    return str((await where.call(who, "read", id=ident, peek=True))["state"])


async def _is_dead(where: Site, who: Caller, ident: str) -> bool:
    return await _state(where, who, ident) == "dead"


async def _reasons(where: Site, ident: str) -> list[str | None]:
    def reasons(_: object) -> list[str | None]:
        brief = Brief.get(Brief.id == ident)
        return [each.reason for each in Recipient.select().where(Recipient.brief == brief.row)]

    return await where.node.read(reasons)


async def _is_acked(where: Site, ident: str) -> bool:
    def outbox(db: Database) -> bool:
        query = "SELECT 1 FROM outbox WHERE msg_id = ? AND state = 1"
        return bool(db.execute_sql(query, (id_to_bytes(ident),)).fetchall())  # type: ignore[no-untyped-call]

    return await where.node.read(outbox)
