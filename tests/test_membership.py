"""What member records mean, whatever order they arrive in and whoever wrote them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_free.membership import (
    MEMBERS,
    Member,
    Roll,
    Word,
    introduction,
    member_from,
    removal,
    roll_of,
    taken_over,
    word_key,
    word_of,
)
from broker_free.registry import Entry
from broker_free.security import node_id_of, z85_of

KEYS = [z85_of(bytes([number]) * 32) for number in range(8)]
A, B, C, D, E, F, G, H = (node_id_of(key) for key in KEYS)
KEY_OF = dict(zip((A, B, C, D, E, F, G, H), KEYS, strict=True))


def member(node_id: str, key: bytes | None = None) -> Member:
    return Member(
        node_id=node_id,
        name="n",
        public_key=key or KEY_OF[node_id],
        first_key=KEY_OF[node_id] if key else b"",
        endpoints=("tcp://127.0.0.1:1",),
    )


def says_in(writer: str, subject: str, stamp: int, key: bytes | None = None) -> Word:
    return Word(writer=writer, subject=subject, stamp=stamp, member=member(subject, key))


def says_out(writer: str, subject: str, stamp: int) -> Word:
    return Word(writer=writer, subject=subject, stamp=stamp)


def entry_of(word: Word) -> Entry:
    return Entry(
        bucket=MEMBERS,
        key=word_key(word.writer, word.subject),
        value=introduction(word.member) if word.member else removal(),
        stamp=word.stamp,
        origin=word.writer,
    )


def members(words: Iterable[Word]) -> set[str]:
    return set(roll_of(words).members)


def test_a_word_is_read_as_it_was_written() -> None:
    for word in (says_in(A, B, 7), says_in(A, B, 7, KEYS[5]), says_out(A, B, 8)):
        assert word_of(entry_of(word)) == word


def test_what_nobody_may_say_is_no_word() -> None:
    fine = entry_of(says_in(A, B, 1))
    assert fine.value is not None
    for wrong in (
        replace(fine, origin=C),  # in another's name
        replace(fine, key=A),
        replace(fine, value=None),
        replace(fine, value={"is": "perhaps"}),
        replace(fine, value={**fine.value, "key": 5}),
        replace(fine, value={**fine.value, "key": "ü" * 40}),
        replace(fine, value={**fine.value, "about": {"name": "x\n", "endpoints": []}}),
        replace(fine, value={**fine.value, "first_key": KEYS[2].decode()}),  # the id of another key
        replace(fine, key=word_key(A, C)),
    ):
        assert word_of(wrong) is None


def test_an_introduction_lets_in_and_names_who_vouched() -> None:
    roll = roll_of([says_in(A, B, 1), says_in(B, C, 2)])
    assert {one.node_id: one.introduced_by for one in roll.members.values()} == {B: A, C: B}


def test_a_removal_wins_over_every_older_word_and_loses_to_a_newer_introduction() -> None:
    words = [says_in(A, C, 1), says_in(B, C, 2), says_out(D, C, 3)]
    assert members(words) == set()
    assert roll_of(words).removed[C].writer == D
    assert members([*words, says_in(A, C, 4)]) == {C}


def test_a_removed_node_can_bring_back_neither_itself_nor_a_friend() -> None:
    removed = [says_in(A, B, 1), says_out(A, B, 5)]
    assert members([*removed, says_in(B, B, 6)]) == set()
    assert members([*removed, says_in(B, C, 6), says_in(C, B, 7)]) == set()
    assert roll_of([*removed, says_in(B, C, 6)]).strangers == {C}, (
        "no member of an older store, to be vouched for"
    )


def test_a_friend_of_a_removed_node_has_no_say_either() -> None:
    words = [says_in(A, B, 1), says_out(A, B, 5), says_in(B, C, 6), says_in(C, B, 7), says_out(C, D, 8)]
    assert members([says_in(A, D, 2), *words]) == {D}


def test_whom_a_node_introduced_before_its_removal_stays() -> None:
    assert members([says_in(A, B, 1), says_in(B, C, 2), says_out(A, B, 3)]) == {C}


def test_a_removed_node_that_unsays_its_introductions_harms_nobody_whom_its_remover_took_over() -> None:
    words = [says_in(B, A, 1), says_in(A, B, 2), says_in(B, C, 3), says_in(C, D, 4)]
    over = taken_over(roll_of(words), remover=member(A), removed=B)
    assert [one.node_id for one in over] == [A, C]
    words += [says_out(A, B, 5), *(says_in(A, one.node_id, 6) for one in over)]
    unsaid = [word for word in words if word.writer != B]
    assert members(words) == {A, C, D}
    assert members([*unsaid, says_in(B, A, 9), says_out(B, C, 9)]) == {A, C, D}


def test_a_node_may_remove_itself_and_needs_another_to_come_back() -> None:
    left = [says_in(A, B, 1), says_out(B, B, 2)]
    assert members(left) == set()
    assert members([*left, says_in(B, B, 3)]) == set()
    assert members([*left, says_in(A, B, 3)]) == {B}


def test_only_a_member_itself_changes_its_key_and_keeps_who_introduced_it() -> None:
    introduced = says_in(A, B, 1)
    foreign = says_in(C, B, 2, KEYS[7])
    own = says_in(B, B, 3, KEYS[6])
    assert roll_of([introduced, foreign]).members[B].public_key == KEYS[1]
    rotated = roll_of([introduced, foreign, own]).members[B]
    assert (rotated.public_key, rotated.introduced_by, rotated.introduced) == (KEYS[6], A, 1)
    again = roll_of([introduced, own, says_out(A, B, 4), says_in(C, B, 5, KEYS[5])]).members[B]
    assert (again.public_key, again.introduced_by) == (KEYS[5], C)


def test_the_order_of_arrival_changes_nothing() -> None:
    words = [says_in(A, B, 1), says_in(B, C, 2), says_out(C, B, 3), says_in(B, D, 4), says_in(A, B, 5)]
    assert len({str(sorted(roll_of(some).members.items())) for some in permutations(words)}) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from([A, B, C, D]), st.sampled_from([A, B, C, D]), st.booleans()), max_size=12
    )
)
def test_any_records_fold_the_same_way_in_any_order_and_nobody_is_in_and_out(
    said: list[tuple[str, str, bool]],
) -> None:
    words = [
        says_in(writer, subject, stamp // 2) if is_in else says_out(writer, subject, stamp // 2)
        for stamp, (writer, subject, is_in) in enumerate(said)
    ]
    roll = roll_of(words)
    shuffled = list({word.order: word for word in words}.values())
    random.Random(len(said)).shuffle(shuffled)
    once: Roll = roll_of({word.order: word for word in words}.values())
    assert roll_of(shuffled) == once
    assert not roll.members.keys() & roll.removed.keys()


@pytest.mark.parametrize(
    "about",
    [
        None,
        [],
        {},
        {"name": "", "endpoints": []},
        {"name": "x" * 65, "endpoints": []},
        {"name": "x\x1b[2J", "endpoints": []},
        {"name": "x", "endpoints": "tcp://h:1"},
        {"name": "x", "endpoints": ["tcp://h:1"] * 17},
        {"name": "x", "endpoints": ["t" * 256]},
        {"name": "x", "endpoints": [], "beat": 5},
    ],
)
def test_what_a_node_says_of_itself_is_checked(about: object) -> None:
    assert member_from(about, node_id=A, public_key=KEYS[0]) is None
