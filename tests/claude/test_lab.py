"""The laboratory itself: what the real client does with a small MCP server is seen, scripted and cleaned up."""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.claude import probe_server
from tests.claude.client import Claude, ClientFailed, McpServer
from tests.claude.conftest import do_without
from tests.claude.fetch import ClientUnavailable, claude_program
from tests.claude.model_api import ModelApi, NotShown, Request, answered, asked, call, news, say, shows
from tests.claude.processes import living_in
from tests.claude.waiting import until

pytestmark = pytest.mark.timeout(300)  # the first run on a machine fetches the client

ECHO = "mcp__probe__echo"


NO_REGISTRY = "http://127.0.0.1:9"  # nothing listens on the discard port


def probe(**env: str) -> dict[str, McpServer]:
    return {"probe": McpServer(command=sys.executable, args=[str(Path(probe_server.__file__))], env=env)}


@pytest.mark.client
def test_a_headless_run_shows_the_model_what_a_tool_answered(claude: Claude) -> None:
    claude.model.on(asked("greet"), say("one moment") + call(ECHO, text="hello"))
    claude.model.on(answered(ECHO), lambda request: say(f"heard {request.result_of(ECHO)}"))

    run = claude.headless("greet", servers=probe(), allowed_tools=[ECHO])

    first, second = claude.model.requests
    assert run.mcp_servers == {"probe": "connected"}
    assert ECHO in first.tools
    assert [result.text for result in second.tool_results.values()] == ["echo: hello"]
    assert run.result == "heard echo: hello"
    assert first.session_id == run.session_id


@pytest.mark.client
def test_a_tool_that_is_not_allowed_is_not_run(claude: Claude) -> None:
    claude.model.on(asked("greet"), call(ECHO, text="hello"))

    claude.headless("greet", servers=probe())

    assert "echo: hello" not in claude.model.requests[-1].text
    assert "permission" in claude.model.requests[-1].result_of(ECHO)


@pytest.mark.client
def test_an_idle_session_is_woken_by_what_its_mcp_server_posts(claude: Claude, tmux: Path) -> None:
    fifo = claude.folder / "probe.fifo"
    os.mkfifo(fifo)

    session = claude.interactive(tmux, servers=probe(PROBE_FIFO=str(fifo)))
    write_line(fifo, "the lock order is wrong")
    request = claude.model.wait_for(news("the lock order is wrong"))

    assert request.number == 1
    assert 'from-name="lab"' in request.prompt
    assert session.record["sessionId"] == request.session_id


@pytest.mark.client
def test_a_prompt_typed_into_a_session_gets_an_answer_on_the_screen(claude: Claude, tmux: Path) -> None:
    claude.model.on(asked("greet"), call(ECHO, text="hello"))
    claude.model.on(answered(ECHO), say("They said hello."))

    session = claude.interactive(tmux, servers=probe(), allowed_tools=[ECHO])
    session.type_line(
        "greet the others, and mind that this line is longer than the terminal is wide, " + "so " * 60
    )

    request = claude.model.wait_for(answered(ECHO))
    session.wait_until_idle(since=request)
    assert request.result_of(ECHO) == "echo: hello"
    assert "They said hello." in session.terminal.screen()


@pytest.mark.client
def test_the_client_reaches_for_nothing_outside_this_machine(claude: Claude, tmux: Path) -> None:
    claude.headless("greet")
    claude.interactive(tmux)

    assert claude.model.outside == []


@pytest.mark.client
def test_nothing_is_left_behind_when_the_client_is_closed(
    new_claude: Callable[[], Claude], tmux: Path
) -> None:
    claude = new_claude()
    claude.model.on(asked("wait"), call("Bash", command="tail -f /dev/null & tail -f /dev/null"))
    session = claude.interactive(tmux, servers=probe(), allowed_tools=["Bash"])
    session.type_line("wait")
    assert until(lambda: names_in(claude.home).count("tail") == 2, timeout_s=10)
    assert session.pid in [process.pid for process in living_in(claude.home)]

    claude.close()

    assert living_in(claude.home) == []
    assert not claude.folder.exists()


@pytest.mark.client
def test_a_client_that_does_not_end_is_ended_and_told_of(claude: Claude) -> None:
    claude.model.on(asked("wait"), call("Bash", command="tail -f /dev/null"))

    with pytest.raises(ClientFailed, match="ran for over 2 s"):
        claude.headless("wait", allowed_tools=["Bash"], timeout_s=2)

    assert "claude" not in names_in(claude.home)


def test_a_wait_in_vain_tells_what_the_model_was_shown() -> None:
    with ModelApi() as model:
        ask(model, "one thing")
        with pytest.raises(NotShown, match="one thing"):
            model.wait_for(shows("another thing"), timeout_s=0.1)


def test_a_rule_that_raises_fails_the_test_that_waits() -> None:
    def stumble(request: Request) -> tuple[()]:
        raise LookupError("no id in the listing")

    model = ModelApi()
    model.on(asked("."), stumble)
    model.start()
    try:
        with pytest.raises(urllib.error.HTTPError):
            ask(model, "one thing")
        with pytest.raises(AssertionError, match="no id in the listing"):
            model.wait_for(shows("another thing"))
    finally:
        model.close()


def test_what_is_meant_for_elsewhere_is_refused_and_recorded() -> None:
    with ModelApi() as model:
        through_it = urllib.request.ProxyHandler({"http": model.url, "https": model.url})
        opener = urllib.request.build_opener(through_it)
        for url in ("http://outside.invalid/", "https://outside.invalid/"):
            with pytest.raises(OSError, match="403"):
                opener.open(url, timeout=5)
        assert model.outside == ["outside.invalid", "outside.invalid:443"]


def names_in(home: Path) -> list[str]:
    return [process.name() for process in living_in(home)]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has not fetched the client, and whose npm has never fetched anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    return tmp_path / "zmail-tests"


def test_a_registry_that_cannot_be_reached_is_told_and_leaves_no_half_client(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("npm") is None:
        do_without("npm is not installed")
    monkeypatch.setenv("npm_config_registry", NO_REGISTRY)

    with pytest.raises(ClientUnavailable, match="ECONNREFUSED"):
        claude_program()

    assert [path.suffix for path in empty_cache.iterdir()] == [".lock"]


def test_without_npm_the_client_is_unavailable(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))

    with pytest.raises(ClientUnavailable, match="npm is not installed"):
        claude_program()


@pytest.mark.parametrize(("required", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_a_missing_client_skips_unless_it_is_required(
    required: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZMAIL_REQUIRE_CLIENT", required)

    with pytest.raises(outcome, match="npm is not installed"):
        do_without("npm is not installed")


def ask(model: ModelApi, prompt: str) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}]}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{model.url}/v1/messages", body), timeout=5).close()


def write_line(fifo: Path, line: str) -> None:
    """Write to a FIFO once somebody reads it."""

    def write() -> bool:
        try:
            with open(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "w", encoding="utf-8") as file:
                return bool(file.write(f"{line}\n"))
        except OSError:  # nobody has opened it for reading yet
            return False

    assert until(write, timeout_s=10), f"nobody reads {fifo}"
