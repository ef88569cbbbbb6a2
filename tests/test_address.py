"""Addresses: what is read, what is refused and how it says so."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmail import address
from zmail.address import Address, Kind
from zmail.errors import InvalidAddress, InvalidBrief

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True).filter(lambda name: name != "all")
addresses = st.one_of(
    st.just(Address(kind=Kind.ALL)),
    st.builds(Address, kind=st.just(Kind.GROUP), name=names),
    st.builds(Address, kind=st.just(Kind.NODE), node=names),
    st.builds(Address, kind=st.just(Kind.CALLSIGN), name=names, node=st.none() | names),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bravo", Address(kind=Kind.CALLSIGN, name="bravo")),
        ("bravo@server2", Address(kind=Kind.CALLSIGN, name="bravo", node="server2")),
        ("bravo (server2)", Address(kind=Kind.CALLSIGN, name="bravo", node="server2")),
        (" Bravo@Server2 ", Address(kind=Kind.CALLSIGN, name="bravo", node="server2")),
        ("@server2", Address(kind=Kind.NODE, node="server2")),
        ("#ops", Address(kind=Kind.GROUP, name="ops")),
        ("all", Address(kind=Kind.ALL)),
        ("ALL", Address(kind=Kind.ALL)),
        ("shop-1f2e3d4c", Address(kind=Kind.CALLSIGN, name="shop-1f2e3d4c")),
    ],
)
def test_every_form_of_an_address_is_read(text: str, expected: Address) -> None:
    assert address.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "@",
        "#",
        "bravo@",
        "-bravo",
        "br avo",
        "bravo@a@b",
        "bravo (",
        "bravo ()",
        "all@server2",
        "a" * 65,
        "b/c",
    ],
)
def test_a_malformed_address_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(InvalidAddress) as refused:
        address.parse(text)
    assert refused.value.message
    assert refused.value.hint


def test_a_letter_that_only_looks_like_a_name_is_refused() -> None:
    with pytest.raises(InvalidAddress):
        address.parse("\N{KELVIN SIGN}ilo")


def test_the_error_of_an_endless_name_is_short() -> None:
    with pytest.raises(InvalidAddress) as refused:
        address.parse("x" * 1_000_000)
    assert len(refused.value.message) < 200


def test_a_list_keeps_its_order_and_drops_repeats() -> None:
    parsed = address.parse_list(["charlie, bravo@server2", "bravo (server2),", "#ops"])
    assert [str(each) for each in parsed] == ["charlie", "bravo@server2", "#ops"]


def test_more_addresses_than_a_publish_can_carry_are_refused() -> None:
    with pytest.raises(InvalidAddress):
        address.parse_list(f"n{number}" for number in range(address.ADDRESSES_MAX + 1))


@given(addresses)
def test_both_written_forms_read_back_as_the_same_address(written: Address) -> None:
    assert address.parse(str(written)) == written
    assert address.parse(written.in_frontmatter()) == written


@settings(deadline=None)
@given(st.text())
def test_any_text_is_an_address_or_an_invalid_brief(text: str) -> None:
    try:
        parsed = address.parse(text)
    except InvalidBrief:
        return
    assert address.parse(str(parsed)) == parsed


def test_the_nearest_names_come_first_and_far_ones_not_at_all() -> None:
    known = ["alpha", "bravo", "bravo-2", "zulu"]
    assert address.nearest("Brvao", known)[0] == "bravo"
    assert address.nearest("qqqqqq", known) == []
