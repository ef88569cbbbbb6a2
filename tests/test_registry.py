"""The registry converges whatever happens to its entries on the way; presence says who is there."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_free import registry
from broker_free.errors import InvalidInput
from broker_free.limits import Limits
from broker_free.presence import Presence
from broker_free.registry import Entry, Registry

ENTRIES = st.lists(
    st.builds(
        Entry,
        bucket=st.sampled_from(["b", "c"]),
        key=st.sampled_from(["k", "l"]),
        value=st.none() | st.fixed_dictionaries({"n": st.integers(0, 3)}),
        stamp=st.integers(1, 1_000),
        origin=st.sampled_from(["x", "y"]),
    ),
    max_size=12,
    unique_by=lambda entry: (entry.stamp, entry.origin),
)


def shown(entries: Registry) -> list[Entry]:
    return [*entries.bucket("b"), *entries.bucket("c")]


@given(ENTRIES, st.randoms())
def test_any_order_and_any_repetition_end_in_the_same(entries: list[Entry], random: object) -> None:
    shuffled = [*entries, *entries[: len(entries) // 2]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' own Random
    one, other = Registry("me"), Registry("me")
    one.apply(entries)
    for entry in shuffled:
        other.apply([entry])
    assert shown(one) == shown(other)


@given(ENTRIES)
def test_entries_travel_as_they_are_and_only_in_their_writers_name(entries: list[Entry]) -> None:
    back = [each for body in registry.encode(entries) for each in registry.decode(body, origin="x")]
    assert [(e.bucket, e.key, e.value, e.stamp) for e in back] == [
        (e.bucket, e.key, e.value, e.stamp) for e in entries
    ]
    assert {each.origin for each in back} <= {"x"}


@given(st.binary(max_size=200))
def test_any_bytes_are_entries_or_refused(body: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        registry.decode(body, origin="x")


def test_a_new_value_wins_even_when_the_clock_has_gone_back() -> None:
    entries = Registry("me")
    first = entries.make("b", "k", {"n": 1}, now_ms=1_000_000)
    entries.apply([first])
    second = entries.make("b", "k", {"n": 2}, now_ms=5)
    entries.apply([second])
    assert [e.value for e in entries.bucket("b")] == [{"n": 2}]


def test_a_deleted_key_does_not_come_back_with_an_old_copy() -> None:
    entries = Registry("me")
    old = entries.make("b", "k", {"n": 1}, now_ms=1)
    gone = entries.make("b", "k", None, now_ms=2)
    entries.apply([gone])
    entries.apply([old])
    assert entries.bucket("b") == []


def test_a_stamp_from_an_impossible_future_is_not_believed() -> None:
    entries = Registry("me")
    stamp = (2 * 24 * 3_600_000 + 1_000) << 16
    future = Entry(bucket="b", key="k", value={}, stamp=stamp, origin="x")
    assert entries.newer([future], now_ms=1_000) == []


def test_names_and_values_have_bounds() -> None:
    with pytest.raises(InvalidInput):
        Registry("me").make("b", "", {}, now_ms=1)
    with pytest.raises(InvalidInput):
        Registry("me").make("b", "k", {"v": "x" * 20_000}, now_ms=1)


def test_a_silent_peer_is_suspect_then_down_and_alive_again_at_its_next_word() -> None:
    presence = Presence(Limits())
    presence.heard("p", 0)
    assert presence.changes(0) == [("p", "alive")]
    assert presence.changes(5_999) == []
    assert presence.changes(6_000) == [("p", "suspect")]
    assert presence.changes(15_000) == [("p", "down")]
    presence.heard("p", 20_000)
    assert presence.changes(20_000) == [("p", "alive")]


def test_a_node_that_was_itself_suspended_does_not_declare_the_others_gone() -> None:
    presence = Presence(Limits())
    presence.heard("p", 0)
    presence.changes(0)
    presence.lagged(20_000, 20_000)
    assert presence.changes(20_000) == []
