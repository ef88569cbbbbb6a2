"""`zmail demo`: the main job on this machine, with nothing in it that a user would not have.

Two nodes in homes of their own, joined by an invitation over loopback tcp with CURVE; three sessions, each a real
`zmail mcp` process whose notices end in an inbox socket as Claude Code opens one. Here the demo itself listens at
those sockets, so it sees when a notice arrives. One node is stopped while mail for it is sent. Everything that is
claimed at the end has been checked, and nothing stays behind: no process, no file, also after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from broker_free.errors import BrokerFreeError
from zmail import mailbox
from zmail.mailbox import Mailbox
from zmail.paths import Home

ROUNDS = 8  # briefs each way; a session's inbox takes a burst of 30 notices
WHILE_DOWN = 5
WAIT_S = 10.0

TITLE_OF_ACTION = "Deploy blocker: DB migration"
BODY_OF_ACTION = "The migration adds a NOT NULL column.\n\n- [ ] @charlie review the migration script !high\n"


@dataclass(slots=True)
class Tally:
    """What was sent, to whom, and how long each step took."""

    sent: dict[str, list[str]] = field(default_factory=dict)  # recipient -> ids, in order
    committed_ms: list[float] = field(default_factory=list)
    pushed_ms: dict[str, list[float]] = field(default_factory=dict)  # route -> from the send to the line read
    checks: list[tuple[str, bool]] = field(default_factory=list)

    def check(self, claim: str, holds: bool) -> None:
        self.checks.append((claim, holds))

    @property
    def deliveries(self) -> int:
        return sum(map(len, self.sent.values()))


def main(*, json: bool = False) -> int:
    """Run the demo and return the exit status: 0 only if every check held."""
    progress = _Progress(is_shown=sys.stderr.isatty())
    with _interruptible(), ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="zmail-demo-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            result = _Demo(folder, stack, progress).run()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # cleaning up is short, and is finished
    progress.end()
    sys.stdout.write(result.as_json() if json else result.as_text())
    sys.stdout.flush()
    return 0 if result.is_good else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    tally: Tally
    arrived: Mapping[str, Sequence[str]]  # recipient -> ids found in the mailbox
    roster: str
    action: str
    seconds: float

    @property
    def lost(self) -> int:
        return sum(len(set(ids) - set(self.arrived[who])) for who, ids in self.tally.sent.items())

    @property
    def duplicated(self) -> int:
        return sum(len(ids) - len(set(ids)) for ids in self.arrived.values())

    @property
    def is_good(self) -> bool:
        return self.lost == self.duplicated == 0 and all(holds for _, holds in self.tally.checks)

    def as_json(self) -> str:
        shape = {
            "sent": self.tally.deliveries,
            "delivered": self.tally.deliveries - self.lost,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "latency_ms": {name: _summary(values) for name, values in self._latencies()},
            "checks": [{"claim": claim, "holds": holds} for claim, holds in self.tally.checks],
        }
        return json.dumps(shape, indent=2) + "\n"

    def as_text(self) -> str:
        lines = [f"{'ok  ' if holds else 'FAIL'} {claim}" for claim, holds in self.tally.checks]
        lines += ["", "The action that was found in a brief:", f"  {self.action}", "", self.roster, ""]
        lines.append(f"{'from the send until …':<54}{'p50':>10}{'max':>10}   briefs")
        for name, values in self._latencies():
            summary = _summary(values)
            lines.append(f"{name:<54}{summary['p50']:>7.1f} ms{summary['max']:>7.1f} ms{len(values):>9}")
        lines += [
            "",
            f"{self.tally.deliveries} sent, {self.tally.deliveries - self.lost} delivered, {self.lost} lost, "
            f"{self.duplicated} duplicated, in {self.seconds:.1f} s. Nothing is left behind.",
        ]
        return "\n".join(lines) + "\n"

    def _latencies(self) -> Iterator[tuple[str, list[float]]]:
        yield "committed at the sender", self.tally.committed_ms
        for route, values in self.tally.pushed_ms.items():
            yield f"pushed into the session, {route}", values


class _Demo:
    def __init__(self, folder: Path, stack: ExitStack, progress: _Progress) -> None:
        self._folder = folder
        self._stack = stack
        self._say = progress.say
        self._tally = Tally()

    def run(self) -> Result:
        began = time.monotonic()
        self._say("starting two nodes")
        one, two = self._node("server1"), self._node("server2")
        self._say("joining them by an invitation")
        two.mailbox().join(one.mailbox().invite()["code"])
        self._say("starting three sessions")
        alpha, bravo = self._session(one, "alpha"), self._session(one, "bravo")
        charlie = self._session(two, "charlie")
        _wait("server1 hears of charlie", lambda: _sees(one, "charlie") and _sees(two, "bravo"))
        self._exchange(alpha, bravo, charlie)
        self._survive(alpha, charlie, two)
        self._say("a brief with an action")
        brief = self._send(alpha, [charlie], title=TITLE_OF_ACTION, body=BODY_OF_ACTION)
        charlie.notice_of(brief)
        text = charlie.call("read", id=brief)
        action = next((line.strip() for line in text.splitlines() if "review the migration" in line), "none")
        self._tally.check("the action in the brief was found", "review the migration script" in action)
        roster = alpha.call("roster")
        self._say("closing the sessions")
        for session in (alpha, bravo, charlie):
            session.close()
        self._tally.check("the sender has the receipt that it was read", self._is_read(one, brief))
        arrived = {
            who: self._ids_in(node, who) for node, who in ((one, "alpha"), (one, "bravo"), (two, "charlie"))
        }
        self._tally.check(
            "every brief arrived once, and in the order of its sender",
            all(
                [brief for brief in arrived[who] if brief in ids] == ids
                for who, ids in self._tally.sent.items()
            ),
        )
        return Result(
            tally=self._tally, arrived=arrived, roster=roster, action=action, seconds=time.monotonic() - began
        )

    def _exchange(self, alpha: _Session, bravo: _Session, charlie: _Session) -> None:
        """Send briefs one at a time and follow each until its notice is read."""
        routes = (
            ("on one machine", alpha, bravo),
            ("from node to node", alpha, charlie),
            ("from node to node", charlie, alpha),
        )
        for route, sender, receiver in routes:
            for number in range(1, ROUNDS + 1):
                self._say(f"{sender.name} → {receiver.name}, {number} of {ROUNDS}")
                began = time.perf_counter()
                brief = self._send(sender, [receiver], title=f"Brief {number}", body="Hello.")
                self._tally.committed_ms.append((time.perf_counter() - began) * 1_000)
                pushed = receiver.notice_of(brief) - began
                self._tally.pushed_ms.setdefault(route, []).append(pushed * 1_000)
        self._say("bravo → all")
        brief = self._send(
            bravo, [alpha, charlie], to="all", title="Freeze at noon", body="Merge before that."
        )
        self._tally.check(
            "a brief to all was pushed into the other sessions on both nodes",
            alpha.notice_of(brief) > 0 and charlie.notice_of(brief) > 0,
        )

    def _survive(self, alpha: _Session, charlie: _Session, two: _Node) -> None:
        """Stop a node, send to it meanwhile, start it again."""
        self._say("stopping server2")
        two.stop()
        states = []
        briefs = []
        for number in range(1, WHILE_DOWN + 1):
            self._say(f"alpha → charlie while server2 is down, {number} of {WHILE_DOWN}")
            answer = alpha.send(
                to="charlie@server2", title=f"While you were away {number}", body="Still here."
            )
            states.append(answer)
            briefs.append(_id_in(answer))
        self._tally.sent.setdefault("charlie", []).extend(briefs)
        self._tally.check(
            "briefs for a node that is down are kept, and said to be queued",
            all("queued" in state for state in states),
        )
        self._say("starting server2 again")
        began = time.perf_counter()
        two.start()
        arrivals = [charlie.notice_of(brief) - began for brief in briefs]
        self._tally.pushed_ms["after the start of its node"] = [arrival * 1_000 for arrival in arrivals]
        self._tally.check("they left by themselves and were pushed once the node was back", True)

    def _is_read(self, node: _Node, brief: str) -> bool:
        self._say("waiting for the receipt")
        try:
            node.mailbox("alpha").call("wait_state", {"id": brief, "state": "read", "timeout_ms": 5_000})
        except BrokerFreeError:
            return False
        return True

    def _send(
        self, sender: _Session, receivers: Sequence[_Session], *, title: str, body: str, to: str | None = None
    ) -> str:
        brief = _id_in(sender.send(to=to or receivers[0].name, title=title, body=body))
        for receiver in receivers:
            self._tally.sent.setdefault(receiver.name, []).append(brief)
        return brief

    def _ids_in(self, node: _Node, who: str) -> list[str]:
        briefs = node.mailbox(who).inbox(all=True, limit=0)["briefs"]
        return [brief["id"] for brief in reversed(briefs)]

    def _node(self, name: str) -> _Node:
        node = _Node(self._folder / name, name)
        self._stack.callback(node.stop)
        node.start()
        return node

    def _session(self, node: _Node, name: str) -> _Session:
        session = _Session(node, name, self._folder / f"{name}.sock")
        self._stack.callback(session.close)
        session.open()
        return session


class _Node:
    """A node process in a home of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._env = {
            **_clean_environment(),
            "ZMAIL_HOME": str(folder),
            "ZMAIL_NODE_NAME": name,
            "ZMAIL_LISTEN": "tcp://127.0.0.1:0",
        }
        self._home = Home.resolve(self._env)

    def start(self) -> None:
        mailbox.start_node(self._home, self._env)

    def stop(self) -> None:
        mailbox.stop_node(self._home)

    def mailbox(self, as_name: str | None = None) -> Mailbox:
        return Mailbox(self._home, as_name=as_name, autostart=False, env=self._env)

    def environment(self, **more: str) -> dict[str, str]:
        return {**self._env, **more}


class _Session:
    """A `zmail mcp` process as Claude Code runs one, and the inbox socket of its session."""

    def __init__(self, node: _Node, name: str, inbox: Path) -> None:
        self.name = name
        self._node = node
        self._inbox = _Inbox(inbox)
        self._process: subprocess.Popen[str] | None = None
        self._next_id = 0

    def open(self) -> None:
        self._inbox.open()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zmail", "--as", self.name, "mcp"],
            env=self._node.environment(
                CLAUDE_CODE_MESSAGING_SOCKET=str(self._inbox.path), ZMAIL_AUTOSTART="0"
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the demo, which then closes this in order
        )
        client = {"name": "zmail-demo", "version": "1"}
        self._ask("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client})
        self._write({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin
            process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._inbox.close()

    def send(self, **arguments: str) -> str:
        return self.call("send", **arguments)

    def call(self, tool: str, **arguments: str) -> str:
        """Call a tool and return its text, as the model would be shown it."""
        answer = self._ask("tools/call", {"name": tool, "arguments": arguments})
        text = "\n".join(part["text"] for part in answer["content"])
        if answer.get("isError"):
            raise DemoFailed(f"{self.name} could not {tool}: {text}")
        return text

    def notice_of(self, brief: str) -> float:
        """Wait for the notice that names a brief; return when it was read, on the clock of perf_counter."""
        return self._inbox.wait_for(brief, self.name)

    def _ask(self, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        self._next_id += 1
        self._write({"jsonrpc": "2.0", "id": self._next_id, "method": method, "params": params})
        assert self._process
        assert self._process.stdout
        for line in self._process.stdout:
            answer = json.loads(line)
            if answer.get("id") == self._next_id:
                if "error" in answer:
                    raise DemoFailed(f"{self.name}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
        raise DemoFailed(f"the session {self.name} has ended")

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._process
        assert self._process.stdin
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()


class _Inbox:
    """A Unix socket that takes what is posted into a session and remembers when each line was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines: list[tuple[float, str]] = []
        self._changed = threading.Condition()

    def open(self) -> None:
        self._socket.bind(str(self.path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def wait_for(self, brief: str, who: str) -> float:
        with self._changed:
            found = self._changed.wait_for(lambda: self._read_at(brief), WAIT_S)
        if found is None:
            raise DemoFailed(f"no notice of brief {brief} reached {who} within {WAIT_S:.0f} s")
        return found

    def _read_at(self, brief: str) -> float | None:
        return next((at for at, line in self._lines if brief in line), None)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection, connection.makefile(encoding="utf-8") as lines:
                for line in lines:
                    with self._changed:
                        self._lines.append((time.perf_counter(), line))
                        self._changed.notify_all()


class DemoFailed(BrokerFreeError):
    """Something the demo counts on did not happen: a bug, or a machine under great load."""


class _Progress:
    """One line on the terminal that says what is happening now."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown

    def say(self, text: str) -> None:
        if self._is_shown:
            sys.stderr.write(f"\r\x1b[K{text} …")
            sys.stderr.flush()

    def end(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGTERM into Ctrl-C, so that both clean up."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clean_environment() -> dict[str, str]:
    """Leave out what belongs to a session around the demo, or to the user's own zmail."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CLAUDE", "ZMAIL_", "ANTHROPIC_"))
    }


def _sees(node: _Node, callsign: str) -> bool:
    return any(each["callsign"] == callsign for each in node.mailbox().roster()["callsigns"])


def _wait(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise DemoFailed(f"not within {WAIT_S:.0f} s: {what}")
        time.sleep(0.02)


def _id_in(answer: str) -> str:
    """Read the id in the text of `send`: `sent 0199….`"""
    return answer.split()[1].rstrip(".")


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(values), 3), "max": round(max(values), 3), "briefs": len(values)}
