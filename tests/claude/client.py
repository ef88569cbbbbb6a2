"""Drive the real Claude Code client against a stand-in for the model API, headless or in a terminal.

`Claude` is one user on one machine: a fresh home, a project folder, a temporary folder and the model it talks to.
The client gets exactly the environment written here (as `env -i` would), with everything switched off that wants to
reach the network. Nothing here knows of zmail: a test gives the MCP servers, tools, settings and hooks it wants.

    with Claude(program) as claude:
        claude.model.on(asked("greet"), call("mcp__probe__echo", text="hello"))
        claude.headless("greet", servers={"probe": server}, allowed_tools=["mcp__probe__echo"])
        assert claude.model.requests[-1].result_of("mcp__probe__echo") == "hello"
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.claude.fetch import VERSION
from tests.claude.model_api import ModelApi, Request
from tests.claude.processes import end, living_in
from tests.claude.terminal import Terminal
from tests.claude.waiting import until

API_KEY = "sk-ant-laboratory-0123456789abcdef0123456789abcdef"  # a dummy: the stand-in never looks at it

SWITCHED_OFF = (
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
    "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL",
    "CLAUDE_CODE_IDE_SKIP_AUTO_INSTALL",
    "DISABLE_AUTOUPDATER",
    "DISABLE_BUG_COMMAND",
    "DISABLE_ERROR_REPORTING",
    "DISABLE_INSTALLATION_CHECKS",
    "DISABLE_TELEMETRY",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class McpServer:
    """How the client starts one stdio server."""

    command: str
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    always_load: bool = True  # False leaves its tools deferred: the model then sees only their names


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadlessRun:
    """What `claude -p` printed."""

    events: Sequence[Mapping[str, Any]]
    stderr: str

    @property
    def session_id(self) -> str:
        return str(self.events[-1]["session_id"])

    @property
    def result(self) -> str:
        """The model's last words."""
        return str(self.events[-1]["result"])

    @property
    def mcp_servers(self) -> dict[str, str]:
        """The state of each MCP server when the run began: "connected", "failed", "pending" …"""
        init = next(event for event in self.events if event.get("subtype") == "init")
        return {server["name"]: server["status"] for server in init["mcp_servers"]}


class ClientFailed(AssertionError):
    """The client ended badly or not in time; the message tells what the model was shown and what the client logged."""


class Claude:
    """One user's client. `close` ends whatever it started, and removes its folders."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._open = ExitStack()
        # Short, because Unix sockets are made in it: their paths end at 103 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="zm-", dir=_short_temporary_folder()))
        self._open.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.home, self.project, self._tmp = (self.folder / name for name in ("home", "work", "tmp"))
        for folder in (self.home, self.project, self._tmp):
            folder.mkdir(mode=0o700)
        self._open.callback(self._end_what_is_left)
        self.model = self._open.enter_context(ModelApi())
        self._files = 0
        _seed(self.home, trusting=self.project)

    def environment(self) -> dict[str, str]:
        """The client's whole environment, before what a single run adds."""
        return {
            "HOME": str(self.home),
            "TMPDIR": str(self._tmp),
            "PATH": os.environ["PATH"],
            "SHELL": "/bin/bash",
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "ANTHROPIC_BASE_URL": self.model.url,
            "ANTHROPIC_API_KEY": API_KEY,
            "HTTPS_PROXY": self.model.url,  # so that any attempt to go outside is refused, and seen
        } | dict.fromkeys(SWITCHED_OFF, "1")

    def headless(
        self,
        prompt: str,
        *,
        servers: Mapping[str, McpServer] | None = None,
        allowed_tools: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
        timeout_s: float = 60.0,
    ) -> HeadlessRun:
        """Run `claude -p prompt` to its end. Raises ClientFailed unless it ends well within `timeout_s`."""
        # The prompt comes first: --allowedTools takes a list and would eat it.
        command = [str(self._program), "-p", prompt, "--output-format", "stream-json", "--verbose"]
        command += [*self._options(servers, allowed_tools, settings), *args]
        with subprocess.Popen(
            command,
            env=self.environment() | dict(env or {}),
            cwd=self.project,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as client:
            process = psutil.Process(client.pid)
            try:
                out, err = client.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                raise ClientFailed(f"the client ran for over {timeout_s} s.\n{self.story()}") from None
            finally:
                end(process)
        self.model.raise_failures()
        if client.returncode != 0:
            raise ClientFailed(
                f"the client ended with {client.returncode}.\n{err}\n{out[-2000:]}\n{self.story()}"
            )
        return HeadlessRun(events=[json.loads(line) for line in out.splitlines()], stderr=err)

    def interactive(
        self,
        tmux: Path,
        *,
        servers: Mapping[str, McpServer] | None = None,
        allowed_tools: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        args: Sequence[str] = (),
    ) -> Session:
        """Start the client in a terminal of its own and return once it waits for a prompt.

        It does not wait for its MCP servers: a prompt typed at once may find none of their tools.
        """
        command = [str(self._program), *self._options(servers, allowed_tools, settings), *args]
        terminal = Terminal(
            tmux,
            command,
            env=self.environment() | dict(env or {}),
            cwd=self.project,
            folder=self._fresh_folder("tty"),
        )
        self._open.callback(terminal.close)
        session = Session(terminal, home=self.home, story=self.story)
        session.wait_until_idle()
        return session

    def story(self) -> str:
        """Tell what the model was shown and the end of what the client logged, for messages of failed tests.

        What MCP servers write to stderr is in that log.
        """
        logs = sorted(self.folder.glob("debug-*.log"))
        told = [f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs]
        return "\n".join([self.model.story(), *told])

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            self.model.raise_failures()

    def _options(
        self,
        servers: Mapping[str, McpServer] | None,
        allowed_tools: Sequence[str],
        settings: Mapping[str, Any] | None,
    ) -> list[str]:
        mcp_config = {"mcpServers": {name: _config_of(server) for name, server in (servers or {}).items()}}
        options = ["--mcp-config", self._write_json("mcp", mcp_config), "--strict-mcp-config"]
        options += ["--settings", self._write_json("settings", settings or {})]
        options += ["--debug-file", str(self._fresh_path("debug", ".log"))]
        options += ["--permission-mode", "manual"]
        if allowed_tools:
            options += ["--allowedTools", ",".join(allowed_tools)]
        return options

    def _write_json(self, name: str, content: Mapping[str, Any]) -> str:
        path = self._fresh_path(name, ".json")
        path.write_text(json.dumps(content))
        return str(path)

    def _fresh_folder(self, name: str) -> Path:
        folder = self._fresh_path(name, "")
        folder.mkdir(mode=0o700)
        return folder

    def _fresh_path(self, name: str, suffix: str) -> Path:
        self._files += 1
        return self.folder / f"{name}-{self._files:02d}{suffix}"

    def _end_what_is_left(self) -> None:
        for process in living_in(self.home):
            end(process)


class Session:
    """An interactive client: its terminal, and what it writes about itself in its registry of sessions."""

    def __init__(self, terminal: Terminal, *, home: Path, story: Callable[[], str]) -> None:
        self.terminal = terminal
        self._record = home / ".claude" / "sessions" / f"{terminal.program.pid}.json"
        self._story = story

    @property
    def pid(self) -> int:
        return self.terminal.program.pid

    @property
    def record(self) -> dict[str, Any]:
        """Its registry entry now: sessionId, status, messagingSocketPath … Empty before it has one."""
        try:
            return dict(json.loads(self._record.read_text()))
        except (FileNotFoundError, json.JSONDecodeError):  # not yet there, or being written
            return {}

    def type_line(self, prompt: str) -> None:
        self.terminal.type_line(prompt)

    def close(self) -> None:
        """End the client, and with it its MCP servers. A session that is not closed ends with its `Claude`."""
        self.terminal.close()

    def wait_until_idle(self, *, since: Request | None = None, timeout_s: float = 20.0) -> None:
        """Return once the client calls itself idle, with a prompt on its screen.

        With `since`, the turn of that request must be over: a client calls itself idle for a moment after a
        request, too.
        """
        if not until(lambda: self._is_idle(since), timeout_s=timeout_s):
            screen = self.terminal.screen().rstrip()
            raise ClientFailed(f"not idle within {timeout_s} s: {self.record}\n{screen}\n{self._story()}")

    def _is_idle(self, since: Request | None) -> bool:
        record = self.record
        changed_ms = record.get("statusUpdatedAt", 0)
        is_over = since is None or changed_ms >= since.arrived_ms
        return is_over and record.get("status") == "idle" and "❯" in self.terminal.screen()


def _config_of(server: McpServer) -> dict[str, Any]:
    return {
        "type": "stdio",
        "command": server.command,
        "args": list(server.args),
        "env": dict(server.env),
        "alwaysLoad": server.always_load,
    }


def _seed(home: Path, *, trusting: Path) -> None:
    """Answer beforehand what a first start would ask: onboarding, the API key, trust in the project."""
    seen = {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}
    config = {
        "hasCompletedOnboarding": True,
        "lastOnboardingVersion": VERSION,
        "theme": "dark",
        "customApiKeyResponses": {"approved": [API_KEY[-20:]], "rejected": []},
        "projects": {str(trusting): seen},
    }
    (home / ".claude.json").write_text(json.dumps(config))


def _short_temporary_folder() -> str:
    """The system's temporary folder, or /tmp where that one is long (macOS, some CI runners)."""
    usual = os.path.realpath(tempfile.gettempdir())
    return usual if len(usual) <= 30 else "/tmp"
