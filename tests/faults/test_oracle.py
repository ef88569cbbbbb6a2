"""The oracle sees each kind of lie: a witness that could not would make every other test here worthless."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.fleet import Fleet
from tests.faults.oracle import Judge, body_of


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an honest run of two nodes leaves behind: the log and two stores."""
    folder = tmp_path_factory.mktemp("truth")
    with Fleet(folder) as fleet:
        a, b = fleet.mesh("a", "b")
        fleet.stream(a, [b], count=40)
        a.ask("wait")
        fleet.judge()
    return folder


def judge_of(folder: Path) -> Judge:
    """A judge that has heard what the log says, about stores in `folder`."""
    judge = Judge()
    for line in (folder / "oracle.log").read_text().splitlines():
        report = json.loads(line)
        if report["t"] == "node":
            report["home"] = str(folder / report["node"])
        judge.take(report)
    return judge


def edit(store: Path, *statements: str, args: tuple[object, ...] = ()) -> None:
    with sqlite3.connect(store) as db:
        for statement in statements:
            db.execute(statement, args)
    db.close()


def test_an_honest_run_is_beyond_reproach(truth: Path) -> None:
    verdict = judge_of(truth).check(wants_all=True)
    assert verdict["violations"] == []
    assert verdict["states"] == {"delivered": 40}


COPY = (
    "INSERT INTO inbox (row, peer, msg_id, lane, meta, body, digest, state, arrived_ms)"
    " SELECT 1000, peer, randomblob(16), lane, meta, {}, digest, state, arrived_ms FROM inbox WHERE row = 5"
)
LIES: dict[str, tuple[str, str, str]] = {  # what is done to a store -> which invariant must complain
    "a message that vanished": ("b", "DELETE FROM inbox WHERE row = 7", "I4"),
    "a message that nobody has any more": ("a", "DELETE FROM outbox WHERE row = 3", "I1"),
    "a message that was called delivered": ("a", "UPDATE outbox SET state = 1 WHERE row = 3", "I4"),
    "a message that is still queued": ("a", "UPDATE outbox SET state = 0 WHERE row = 3", "I6"),
    "a second copy under another id": ("b", COPY.format("body"), "I2"),
    "an older message behind the newest": ("b", "UPDATE inbox SET row = 1000 WHERE row = 5", "I3"),
    "a body that changed": ("b", "UPDATE inbox SET body = CAST(body || 'x' AS BLOB) WHERE row = 5", "I5"),
    "a message that nobody sent": ("b", COPY.format("CAST('a 99 4' AS BLOB)"), "I5"),
    "an effect that is missing": ("b", "DELETE FROM filed WHERE id = 4", "I2"),
    "an effect that happened twice": (
        "b",
        "INSERT INTO filed (sender, number) SELECT sender, number FROM filed",
        "I2",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_oracle_sees(truth: Path, tmp_path: Path, lie: str) -> None:
    node, statement, invariant = LIES[lie]
    folder = tmp_path / "lie"
    shutil.copytree(truth, folder, ignore=shutil.ignore_patterns("*.sock"))
    if lie.startswith(("a message that nobody has", "a message that was called")):
        edit(folder / "b" / "store.db", "DELETE FROM inbox WHERE row = (SELECT min(row) + 2 FROM inbox)")
    edit(folder / node / "store.db", statement)
    verdict = judge_of(folder).check(wants_all=True)
    assert any(violation.startswith(invariant) for violation in verdict["violations"]), verdict


def test_the_oracle_sees_a_broken_file(truth: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lie"
    shutil.copytree(truth, folder, ignore=shutil.ignore_patterns("*.sock"))
    edit(
        folder / "b" / "store.db",
        "PRAGMA writable_schema = on",
        "UPDATE sqlite_schema SET rootpage = 2 WHERE name = 'filed'",
    )
    verdict = judge_of(folder).check(effects=False)
    assert any(violation.startswith("I9") for violation in verdict["violations"]), verdict


def test_the_oracle_sees_a_refused_message_that_arrived(truth: Path) -> None:
    judge = judge_of(truth)
    first = next(iter(judge.nodes["a"].sent))  # type: ignore[call-overload]
    judge.take({"t": "refused", "node": "a", "number": first, "error": "outbox-full"})
    assert any("was refused" in violation for violation in judge.check()["violations"])


@pytest.mark.parametrize(("second", "invariant"), [(4, "I2"), (3, "I3")])
def test_the_oracle_sees_arrivals_that_are_reported_twice_or_backwards(second: int, invariant: str) -> None:
    judge = Judge()
    for number in (4, second):
        judge.take({"t": "arrived", "node": "b", "messages": [["a", number]]})
    assert [violation[:2] for violation in judge.violations] == [invariant]


def _view(at: float, observer: str, peer: str, state: str) -> dict[str, object]:
    return {"t": "view", "at": at, "node": observer, "peer": peer, "state": state}


@pytest.mark.parametrize(
    ("view", "is_a_flap"),
    [
        (_view(5, "a", "b", "suspect"), True),  # before any fault
        (_view(12, "a", "b", "down"), False),  # while b is paused
        (_view(21, "a", "b", "suspect"), False),  # within the bound after it went on
        (_view(30, "a", "b", "suspect"), True),  # long after
        (_view(12, "a", "c", "down"), True),  # c was never touched
        (_view(21, "b", "c", "down"), True),  # whoever wakes up must not think that the world has died
    ],
)
def test_the_oracle_knows_which_suspicion_a_fault_explains(view: dict[str, object], is_a_flap: bool) -> None:
    judge = Judge()
    judge.take({"t": "fault", "at": 10, "kind": "pause", "nodes": ["b"]})
    judge.take({"t": "healed", "at": 20, "nodes": ["b"]})
    judge.take(view)
    assert bool(judge.check_presence(bound_s=5, since=1)["flaps"]) is is_a_flap


def test_a_body_is_one_of_a_kind() -> None:
    made: Callable[[str, int, int], bytes] = body_of
    assert len({made("a", 1, 100), made("b", 1, 100), made("a", 2, 100), made("a", 1, 101)}) == 4
    assert [len(made("a", 1, size)) for size in (6, 100, 5_000)] == [6, 100, 5_000]
