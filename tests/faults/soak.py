"""A long run under everything at once: kills, pauses, cut, delayed and damaged connections.

    python -m tests.faults soak --messages 1000000 --seed 7

It ends when the oracle has seen that many acks; what counts in the result is what the oracle finds in the recipients'
stores afterwards. What every node used on the way is recorded too: memory, write-ahead log, descriptors (I7).
"""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from tests.faults.fleet import Fleet, NodeProcess, Violated, own_address
from tests.faults.proxy import Proxy

MIB: Final = 1 << 20
RSS_BYTES_MAX: Final = 400 * MIB  # I7, for each node: an outbox of 10,000 for each peer, and Python
WAL_BYTES_MAX: Final = 80 * MIB  # journal_size_limit is 64 MiB; one transaction may go over it
DESCRIPTORS_MAX: Final = 200
STREAM: Final = {"batch": 96, "size": 120, "gap_ms": 4}
SAMPLE_S: Final = 10.0


class Usage:
    """The most that any node used, and what all used together at the start and now."""

    def __init__(self) -> None:
        self.peak: Counter[str] = Counter()
        self.samples: list[dict[str, int]] = []

    def take(self, fleet: Fleet) -> None:
        sample: Counter[str] = Counter()
        for node in fleet.nodes.values():
            used = node.ask("resources")
            for name in ("rss_bytes", "wal_bytes", "descriptors"):
                self.peak[name] = max(self.peak[name], used[name])
                sample[name] = max(sample[name], used[name])
        self.samples.append(dict(sample))

    def check(self, fleet: Fleet) -> None:
        for name, bound in (
            ("rss_bytes", RSS_BYTES_MAX),
            ("wal_bytes", WAL_BYTES_MAX),
            ("descriptors", DESCRIPTORS_MAX),
        ):
            if self.peak[name] > bound:
                raise Violated(fleet.trace(f"I7: {name} {self.peak[name]} > {bound}"))


def soak(
    folder: Path, *, messages: int, seed: int | None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    began = time.monotonic()
    faults: Counter[str] = Counter()
    usage = Usage()
    with Fleet(folder, seed=seed) as fleet, ExitStack() as stack:
        proxy = _mesh(fleet, stack)
        nodes = list(fleet.nodes.values())
        fleet.everybody_streams(**STREAM)
        sampled = time.monotonic()
        # A few acks are lost on the way to the oracle or said twice (kills): what counts is found at the end.
        while (acked := fleet.counts().get("acked", 0)) < messages * 1.02:
            elapsed_s = time.monotonic() - began
            progress(f"{acked:,} acked, {sum(faults.values())} faults, {elapsed_s:.0f} s, seed {fleet.seed}")
            time.sleep(fleet.random.uniform(0.2, 2.0))
            kind = fleet.random.choice(["kill", "kill", "pause", "reset", "half-close", "corrupt", "latency"])
            faults[kind] += 1
            _break(fleet, kind, nodes, proxy)
            if time.monotonic() - sampled > SAMPLE_S:
                sampled = time.monotonic()
                usage.take(fleet)
                usage.check(fleet)
                _check_going(fleet)
        usage.take(fleet)
        usage.check(fleet)
        streamed_s = time.monotonic() - began
        progress("judging")
        verdict = fleet.judge()
        if verdict["states"].get("delivered", 0) < messages:
            raise Violated(fleet.trace(f"{verdict['states']}, and {messages} were asked for"))
        return {
            "messages": verdict["states"]["delivered"],
            "states": verdict["states"],
            "counts": verdict["counts"],
            "violations": verdict["violations_total"],
            "faults": dict(faults),
            "nodes": len(nodes),
            "seed": fleet.seed,
            "duration_s": round(streamed_s),
            "drain_s": round(verdict["drain_s"], 1),
            "peak": dict(usage.peak),
            "rss_by_time": [sample["rss_bytes"] for sample in usage.samples],
        }


def _mesh(fleet: Fleet, stack: ExitStack) -> Proxy:
    """Four nodes; whoever dials the first one goes through a proxy."""
    address, in_front = own_address(), own_address()
    proxy = stack.enter_context(Proxy((in_front, 7421), (address, 7420), seed=fleet.seed))
    advertise = [f"tcp://{in_front}:7421"]
    fleet.add("a", listen=f"tcp://{address}:7420", node={"advertise": advertise})
    for name in ("b", "c", "d"):
        fleet.add(name)
    for inviting, joining in combinations(fleet.nodes.values(), 2):
        fleet.pair(inviting, joining)
    return proxy


def _break(fleet: Fleet, kind: str, nodes: list[NodeProcess], proxy: Proxy) -> None:
    match kind:
        case "kill":
            victims = fleet.random.sample(nodes, fleet.random.choice([1, 1, 2]))
            fleet.fault(kind, *victims)
            for node in victims:
                node.kill()
            time.sleep(fleet.random.choice([0.0, 0.0, 0.3]))
            for node in victims:
                node.start()
            for node in victims:
                fleet.stream(node, **STREAM)
            fleet.healed(*victims)
        case "pause":
            node = fleet.random.choice(nodes)
            fleet.fault(kind, node)
            node.signal(signal.SIGSTOP)
            time.sleep(fleet.random.uniform(0.1, 2.0))
            node.signal(signal.SIGCONT)
            fleet.healed(node)
        case "reset":
            fleet.fault(kind, *nodes)
            proxy.reset()
        case "half-close":
            fleet.fault(kind, *nodes)
            proxy.half_close()
        case "corrupt":
            fleet.fault(kind, *nodes)
            proxy.corrupt(2)
        case "latency":
            fleet.fault(kind, *nodes)
            proxy.delay(fleet.random.choice([0.01, 0.1]))
            time.sleep(1.0)
            proxy.delay(0)
            fleet.healed(*nodes)


def _check_going(fleet: Fleet) -> None:
    """Stop at once when the oracle has seen a violation, and not only at the end."""
    if violations := fleet.oracle.ask(t="counts")["violations"]:
        raise Violated(fleet.trace("; ".join(violations)))


def progress_on_a_terminal(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
