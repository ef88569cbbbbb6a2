"""Frames: the bytes are those that the module describes, and no bytes crash the reader."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_free import frames
from broker_free.errors import InvalidInput
from broker_free.frames import Frame
from broker_free.limits import Limits

LIMITS = Limits()


def test_the_layout_is_the_documented_one() -> None:
    frame = Frame(
        kind=frames.ACK, session=1, seq=2, lane=3, flags=4, credit_messages=5, credit_kib=6, meta={"row": 7}
    )
    assert frames.encode(frame) == [
        b"BF\x01\x04",
        b"\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\x03\x04\0\x05\0\0\0\x06",
        b'{"row":7}',
        b"",
    ]


def test_a_pack_is_one_record_after_another() -> None:
    frame = frames.data_frame(session=1, seq=2, lane=0, records=[(b"{}", b"abc"), (b'{"a":1}', b"")])
    assert frames.encode(frame) == [
        b"BF\x01\x03",
        b"\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\x01\0\0\0\0\0\0",
        b"",
        b'\0\0\0\x02\0\0\0\x03{}abc\0\0\0\x07\0\0\0\0{"a":1}',
    ]


@given(
    kind=st.sampled_from(sorted(set(frames.NAMES) - {frames.DATA, frames.EPHEMERAL})),
    session=st.integers(0, 2**64 - 1),
    seq=st.integers(0, 2**64 - 1),
    meta=st.dictionaries(
        st.text(max_size=8), st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8), max_size=4
    ),
    body=st.binary(max_size=64),
)
def test_what_was_encoded_reads_back(
    kind: int, session: int, seq: int, meta: dict[str, object], body: bytes
) -> None:
    frame = Frame(kind=kind, session=session, seq=seq, meta=meta, body=body)
    back = frames.decode(frames.encode(frame), LIMITS)
    assert (back.kind, back.session, back.seq, dict(back.meta), back.body) == (kind, session, seq, meta, body)


@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=200)), min_size=1, max_size=20))
def test_a_pack_gives_back_its_records(records: list[tuple[bytes, bytes]]) -> None:
    frame = frames.data_frame(session=1, seq=1, lane=0, records=records)
    assert list(frames.records_of(frames.decode(frames.encode(frame), LIMITS))) == records


@given(st.binary(max_size=300))
def test_a_pack_of_any_bytes_is_read_or_refused(body: bytes) -> None:
    frame = Frame(kind=frames.DATA, flags=frames.FLAG_PACK, body=body)
    try:
        records = list(frames.records_of(frame))
    except InvalidInput:
        return
    assert sum(8 + len(meta) + len(rest) for meta, rest in records) == len(body)


@given(st.lists(st.binary(max_size=64), max_size=6))
def test_any_frames_are_read_or_refused(parts: list[bytes]) -> None:
    with contextlib.suppress(InvalidInput):
        frames.decode(parts, LIMITS)


@pytest.mark.parametrize(
    "parts",
    [
        [b"BF\x01\x04", b"\0" * 24, b""],
        [b"XX\x01\x04", b"\0" * 24, b"", b""],
        [b"BF\x03\x04", b"\0" * 24, b"", b""],
        [b"BF\x00\x01", b"\0" * 24, b"", b""],
        [b"BF\x01\x04", b"\0" * 23, b"", b""],
        [b"BF\x01\x04", b"\0" * 24, b"[1]", b""],
        [b"BF\x01\x04", b"\0" * 24, b"{", b""],
        [b"BF\x01\x04", b"\0" * 24, b"[" * 10_000, b""],
        [b"BF\x01\x04", b"\0" * 24, b" " * (frames.META_BYTES_MAX + 1), b""],
    ],
)
def test_what_is_no_frame_is_refused(parts: list[bytes]) -> None:
    with pytest.raises(InvalidInput):
        frames.decode(parts, LIMITS)


def test_the_session_s_version_stands_in_every_frame_and_the_lowest_in_a_greeting() -> None:
    assert frames.encode(Frame(kind=frames.ACK, version=2))[0] == b"BF\x02\x04"
    assert frames.encode(Frame(kind=frames.HELLO))[0] == b"BF\x01\x01"


def test_a_goodbye_is_read_in_any_version() -> None:
    parts = frames.encode(Frame(kind=frames.BYE, version=77, session=5, meta={"reason": "too old"}))
    assert parts[0] == b"BF\x4d\x09"
    back = frames.decode(parts, LIMITS)
    assert (back.kind, back.session, back.meta["reason"]) == (frames.BYE, 5, "too old")


def test_a_lifetime_stands_beside_the_record_it_belongs_to() -> None:
    lone = frames.data_frame(session=1, seq=2, lane=0, records=[(b"{}", b"abc")], ttls=[1500], version=2)
    assert frames.encode(lone) == [
        b"BF\x02\x03",
        b"\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\x02\0\0\0\0\x05\xdc",
        b"{}",
        b"abc",
    ]
    pack = frames.data_frame(
        session=1, seq=2, lane=0, records=[(b"{}", b"abc"), (b"{}", b"")], ttls=[1500, 0], version=2
    )
    assert (pack.flags, frames.encode(pack)[3]) == (
        frames.FLAG_PACK | frames.FLAG_TTL,
        b"\0\0\0\x02\0\0\0\x03\0\0\x05\xdc{}abc\0\0\0\x02\0\0\0\0\0\0\0\0{}",
    )
    assert (frames.ttls_of(lone), frames.ttls_of(pack)) == ((1500,), (1500, 0))
    assert list(frames.records_of(pack)) == [(b"{}", b"abc"), (b"{}", b"")]


@given(st.binary(max_size=300))
def test_a_pack_with_lifetimes_of_any_bytes_is_read_or_refused(body: bytes) -> None:
    frame = Frame(kind=frames.DATA, flags=frames.FLAG_PACK | frames.FLAG_TTL, body=body)
    try:
        records = list(frames.records_of(frame))
    except InvalidInput:
        return
    assert len(frames.ttls_of(frame)) == len(records)
    assert sum(12 + len(meta) + len(rest) for meta, rest in records) == len(body)


def test_every_type_of_frame_is_in_the_protocol_document_under_its_number() -> None:
    text = Path(frames.__file__).with_name("PROTOCOL.md").read_text()
    listed: dict[str, int] = {}
    for names, numbers in re.findall(r"^\| ([A-Z_, ]+) \| ([\d, ]+) \|", text, re.MULTILINE):
        listed |= dict(zip(names.split(", "), map(int, numbers.split(", ")), strict=True))
    assert listed == {name: kind for kind, name in frames.NAMES.items()}
