"""The MCP server in the node: real door, real SDK, raw lines as a relay brings them. The office is a small real one."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from broker_free.door import Door, DoorConnection, unknown_verb
from zmail import __version__, mcp_server
from zmail.errors import CallsignTaken, NotFound
from zmail.identity import Caller
from zmail.mcp_server import McpHost, McpSession

ROOT = Path(__file__).resolve().parents[1]
BRIEF = "0190a1b2-0000-7000-8000-00000000abcd"
MODERN = {
    "_meta": {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "t", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
}
HANDSHAKE = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A private folder whose path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="zm-"))
    yield path
    shutil.rmtree(path)


class Office:
    """One brief for everybody, and everything that was asked. A send with the body "wait" lasts until `let`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.cancelled: list[str] = []
        self.body = "The migration adds a column."
        self.taken = False
        self.let = asyncio.Event()

    async def call(self, who: Caller, verb: str, args: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((who.callsign, verb, args))
        match verb:
            case "send":
                return await self._send(who, args)
            case "reply":
                return {"id": BRIEF, "thread": BRIEF, "recipients": [], "warnings": []}
            case "check":
                await asyncio.sleep(0)  # so that calls of several sessions interleave
                return {"callsign": who.callsign, "unread": 0, "oldest_at": None, "by_sender": {}}
            case "inbox":
                return {"callsign": who.callsign, "total": 0, "briefs": []}
            case "read":
                if args["id"] != BRIEF:
                    raise NotFound(f"no brief {args['id']!r}", hint="list what is there: inbox")
                return {
                    "id": BRIEF,
                    "thread": BRIEF,
                    "from": "bravo@two",
                    "title": "Blocker",
                    "body": self.body,
                }
            case "mark_read":
                return {"marked": args["ids"]}
            case "roster":
                raise ZeroDivisionError("a secret")
        raise unknown_verb(verb)

    async def _send(self, who: Caller, args: dict[str, Any]) -> dict[str, Any]:
        if args["body"] == "wait":
            try:
                await self.let.wait()
            except asyncio.CancelledError:
                self.cancelled.append(who.callsign)
                raise
        recipients = [{"address": to, "state": "queued", "last_seen": None} for to in args["to"]]
        return {"id": BRIEF, "thread": BRIEF, "recipients": recipients, "warnings": []}

    async def resolve(self, connection: DoorConnection, hints: Mapping[str, Any]) -> Caller:
        if self.taken:
            raise CallsignTaken("alpha is held by another session", hint="set ZMAIL_CALLSIGN=alpha-2")
        callsign = hints.get("as") or f"pid-{connection.caller.pid}"
        return Caller(callsign=callsign, sender_class="agent", holder=None, session_id=None, project=None)

    def verbs(self) -> list[str]:
        return [verb for _, verb, _ in self.asked]


class Notices:
    """The sessions that can be told, by callsign."""

    def __init__(self) -> None:
        self.sessions: dict[str, McpSession] = {}

    def attach(self, callsign: str, session: McpSession) -> Callable[[], None]:
        self.sessions[callsign] = session

        def detach() -> None:
            self.sessions.pop(callsign, None)

        return detach


class Node:
    """A door with the `mcp` upgrade on a loop in its own thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._open())

    async def _open(self) -> None:
        self.office, self.notices = Office(), Notices()
        self.host = McpHost(self.office, resolve=self.office.resolve, push=self.notices, node_name="one")

        async def handle(*_: object) -> dict[str, Any]:
            raise unknown_verb("")

        self.door = Door(self.path, handle=handle, upgrades={"mcp": self.host.serve})
        await self.door.open()

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.start(work).result(10)

    def notify(self, callsign: str, text: str = "1 unread brief", sender: str = "zmail:bravo") -> Future[Any]:
        return self.start(self.notices.sessions[callsign].notify(text, sender))

    def release(self) -> None:
        self.loop.call_soon_threadsafe(self.office.let.set)

    async def _close(self) -> None:
        await self.door.close()
        await self.host.close()

    def close(self) -> None:
        if not self.loop.is_closed():
            self.run(self._close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(5)
            self.loop.close()


@contextmanager
def node_at(path: Path) -> Iterator[Node]:
    node = Node(path)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def node(folder: Path) -> Iterator[Node]:
    with node_at(folder / "door") as node:
        yield node


class Session:
    """The far end of the door, as a relay has it: the greeting, then raw lines."""

    def __init__(self, path: Path, *, name: str = "alpha", era: str = "modern") -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self._file = self.socket.makefile("rb")
        self._asked = 0
        self._modern = era == "modern"
        self.say({"id": 1, "verb": "mcp", "args": {}, "hints": {"as": name, "kind": "mcp"}})
        self.greeting = self.hear()
        if era == "handshake":
            self.ask("initialize", HANDSHAKE)
            self.say({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def say(self, line: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def hear(self) -> Any:
        line = self._file.readline()
        return json.loads(line) if line else None

    def start(self, method: str, params: dict[str, Any] | None = None) -> int:
        self._asked += 1
        params = {**(params or {}), **(MODERN if self._modern else {})}
        self.say({"jsonrpc": "2.0", "id": self._asked, "method": method, "params": params})
        return self._asked

    def ask(self, method: str, params: dict[str, Any] | None = None) -> Any:
        number = self.start(method, params)
        while (line := self.hear()) is not None:
            if line.get("id") == number:
                return line
        return None

    def tool(self, name: str, **args: Any) -> Any:
        """Call a tool; return its result."""
        return self.ask("tools/call", {"name": name, "arguments": args})["result"]

    def text(self, name: str, **args: Any) -> str:
        (content,) = self.tool(name, **args)["content"]
        return str(content["text"])

    def close(self) -> None:
        self._file.close()
        self.socket.close()


# ── the two eras ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_discovery_probe_is_answered_with_name_version_and_instructions(node: Node) -> None:
    result = Session(node.path).ask("server/discover")["result"]
    assert result["supportedVersions"] == ["2026-07-28"]
    assert result["instructions"] == mcp_server.INSTRUCTIONS
    assert result["_meta"]["io.modelcontextprotocol/serverInfo"]["version"] == __version__


def test_the_handshake_era_is_served_as_well(node: Node) -> None:
    session = Session(node.path, era="plain")
    result = session.ask("initialize", HANDSHAKE)["result"]
    session.say({"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (result["protocolVersion"], result["serverInfo"]["name"]) == ("2025-11-25", "zmail")
    assert session.text("check") == "alpha: nothing unread"


@pytest.mark.parametrize("era", ["modern", "handshake"])
def test_tools_answer_in_plain_text_in_both_eras(node: Node, era: str) -> None:
    result = Session(node.path, era=era).tool("check")
    assert result["content"] == [{"type": "text", "text": "alpha: nothing unread"}]
    assert "structuredContent" not in result


def test_the_tools_say_what_a_client_needs_to_know_of_them(node: Node) -> None:
    tools = {tool["name"]: tool for tool in Session(node.path).ask("tools/list")["result"]["tools"]}
    loaded = {name for name, tool in tools.items() if tool.get("_meta", {}).get("anthropic/alwaysLoad")}
    looking = {name for name, tool in tools.items() if tool["annotations"]["readOnlyHint"]}
    assert set(tools) == {"send", "reply", "check", "inbox", "read", "roster"}
    assert loaded == {"send", "check", "read", "roster"}
    assert looking == {"check", "inbox", "roster"}
    assert not [name for name, tool in tools.items() if "outputSchema" in tool]


def test_the_tools_stay_within_their_budget_of_tokens(node: Node) -> None:
    tools = Session(node.path).ask("tools/list")["result"]["tools"]
    # Three characters a token is more than any tokenizer needs for English and JSON: an upper bound.
    tokens = {
        tool["name"]: len(json.dumps([tool["name"], tool["description"], tool["inputSchema"]])) / 3
        for tool in tools
    }
    assert sum(tokens[name] for name in ("send", "check", "read", "roster")) <= 900
    assert sum(tokens.values()) <= 2_600
    assert len(mcp_server.INSTRUCTIONS.encode()) <= 2_048


# ── what a tool asks of the office ──────────────────────────────────────────────────────────────────────────────


def test_send_takes_one_name_or_several_and_leaves_out_what_is_not_said(node: Node) -> None:
    session = Session(node.path)
    session.text("send", to="bravo", body="hello")
    session.text("send", to="bravo, charlie@two", body="hello", actions="look", cc=["delta"])
    session.text(
        "send", to='["bravo", "all"]', body="{}", title="null", priority="high", ttl="2h", intent="info"
    )
    assert node.office.asked == [
        ("alpha", "send", {"to": ["bravo"], "body": "hello"}),
        (
            "alpha",
            "send",
            {"to": ["bravo", "charlie@two"], "body": "hello", "actions": ["look"], "cc": ["delta"]},
        ),
        (
            "alpha",
            "send",
            {
                "to": ["bravo", "all"],
                "body": "{}",
                "title": "null",
                "priority": "high",
                "ttl": "2h",
                "intent": "info",
            },
        ),
    ]


def test_reply_and_inbox_pass_on_what_they_were_given(node: Node) -> None:
    session = Session(node.path)
    session.text("reply", id=BRIEF, body="done", actions=["check it"])
    session.text("inbox", all=True, sender="bravo", since="2h", limit=5)
    assert [args for _, _, args in node.office.asked] == [
        {"id": BRIEF, "body": "done", "actions": ["check it"]},
        {"all": True, "from": "bravo", "since": "2h", "limit": 5},
    ]


def test_an_error_tells_the_model_what_to_do_next(node: Node) -> None:
    result = Session(node.path).tool("read", id="ffffff")
    assert result["isError"]
    assert result["content"][0]["text"].endswith("no brief 'ffffff'. list what is there: inbox")


def test_an_error_nobody_foresaw_keeps_its_words_to_the_log(node: Node) -> None:
    session = Session(node.path)
    result = session.tool("roster")
    assert result["isError"]
    assert "may or may not have happened" in result["content"][0]["text"]
    assert "secret" not in result["content"][0]["text"]
    assert session.text("check") == "alpha: nothing unread"


def test_a_line_that_is_no_message_is_answered_so_that_nobody_waits_for_it(node: Node) -> None:
    session = Session(node.path)
    session.say({"jsonrpc": "2.0", "id": 7, "method": 5})
    assert session.hear()["error"]["code"] == -32600
    assert session.text("check") == "alpha: nothing unread"


# ── read means shown ────────────────────────────────────────────────────────────────────────────────────────────


def test_read_marks_a_brief_as_read_once_it_has_been_shown(
    node: Node, eventually: Callable[..., None]
) -> None:
    session = Session(node.path)
    assert "The migration adds a column." in session.text("read", id=BRIEF)
    eventually(lambda: ("alpha", "mark_read", {"ids": [BRIEF]}) in node.office.asked)
    assert node.office.asked[0] == ("alpha", "read", {"id": BRIEF, "peek": True})


def test_a_peek_marks_nothing(node: Node) -> None:
    session = Session(node.path)
    session.text("read", id=BRIEF, peek=True)
    session.text("check")
    assert node.office.verbs() == ["read", "check"]


def test_a_brief_whose_answer_has_not_left_yet_stays_unread(
    node: Node, eventually: Callable[..., None]
) -> None:
    node.office.body = "x" * 2_000_000  # more than a socket holds
    session = Session(node.path)
    other = Session(node.path, name="bravo")
    session.start("tools/call", {"name": "read", "arguments": {"id": BRIEF}})
    eventually(lambda: "read" in node.office.verbs())
    other.text("check")
    assert "mark_read" not in node.office.verbs()
    assert session.hear()["id"] == 1
    eventually(lambda: "mark_read" in node.office.verbs())


def test_a_brief_whose_reader_went_away_before_it_was_shown_stays_unread(
    node: Node, eventually: Callable[..., None]
) -> None:
    node.office.body = "x" * 2_000_000
    session = Session(node.path)
    session.start("tools/call", {"name": "read", "arguments": {"id": BRIEF}})
    eventually(lambda: "read" in node.office.verbs())
    session.close()
    eventually(lambda: "alpha" not in node.notices.sessions)
    assert node.office.verbs() == ["read"]


def test_the_next_call_sees_what_was_marked(node: Node) -> None:
    session = Session(node.path)
    session.text("read", id=BRIEF)
    session.text("check")
    assert node.office.verbs() == ["read", "mark_read", "check"]


# ── sessions apart ──────────────────────────────────────────────────────────────────────────────────────────────


def test_fifty_sessions_at_once_keep_their_identities_apart(node: Node) -> None:
    sessions = {
        f"s{n}": Session(node.path, name=f"s{n}", era=("modern", "handshake")[n % 2]) for n in range(50)
    }
    for _ in range(4):
        asked = {
            name: each.start("tools/call", {"name": "check", "arguments": {}})
            for name, each in sessions.items()
        }
        for name, session in sessions.items():
            answer = session.hear()
            assert (answer["id"], answer["result"]["content"][0]["text"]) == (
                asked[name],
                f"{name}: nothing unread",
            )


def test_a_session_that_ends_has_its_running_calls_cancelled_and_no_other(
    node: Node, eventually: Callable[..., None]
) -> None:
    leaving, staying = Session(node.path, name="leaving"), Session(node.path, name="staying")
    for session in (leaving, staying):
        session.start("tools/call", {"name": "send", "arguments": {"to": "bravo", "body": "wait"}})
    eventually(lambda: len(node.office.asked) == 2)
    leaving.close()
    eventually(lambda: node.office.cancelled == ["leaving"])
    node.release()
    assert "result" in staying.hear()


def test_a_session_without_an_identity_hears_why_and_works_once_it_has_one(node: Node) -> None:
    node.office.taken = True
    session = Session(node.path)
    refusal = session.tool("check")
    before = dict(node.notices.sessions)
    node.office.taken = False
    assert session.greeting["result"]["callsign"] is None
    assert refusal["content"][0]["text"].endswith(
        "alpha is held by another session. set ZMAIL_CALLSIGN=alpha-2"
    )
    assert (session.text("check"), before, list(node.notices.sessions)) == (
        "alpha: nothing unread",
        {},
        ["alpha"],
    )


# ── notices ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_notice_goes_out_as_a_control_line_and_counts_once_the_relay_says_posted(node: Node) -> None:
    session = Session(node.path)
    session.ask("server/discover")
    for posted in ({"ok": True}, {"ok": False, "why": "no socket"}):
        told = node.notify("alpha", text="1 unread brief")
        notice = session.hear()
        number = notice.pop("n")
        assert notice == {"zmail": "notice", "text": "1 unread brief", "from": "zmail:bravo", "name": "bravo"}
        session.say({"zmail": "posted", "n": number, **posted})
        assert told.result(5) is posted["ok"]


def test_a_relay_that_goes_away_or_says_nothing_has_posted_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Session(node.path)
    silent.ask("server/discover")
    monkeypatch.setattr(mcp_server, "POSTED_TIMEOUT_S", 0.05)
    assert node.notify("alpha").result(5) is False
    monkeypatch.setattr(mcp_server, "POSTED_TIMEOUT_S", 30.0)
    told = node.notify("alpha")
    while silent.hear()["n"] != 2:
        pass
    silent.close()
    assert told.result(5) is False


@pytest.mark.parametrize(
    "line",
    [{"zmail": "posted"}, {"zmail": "posted", "n": [1]}, {"zmail": "posted", "n": 99}, {"zmail": "of 2030"}],
)
def test_a_control_line_that_makes_no_sense_is_passed_over(node: Node, line: dict[str, Any]) -> None:
    session = Session(node.path)
    session.say(line)
    assert session.text("check") == "alpha: nothing unread"


# ── the node around it ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_node_that_stops_says_so_and_leaves_the_calls_it_cut_to_the_relay(
    node: Node, eventually: Callable[..., None]
) -> None:
    session = Session(node.path)
    session.start("tools/call", {"name": "send", "arguments": {"to": "bravo", "body": "wait"}})
    eventually(lambda: node.office.verbs() == ["send"])
    node.close()
    assert [session.hear(), session.hear()] == [{"zmail": "bye"}, None]


def test_the_sdk_is_imported_when_asked_for_and_leaves_logging_alone() -> None:
    script = (
        "import logging, sys\n"
        "from zmail.mcp_server import McpHost\n"
        "heavy = {'mcp', 'pydantic', 'anyio'}\n"
        "early = heavy & set(sys.modules)\n"
        "McpHost(None, resolve=None, push=None, node_name='n').preload()\n"
        "print(early, heavy <= set(sys.modules), logging.getLogger().handlers, logging.getLogger().level)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "set() True [] 30"
