"""The faults, each a function of a folder, a seed and a number: what is done, and which promises must hold after it.

A scenario returns what it measured. It raises `Violated`, with the seed and the trace, when a promise is broken.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.faults.fleet import ANSWER_S, FAST, Fleet, NodeProcess, Violated, own_address
from tests.faults.netns import Lan
from tests.faults.proxy import Proxy

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
        _all_alive(fleet, nodes)
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


def bad_network(folder: Path, *, seed: int | None = None, times: int = 10) -> Measured:
    """F15: latency, resets, half-closed connections and wrong bytes, `times` of each, under a continuous stream."""
    with Fleet(folder, seed=seed) as fleet, ExitStack() as stack:
        proxies = []
        for name in ("a", "b", "c"):
            address, in_front = own_address(), own_address()
            proxy = Proxy((in_front, 7421), (address, 7420), seed=fleet.random.getrandbits(32))
            proxies.append(stack.enter_context(proxy))
            advertise = [f"tcp://{in_front}:7421"]
            fleet.add(name, listen=f"tcp://{address}:7420", node={"advertise": advertise})
        for inviting, joining in combinations(fleet.nodes.values(), 2):
            fleet.pair(inviting, joining)
        fleet.everybody_streams(batch=8, gap_ms=8)
        cuts = 0
        kinds = ["latency", "reset", "half-close", "corrupt"] * times
        fleet.random.shuffle(kinds)
        for kind in kinds:
            proxy = fleet.random.choice(proxies)
            fleet.fault(kind, *fleet.nodes.values())
            match kind:
                case "latency":
                    proxy.delay(fleet.random.choice([0.005, 0.05, 0.3]))
                case "reset":
                    cuts += proxy.reset()
                case "half-close":
                    cuts += proxy.half_close()
                case "corrupt":
                    proxy.corrupt(fleet.random.randint(1, 3))
            time.sleep(fleet.random.uniform(0.05, 0.4))
            proxy.delay(0)
        fleet.healed(*fleet.nodes.values())
        dialled = sum(proxy.connections for proxy in proxies)
        if cuts < times or dialled < times:
            raise Violated(fleet.trace(f"{cuts} cuts, {dialled} dials: the proxies were not in the way"))
        return {**fleet.judge(), "cuts": cuts, "dials": dialled}


def partition(folder: Path, *, seed: int | None = None) -> Measured:
    """F12: the cables of some machines are pulled until everybody knows, then plugged in again."""
    machines = 4
    with Lan(machines) as lan, Fleet(folder, seed=seed, limits=FAST) as fleet:
        nodes = _on_lan(fleet, lan)
        _all_alive(fleet, nodes)
        since = time.monotonic()
        fleet.everybody_streams(batch=8, gap_ms=40)
        alone = fleet.random.sample(range(machines), fleet.random.choice([1, 2]))
        rest = [node for number, node in enumerate(nodes) if number not in alone]
        time.sleep(fleet.random.uniform(0.0, 0.5))
        fleet.fault("partition", *(nodes[number] for number in alone))
        began = time.monotonic()
        for number in alone:
            lan.unplug(number)
        for number in alone:
            fleet.see(nodes[number], "down", rest)
            for node in rest:
                fleet.see(node, "down", [nodes[number]])
        down_s = time.monotonic() - began
        queued = sum(node.ask("queued")["queued"] for node in nodes)
        if queued == 0:
            raise Violated(fleet.trace("nothing waited for the other side: there was no partition"))
        for number in alone:
            lan.plug(number)
        fleet.healed(*(nodes[number] for number in alone))
        healed = time.monotonic()
        _all_alive(fleet, nodes)
        alive_s = time.monotonic() - healed
        fleet.judge_presence(bound_s=ANSWER_S, since=since)
        return {**fleet.judge(), "down_s": down_s, "alive_s": alive_s, "queued": queued}


def one_way(folder: Path, *, seed: int | None = None) -> Measured:
    """F13: one machine's packets to another vanish, the way back works. Nobody's view goes to and fro."""
    machines = 3
    with Lan(machines) as lan, Fleet(folder, seed=seed, limits=FAST) as fleet:
        nodes = _on_lan(fleet, lan)
        _all_alive(fleet, nodes)
        since = time.monotonic()
        fleet.everybody_streams(batch=8, gap_ms=40)
        mute, deaf = fleet.random.sample(range(machines), 2)
        fleet.fault("one-way", nodes[mute], nodes[deaf])
        lan.lose(mute, to=deaf)
        # Long enough for each view to settle and to show that it stays: time itself is what is waited for.
        time.sleep(4 * FAST["down_after_ms"] / 1_000)
        changes = [
            (round(at - since, 2), observer, peer.name, state)
            for peer in nodes
            for at, observer, state in fleet.views(peer, since)
        ]
        lan.find(mute, to=deaf)
        fleet.healed(nodes[mute], nodes[deaf])
        for observer in nodes:
            for peer in nodes:
                mine = [change for change in changes if change[1:3] == (observer.name, peer.name)]
                if sum(change[3] == "alive" for change in mine) > 1:
                    raise Violated(fleet.trace(f"I8: a view that flaps: {mine}"))
                if mine and not {observer, peer} <= {nodes[mute], nodes[deaf]}:
                    raise Violated(fleet.trace(f"I8: a view that no fault touched changed: {mine}"))
        _all_alive(fleet, nodes)
        return {**fleet.judge(), "changes": changes}


def dial_only(folder: Path, *, seed: int | None = None) -> Measured:
    """A peer that nobody can dial is delivered to over the link that it dialled itself, and seen over it too."""
    with Lan(2) as lan, Fleet(folder, seed=seed, limits=FAST) as fleet:
        a = fleet.add("a", listen=f"tcp://{lan.addresses[0]}:7420", netns=lan.namespaces[0])
        # Its listener is on its own loopback: what it tells others to dial leads them nowhere.
        hidden = fleet.add("hidden", listen="tcp://127.0.0.1:7420", netns=lan.namespaces[1])
        fleet.pair(a, hidden)
        fleet.stream(a, [hidden], count=200)
        a.ask("wait")
        fleet.until(lambda: a.ask("queued")["queued"] == 0, "acks over the link that the hidden node dialled")
        fleet.fault("kill", hidden)
        hidden.kill()
        fleet.stream(a, [hidden], count=200)
        a.ask("wait")
        if a.ask("queued")["queued"] != 200:
            raise Violated(fleet.trace("the hidden node was dead and confirmed something"))
        hidden.start()
        fleet.healed(hidden)
        fleet.until(lambda: a.ask("queued")["queued"] == 0, "what waited for the hidden node")
        _all_alive(fleet, [a, hidden])
        since = time.monotonic()
        # Nothing is sent now: whoever is only alive while it talks would become suspect in this time.
        time.sleep(2 * FAST["suspect_after_ms"] / 1_000)
        fleet.judge_presence(bound_s=0, since=since)
        return fleet.judge()


def _has_arrived(fleet: Fleet, count: int) -> bool:
    return fleet.counts()["arrived"] >= count


def _on_lan(fleet: Fleet, lan: Lan) -> list[NodeProcess]:
    """One node on each machine, each knowing each."""
    nodes = [
        fleet.add(f"n{number}", listen=f"tcp://{address}:7420", netns=namespace)
        for number, (address, namespace) in enumerate(zip(lan.addresses, lan.namespaces, strict=True))
    ]
    for inviting, joining in combinations(nodes, 2):
        fleet.pair(inviting, joining)
    return nodes


def _all_alive(fleet: Fleet, nodes: Sequence[NodeProcess]) -> None:
    for node in nodes:
        fleet.see(node, "alive", [other for other in nodes if other is not node])


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
    """F21: a message whose handler always raises stops nobody: the others arrive in order, it becomes a dead letter."""
    tries, dead = 3, 3  # of the ten that are usual, so that the growing pauses do not take minutes; the state
    with Fleet(folder, seed=seed) as fleet:
        a, b = fleet.add("a"), fleet.add("b", limits={"deliveries_max": tries})
        fleet.pair(a, b)
        first = a.ask("halt")["next"]
        poisoned = sorted(fleet.random.sample(range(first, first + 100), 3))
        b.ask("poison", numbers=poisoned)
        fleet.stream(a, [b], count=100)
        a.ask("wait")
        others = [number for number in range(first, first + 100) if number not in poisoned]
        fleet.until(lambda: b.ask("filed")["filed"] == others, "all but the poisoned messages, in order")
        buried = [[number, dead, tries] for number in poisoned]
        fleet.until(
            lambda: [one for one in b.ask("inbox")["inbox"] if one[0] in poisoned] == buried,
            "the poisoned messages as dead letters",
        )
        if len(b.ask("events", kind="dead-letter")["events"]) != len(poisoned):
            raise Violated(fleet.trace("a dead letter that no event tells of"))
        fleet.stream(a, [b], count=100)
        a.ask("wait")
        return fleet.judge()


def clock_jumps(folder: Path, *, seed: int | None = None, times: int = 10) -> Measured:
    """F17: UTC jumps by up to a day, to and fro, while messages wait. Each lives as long as it was given, ± 1 s."""
    with Fleet(folder, seed=seed) as fleet:
        a, b = fleet.mesh("a", "b")
        fleet.fault("kill", b)
        b.kill()
        short = [fleet.random.randint(1_500, 6_000) for _ in range(30)]
        day_ms = 86_400_000
        lasting = [3_600_000] * 5  # an hour: a jump by a day must neither end nor prolong it
        made = a.ask("lifetimes", to=[b.id], ttls_ms=[*short, *lasting])["made"]
        for _ in range(times):
            a.ask("set_clock", ahead_ms=fleet.random.randint(-day_ms, day_ms))
            time.sleep(0.5)
        dying = [one for one in made if one[2] != lasting[0]]
        fleet.until(lambda: len(a.ask("dead")["dead"]) >= len(dying), "the end of what was to die")
        dead = a.ask("dead")["dead"]
        off_s = []
        for number, message_id, ttl_ms, began in dying:
            at, reason = dead[message_id]
            off_s.append(at - began - ttl_ms / 1_000)
            if reason != "expired" or abs(off_s[-1]) > 1:
                text = f"{number} lived {at - began:.2f} s of its {ttl_ms} ms: {reason}"
                raise Violated(fleet.trace(text))
        if len(dead) != len(dying):
            raise Violated(fleet.trace("a message died an hour early"))
        b.start()
        b.ask("set_clock", ahead_ms=-day_ms)
        fleet.healed(b)
        verdict = fleet.judge()
        if verdict["states"] != {"expired": len(dying), "delivered": len(lasting)}:
            raise Violated(fleet.trace(f"ended as {verdict['states']}"))
        return {**verdict, "off_s_max": max(map(abs, off_s))}


def few_descriptors(folder: Path, *, seed: int | None = None, times: int = 3) -> Measured:
    """F18: a node that has run out of descriptors survives, and goes on when there are some again."""
    with Fleet(folder, seed=seed) as fleet:
        poor = fleet.add("poor", descriptors=64)
        b, c = fleet.add("b"), fleet.add("c")
        for inviting, joining in ((poor, b), (poor, c), (b, c)):
            fleet.pair(inviting, joining)
        fleet.everybody_streams(batch=8, gap_ms=20)
        for _ in range(times):
            fleet.fault("descriptors", poor)
            if poor.ask("hog")["hogged"] < 3:
                raise Violated(fleet.trace("the node had used its descriptors up by itself"))
            other = fleet.random.choice([b, c])  # it will want new connections, for which there is no room
            fleet.fault("kill", other)
            other.kill()
            other.start()
            fleet.stream(other, batch=8, gap_ms=20)
            host, port = poor.endpoint.removeprefix("tcp://").split(":")
            with ExitStack() as strangers:  # nor for these
                for _ in range(100):
                    one = strangers.enter_context(socket.socket())
                    one.settimeout(0.5)
                    with suppress(OSError):
                        one.connect((host, int(port)))
                enough = fleet.counts()["arrived"] + 100
                fleet.until(partial(_has_arrived, fleet, enough), "arrivals meanwhile")
            poor.ask("let_go")
            _all_alive(fleet, [poor, b, c])
            fleet.healed(poor, other)
            for one, another in combinations([poor, b, c], 2):
                fleet.pair(one, another)  # waits for the session
        return fleet.judge()


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
