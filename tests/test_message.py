"""Messages, their ids and their subjects."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_free.errors import InvalidInput, TooLarge
from broker_free.limits import Limits
from broker_free.message import (
    Message,
    check_message,
    digest_of,
    id_from_bytes,
    id_to_bytes,
    new_id,
    parse_metadata,
)
from broker_free.subject import check_pattern, check_subject, matches

LIMITS = Limits()


def test_ids_are_uuids_of_version_7_that_sort_by_time() -> None:
    early, late = new_id(1_700_000_000_000), new_id(1_700_000_000_001)
    for one in (early, late):
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", one)
        assert id_from_bytes(id_to_bytes(one)) == one
    assert early < late
    assert len({new_id(0) for _ in range(10_000)}) == 10_000


@pytest.mark.parametrize("text", ["", "x" * 36, "0" * 32, "00000000-0000-7000-8000-00000000000", "é" * 36])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a message id"):
        id_to_bytes(text)


@given(
    st.text(max_size=40), st.dictionaries(st.text(max_size=10), st.text(max_size=20), max_size=4), st.binary()
)
def test_metadata_reads_back(reply_to: str, headers: dict[str, str], body: bytes) -> None:
    message = Message(id=new_id(0), subject="a.b-c", body=body, headers=headers, reply_to=reply_to or None)
    back = parse_metadata(check_message(message, LIMITS), body, LIMITS)
    assert (back.id, back.subject, dict(back.headers), back.reply_to, back.body) == (
        message.id,
        "a.b-c",
        headers,
        reply_to or None,
        body,
    )


@given(st.binary(max_size=200))
def test_any_metadata_is_read_or_refused(raw: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse_metadata(raw, b"", LIMITS)


def test_what_is_over_a_limit_is_refused_with_the_limit() -> None:
    body = b"x" * (LIMITS.body_bytes_max + 1)
    with pytest.raises(TooLarge, match=str(LIMITS.body_bytes_max)):
        check_message(Message(id=new_id(0), subject="a", body=body), LIMITS)
    with pytest.raises(TooLarge, match=str(LIMITS.metadata_bytes_max)):
        check_message(Message(id=new_id(0), subject="a", body=b"", headers={"h": "x" * 20_000}), LIMITS)


def test_the_digest_covers_everything_that_a_message_is() -> None:
    same = {"sender": "a", "lane": 0, "meta": b"m", "body": b"b"}
    others = [{**same, "sender": "b"}, {**same, "lane": 1}, {**same, "meta": b"mb", "body": b""}]
    digests = {digest_of(**each) for each in (same, *others)}  # type: ignore[arg-type]  # of mixed values
    assert len(digests) == 4


@pytest.mark.parametrize("subject", ["a", "a.b", "$SRV.PING", "x-1.y_2", "a.b:c/d@e"])
def test_subjects(subject: str) -> None:
    check_subject(subject)
    check_pattern(subject)
    assert matches(subject, subject)


@pytest.mark.parametrize("subject", ["", ".", "a.", ".a", "a..b", "a b", "a.*", ">", "a\n", "x" * 256])
def test_what_is_no_subject(subject: str) -> None:
    with pytest.raises(InvalidInput):
        check_subject(subject)


@pytest.mark.parametrize(
    ("pattern", "subject", "covers"),
    [
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a.b", True),
        ("*", "a", True),
        ("*", "a.b", False),
    ],
)
def test_wildcards(pattern: str, subject: str, covers: bool) -> None:
    check_pattern(pattern)
    assert matches(pattern, subject) is covers


@pytest.mark.parametrize("pattern", ["a.>.b", "a>", "*a", ""])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(InvalidInput):
        check_pattern(pattern)
