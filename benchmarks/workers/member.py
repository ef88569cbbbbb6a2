"""One of many nodes of a mesh: it says how it sees the others, and what it costs while nothing happens."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import psutil

from benchmarks.workers import Answer, say
from broker_free import Limits, Node


class Member:
    def __init__(self, node: Node) -> None:
        self._node = node
        self._down: dict[str, float] = {}  # name -> milliseconds from its last frame to being seen as down
        node.on_peer(lambda view: self._note(view.name, view.state, view.last_seen_ms))

    def _note(self, name: str, state: str, last_seen_ms: int | None) -> None:
        if state != "down":
            self._down.pop(name, None)
        elif last_seen_ms is not None and name not in self._down:
            self._down[name] = time.time_ns() / 1e6 - last_seen_ms

    async def invite(self) -> Answer:
        return {"code": (await self._node.invite()).encode()}

    async def join(self, *, code: str) -> Answer:
        return {"name": (await self._node.join(code)).name}

    async def peers(self) -> Answer:
        views = self._node.peers()
        return {
            "known": len(views),
            "alive": sum(view.state == "alive" for view in views),
            "open": sum(view.link == "open" for view in views),
        }

    async def down(self, *, name: str) -> Answer:
        """How long after the last frame of a node it was seen as down; None while it is not."""
        return {"after_ms": self._down.get(name)}

    async def cost(self) -> Answer:
        process = psutil.Process()
        times = process.cpu_times()
        return {"cpu_s": times.user + times.system, "rss_bytes": process.memory_info().rss}


async def main(name: str, home: str) -> None:
    # Dozens join within seconds here; elsewhere that would be an attack.
    node = Node(name, home=Path(home), limits=Limits(joins_burst=1_000, joins_a_second_max=1_000))
    member = Member(node)
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    async with node:
        say({"name": name})
        while line := await reader.readline():
            arguments = json.loads(line)
            say(await getattr(member, arguments.pop("do"))(**arguments))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
