"""Nodes that are killed: a nursery that forks them, and what each of them does until then.

The nursery has imported everything once, so that a node costs a fork (5 ms) instead of a start of Python (300 ms).
It reads one JSON object a line: {"spawn": {…}} answers {"pid": …}, {"wait": pid} answers {"status": …}, null as long
as the process runs and minus the signal for one that was killed.

A node writes what it says into `said` in its own folder, one line a write, so that nothing is lost with it: the intent
before each publish, its return, and the acks that it saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peewee as pw

from broker_free import Limits, Node, Tx
from broker_free.errors import BrokerFreeError, InvalidInput
from broker_free.faults import arm_from
from broker_free.message import Envelope
from broker_free.owner import Owner

# Everything that waits for a peer waits a short time: these nodes die all day.
QUICK = Limits(redial_ms_min=5, redial_ms_max=40, heartbeat_ms=250)


class Filed(pw.Model):
    """Mail that arrived, by the effect of its arrival."""

    number = pw.IntegerField()


class Sent(pw.Model):
    """Mail that was published from inside a transaction, beside this row."""

    number = pw.IntegerField()


class Echoed(pw.Model):
    """Answers of the other side's effect to mail of this side."""

    number = pw.IntegerField()


class Done(pw.Model):
    """Tasks whose job was committed."""

    number = pw.IntegerField()


def body_of(number: int) -> bytes:
    return b"%d %s" % (number, b"x" * (number * 37 % 300))


def number_in(body: bytes) -> int:
    number = int(body.split()[0])
    assert body == body_of(number), "a body was changed on its way"
    return number


def file_it(tx: Tx, envelope: Envelope) -> None:
    number = number_in(envelope.body)
    Filed.create(number=number)
    tx.publish("echo", body_of(number), to=[envelope.sender])


def note_echo(tx: Tx, envelope: Envelope) -> None:
    Echoed.create(number=number_in(envelope.body))


def finish(tx: Tx, number: int) -> None:
    Done.create(number=number)


def send_inside(tx: Tx, number: int, peer: str) -> None:
    Sent.create(number=number)
    tx.registry_put("numbers", f"{tx.node_id}.last", {"number": number})
    tx.publish("mail", body_of(number), to=[peer])
    tx.publish("task", body_of(number), to=[peer])


class Mate:
    """One node in its process."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._said = os.open(Path(options["said"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.node = Node(
            options["name"],
            home=Path(options["home"]),
            listen=options["listen"],
            limits=replace(QUICK, **options.get("limits", {})),
            models=[Filed, Sent, Echoed, Done],
        )
        self.node.effect("mail", file_it)
        self.node.effect("echo", note_echo)
        self.node.on_delivered(lambda pairs: self.say(acked=[message_id for message_id, _ in pairs]))

    def say(self, **fields: object) -> None:
        os.write(self._said, json.dumps(fields).encode() + b"\n")

    async def live(self) -> None:
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        async with self.node, self.node.subscribe("task", durable="tasks") as jobs:
            self.say(up=self.node.node_id, name=self.node.name)
            if self.options.get("invite"):
                self.say(code=(await self.node.invite()).encode())
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._consume(jobs))]
                if code := self.options.get("code"):
                    running.append(tasks.create_task(self._join(code)))
                if self.options.get("rotate"):
                    running.append(tasks.create_task(self._rotate()))
                if target := self.options.get("backup"):
                    running.append(tasks.create_task(self._back_up(target)))
                if plan := self.options.get("publish"):
                    running.append(tasks.create_task(self._publish(*plan)))
                await stopped.wait()
                for task in running:
                    task.cancel()
        self.say(down=True)

    async def _join(self, code: str) -> None:
        try:
            self.say(joined=(await self.node.join(code)).node_id)
        except BrokerFreeError as error:
            self.say(refused=error.message)

    async def _rotate(self) -> None:
        """Change the key as soon as that is allowed: the last change must have reached the peer."""
        while True:
            with contextlib.suppress(InvalidInput):
                await self.node.rotate_key()
                self.say(rotated=True)
                return
            await asyncio.sleep(0.02)

    async def _back_up(self, target: str) -> None:
        self.say(backed_up=await self.node.backup(target))

    async def _publish(self, peer: str, first: int, end: int) -> None:
        while not any(view.link == "open" for view in self.node.peers()):
            await asyncio.sleep(0.002)
        for number in range(first, end):
            self.say(intent=number)
            if number % 3:
                await self.node.publish("mail", body_of(number), to=[peer])
            else:
                await self.node.transact(send_inside, number, peer)
            self.say(returned=number)
        self.say(published=end)

    async def _consume(self, jobs: Any) -> None:
        async for job in jobs:
            await job.commit(finish, number_in(job.body))


def live(options: dict[str, Any]) -> None:
    """Be a node, in a process that was just forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(options["said"] + ".errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    if options.get("never_dials"):
        Owner.dial = lambda self, peer: None  # type: ignore[method-assign]  # as if no address were known
    arm_from({"BROKER_FREE_FAULT": options.get("fault", "")})
    asyncio.run(Mate(options).live())


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if "spawn" in asked:
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    live(asked["spawn"])
                    status = 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # an exception is being handled
                    raise
                finally:
                    os._exit(status)
            answer: dict[str, object] = {"pid": pid}
        else:
            found, status = os.waitpid(asked["wait"], os.WNOHANG)
            answer = {"status": os.waitstatus_to_exitcode(status) if found else None}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
