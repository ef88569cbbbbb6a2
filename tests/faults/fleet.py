"""A handful of nodes in processes of their own, what is done to them, and the oracle that judges.

Everything random comes from one seed, which is in the message of every failure and in the first line of the oracle's
log; the log is the trace of what happened. Only processes started here are signalled, each while it is held as a
zombie at the latest, so that its pid cannot belong to anybody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tests.faults.zygote import ROOT, zygote

ANSWER_S: Final = 60.0  # generous: the machine may be busy with other things
DRAIN_S: Final = 30.0  # I6
LIVES: Final = 10_000_000  # numbers of one life of a node; the next begins at the next multiple
FAST: Final = {"heartbeat_ms": 400, "suspect_after_ms": 2_000, "down_after_ms": 5_000}


class Violated(AssertionError):
    """A promise is broken. The message holds the seed and where the trace is."""


class NodeProcess:
    """One node: its home, its place in the world, and the process that runs it now, if any."""

    def __init__(self, fleet: Fleet, name: str, **spec: Any) -> None:
        self.name = name
        self.home = fleet.folder / name
        self.id = ""
        self.endpoint = ""
        self.pid = 0
        self.lives = 0
        self._fleet = fleet
        self._spec = spec
        self._channel: socket.socket | None = None
        self._buffer = b""

    @property
    def is_running(self) -> bool:
        return self.pid != 0

    def start(self, **more: Any) -> None:
        """Start its process without waiting until it is ready; the next `ask` does."""
        assert not self.is_running
        ours, theirs = socket.socketpair()
        self.lives += 1
        self._fleet.note(t="start", node=self.name, life=self.lives)
        spec = {
            "name": self.name,
            "home": str(self.home),
            "listen": self.endpoint or "tcp://127.0.0.1:0",
            "oracle": str(self._fleet.oracle.socket_path),
            "stderr": str(self._fleet.folder / f"{self.name}.log"),
            "seed": self._fleet.random.getrandbits(32),
            "first": self.lives * LIVES,
            **self._spec,
            **more,
        }
        if self.endpoint:
            spec["listen"] = self.endpoint
        with theirs:
            self.pid = zygote().fork(spec, theirs)
        self._channel, self._buffer = ours, b""
        self._is_ready = False

    def ready(self) -> None:
        """Wait until the node listens."""
        if not self._is_ready:
            self._is_ready = True
            hello = self._read()
            if "error" in hello:
                raise Violated(self._fleet.trace(f"{self.name} did not start: {hello}"))
            self.id, self.endpoint = hello["id"], hello["endpoint"]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.begin(do, **arguments)
        return self.answer()

    def begin(self, do: str, **arguments: Any) -> None:
        self.ready()
        assert self._channel is not None
        self._channel.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        answer = self._read()
        if "error" in answer:
            raise Violated(self._fleet.trace(f"{self.name} said {answer}"))
        return answer

    def _read(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        assert self._channel is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([self._channel], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.signal(signal.SIGUSR1)
                time.sleep(0.2)  # to write down where its threads are
                raise Violated(
                    self._fleet.trace(
                        f"{self.name} hangs: no answer in {timeout_s:.0f} s: {self.last_words()}"
                    )
                )
            arrived = self._channel.recv(1 << 20)
            if not arrived:
                raise Violated(self._fleet.trace(f"{self.name} has died by itself: {self.last_words()}"))
            self._buffer += arrived
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_words(self) -> str:
        log = self._fleet.folder / f"{self.name}.log"
        return log.read_text(errors="replace")[-3_000:] if log.exists() else ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it without a chance to say anything."""
        self.signal(signal.SIGKILL)
        self.gone()

    def gone(self, timeout_s: float = ANSWER_S) -> int:
        """Wait for the end of the process; return how it ended (negative: the signal)."""
        deadline = time.monotonic() + timeout_s
        while (status := zygote().reap(self.pid)) is None:
            if time.monotonic() > deadline:
                raise Violated(self._fleet.trace(f"{self.name} does not end"))
            time.sleep(0.002)  # there is no signal for somebody else's child
        self.pid = 0
        if self._channel is not None:
            self._channel.close()
        return status

    def close(self) -> None:
        """Stop it cleanly."""
        self.ask("close")
        assert self._channel is not None
        self._channel.close()
        self.gone()


class Oracle:
    """The other process, and the questions it answers."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "oracle.log"
        self.socket_path = folder / "oracle.sock"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.oracle", str(self.socket_path), str(self.log)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the oracle did not start")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(self.socket_path))
        self._file = self._socket.makefile("rwb")

    def tell(self, **report: Any) -> None:
        self._file.write(json.dumps(report).encode() + b"\n")
        self._file.flush()

    def ask(self, **question: Any) -> dict[str, Any]:
        self.tell(**question)
        line = self._file.readline()
        if not line:
            raise RuntimeError("the oracle has died")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.tell(t="end")
        self._file.close()
        self._socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Fleet:
    """Nodes that know each other. Leaving it ends every process."""

    def __init__(
        self, folder: Path, *, seed: int | None = None, limits: dict[str, int] | None = None
    ) -> None:
        self.seed = secrets.randbits(32) if seed is None else seed
        self.random = random.Random(self.seed)
        self.folder = folder
        self.limits = limits or {}
        self.nodes: dict[str, NodeProcess] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.oracle = Oracle(folder)
        self.note(t="plan", seed=self.seed)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes.values():
            if node.is_running:
                node.kill()
        self.oracle.close()

    # -- building -------------------------------------------------------------------------------------------

    def add(self, name: str, **spec: Any) -> NodeProcess:
        """Start a node at a loopback address that nobody else uses, so that it finds its port free after a kill."""
        spec.setdefault("listen", f"tcp://{own_address()}:7420")
        spec.setdefault("limits", self.limits)
        node = self.nodes[name] = NodeProcess(self, name, **spec)
        node.start()
        return node

    def mesh(self, *names: str, **spec: Any) -> list[NodeProcess]:
        """Start these nodes and introduce each to each."""
        nodes = [self.add(name, **spec) for name in names]
        for inviting, joining in combinations(nodes, 2):
            self.pair(inviting, joining)
        return nodes

    def pair(self, inviting: NodeProcess, joining: NodeProcess) -> None:
        inviting.ready()
        joining.ready()
        peers = inviting.ask("peers")["peers"]
        if joining.name not in peers or inviting.name not in joining.ask("peers")["peers"]:
            joining.ask("join", code=inviting.ask("invite")["code"])
        self.until(
            lambda: all(
                one.ask("peers")["peers"].get(other.name, {}).get("link") == "open"
                for one, other in ((inviting, joining), (joining, inviting))
            ),
            f"a session between {inviting.name} and {joining.name}",
        )

    def everybody_streams(self, **stream: Any) -> None:
        for node in self.nodes.values():
            self.stream(node, **stream)

    def stream(self, node: NodeProcess, to: Iterable[NodeProcess] | None = None, **stream: Any) -> None:
        others = [other for other in self.nodes.values() if other is not node] if to is None else list(to)
        for other in others:
            other.ready()
        node.ask("stream", to=[other.id for other in others], **stream)

    # -- breaking -------------------------------------------------------------------------------------------

    def note(self, **report: Any) -> None:
        self.oracle.tell(**report)

    def fault(self, kind: str, *nodes: NodeProcess) -> None:
        """Tell the oracle, just before a fault, whom it touches."""
        self.note(t="fault", kind=kind, nodes=[node.name for node in nodes], at=time.monotonic())

    def healed(self, *nodes: NodeProcess) -> None:
        self.note(t="healed", nodes=[node.name for node in nodes], at=time.monotonic())

    def trace(self, text: str) -> str:
        return f"{text}\nseed {self.seed}, trace {self.oracle.log}, logs of the nodes beside it"

    def views(self, of: NodeProcess, since: float) -> list[tuple[float, str, str]]:
        """Return (moment, observer, state) of every change in how others saw this node."""
        return [
            (at, observer, state)
            for at, observer, state in self.oracle.ask(t="views", peer=of.name, since=since)["views"]
        ]

    def see(
        self, node: NodeProcess, state: str, by: Iterable[NodeProcess], timeout_s: float = ANSWER_S
    ) -> None:
        """Wait until these nodes see `node` in a state."""
        for observer in by:
            self.until(
                lambda observer=observer: observer.ask("peers")["peers"][node.name]["state"] == state,
                f"{observer.name} sees {node.name} as {state}",
                timeout_s,
            )

    # -- waiting and judging --------------------------------------------------------------------------------

    def until(self, predicate: Any, what: str, timeout_s: float = ANSWER_S) -> float:
        """Wait for a condition; return how long it took, in seconds."""
        began = time.monotonic()
        while not predicate():
            if time.monotonic() - began > timeout_s:
                raise Violated(self.trace(f"{what} did not come in {timeout_s:.0f} s"))
            time.sleep(0.02)
        return time.monotonic() - began

    def halt(self, nodes: Sequence[NodeProcess] | None = None) -> None:
        """Stop all streams; afterwards the oracle has heard of every publish."""
        running = [node for node in nodes or self.nodes.values() if node.is_running]
        for node in running:
            node.begin("halt")
        for node in running:
            node.answer()

    def drained(self, timeout_s: float = DRAIN_S) -> float:
        """I6: wait until no outbox holds anything; return how long it took."""
        nodes = list(self.nodes.values())
        return self.until(
            lambda: all(node.ask("queued")["queued"] == 0 for node in nodes), "empty outboxes (I6)", timeout_s
        )

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.oracle.ask(t="counts")["counts"]
        return counts

    def judge(self, *, wants_all: bool = True, effects: bool = True) -> dict[str, Any]:
        """Halt the streams, wait for the outboxes, stop every node, and have the oracle check everything."""
        for node in self.nodes.values():
            if not node.is_running:
                node.start()
        self.halt()
        drain_s = self.drained() if wants_all else 0.0
        for node in self.nodes.values():
            node.close()
        verdict = self.oracle.ask(t="check", wants_all=wants_all, effects=effects)
        verdict["drain_s"] = drain_s
        self.note(t="verdict", **verdict)
        if verdict["violations"]:
            shown = "\n".join(verdict["violations"][:10])
            raise Violated(self.trace(f"{verdict['violations_total']} violations:\n{shown}"))
        return verdict

    def judge_presence(self, *, bound_s: float, since: float) -> None:
        """I8: nobody flapped whom no fault touched."""
        verdict = self.oracle.ask(t="presence", bound_s=bound_s, since=since)
        if verdict["flaps"]:
            raise Violated(self.trace("I8: " + "; ".join(verdict["flaps"][:10])))


def own_address() -> str:
    """Choose a loopback address that nobody else uses: on Linux all of 127.0.0.0/8 is there."""
    if sys.platform != "linux":
        return "127.0.0.1"
    return f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(256)}.{secrets.randbelow(254) + 1}"
