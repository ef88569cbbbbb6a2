"""What peers may send as JSON, what a log shows of it, and how refusals are counted."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_free.errors import InvalidInput
from broker_free.outside import Allowance, Refusals, load_json, printable

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def load(raw: bytes) -> object:
    return load_json(raw, depth_max=8, bytes_max=10_000)


@given(JSON)
def test_ordinary_json_is_read_as_it_was_written(value: object) -> None:
    if _depth(value) <= 8:
        assert load(json.dumps(value).encode()) == value
    else:
        with pytest.raises(InvalidInput, match="deeper"):
            load(json.dumps(value).encode())


def _depth(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_invalid_input(raw: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        load(raw)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"1" * 9_999, id="many digits"),
        pytest.param(b"9223372036854775808", id="2**63"),
        pytest.param(b"-9223372036854775809", id="-2**63-1"),
        pytest.param(b'{"a":NaN}', id="NaN"),
        pytest.param(b"-Infinity", id="infinity"),
        pytest.param(b"1e999", id="a float beyond all"),
        pytest.param(rb'"\ud800"', id="lone surrogate"),
        pytest.param(b"[" * 9 + b"]" * 9, id="one too deep"),
        pytest.param(b"[" * 5_000 + b"]" * 5_000, id="far too deep"),
        pytest.param(b'{"a":' * 1_000 + b"1" + b"}" * 1_000, id="deep objects"),
        pytest.param(b'"' + b"x" * 10_000 + b'"', id="too long"),
        pytest.param(b'"\xff"', id="not UTF-8"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_json_that_would_hurt_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidInput):
        load(raw)


def test_brackets_inside_text_are_no_depth() -> None:
    assert load(b'["' + b"[{" * 50 + b'"]') == ["[{" * 50]


def test_what_a_log_shows_of_a_peers_words_is_one_short_printable_line() -> None:
    assert printable("north") == "north"
    assert printable("a\nlevel=error \x1b[2J\u202e") == r"a\nlevel=error \x1b[2J\u202e"
    assert printable("x" * 500) == "x" * 200


def test_every_refusal_is_counted_and_the_log_hears_of_each_reason_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals = Refusals()
    for at_ms in (1, 2, 59_000, 60_001, 60_002):
        refusals.add("malformed", at_ms, peer="p\n")
    refusals.add("too-large", 3)
    assert refusals.counts == {"malformed": 5, "too-large": 1}
    told = [(record.__dict__["reason"], record.__dict__["count"]) for record in caplog.records]
    assert told == [("malformed", 1), ("malformed", 4), ("too-large", 1)]


def test_an_allowance_is_a_burst_and_then_a_rate() -> None:
    allowance = Allowance(burst=3, a_second=2, now_ms=0)
    assert [allowance.take(0) for _ in range(5)] == [True, True, True, False, False]
    assert [allowance.take(500), allowance.take(500), allowance.take(999), allowance.take(1_000)] == [
        True,
        False,
        False,
        True,
    ]
    assert not allowance.is_full(2_000)
    assert allowance.is_full(2_500)
    assert [allowance.take(100_000) for _ in range(4)] == [True, True, True, False]
