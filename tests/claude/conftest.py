"""Fixtures of the laboratory. Where the client cannot be had, its tests say why and are skipped.

With ZMAIL_REQUIRE_CLIENT=1 (continuous integration) that is a failure instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from tests.claude.client import Claude
from tests.claude.fetch import ClientUnavailable, claude_program


@pytest.fixture(scope="session")
def program() -> Path:
    """The client's program, fetched at most once a run."""
    try:
        return claude_program()
    except ClientUnavailable as why:
        do_without(str(why))


@pytest.fixture(scope="session")
def tmux() -> Path:
    found = shutil.which("tmux")
    if found is None:
        do_without("tmux is not installed, so no interactive client can be driven")
    return Path(found)


@pytest.fixture
def new_claude(program: Path) -> Iterator[Callable[[], Claude]]:
    """Make clients, each of a user of its own; whatever they started is ended after the test."""
    with ExitStack() as opened:
        yield lambda: opened.enter_context(Claude(program))


@pytest.fixture
def claude(new_claude: Callable[[], Claude]) -> Claude:
    return new_claude()


def do_without(reason: str) -> NoReturn:
    """Skip the test, or fail it where the client is required."""
    if os.environ.get("ZMAIL_REQUIRE_CLIENT") == "1":
        pytest.fail(f"{reason} (and ZMAIL_REQUIRE_CLIENT=1 forbids to skip)", pytrace=False)
    pytest.skip(reason)
