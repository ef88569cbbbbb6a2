"""A stand-in for the model API on 127.0.0.1: it answers by rules and keeps everything the model was shown.

The client cannot tell it from the real thing: `POST /v1/messages` is answered as server-sent events, `count_tokens`
with a number, HEAD and GET with 200. It is the client's HTTPS proxy too, so that an attempt to reach the outside is
refused and recorded in `outside`.

    with ModelApi() as model:                              # the client talks to model.url
        model.on(asked("hand it over"), call("mcp__zmail__send", to=["bravo"], body="..."))
        model.on(answered("mcp__zmail__check"), lambda request: call("mcp__zmail__read", id=find(request)))
        request = model.wait_for(shows("Lock order"))      # what the model was *shown* is the thing to assert on

The first rule that fits answers; where none fits, the model says "done". A reply may be a function of the request.
It runs in the thread of that request, so it may also wait there: that holds the model's turn open.
Nothing here knows of processes, terminals or zmail.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

_tool_use_numbers = itertools.count(1)


# --- what the model says ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    tool: str
    arguments: Mapping[str, Any]


Reply = tuple[Text | ToolCall, ...]  # `+` joins them: say("one moment") + call("Bash", command="ls")


def say(text: str) -> Reply:
    return (Text(text),)


def call(tool: str, /, **arguments: Any) -> Reply:
    return (ToolCall(tool, arguments),)


# --- what the model is shown -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    tool_use_id: str
    tool: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request for a turn of the model. Its texts leave out the model's own words: those it was not shown."""

    number: int  # 1, 2, 3 … in order of arrival
    arrived_ms: int  # UTC
    headers: Mapping[str, str]  # names in lower case
    body: Mapping[str, Any]

    @property
    def text(self) -> str:
        """All text of the conversation: prompts, reminders, pushed notices, tool results."""
        return _text_of(self._messages)

    @property
    def news(self) -> str:
        """What the model sees for the first time: the text behind its own last words."""
        return _text_of(self._news)

    @property
    def prompt(self) -> str:
        """The news that speaks as the user: what was typed, and what was pushed into an idle session."""
        return _text_of(message for message in self._news if message["role"] == "user")

    @property
    def system(self) -> str:
        """The system prompt."""
        return "\n".join(_texts(self.body.get("system")))

    @property
    def tools(self) -> list[str]:
        """The names of the tools with a schema; deferred ones are not among them."""
        return [tool["name"] for tool in self.body.get("tools", [])]

    @property
    def tool_results(self) -> dict[str, ToolResult]:
        """Every tool result by its tool_use id, in order."""
        return {result.tool_use_id: result for result in _results(self._messages)}

    @property
    def answered_tools(self) -> list[str]:
        """The names of the tools whose results are news."""
        return [result.tool for result in _results(self._messages)][len(_results(self._old)) :]

    def result_of(self, tool: str) -> str:
        """Return the newest result of `tool` as the model is shown it."""
        texts = [result.text for result in self.tool_results.values() if result.tool == tool]
        if not texts:
            raise LookupError(f"request {self.number} shows no result of {tool}")
        return texts[-1]

    @property
    def session_id(self) -> str | None:
        return self.headers.get("x-claude-code-session-id")

    @property
    def agent_id(self) -> str | None:
        """Which subagent asks; None for the main conversation."""
        return self.headers.get("x-claude-code-agent-id")

    @property
    def _messages(self) -> Sequence[Mapping[str, Any]]:
        messages: Sequence[Mapping[str, Any]] = self.body["messages"]
        return messages

    @property
    def _old(self) -> Sequence[Mapping[str, Any]]:
        """The conversation up to the model's own last words."""
        replies = [at for at, message in enumerate(self._messages) if message["role"] == "assistant"]
        return self._messages[: replies[-1] + 1] if replies else []

    @property
    def _news(self) -> Sequence[Mapping[str, Any]]:
        return self._messages[len(self._old) :]


def _text_of(messages: Iterable[Mapping[str, Any]]) -> str:
    shown = (message for message in messages if message["role"] != "assistant")
    return "\n".join(text for message in shown for text in _texts(message["content"]))


def _texts(content: Any) -> Iterator[str]:  # Any: the API allows a string or a list of blocks
    for block in _blocks(content):
        if block["type"] == "text":
            yield block["text"]
        elif block["type"] == "tool_result":
            yield from _texts(block.get("content"))


def _results(messages: Iterable[Mapping[str, Any]]) -> list[ToolResult]:
    blocks = [block for message in messages for block in _blocks(message["content"])]
    tools = {block["id"]: block["name"] for block in blocks if block["type"] == "tool_use"}
    return [
        ToolResult(
            tool_use_id=block["tool_use_id"],
            tool=tools.get(block["tool_use_id"], ""),
            text="\n".join(_texts(block.get("content"))),
        )
        for block in blocks
        if block["type"] == "tool_result"
    ]


def _blocks(content: Any) -> Sequence[Mapping[str, Any]]:  # Any: as above
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


# --- when a rule applies ---------------------------------------------------------------------------------------

When = Callable[[Request], bool]


def asked(pattern: str) -> When:
    """The news is a prompt, or a push that woke the session, in which `pattern` is found; not a tool's result."""
    return lambda request: not request.answered_tools and re.search(pattern, request.prompt) is not None


def answered(tool: str) -> When:
    """The news is a result of `tool`."""
    return lambda request: tool in request.answered_tools


def shows(text: str) -> When:
    """`text` stands anywhere in the conversation, the model's own words left out."""
    return lambda request: text in request.text


def news(text: str) -> When:
    """`text` is shown to the model for the first time."""
    return lambda request: text in request.news


@dataclass(frozen=True, slots=True)
class _Rule:
    when: When
    then: Reply | Callable[[Request], Reply]


class NotShown(AssertionError):
    """The model was not shown in time what a test waits for; the message lists what it was shown."""


# --- the server ------------------------------------------------------------------------------------------------


class ModelApi:
    """One model: its rules, and every request made to it. `with` it, or `start()` and `close()`."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.outside: list[str] = []  # where the client tried to go through the proxy
        self.failures: list[str] = []  # tracebacks of rules that raised
        self._rules: list[_Rule] = []
        self._changed = threading.Condition()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.model = self
        self._thread = threading.Thread(target=self._serve, name="model-api", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            self.raise_failures()

    def on(self, when: When, then: Reply | Callable[[Request], Reply]) -> None:
        """Let requests for which `when` holds be answered with `then`, unless an earlier rule already does."""
        self._rules.append(_Rule(when, then))

    def wait_for(self, when: When, *, timeout_s: float = 15.0, after: int = 0) -> Request:
        """Return the first request numbered above `after` for which `when` holds, past ones included.

        Raises NotShown after `timeout_s`, and at once when a rule has raised.
        """
        deadline = time.monotonic() + timeout_s
        seen = after
        with self._changed:
            while True:
                self.raise_failures()
                for request in self.requests[seen:]:
                    if when(request):
                        return request
                seen = max(seen, len(self.requests))
                if not self._changed.wait(timeout=max(0.0, deadline - time.monotonic())):
                    raise NotShown(f"not shown to the model within {timeout_s} s.\n{self.story()}")

    def raise_failures(self) -> None:
        if self.failures:
            raise AssertionError("a rule of the scenario failed:\n" + "\n".join(self.failures))

    def story(self) -> str:
        """Tell what the model was shown, request by request, for messages of failed tests."""
        told = [f"request {r.number}: … {r.news[-800:]!r}" for r in self.requests]
        refused = [f"refused: {where}" for where in self.outside]
        return "\n".join(told + refused) or "no request was made"

    # -- called by the handler, in the thread of a request --

    def reply_to(self, headers: Mapping[str, str], body: Mapping[str, Any]) -> Reply:
        with self._changed:
            request = Request(
                number=len(self.requests) + 1,
                arrived_ms=time.time_ns() // 1_000_000,
                headers=headers,
                body=body,
            )
            self.requests.append(request)
            self._changed.notify_all()
        for rule in self._rules:
            if rule.when(request):
                return rule.then(request) if callable(rule.then) else rule.then
        return say("done")

    def rule_failed(self, trace: str) -> None:
        with self._changed:
            self.failures.append(trace)
            self._changed.notify_all()

    def refuse_outside(self, where: str) -> None:
        with self._changed:
            self.outside.append(where)
            self._changed.notify_all()

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=0.05)


class _Server(ThreadingHTTPServer):
    model: ModelApi


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        if self._is_meant_for_elsewhere():
            return
        path = urlsplit(self.path).path
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))) or b"{}")
        if path == "/v1/messages/count_tokens":
            self._answer_json(200, {"input_tokens": len(json.dumps(body)) // 4})
        elif path == "/v1/messages":
            self._answer_turn(body)
        else:
            self._answer_json(404, _error("not_found_error", f"no {path} here"))

    def do_GET(self) -> None:
        if not self._is_meant_for_elsewhere():
            self._answer_json(200, {})

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        self._refuse(self.path)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet: the requests are recorded."""

    def _is_meant_for_elsewhere(self) -> bool:
        """Refuse a proxied request to anybody else. (The client sends those for this API through the proxy, too.)"""
        host = urlsplit(self.path).netloc
        if host in ("", urlsplit(self.server.model.url).netloc):
            return False
        self._refuse(host)
        return True

    def _refuse(self, where: str) -> None:
        self.server.model.refuse_outside(where)
        self.send_error(403, "nothing outside this machine can be reached")

    def _answer_turn(self, body: dict[str, Any]) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            reply = self.server.model.reply_to(headers, body)
        except Exception:  # noqa: BLE001  a test's rule may raise anything: the waiting test must learn of it
            self.server.model.rule_failed(traceback.format_exc())
            self._answer_json(400, _error("invalid_request_error", "a rule of the scenario failed"))
            return
        message = _message(reply, model=body.get("model", ""))
        if not body.get("stream"):
            self._answer_json(200, message)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"".join(_server_sent(event) for event in _stream(message)))

    def _answer_json(self, status: int, body: Mapping[str, Any]) -> None:
        encoded = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(encoded)


# --- the wire format of a reply ----------------------------------------------------------------------------------


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}}


def _message(reply: Reply, *, model: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for part in reply:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        else:
            id_ = f"toolu_{next(_tool_use_numbers):024d}"
            content.append({"type": "tool_use", "id": id_, "name": part.tool, "input": dict(part.arguments)})
    calls = any(block["type"] == "tool_use" for block in content)
    return {
        "id": f"msg_{time.monotonic_ns():024d}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": "tool_use" if calls else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 10},
    }


def _stream(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a streamed message: it starts empty, each block comes in one delta, it ends."""
    empty: dict[str, Any] = {"content": [], "stop_reason": None}
    yield {"type": "message_start", "message": {**message, **empty}}
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            start = block | {"text": ""}
            delta = {"type": "text_delta", "text": block["text"]}
        else:
            start = block | {"input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield {"type": "content_block_start", "index": index, "content_block": start}
        yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    stop = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 10}}
    yield {"type": "message_stop"}


def _server_sent(event: Mapping[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
