"""Killed at each named point of `broker_free.faults`, and none the worse: real processes, real sockets, real files.

Two nodes exchange numbered mail in both directions, with effects that answer, jobs that are committed, and mail
published from inside transactions. One of them, the victim, kills itself at a point; it is started again, and once
all has drained the stores of both are read from outside:

I1 what a publish returned for is there · I2 once · I3 in order · I4 what was acked is there, in the store as the kill
left it · I5 as it was sent · I6 the outboxes drain · I9 the file is sound · and every effect, job and transaction
happened exactly once.

pytest -m soak tests/test_crash_points.py     thirty passings of each point instead of three
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from broker_free.faults import POINTS
from broker_free.message import digest_of, id_to_bytes
from broker_free.schema import SCHEMA_VERSION, STEPS
from tests.conftest import ROOT
from tests.crash_worker import body_of, number_in

NUMBERS = 24  # that each side sends; seven passings of every point come about
NUMBERS_SOAK = 150  # and thirty
PATIENCE_S = 60.0  # the machine may be loaded; nothing waits so long when all is well
DRAIN_S = 30.0  # I6

KILLED = -9
Record = Callable[[str, object], None]


class Nursery:
    """The process that forks nodes; see crash_worker."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._lock = threading.Lock()

    def ask(self, **question: object) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    opened = Nursery()
    yield opened
    opened.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that is possible: a kill needs no disk, and the syncs of a dozen nodes would take the time."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="bf-", dir=memory) as name:
        yield Path(name)


def wait_until(predicate: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


@dataclass(slots=True)
class Mate:
    """One node over all its lives: a home, and at most one process."""

    nursery: Nursery
    home: Path
    address: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    pid: int | None = None
    node_id: str = ""
    lines: int = 0  # of `said` when the present life began
    _status: int | None = None

    @property
    def store(self) -> Path:
        return self.home / "store.db"

    def start(self, **options: object) -> None:
        assert self.pid is None
        self.lines = len(self.said())
        wanted = {
            "home": str(self.home),
            "said": str(self._said_path),
            "name": self.name,
            "listen": self.address,
            **self.options,
            **options,
        }
        self.pid = self.nursery.ask(spawn=wanted)["pid"]

    @property
    def _said_path(self) -> Path:
        return self.home.with_name(self.home.name + ".said")

    def said(self) -> list[dict[str, Any]]:
        if not self._said_path.exists():
            return []
        return [json.loads(line) for line in self._said_path.read_text().splitlines()]

    def all_said(self, key: str) -> list[Any]:
        return [line[key] for line in self.said() if key in line]

    def says(self, key: str) -> Any:
        """Wait for something that is said in the present life."""
        found: list[Any] = []

        def look() -> bool:
            has_ended = self.status() is not None  # first, so that its last words are not missed
            found[:] = [line[key] for line in self.said()[self.lines :] if key in line]
            return bool(found) or has_ended

        wait_until(look, f"{self.name} says {key}")
        assert found, f"{self.name} ended without saying {key}:\n{self.errors()}"
        return found[0]

    def errors(self) -> str:
        path = Path(f"{self._said_path}.errors")
        return path.read_text()[-3_000:] if path.exists() else ""

    def up(self, **options: object) -> None:
        self.start(**options)
        self.node_id = self.says("up")

    def status(self) -> int | None:
        """How its process has ended; None as long as it runs."""
        if self.pid is not None and self._status is None:
            self._status = self.nursery.ask(wait=self.pid)["status"]
        return self._status

    def ends(self) -> int:
        wait_until(lambda: self.status() is not None, f"{self.name} ends")
        status = self._status
        assert status is not None
        self.pid = self._status = None
        return status

    def dies(self) -> None:
        """Wait until it has killed itself."""
        assert self.ends() == KILLED, f"{self.name} ended by something else:\n{self.errors()}"

    def signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def stop(self) -> None:
        if self.pid is not None:
            self.signal(15)
            assert self.ends() == 0, self.errors()

    def kill(self) -> None:
        if self.pid is not None:
            self.signal(9)
            self.ends()

    def query(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)) as store:
            return store.execute(sql, args).fetchall()

    def numbers(self, table: str) -> list[int]:
        return [number for (number,) in self.query(f"SELECT number FROM {table} ORDER BY id")]

    def plan(self, peer: Mate, numbers: int) -> list[object]:
        """What is left to publish: after a life that ended early, from the next number on that was not tried."""
        return [peer.node_id, max(self.all_said("intent"), default=-1) + 1, numbers]


_addresses = iter(range(1, 250 * 250))
_PORT = 10_000 + os.getpid() % 20_000  # of this run: another one beside it uses the same addresses


class Pair:
    """A victim and its peer. The peer lives on while the victim dies, unless a scenario says otherwise."""

    def __init__(
        self,
        nursery: Nursery,
        folder: Path,
        *,
        point: str,
        passing: int,
        later_ms: int,
        numbers: int = NUMBERS,
    ) -> None:
        self.numbers = numbers  # that each side sends
        self.point = point
        self.fault = f"{point}:kill@{passing}+{later_ms}"
        self.once = f"{point}:kill@1+{later_ms}"
        self.victim, self.peer = (self._mate(nursery, folder, name) for name in ("victim", "peer"))
        self.deaths = 0
        self.has_gone_back = False

    @staticmethod
    def _mate(nursery: Nursery, folder: Path, name: str) -> Mate:
        # All of 127/8 is this machine: an address of its own for each node, so that its port stays free for it.
        number = next(_addresses)
        address = f"tcp://127.77.{number // 250}.{number % 250 + 1}:{_PORT}"
        return Mate(nursery, folder / name, address, name)

    def introduce(self) -> None:
        self.peer.up(invite=True)
        self.victim.up(code=self.peer.says("code"))
        self.victim.says("joined")
        self.victim.stop()

    def victim_dies(self) -> None:
        """Wait for it, and look at what it left."""
        self.victim.dies()
        self.deaths += 1
        acked = {one for ids in self.peer.all_said("acked") for one in ids}
        if not self.victim.store.exists():
            assert not acked
            return
        left = self.victim.home.with_name(f"left-{self.deaths}")
        shutil.copytree(self.victim.home, left)
        with closing(sqlite3.connect(left / "store.db")) as store:
            assert store.execute("PRAGMA integrity_check").fetchall() == [("ok",)], "I9"
            has_tables = store.execute("SELECT 1 FROM sqlite_schema WHERE name = 'inbox'").fetchone()
            held = {row[0] for row in store.execute("SELECT msg_id FROM inbox")} if has_tables else set()
            held |= {row[0] for row in store.execute("SELECT msg_id FROM seen")} if has_tables else set()
        assert {id_to_bytes(one) for one in acked} <= held, "I4: an acked message is not on the victim's disk"
        shutil.rmtree(left)

    def start_victim(self, **options: object) -> None:
        self.victim.start(publish=self.victim.plan(self.peer, self.numbers), **options)

    def start_peer(self, **options: object) -> None:
        self.peer.up(publish=self.peer.plan(self.victim, self.numbers), **options)

    def finish(self) -> None:
        """Let both send what is left, wait until all has drained, stop them and compare."""
        both = (self.victim, self.peer)
        for mate in both:
            if mate.pid is None:
                mate.up(publish=mate.plan(self.peer if mate is self.victim else self.victim, self.numbers))
        for mate in both:
            mate.says("published")
        wait_until(self.has_drained, "I6: outboxes drain, effects and jobs are done", DRAIN_S)
        for mate in both:
            mate.stop()
        assert self.deaths, "the victim has not died"
        for receiver, sender in (both, both[::-1]):
            check(receiver, sender, has_gone_back=self.has_gone_back)

    def has_drained(self) -> bool:
        for mate, other in ((self.victim, self.peer), (self.peer, self.victim)):
            mail = set(mate.numbers("filed"))
            sent = {number for (number,) in other.query("SELECT number FROM sent")}
            if not set(other.all_said("returned")) <= mail or not mail <= set(other.numbers("echoed")):
                return False
            if not sent <= set(mate.numbers("done")):
                return False
            if mate.query("SELECT 1 FROM outbox WHERE state = 0 LIMIT 1"):
                return False
            if mate.query("SELECT 1 FROM job LIMIT 1"):
                return False
        return True

    def clear(self) -> None:
        for mate in (self.victim, self.peer):
            if mate.pid is not None:
                mate.kill()


def check(receiver: Mate, sender: Mate, *, has_gone_back: bool) -> None:
    """Compare what a receiver has with what its sender said and has. Both are stopped."""
    returned, intended = set(sender.all_said("returned")), set(sender.all_said("intent"))
    filed = receiver.numbers("filed")
    assert returned <= set(filed), f"I1: lost {sorted(returned - set(filed))}"
    assert len(filed) == len(set(filed)), f"I2: doubled {filed}"
    assert filed == sorted(filed), f"I3: out of order {filed}"
    assert set(filed) <= intended, f"I5: nobody sent {sorted(set(filed) - intended)}"

    arrived = receiver.query(
        "SELECT p.node_id, i.lane, i.meta, i.body, i.digest FROM inbox i JOIN peer p ON p.id = i.peer ORDER BY i.row"
    )
    for node_id, lane, meta, body, digest in arrived:
        assert digest_of(sender=node_id, lane=lane, meta=meta, body=body) == digest, "I5: digest"
    in_order: dict[str, list[int]] = {}
    for node_id, _, meta, body, _ in arrived:
        is_again = has_gone_back and json.loads(meta)["subject"] == "echo"  # of mail that came a second time
        if node_id == sender.node_id and not is_again:
            in_order.setdefault(json.loads(meta)["subject"], []).append(number_in(body))
    assert all(found == sorted(set(found)) for found in in_order.values()), (
        "I2, I3: each message once, in order"
    )

    for mate in (receiver, sender):
        assert mate.query("PRAGMA integrity_check") == [("ok",)], "I9"
        states = mate.query("SELECT DISTINCT state FROM outbox")
        assert states in ([], [(1,)]), f"I10: all is delivered, none lost from the books: {states}"
    done = receiver.numbers("done")
    assert len(done) == len(set(done)), f"a job was committed twice: {sorted(done)}"
    if has_gone_back:
        return  # a store that was put back has forgotten what it did and said since
    sent = set(sender.numbers("sent"))
    assert len(sent) == len(sender.numbers("sent"))
    assert {number for number in filed if number % 3 == 0} == sent, "a row and the mail beside it went apart"
    assert sorted(done) == sorted(sent), "each task is done, and once"
    assert sorted(sender.numbers("echoed")) == sorted(filed), "an effect happened less or more than once"


# -- how each point is reached ----------------------------------------------------------------------------------
# A scenario takes a pair that does not know each other yet and lets the victim die. `finish` comes after it.

Scenario = Callable[[Pair], None]
Run = tuple[str, int, int]  # point, passing, milliseconds between them and the kill


def while_it_exchanges(pair: Pair) -> None:
    """At the n-th passing, somewhere in the middle of the traffic."""
    pair.introduce()
    pair.peer.stop()
    pair.start_peer()
    pair.start_victim(fault=pair.fault)
    pair.victim_dies()


def three_times_in_a_row(pair: Pair, **options: object) -> None:
    """At a point that a life passes once, near its beginning: it dies there in three lives, one after another."""
    for _ in range(3):
        pair.start_victim(fault=pair.once, **options)
        pair.victim_dies()


def while_it_dials(pair: Pair) -> None:
    pair.introduce()
    pair.peer.stop()
    pair.start_peer(never_dials=True)
    three_times_in_a_row(pair)
    pair.peer.stop()


def while_it_is_dialled(pair: Pair) -> None:
    pair.introduce()
    pair.peer.stop()
    pair.start_peer()
    three_times_in_a_row(pair, never_dials=True)


def before_it_has_keys(pair: Pair) -> None:
    pair.victim.start(fault=pair.once)
    pair.victim_dies()
    if pair.point == "key-draft-written":
        for _ in range(2):
            pair.victim.start(fault=pair.once)
            pair.victim_dies()
    pair.introduce()
    pair.peer.stop()


def before_it_has_tables(pair: Pair) -> None:
    for _ in range(3):
        pair.victim.start(fault=pair.once)
        pair.victim_dies()
    pair.introduce()
    pair.peer.stop()


def while_it_lets_in(pair: Pair) -> None:
    for _ in range(3):
        pair.victim.up(fault=pair.once, invite=True)
        pair.peer.up(code=pair.victim.says("code"))
        pair.victim_dies()
        pair.peer.kill()
    pair.victim.up(invite=True)
    pair.peer.up(code=pair.victim.says("code"))
    pair.peer.says("joined")
    pair.victim.stop()
    pair.peer.stop()


def while_it_joins(pair: Pair) -> None:
    for _ in range(3):
        pair.peer.up(invite=True)
        pair.victim.up(code=pair.peer.says("code"), fault=pair.once)
        pair.victim_dies()
        pair.peer.stop()
    pair.introduce()
    pair.peer.stop()


def after_the_peer_died_with_the_ack(pair: Pair) -> None:
    """The peer holds messages that the victim never heard of again: a resync finds them."""
    pair.introduce()
    pair.peer.stop()
    pair.start_peer(fault="before-ack:kill@2")
    pair.start_victim(fault=pair.once)
    pair.peer.dies()
    pair.start_peer()
    pair.victim_dies()
    for _ in range(2):
        pair.start_victim(fault=pair.once)
        pair.victim_dies()


def after_the_peer_went_back_in_time(pair: Pair) -> None:
    pair.introduce()
    pair.peer.stop()
    old = pair.peer.home.with_name("old")
    shutil.copytree(pair.peer.home, old)
    pair.start_peer()
    pair.start_victim()
    for mate in (pair.peer, pair.victim):
        mate.says("published")
    wait_until(pair.has_drained, "all is delivered")
    pair.victim.stop()
    pair.peer.stop()
    shutil.rmtree(pair.peer.home)
    old.rename(pair.peer.home)
    pair.has_gone_back = True
    pair.start_peer()
    three_times_in_a_row(pair)


def after_the_peer_was_renamed(pair: Pair) -> None:
    pair.introduce()
    pair.peer.stop()
    pair.peer.name = "renamed"
    pair.start_peer()
    three_times_in_a_row(pair)


def with_rows_to_prune(pair: Pair) -> None:
    pair.introduce()
    pair.peer.stop()
    pair.start_peer()
    pair.start_victim()
    for mate in (pair.peer, pair.victim):
        mate.says("published")
    wait_until(pair.has_drained, "all is delivered")
    pair.victim.stop()
    assert pair.victim.query("SELECT count(*) FROM inbox") > [(NUMBERS,)]
    # In `seen` for as long again as the longest lifetime: that must be longer than this test.
    pair.victim.options = {"limits": {"retained_ms": 1, "ttl_ms_max": 300}}
    three_times_in_a_row(pair)
    pair.victim.options = {}


def while_it_changes_its_key(pair: Pair) -> None:
    pair.introduce()
    pair.peer.stop()
    pair.start_peer()
    three_times_in_a_row(pair, rotate=True)


def while_its_peer_changes_its_key(pair: Pair) -> None:
    pair.introduce()
    pair.peer.stop()
    pair.start_peer(rotate=True)
    three_times_in_a_row(pair)


def after_an_unclean_end(pair: Pair) -> None:
    pair.introduce()
    pair.peer.stop()
    pair.start_peer()
    pair.start_victim()
    pair.victim.says("returned")
    pair.victim.kill()
    three_times_in_a_row(pair)


def while_it_is_upgraded(pair: Pair) -> None:
    make_store_of_first_version(pair.victim)
    before_it_has_tables(pair)


def while_it_is_backed_up(pair: Pair) -> None:
    target = pair.victim.home.with_name("backup.db")
    pair.introduce()
    pair.peer.stop()
    pair.start_peer()
    three_times_in_a_row(pair, backup=str(target))
    assert not target.exists(), "a backup is whole or has no name"
    pair.start_victim(backup=str(target))
    assert pair.victim.says("backed_up") == target.stat().st_size
    with closing(sqlite3.connect(f"file:{target}?mode=ro", uri=True)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert copy.execute("SELECT count(*) FROM peer").fetchone() > (0,)


DURING_AN_EXCHANGE = (
    "before-begin",
    "after-begin",
    "effect-applied",
    "early-data-sent",
    "before-commit",
    "after-commit",
    "before-ack",
    "after-ack",
    "registry-saved",
    "job-done",
)
SCENARIOS: dict[str, Scenario] = {
    **dict.fromkeys(DURING_AN_EXCHANGE, while_it_exchanges),
    "checkpointed": after_an_unclean_end,
    "copy-drafted": while_it_is_backed_up,
    "keys-replaced": while_it_changes_its_key,
    "key-saved": while_its_peer_changes_its_key,
    "key-draft-written": before_it_has_keys,
    "key-file-named": before_it_has_keys,
    "in-migration": while_it_is_upgraded,
    "hello-sent": while_it_dials,
    "hello-ok-sent": while_it_is_dialled,
    "ready-sent": while_it_dials,
    "in-resync": after_the_peer_died_with_the_ack,
    "in-requeue": after_the_peer_went_back_in_time,
    "whereabouts-saved": after_the_peer_was_renamed,
    "member-saved": while_it_lets_in,
    "member-admitted": while_it_lets_in,
    "join-sent": while_it_joins,
    "inviter-saved": while_it_joins,
    "inviter-admitted": while_it_joins,
    "pruned": with_rows_to_prune,
}
# A point whose scenario dies three times in a row needs one pair for its three passings.
PASSINGS: dict[Scenario, tuple[tuple[int, int], ...]] = {
    # (passing, ms between the point and the kill: 30 ms are enough for what was handed to a socket to have left)
    while_it_exchanges: ((1, 0), (3, 30), (7, 0)),
}


def kill(nursery: Nursery, folder: Path, run: Run, numbers: int) -> None:
    point, passing, later_ms = run
    pair = Pair(nursery, folder, point=point, passing=passing, later_ms=later_ms, numbers=numbers)
    folder.mkdir()
    try:
        SCENARIOS[point](pair)
        pair.finish()
    except BaseException as error:
        error.add_note(f"BROKER_FREE_FAULT={pair.fault} in {folder}, {SCENARIOS[point].__name__}")
        error.add_note(f"victim: {pair.victim.errors()}\npeer: {pair.peer.errors()}")
        raise
    finally:
        pair.clear()


def kill_all(nursery: Nursery, folder: Path, runs: list[Run], *, numbers: int = NUMBERS) -> None:
    """Run scenarios side by side, because each spends its time waiting for the others' turns and for redialling."""
    with ThreadPoolExecutor(6) as pool:
        futures = [
            pool.submit(kill, nursery, folder / f"{run[0]}-{number}", run, numbers)
            for number, run in enumerate(runs)
        ]
        failures = [error for future in futures if (error := future.exception())]
    if failures:
        raise ExceptionGroup(f"{len(failures)} of {len(runs)}", failures)  # type: ignore[type-var]


def runs_of(point: str) -> list[Run]:
    return [(point, *passing) for passing in PASSINGS.get(SCENARIOS[point], ((1, 0),))]


# Some points to a test: enough to keep both cores busy, few enough to see which one failed.
GROUPS = [list(SCENARIOS)[at : at + 5] for at in range(0, len(SCENARIOS), 5)]


@pytest.mark.parametrize("points", GROUPS, ids=lambda points: points[0])
def test_a_node_killed_at_a_point_loses_nothing_doubles_nothing_and_keeps_the_order(
    nursery: Nursery, folder: Path, record_property: Record, points: list[str]
) -> None:
    runs = [run for point in points for run in runs_of(point)]
    kill_all(nursery, folder, runs)
    record_property("faults", len(runs))


@pytest.mark.soak
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("point", SCENARIOS)
def test_a_node_killed_at_a_point_ten_times_as_often(
    nursery: Nursery, folder: Path, record_property: Record, point: str
) -> None:
    if SCENARIOS[point] is while_it_exchanges:
        runs = [(point, passing, (0, 5, 30)[passing % 3]) for passing in range(1, 31)]
    else:
        runs = [(point, 1, later_ms) for later_ms in range(0, 50, 5)]
    kill_all(nursery, folder, runs, numbers=NUMBERS_SOAK)
    record_property("faults", len(runs))


def test_there_is_a_scenario_for_every_point_and_every_point_is_in_the_code() -> None:
    """That a point was really reached shows by the victim's death: nothing else kills it."""
    assert SCENARIOS.keys() == POINTS.keys()
    code = "".join(
        path.read_text() for path in (ROOT / "broker_free").glob("*.py") if path.name != "faults.py"
    )
    assert [point for point in POINTS if f'"{point}"' not in code] == [], "declared and passed nowhere"
    assert set(re.findall(r'faults\.reach\(\s*"([\w-]+)"', code)) <= POINTS.keys()


@pytest.mark.parametrize("point", ["in-migration", "copy-drafted"])
def test_a_store_of_the_first_version_survives_three_deaths_in_its_upgrade(
    nursery: Nursery, tmp_path: Path, point: str
) -> None:
    pair = Pair(nursery, tmp_path, point=point, passing=1, later_ms=0)
    row = make_store_of_first_version(pair.victim)
    assert SCHEMA_VERSION > 1
    for _ in range(3):
        pair.victim.start(fault=pair.once)
        pair.victim.dies()
        assert pair.victim.query("PRAGMA user_version") == [(1,)], "all of an upgrade, or nothing"
    pair.victim.up()
    pair.victim.stop()
    assert pair.victim.query("PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert pair.victim.query("SELECT row, msg_id, meta, body FROM inbox") == [row]
    assert pair.victim.query("PRAGMA integrity_check") == [("ok",)]


def make_store_of_first_version(mate: Mate) -> tuple[int, bytes, bytes, bytes]:
    """Leave a file as version 1 made it, with one message: its row, id, metadata and body."""
    message_id, meta = bytes(range(16)), b'{"id":"00010203-0405-0607-0809-0a0b0c0d0e0f","subject":"old"}'
    mate.home.mkdir(mode=0o700)
    with closing(sqlite3.connect(mate.store)) as store:
        for statement in STEPS[0]:
            store.execute(statement)
        store.execute("PRAGMA user_version = 1")
        store.execute("INSERT INTO peer VALUES (1, 'p', 'p', x'', '[]', '', '[]', NULL, NULL, 0, 0, 0, 0)")
        store.execute(
            "INSERT INTO inbox (row, peer, msg_id, lane, meta, body, digest, state, arrived_ms)"
            " VALUES (7, 1, ?, 0, ?, ?, ?, 2, 5)",
            (message_id, meta, body_of(1), digest_of(sender="p", lane=0, meta=meta, body=body_of(1))),
        )
        store.commit()
    return 7, message_id, meta, body_of(1)
