"""Two nodes on a disk whose syncs fail or take long. Runs under `tests/faults/shim.c`; writes JSON, a line a case.

python -m tests.sync_worker FOLDER CONTROL CASE …      a case is sender:N, receiver:N (fails from the Nth message on) or
                                                       slow:MS
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker_free import Node
from broker_free.errors import StoreBroken, StoreFailed
from tests.nodes import until

MESSAGES = 12


class Pair:
    """A sender and a receiver; the folder "bad" under `root` holds the one whose disk is meant."""

    def __init__(self, root: Path, bad: str, listen: Mapping[str, str] | None = None) -> None:
        homes = {name: root / ("bad" if name == bad else "good") / name for name in ("a", "b")}
        for home in homes.values():
            home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.a, self.b = (
            Node(name, home=home, listen=(listen or {}).get(name, "tcp://127.0.0.1:0"))
            for name, home in homes.items()
        )
        self.arrived: list[int] = []
        self.states: set[str] = set()
        self.b.effect("n", lambda tx, one: tx.after_commit(lambda: self.arrived.append(int(one.body))))
        for node in (self.a, self.b):
            node.on_peer(lambda view: self.states.add(view.state))

    async def __aenter__(self) -> Pair:
        await self.a.start()
        await self.b.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.a.close()
        await self.b.close()

    async def meet(self) -> None:
        await self.b.join((await self.a.invite()).encode())
        await until(lambda: all(peer.link == "open" for n in (self.a, self.b) for peer in n.peers()))

    async def send(self, number: int) -> None:
        await self.a.publish("n", str(number).encode(), to=[self.b.node_id])


def inbox(db: Any) -> list[int]:
    return [int(body) for (body,) in db.execute_sql("SELECT body FROM inbox ORDER BY row")]


async def failing(root: Path, control: Path, bad: str, after: int) -> dict[str, Any]:
    accepted, errors = [], []
    async with Pair(root, "a" if bad == "sender" else "b") as pair:
        await pair.meet()
        victim = pair.a if bad == "sender" else pair.b
        for number in range(MESSAGES):
            if number == after:
                if bad == "receiver":
                    await until(lambda: len(pair.arrived) == after)
                control.write_text("eio")
            try:
                await pair.send(number)
                accepted.append(number)
            except StoreFailed as error:
                errors.append(error.code)
        await until(lambda: victim.health.state == "failed")
        before = len(pair.arrived)
        try:
            await victim.publish("n", b"1000", to=[victim.node_id])
            refused = "no"
        except StoreBroken as error:
            refused = error.code
        rows = await victim.read(lambda db: db.execute_sql("SELECT count(*) FROM peer").fetchone()[0])
        hint = victim.health.hint
        link = pair.a.peers()[0].link
    syncs = control.with_name(control.name + ".log").read_text()
    control.with_name(control.name + ".log").unlink()
    control.write_text("")
    listen = {node.name: node.endpoints[0] for node in (pair.a, pair.b)}
    async with Pair(root, "a" if bad == "sender" else "b", listen) as again:
        # What the failed sync was for may be on disk all the same: then it counts as arrived, and is not told again.
        async with asyncio.timeout(30):
            while not {*accepted} <= {*(arrived := await again.b.read(inbox))}:
                await asyncio.sleep(0.01)
        victim = again.a if bad == "sender" else again.b
        async with asyncio.timeout(30):
            while not (events := await victim.events(kind="unclean-start")):
                await asyncio.sleep(0.05)
        return {
            "accepted": accepted,
            "errors": errors,
            "refused": refused,
            "readable": rows > 0,
            "hint": hint,
            "link": link,
            "syncs": syncs,
            "arrived before": before,
            "arrived": arrived,
            "after": victim.health.state,
            "event": events[0].detail,
        }


async def slow(root: Path, control: Path, ms: int) -> dict[str, Any]:
    async with Pair(root, "a") as pair:
        await pair.meet()
        pair.states.clear()
        control.write_text(f"sleep {ms}")
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number in range(MESSAGES):
            await pair.send(number)
        await until(lambda: len(pair.arrived) == MESSAGES, 60)
        took_ms = (loop.time() - began) * 1_000
        # Long enough for a peer to be suspected, had its heartbeats stopped: beside it, the disk stays busy.
        while ms >= 500 and loop.time() - began < 7:
            await pair.send(MESSAGES)
        control.write_text("")
        return {
            "arrived": pair.arrived[:MESSAGES],
            "states": sorted(pair.states),
            "took": took_ms,
            "health": pair.a.health.state,
        }


async def main(folder: str, control: str, *cases: str) -> None:
    for index, case in enumerate(cases):
        kind, _, number = case.partition(":")
        root = Path(folder) / str(index)
        Path(control).write_text("")
        if kind == "slow":
            result = await slow(root, Path(control), int(number))
        else:
            result = await failing(root, Path(control), kind, int(number))
        print(json.dumps({"case": case, **result}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
