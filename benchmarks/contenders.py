"""The systems under test, as the harness sees them: which processes, which commands, which metrics."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.figures import latency
from benchmarks.lab import Lab, Worker, WorkerFailed
from benchmarks.suite import Absent, Metrics
from zmail.paths import Home

BODY_BYTES = 1024
GAP_MS = 3.0  # between paced messages: long enough that both ends have gone to sleep
BACK_TO_BACK = 400  # samples a round
PACED = 200
WARM_UP = 100  # enough commits for the write-ahead log to be reset and overwritten from then on

PUMPED = 20_000  # messages a throughput round
PUMP_WARM_UP = 4_000
WINDOW = 256  # un-acknowledged messages

PUSHED = 25  # notices a round: with the untimed ones fewer than the 30 that a session takes in a row
PUSH_GAP_MS = 20.0  # the node writes down that it announced a brief before it announces the next

BLOB_BYTES = 50 << 20
QUIET_LETTERS = 200

START_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    name: str
    count: int
    gap_ms: float


PACES = (
    Pace(name="b2b", count=BACK_TO_BACK, gap_ms=0),
    Pace(name="paced", count=PACED, gap_ms=GAP_MS),
)


class Floor:
    """A bare round trip between two processes, without and with one sync at the far end."""

    def __init__(self, name: str, *, over: str) -> None:
        self.name = name
        self._over = over

    def start(self, lab: Lab) -> None:
        responder = lab.worker("floor", f"respond-{self._over}", str(lab.new_folder()))
        endpoint = responder.answer(timeout_s=START_S)["endpoint"]
        self._probe = lab.worker("floor", f"probe-{self._over}", endpoint)
        self._probe.answer(timeout_s=START_S)
        self._round_trips(count=WARM_UP, gap_ms=0, sync=True)

    def measure(self) -> Metrics:
        metrics: Metrics = {}
        for pace in PACES:
            for kind, sync in (("wire", False), ("synced", True)):
                samples = self._round_trips(count=pace.count, gap_ms=pace.gap_ms, sync=sync)
                metrics |= latency(f"{self._over}.{kind}.{pace.name}", samples)
        return metrics

    def _round_trips(self, *, count: int, gap_ms: float, sync: bool) -> list[int]:
        answer = self._probe.ask("measure", count=count, gap_ms=gap_ms, sync=sync, body_bytes=BODY_BYTES)
        samples: list[int] = answer["samples_ns"]
        return samples


class RedisServer:
    """A redis-server with `appendfsync always` on a free port, and one producing and one consuming client."""

    name = "Redis Streams, appendfsync always"

    def start(self, lab: Lab) -> None:
        if shutil.which("redis-server") is None:
            raise Absent("redis-server is not installed (Debian: apt-get install -y redis-server)")
        if importlib.util.find_spec("redis") is None:
            raise Absent("the Python package redis is not installed (it is in the extra `dev`)")
        self._server, port = _redis_server(lab)
        self.producer = lab.worker("redis_client", "producer", str(port))
        self.consumer = lab.worker("redis_client", "consumer", str(port))
        self.producer.answer(timeout_s=START_S)
        self.consumer.answer(timeout_s=START_S)

    @property
    def workers(self) -> list[Worker]:
        return [self._server, self.producer, self.consumer]


class RedisLatency(RedisServer):
    def start(self, lab: Lab) -> None:
        super().start(lab)
        self._add(count=WARM_UP, gap_ms=0)

    def measure(self) -> Metrics:
        metrics: Metrics = {}
        for pace in PACES:
            metrics |= latency(f"redis.ack.{pace.name}", self._add(count=pace.count, gap_ms=pace.gap_ms))
        self.producer.ask("fresh", stream="settle")
        self.consumer.begin("settle", stream="settle", count=PACED)
        self.producer.ask("add", stream="settle", count=PACED, gap_ms=GAP_MS, body_bytes=BODY_BYTES)
        seen = self.consumer.answer()
        metrics |= latency("redis.consumer.paced", seen["received_ns"])
        metrics |= latency("redis.settled.paced", seen["settled_ns"])
        return metrics

    def _add(self, *, count: int, gap_ms: float) -> list[int]:
        self.producer.ask("fresh", stream="add")
        answer = self.producer.ask("add", stream="add", count=count, gap_ms=gap_ms, body_bytes=BODY_BYTES)
        samples: list[int] = answer["samples_ns"]
        return samples


class RedisThroughput(RedisServer):
    def start(self, lab: Lab) -> None:
        super().start(lab)
        self._pump(PUMP_WARM_UP)

    def measure(self) -> Metrics:
        with _processor_time(self.workers) as used:
            seconds = self._pump(PUMPED)
        return {"redis.rate": PUMPED / seconds, "redis.cpu_us": used() / PUMPED * 1e6}

    def _pump(self, count: int) -> float:
        """Seconds from the first XADD to the answer to the last XACK."""
        self.producer.ask("fresh", stream="pump")
        self.consumer.begin("drain", stream="pump", count=count)
        begun = self.producer.ask("pump", stream="pump", count=count, window=WINDOW, body_bytes=BODY_BYTES)
        ended = self.consumer.answer()
        seconds: float = (ended["ended_ns"] - begun["begun_ns"]) / 1e9
        return seconds


class Nodes:
    """Two broker_free nodes in two processes, paired by invitation, CURVE between them, both ends synced."""

    name = "two nodes"

    def start(self, lab: Lab) -> None:
        self.sender = lab.worker("nodes", "sender", str(lab.new_folder()))
        self.receiver = lab.worker("nodes", "receiver", str(lab.new_folder()))
        self.sender.answer(timeout_s=START_S)
        self._to = self.receiver.answer(timeout_s=START_S)["node_id"]
        code = self.receiver.ask("invite")["code"]
        self.sender.ask("join", code=code)

    @property
    def workers(self) -> list[Worker]:
        return [self.sender, self.receiver]


class NodesLatency(Nodes):
    def start(self, lab: Lab) -> None:
        super().start(lab)
        self._send(count=WARM_UP, gap_ms=0)

    def measure(self) -> Metrics:
        metrics: Metrics = {}
        for pace in PACES:
            samples = self._send(count=pace.count, gap_ms=pace.gap_ms)
            for what, figures in samples.items():
                metrics |= latency(f"node.{what}.{pace.name}", figures)
        return metrics

    def _send(self, *, count: int, gap_ms: float) -> dict[str, list[int]]:
        """Samples by what they end with: our own commit, the peer's ack, the effect seen at the peer."""
        self.receiver.begin("watch", count=count)
        sent = self.sender.ask("send", to=self._to, count=count, gap_ms=gap_ms, body_bytes=BODY_BYTES)
        seen = self.receiver.answer()
        return {"stored": sent["stored_ns"], "ack": sent["acked_ns"], "consumer": seen["samples_ns"]}


class NodesThroughput(Nodes):
    def start(self, lab: Lab) -> None:
        super().start(lab)
        self._pump(PUMP_WARM_UP)

    def measure(self) -> Metrics:
        with _processor_time(self.workers) as used:
            seconds = self._pump(PUMPED)
        return {"node.rate": PUMPED / seconds, "node.cpu_us": used() / PUMPED * 1e6}

    def _pump(self, count: int) -> float:
        """Seconds from the first publish to the last ack."""
        answer = self.sender.ask("pump", to=self._to, count=count, window=WINDOW, body_bytes=BODY_BYTES)
        seconds: float = answer["took_ns"] / 1e9
        return seconds


class NodesBlob(Nodes):
    def start(self, lab: Lab) -> None:
        super().start(lab)
        self._letters(gap_ms=0)
        self._transfer()

    def measure(self) -> Metrics:
        metrics: Metrics = {"alone.rate": self._transfer()}
        for name, gap_ms in (("b2b", 0.0), ("paced", GAP_MS)):
            metrics |= latency(f"quiet.{name}", self._letters(gap_ms=gap_ms))
            beside, metrics[f"beside.{name}.rate"] = self._letters_beside_a_transfer(gap_ms=gap_ms)
            metrics |= latency(f"beside.{name}", beside)
        return metrics

    def _letters(self, *, gap_ms: float) -> list[int]:
        self.receiver.begin("watch", count=QUIET_LETTERS)
        sent = self.sender.ask("send", to=self._to, count=QUIET_LETTERS, gap_ms=gap_ms, body_bytes=BODY_BYTES)
        self.receiver.answer()
        samples: list[int] = sent["acked_ns"]
        return samples

    def _transfer(self) -> float:
        """Megabytes a second of a blob that is fetched alone."""
        blob = self.sender.ask("put", to=self._to, size=BLOB_BYTES)["blob"]
        took_ns: int = self.receiver.ask("fetch", blob=blob)["took_ns"]
        return BLOB_BYTES / took_ns * 1e3

    def _letters_beside_a_transfer(self, *, gap_ms: float) -> tuple[list[int], float]:
        blob = self.sender.ask("put", to=self._to, size=BLOB_BYTES)["blob"]
        self.sender.begin("send_while_fetched", to=self._to, gap_ms=gap_ms, body_bytes=BODY_BYTES)
        took_ns: int = self.receiver.ask("fetch", blob=blob)["took_ns"]
        samples: list[int] = self.sender.answer()["acked_ns"]
        return samples, BLOB_BYTES / took_ns * 1e3


class Push:
    """A zmail node, a client at its local door, and a session behind a `zmail mcp` relay."""

    name = "local push"

    def start(self, lab: Lab) -> None:
        home = lab.new_folder()
        env = {
            "ZMAIL_HOME": str(home),
            "ZMAIL_LISTEN": "tcp://127.0.0.1:0",
            "ZMAIL_NODE_NAME": "bench",
            "ZMAIL_AUTOSTART": "0",  # a node of its own would outlive this run
        }
        node = lab.worker("guard", sys.executable, "-m", "zmail", "node", "run", env=env)
        node.answer(timeout_s=START_S)
        _wait_for_door(node, Home.resolve(env).door_path)
        self._sender = lab.worker("push", str(home), env=env)
        self._sender.answer(timeout_s=START_S)

    def measure(self) -> Metrics:
        answer = self._sender.ask("measure", count=PUSHED, gap_ms=PUSH_GAP_MS, body_bytes=BODY_BYTES)
        return latency("push.sent.paced", answer["sent_ns"]) | latency(
            "push.noticed.paced", answer["noticed_ns"]
        )


@contextlib.contextmanager
def _processor_time(workers: list[Worker]) -> Iterator[Callable[[], float]]:
    """Yield a function that says, afterwards, how many seconds of processor time the workers have used."""
    before = sum(worker.cpu_s() for worker in workers)
    yield lambda: sum(worker.cpu_s() for worker in workers) - before


def _redis_server(lab: Lab) -> tuple[Worker, int]:
    """A running server and its port. Tried again, as the port may be taken between our look and its bind."""
    for _ in range(3):
        port = _free_port()
        guard = lab.worker(
            "guard",
            *("redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(lab.new_folder())),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", ""),
            *(
                "--auto-aof-rewrite-percentage",
                "0",
            ),  # a rewrite in the middle of a round would be measured too
        )
        guard.answer(timeout_s=START_S)
        if _is_listening(guard, port):
            return guard, port
    raise WorkerFailed("redis-server did not start on three free ports")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_listening(guard: Worker, port: int) -> bool:
    def connect() -> None:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()

    return _accepts(guard, connect)


def _wait_for_door(node: Worker, path: str) -> None:
    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as door:
            door.connect(path)

    if not _accepts(node, connect):
        raise WorkerFailed(f"the zmail node did not open its door\n{node.last_words()}")


def _accepts(server: Worker, connect: Callable[[], None]) -> bool:
    """Whether a server that was just started takes connections before it ends or the time is over."""
    deadline = time.monotonic() + START_S
    while server.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            connect()
            return True
        time.sleep(0.02)
    return False
