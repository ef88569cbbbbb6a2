"""The simulator's oracle, held against worlds in which one promise was broken by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from broker_free import frames
from broker_free.frames import Frame
from broker_free.testing import Cluster, SimNode, Violation

FIRST, SECOND = "00000000-0000-7000-8000-0000000000f1", "00000000-0000-7000-8000-0000000000f2"


def healthy() -> Cluster:
    """Two messages from n0 to n1, delivered; nothing else."""
    cluster = Cluster(1, nodes=3)
    cluster.run(500)
    for message_id in (FIRST, SECOND):
        cluster.publish("n0", "mail.x", message_id.encode(), to=["n1"], message_id=message_id)
        cluster.run(500)
    cluster.heal()
    cluster.check()
    return cluster


def row_of(node: SimNode, message_id: str) -> int:
    return next(number for number, row in node.journal.inbox.items() if row.id == message_id)


def lose_a_message(cluster: Cluster) -> None:
    journal = cluster.nodes["n1"].journal
    del journal.inbox[journal.known.pop(("n0", FIRST))]


def store_it_twice(cluster: Cluster) -> None:
    inbox = cluster.nodes["n1"].journal.inbox
    inbox[max(inbox) + 1] = inbox[row_of(cluster.nodes["n1"], FIRST)]


def swap_two(cluster: Cluster) -> None:
    inbox = cluster.nodes["n1"].journal.inbox
    first, second = (row_of(cluster.nodes["n1"], message_id) for message_id in (FIRST, SECOND))
    inbox[first], inbox[second] = inbox[second], inbox[first]


def change_a_byte(cluster: Cluster) -> None:
    inbox = cluster.nodes["n1"].journal.inbox
    row = row_of(cluster.nodes["n1"], FIRST)
    inbox[row] = inbox[row]._replace(body=b"another")


def invent_one(cluster: Cluster) -> None:
    inbox = cluster.nodes["n1"].journal.inbox
    inbox[max(inbox) + 1] = inbox[row_of(cluster.nodes["n1"], FIRST)]._replace(id=FIRST[:-1] + "9")


def leave_one_queued(cluster: Cluster) -> None:
    outbox = cluster.nodes["n0"].journal.outbox
    row = next(iter(outbox))
    outbox[row] = outbox[row]._replace(state="queued")


def declare_one_dead(cluster: Cluster) -> None:
    outbox = cluster.nodes["n0"].journal.outbox
    row = next(iter(outbox))
    outbox[row] = outbox[row]._replace(state="dead", reason="no reason")


def forget_one(cluster: Cluster) -> None:
    outbox = cluster.nodes["n0"].journal.outbox
    del outbox[next(iter(outbox))]


def end_a_session_at_one_side(cluster: Cluster) -> None:
    tick = cluster.nodes["n0"].tick
    assert tick is not None
    tick.links["n1"]._session = None


def keep_an_entry_from_the_others(cluster: Cluster) -> None:
    cluster.transact("n0", lambda tx: tx.registry_put("b", "k", {"v": 1}))
    cluster.heal()
    cluster.run(1_000)
    tick = cluster.nodes["n2"].tick
    assert tick is not None
    tick.registry.drop([("b", "k")])


@pytest.mark.parametrize(
    ("breaks", "invariant"),
    [
        (lose_a_message, "I1"),
        (declare_one_dead, "I1"),
        (store_it_twice, "I2"),
        (swap_two, "I3"),
        (change_a_byte, "I5"),
        (invent_one, "I5"),
        (leave_one_queued, "I6"),
        (end_a_session_at_one_side, "I6"),
        (forget_one, "I10"),
        (keep_an_entry_from_the_others, "registry"),
    ],
)
def test_the_oracle_sees_each_promise_broken(breaks: Callable[[Cluster], None], invariant: str) -> None:
    cluster = healthy()
    breaks(cluster)
    with pytest.raises(Violation) as caught:
        cluster.check()
    assert caught.value.invariant == invariant


def data_and_ack(cluster: Cluster) -> tuple[Frame, Frame]:
    meta = f'{{"id":"{FIRST[:-1]}9","subject":"mail.x"}}'.encode()
    data = frames.data_frame(session=77, seq=1, lane=0, records=[(meta, b"")])
    return data, Frame(kind=frames.ACK, session=77, seq=1)


def test_the_oracle_sees_an_ack_for_what_is_not_on_disk() -> None:
    cluster = healthy()
    n0, n1 = cluster.nodes["n0"], cluster.nodes["n1"]
    data, ack = data_and_ack(cluster)
    cluster.oracle.saw(n0, n1, data)
    with pytest.raises(Violation, match="without a row") as caught:
        cluster.oracle.saw(n1, n0, ack)
    assert caught.value.invariant == "I4"


def test_the_oracle_sees_a_resync_that_claims_what_is_not_there() -> None:
    cluster = healthy()
    n0, n1 = cluster.nodes["n0"], cluster.nodes["n1"]
    with pytest.raises(Violation) as caught:
        cluster.oracle.saw(n1, n0, Frame(kind=frames.READY, session=77, meta={"have": [(0, 99)]}))
    assert caught.value.invariant == "I4"


def test_the_oracle_sees_a_caller_who_was_told_too_much() -> None:
    cluster = healthy()
    with pytest.raises(Violation) as caught:
        cluster.oracle.delivered(cluster.nodes["n0"], FIRST, "n2")
    assert caught.value.invariant == "I10"
    with pytest.raises(Violation) as caught:
        cluster.oracle.returned(cluster.nodes["n0"], FIRST, ["n2"])
    assert caught.value.invariant == "I1"


def test_the_oracle_sees_an_effect_that_left_two_traces_or_none() -> None:
    cluster = Cluster(3, nodes=2)
    cluster.faults = replace(cluster.faults, effect_failure=0)
    cluster.chaos(ms=0, operations=0)
    cluster.run(500)
    cluster.publish("n0", "relay.x", b"n0", to=["n1"])
    cluster.run(500)
    cluster.heal()
    cluster.check()
    (trace,) = cluster.oracle.traces
    answered = cluster.oracle.traces.pop(trace)
    with pytest.raises(Violation, match="ran 0 times"):
        cluster.check()
    cluster.oracle.traces[trace] = answered
    cluster.nodes["n1"].journal.history.append(cluster.nodes["n1"].journal.history[-1])
    with pytest.raises(Violation, match="ran 2 times"):
        cluster.oracle.check_effects("relay")
