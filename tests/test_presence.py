"""Who is there: what silence, vouchers and claims come to; a thousand virtual nodes against the theory; real nodes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from broker_free import Node
from broker_free.errors import InvalidInput
from broker_free.limits import Limits
from broker_free.presence import Action, Changed, Presence, Tell, decode, encode
from tests.nodes import pair, run, until
from tests.swim import VirtualMesh, measure

LIMITS = Limits()
LARGE = replace(LIMITS, beat_members_max=1)


def made(*peers: str, limits: Limits = LIMITS, incarnation: int = 100) -> Presence:
    """A node that has just heard each of its peers."""
    presence = Presence(limits, me="me", random=Random(1), incarnation=incarnation)
    for peer in peers:
        presence.add(peer)
        presence.heard(peer, 0, incarnation=100)
    return presence


def states(actions: list[Action]) -> list[tuple[str, str]]:
    return [(action.peer, action.state) for action in actions if isinstance(action, Changed)]


def told(actions: list[Action], key: str) -> list[str]:
    return [action.peer for action in actions if isinstance(action, Tell) and key in action.message]


def ticks(presence: Presence, until_ms: int) -> list[tuple[int, Action]]:
    """Let time pass, as a node does: wake when presence wants to."""
    done: list[tuple[int, Action]] = []
    while presence.next_wake_ms() <= until_ms:
        now_ms = presence.next_wake_ms()
        done += [(now_ms, action) for action in presence.tick(now_ms)]
    return done


# Small meshes ---------------------------------------------------------------------------------------------------


def test_a_peer_never_heard_is_down() -> None:
    presence = Presence(LIMITS, me="me", random=Random(1), incarnation=1)
    presence.add("p")
    assert presence.state("p") == "down"
    assert states(presence.heard("p", 5)) == [("p", "alive")]


def test_a_silent_peer_is_suspect_at_six_seconds_down_at_fifteen_and_alive_at_its_next_word() -> None:
    presence = made("p")
    changes = [(ms, action.state) for ms, action in ticks(presence, 60_000) if isinstance(action, Changed)]
    assert changes == [(6_000, "suspect"), (15_000, "down")]
    assert states(presence.heard("p", 60_000)) == [("p", "alive")]


def test_a_silent_peer_is_asked_itself_and_through_three_others_before_it_is_suspect() -> None:
    presence = made("p", "a", "b", "c", "d")
    for other in "abcd":
        presence.heard(other, 4_000)
    presence.tick(0)
    actions = presence.tick(4_000)
    assert (told(actions, "ping"), len(told(actions, "ask")), states(actions)) == (["p"], 3, [])


def test_a_peer_that_only_others_hear_stays_alive_without_turning_to_and_fro() -> None:
    """One direction of the network is broken: a blackhole route."""
    presence = made("p", "a", "b", "c")
    turned: list[tuple[str, str]] = []
    for now_ms in range(0, 120_000, 100):
        for other in "abc":
            turned += states(presence.heard(other, now_ms))
        if now_ms >= presence.next_wake_ms():
            for action in presence.tick(now_ms):
                if isinstance(action, Tell) and "ask" in action.message:
                    vouched = {"ack": action.message["nonce"], "about": "p", "inc": 100}
                    turned += states(presence.receive(action.peer, vouched, now_ms + 5))
                elif isinstance(action, Changed):
                    turned.append((action.peer, action.state))
    assert turned == []
    assert presence.state("p") == "alive"


def test_a_node_asked_for_another_tries_it_and_answers_once_it_hears_it() -> None:
    presence = made("asker", "target")
    actions = presence.receive("asker", {"ask": "target", "nonce": 7}, 1_000)
    assert told(actions, "ping") == ["target"]
    actions = presence.heard("target", 1_020)
    assert [(action.peer, action.message["ack"], action.message["about"]) for action in actions] == [  # type: ignore[union-attr]
        ("asker", 7, "target")
    ]
    assert presence.heard("target", 1_040) == []


def test_a_question_that_nobody_answers_is_forgotten() -> None:
    presence = made("asker", "target")
    presence.receive("asker", {"ask": "target", "nonce": 7}, 1_000)
    presence.tick(1_000 + LIMITS.pong_timeout_ms)
    assert told(presence.heard("target", 9_000), "ack") == []


def test_a_node_that_was_itself_suspended_does_not_declare_the_others_gone() -> None:
    presence = made("p")
    presence.tick(0)
    presence.lagged(20_000, 20_000)
    assert states(presence.tick(20_000)) == []
    presence.heard("p", 20_500)
    assert states([action for _, action in ticks(presence, 26_000)]) == []


def test_a_stretched_time_out_ends() -> None:
    presence = made("p")
    presence.lagged(20_000, 20_000)
    changes = [action.state for _, action in ticks(presence, 400_000) if isinstance(action, Changed)]
    assert changes == ["suspect", "down"]


# Large meshes ---------------------------------------------------------------------------------------------------


def test_a_member_that_answers_neither_a_ping_nor_three_others_is_suspect_then_down() -> None:
    presence = made("p", limits=LARGE)
    for other in "abc":
        presence.add(other)
    done = ticks(presence, 60_000)
    first = next(ms for ms, action in done if isinstance(action, Tell) and "ping" in action.message)
    turned = [(action.state, ms) for ms, action in done if isinstance(action, Changed) and action.peer == "p"]
    assert [state for state, _ in turned] == ["suspect", "down"]
    assert turned[0][1] - first <= 5 * LARGE.heartbeat_ms
    assert turned[1][1] - turned[0][1] >= LARGE.down_after_ms - LARGE.suspect_after_ms


def test_a_member_that_hears_of_its_suspicion_refutes_it_with_a_higher_incarnation() -> None:
    presence = made("p", "q", limits=LARGE)
    presence.receive("p", {"news": [["me", 1, 100]]}, 10)
    assert presence.incarnation == 101
    (answer,) = (one for one in presence.receive("q", {"ping": 1}, 20) if isinstance(one, Tell))
    assert ("me", 0, 101) in [tuple(item) for item in answer.message["news"]]


def test_the_later_incarnation_counts_then_the_worse_claim() -> None:
    presence = made("p", "q", limits=LARGE)
    now_ms = LARGE.suspect_after_ms  # so long that its own ears are no evidence any more

    def claim(rank: int, incarnation: int) -> str:
        presence.receive("q", {"news": [["p", rank, incarnation]]}, now_ms)
        return presence.state("p")

    assert claim(1, 100) == "suspect"
    assert claim(0, 100) == "suspect"  # a claim that is older than the suspicion
    assert claim(0, 101) == "alive"
    assert claim(2, 100) == "alive"
    assert claim(2, 101) == "down"
    assert claim(1, 102) == "down"  # worse has been concluded already
    assert claim(0, 103) == "alive"


def test_own_ears_are_believed_before_a_claim() -> None:
    presence = made("p", "q", limits=LARGE)
    presence.heard("p", 5_000)
    presence.receive("q", {"news": [["p", 2, 100]]}, 6_000)
    assert presence.state("p") == "alive"


def test_news_is_told_a_bounded_number_of_times() -> None:
    presence = made("p", "q", limits=LARGE)
    presence.receive("q", {"news": [["p", 2, 100]]}, 10_000)
    answers = [presence.receive("q", {"ping": n}, 10_000) for n in range(100)]
    repeated = [a for actions in answers for a in actions if isinstance(a, Tell) and a.message["news"]]
    assert 0 < len(repeated) < 20


def test_whoever_asks_for_the_roll_is_told_of_everybody() -> None:
    presence = made("p", "q", limits=LARGE)
    (answer,) = presence.receive("p", {"roll": True}, 10)
    assert isinstance(answer, Tell)
    assert {item[0]: item[1] for item in answer.message["news"]} == {"p": 0, "q": 0, "me": 0}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"news": 1}',
        b'{"news": [[1, 0, 1]]}',
        b'{"news": [["p", 3, 1]]}',
        b'{"news": [["p", 0, -1]]}',
        b'{"news": [["p", 0, 9007199254740992]]}',
        b'{"ack": 1, "about": "p", "inc": 9007199254740992}',
        b'{"ack": 1, "about": "p", "inc": "x"}',
        b'{"news": [["p", 0, 1], ["p", 0, 1], ["p", 0, 1]]}',
        b"[" * 50_000,
    ],
)
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode(body, peers_max=1)


def test_a_message_survives_the_wire_and_unknown_keys_are_left_alone() -> None:
    presence = made("p", limits=LARGE)
    assert presence.receive("p", decode(b'{"later": [1]}', peers_max=9), 10) == []
    ping = next(action for _, action in ticks(presence, 10_000) if isinstance(action, Tell))
    assert decode(encode(ping.message), peers_max=9)["ping"] == ping.message["ping"]


def test_a_thousand_nodes_find_the_dead_as_fast_as_the_theory_says_and_nobody_else() -> None:
    found = measure(1_000, loss=0.01, kills=50, quiet_s=20)
    print(found)
    assert found.unknown == 0
    assert found.false_downs == 0
    assert found.messages_each_second == pytest.approx(found.messages_each_second_theory, rel=0.1)
    assert found.suspected_mean_ms == pytest.approx(found.suspected_mean_theory_ms, rel=0.3)
    assert found.suspicions_each_period < 0.1


def test_a_node_that_is_back_is_believed_again_by_everybody() -> None:
    mesh = VirtualMesh(100, seed=7, loss=0.05, limits=LIMITS)
    mesh.run(10_000)
    mesh.kill("n3")
    mesh.run(40_000)
    assert mesh.believed("n3") == {"down"}
    mesh.revive("n3")
    mesh.run(60_000)
    assert mesh.believed("n3") == {"alive"}


# Real nodes -----------------------------------------------------------------------------------------------------

FAST = replace(
    LIMITS, heartbeat_ms=200, suspect_after_ms=600, down_after_ms=1_500, probe_ack_ms=60, beat_members_max=3
)


def seen_by(node: Node) -> dict[str, str]:
    return {peer.name: peer.state for peer in node.peers()}


def test_nodes_of_a_mesh_too_large_for_beats_find_out_who_is_gone_and_who_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        nodes = [Node(name, home=tmp_path / name, limits=FAST) for name in "abcde"]
        for node in nodes:
            await node.start()
        for number, node in enumerate(nodes):
            for other in nodes[number + 1 :]:
                if other.node_id not in {peer.node_id for peer in node.peers()}:
                    await pair_once(node, other)
        everybody = {node.name for node in nodes}
        for node in nodes:
            await until(
                lambda node=node: seen_by(node) == dict.fromkeys(everybody - {node.name}, "alive"), 30
            )  # type: ignore[misc]
        gone = nodes.pop()
        await gone.close()
        for node in nodes:
            await until(lambda node=node: seen_by(node)["e"] == "down", 30)  # type: ignore[misc]
            assert {name for name, state in seen_by(node).items() if state != "alive"} == {"e"}
        back = Node("e", home=tmp_path / "e", limits=FAST)
        await back.start()
        nodes.append(back)
        for node in nodes:
            await until(lambda node=node: set(seen_by(node).values()) == {"alive"}, 30)  # type: ignore[misc]
        receipt = await nodes[0].publish("t.x", b"to the one that is back", to=[back.node_id])
        await receipt.delivered(timeout=20)
        await asyncio.gather(*(node.close() for node in nodes))

    run(main())


async def pair_once(inviting: Node, joining: Node) -> None:
    await joining.join((await inviting.invite()).encode())


def test_a_large_mesh_dials_only_whom_it_has_something_to_say_to_and_ends_idle_sessions(
    tmp_path: Path,
) -> None:
    limits = replace(FAST, beat_members_max=1, idle_sessions_max=0, session_idle_ms=100, heartbeat_ms=400)

    async def main() -> None:
        async with (
            Node("a", home=tmp_path / "a", limits=limits) as a,
            Node("b", home=tmp_path / "b", limits=limits) as b,
        ):
            await pair(a, b)
            for _ in range(3):
                await until(lambda: a.peers()[0].link == "closed" and b.peers()[0].link == "closed")
                receipt = await a.publish("t.x", b"over a new session", to=[b.node_id])
                await receipt.delivered(timeout=20)

    run(main())
