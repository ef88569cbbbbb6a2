"""Any sequence of calls, crashes and restarts, on the real store, against a plain dictionary.

Hypothesis makes the sequences: publishes, retries under the same id, transactions that write a row and publish (some
raise), failing commits, crashes at any moment or inside a tick, restarts, broken and parted links. The nodes are
simulated, their stores are SQLite files: a crash closes the file as it is and opens it again. What the calls promised
is in `Model`, a few dictionaries; in the end the files are compared with it (I1, I2, I3, I5, I9, I10), and acks at once
(I4).

pytest -m soak tests/test_store_machine.py       300 sequences of 40 steps, other ones each time
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker_free.message import Envelope, id_from_bytes, id_to_bytes
from broker_free.testing import Cluster, Faults, SimNode
from broker_free.tick import Outcome, Publish, Tick, Tx, Work
from tests.simulate import BUGS, quiet
from tests.test_simulation_on_sqlite import TwinJournal

NODES = ("n0", "n1", "n2")
CALM = Faults(**dict.fromkeys(Faults.__dataclass_fields__, 0.0))

nodes = st.sampled_from(NODES)
pairs = st.permutations(NODES).map(lambda some: (some[0], some[1]))
Calls_ = list[tuple[tuple[str, str], str, bytes]]
calls = st.lists(
    st.tuples(pairs, st.sampled_from(["publish", "publish", "transact", "raise"]), st.binary(max_size=8)),
    min_size=1,
    max_size=5,
)
soon = st.sampled_from([0, 1, 3, 10, 40])


class Asked(Exception):
    """What a transaction raises that was asked to raise."""


@dataclass(slots=True)
class Model:
    """What was asked for, what was answered, and what follows from it."""

    published: dict[str, tuple[str, str, bytes]] = field(
        default_factory=dict
    )  # id -> sender, recipient, body
    order: dict[tuple[str, str], list[str]] = field(
        default_factory=dict
    )  # ids as they were asked for, by pair
    returned: set[str] = field(default_factory=set)
    rows: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # of a transaction: key -> node, message id
    kept: set[str] = field(default_factory=set)  # keys whose transaction returned
    undone: set[str] = field(default_factory=set)  # keys whose transaction raised
    delivered: set[tuple[str, str]] = field(default_factory=set)  # id, recipient


class Calls(RuleBasedStateMachine):
    tick: type[Tick] = Tick

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.cleanup = ExitStack()
        self.cleanup.enter_context(quiet())
        # In memory where there is such a folder: a crash of a process needs no disk, and syncs would take the time.
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        folder = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory(prefix="bf-", dir=memory)))

        class Here(TwinJournal):
            pass

        Here.folder = folder
        self.journals = Here
        self.cluster: Cluster
        self.keys = 0

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        cluster = Cluster(seed, nodes=len(NODES), journal=self.journals, faults=CALM, tick=self.tick)
        self.cluster = cluster
        for name, node in cluster.nodes.items():
            twin = self.twin(name)
            self.cleanup.callback(self.close, twin)
            twin.meet(node.members, lambda subject, node=node: node.tick and node.tick.effects_of(subject))
            twin.real._conn.execute("CREATE TABLE written (key TEXT)")
            node.effects.append(("mail", self.note_at(name)))
            node.finished = self.listening(node.finished)
        cluster.run(500)  # all are up, and linked

    @staticmethod
    def close(twin: TwinJournal) -> None:
        twin.real.rollback()  # a violation may have ended things in the middle of a transaction
        twin.close()

    def twin(self, name: str) -> TwinJournal:
        twin = self.cluster.nodes[name].journal
        assert isinstance(twin, TwinJournal)
        return twin

    def write(self, name: str, key: str) -> None:
        self.twin(name).real._conn.execute("INSERT INTO written VALUES (?)", (key,))

    def note_at(self, name: str) -> Callable[[Tx, Envelope], None]:
        """The effect of a message: one row of the application, in the transaction that accepts it."""
        return lambda tx, envelope: self.write(name, f"arrived {envelope.id}")

    def listening(self, told: Callable[[SimNode, Outcome], None]) -> Callable[[SimNode, Outcome], None]:
        """Note what a node tells its callers."""

        def listen(node: SimNode, outcome: Outcome) -> None:
            for work, result in outcome.results:
                if isinstance(work, Publish):
                    self.model.returned.add(work.message.id)
                elif isinstance(result, str):
                    self.model.kept.add(result)
                    self.model.returned.add(self.model.rows[result][1])
            for message_id, peer in outcome.delivered:
                self.model.delivered.add((message_id, peer))
                assert message_id in self.held(peer), f"I4: {peer} acked {message_id} and does not hold it"
            asked: list[tuple[Work, BaseException]] = []
            for work, error in outcome.failures:
                if isinstance(error, Asked):
                    self.model.undone.add(str(error))
                else:
                    asked.append((work, error))
            outcome.failures[:] = asked
            told(node, outcome)

        return listen

    def held(self, name: str) -> list[str]:
        """The ids in a node's inbox, as its file has them, in the order of arrival."""
        rows = self.twin(name).real._conn.execute("SELECT msg_id FROM inbox ORDER BY row")
        return [id_from_bytes(raw_id) for (raw_id,) in rows]

    def is_up(self, name: str) -> bool:
        return self.cluster.nodes[name].is_up

    # -- what callers do ------------------------------------------------------------------------------------

    def note_published(self, message_id: str, sender: str, to: str, body: bytes) -> None:
        self.model.published[message_id] = sender, to, body
        self.model.order.setdefault((sender, to), []).append(message_id)

    def call(self, some: Calls_) -> None:
        """Do what callers do at once: with it under way the next fault comes."""
        for (sender, to), what, body in some:
            if not self.is_up(sender):
                continue
            if what == "publish":
                message_id = self.cluster.new_id()
                self.note_published(message_id, sender, to, body)
                self.cluster.publish(sender, "mail", body, to=[to], message_id=message_id)
            else:
                self.transact(sender, to, body, raises=what == "raise")

    @precondition(lambda self: self.model.published)
    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        """A caller that got no answer, or does not believe it, asks again under its own id."""
        message_id = data.draw(st.sampled_from(sorted(self.model.published)))
        sender, to, body = self.model.published[message_id]
        is_of_a_transaction = message_id in {mine for _, mine in self.model.rows.values()}
        if self.is_up(sender) and not is_of_a_transaction:
            self.cluster.publish(sender, "mail", body, to=[to], message_id=message_id)
            order = self.model.order[sender, to]
            if message_id in order and message_id not in self.model.returned:
                order.remove(message_id)  # its place is that of the first try, or of this one

    def transact(self, sender: str, to: str, body: bytes, *, raises: bool) -> None:
        self.keys += 1
        key, message_id = f"key {self.keys}", self.cluster.new_id()
        self.model.rows[key] = sender, message_id
        self.note_published(message_id, sender, to, body)

        def write(tx: Tx) -> str:
            self.write(sender, key)
            tx.publish("mail", body, to=[to], message_id=message_id)
            self.cluster.oracle.plain.discard(message_id)
            if raises:
                raise Asked(key)
            return key

        self.cluster.transact(sender, write)

    # -- what happens to them -------------------------------------------------------------------------------

    @rule(some=calls, ms=st.sampled_from([1, 5, 30, 200, 2_000]))
    def time_passes(self, some: Calls_, ms: int) -> None:
        self.call(some)
        self.cluster.run(ms)

    @rule(
        some=calls,
        ms=soon,
        name=nodes,
        restart_ms=st.sampled_from([1, 100, 1_000]),
        notice_ms=st.sampled_from([1, 100, 10_000]),
    )
    def crash(self, some: Calls_, ms: int, name: str, restart_ms: int, notice_ms: int) -> None:
        self.call(some)
        self.cluster.run(ms)
        if self.is_up(name):
            self.cluster.crash(name, restart_ms=restart_ms, notice_ms=notice_ms)

    @rule(some=calls, name=nodes, point=st.sampled_from(["send", "before-commit", "after-commit"]))
    def crash_inside_the_next_tick(self, some: Calls_, name: str, point: Any) -> None:
        self.call(some)
        if self.is_up(name):
            self.cluster.nodes[name].doom = point
            self.cluster._timeline.after(300, self.cluster.start, name)

    @rule(some=calls, ms=soon, name=nodes)
    def stop(self, some: Calls_, ms: int, name: str) -> None:
        self.call(some)
        self.cluster.run(ms)
        if self.is_up(name):
            self.cluster.nodes[name].stop()
            self.cluster._timeline.after(50, self.cluster.start, name)

    @rule(some=calls, name=nodes, point=st.sampled_from(["begin", "write", "commit"]))
    def fail_the_next_transaction(self, some: Calls_, name: str, point: str) -> None:
        self.call(some)
        if self.is_up(name):
            self.cluster.nodes[name].journal.fail = point

    @rule(some=calls, ms=soon, notice_ms=st.sampled_from([1, 500]))
    def cut_a_link(self, some: Calls_, ms: int, notice_ms: int) -> None:
        self.call(some)
        self.cluster.run(ms)
        self.cluster._network.cut(notice_ms=notice_ms)

    @rule(some=calls, pair=pairs, for_ms=st.sampled_from([10, 1_000]))
    def part_two(self, some: Calls_, pair: tuple[str, str], for_ms: int) -> None:
        self.call(some)
        self.cluster.part(*pair, for_ms=for_ms)

    # -- the comparison -------------------------------------------------------------------------------------

    def teardown(self) -> None:
        with self.cleanup:
            if hasattr(self, "cluster"):
                self.cluster.heal()
                self.cluster.check()
                for name in NODES:
                    self.compare(name)

    def compare(self, name: str) -> None:
        model, real = self.model, self.twin(name).real._conn
        held = self.held(name)
        assert len(held) == len(set(held)), "I2"
        for message_id, (_, to, _) in model.published.items():
            if to == name and message_id in model.returned:
                assert message_id in held, f"I1: {message_id} had returned"
        for message_id in held:
            sender, to, body = model.published[message_id]
            found = real.execute(
                "SELECT body FROM inbox WHERE msg_id = ?", (id_to_bytes(message_id),)
            ).fetchone()
            assert (to, body) == (name, found[0]), "I5"
        for (sender, to), asked in model.order.items():
            if to == name:
                certain = [one for one in asked if one in held]
                assert [one for one in held if one in certain] == certain, f"I3: from {sender}"

        written = [key for (key,) in real.execute("SELECT key FROM written")]
        assert sorted(one for one in written if one.startswith("arrived")) == sorted(
            f"arrived {message_id}" for message_id in held
        ), "an effect happened less or more than once"
        queued = {id_from_bytes(raw_id) for (raw_id,) in real.execute("SELECT msg_id FROM outbox")}
        for key, (node, message_id) in model.rows.items():
            if node == name:
                count = written.count(key)
                assert count == (message_id in queued), "a row and the message beside it went apart"
                assert count == 1 or key not in model.kept, "I1: a transaction that returned"
                assert count == 0 or key not in model.undone, "a transaction that raised left something"
        states = real.execute("SELECT state, count(*) FROM outbox GROUP BY state").fetchall()
        assert [state for state, _ in states] in ([], [1]), f"I10: all is delivered in the end: {states}"
        assert real.execute("PRAGMA integrity_check").fetchone() == ("ok",), "I9"
        self.twin(name).compare()


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.mark.timeout(300)
def test_no_sequence_of_calls_and_crashes_breaks_a_promise() -> None:
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=QUIET,
        ),
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", ["ack-before-commit", "early-from-inside"])
def test_a_rule_that_is_left_out_is_noticed(bug: str) -> None:
    class Broken(Calls):
        tick = BUGS[bug].tick

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Broken,
            settings=settings(
                max_examples=200,
                stateful_step_count=30,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=QUIET,
                phases=[Phase.generate],  # to find one is enough
                report_multiple_bugs=False,
            ),
        )


@pytest.mark.soak
@pytest.mark.timeout(3_600)
def test_no_longer_sequence_does_either() -> None:
    run_state_machine_as_test(
        Calls,
        settings=settings(
            max_examples=300,
            stateful_step_count=40,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=QUIET,
        ),
    )
