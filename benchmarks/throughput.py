"""The throughput suite: pipelined messages a second, stored and synced at both ends, beside Redis Streams."""

from __future__ import annotations

from benchmarks.contenders import BODY_BYTES, PUMPED, WINDOW, NodesThroughput, RedisThroughput
from benchmarks.suite import Column, Goal, Ratio, Row, Suite

SUITE = Suite(
    name="throughput",
    title="Throughput of durable messages",
    method=f"""
{PUMPED} messages of {BODY_BYTES} bytes a round, at most {WINDOW} of them not yet acknowledged. Two nodes in two
processes: every message is published on its own, stored at the sender, sent over tcp with CURVE, stored at the
receiver, acknowledged, both with SQLite at `synchronous=FULL`. Redis Streams with `appendfsync always` and two
client processes: XADD in pipelines of {WINDOW}; XREADGROUP and XACK of up to {WINDOW}.
""".strip(),
    unit="messages a second, and microseconds of processor time a message in all processes together",
    columns=(
        Column(suffix="rate", label="messages/s", with_spread=True),
        Column(suffix="cpu_us", label="processor µs a message"),
    ),
    rows=(
        Row(key="node", label="two nodes"),
        Row(key="redis", label="Redis Streams, appendfsync always"),
    ),
    ratios=(
        Ratio(
            label="nodes / Redis Streams, messages a second",
            of="node.rate",
            to="redis.rate",
            goal=Goal(at_least=0.7),
        ),
        Ratio(label="nodes / Redis Streams, processor time a message", of="node.cpu_us", to="redis.cpu_us"),
    ),
    contenders=lambda: (NodesThroughput(), RedisThroughput()),
)
