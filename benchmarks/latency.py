"""The latency suite: what a durable send costs, beside its physical floor and beside Redis Streams."""

from __future__ import annotations

from benchmarks.contenders import (
    BACK_TO_BACK,
    BODY_BYTES,
    GAP_MS,
    PACED,
    PUSH_GAP_MS,
    PUSHED,
    Floor,
    NodesLatency,
    Push,
    RedisLatency,
)
from benchmarks.suite import Column, Goal, Ratio, Row, Suite

SUITE = Suite(
    name="latency",
    title="Latency of one durable message",
    method=f"""
{BODY_BYTES} bytes a message, one at a time: back to back ({BACK_TO_BACK} a round), and paced, one each
{GAP_MS:g} ms ({PACED} a round), when both ends have gone to sleep in between. The floor is a bare round trip between
two processes plus one write and fdatasync of 4 KiB, overwritten in place, at the far end: one copy, no way to
send it again. The two nodes keep two copies: two processes on tcp with CURVE, paired by invitation, SQLite at
`synchronous=FULL` in each. Redis keeps one, with `appendfsync always`.

The local push is a brief of the same size from a client at a zmail node's door, through the commit and the
`zmail mcp` process of the recipient's session, to the line read at that session's inbox socket ({PUSHED} a round, one
each {PUSH_GAP_MS:g} ms or slower).
""".strip(),
    unit="microseconds",
    columns=(
        Column(suffix="b2b.p50", label="back to back p50", with_spread=True),
        Column(suffix="b2b.p99", label="p99"),
        Column(suffix="paced.p50", label="paced p50", with_spread=True),
        Column(suffix="paced.p99", label="p99"),
    ),
    rows=(
        Row(key="tcp.wire", label="floor: tcp round trip"),
        Row(key="tcp.synced", label="floor: tcp round trip + fdatasync"),
        Row(key="node.ack", label="nodes: send → committed at the peer → ack"),
        Row(key="node.stored", label="nodes: send → stored here"),
        Row(key="node.consumer", label="nodes: send → seen at the peer, committed"),
        Row(key="redis.ack", label="Redis: XADD → answer"),
        Row(key="redis.consumer", label="Redis: XADD → read by XREADGROUP"),
        Row(key="redis.settled", label="Redis: XADD → XREADGROUP → XACK"),
        Row(key="unix.wire", label="floor: Unix socket round trip"),
        Row(key="unix.synced", label="floor: Unix socket round trip + fdatasync"),
        Row(key="push.sent", label="local: send at the door → answer"),
        Row(key="push.noticed", label="local: send at the door → notice read at the session's inbox"),
    ),
    ratios=(
        Ratio(
            label="nodes, send → ack / tcp round trip + fdatasync, back to back",
            of="node.ack.b2b.p50",
            to="tcp.synced.b2b.p50",
            goal=Goal(at_most=2.5),
        ),
        Ratio(
            label="the same, paced",
            of="node.ack.paced.p50",
            to="tcp.synced.paced.p50",
            goal=Goal(at_most=2.5),
        ),
        Ratio(
            label="nodes, send → ack / Redis, XADD → answer, back to back",
            of="node.ack.b2b.p50",
            to="redis.ack.b2b.p50",
        ),
        Ratio(label="the same, paced", of="node.ack.paced.p50", to="redis.ack.paced.p50"),
        Ratio(
            label="nodes, send → seen at the peer / Redis, XADD → XREADGROUP, paced",
            of="node.consumer.paced.p50",
            to="redis.consumer.paced.p50",
        ),
        Ratio(
            label="local send → notice / Unix socket round trip + fdatasync, paced",
            of="push.noticed.paced.p50",
            to="unix.synced.paced.p50",
        ),
    ),
    contenders=lambda: (
        Floor("bare tcp round trip", over="tcp"),
        NodesLatency(),
        RedisLatency(),
        Floor("bare Unix socket round trip", over="unix"),
        Push(),
    ),
)
