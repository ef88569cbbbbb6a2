"""Every bound against others is hit here once: a typed error or a counter, and the node goes on."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from broker_free import Node
from broker_free.errors import InvalidInput, UnsuitableHome
from broker_free.frames import decode
from broker_free.limits import Limits
from broker_free.transport import Resolver
from tests.conftest import need_root
from tests.nodes import PATIENCE_S, run, until
from tests.test_mesh import all_linked, join, mesh


def test_json_that_is_too_deep_or_too_long_is_no_frame() -> None:
    limits = Limits(json_depth_max=3)
    for meta in (b'{"a":[[[1]]]}', b'{"a":"%s"}' % (b"x" * 17_000), b'{"a":%s}' % (b"1" * 50)):
        with pytest.raises(InvalidInput):
            decode([b"BF\x01\x07", bytes(24), meta, b""], limits)
    assert decode([b"BF\x01\x07", bytes(24), b'{"a":[[1]]}', b""], limits).meta == {"a": [[1]]}


def test_one_session_more_than_allowed_is_refused_and_counted(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            Node("a", home=tmp_path / "a", limits=Limits(sessions_max=1)) as a,
            Node("b", home=tmp_path / "b") as b,
            Node("c", home=tmp_path / "c") as c,
        ):
            await join(a, b)
            await until(lambda: [peer.link for peer in a.peers()] == ["open"])
            await join(a, c)
            async with asyncio.timeout(PATIENCE_S):
                while not (await a.refused()).get("too-many-sessions"):
                    await asyncio.sleep(0.02)
            assert {peer.name: peer.link for peer in a.peers()} == {"b": "open", "c": "closed"}
            receipt = await a.publish("t.x", b"", to=[b.node_id])
            await receipt.delivered(PATIENCE_S)

    run(main())


# -- file modes -----------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The home of a node that has run."""

    async def main() -> None:
        async with Node("a", home=tmp_path / "a"):
            pass

    run(main())
    return tmp_path / "a"


def start(home: Path) -> None:
    async def main() -> None:
        async with Node("a", home=home):
            pass

    run(main())


@pytest.mark.parametrize("name", ["store.db", "node.lock"])
def test_a_file_that_others_could_read_is_closed_at_the_next_start(kept: Path, name: str) -> None:
    (kept / name).chmod(0o644)
    start(kept)
    assert (kept / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["store.db", "node.keys", "store.db-wal", "blobs/x"])
def test_a_file_that_others_could_write_is_refused_with_the_command_that_helps(kept: Path, name: str) -> None:
    path = kept / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.touch()
    path.chmod(0o666)
    with pytest.raises(UnsuitableHome) as caught:
        start(kept)
    assert "chmod" in str(caught.value.hint)
    assert str(path) in str(caught.value.hint)


def test_a_link_in_place_of_the_store_is_refused(kept: Path, tmp_path: Path) -> None:
    (kept / "store.db").rename(tmp_path / "elsewhere.db")
    (kept / "store.db").symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(UnsuitableHome, match="symbolic link"):
        start(kept)


def test_a_store_of_another_user_is_refused(kept: Path) -> None:
    need_root()
    os.chown(kept / "store.db", 12_345, -1)
    with pytest.raises(UnsuitableHome, match="12345"):
        start(kept)


# -- host names -----------------------------------------------------------------------------------------------


def test_mail_flows_while_a_peers_host_name_is_never_answered(tmp_path: Path) -> None:
    async def main() -> None:
        never, asked = threading.Event(), threading.Event()

        def look_up(host: str, port: int) -> list[str]:
            asked.set()
            never.wait(60)
            return []

        async with mesh(tmp_path, "a", "b") as (a, b):
            async with Node("c", home=tmp_path / "c", advertise=["tcp://never.example:7000"]) as c:
                await join(a, c)
                await all_linked([a, b, c])
                owner = a._owner
                assert owner is not None
                owner._transport._resolver._look_up = look_up
            await until(asked.is_set)
            for _ in range(20):
                receipt = await a.publish("t.x", b"", to=[b.node_id])
                await receipt.delivered(PATIENCE_S)
            never.set()

    run(main())


def resolved(
    look_up: Callable[[str, int], list[str]], *endpoints: str, limits: Limits | None = None
) -> list[str | None]:
    woken = threading.Event()
    resolver = Resolver(limits or Limits(), wake=woken.set, look_up=look_up)
    answers: dict[int, str | None] = {}
    for number, endpoint in enumerate(endpoints):
        resolver.resolve(endpoint, key=number, then=lambda found, at=number: answers.update({at: found}))  # type: ignore[misc]
    deadline = time.monotonic() + 20
    while len(answers) < len(endpoints) and time.monotonic() < deadline:
        woken.wait(0.02)
        woken.clear()
        resolver.deliver(time.monotonic())
    return [answers[number] for number in range(len(endpoints))]


def test_names_become_addresses_and_addresses_stay() -> None:
    def look_up(host: str, port: int) -> list[str]:
        return [f"tcp://192.0.2.1:{port}"] if host == "one.example" else []

    assert resolved(
        look_up, "tcp://one.example:7", "tcp://no.example:7", "tcp://127.0.0.1:9", "tcp://[::1]:9"
    ) == [
        "tcp://192.0.2.1:7",
        None,
        "tcp://127.0.0.1:9",
        "tcp://[::1]:9",
    ]


def test_a_name_that_is_never_answered_is_given_up_and_holds_few_threads() -> None:
    release = threading.Event()
    under_way: list[str] = []

    def look_up(host: str, port: int) -> list[str]:
        under_way.append(host)
        release.wait(30)
        return []

    limits = Limits(resolve_timeout_ms=50, resolvers_max=2)
    assert resolved(look_up, *(f"tcp://h{n}.example:7" for n in range(5)), limits=limits) == [None] * 5
    assert len(under_way) <= 2
    release.set()
