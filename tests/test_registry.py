"""The registry converges whatever happens to its entries on the way."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_free import registry as registries
from broker_free.errors import InvalidInput, NotOwner, RegistryFull, TooLarge
from broker_free.limits import DAY_MS, Limits
from broker_free.registry import Entry, Registry

LIMITS = Limits(registry_entries_max=8, registry_bucket_keys_max=5, registry_value_bytes_max=100)
NOW_MS = 10 * DAY_MS

# Stamps collide on purpose: one writer with a store that went back may give the same one out twice.
ENTRIES = st.lists(
    st.builds(
        Entry,
        bucket=st.sampled_from(["b", "c"]),
        key=st.sampled_from(["k", "l"]),
        value=st.none() | st.fixed_dictionaries({"n": st.integers(0, 3)}),
        stamp=st.integers(1, 9),
        origin=st.sampled_from(["x", "y"]),
    ),
    max_size=12,
)


def given_to(registry: Registry, entries: list[Entry], now_ms: int = NOW_MS) -> list[Entry]:
    """Hand a peer's entries over as a tick does, and return what is to be stored."""
    judged: dict[registries.Key, Entry] = {}
    registry.judge(entries, now_ms=now_ms, into=judged)
    registry.apply(judged.values())
    return list(judged.values())


def written(registry: Registry, bucket: str, key: str, value: dict[str, int] | None, now_ms: int) -> Entry:
    made = registry.make(bucket, key, value, now_ms=now_ms)
    registry.apply([made], own=True)
    return made


@given(ENTRIES, st.randoms(), st.integers(1, 4))
def test_any_order_any_repetition_and_any_grouping_end_in_the_same(
    entries: list[Entry], random: Any, size: int
) -> None:
    shuffled = [*entries, *entries[: len(entries) // 2]]
    random.shuffle(shuffled)
    one, other = Registry("me"), Registry("me")
    given_to(one, entries)
    for at in range(0, len(shuffled), size):
        given_to(other, shuffled[at : at + size])
    assert set(map(Entry.text, one)) == set(map(Entry.text, other))
    assert one.root == other.root
    assert given_to(one, list(other)) == []


@given(ENTRIES, ENTRIES)
def test_the_root_differs_exactly_when_the_entries_do(some: list[Entry], others: list[Entry]) -> None:
    one, other = Registry("me", some), Registry("you", others)
    assert (one.root == other.root) == (set(map(Entry.text, one)) == set(map(Entry.text, other)))
    one.drop([entry.at for entry in one])
    assert one.root == Registry("me").root


@given(ENTRIES)
def test_entries_travel_as_they_are(entries: list[Entry]) -> None:
    assert [
        e for body in registries.encode(entries, Limits()) for e in registries.decode(body, Limits())
    ] == entries


@given(st.binary(max_size=200) | st.from_type(object).map(repr).map(str.encode))
def test_any_bytes_are_entries_or_refused(body: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        registries.decode(body, Limits())


@pytest.mark.parametrize(
    "row",
    [
        ["b", "k", {}, 1],
        ["b", "k", [], 1, "x"],
        ["b", "k", {}, True, "x"],
        ["b", "k", {}, 1 << 63, "x"],
        ["b", "k", {"n": math.nan}, 1, "x"],
        ["b", "k" * 256, {}, 1, "x"],
        ["b", "k", {"v": "x" * 101}, 1, "x"],
    ],
)
def test_an_entry_out_of_bounds_is_refused_with_its_frame(row: list[Any]) -> None:
    with pytest.raises(InvalidInput):
        registries.decode(json.dumps([row]).encode(), LIMITS)


def test_frames_stay_within_their_bounds() -> None:
    limits = Limits(registry_frame_bytes_max=1_000, registry_frame_entries_max=5)
    entries = [
        Entry(bucket="b", key=f"k{n}", value={"v": "x" * (n * 37 % 200)}, stamp=n + 1, origin="x")
        for n in range(50)
    ]
    bodies = list(registries.encode(entries, limits))
    assert [e for body in bodies for e in registries.decode(body, limits)] == entries
    assert max(map(len, bodies)) <= 1_000
    with pytest.raises(TooLarge):
        registries.decode(next(registries.encode(entries, Limits())), limits)


def test_a_new_value_wins_even_when_the_clock_has_gone_back_and_over_a_restart() -> None:
    first = written(Registry("me"), "b", "k", {"n": 1}, 1_000_000)
    again = Registry("me", [first])
    second = written(again, "b", "k", {"n": 2}, 5)
    assert second.stamp > first.stamp
    assert Registry("me", clock=second.stamp).make("b", "k", {}, now_ms=5).stamp > second.stamp
    assert [e.value for e in again.bucket("b")] == [{"n": 2}]


def test_a_deleted_key_does_not_come_back_with_an_old_copy() -> None:
    entries = Registry("me")
    old = written(Registry("you"), "b", "k", {"n": 1}, 1)
    written(entries, "b", "k", None, 2)
    assert given_to(entries, [old]) == []
    assert entries.bucket("b") == []


def test_a_stamp_from_an_impossible_future_is_not_believed() -> None:
    entries = Registry("me")
    future = Registry("x").make("b", "k", {}, now_ms=NOW_MS + DAY_MS + 1)
    assert given_to(entries, [future]) == []
    assert entries.refused == {"registry-future": 1}
    assert entries.make("b", "k", {}, now_ms=NOW_MS).stamp < future.stamp
    assert given_to(entries, [future], now_ms=NOW_MS + 1) == [future]


def test_only_its_owner_writes_a_key_of_an_owned_bucket() -> None:
    entries = Registry("me")
    with pytest.raises(NotOwner):
        entries.make("own.b", "you.k", {}, now_ms=1)
    mine = written(entries, "own.b", "me.k", {"n": 1}, 1)
    theirs = Registry("x").make("b", "k", {}, now_ms=2)
    assert given_to(entries, [replace(theirs, bucket="own.b", key=key) for key in ("me.k", "you.k")]) == []
    assert entries.refused == {"registry-not-owner": 2}
    assert list(entries) == [mine]


def test_an_entry_in_a_nodes_own_name_does_not_replace_what_it_wrote() -> None:
    entries = Registry("me")
    mine = written(entries, "own.b", "me.k", {"n": 1}, 1)
    forged = replace(mine, value={"n": 2}, stamp=NOW_MS << 16)
    (answer,) = given_to(entries, [forged])
    assert (answer.value, answer.origin) == ({"n": 1}, "me")
    assert answer.stamp > forged.stamp
    assert entries.refused == {"registry-forged": 1}
    assert given_to(entries, [replace(forged, stamp=answer.stamp + 1)]) == []  # answered once in a while
    assert entries.bucket("own.b")[0].value == {"n": 1}


def test_a_node_whose_store_went_back_gets_its_own_newer_entries_from_the_others() -> None:
    before = Registry("me")
    old = written(before, "own.b", "me.k", {"n": 1}, 1)
    new = written(before, "own.b", "me.k", {"n": 2}, 2)
    lost = written(before, "own.b", "me.l", {"n": 3}, 3)
    restored = Registry("me", [old])
    assert given_to(restored, [new, lost]) == [new, lost]
    assert restored.make("own.b", "me.k", {}, now_ms=1).stamp > lost.stamp


def test_who_belongs_to_the_mesh_can_be_written_when_all_else_is_full() -> None:
    entries = Registry("me", limits=replace(LIMITS, peers_max=2))
    given_to(entries, [Entry(bucket="b", key=f"k{n}", value={}, stamp=1, origin="x") for n in range(5)])
    given_to(entries, [Entry(bucket="c", key=f"k{n}", value={}, stamp=1, origin="x") for n in range(5)])
    for number in range(4):
        written(entries, "own.bf.member", f"me.n{number}", {}, 1)
    with pytest.raises(RegistryFull, match="more than there can be members"):
        entries.make("own.bf.member", "me.n4", {}, now_ms=1)
    theirs = Entry(bucket="own.bf.member", key="x.n0", value={}, stamp=1, origin="x")
    assert given_to(entries, [theirs]) == [theirs]
    entries.drop([("own.bf.member", "me.n0")])
    entries.make("own.bf.member", "me.n4", {}, now_ms=1)


def test_names_values_and_numbers_have_bounds() -> None:
    entries = Registry("me", limits=LIMITS)
    for bucket, key in (("", "k"), ("b", ""), ("b", "a b"), ("b", "a.*"), ("b", ">"), ("b", "x\n")):
        with pytest.raises(InvalidInput):
            entries.make(bucket, key, {}, now_ms=1)
    for key, value in (("k" * 256, {}), ("k", {"v": "x" * 100})):
        with pytest.raises(TooLarge):
            entries.make("b", key, value, now_ms=1)
    for value in ({"n": math.nan}, {"n": object()}):
        with pytest.raises(InvalidInput):
            entries.make("b", "k", value, now_ms=1)
    for number in range(5):
        written(entries, "b", f"k{number}", {}, 1)
    with pytest.raises(RegistryFull, match="bucket 'b' holds 5 keys"):
        entries.make("b", "k5", {}, now_ms=1)
    written(entries, "b", "k4", {"n": 1}, 1)  # a key that is there may change
    with pytest.raises(RegistryFull, match="the limit is 8"):
        entries.make("c", "k", {}, now_ms=1, pending=3)
    others = [Entry(bucket="c", key=f"k{n}", value={}, stamp=1, origin="x") for n in range(4)]
    assert len(given_to(entries, others)) == 3
    assert entries.refused == {"registry-full": 1}
