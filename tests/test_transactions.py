"""Transactional effects through the public door: all of it or nothing, in the owner thread alone, exactly once."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peewee as pw
import pytest

from broker_free import Node, Tx, faults, frames
from broker_free.errors import LeaseLost, NodeClosed, StoreFailed, TransactionMisused
from broker_free.message import Envelope
from broker_free.subscription import Job, Subscription
from tests.nodes import collecting, pair, run, until


class Posting(pw.Model):
    """An application's table: one row for each effect that happened."""

    text = pw.TextField()


def write(tx: Tx, text: str) -> int:
    return int(Posting.create(text=text).id)


def write_and_fail(tx: Tx, text: str) -> None:
    write(tx, text)
    raise ValueError(text)


async def entries(node: Node) -> list[str]:
    return await node.read(lambda _: [posting.text for posting in Posting.select().order_by(Posting.id)])


def a_node(tmp_path: Path, name: str = "a") -> Node:
    return Node(name, home=tmp_path / name, models=[Posting])


def failing_disk() -> AbstractContextManager[None]:
    """Have commits fail as SQLite reports a failing disk."""

    def fail() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    return faults.watch("before-commit", fail)


# -- transact -----------------------------------------------------------------------------------------------


def test_rows_of_an_application_and_messages_share_one_transaction(tmp_path: Path) -> None:
    def good(tx: Tx) -> None:
        write(tx, "good")
        tx.publish("t.good", b"", to=[a.node_id])
        tx.registry_put("b", "good", {})

    def bad(tx: Tx) -> None:
        write(tx, "bad")
        tx.publish("t.bad", b"", to=[a.node_id])
        tx.registry_put("b", "bad", {})
        raise ValueError("no")

    async def main() -> None:
        arrived = collecting(a)
        async with a:
            with pytest.raises(ValueError, match="no"):
                await a.transact(bad)
            await a.transact(good)
            await until(lambda: arrived)
            assert await entries(a) == ["good"]
            assert [one.subject for one in arrived] == ["t.good"]
            assert a.registry("b").keys() == ["good"]

    a = a_node(tmp_path)
    run(main())


def test_one_that_raises_does_not_hurt_its_neighbours_of_the_same_tick(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path) as a:
            with faults.hold("before-begin") as held:  # so that all of them meet in the next tick
                first = asyncio.ensure_future(a.transact(write, "first"))
                await until(held.reached.is_set)
                others = [
                    asyncio.ensure_future(a.transact(fn, text))
                    for fn, text in ((write, "1"), (write_and_fail, "2"), (write, "3"), (write_and_fail, "4"))
                ]
                await asyncio.sleep(0)
                held.release()
            results = await asyncio.gather(first, *others, return_exceptions=True)
            assert [isinstance(one, ValueError) for one in results] == [False, False, True, False, True]
            assert await entries(a) == ["first", "1", "3"]

    run(main())


def test_an_effect_that_raises_does_not_hurt_its_neighbours_of_the_same_tick(tmp_path: Path) -> None:
    def effect(tx: Tx, envelope: Envelope) -> None:
        write(tx, envelope.subject)
        if envelope.subject == "t.bad":
            raise ValueError("no")

    def publish_all(tx: Tx) -> None:
        for subject in ("t.one", "t.bad", "t.two"):
            tx.publish(subject, b"", to=[a.node_id])

    async def main() -> None:
        a.effect("t.*", effect)
        async with a:
            await a.transact(publish_all)
            assert await entries(a) == ["t.one", "t.two"]

    a = a_node(tmp_path)
    run(main())


def test_a_coroutine_function_is_refused_before_it_runs(tmp_path: Path) -> None:
    async def wrong(*_: object) -> None:
        write(_[0], "never")  # type: ignore[arg-type]

    def disguised(*args: object) -> Any:
        return wrong(*args)

    class Callable_:
        async def __call__(self, *_: object) -> None: ...

    async def main() -> None:
        a = a_node(tmp_path)
        with pytest.raises(TypeError, match="plain function"):
            a.effect("t.*", wrong)
        a.effect("t.hidden", disguised)
        async with a, a.subscribe("work", durable="w") as jobs:
            for fn in (wrong, Callable_()):
                with pytest.raises(TypeError, match="plain function"):
                    a.transact(fn)
            with pytest.raises(TypeError, match="plain function"):
                await a.transact(disguised)
            await a.publish("work", b"")
            job = await anext(jobs)
            with pytest.raises(TypeError, match="plain function"):
                job.commit(wrong)
            with pytest.raises(TypeError, match="plain function"):
                await job.commit(disguised)
            await job.commit(write, "kept")  # the job was still ours, and open
            await a.publish("t.hidden", b"", to=[a.node_id])
            state = "SELECT reason FROM inbox WHERE reason IS NOT NULL"
            ((reason,),) = await a.read(lambda db: db.execute_sql(state).fetchall())
            assert "plain function" in reason, "an effect that is a coroutine in disguise did not happen"
            assert await entries(a) == ["kept"]

    run(main())


def test_a_function_that_holds_up_everybody_is_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(tx: Tx, *_: object) -> None:
        time.sleep(0.06)

    async def main() -> None:
        a = a_node(tmp_path)
        a.effect("t.*", slow)
        async with a:
            await a.transact(write, "quick")
            assert not [one for one in caplog.records if one.message == "slow transaction"]
            await a.transact(slow)
            await a.publish("t.x", b"", to=[a.node_id])

    with caplog.at_level(logging.WARNING, "broker_free"):
        run(main())
    slow_ones = [
        named
        for one in caplog.records
        if one.message == "slow transaction" and "slow" in (named := vars(one))["function"]
    ]
    assert len(slow_ones) == 2
    assert all(one["function"].endswith("slow") and one["ms"] >= 60 for one in slow_ones)


def test_a_cancelled_await_does_not_undo_what_was_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path) as a, a.subscribe("work", durable="w") as jobs:
            await a.publish("work", b"")
            job = await anext(jobs)
            with faults.hold("before-commit") as held:
                calls = [
                    asyncio.ensure_future(call)
                    for call in (a.transact(write, "transact"), job.commit(write, "job"))
                ]
                await until(held.reached.is_set)
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                assert all(call.cancelled() for call in calls)
                held.release()
            await a.transact(write, "after")
            assert sorted(await entries(a)) == ["after", "job", "transact"]
            with pytest.raises(LeaseLost):
                await job.ack()  # it was settled by the commit that nobody waited for

    run(main())


def test_what_is_undone_calls_nobody_back(tmp_path: Path) -> None:
    called: list[str] = []

    def note(tx: Tx, text: str) -> None:
        write(tx, text)
        tx.after_commit(lambda: called.append(text))

    def note_and_fail(tx: Tx, text: str) -> None:
        note(tx, text)
        raise ValueError(text)

    async def main() -> None:
        async with a_node(tmp_path) as a:
            with pytest.raises(ValueError, match="raised"):
                await a.transact(note_and_fail, "raised")
            with failing_disk(), pytest.raises(StoreFailed, match="disk I/O error"):
                await a.transact(note, "not committed")
            await a.transact(note, "committed")
            await until(lambda: called)
            assert called == ["committed"] == await entries(a)

    run(main())


def test_a_transaction_inside_another_is_refused_and_the_outer_one_goes_on(tmp_path: Path) -> None:
    refused: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with a_node(tmp_path) as a, a.subscribe("work", durable="w") as jobs:
            await a.publish("work", b"")
            job = await anext(jobs)

            def outer(tx: Tx) -> None:
                write(tx, "outer")
                for inner in (
                    lambda: asyncio.run(a.transact(write, "inner")),  # type: ignore[arg-type]
                    # Would wait for ever: the loop waits for this very thread.
                    lambda: asyncio.run_coroutine_threadsafe(a.transact(write, "inner"), loop).result(),
                    lambda: a.publish("t.x", b"", to=[a.node_id]),
                    lambda: job.commit(write, "inner"),
                ):
                    try:
                        inner()
                    except TransactionMisused as error:
                        refused.append(f"{error.message}: {error.hint}")

            await a.transact(outer)
            assert await entries(a) == ["outer"]
            assert len(refused) == 4
            assert all("inside a transaction" in one for one in refused)
            await job.ack()

    run(main())


def test_a_transaction_that_was_kept_is_worth_nothing_afterwards(tmp_path: Path) -> None:
    kept: list[Tx] = []

    def keep(tx: Tx, *_: object) -> None:
        kept.append(tx)

    def keep_and_fail(tx: Tx) -> None:
        kept.append(tx)
        raise ValueError

    async def main() -> None:
        a = a_node(tmp_path)
        a.effect("t.*", keep)
        async with a:
            await a.transact(keep)
            await a.publish("t.x", b"", to=[a.node_id])
            with pytest.raises(ValueError):  # noqa: PT011
                await a.transact(keep_and_fail)
            assert len(kept) == 3
            for tx in kept:
                for use in (
                    lambda tx=tx: tx.publish("t.late", b"", to=[a.node_id]),
                    lambda tx=tx: tx.registry_put("b", "k", {}),
                    lambda tx=tx: tx.after_commit(print),
                ):
                    with pytest.raises(TransactionMisused, match="is over"):
                        use()

    run(main())


def test_a_message_published_inside_never_leaves_before_the_commit(tmp_path: Path) -> None:
    """A plain publish does: that it is seen here shows that this test could fail."""
    sent: list[str] = []

    async def main() -> None:
        a, b = a_node(tmp_path, "a"), Node("b", home=tmp_path / "b")
        a.effect("go", lambda tx, envelope: tx.publish("t.effect", b"", to=[b.node_id]))
        arrived = collecting(b)
        async with a, b, a.subscribe("work", durable="w") as jobs:
            await pair(a, b)
            await a.publish("work", b"", to=[a.node_id])
            job = await anext(jobs)
            owner = a._owner
            assert owner is not None
            real_send = owner.send

            def send(conn: int, frame: frames.Frame) -> bool:
                if frame.kind == frames.DATA:
                    sent.append("data")
                return real_send(conn, frame)

            owner.send = send  # type: ignore[method-assign]  # the wire, as the tick sees it
            at_commit: list[int] = []

            def note() -> None:
                if threading.current_thread() is owner._thread:
                    at_commit.append(len(sent))

            async def left_before_commit(call: Any, subject: str) -> bool:
                before = len(sent)
                at_commit.clear()
                with faults.watch("before-commit", note):
                    await call
                    await until(lambda: [one for one in arrived if one.subject == subject])
                assert len(sent) > before
                return at_commit[0] > before

            def publish_inside(tx: Tx, subject: str) -> None:
                tx.publish(subject, b"", to=[b.node_id])

            assert await left_before_commit(a.publish("t.plain", b"", to=[b.node_id]), "t.plain")
            assert not await left_before_commit(a.transact(publish_inside, "t.transact"), "t.transact")
            assert not await left_before_commit(job.commit(publish_inside, "t.job"), "t.job")
            assert not await left_before_commit(a.publish("go", b"", to=[a.node_id]), "t.effect")

    run(main())


# -- models and threads -------------------------------------------------------------------------------------


def test_a_model_touched_outside_the_owner_thread_is_an_error_and_opens_nothing(tmp_path: Path) -> None:
    def touch() -> None:
        for use in (
            lambda: Posting.create(text="elsewhere"),
            lambda: list(Posting.select()),
            lambda: Posting._meta.database.connect(),  # noqa: PLW0108  looking it up is what raises
        ):
            with pytest.raises(pw.InterfaceError, match=r"node\.transact, an effect or node\.read"):
                use()

    def in_thread() -> None:
        errors: list[BaseException] = []

        def body() -> None:
            try:
                touch()
            except BaseException as error:  # noqa: BLE001  told below
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        assert errors == []

    async def main() -> None:
        async with a_node(tmp_path) as a:
            await a.transact(write, "here")
            touch()  # on the event loop
            in_thread()
            await asyncio.to_thread(touch)
            await asyncio.get_running_loop().run_in_executor(None, touch)
            assert await entries(a) == ["here"]

            def write_through_a_reader(_: object) -> None:
                Posting.create(text="by a reader")

            with pytest.raises(pw.OperationalError, match="readonly"):
                await a.read(write_through_a_reader)
            assert await entries(a) == ["here"]
        touch()  # after close
        in_thread()
        with pytest.raises(NodeClosed):
            await a.transact(write, "late")
        with sqlite3.connect(tmp_path / "a" / "store.db") as store:
            assert store.execute("SELECT text FROM posting").fetchall() == [("here",)]

    run(main())


def test_two_nodes_of_one_process_keep_their_rows_apart(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path, "a") as a, a_node(tmp_path, "b") as b:
            await asyncio.gather(
                *(node.transact(write, f"{node.name}{n}") for n in range(20) for node in (a, b))
            )
            assert await entries(a) == [f"a{n}" for n in range(20)]
            assert await entries(b) == [f"b{n}" for n in range(20)]
        with pytest.raises(pw.InterfaceError):
            Posting.select().count()

    run(main())


def test_a_function_that_commits_by_itself_fails_and_takes_its_tick_along(tmp_path: Path) -> None:
    """Half a tick on disk cannot be hidden: it is said, and nobody is told that it worked."""

    def commit_early(tx: Tx) -> None:
        write(tx, "half")
        Posting._meta.database.execute_sql("COMMIT")

    async def main() -> None:
        async with a_node(tmp_path) as a:
            with pytest.raises(StoreFailed):
                await a.transact(commit_early)
            await a.transact(write, "next")
            assert "next" in await entries(a)

    run(main())


# -- jobs ---------------------------------------------------------------------------------------------------


async def published(node: Node, jobs: Subscription, body: bytes = b"1") -> Job:
    await node.publish("work", body, to=[node.node_id])
    return await anext(jobs)


def test_a_job_and_what_its_function_writes_are_settled_together(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path) as a, a.subscribe("work", durable="w") as jobs:
            job = await published(a, jobs)
            with pytest.raises(ValueError, match="no"):
                await job.commit(write_and_fail, "no")
            assert await job.commit(write, "yes") == 1
            with pytest.raises(LeaseLost, match=r"settled before|not leased"):
                await job.commit(write, "twice")
            assert await entries(a) == ["yes"]
        async with a_node(tmp_path) as a, a.subscribe("work", durable="w") as jobs:
            assert (await published(a, jobs, b"2")).body == b"2", "the first one is done for good"

    run(main())


def test_two_commits_of_one_job_in_one_tick_are_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path) as a, a.subscribe("work", durable="w") as jobs:
            job = await published(a, jobs)
            results = await asyncio.gather(
                *(job.commit(write, text) for text in ("first", "second")), return_exceptions=True
            )
            assert [type(one) for one in results] == [int, LeaseLost]
            assert await entries(a) == ["first"]

    run(main())


def test_a_commit_that_fails_leaves_the_job_with_its_holder(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path) as a, a.subscribe("work", durable="w") as jobs:
            job = await published(a, jobs)
            with failing_disk(), pytest.raises(StoreFailed):
                await job.commit(write, "lost")
            await job.commit(write, "again")
            assert await entries(a) == ["again"]

    run(main())


def test_a_job_whose_lease_is_over_goes_to_another_and_only_that_one_can_settle_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            a_node(tmp_path) as a,
            a.subscribe("work", durable="w", lease_ms=1) as slow,
            a.subscribe("work", durable="w") as other,
        ):
            late = await published(a, slow)
            again = await anext(other)
            assert (again.envelope, again.attempts) == (late.envelope, 1)
            for settle in (late.commit(write, "late"), late.ack(), late.nak(), late.progress()):
                with pytest.raises(LeaseLost):
                    await settle
            await again.commit(write, "in time")
            with pytest.raises(LeaseLost):
                await late.commit(write, "after it was done")
            assert await entries(a) == ["in time"]

    run(main())


def test_a_lease_that_is_over_writes_nothing_though_nobody_else_wants_the_job(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path) as a, a.subscribe("work", durable="w", lease_ms=1) as jobs:
            job = await published(a, jobs)
            await asyncio.sleep(0.01)  # the one thing waited for is time itself
            with pytest.raises(LeaseLost, match="is over") as raised:
                await job.commit(write, "late")
            assert "progress()" in str(raised.value.hint)
            assert await entries(a) == []
            assert (await anext(jobs)).attempts == 1

    run(main())


def test_progress_keeps_a_job_past_its_lease(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path) as a, a.subscribe("work", durable="w", lease_ms=3_000) as jobs:
            job = await published(a, jobs)
            began = time.monotonic()
            while time.monotonic() - began < 3.5:
                await job.progress()
                await asyncio.sleep(0.05)
            await job.commit(write, "long")
            assert await entries(a) == ["long"]

    run(main())


def test_a_consumer_that_was_closed_settles_nothing_and_its_jobs_are_free_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_node(tmp_path) as a:
            async with a.subscribe("work", durable="w") as closed:
                first = await published(a, closed)
                await a.publish("work", b"2", to=[a.node_id])
            with pytest.raises(LeaseLost):
                await first.commit(write, "late")
            async with a.subscribe("work", durable="w") as jobs:
                got = [await anext(jobs) for _ in range(2)]
                assert [(job.body, job.attempts) for job in got] == [(b"1", 0), (b"2", 0)]
                for job in got:
                    await job.commit(write, job.body.decode())
            assert await entries(a) == ["1", "2"]
        with pytest.raises(NodeClosed):
            await first.commit(write, "later still")

    run(main())


def test_consumers_under_one_name_share_the_jobs_and_under_two_names_each_has_all(tmp_path: Path) -> None:
    async def work(name: str, jobs: Subscription) -> None:
        async for job in jobs:
            await job.commit(write, f"{name}{job.body.decode()}")

    async def main() -> None:
        async with (
            a_node(tmp_path) as a,
            a.subscribe("work", durable="w") as one,
            a.subscribe("work", durable="w") as two,
            a.subscribe("work", durable="v") as three,
        ):
            tasks = [
                asyncio.create_task(work(name, jobs)) for name, jobs in (("w", one), ("w", two), ("v", three))
            ]
            for n in range(40):
                await a.publish("work", str(n).encode(), to=[a.node_id])

            async with asyncio.timeout(20):
                while len(found := await entries(a)) < 80:
                    await asyncio.sleep(0.01)
            assert sorted(found) == sorted(f"{name}{n}" for name in "wv" for n in range(40))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main())


def test_a_consumer_of_a_node_that_fails_is_told_and_does_not_wait_for_ever(tmp_path: Path) -> None:
    class Broken(BaseException):
        """Nothing that a node expects."""

    def break_it() -> None:
        raise Broken("the owner thread ends")

    async def main() -> None:
        async with a_node(tmp_path) as a:
            subscription = a.subscribe("work", durable="w")
            async with subscription as jobs:
                waiting = asyncio.ensure_future(anext(jobs))
                await asyncio.sleep(0)
                with faults.watch("before-begin", break_it), pytest.raises(NodeClosed):
                    await a.transact(write, "never")
                with pytest.raises(NodeClosed):
                    await waiting

    run(main())
