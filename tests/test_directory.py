"""What addresses come to, over a snapshot of who is where."""

from __future__ import annotations

import pytest

from zmail import address
from zmail.directory import OFFLINE, ONLINE, Directory, NodeSeen, Place, Resident, resident_from
from zmail.errors import AmbiguousAddress, UnknownAddress

ONE, TWO, THREE = "a" * 32, "b" * 32, "bcd" + "c" * 29
ME = Place("alpha", ONE)


def test_each_place_comes_once_and_in_the_order_of_the_addresses() -> None:
    found = _directory().resolve(address.parse_list("charlie, @server2, bravo, all"), sender=ME)
    assert found == (Place("charlie", TWO), Place("delta", TWO), Place("bravo", ONE))


def test_nodes_are_found_by_name_or_by_the_beginning_of_their_id() -> None:
    directory = _directory()
    for text in ("x@server2", f"x@{TWO[:6]}", f"x@{TWO}"):
        assert directory.resolve([address.parse(text)], sender=ME) == (Place("x", TWO),)
    for text in ("x@server", f"x@{TWO[:5]}"):
        with pytest.raises(UnknownAddress) as refused:
            directory.resolve([address.parse(text)], sender=ME)
    assert refused.value.hint == "see: zmail peers"


def test_nodes_that_share_a_name_are_told_apart_by_id() -> None:
    directory = _directory(names=("server1", "twin", "twin"))
    with pytest.raises(AmbiguousAddress) as refused:
        directory.resolve([address.parse("charlie@twin")], sender=ME)
    assert refused.value.hint == f"use an id: {TWO[:8]}, {THREE[:8]}"
    shown = directory.address("charlie", TWO)
    assert directory.resolve([address.parse(shown)], sender=ME) == (Place("charlie", TWO),)


def test_everybody_at_an_empty_node_is_nobody() -> None:
    with pytest.raises(UnknownAddress, match="nobody else is known at server3"):
        _directory().resolve([address.parse("@server3")], sender=ME)


def test_nobody_is_online_at_a_lost_node() -> None:
    directory = _directory(alive=False)
    place = Place("charlie", TWO)
    assert directory.state(place) == OFFLINE
    assert directory.last_seen_ms(place, now_ms=9_000) == 5_000  # when its node was
    assert _directory().last_seen_ms(place, now_ms=9_000) == 9_000
    assert directory.last_seen_ms(Place("nobody", TWO), now_ms=9_000) is None


def test_an_entry_that_makes_no_sense_is_left_out() -> None:
    assert resident_from(f"{TWO}.Not A Name", {}) is None
    strange = resident_from(
        f"{TWO}.bravo", {"kind": 7, "project": [], "state": "asleep", "last_seen_ms": "x"}
    )
    assert strange == Resident(
        callsign="bravo", node=TWO, kind="script", project=None, state=OFFLINE, last_seen_ms=0
    )


def _directory(
    *, names: tuple[str, str, str] = ("server1", "server2", "server3"), alive: bool = True
) -> Directory:
    residents = [
        Resident(callsign=callsign, node=node, kind="agent", project=None, state=ONLINE, last_seen_ms=1_000)
        for callsign, node in (("alpha", ONE), ("bravo", ONE), ("charlie", TWO), ("delta", TWO))
    ]
    return Directory(
        me=ONE,
        nodes={
            ONE: NodeSeen(name=names[0], is_alive=True, last_seen_ms=None),
            TWO: NodeSeen(name=names[1], is_alive=alive, last_seen_ms=5_000),
            THREE: NodeSeen(name=names[2], is_alive=True, last_seen_ms=5_000),
        },
        residents={each.place: each for each in residents},
    )
