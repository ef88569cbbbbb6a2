"""The two client processes of the Redis Streams comparison: one adds, the other reads and acknowledges."""

from __future__ import annotations

import sys
import time
from typing import Any

import redis

from benchmarks.workers import Answer, paced, serve

GROUP = "bench"
READER = "reader"
READ_MAX = 256  # entries a read, the same as the producer's pipeline


class Producer:
    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def fresh(self, *, stream: str) -> Answer:
        """An empty stream with a consumer group that starts at its beginning."""
        self._client.unlink(stream)
        self._client.xgroup_create(stream, GROUP, id="0", mkstream=True)
        return {}

    def add(self, *, stream: str, count: int, gap_ms: float, body_bytes: int) -> Answer:
        """One message at a time. Each body begins with its moment of sending, for the consumer's samples."""
        filler = b"x" * (body_bytes - 8)
        samples = []
        for _ in paced(count, gap_ms):
            begun = time.monotonic_ns()
            self._client.xadd(stream, {b"b": begun.to_bytes(8, "big") + filler})
            samples.append(time.monotonic_ns() - begun)
        return {"samples_ns": samples}

    def pump(self, *, stream: str, count: int, window: int, body_bytes: int) -> Answer:
        """As fast as it goes, in pipelines of `window`."""
        body = b"x" * body_bytes
        begun = time.monotonic_ns()
        for first in range(0, count, window):
            pipeline = self._client.pipeline(transaction=False)
            for _ in range(min(window, count - first)):
                pipeline.xadd(stream, {b"b": body})
            pipeline.execute()
        return {"begun_ns": begun}


class Consumer:
    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def settle(self, *, stream: str, count: int) -> Answer:
        """Read and acknowledge `count` messages. Samples run from the moment of sending in the body."""
        received: list[int] = []
        settled: list[int] = []
        while len(settled) < count:
            entries = self._read(stream)
            arrived = time.monotonic_ns()
            if entries:
                self._client.xack(stream, GROUP, *(entry_id for entry_id, _ in entries))
            acknowledged = time.monotonic_ns()
            for _, fields in entries:
                sent = int.from_bytes(fields[b"b"][:8], "big")
                received.append(arrived - sent)
                settled.append(acknowledged - sent)
        return {"received_ns": received, "settled_ns": settled}

    def drain(self, *, stream: str, count: int) -> Answer:
        """Read and acknowledge `count` messages, a batch at a time, and say when the last one was settled."""
        left = count
        while left:
            entries = self._read(stream)
            if entries:
                self._client.xack(stream, GROUP, *(entry_id for entry_id, _ in entries))
                left -= len(entries)
        return {"ended_ns": time.monotonic_ns()}

    def _read(self, stream: str) -> list[Any]:  # [(entry id, fields)], as redis-py answers
        # READ_MAX bounds a batch; the time-out only bounds the wait of a consumer whose producer has died.
        answer: Any = self._client.xreadgroup(GROUP, READER, {stream: ">"}, count=READ_MAX, block=1000)
        return list(answer[0][1]) if answer else []


def main() -> None:
    role, port = sys.argv[1:]
    client = redis.Redis(host="127.0.0.1", port=int(port), protocol=2)  # 3 answers reads in another shape
    client.ping()
    if role == "producer":
        producer = Producer(client)
        serve({"fresh": producer.fresh, "add": producer.add, "pump": producer.pump}, ready={})
    else:
        consumer = Consumer(client)
        serve({"settle": consumer.settle, "drain": consumer.drain}, ready={})


if __name__ == "__main__":
    main()
