"""What tests of several nodes share: nodes in this process, nodes in processes of their own, and waiting for both."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from broker_free import Node
from broker_free.message import Envelope

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 40.0  # nothing here is a race: a loaded machine gets its time

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 110))


async def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds; it may be a coroutine function."""
    async with asyncio.timeout(timeout_s):
        while True:
            holds = condition()
            if inspect.isawaitable(holds):
                holds = await holds
            if holds:
                return
            await asyncio.sleep(0.005)


async def pair(inviting: Node, joining: Node) -> None:
    await joining.join((await inviting.invite()).encode())
    await until(lambda: all(peer.link == "open" for node in (inviting, joining) for peer in node.peers()))


def collecting(node: Node, pattern: str = "t.>") -> list[Envelope]:
    arrived: list[Envelope] = []
    node.effect(pattern, lambda tx, envelope: tx.after_commit(lambda: arrived.append(envelope)))
    return arrived


class Worker:
    """A node in another process (`node_worker`), which says one JSON object a line. It does not outlive its test."""

    running: ClassVar[set[subprocess.Popen[str]]] = set()

    def __init__(self, home: Path, *args: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.node_worker", str(home), *args],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
            cwd=ROOT,
        )
        self.running.add(self.process)
        started = self.read()
        self.node_id, self.endpoint = started["node_id"], started["endpoint"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the worker has ended"
        return dict(json.loads(line))

    def read_until(self, key: str) -> Any:
        while key not in (said := self.read()):
            pass
        return said[key]

    def rest(self) -> list[dict[str, Any]]:
        """Return what it says until it ends; a line that a kill cut short does not count."""
        assert self.process.stdout
        return [json.loads(line) for line in self.process.stdout if line.endswith("\n")]

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def kill(self) -> list[dict[str, Any]]:
        self.process.kill()
        said = self.rest()
        self.wait()
        return said

    def stop(self) -> list[dict[str, Any]]:
        self.process.terminate()
        said = self.rest()
        assert self.wait() == 0
        return said

    @classmethod
    def end_all(cls) -> None:
        while cls.running:
            process = cls.running.pop()
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()
