"""Registries converge: compared exactly, forwarded sparingly, over any topology, after any fault.

`python -m tests.test_antientropy` prints what a change and a full comparison cost.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from random import Random
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_free.antientropy import Findings, Say, Sync
from broker_free.errors import InvalidInput
from broker_free.limits import DAY_MS, KIB, Limits
from broker_free.registry import Entry, Registry
from broker_free.testing import EPOCH_MS, SMALL, Cluster, Faults
from tests.simulate import quiet

LIMITS = Limits()


class Host:
    """One node's registry and its conversation, without links, ticks and store."""

    def __init__(self, name: str, limits: Limits, *, skew_ms: int = 0) -> None:
        self.name = name
        self.limits = limits
        self.skew_ms = skew_ms
        self.random = Random(name)
        self.inbox: deque[Say] = deque()  # Say.peer is the sender here
        self.notes: dict[str, int] = {}
        self.boot(Registry(name, limits=limits))

    def boot(self, registry: Registry) -> None:
        """Start anew with what is on disk."""
        self.registry = registry
        self.sync = Sync(
            me=self.name,
            registry=registry,
            limits=self.limits,
            random=self.random,
            synced_ms=self.notes.get("synced_ms", 0),
        )

    def restart(self) -> None:
        self.boot(
            Registry(self.name, list(self.registry), clock=self.notes.get("clock", 0), limits=self.limits)
        )


class Mesh:
    """Hosts in a row of ticks, a millisecond each; every frame is counted."""

    def __init__(self, names: Iterable[str], limits: Limits = LIMITS) -> None:
        self.hosts = {name: Host(name, limits) for name in names}
        self.now_ms = 0
        self.utc_ms = EPOCH_MS
        self.linked: set[frozenset[str]] = set()
        self.frames: Counter[str] = Counter()
        self.bytes = 0
        self.largest = 0

    def link(self, *pairs: tuple[str, str]) -> None:
        for one, other in pairs:
            self.linked.add(frozenset((one, other)))
            abouts = {name: self.hosts[name].sync.about(self._utc(name)) for name in (one, other)}
            for here, there in ((one, other), (other, one)):
                self.hosts[here].sync.opened(there, abouts[there], now_ms=self.now_ms, utc_ms=self._utc(here))

    def link_all(self) -> None:
        names = list(self.hosts)
        self.link(*((one, other) for at, one in enumerate(names) for other in names[at + 1 :]))

    def unlink_all(self) -> None:
        for pair in self.linked:
            for name in pair:
                self.hosts[name].sync.lost(*(pair - {name}))
                self.hosts[name].inbox.clear()
        self.linked.clear()

    def put(self, name: str, *pairs: tuple[str, dict[str, object] | None], bucket: str = "b") -> None:
        host = self.hosts[name]
        made = [host.registry.make(bucket, key, value, now_ms=self._utc(name)) for key, value in pairs]
        host.registry.apply(made, own=True)
        self._send(name, host.sync.committed(made))

    def pass_time(self, ms: int) -> None:
        """Let time go by while nobody does anything."""
        self.now_ms += ms
        self.utc_ms += ms

    def run(self, ms: int) -> None:
        for _ in range(ms):
            self.pass_time(1)
            for name in self.hosts:
                self._tick(name)

    def run_until(self, condition: Callable[[], bool], within_ms: int = 300_000) -> int:
        began_ms = self.now_ms
        while not condition():
            assert self.now_ms - began_ms < within_ms, "not within the time given"
            for name in self.hosts:
                self._tick(name)
            if condition():
                break
            due_ms = min(host.sync.next_wake_ms(self.now_ms) for host in self.hosts.values())
            is_busy = any(host.inbox for host in self.hosts.values())
            self.pass_time(1 if is_busy else max(1, due_ms - self.now_ms))
        return self.now_ms - began_ms

    def is_alike(self) -> bool:
        return len({host.registry.root for host in self.hosts.values()}) == 1

    def values(self, name: str, bucket: str = "b") -> dict[str, object]:
        return {entry.key: entry.value for entry in self.hosts[name].registry.bucket(bucket)}

    def _utc(self, name: str) -> int:
        return self.utc_ms + self.hosts[name].skew_ms

    def _tick(self, name: str) -> None:
        host, utc_ms, found = self.hosts[name], self._utc(name), Findings()
        while host.inbox:
            peer, meta, body = host.inbox.popleft()
            host.sync.take(peer, meta, body, now_ms=self.now_ms, utc_ms=utc_ms, into=found)
        host.sync.keep_house(now_ms=self.now_ms, utc_ms=utc_ms, into=found)
        host.registry.drop(found.drops)
        host.registry.apply(found.entries.values())
        host.notes.update(found.notes)
        written = [entry for entry in found.entries.values() if entry.origin == name]
        self._send(name, host.sync.committed(written))
        self._send(name, host.sync.converse(now_ms=self.now_ms, utc_ms=utc_ms))

    def _send(self, name: str, says: Iterable[Say]) -> None:
        for peer, meta, body in says:
            if frozenset((name, peer)) in self.linked:
                self.frames[meta["k"]] += 1
                size = len(body) + len(repr(meta)) + 28
                self.bytes += size
                self.largest = max(self.largest, len(body))
                self.hosts[peer].inbox.append(Say(name, meta, body))


def star(names: list[str]) -> list[tuple[str, str]]:
    return [(names[0], other) for other in names[1:]]


def chain(names: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(names))


def names_of(number: int) -> list[str]:
    return [f"n{at:02}" for at in range(number)]


# One comparison ------------------------------------------------------------------------------------------------

KEYS = st.dictionaries(
    st.integers(0, 40), st.tuples(st.integers(1, 5), st.booleans(), st.integers(0, 600)), max_size=30
)


@given(KEYS, KEYS, st.integers(200, 2_000))
def test_a_comparison_finds_every_difference_and_nothing_else(
    ours: dict[int, tuple[int, bool, int]], theirs: dict[int, tuple[int, bool, int]], frame_bytes: int
) -> None:
    limits = replace(LIMITS, registry_frame_bytes_max=frame_bytes, registry_frame_entries_max=4)
    mesh = Mesh(["a", "b"], limits)
    for name, entries in (("a", ours), ("b", theirs)):
        mesh.hosts[name].boot(
            Registry(
                name,
                [
                    Entry(
                        bucket="b",
                        key=f"k{key}",
                        value={"v": "x" * size} if is_live else None,
                        stamp=(EPOCH_MS << 16) + stamp,
                        origin=name,
                    )
                    for key, (stamp, is_live, size) in entries.items()
                ],
                limits=limits,
            )
        )
    winners = {
        f"k{key}": max((each[key][0], name) for name, each in (("a", ours), ("b", theirs)) if key in each)
        for key in ours | theirs
    }
    needed = sum(
        (f"k{key}" in winners and name != winners[f"k{key}"][1]) for key in ours for name in "a"
    ) + sum(name != winners[f"k{key}"][1] for key in theirs for name in "b")
    needed += len(ours.keys() ^ theirs.keys())
    missing = sum(winners[f"k{key}"][1] == "a" for key in ours) + sum(
        winners[f"k{key}"][1] == "b" for key in theirs
    )
    mesh.link(("a", "b"))
    mesh.run_until(mesh.is_alike)
    held = {entry.key: (entry.stamp - (EPOCH_MS << 16), entry.origin) for entry in mesh.hosts["a"].registry}
    assert held == winners
    assert missing == len(winners)
    assert mesh.frames["put"] == 0


def test_equal_registries_exchange_nothing_when_they_meet() -> None:
    mesh = Mesh(["a", "b"])
    mesh.put("a", ("k", {"n": 1}))
    mesh.link(("a", "b"))
    mesh.run_until(mesh.is_alike)
    mesh.run(2_000)
    mesh.unlink_all()
    mesh.frames.clear()
    mesh.link(("a", "b"))
    mesh.run(2_000)
    assert mesh.frames == {}


def test_one_change_among_many_is_found_with_few_bytes() -> None:
    mesh = Mesh(["a", "b"])
    mesh.put("a", *((f"k{n}", {"n": n}) for n in range(10_000)))
    mesh.link(("a", "b"))
    mesh.run_until(mesh.is_alike)
    mesh.run(2_000)
    mesh.unlink_all()
    mesh.put("b", ("k7", {"n": -1}))
    mesh.bytes = 0
    mesh.link(("a", "b"))
    mesh.run_until(mesh.is_alike)
    mesh.run(2_000)
    assert mesh.bytes < 10 * KIB  # 256 digests of 8 bytes, a leaf of 40 lines of 25, and the entry


def test_a_big_registry_travels_in_small_frames_one_at_a_time() -> None:
    mesh = Mesh(["a", "b"], replace(LIMITS, registry_bucket_keys_max=60_000))
    mesh.put("a", *((f"k{n}", {"n": n}) for n in range(20_000)))
    mesh.link(("b", "a"))
    waiting = 0
    while not mesh.is_alike():
        mesh.run(1)
        waiting = max(waiting, *(len(host.inbox) for host in mesh.hosts.values()))
    assert mesh.largest <= 16 * KIB + KIB
    assert waiting <= 2


def test_what_both_sides_refuse_of_each_other_ends_the_comparison_all_the_same() -> None:
    mesh = Mesh(["a", "b"], replace(LIMITS, registry_entries_max=50, registry_frame_entries_max=3))
    for name in ("a", "b"):
        mesh.put(name, *((f"{name}{n}", {"n": n}) for n in range(50)))
    mesh.link(("a", "b"))
    mesh.run_until(lambda: mesh.frames["done"] > 0)
    assert {len(host.registry) for host in mesh.hosts.values()} == {50}
    assert mesh.hosts["a"].registry.refused["registry-full"] > 0
    assert sum(mesh.frames.values()) < 600


@given(
    st.sampled_from(["root", "same", "leaves", "page", "give", "fill", "put", "done", "later"]),
    st.dictionaries(
        st.sampled_from(["root", "away_ms", "leaves", "done", "to", "seen"]),
        st.none()
        | st.integers()
        | st.text()
        | st.lists(st.integers(-1, 300) | st.text(max_size=2), max_size=4),
    ),
    st.binary(max_size=60) | st.just(b"[]") | st.just(bytes(2048)) | st.just(bytes(8) + b"[]"),
)
def test_any_frame_is_understood_or_refused(kind: str, meta: dict[str, object], body: bytes) -> None:
    mesh = Mesh(["a", "b"])
    mesh.put("a", ("k", {"n": 1}))
    mesh.link(("a", "b"))
    for _ in range(2):  # while a comparison is under way, too
        mesh.hosts["a"].inbox.append(Say("b", {**meta, "k": kind}, body))
        try:
            mesh.run(1)
        except InvalidInput:
            return
    assert mesh.values("a") == {"k": {"n": 1}}


# Changes at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 10, 30])
def test_a_change_costs_a_full_mesh_one_frame_a_node(number: int) -> None:
    mesh = Mesh(names_of(number))
    mesh.link_all()
    mesh.put("n00", ("k", {"n": 1}))
    mesh.run(5)
    assert mesh.is_alike()
    assert mesh.frames == {"put": number - 1}


@pytest.mark.parametrize("shape", [star, chain])
def test_a_change_is_forwarded_where_its_writer_does_not_reach(
    shape: Callable[[list[str]], list[tuple[str, str]]],
) -> None:
    mesh = Mesh(names_of(10))
    mesh.link(*shape(list(mesh.hosts)))
    mesh.put("n05", ("k", {"n": 1}))
    mesh.run(20)
    assert mesh.is_alike()
    assert mesh.frames == {"put": 9}


def test_a_change_across_a_torn_mesh_stays_within_a_few_frames_a_node() -> None:
    mesh = Mesh(names_of(30))
    mesh.link_all()
    for other in names_of(30)[15:]:  # the writer sees only half of them; the others see all
        mesh.linked.discard(frozenset(("n00", other)))
        mesh.hosts["n00"].sync.lost(other)
        mesh.hosts[other].sync.lost("n00")
    mesh.put("n00", ("k", {"n": 1}))
    mesh.run(20)
    assert mesh.is_alike()
    assert mesh.frames["put"] <= 14 + 2 * 15


def test_what_nobody_forwarded_arrives_by_comparing() -> None:
    mesh = Mesh(["a", "b", "c"])
    mesh.link(("a", "b"))
    mesh.put("a", ("k", {"n": 1}))
    mesh.hosts["b"].inbox.clear()  # the frame is lost
    mesh.link(("b", "c"))
    took_ms = mesh.run_until(mesh.is_alike)
    assert took_ms <= 2 * 1.25 * LIMITS.registry_sync_ms


# Away for long ---------------------------------------------------------------------------------------------


def deleted_while_away(mesh: Mesh, *, days: int) -> None:
    """a, b and c know k, l and own.b/c.k; c goes away, k is deleted, and c comes back after `days`."""
    mesh.link_all()
    mesh.put("a", ("k", {"n": 1}), ("l", {"n": 1}))
    mesh.put("c", ("c.k", {"n": 1}), bucket="own.b")
    mesh.run(100)
    mesh.run(1)
    mesh.unlink_all()
    mesh.link(("a", "b"))
    mesh.put("b", ("k", None))
    mesh.run(10)
    mesh.hosts["c"].restart()
    for _ in range(days):
        mesh.pass_time(DAY_MS)
        mesh.run(2)
    mesh.put("c", ("new", {"n": 2}))
    mesh.unlink_all()
    mesh.link_all()
    mesh.run_until(mesh.is_alike)
    mesh.run(5_000)


@pytest.mark.parametrize("days", [1, 29, 31, 70])
def test_a_deleted_key_stays_deleted_however_long_a_node_was_away(days: int) -> None:
    mesh = Mesh(["a", "b", "c"])
    deleted_while_away(mesh, days=days)
    assert mesh.is_alike()
    for name in mesh.hosts:
        assert mesh.values(name) == {"l": {"n": 1}, "new": {"n": 2}}
        assert mesh.values(name, "own.b") == {"c.k": {"n": 1}}
    if days == 70:
        assert {entry.value is None for entry in mesh.hosts["a"].registry} == {False}, "tombstones went"


def test_two_nodes_alone_keep_their_tombstones_until_they_meet() -> None:
    mesh = Mesh(["a", "b"])
    mesh.link_all()
    mesh.put("a", ("k", {"n": 1}))
    mesh.run(100)
    mesh.unlink_all()
    mesh.put("a", ("k", None), ("old", {"n": 2}))
    for _ in range(50):
        mesh.pass_time(DAY_MS)
        mesh.run(1)
    mesh.link_all()
    mesh.run_until(mesh.is_alike)
    mesh.run(5_000)
    assert mesh.values("a") == mesh.values("b") == {"old": {"n": 2}}


def test_a_new_member_learns_what_is_older_than_any_tombstone() -> None:
    mesh = Mesh(["a", "b"])
    mesh.put("a", ("k", {"n": 1}))
    mesh.put("b", ("l", {"n": 2}))
    mesh.pass_time(100 * DAY_MS)
    mesh.link_all()
    mesh.run_until(mesh.is_alike)
    assert mesh.values("a") == {"k": {"n": 1}, "l": {"n": 2}}


def test_a_node_whose_clock_was_years_ahead_writes_its_entries_anew() -> None:
    mesh = Mesh(["a", "b"])
    mesh.link_all()
    mesh.put("b", ("k", {"n": 1}))
    mesh.run(10)
    mesh.hosts["a"].skew_ms = 3_650 * DAY_MS
    mesh.put("a", ("k", {"n": 2}), ("l", {"n": 3}))
    mesh.put("a", ("a.k", {"n": 4}), bucket="own.b")
    mesh.run(10)
    assert mesh.hosts["b"].registry.refused["registry-future"] >= 3
    mesh.hosts["a"].skew_ms = 0
    mesh.run_until(mesh.is_alike, within_ms=3 * 3_600_000)
    assert mesh.values("b") == {"k": {"n": 2}, "l": {"n": 3}}
    assert mesh.values("b", "own.b") == {"a.k": {"n": 4}}
    mesh.put("b", ("k", {"n": 5}))
    mesh.run(10)
    assert mesh.values("a")["k"] == {"n": 5}


# Under faults ------------------------------------------------------------------------------------------------


def run_schedule(seed: int, trace: Callable[[str], None] | None = None) -> None:
    """Write, delete, crash, cut, part, restore and turn clocks; then all nodes must hold the same."""
    random = Random(seed)
    shape = random.choice([star, chain, None])
    names = [f"n{at}" for at in range(random.choice([3, 4, 5]))]
    cluster = Cluster(
        seed,
        nodes=len(names),
        limits=replace(random.choice([SMALL, Limits()]), registry_sync_ms=random.choice([2_000, 30_000])),
        faults=Faults(),
        trace=trace,
    )
    if shape is not None:
        pairs = {frozenset(pair) for pair in shape(names)}
        for name, node in cluster.nodes.items():
            node.members = [other for other in names if frozenset((name, other)) in pairs]
    images = {name: [node.journal.snapshot()] for name, node in cluster.nodes.items()}
    written: dict[str, int] = {}
    has_gone_back: set[str] = set()
    for step in range(random.randint(10, 60)):
        name = random.choice(names)
        node, other = cluster.nodes[name], random.choice([one for one in names if one != name])
        match random.choices(range(7), (60, 8, 8, 8, 5, 4, 7))[0]:
            case 0 if node.is_up:
                bucket, key = random.choice([("b", f"k{random.randrange(4)}"), ("own.b", f"{name}.k")])
                value = {"step": step} if random.random() < 0.8 else None
                cluster.transact(name, lambda tx, *args: tx.registry_put(*args) and None, bucket, key, value)
                written[f"{bucket} {key}"] = step
            case 1:
                cluster.crash(name, restart_ms=random.randrange(3_000))
            case 2:
                cluster.part(name, other, for_ms=random.randrange(10_000))
            case 3:
                cluster._network.cut(notice_ms=300)
            case 4:
                node.utc_skew_ms = random.randint(-12 * 3_600_000, 12 * 3_600_000)
            case 5:
                has_gone_back.add(name)
                cluster.go_back(name, random.choice([None, *images[name]]))
                cluster.start(name)
            case 6:
                node.journal.fail = random.choice(["begin", "write", "commit"])
        if random.random() < 0.2 and node.journal._undo is None:
            images[name].append(node.journal.snapshot())
        cluster.run(random.choice([1, 10, 100, 1_000]))
    cluster._has_registry = True
    cluster.heal(within_ms=300_000)
    views = {
        name: sorted(map(Entry.text, node.tick.registry)) for name, node in cluster.nodes.items() if node.tick
    }
    assert len(views) == len(names)
    assert len(set(map(tuple, views.values()))) == 1, views
    for name, node in cluster.nodes.items():
        assert sorted(map(Entry.text, node.journal.registry_load())) == views[name], "memory and store differ"
        owner = {
            entry.key.partition(".")[0]: entry.origin for entry in node.journal.registry_load() if entry.owner
        }
        assert all(key == origin for key, origin in owner.items())


def test_all_registries_are_alike_after_any_schedule_on_any_topology() -> None:
    with quiet():
        for seed in range(150):
            try:
                run_schedule(seed)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error


def test_nodes_that_dial_on_demand_compare_by_and_by() -> None:
    with quiet():
        cluster = Cluster(1, nodes=4, limits=replace(SMALL, registry_sync_ms=2_000))
        assert cluster.heal() <= 30_000
        for node in cluster.nodes.values():
            assert node.tick is not None
            node.tick.be_eager(False)
            node.tick.retire_idle(keep=0, idle_ms=0)
        cluster.run(100)
        assert not any(
            link.is_open for node in cluster.nodes.values() if node.tick for link in node.tick.links.values()
        )
        cluster.transact("n0", lambda tx: tx.registry_put("b", "k", {"n": 1}) and None)
        for _ in range(600):
            cluster.run(100)
            if len({node.tick.registry.root for node in cluster.nodes.values() if node.tick}) == 1:
                break
        for node in cluster.nodes.values():
            assert node.tick is not None
            assert [entry.value for entry in node.tick.registry.bucket("b")] == [{"n": 1}]


def test_an_idle_mesh_goes_on_comparing() -> None:
    with quiet():
        cluster = Cluster(1, nodes=2, limits=replace(SMALL, registry_sync_ms=2_000))
        cluster.heal()
        node = cluster.nodes["n1"]
        assert node.tick is not None
        # As if a frame had been lost: written here, and nobody was told.
        lost = node.tick.registry.make("b", "k", {"n": 1}, now_ms=node.utc_ms)
        node.tick.registry.apply([lost], own=True)
        cluster.run(10_000)
        other = cluster.nodes["n0"].tick
        assert other is not None
        assert [entry.value for entry in other.registry.bucket("b")] == [{"n": 1}]


# Numbers -----------------------------------------------------------------------------------------------------


def main() -> None:
    for number in (3, 10, 30):
        mesh = Mesh(names_of(number))
        mesh.link_all()
        mesh.put("n00", ("k", {"state": "online"}))
        mesh.run(5)
        print(f"a change in a full mesh of {number}: {sum(mesh.frames.values())} frames, {mesh.bytes} bytes")
    for number in (10_000, 50_000):
        mesh = Mesh(["a", "b"])
        values = [(f"k{n}", {"state": "online", "project": "warehouse", "n": n}) for n in range(number)]
        made = [mesh.hosts["a"].registry.make("b", *pair, now_ms=EPOCH_MS) for pair in values]
        mesh.hosts["a"].registry.apply(made, own=True)
        mesh.link(("a", "b"))
        began, began_ms = perf_counter(), mesh.now_ms
        mesh.run_until(mesh.is_alike)
        print(
            f"{number} entries to an empty node: {sum(mesh.frames.values())} frames, {mesh.bytes / 1e6:.2f} MB,"
            f" {mesh.now_ms - began_ms} ticks, {perf_counter() - began:.2f} s of both nodes' CPU,"
            f" largest body {mesh.largest}"
        )
        mesh.run(3_000)
        mesh.unlink_all()
        mesh.put("b", ("k7", {"n": -1}))
        mesh.frames.clear()
        mesh.bytes = 0
        mesh.link(("a", "b"))
        mesh.run_until(mesh.is_alike)
        mesh.run(3_000)
        print(f"one change among {number}: {sum(mesh.frames.values())} frames, {mesh.bytes} bytes")


if __name__ == "__main__":
    sys.exit(main())
