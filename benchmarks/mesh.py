"""The mesh suite: 64 real nodes on one machine. How soon is a dead one noticed, and what does an idle one cost?"""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.figures import percentile
from benchmarks.lab import Lab, Worker
from benchmarks.suite import Column, Goal, Metrics, Ratio, Row, Suite

NODES = 64
SMALL = 8  # the memory of a peer is the slope between these two
IDLE_S = 20.0
SETTLE_S = 120.0
START_S = 60.0
DETECTED_WANTED_MS = 16_000.0  # after the last frame
IDLE_WANTED_PERCENT = 0.5  # of one processor, for each node


class Mesh:
    """Nodes in processes of their own, all joined through the first one, tcp with CURVE on loopback."""

    name = f"{NODES} nodes"

    def start(self, lab: Lab) -> None:
        self._lab = lab
        self._members: dict[str, tuple[Worker, str]] = {}  # name -> process, home
        self._next = 0
        self._grow(SMALL)
        self._settle()
        self._rss_small = self._rss()
        self._grow(NODES)
        self._settle()
        self._rss_large = self._rss()

    def measure(self) -> Metrics:
        idle_percent = self._idle_percent()
        detected = self._kill_one()
        self._grow(NODES)
        self._settle()
        return {
            "kill.worst_ms": max(detected),
            "kill.median_ms": percentile(detected, 50),
            "kill.wanted_ms": DETECTED_WANTED_MS,
            "idle.percent": idle_percent,
            "idle.wanted": IDLE_WANTED_PERCENT,
            "peer.kib": (self._rss_large - self._rss_small) / (NODES - SMALL) / 1024,
            "large.mib": self._rss_large / (1 << 20),
            "small.mib": self._rss_small / (1 << 20),
        }

    def _grow(self, count: int) -> None:
        """Start nodes until there are `count`; each newcomer joins through the first."""
        fresh = []
        while len(self._members) < count:
            name = f"n{self._next}"
            self._next += 1
            home = str(self._lab.new_folder())
            self._members[name] = (self._lab.worker("member", name, home), home)
            fresh.append(name)
            if len(fresh) % SMALL == 0:  # not all at once: each start is half a second of processor time
                self._answer_all(fresh[-SMALL:])
        self._answer_all(fresh[len(fresh) // SMALL * SMALL :])
        first = next(iter(self._members))
        for name in fresh:
            if name != first:
                code = self._members[first][0].ask("invite")["code"]
                self._members[name][0].ask("join", code=code)

    def _answer_all(self, names: list[str]) -> None:
        for name in names:
            self._members[name][0].answer(timeout_s=START_S)

    def _settle(self) -> None:
        """Wait until each sees every other as alive, over an open session."""
        wanted = len(self._members) - 1
        self._until(
            lambda: all(
                peers["alive"] == wanted and peers["open"] == wanted for peers in self._ask_all("peers")
            )
        )

    def _idle_percent(self) -> float:
        before = sum(cost["cpu_s"] for cost in self._ask_all("cost"))
        begun = time.monotonic()
        time.sleep(IDLE_S)  # nothing is to happen
        after = sum(cost["cpu_s"] for cost in self._ask_all("cost"))
        return 100 * (after - before) / (time.monotonic() - begun) / len(self._members)

    def _kill_one(self) -> list[float]:
        """Kill the newest node; milliseconds from its last frame to each other node's seeing it as down."""
        name, (victim, _) = self._members.popitem()
        victim.kill()
        self._until(lambda: all(one["after_ms"] is not None for one in self._ask_all("down", name=name)))
        return [one["after_ms"] for one in self._ask_all("down", name=name)]

    def _rss(self) -> float:
        costs = self._ask_all("cost")
        return float(sum(cost["rss_bytes"] for cost in costs)) / len(costs)

    def _ask_all(self, do: str, **arguments: str) -> list[dict[str, float]]:
        for worker, _ in self._members.values():
            worker.begin(do, **arguments)
        return [worker.answer() for worker, _ in self._members.values()]

    def _until(self, predicate: Callable[[], bool]) -> None:
        give_up = time.monotonic() + SETTLE_S
        while not predicate():
            if time.monotonic() > give_up:
                raise TimeoutError(f"the mesh did not settle: {self._ask_all('peers')}")
            time.sleep(0.5)


SUITE = Suite(
    name="mesh",
    title=f"A mesh of {NODES} nodes on one machine",
    method=f"""
{NODES} nodes in {NODES} processes, each joined through the first one by an invitation, all sessions open, nothing sent.
Each round: the processor time of all of them over {IDLE_S:.0f} s of doing nothing; then one is killed with SIGKILL, and
each other says how long after the last frame that it had of it that node was seen as down; then a new one takes its
place. The memory of a peer is the difference of a node's resident memory between a mesh of {SMALL} and one of {NODES}
nodes, divided by the peers that came in between.
""".strip(),
    unit="as named",
    columns=(
        Column(suffix="median_ms", label="median, ms", with_spread=True),
        Column(suffix="worst_ms", label="slowest of all nodes, ms", with_spread=True),
        Column(suffix="percent", label="% of one processor", with_spread=True),
        Column(suffix="kib", label="KiB"),
        Column(suffix="mib", label="MiB"),
    ),
    rows=(
        Row(key="kill", label="a killed node is seen as down, after its last frame"),
        Row(key="idle", label="an idle node"),
        Row(key="peer", label="memory of one more peer"),
        Row(key="small", label=f"memory of a node among {SMALL}"),
        Row(key="large", label=f"memory of a node among {NODES}"),
    ),
    ratios=(
        Ratio(
            label=f"seen as down by the slowest / {DETECTED_WANTED_MS / 1_000:.0f} s after the last frame",
            of="kill.worst_ms",
            to="kill.wanted_ms",
            goal=Goal(at_most=1),
        ),
        Ratio(
            label=f"an idle node / {IDLE_WANTED_PERCENT} % of a processor",
            of="idle.percent",
            to="idle.wanted",
            goal=Goal(at_most=1),
        ),
    ),
    contenders=lambda: (Mesh(),),
)
