"""The blob suite: what a large transfer costs the letters that share its link."""

from __future__ import annotations

from benchmarks.contenders import BLOB_BYTES, BODY_BYTES, GAP_MS, QUIET_LETTERS, NodesBlob
from benchmarks.suite import Column, Goal, Ratio, Row, Suite

SUITE = Suite(
    name="blob",
    title="Letters beside a large transfer",
    method=f"""
Two nodes in two processes on tcp with CURVE, SQLite at `synchronous=FULL` in each. A letter is {BODY_BYTES} bytes,
sent one at a time until it is committed at the peer and its ack is back: {QUIET_LETTERS} back to back and as many
paced, one each {GAP_MS:g} ms, while nothing else happens; then, in the same round, for as long as the peer fetches
a blob of {BLOB_BYTES >> 20} MiB from the sender of the letters over the same link, so that letters and chunks go the
same way. Every chunk is hashed, written and synced at the peer. The blob is another one each time; one is fetched
alone.
""".strip(),
    unit="microseconds, and megabytes a second",
    columns=(
        Column(suffix="p50", label="letter p50", with_spread=True),
        Column(suffix="p99", label="p99", with_spread=True),
        Column(suffix="rate", label="blob MB/s", with_spread=True),
    ),
    rows=(
        Row(key="quiet.b2b", label="letters back to back, nothing else"),
        Row(key="beside.b2b", label="letters back to back, beside the transfer"),
        Row(key="quiet.paced", label="letters paced, nothing else"),
        Row(key="beside.paced", label="letters paced, beside the transfer"),
        Row(key="alone", label="the transfer alone"),
    ),
    ratios=(
        Ratio(
            label="letter p50, paced: beside the transfer / nothing else",
            of="beside.paced.p50",
            to="quiet.paced.p50",
            goal=Goal(at_most=3),
        ),
        Ratio(
            label="letter p99, paced: beside the transfer / nothing else",
            of="beside.paced.p99",
            to="quiet.paced.p99",
            goal=Goal(at_most=5),
        ),
        Ratio(
            label="letter p50, back to back: beside the transfer / nothing else",
            of="beside.b2b.p50",
            to="quiet.b2b.p50",
            goal=Goal(at_most=3),
        ),
        Ratio(
            label="letter p99, back to back: beside the transfer / nothing else",
            of="beside.b2b.p99",
            to="quiet.b2b.p99",
            goal=Goal(at_most=5),
        ),
        Ratio(
            label="transfer rate: beside paced letters / alone",
            of="beside.paced.rate",
            to="alone.rate",
        ),
    ),
    contenders=lambda: (NodesBlob(),),
)
