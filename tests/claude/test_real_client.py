"""The main job with the real client: briefs cross between sessions, and an idle one is woken.

The assertions are on what the model was shown. Each home has a real node; a session reaches it through the MCP server
`zmail mcp`, which the client starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import zmail
from tests.claude.client import Claude, McpServer
from tests.claude.model_api import Reply, Request, answered, asked, call, news
from tests.claude.processes import end, living_in
from tests.claude.waiting import until

pytestmark = [pytest.mark.client, pytest.mark.timeout(300)]  # the first run on a machine fetches the client

TITLE = "Lock order in the migration"
BODY = "Take the *row* lock before the table lock, or two workers wait for each other."


class Home:
    """One zmail home on this machine, its command line and its MCP server. `close` stops its node."""

    def __init__(self, node_name: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zm-"))  # short: the door is a Unix socket in it
        self._env = {
            "ZMAIL_HOME": str(self.folder),
            "ZMAIL_LISTEN": "tcp://127.0.0.1:0",
            "ZMAIL_NODE_NAME": node_name,
            "PYTHONPATH": str(Path(zmail.__file__).parents[1]),
        }

    def server(self, callsign: str) -> McpServer:
        env = {**self._env, "ZMAIL_CALLSIGN": callsign}
        return McpServer(command=sys.executable, args=["-m", "zmail", "mcp"], env=env)

    def run(self, *args: str) -> str:
        """Run one command and return its answer. HOME tells its processes from all others."""
        env = {**self._env, "HOME": str(self.folder), "PATH": os.environ["PATH"]}
        command = [sys.executable, "-m", "zmail", *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, (
            f"zmail {' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def ask(self, *args: str) -> dict[str, Any]:
        return dict(json.loads(self.run("--json", *args)))

    def close(self) -> None:
        try:
            self.run("node", "stop")
            assert living_in(self.folder) == []
        finally:
            for process in living_in(self.folder):
                end(process)
            shutil.rmtree(self.folder)


@pytest.fixture
def new_home() -> Iterator[Callable[[str], Home]]:
    def make(node_name: str) -> Home:
        home = Home(node_name)
        opened.callback(home.close)
        return home

    with ExitStack() as opened:
        yield make


def test_two_headless_sessions_exchange_a_brief(
    new_home: Callable[[str], Home], new_claude: Callable[[], Claude]
) -> None:
    home = new_home("server1")
    home.run("--as", "bravo", "check")  # a mailbox exists from its first use
    alpha, bravo = new_claude(), new_claude()
    alpha.model.on(asked("Hand over"), call("mcp__zmail__send", to=["bravo"], title=TITLE, body=BODY))
    bravo.model.on(asked("Read your mail"), call("mcp__zmail__inbox"))
    bravo.model.on(answered("mcp__zmail__inbox"), read_what_is_listed)

    alpha.headless("Hand over", servers={"zmail": home.server("alpha")}, allowed_tools=["mcp__zmail"])
    bravo.headless("Read your mail", servers={"zmail": home.server("bravo")}, allowed_tools=["mcp__zmail"])

    sent = alpha.model.requests[-1].result_of("mcp__zmail__send")
    shown = bravo.model.requests[-1].result_of("mcp__zmail__read")
    assert "bravo" in sent
    assert TITLE in shown
    assert BODY in shown
    assert "alpha" in shown


def read_what_is_listed(request: Request) -> Reply:
    """Do what a model does with a listing: take the id from the row of the title."""
    [row] = [line for line in request.result_of("mcp__zmail__inbox").splitlines() if TITLE in line]
    [id_] = re.findall(r"\b[0-9a-f][0-9a-f-]{5,35}\b", row.partition(TITLE)[0])[:1]
    return call("mcp__zmail__read", id=id_)


def test_an_idle_session_is_woken_by_a_brief_from_another_node(
    new_home: Callable[[str], Home], claude: Claude, tmux: Path
) -> None:
    here, there = new_home("server1"), new_home("server2")
    here.run("join", there.run("invite").strip())
    session = claude.interactive(tmux, servers={"zmail": there.server("bravo")}, allowed_tools=["mcp__zmail"])
    assert until(lambda: "bravo" in callsigns(here), timeout_s=10)

    brief = here.ask("--as", "alpha", "send", "bravo", "-s", TITLE, "-m", BODY)
    woken = claude.model.wait_for(news(TITLE))
    session.wait_until_idle(since=woken)
    session.close()  # who is gone no longer holds the callsign

    assert woken.number == 1
    assert brief["id"] in woken.prompt
    assert BODY not in woken.text
    [received] = there.ask("--as", "bravo", "inbox")["briefs"]
    assert (received["id"], received["state"]) == (brief["id"], "announced")


def callsigns(home: Home) -> list[str]:
    return [entry["callsign"] for entry in home.ask("roster")["callsigns"]]
