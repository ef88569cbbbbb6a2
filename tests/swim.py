"""A thousand virtual nodes that watch each other: python -m tests.swim [--nodes N] [--loss P] [--seconds S] [--kill K]

Drives `broker_free.presence`, the very code of a node, over a simulated network that loses and delays messages, and
compares with the theory of SWIM (Das, Gupta, Motivala, DSN 2002). Prints what it measured; exit code 1 when a killed
node was not found dead by everybody.
"""

from __future__ import annotations

import argparse
import heapq
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from broker_free.limits import Limits
from broker_free.presence import Action, Changed, Presence, Tell

START_MS = 1_700_000_000_000


class VirtualMesh:
    """N nodes with a clock of their own making. Everybody knows of everybody, as the registry would tell them."""

    def __init__(
        self, nodes: int, *, seed: int, loss: float, limits: Limits, delay_ms: tuple[int, int] = (1, 40)
    ) -> None:
        self.limits = limits
        self.now_ms = 0
        self.down_seen_ms: dict[str, dict[str, int]] = {}  # of a killed node: who found it down, and when
        self.suspected_ms: dict[str, int] = {}  # of a killed node: when the first one suspected it
        self.false_suspicions = 0  # a living node turned suspect at somebody
        self.false_downs = 0
        self.sent = 0
        self._random = Random(seed)
        self._loss = loss
        self._delay_ms = delay_ms
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._dead: dict[str, int] = {}
        names = [f"n{number}" for number in range(nodes)]
        self.nodes = {
            name: Presence(limits, me=name, random=Random(f"{seed}/{name}"), incarnation=START_MS)
            for name in names
        }
        for name, presence in self.nodes.items():
            for other in names:
                if other != name:
                    presence.add(other)
                    presence.heard(other, 0, incarnation=START_MS)
            self._after(self._random.randrange(limits.heartbeat_ms), self._wake, name)

    def run(self, ms: int) -> None:
        end_ms = self.now_ms + ms
        while self._events and self._events[0][0] <= end_ms:
            self.now_ms, _, fn, args = heapq.heappop(self._events)
            fn(*args)
        self.now_ms = end_ms

    def kill(self, name: str) -> None:
        self._dead[name] = self.now_ms
        self.down_seen_ms[name] = {}

    def revive(self, name: str) -> None:
        """Bring a killed node back under a new incarnation, with everything it believed."""
        del self._dead[name]
        self.down_seen_ms.pop(name)
        self._after(0, self._wake, name)

    @property
    def living(self) -> list[str]:
        return [name for name in self.nodes if name not in self._dead]

    def believed(self, name: str) -> set[str]:
        """What the living believe of one node."""
        return {self.nodes[other].state(name) for other in self.living if other != name}

    def _after(self, ms: int, fn: Callable[..., None], *args: Any) -> None:  # Any: passed through
        self._order += 1
        heapq.heappush(self._events, (self.now_ms + ms, self._order, fn, args))

    def _wake(self, name: str) -> None:
        if name in self._dead:
            return
        presence = self.nodes[name]
        self._carry_out(name, presence.tick(self.now_ms))
        self._after(max(1, presence.next_wake_ms() - self.now_ms), self._wake, name)

    def _carry_out(self, name: str, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Tell):
                self.sent += 1
                if self._random.random() >= self._loss:
                    self._after(
                        self._random.randint(*self._delay_ms), self._arrive, name, action.peer, action.message
                    )
            else:
                self._note(name, action)

    def _arrive(self, sender: str, receiver: str, message: dict[str, Any]) -> None:
        if receiver in self._dead or sender in self._dead:
            return
        presence = self.nodes[receiver]
        self._carry_out(receiver, presence.heard(sender, self.now_ms))
        self._carry_out(receiver, presence.receive(sender, message, self.now_ms))

    def _note(self, name: str, changed: Changed) -> None:
        if changed.peer in self._dead:
            if changed.state == "suspect":
                self.suspected_ms.setdefault(changed.peer, self.now_ms)
            elif changed.state == "down":
                self.down_seen_ms[changed.peer].setdefault(name, self.now_ms)
        elif changed.state == "suspect":
            self.false_suspicions += 1
        elif changed.state == "down":
            self.false_downs += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times in milliseconds after the kill; rates are for each node."""

    nodes: int
    kills: int
    suspected_mean_ms: float
    suspected_mean_theory_ms: float
    down_first_ms: int  # the first node to know, over all kills the earliest
    down_mean_ms: float
    down_last_ms: int  # the last node to know, over all kills the latest
    unknown: int  # (killed, living) pairs that never learned
    messages_each_second: float
    messages_each_second_theory: float
    suspicions_each_period: float  # first-hand false suspicions in the whole mesh
    suspicions_each_period_theory: float
    false_downs: int


def measure(nodes: int, *, seed: int = 1, loss: float = 0.01, kills: int = 50, quiet_s: int = 60) -> Measured:
    """Run a mesh in peace for `quiet_s`, then kill nodes at random moments, one after another."""
    limits = Limits()
    random = Random(seed)
    mesh = VirtualMesh(nodes, seed=seed, loss=loss, limits=limits)
    mesh.run(4 * limits.heartbeat_ms)
    sent, began_ms = mesh.sent, mesh.now_ms
    doubted = sum(presence.counts.suspicions for presence in mesh.nodes.values())
    mesh.run(quiet_s * 1_000)
    seconds = (mesh.now_ms - began_ms) / 1_000
    rate = (mesh.sent - sent) / nodes / seconds
    periods = seconds * 1_000 / limits.heartbeat_ms
    doubted = sum(presence.counts.suspicions for presence in mesh.nodes.values()) - doubted
    killed_ms: dict[str, int] = {}
    for name in random.sample(mesh.living, kills):
        mesh.run(random.randrange(limits.heartbeat_ms // 10))
        mesh.kill(name)
        killed_ms[name] = mesh.now_ms
    # Three quarters of a minute: found by then, or not at all.
    mesh.run(45_000)
    living = mesh.living
    seen = {name: mesh.down_seen_ms[name] for name in killed_ms}
    after = {name: [at_ms - killed_ms[name] for at_ms in by.values()] for name, by in seen.items()}
    alive = 1 - kills / 2 / nodes  # on average over the kills
    return Measured(
        nodes=nodes,
        kills=kills,
        suspected_mean_ms=statistics.fmean(mesh.suspected_ms[name] - killed_ms[name] for name in killed_ms),
        suspected_mean_theory_ms=suspicion_theory_ms(alive, limits),
        down_first_ms=min(min(times) for times in after.values()),
        down_mean_ms=statistics.fmean(at_ms for times in after.values() for at_ms in times),
        down_last_ms=max(max(times) for times in after.values()),
        unknown=sum(len([one for one in living if one not in by]) for by in seen.values()),
        messages_each_second=rate,
        messages_each_second_theory=load_theory(limits, loss),
        suspicions_each_period=doubted / periods,
        suspicions_each_period_theory=nodes * false_theory(limits, loss),
        false_downs=mesh.false_downs,
    )


def suspicion_theory_ms(alive: float, limits: Limits) -> float:
    """Mean time from a failure to the first suspicion.

    The periods of the nodes are not in step, so pings fall on the dead node at a rate of `alive` in a period: the first
    one after 1/alive periods on average. The suspicion comes at the end of the period of whoever sent it, one period
    later. (SWIM §3.1 gives e/(e - 1) = 1.58 periods for nodes in step, from the failure to the end of the period.)
    """
    return limits.heartbeat_ms * (1 / alive + 1)


def load_theory(limits: Limits, loss: float) -> float:
    """Messages a node sends in a second: a ping, the ack to one, and the detours where one of these was lost."""
    arrives = 1 - loss
    direct_fails = 1 - arrives**2
    detour = limits.probe_members * (
        1 + arrives * (1 + arrives + arrives**2)
    )  # ask, ping, ack, ack passed on
    roll = 2 / 30
    return (1 + arrives + direct_fails * detour + roll) / (limits.heartbeat_ms / 1_000)


def false_theory(limits: Limits, loss: float) -> float:
    """SWIM §3.1: the chance that a living node is suspected, first-hand, in one period.

    One ping falls on a node in a period on average; it and all detours of four messages have to fail.
    """
    arrives = 1 - loss
    return (1 - arrives**2) * (1 - arrives**4) ** limits.probe_members


def report(measured: Measured, loss: float) -> str:
    m = measured
    rows: tuple[tuple[str, float, float | None], ...] = (
        ("first suspicion, mean, s", m.suspected_mean_ms / 1e3, m.suspected_mean_theory_ms / 1e3),
        ("down, first to know, s", m.down_first_ms / 1e3, None),
        ("down, mean, s", m.down_mean_ms / 1e3, None),
        ("down, last to know, s", m.down_last_ms / 1e3, None),
        ("messages a node and second", m.messages_each_second, m.messages_each_second_theory),
        ("false suspicions a period", m.suspicions_each_period, m.suspicions_each_period_theory),
        ("falsely down", m.false_downs, None),
        ("never learned", m.unknown, None),
    )
    lines = [
        f"{m.nodes} nodes, {loss:.0%} of messages lost, {m.kills} killed",
        f"{'':28}{'measured':>12}{'theory':>12}",
    ]
    for name, found, theory in rows:
        lines.append(f"{name:28}{found:>12.4g}{'' if theory is None else format(theory, '>12.4g')}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.swim", description="Presence of a large mesh, simulated.")
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--loss", type=float, default=0.01, help="share of messages lost")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--seconds", type=int, default=60, help="of peace, in which false suspicions are counted"
    )
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    measured = measure(
        given.nodes, seed=given.seed, loss=given.loss, kills=given.kills, quiet_s=given.seconds
    )
    print(report(measured, given.loss))
    return 1 if measured.unknown or math.isnan(measured.suspected_mean_ms) else 0


if __name__ == "__main__":
    sys.exit(main())
