"""The protocol core under random faults, and the proof that the simulator would see a bug.

More, and one seed with all that happens in it: `python -m tests.simulate --help`.
"""

from __future__ import annotations

import pytest

from tests.simulate import BUGS, run_seed, search

# Bug -> seeds within which the simulator finds it; the first hit was at 10, 107, 16, 276, 0, 1179, 5, 1, 5 and 321.
CAUGHT_WITHIN = {
    "no-dedup": 200,
    "stale-ack": 1_000,
    "no-gap-check": 200,
    "prefix-resync": 1_500,
    "ack-before-commit": 50,
    "two-sessions": 4_000,
    "early-from-inside": 100,
    "new-before-backlog": 50,
    "no-regression-check": 100,
    "marks-outlive-session": 2_000,
}


def test_no_schedule_breaks_a_promise() -> None:
    assert search(0, 1_500) is None


def test_no_schedule_breaks_a_promise_when_stores_go_back_in_time() -> None:
    assert search(0, 1_000, rollback=True) is None


@pytest.mark.parametrize("name", CAUGHT_WITHIN)
def test_a_rule_left_out_is_found(name: str) -> None:
    bug = BUGS[name]
    found = search(0, CAUGHT_WITHIN[name], rollback=bug.needs_rollback, bug=bug)
    assert found is not None
    print(name, found)


def test_a_seed_replays_the_same_schedule() -> None:
    first: list[str] = []
    second: list[str] = []
    for trace in (first, second):
        run_seed(4711, trace=trace.append)
    assert first == second
    assert len(first) > 20
