"""The protocol core under random faults, and the proof that the simulator would see a bug.

More, and one seed with all that happens in it: `python -m tests.simulate --help`.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from broker_free.limits import Limits
from broker_free.message import Envelope, Message
from broker_free.testing import SMALL, Cluster, Faults, SimJournal, SimNode
from broker_free.tick import Outcome, Publish, Tick, Tx, Work
from tests.conftest import ROOT
from tests.simulate import BUGS, Bug, quiet, run_seed, search, without_gc
from tests.version1 import Tick1

AS_IT_IS = Bug(name="none")
PROCESSES = min(2, os.cpu_count() or 1)

# Bug -> seeds within which the simulator must find it: about ten times what it takes on average.
CAUGHT_WITHIN = {
    "no-dedup": 600,
    "stale-ack": 7_000,
    "no-gap-check": 5_000,
    "prefix-resync": 2_500,
    "ack-before-commit": 50,
    "two-sessions": 1_000,
    "early-from-inside": 600,
    "new-before-backlog": 300,
    "cancel-without-asking": 1_000,
    "answer-before-arrivals": 4_000,
    "no-regression-check": 300,
    "id-without-row": 8_000,
    "marks-outlive-session": 2_500,
    "last-ack-not-highest": 5_000,
}

# What a schedule is made of. Every kind must happen in any 200 of them, or the promise is held against nothing.
EXERCISED = {
    "frame dropped",
    "frame of an old connection",
    "frame by the second path",
    "passed on under the same id",
    "duplicate recognised",
    "both dialled at once",
    "session lost",
    "one path cut off",
    "parted",
    "StoreFailed raised",
    "OutcomeUnknown raised",  # a send whose commit failed after it had left
    "effect failed",
    "effect tried again",
    "crash at send",
    "crash at before-commit",
    "crash at after-commit",
    "crash at rest",
    "crash with work waiting",
    "clock jumped back",
    "clock jumped forward",
    "sender's store went back",
    "recipient's store went back",
    "regression found",
    "registry written",
    "message expired",
    "message cancelled",
    "credit withheld",
}


def test_no_schedule_breaks_a_promise() -> None:
    assert search(0, 14_000, processes=PROCESSES) is None


def test_no_schedule_breaks_a_promise_when_stores_go_back_in_time() -> None:
    assert search(0, 6_000, rollback=True, processes=PROCESSES) is None


def test_every_rule_that_can_be_left_out_has_a_bound() -> None:
    assert list(CAUGHT_WITHIN) == list(BUGS)


@pytest.mark.parametrize("name", CAUGHT_WITHIN)
def test_a_rule_left_out_is_found_by_chance(name: str) -> None:
    bug, within = BUGS[name], CAUGHT_WITHIN[name]
    found = search(0, within, rollback=bug.needs_rollback, bug=bug, profile=bug.profile, processes=PROCESSES)
    assert found is not None, f"{name} has to show within {within} seeds"
    print(f"{name}: {found.seed + 1} of at most {within} seeds, {found.what}")


def test_two_hundred_schedules_of_five_nodes_meet_every_kind_of_fault() -> None:
    faults = Faults(rollback=0.1, backup=0.1, disaster=0.2, detour=0.1)
    counts: Counter[str] = Counter()
    with quiet():
        for seed in range(200):
            cluster = Cluster(seed, nodes=5, faults=faults)
            cluster.chaos(ms=3_000, operations=15)
            cluster.heal()
            cluster.check()
            counts += cluster.counts
    print(counts)
    assert not EXERCISED - set(counts)


def test_a_seed_replays_the_same_schedule_in_another_process() -> None:
    def trace(hash_seed: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "tests.simulate", "--seed", "4711", "--rollback", "--profile", "mesh"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    first = trace("1")
    assert first == trace("2")
    assert len(first.splitlines()) > 100


class EveryLink(Tick):
    """Visit every link at every tick."""

    def run(self, work: Sequence[Work]) -> Outcome:
        for peer in self.links:
            self._stirred.add(peer)
        return super().run(work)


def test_a_tick_that_visits_only_links_with_something_to_do_does_what_visiting_all_would() -> None:
    for seed in range(100):
        traces: list[list[str]] = [[], []]
        for bug, trace in zip((AS_IT_IS, replace(AS_IT_IS, tick=EveryLink)), traces, strict=True):
            run_seed(seed, rollback=seed % 2 == 0, bug=bug, trace=trace.append)
        assert traces[0] == traces[1], seed


def until(cluster: Cluster, condition: Callable[[], object]) -> bool:
    """Run until the condition holds; False when it does not within a second."""
    for _ in range(1_000):
        if condition():
            return True
        cluster.run(1)
    return False


def test_a_system_of_ones_own_runs_on_a_cluster() -> None:
    def confirm(tx: Tx, envelope: Envelope) -> None:
        tx.publish("orders.confirmed", envelope.body, to=[envelope.sender])

    with quiet():
        for seed in range(20):
            cluster = Cluster(seed, nodes=3)
            cluster.effect("orders.created", confirm)
            cluster.run(500)
            for number in range(3):
                cluster.publish("n0", "orders.created", b"%d" % number, to=["n1", "n2"])
            cluster.crash("n1", restart_ms=100)
            cluster.part("n0", "n2", for_ms=200)
            cluster.heal()
            cluster.check()
            confirmed = [(row.sender, row.body) for row in cluster.inbox("n0")]
            assert sorted(confirmed) == [
                (peer, b"%d" % number) for peer in ("n1", "n2") for number in range(3)
            ]


@pytest.mark.parametrize("jump_ms", [-6 * 3_600_000, 6 * 3_600_000])
def test_a_lifetime_is_exact_within_a_second_over_jumps_of_either_clock(jump_ms: int) -> None:
    remaining: list[int | None] = []

    def note(tx: Tx, envelope: Envelope) -> None:
        remaining.append(envelope.ttl_ms)

    with quiet():
        for seed in range(10):
            cluster = Cluster(seed, nodes=2)
            cluster.effect("mail.x", note)
            assert until(cluster, lambda cluster=cluster: cluster.is_settled)
            cluster.part("n0", "n1", for_ms=60_000)
            in_time = cluster.publish("n0", "mail.x", b"", to=["n1"], ttl_ms=70_000)
            too_late = cluster.publish("n0", "mail.x", b"", to=["n1"], ttl_ms=59_000)
            cluster.run(100)
            for node in cluster.nodes.values():
                node.utc_skew_ms = jump_ms
            cluster.crash("n0", restart_ms=1_000)  # what was under way is lost: both are sent again
            cluster.run(80_000)
            states = {row.queued.id: row.state for row in cluster.nodes["n0"].journal.outbox.values()}
            assert states == {in_time: "delivered", too_late: "expired"}
            (left,) = remaining
            assert left is not None
            deadline_ms = cluster.nodes["n1"].journal.lifetimes[1]
            assert abs(deadline_ms - cluster.nodes["n0"].journal.outbox[1].expires_ms) <= 1_000
            remaining.clear()


def test_no_schedule_breaks_a_promise_between_this_version_and_the_one_before() -> None:
    with quiet():
        for seed in range(120):
            limits = (SMALL, Limits())[seed % 2]
            cluster = Cluster(seed, nodes=2 + seed % 2, limits=limits)
            cluster.nodes["n0"]._tick_type = Tick1
            cluster.chaos(ms=1_000, operations=12)
            cluster.heal()
            cluster.check()


def cloned(cluster: Cluster, name: str) -> SimNode:
    """Start a second node on a copy of a node's store. It can only dial out."""
    original = cluster.nodes[name]
    copy = SimNode(
        name,
        timeline=cluster._timeline,
        network=cluster._network,
        random=cluster.random,
        limits=original.limits,
        journal=SimJournal(name, limits=original.limits),
        tick=Tick,
    )
    copy.journal.restore(original.journal.snapshot())
    copy.members = list(original.members)
    copy.start()
    return copy


@pytest.mark.parametrize("seed", range(10))
def test_two_live_copies_of_one_node_do_not_take_turns_and_everybody_is_told(seed: int) -> None:
    alarms: dict[int, list[str]] = {}
    superseded: list[str] = []

    def note(node: SimNode, outcome: Outcome) -> None:
        alarms.setdefault(id(node), []).extend(alarm.kind for alarm in outcome.alarms)
        if node.name == "n0":
            superseded.extend(reason for _, reason in outcome.lost if reason == "superseded")

    with quiet():
        cluster = Cluster(seed, nodes=2)
        assert until(cluster, lambda: cluster.is_settled)
        hub, original = cluster.nodes["n0"], cluster.nodes["n1"]
        copy = cloned(cluster, "n1")
        for node in (hub, original, copy):
            node.finished = note
        sent: dict[int, list[str]] = {id(original): [], id(copy): []}
        for _ in range(40):
            for node in (original, copy):
                message = Message(id=cluster.new_id(), subject="mail.x", body=b"")
                node.submit(Publish(message, ["n0"]))
                sent[id(node)].append(message.id)
            cluster.run(3_000)
        arrived = [row.id for row in cluster.inbox("n0")]
        assert len(arrived) == len(set(arrived))
        assert len(superseded) <= 5, "in two minutes; taking turns would be one for each dial"
        for ids in sent.values():
            mine = [one for one in arrived if one in ids]
            assert mine == ids[: len(mine)], "in order, and nothing left out"
        assert any(set(ids) <= set(arrived) for ids in sent.values()), "one of them is served all the time"
        assert all("clone" in alarms[id(node)] for node in (hub, original, copy))


def test_a_closed_cluster_leaves_little_to_the_garbage_collector() -> None:
    left = []
    for is_closed in (False, True):
        gc.collect()
        with without_gc():
            cluster = run_seed(1)
            if is_closed:
                cluster.close()
            del cluster
            left.append(gc.collect())
    assert left[1] < left[0] / 2
