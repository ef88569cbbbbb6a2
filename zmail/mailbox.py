"""The verbs of zmail for a caller in another process: one question over the local door, one answer.

Starts the node when none runs, and stops it. `zmail mcp` imports this at the start of every session, so: standard
library only, and what starts a process is imported when one is started. It knows nothing of what a verb does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from broker_free.client import DoorClient
from broker_free.errors import BrokerFreeError, NodeInUse, NodeUnreachable, Refused, TimedOut

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from subprocess import Popen
    from typing import Any

    from zmail.paths import Home

CALL_TIMEOUT_S = 30.0  # of an answer: group commits take milliseconds, a sick disk seconds
START_TIMEOUT_S = 10.0  # until the door answers: a cold disk, a store that needs checking
BACKUP_TIMEOUT_S = 600.0  # gigabytes on a slow disk
STOP_TIMEOUT_S = 10.0  # a node stops within two seconds; on a machine that swaps it may take longer
STATE_TIMEOUT_S = 2.0  # a node that does not say its version by then is stuck
_POLL_S = 0.01
_SAID_BYTES_MAX = 65_536  # read of what a node said that did not start

# What belongs to the session that happens to start the node: it must neither outlive it there nor steer the node.
_OF_ONE_SESSION = ("CLAUDE", "ANTHROPIC_", "ZMAIL_CALLSIGN", "ZMAIL_TOKEN")


class Mailbox:
    """The mailbox of the calling process or, with `as_name`, of that name.

    Every verb returns the answer's JSON shape. What the node refuses arrives as Refused, with the node's own code.
    """

    def __init__(
        self,
        home: Home,
        *,
        as_name: str | None = None,
        autostart: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._home = home
        self._env = os.environ if env is None else env
        self._as_name = as_name
        self._autostart = autostart

    def call(
        self, verb: str, args: Mapping[str, Any] | None = None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> dict[str, Any]:
        """Ask the node, which is started if need be. Arguments that are None are left out."""
        if self._autostart:
            # Asked for before the call: to start a node and ask again after a failure could do a thing twice.
            ensure_node(self._home, self._env)
        given = {name: value for name, value in (args or {}).items() if value is not None}
        with DoorClient(self._home.door_path, timeout_s=timeout_s) as door:
            return door.call(verb, given, hints=hints(self._env, as_name=self._as_name, kind="cli"))

    def send(
        self,
        *,
        to: Sequence[str] = (),
        title: str | None = None,
        body: str | None = None,
        markdown: str | None = None,
        actions: Sequence[str] = (),
        priority: str | None = None,
        project: str | None = None,
        due: str | None = None,
        cc: Sequence[str] = (),
        intent: str | None = None,
        ttl: str | None = None,
    ) -> dict[str, Any]:
        """Send `body`, or a whole brief in `markdown`, whose frontmatter the other arguments override."""
        return self.call(
            "send",
            {
                "to": list(to) or None,
                "title": title,
                "body": body,
                "markdown": markdown,
                "actions": list(actions) or None,
                "priority": priority,
                "project": project,
                "due": due,
                "cc": list(cc) or None,
                "intent": intent,
                "ttl": ttl,
            },
        )

    def reply(
        self, brief: str, *, body: str, title: str | None = None, actions: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Answer a brief in its thread."""
        return self.call(
            "reply", {"id": brief, "body": body, "title": title, "actions": list(actions) or None}
        )

    def wait_state(self, brief: str, state: str, *, timeout_ms: int) -> dict[str, Any]:
        """Wait until a sent brief is delivered, or read, by all who still can; Refused as timed-out before that."""
        asked = {"id": brief, "state": state, "timeout_ms": timeout_ms}
        return self.call("wait_state", asked, timeout_s=timeout_ms / 1_000 + CALL_TIMEOUT_S)

    def check(self) -> dict[str, Any]:
        """Count what is unread. Changes nothing."""
        return self.call("check")

    def inbox(
        self,
        *,
        all: bool = False,
        sender: str | None = None,
        since: str | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """List unread briefs, or all, newest first. Changes nothing."""
        return self.call("inbox", {"all": all, "from": sender, "since": since, "limit": limit})

    def read(self, brief: str, *, peek: bool = False, raw: bool = False) -> dict[str, Any]:
        """Return one brief with its text, and mark it read unless `peek`."""
        return self.call("read", {"id": brief, "peek": peek, "raw": raw})

    def roster(self) -> dict[str, Any]:
        """Say who is where, and who is reachable."""
        return self.call("roster")

    def status(self) -> dict[str, Any]:
        """Describe the node, the mailbox and the peers in one answer."""
        return self.call("status")

    def backup(self, path: str) -> dict[str, Any]:
        """Copy the store to a new file while everything goes on."""
        return self.call("backup", {"path": os.path.abspath(path)}, timeout_s=BACKUP_TIMEOUT_S)

    def peers(self) -> dict[str, Any]:
        """List the other nodes of the mesh."""
        return self.call("peers")

    def remove_peer(self, node: str) -> dict[str, Any]:
        """Remove a node from the mesh, by its name or id."""
        return self.call("remove_peer", {"node": node})

    def rotate_key(self) -> dict[str, Any]:
        """Give the node another key."""
        return self.call("rotate_key")

    def invite(self, *, ttl: str | None = None, address: str | None = None) -> dict[str, Any]:
        """Make a code with which one other node may join."""
        return self.call("invite", {"ttl": ttl, "address": address})

    def join(self, code: str) -> dict[str, Any]:
        """Join the mesh of the node that made `code`."""
        return self.call("join", {"code": code})


def hints(env: Mapping[str, str], *, as_name: str | None = None, kind: str = "cli") -> dict[str, Any]:
    """Say what this process knows of itself and the kernel does not tell the node. The node trusts none of it."""
    claude_pid = env.get("CLAUDE_PID", "")
    known = {
        "kind": kind,
        "pid_ns": _pid_namespace(),
        "session_id": env.get("CLAUDE_CODE_SESSION_ID"),
        "claude_pid": int(claude_pid) if claude_pid.isdigit() else None,
        "config_dir": env.get("CLAUDE_CONFIG_DIR"),
        "cwd": _cwd(),
        "project_dir": env.get("CLAUDE_PROJECT_DIR"),
        "callsign": env.get("ZMAIL_CALLSIGN"),
        "as": as_name,
        "inbox": bool(env.get("CLAUDE_CODE_MESSAGING_SOCKET")),
    }
    return {name: value for name, value in known.items() if value is not None and value != ""}


def _pid_namespace() -> int | None:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None  # no Linux


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None  # it has been removed


# ── the node's process ──────────────────────────────────────────────────────────────────────────────────────────


def ensure_node(home: Home, env: Mapping[str, str]) -> None:
    """Start the node if none answers, unless ZMAIL_AUTOSTART=0 forbids it: NodeUnreachable."""
    if answers(home.door_path):
        return
    if env.get("ZMAIL_AUTOSTART") == "0":
        raise NodeUnreachable(
            "no node is running, and ZMAIL_AUTOSTART=0 forbids starting one",
            hint="start it: zmail node start",
        )
    start_node(home, env)


def start_node(home: Home, env: Mapping[str, str]) -> None:
    """Start the node in the background and return when its door answers; at once if it does.

    Several callers at once end with one node: those whose node finds the home held wait for the winner's door.
    Raises what the node says that does not start, or TimedOut.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    child: Popen[bytes] | None = None
    log_from = 0
    while not answers(home.door_path):
        held = home.holder() is not None
        if child is None and not held:
            home.prepare()
            log_from = _size(home.log_path)
            child = _spawned(home, env)
        elif child is not None and child.poll() is not None and not held:
            failure = _failure(home, log_from, child.returncode)
            if not isinstance(failure, NodeInUse):
                raise failure
            child = None  # the node that was in our way has gone without opening its door
        if time.monotonic() > deadline:
            raise TimedOut(
                f"the node did not answer within {START_TIMEOUT_S:.0f} s", hint=f"its log: {home.log_path}"
            )
        time.sleep(_POLL_S)
    if child is not None:
        _reap(child)


def stop_node(home: Home) -> int | None:
    """Stop the node and return its pid once it has let go of its home; None when none was running."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    seen = asked = None
    while (pid := home.holder()) is not None:
        if asked is not None and pid != asked:
            break  # somebody has started the next one already
        if pid and asked is None and pid == seen:
            # Held, with the same pid in it, twice in a row. Once could be the moment in which a new node has the
            # lock and the pid in it is still that of a dead one, by now perhaps a stranger's.
            _terminate(pid)
            asked = pid
        if time.monotonic() > deadline:
            raise TimedOut(
                f"the node (pid {pid}) did not stop within {STOP_TIMEOUT_S:.0f} s",
                hint=f"force loses nothing that was acknowledged: kill -9 {pid}",
            )
        seen = pid
        time.sleep(_POLL_S)
    return asked


def _terminate(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(pid, signal.SIGTERM)


def node_state(home: Home) -> dict[str, Any]:
    """Say whether a node holds the home, as {state, pid, version}; the version is null when it does not answer."""
    if (pid := home.holder()) is None:
        return {"state": "Stopped", "pid": None, "version": None}
    try:
        with DoorClient(home.door_path, timeout_s=STATE_TIMEOUT_S) as door:
            version = door.call("node-status").get("version")
    except BrokerFreeError:
        version = None  # it is starting, stopping or stuck
    return {"state": "Running", "pid": pid or None, "version": version}


def answers(door_path: str) -> bool:
    """Whether somebody listens at the door."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(door_path)
        except BlockingIOError:
            return True  # its queue is full: alive, and busy
        except OSError:
            return False
    return True


def _spawned(home: Home, env: Mapping[str, str]) -> Popen[bytes]:
    """Start `zmail node run` so that it outlives this process and its terminal; what it says goes to the log."""
    import subprocess

    given = {name: value for name, value in env.items() if not name.startswith(_OF_ONE_SESSION)}
    if env.get("ZMAIL_HOME"):
        given["ZMAIL_HOME"] = home.state_dir  # the node's working folder is another
    if config := env.get("ZMAIL_CONFIG"):
        given["ZMAIL_CONFIG"] = os.path.abspath(os.path.expanduser(config))
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not package.endswith("-packages"):  # a checkout that runs without being installed
        given["PYTHONPATH"] = os.pathsep.join(filter(None, [package, env.get("PYTHONPATH")]))
    with open(home.log_path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
        return subprocess.Popen(
            # --json: its last words are then an error object, which _failure turns into the error it was.
            [sys.executable, "-m", "zmail", "--json", "--quiet", "node", "run"],
            env=given,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )


def _reap(child: Popen[bytes]) -> None:
    """Wait for the node's end aside: a caller that lives on must not keep it as a zombie."""
    import threading

    threading.Thread(target=child.wait, name="node's end", daemon=True).start()


def _failure(home: Home, log_from: int, status: int) -> BrokerFreeError:
    """Make the error of a node that has not started out of what it wrote since `log_from`.

    NodeInUse when it only lost a race. Another starter's node may have written there too, and then tells more.
    """
    said = _said(home.log_path, log_from)
    in_use = False
    for line in reversed(said):
        try:
            error = json.loads(line)["error"]
            code, message, hint = error["code"], error["message"], error["hint"]
        except (ValueError, LookupError, TypeError):
            continue
        if code != NodeInUse.code:
            return Refused(message, code=code, hint=hint)
        in_use = True
    if in_use:
        return NodeInUse("already running")
    last = f": {said[-1]}" if said else ""
    return NodeUnreachable(
        f"the node ended with status {status} while starting{last}", hint=f"its log: {home.log_path}"
    )


def _said(log_path: str, log_from: int) -> list[str]:
    size = _size(log_path)
    start = max(
        log_from if log_from <= size else 0, size - _SAID_BYTES_MAX
    )  # 0: the log was rotated meanwhile
    try:
        with open(log_path, "rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
