"""Real nodes with real post offices in one process, and real processes to hold leases. For tests of the mail side."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker_free import Node
from broker_free.limits import Limits
from zmail.config import Settings
from zmail.identity import Caller, Identity, Resolution
from zmail.models import MODELS
from zmail.postoffice import PostOffice
from zmail.push import Push

IDENTITY = Identity()


@dataclass(frozen=True, slots=True)
class Site:
    """One node with its post office."""

    node: Node
    office: PostOffice
    push: Push

    @property
    def name(self) -> str:
        return self.node.name

    async def call(self, who: Caller | None, verb: str, **args: Any) -> dict[str, Any]:
        """Ask the office; `from_` stands for the argument `from`."""
        return await self.office.call(who, verb, {name.rstrip("_"): value for name, value in args.items()})

    async def send(self, who: Caller, *to: str, body: str = "a text", **args: Any) -> str:
        return str((await self.call(who, "send", to=list(to), body=body, **args))["id"])

    async def titles(self, who: Caller, **args: Any) -> list[str]:
        """The titles in the inbox, newest first."""
        return [each["title"] for each in (await self.call(who, "inbox", **args))["briefs"]]

    async def act_as(self, name: str) -> Caller:
        """A script that says --as NAME."""
        return known(await self.office.enter(a_script(), {"as": name, "kind": "cli"}))

    def knows(self, *callsigns: str) -> bool:
        return set(callsigns) <= {place.callsign for place in self.office.directory().residents}


@asynccontextmanager
async def site(
    name: str, home: Path, *, limits: Limits | None = None, **settings: Any
) -> AsyncIterator[Site]:
    """Run a node with a post office, as the daemon puts them together."""
    push = Push(retry_s=0.1)
    node = Node(name, home=home, models=MODELS, limits=limits)
    office = PostOffice(node, identity=IDENTITY, push=push, settings=Settings(node_name=name, **settings))
    async with node:
        await office.start()
        try:
            yield Site(node, office, push)
        finally:
            await office.close()


@asynccontextmanager
async def two_sites() -> AsyncIterator[tuple[Site, Site]]:
    """server1 and server2, paired by invite and join."""
    with homes(2) as (first, second):
        async with site("server1", first) as one, site("server2", second) as two:
            await pair(one, two)
            yield one, two


async def pair(one: Site, two: Site) -> None:
    await two.call(None, "join", code=(await one.call(None, "invite"))["code"])


@contextmanager
def homes(count: int) -> Iterator[list[Path]]:
    folders = [Path(tempfile.mkdtemp(prefix="zm-")) for _ in range(count)]
    try:
        yield folders
    finally:
        for folder in folders:
            shutil.rmtree(folder)


def known(caller: Caller | None) -> Caller:
    assert caller is not None
    return caller


def a_script() -> Resolution:
    return Resolution(
        holder=None, evidence=None, caller=None, session=None, config_dir=None, is_human=False, user="tester"
    )


def a_person(user: str = "tester") -> Resolution:
    return Resolution(
        holder=None, evidence=None, caller=None, session=None, config_dir=None, is_human=True, user=user
    )


class Processes:
    """Processes that count as Claude Code, by the name of their executable. They do nothing and can be ended."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("sleep")
        assert found is not None
        self._program = folder / "claude"
        shutil.copy(Path(found).resolve(), self._program)
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([self._program, "300"])
        self._running.append(process)
        return process

    def session(self, *, of: subprocess.Popen[bytes] | None = None) -> Resolution:
        """How a child of a running session is resolved."""
        resolution = IDENTITY.resolve((of or self.start()).pid, {})
        assert resolution.holder is not None
        return resolution

    def end_all(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()


@dataclass(slots=True)
class Session:
    """A session that can be told of mail, as a relay is; it keeps what it was told."""

    works: bool = True
    told: list[tuple[str, str]] = field(default_factory=list)  # (text, sender)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    entered: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    async def notify(self, text: str, sender: str) -> bool:
        self.entered += 1
        await self.gate.wait()
        if self.works:
            self.told.append((text, sender))
        return self.works


def states(answer: Mapping[str, Any]) -> list[str]:
    recipients: Sequence[Mapping[str, Any]] = answer["recipients"]
    return [each["state"] for each in recipients]
