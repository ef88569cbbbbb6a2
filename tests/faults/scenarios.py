"""The faults, each a function of a folder, a seed and a number: what is done, and which promises must hold after it.

A scenario returns what it measured. It raises `Violated`, with the seed and the trace, when a promise is broken.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.fleet import FAST, Fleet, Violated

Measured = dict[str, Any]
Scenario = Callable[..., Measured]


def kills(folder: Path, *, seed: int | None = None, times: int = 60) -> Measured:
    """F4: SIGKILL of a receiver, a sender, or both ends of a link, at random moments of a continuous stream."""
    with Fleet(folder, seed=seed) as fleet:
        nodes = fleet.mesh("a", "b", "c")
        fleet.everybody_streams(batch=12, gap_ms=4)
        done = 0
        while done < times:
            time.sleep(fleet.random.uniform(0.0, 0.12))  # the moment is the point
            victims = fleet.random.sample(nodes, fleet.random.choice([1, 1, 2]))
            fleet.fault("kill", *victims)
            for node in victims:
                node.kill()
            time.sleep(fleet.random.choice([0.0, 0.0, 0.05]))
            for node in victims:
                node.start()
            for node in victims:
                fleet.stream(node, batch=12, gap_ms=4)
            fleet.healed(*victims)
            done += len(victims)
        return fleet.judge()


def pause(folder: Path, *, seed: int | None = None) -> Measured:
    """F16: SIGSTOP one node until the others call it down, then SIGCONT: nobody else flaps, nothing is lost."""
    with Fleet(folder, seed=seed, limits=FAST) as fleet:
        nodes = fleet.mesh("a", "b", "c", "d")
        for node in nodes:
            fleet.see(node, "alive", [other for other in nodes if other is not node])
        since = time.monotonic()
        fleet.everybody_streams(batch=8, gap_ms=40)
        victim = fleet.random.choice(nodes)
        others = [node for node in nodes if node is not victim]
        time.sleep(fleet.random.uniform(0.0, 0.5))
        fleet.fault("pause", victim)
        paused = time.monotonic()
        victim.signal(signal.SIGSTOP)
        try:
            fleet.see(victim, "down", others)
        finally:
            victim.signal(signal.SIGCONT)
        fleet.healed(victim)
        resumed = time.monotonic()
        fleet.see(victim, "alive", others)
        # What the woken node believes needs time to show: as long as it would take to call somebody down.
        time.sleep(FAST["down_after_ms"] / 1_000)
        fleet.judge_presence(bound_s=FAST["down_after_ms"] / 1_000, since=since)
        downs = [at - paused for at, _, state in fleet.views(victim, since) if state == "down"]
        backs = [at - resumed for at, _, state in fleet.views(victim, resumed) if state == "alive"]
        return {**fleet.judge(), "down_s": max(downs), "alive_s": max(backs)}


def slow_consumer(folder: Path, *, seed: int | None = None) -> Measured:
    """F21: a handler that sleeps. Credit bounds what is on the wire, and no other peer waits for the slow one."""
    with Fleet(folder, seed=seed) as fleet:
        a, slow, quick = fleet.mesh("a", "slow", "quick")
        credit = 256  # Limits.credit_messages: what a peer may have un-acked on the wire
        slow.ask("slow", effect_ms=10)
        fleet.stream(a, [slow], count=1_500, batch=64)
        a.ask("wait")
        fleet.stream(a, [quick], count=300, batch=64)
        a.ask("wait")
        peak = 0
        while True:
            in_flight = a.ask("in_flight")["in_flight"]
            peak = max(peak, in_flight[slow.id])
            if peak > credit:
                raise Violated(fleet.trace(f"{peak} messages were on the wire, the credit is {credit}"))
            queued = a.ask("queued")["queued"]
            if in_flight[quick.id] == 0 and peak:
                break
        if queued == 0:
            raise Violated(fleet.trace("the quick peer had to wait for the slow one"))
        slow.ask("slow", effect_ms=0)
        return {**fleet.judge(), "peak_in_flight": peak, "queued_when_quick_was_done": queued}


def poison(folder: Path, *, seed: int | None = None) -> Measured:
    """F21: a message whose handler always raises stops nobody: the others arrive in order, it is tried again."""
    with Fleet(folder, seed=seed) as fleet:
        a, b = fleet.mesh("a", "b")
        first = a.ask("halt")["next"]
        poisoned = sorted(fleet.random.sample(range(first, first + 100), 3))
        b.ask("poison", numbers=poisoned)
        fleet.stream(a, [b], count=100)
        a.ask("wait")
        others = [number for number in range(first, first + 100) if number not in poisoned]
        fleet.until(lambda: b.ask("filed")["filed"] == others, "all but the poisoned messages, in order")
        fleet.until(
            lambda: all(tries >= 2 for number, _, tries in b.ask("inbox")["inbox"] if number in poisoned),
            "another try of the poisoned messages",
        )
        b.ask("poison", numbers=[])
        fleet.until(
            lambda: sorted(b.ask("filed")["filed"]) == sorted([*others, *poisoned]),
            "the messages that are poison no more",
        )
        return fleet.judge(effects=False)


def blocked_loop(folder: Path, *, seed: int | None = None) -> Measured:
    """F24: a host whose event loop stands still goes on receiving, acking, and being seen."""
    with Fleet(folder, seed=seed, limits=FAST) as fleet:
        a, b = fleet.mesh("a", "b")
        fleet.see(b, "alive", [a])
        since = time.monotonic()
        b.begin("block", s=FAST["down_after_ms"] / 1_000 + 1)
        fleet.stream(a, [b], count=500)
        a.ask("wait")
        fleet.until(lambda: a.ask("queued")["queued"] == 0, "acks of a node whose loop stands still")
        assert b._channel is not None
        if select.select([b._channel], [], [], 0)[0]:
            raise Violated(fleet.trace("the acks came only once the loop went on"))
        b.answer()
        fleet.judge_presence(bound_s=0, since=since)
        return fleet.judge()


def cancelled(folder: Path, *, seed: int | None = None) -> Measured:
    """F24: awaits that are cancelled at any moment leave nothing behind and lose nothing."""
    with Fleet(folder, seed=seed) as fleet:
        a, b = fleet.mesh("a", "b")
        gone = a.ask("cancel", to=[b.id], count=150)["cancelled"]
        if gone < 100:
            raise Violated(fleet.trace(f"only {gone} awaits were cancelled: the scenario tests nothing"))
        return {**fleet.judge(), "cancelled": gone}


def forked(folder: Path, *, seed: int | None = None) -> Measured:
    """F24: a host that forks. Neither the child's life nor its end touches the node; the home stays free for it."""
    with Fleet(folder, seed=seed) as fleet:
        a, _ = fleet.mesh("a", "b")
        fleet.everybody_streams(batch=8, gap_ms=5)
        short = a.ask("fork", life_s=0.2)["pid"]
        if (status := a.ask("reap", pid=short)["status"]) != 0:
            raise Violated(fleet.trace(f"the forked child ended with {status}"))
        before = fleet.counts()["acked"]
        fleet.until(lambda: fleet.counts()["acked"] > before + 50, "messages after the child has ended")
        # A child that outlives its parent (a pool, a daemon) must not keep the home.
        long = a.ask("fork", life_s=3_600)["pid"]
        try:
            fleet.fault("kill", a)
            a.kill()
            a.endpoint = (
                a.endpoint.rsplit(":", 1)[0] + ":7421"
            )  # the old port's listener lives on in the child
            a.start()
            fleet.stream(a, batch=8, gap_ms=5)
            fleet.healed(a)
            before = fleet.counts()["acked"]
            fleet.until(lambda: fleet.counts()["acked"] > before + 50, "messages of the node that came back")
        finally:
            os.kill(long, signal.SIGKILL)
        return fleet.judge()


def terminated(folder: Path, *, seed: int | None = None, times: int = 5) -> Measured:
    """F24: SIGTERM while sending. The process ends by itself, cleanly, and every returned send counts."""
    with Fleet(folder, seed=seed) as fleet:
        a, b = fleet.mesh("a", "b")
        for _ in range(times):
            fleet.stream(a, [b], batch=32)
            fleet.stream(b, [a], batch=32)
            time.sleep(fleet.random.uniform(0.0, 0.2))
            victim = fleet.random.choice([a, b])
            fleet.fault("terminate", victim)
            victim.signal(signal.SIGTERM)
            if (status := victim.gone(timeout_s=30)) != 0:
                raise Violated(fleet.trace(f"{victim.name} ended with {status} after SIGTERM"))
            victim.start()
            fleet.halt()
            fleet.healed(victim)
        return fleet.judge()


def side_by_side(scenario: Scenario, folder: Path, *, times: int, seed: int | None = None) -> list[Measured]:
    """Run a scenario that mostly waits several times at once, each with a seed of its own."""
    with ThreadPoolExecutor(times) as pool:
        seeds = [None if seed is None else seed + number for number in range(times)]
        runs = [pool.submit(scenario, folder / str(number), seed=one) for number, one in enumerate(seeds)]
        return [run.result() for run in runs]
