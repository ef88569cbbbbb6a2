"""The links suite: CURVE handshakes a second, and whether opening and closing sessions leaves anything behind."""

from __future__ import annotations

from benchmarks.lab import Lab
from benchmarks.suite import Column, Goal, Metrics, Ratio, Row, Suite

ONE_BY_ONE = 300  # handshakes a round
CYCLES = 5_000  # open and close, a round
WINDOW = 32
WARM_UP = 4_000  # until the allocators have what they need
START_S = 20.0
HANDSHAKES_WANTED = 300.0  # a second
CYCLES_WANTED = 1_000.0  # a second


class Links:
    """Two transports in two processes, on tcp with CURVE: one listens, the other dials."""

    name = "two transports"

    def start(self, lab: Lab) -> None:
        self._listener = lab.worker("links", "listen")
        at = self._listener.answer(timeout_s=START_S)
        self._dialler = lab.worker("links", "dial", at["endpoint"], at["key"])
        self._dialler.answer(timeout_s=START_S)
        self._cycle(WARM_UP, window=WINDOW)

    def measure(self) -> Metrics:
        alone = self._cycle(ONE_BY_ONE, window=1)
        before = self._memory()
        rate = self._cycle(CYCLES, window=WINDOW)
        after = self._memory()
        return {
            "alone.rate": alone,
            "alone.wanted": HANDSHAKES_WANTED,
            "window.rate": rate,
            "window.wanted": CYCLES_WANTED,
            "before.mib": before[0] / (1 << 20),
            "after.mib": after[0] / (1 << 20),
            "before.descriptors": before[1],
            "after.descriptors": after[1],
        }

    def _cycle(self, count: int, *, window: int) -> float:
        """Handshakes a second."""
        answer = self._dialler.ask("cycle", count=count, window=window)
        if answer["failed"]:
            raise AssertionError(f"{answer['failed']} of {count} handshakes failed")
        return count / (answer["took_ns"] / 1e9)

    def _memory(self) -> tuple[int, int]:
        """Memory and descriptors of both processes together."""
        used = [worker.ask("memory") for worker in (self._listener, self._dialler)]
        return sum(one["rss_bytes"] for one in used), sum(one["descriptors"] for one in used)


SUITE = Suite(
    name="links",
    title="Handshakes, and sessions opened and closed",
    method=f"""
Two transports in two processes, tcp with CURVE and the allow-list asked at each handshake. Every link is closed as soon
as its handshake is over: {ONE_BY_ONE} a round one after the other, {CYCLES} a round with {WINDOW} under way. Memory and
descriptors are those of both processes together, around the {CYCLES} cycles.
""".strip(),
    unit="as named",
    columns=(
        Column(suffix="rate", label="handshakes a second", with_spread=True),
        Column(suffix="mib", label="memory, MiB", with_spread=True),
        Column(suffix="descriptors", label="descriptors", with_spread=True),
    ),
    rows=(
        Row(key="alone", label="one after the other"),
        Row(key="window", label=f"{WINDOW} under way"),
        Row(key="before", label=f"before the {CYCLES} cycles"),
        Row(key="after", label="after them"),
    ),
    ratios=(
        Ratio(
            label=f"handshakes one after the other / {HANDSHAKES_WANTED:.0f} a second",
            of="alone.rate",
            to="alone.wanted",
            goal=Goal(at_least=1),
        ),
        Ratio(
            label=f"sessions opened and closed / {CYCLES_WANTED:,.0f} a second",
            of="window.rate",
            to="window.wanted",
            goal=Goal(at_least=1),
        ),
        Ratio(
            label=f"memory after / before {CYCLES} cycles",
            of="after.mib",
            to="before.mib",
            goal=Goal(at_most=1.02),
        ),
        Ratio(
            label="descriptors after / before",
            of="after.descriptors",
            to="before.descriptors",
            goal=Goal(at_most=1.1),
        ),
    ),
    contenders=lambda: (Links(),),
)
