"""`zmail mcp`: the pipe between one Claude Code session and the node. Standard library only, for its start and size.

Lines from stdin go over the local door to the node, whose MCP server answers; its lines go to stdout. The relay knows
of MCP just what a pipe must that outlives its far end: which requests are unanswered, and the handshake, to repeat
both to the next node. It knows nothing of mail, so it does not grow old when zmail is upgraded under a session.

It is also the session's own child, and for that reason the one that may post into the session's inbox socket: a line
from the node that starts with `{"zmail":` is not MCP but a word to the relay (mcp_server.py has the other half).

    node → relay   {"zmail":"notice","n":7,"text":"...","from":"zmail:alice","name":"alice"}    post this
                   {"zmail":"bye"}                              stopped on purpose: do not start another for it
    relay → node   {"zmail":"posted","n":7,"ok":true}  or  {"zmail":"posted","n":7,"ok":false,"why":"..."}

One thread and one selector own everything; only starting a node, which blocks, has a thread of its own. In order of
reading: Conversation (pure: who waits for what), Relay (the loop), post (the inbox socket), main.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time

from broker_free.errors import BrokerFreeError
from zmail.errors import exit_code
from zmail.mailbox import ensure_node, hints
from zmail.paths import Home

TYPE_CHECKING = False  # typing costs 5 ms; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import FrameType
    from typing import Any

LINE_BYTES_MAX = 4 * 1024 * 1024  # of the door
_JUNK_BYTES_MAX = 4 * LINE_BYTES_MAX  # up to here a line that is too long is read, to answer it by its id
_QUEUED_BYTES_MAX = 1024 * 1024  # for an end that does not read; beyond it the other end is not read either
_WAITING_BYTES_MAX = 16 * 1024 * 1024  # of calls that wait for a node
_READ_BYTES = 65_536

PROBE_S = 2.5  # Claude Code waits 3 s for server/discover, then shakes hands instead
CALL_WAIT_S = 15.0  # for a node to come up: longer than the 10 s after which starting one fails with a reason
GREETING_S = 10.0
_RETRY_S_MIN, _RETRY_S_MAX = 0.05, 2.0  # to connect: costs microseconds
_START_S_MIN, _START_S_MAX = 0.5, 30.0  # between attempts to start a node that nobody asked for
_ASKED_AGAIN_MAX = 3  # a question that takes the node down each time is not repeated for ever

_CONTROL = b'{"zmail":'
_LOST = "zmail's node restarted while this call ran; it may or may not have happened; call again"

# JSON-RPC error codes. Not -32000: clients take it for a closed connection.
_PARSE_ERROR, _INVALID_REQUEST, _METHOD_NOT_FOUND, _INTERNAL_ERROR = -32700, -32600, -32601, -32603


class _Call:
    """A request of the client that has no answer yet."""

    __slots__ = ("asked_again", "is_sent", "line", "method", "since")

    def __init__(self, line: bytes, method: str, since: float) -> None:
        self.line = line
        self.method = method
        self.since = since
        self.is_sent = False  # to the node of the present connection
        self.asked_again = 0

    @property
    def may_be_repeated(self) -> bool:
        """Only a tool changes anything; everything else of the protocol asks."""
        return self.method != "tools/call" and self.asked_again < _ASKED_AGAIN_MAX


class Conversation:
    """What the client has said that a new node must hear, and what it waits for. Pure: lines in, lines out."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}  # by id, as JSON text: 1 and "1" are two ids; in the order asked
        self._handshake: bytes | None = None  # the `initialize` that was answered
        self._initialized: bytes | None = None  # the `notifications/initialized` that followed
        self._is_served = False  # a node has answered something: which of the two eras it is has been settled
        self._repeats: set[str] = set()  # ids of repeated requests, whose answers the client has already

    def from_client(self, line: bytes, *, now: float) -> tuple[list[bytes], list[bytes]]:
        """Take a line of the client. Returns what to answer at once, and what to say to the node if there is one."""
        try:
            said = None if line.startswith(_CONTROL) else json.loads(line)
        except (ValueError, RecursionError):
            return [_error(None, _PARSE_ERROR, "this line is not JSON")], []
        if not isinstance(said, dict):
            return [_error(None, _INVALID_REQUEST, "a line is one JSON-RPC object")], []
        method, is_request = said.get("method"), "id" in said and "method" in said
        if len(line) > LINE_BYTES_MAX:
            too_long = f"this is over {LINE_BYTES_MAX} bytes: send less at once"
            return [_error(said.get("id"), _INVALID_REQUEST, too_long)], []
        if is_request and not _is_id(said["id"]):
            return [_error(None, _INVALID_REQUEST, "an id is a text or a whole number")], []
        if is_request:
            self._calls[json.dumps(said["id"])] = _Call(line, str(method), now)
        elif method == "notifications/cancelled":
            return [], self._cancelled(said, line)
        elif method == "notifications/initialized":
            self._initialized = line
        return [], [line]

    def sent(self, line: bytes) -> None:
        """Note that a line of `from_client` or `greeted` has gone to the node."""
        for call in self._calls.values():
            if call.line is line:
                call.is_sent = True

    def greeted(self) -> list[bytes]:
        """Return all that a node must hear which knows nothing: the handshake as it was, then what waits."""
        opening = []
        if self._handshake is not None:
            self._repeats.add(json.dumps(json.loads(self._handshake)["id"]))
            opening.append(self._handshake)
        if self._initialized is not None:
            opening.append(self._initialized)
        return opening + [call.line for call in self._calls.values()]

    def from_node(self, line: bytes) -> list[bytes]:
        """Take a line of the node. Returns what the client should hear of it."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return []
        if not isinstance(said, dict) or "jsonrpc" not in said:
            return []
        if "method" in said or "id" not in said:
            return [line]
        key = json.dumps(said["id"])
        if key in self._repeats and key not in self._calls:
            self._repeats.discard(key)
            return []
        call = self._calls.pop(key, None)
        if call is None:
            return []  # cancelled, or answered by us in the meantime
        self._is_served = True
        if call.method == "initialize" and "result" in said:
            self._handshake = call.line
        return [line]

    def lost(self, *, now: float) -> list[bytes]:
        """Note that the node went away. Returns the answers to the calls which may or may not have happened."""
        self._repeats.clear()
        answers = []
        for key, call in list(self._calls.items()):
            if call.is_sent and not call.may_be_repeated:
                del self._calls[key]
                answers.append(_error(json.loads(key), _INTERNAL_ERROR, _LOST))
            elif call.is_sent:
                call.is_sent = False
                call.asked_again += 1
                call.since = now
        return answers

    def refused(self, why: str) -> list[bytes]:
        """Answer everything that waits for a node: none can be had."""
        return self._give_up(lambda call: not call.is_sent, _INTERNAL_ERROR, why)

    def overdue(self, *, now: float) -> list[bytes]:
        """Answer the calls that have waited too long for a node to come up."""
        return self._give_up(
            lambda call: not call.is_sent and now >= call.since + CALL_WAIT_S,
            _INTERNAL_ERROR,
            f"zmail's node has not come up within {CALL_WAIT_S:.0f} s; look why: zmail node status; then call again",
        )

    def overdue_probe(self, *, now: float) -> tuple[list[bytes], bool]:
        """Answer a discovery that took too long, so that the client shakes hands in time. True: the node heard it.

        Such a node would answer later and from then on refuse the handshake: it needs a fresh connection.
        """
        late = [call for call in self._probes() if now >= call.since + PROBE_S]
        answers = self._give_up(
            lambda call: call in late, _METHOD_NOT_FOUND, "zmail's node is still starting: use initialize"
        )
        return answers, any(call.is_sent for call in late)

    def is_waiting(self) -> bool:
        """Whether something is asked that no node has heard."""
        return any(not call.is_sent for call in self._calls.values())

    def waiting_bytes(self) -> int:
        """How much is kept for a node to come."""
        return sum(len(call.line) for call in self._calls.values() if not call.is_sent)

    def deadline(self) -> float | None:
        """When `overdue` or `overdue_probe` has something to say next."""
        moments = [call.since + CALL_WAIT_S for call in self._calls.values() if not call.is_sent]
        moments += [call.since + PROBE_S for call in self._probes()]
        return min(moments, default=None)

    def _probes(self) -> list[_Call]:
        """Return the discoveries on which the client's choice of an era hangs."""
        return [] if self._is_served else [c for c in self._calls.values() if c.method == "server/discover"]

    def _cancelled(self, said: dict[str, Any], line: bytes) -> list[bytes]:
        params = said.get("params")
        key = json.dumps(params.get("requestId")) if isinstance(params, dict) else ""
        call = self._calls.pop(key, None)
        return [line] if call is None or call.is_sent else []

    def _give_up(self, is_hopeless: Callable[[_Call], bool], code: int, why: str) -> list[bytes]:
        hopeless = [key for key, call in self._calls.items() if is_hopeless(call)]
        for key in hopeless:
            del self._calls[key]
        return [_error(json.loads(key), code, why) for key in hopeless]


def _is_id(value: Any) -> bool:  # whatever JSON the client sent
    return isinstance(value, str | int) and not isinstance(value, bool)


def _error(request_id: Any, code: int, message: str) -> bytes:  # an id is whatever JSON it was
    answer = {"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": message}}
    return json.dumps(answer, separators=(",", ":")).encode("ascii")


class _Lines:
    """Bytes in, whole lines out. A line beyond all measure comes out empty."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._is_skipping = False

    def feed(self, arrived: bytes) -> Iterable[bytes]:
        *whole, rest = arrived.split(b"\n")
        for piece in whole:
            line = b"" if self._is_skipping else bytes(self._rest) + piece
            self._rest.clear()
            self._is_skipping = False
            yield line
        if not self._is_skipping:
            self._rest += rest
            if len(self._rest) > _JUNK_BYTES_MAX:
                self._rest.clear()
                self._is_skipping = True


class Relay:
    """The loop: stdin, stdout, the door, and when to try for a node again."""

    def __init__(
        self,
        door_path: str,
        *,
        ensure_node: Callable[[], None],
        hints: Mapping[str, Any],
        inbox: Inbox,
        stdin: int,
        stdout: int,
    ) -> None:
        self._door_path = door_path
        self._ensure_node = ensure_node
        greeting = {"id": 1, "verb": "mcp", "args": {}, "hints": dict(hints)}
        self._greeting = json.dumps(greeting).encode("ascii")
        self._inbox = inbox
        self._stdin = stdin
        self._stdout = stdout
        self._conversation = Conversation()
        self._client_lines = _Lines()
        self._to_client = bytearray()
        self._ended = False

        self._door: socket.socket | None = None
        self._is_greeted = False  # the node has answered the greeting: lines may flow
        self._node_lines = _Lines()
        self._to_node = bytearray()
        self._greeting_until = 0.0

        # False after a node has been stopped on purpose, until somebody asks something.
        self._is_node_wanted = True
        self._retry_at: float | None = time.monotonic()
        self._retry_s = _RETRY_S_MIN
        self._start_at = 0.0
        self._start_s = _START_S_MIN
        self._starter: threading.Thread | None = None
        self._start_failure: str | None = None
        self._woken, self._wake = socket.socketpair()  # the starter's thread says so here when it is done

    def run(self) -> None:
        """Carry lines until stdin ends or stdout breaks."""
        poll = select.poll()  # unlike epoll it takes a file, and tells of a hang-up nobody asked for
        watched: set[int] = set()
        while not self._ended:
            interest = self._interest()
            for fd in watched - interest.keys():
                poll.unregister(fd)
            for fd, events in interest.items():
                poll.register(fd, events)
            watched = set(interest)
            ready = poll.poll(self._timeout_ms())
            # stdin last: what is said to a node that has just gone would be lost.
            for fd, events in sorted(ready, key=lambda each: each[0] == self._stdin):
                self._ready(fd, events, interest[fd])
            self._tick(time.monotonic())
        self._flush_client(0.2)

    def _interest(self) -> dict[int, int]:
        """Which ends to watch, for what. An end whose opposite does not keep up is not read, only seen to hang up."""
        is_node_slow = len(self._to_node) > _QUEUED_BYTES_MAX
        is_client_slow = len(self._to_client) > _QUEUED_BYTES_MAX
        is_full = is_node_slow or self._conversation.waiting_bytes() > _WAITING_BYTES_MAX
        interest = {
            self._woken.fileno(): select.POLLIN,
            self._stdin: 0 if is_full else select.POLLIN,
            self._stdout: select.POLLOUT if self._to_client else 0,
        }
        if self._door is not None:
            events = (0 if is_client_slow else select.POLLIN) | (select.POLLOUT if self._to_node else 0)
            if events:  # a door that hangs up may still have something to be read: that comes first
                interest[self._door.fileno()] = events
        return interest

    def _timeout_ms(self) -> float | None:
        moments = [self._retry_at, self._conversation.deadline()]
        if self._door is not None and not self._is_greeted:
            moments.append(self._greeting_until)
        soonest = min((moment for moment in moments if moment is not None), default=None)
        return None if soonest is None else max(0.0, (soonest - time.monotonic()) * 1_000)

    def _ready(self, fd: int, events: int, interest: int) -> None:
        has_hung_up = bool(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL))
        if fd == self._stdin:
            if interest:
                self._read_client()
            else:
                self._ended = True
        elif fd == self._stdout:
            if has_hung_up:
                self._ended = True
            else:
                self._write_client()
        elif fd == self._woken.fileno():
            self._woken.recv(_READ_BYTES)
            self._started()
        elif self._door is not None and fd == self._door.fileno():
            if events & select.POLLOUT:
                self._write_node()
            if events & select.POLLIN or has_hung_up:
                self._read_node()

    def _tick(self, now: float) -> None:
        """Do what time has brought."""
        answers, is_heard = self._conversation.overdue_probe(now=now)
        self._tell_client([*answers, *self._conversation.overdue(now=now)])
        is_silent = self._door is not None and not self._is_greeted and now >= self._greeting_until
        if is_heard or is_silent:
            self._lose_node()
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self._try_for_node(now)

    # ── the client ──────────────────────────────────────────────────────────────────────────────────────────────

    def _read_client(self) -> None:
        try:
            arrived = os.read(self._stdin, _READ_BYTES)
        except OSError:  # a terminal that is gone
            arrived = b""
        if not arrived:
            self._ended = True
            return
        now = time.monotonic()
        for line in self._client_lines.feed(arrived):
            answers, told = self._conversation.from_client(line.removesuffix(b"\r"), now=now)
            self._tell_client(answers)
            if self._is_greeted:
                self._tell_node(told)
            elif told:
                self._want_node(now)

    def _tell_client(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self._to_client += line + b"\n"

    def _write_client(self) -> None:
        # A pipe that polls as writable takes PIPE_BUF bytes without blocking; making it non-blocking instead would
        # change it for whoever shares it.
        try:
            written = os.write(self._stdout, self._to_client[: select.PIPE_BUF])
        except OSError:  # nobody reads any more
            self._to_client.clear()
            self._ended = True
            return
        del self._to_client[:written]

    def _flush_client(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._stdout, select.POLLOUT)
        while self._to_client and poll.poll(max(0.0, (deadline - time.monotonic()) * 1_000)):
            self._write_client()

    # ── the node ────────────────────────────────────────────────────────────────────────────────────────────────

    def _want_node(self, now: float) -> None:
        """Somebody asks: what has been stopped on purpose may be started for it, and at once."""
        self._is_node_wanted = True
        if self._door is None and self._starter is None:
            self._start_at = now
            self._retry_at = now

    def _try_for_node(self, now: float) -> None:
        """Connect, else have a node started, else try again later."""
        if self._door is not None:
            return
        is_absent = False
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            door.setblocking(False)
            door.connect(self._door_path)
        except OSError as error:
            door.close()
            is_absent = not isinstance(error, BlockingIOError)  # that one is there, and its queue full
        else:
            self._door = door
            self._is_greeted = False
            self._node_lines = _Lines()
            self._to_node = bytearray(self._greeting + b"\n")
            self._greeting_until = now + GREETING_S
            self._write_node()
            return
        if is_absent and self._is_node_wanted and self._starter is None and now >= self._start_at:
            self._start_at = now + self._start_s
            self._start_s = min(2 * self._start_s, _START_S_MAX)
            self._starter = threading.Thread(target=self._start, name="start the node", daemon=True)
            self._starter.start()
        elif self._starter is None:
            self._retry_at = now + self._retry_s * _jitter()
            self._retry_s = min(2 * self._retry_s, _RETRY_S_MAX)

    def _start(self) -> None:
        """In its own thread."""
        try:
            self._ensure_node()
            self._start_failure = None
        except BrokerFreeError as error:
            self._start_failure = _sentence(error.message, error.hint)
        except Exception as error:  # noqa: BLE001 - the edge of the thread: its failure is answered to every call
            self._start_failure = f"{type(error).__name__}: {error}"
        self._wake.send(b"!")

    def _started(self) -> None:
        self._starter = None
        self._retry_at = time.monotonic()
        if self._start_failure is not None:
            self._tell_client(
                self._conversation.refused(f"zmail's node cannot be started: {self._start_failure}")
            )
            self._retry_at += self._retry_s

    def _tell_node(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self._to_node += line + b"\n"
            self._conversation.sent(line)
        self._write_node()

    def _write_node(self) -> None:
        if self._door is None:
            return
        try:
            while self._to_node:
                del self._to_node[: self._door.send(self._to_node)]
        except BlockingIOError:
            return
        except OSError:
            return  # reading tells what it said last, and then that it is gone

    def _read_node(self) -> None:
        assert self._door is not None
        try:
            arrived = self._door.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            arrived = b""
        if not arrived:
            self._lose_node()
            return
        for line in self._node_lines.feed(arrived):
            if line.startswith(_CONTROL):
                self._control(line)
            elif self._is_greeted:
                self._tell_client(self._conversation.from_node(line))
            elif not self._hear_greeting(line):
                return

    def _hear_greeting(self, line: bytes) -> bool:
        """Take the node's answer to the greeting. False: it does not want us."""
        answer = json.loads(line)
        if error := answer.get("error"):
            why = _sentence(error["message"], error.get("hint"))
            self._tell_client(self._conversation.refused(f"zmail's node refused this session: {why}"))
            self._lose_node()
            return False
        self._is_greeted = True
        self._is_node_wanted = True
        self._retry_s, self._start_s = _RETRY_S_MIN, _START_S_MIN
        self._start_at = 0.0
        self._inbox.claude_pid = answer["result"].get("claude_pid")
        self._tell_node(self._conversation.greeted())
        return True

    def _lose_node(self) -> None:
        assert self._door is not None
        now = time.monotonic()
        self._door.close()
        self._door = None
        self._to_node.clear()
        if self._is_greeted:
            self._tell_client(self._conversation.lost(now=now))
            self._is_node_wanted = self._is_node_wanted or self._conversation.is_waiting()
        self._is_greeted = False
        self._retry_at = now + self._retry_s * _jitter()
        self._retry_s = min(2 * self._retry_s, _RETRY_S_MAX)

    def _control(self, line: bytes) -> None:
        """A word of the node to the relay itself. Unknown ones are for a newer relay."""
        said = json.loads(line)
        if said["zmail"] == "bye":
            self._is_node_wanted = False
        elif said["zmail"] == "notice":
            why = self._inbox.post(str(said["text"]), sender=str(said["from"]), name=str(said["name"]))
            posted = {"zmail": "posted", "n": said["n"], "ok": why is None} | (
                {} if why is None else {"why": why}
            )
            self._to_node += json.dumps(posted, separators=(",", ":")).encode("ascii") + b"\n"
            self._write_node()


def _sentence(message: str, hint: str | None) -> str:
    return f"{message} ({hint})" if hint else message


def _jitter() -> float:
    """Between 0.5 and 1.5: the sessions of one host lose their node together and should not come back as one."""
    return 0.5 + os.urandom(1)[0] / 255


# ── the session's inbox socket ──────────────────────────────────────────────────────────────────────────────────

_NOT_IN_AN_ADDRESS = re.compile(r"[^A-Za-z0-9%:_/.-]+")  # what Claude Code takes for `from`
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9 :_/.@()-]+")
_TAG = re.compile(r"<(?=\s*/?\s*[A-Za-z!?])")
# C0 but tab and newline, DEL, C1, line and paragraph separators, and what turns the direction of writing.
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_TEXT_CHARACTERS_MAX = 50_000  # a notice has a few hundred; escaped, it still fits the line of 1 MiB


class Inbox:
    """The inbox socket of the session that this process is a child of, found anew at every post.

    It may appear after us, and the session's registry is then the only place that names it.
    """

    def __init__(self, env: Mapping[str, str], *, parent_pid: int) -> None:
        self._env = env
        self._parent_pid = parent_pid
        self.claude_pid: int | None = (
            None  # as the node found it: wrappers may stand between us and Claude Code
        )

    def post(self, text: str, *, sender: str, name: str) -> str | None:
        """Put a message before the session's model. Returns None once it is written, else why it is not.

        Nothing comes back from the session: written is not read.
        """
        lines: list[dict[str, Any]] = []
        if token := self._env.get("CLAUDE_CODE_MESSAGING_TOKEN"):
            lines.append({"type": "auth", "token": token})
        lines.append(
            {
                "type": "user",
                "message": {"role": "user", "content": enveloped(text, sender=sender, name=name)},
                "from": _address(sender),
                "priority": "next",
            }
        )
        data = b"".join(json.dumps(line).encode("ascii") + b"\n" for line in lines)
        why = "no inbox socket is known for this session"
        for path in self._paths():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inbox:
                inbox.setblocking(False)  # a session that is stuck must not hold up its own tool calls
                try:
                    inbox.connect(path)
                    inbox.sendall(data)
                    return None
                except OSError as error:
                    why = f"the inbox socket {path} does not take it: {error.strerror or error}"
        return why

    def _paths(self) -> Iterable[str]:
        if path := self._env.get("CLAUDE_CODE_MESSAGING_SOCKET"):
            yield path
        home = self._env.get("HOME") or os.path.expanduser("~")
        folder = os.path.join(self._env.get("CLAUDE_CONFIG_DIR") or os.path.join(home, ".claude"), "sessions")
        for pid in dict.fromkeys([self._env.get("CLAUDE_PID"), self.claude_pid, self._parent_pid]):
            if pid and (path := _registered(os.path.join(folder, f"{pid}.json"))):
                yield path


def _registered(entry: str) -> str | None:
    """Read the socket's path out of a session's registry file, whose format nobody has promised."""
    try:
        with open(entry, "rb") as file:
            path = json.load(file).get("messagingSocketPath")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return path if isinstance(path, str) and path else None


def enveloped(text: str, *, sender: str, name: str) -> str:
    """Wrap a text so that the terminal shows one tidy line of it, and nothing in it can end the wrapper early.

    `from-mode` is never written: it attests the sender's permission mode, which zmail does not know.
    """
    harmless = _TAG.sub("&lt;", _CONTROL_CHARACTERS.sub("", text[:_TEXT_CHARACTERS_MAX]))
    shown = _NOT_IN_A_NAME.sub("-", name)[:80].strip() or "zmail"
    opening = f'<cross-session-message from="{_address(sender)}" from-name="{shown}">'
    return f"{opening}\n{harmless}\n</cross-session-message>"


def _address(sender: str) -> str:
    return _NOT_IN_AN_ADDRESS.sub("-", sender)[:300] or "zmail"


# ── the process ─────────────────────────────────────────────────────────────────────────────────────────────────


def run(*, as_name: str | None, config: str | None) -> int:
    """Be `zmail mcp` in this process: find the home, then serve. Returns the exit status."""
    env = {**os.environ, "ZMAIL_CONFIG": config} if config else os.environ
    try:
        home = Home.resolve(env)
        return main(home.door_path, ensure_node=lambda: ensure_node(home, env), as_name=as_name, env=env)
    except BrokerFreeError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        sys.stderr.write(f"error: {error.message}{hint}\n")
        return exit_code(error.code)


def main(
    home_door_path: str, *, ensure_node: Callable[[], None], as_name: str | None, env: Mapping[str, str]
) -> int:
    """Serve one session on stdin and stdout until it ends. Returns the exit status.

    `ensure_node` starts the node unless one runs, returns when its door answers, and raises why not. It is called
    from another thread.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    stdin, stdout = _claim_stdio()
    Relay(
        home_door_path,
        ensure_node=ensure_node,
        hints=hints(env, as_name=as_name, kind="mcp"),
        inbox=Inbox(env, parent_pid=os.getppid()),
        stdin=stdin,
        stdout=stdout,
    ).run()
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    """End here and now: what matters is in the node, and Claude Code sends SIGTERM 100 ms after SIGINT."""
    os._exit(0)


def _claim_stdio() -> tuple[int, int]:
    """Take stdin and stdout for the protocol. What else prints, here or in a child, goes to stderr."""
    stdin, stdout = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # no stderr
        os.dup2(nowhere, 1)
    os.close(nowhere)
    return stdin, stdout
