"""One end of CURVE links: a listener that lets everybody in, or a dialler that opens and closes them."""

from __future__ import annotations

import sys
import threading
import time

import psutil

from benchmarks.workers import Answer, serve
from broker_free.limits import Limits
from broker_free.transport import Closed, Connected, Transport, new_keypair

PATIENCE_S = 100.0


def listen() -> None:
    ready = threading.Event()
    bound: list[str] = []
    keys = new_keypair()

    def run() -> None:
        transport = Transport(keys=keys, admit=lambda _: "dialler", limits=Limits())
        endpoint, _ = transport.bind("tcp://127.0.0.1:0")
        bound.append(endpoint)
        ready.set()
        while True:
            transport.poll(1_000)

    threading.Thread(target=run, daemon=True).start()
    ready.wait()
    serve({"memory": memory}, ready={"endpoint": bound[0], "key": keys.public.decode()})


def dial(endpoint: str, key: str) -> None:
    transport = Transport(keys=new_keypair(), admit=lambda _: None, limits=Limits())

    def cycle(*, count: int, window: int) -> Answer:
        """Open `count` links, `window` at a time, and close each as soon as its handshake is over."""
        begun = time.monotonic_ns()
        give_up = time.monotonic() + PATIENCE_S
        dialled = done = failed = 0
        while done + failed < count:
            if time.monotonic() > give_up:
                raise TimeoutError(f"{done} of {count} handshakes in {PATIENCE_S} s")
            while dialled < count and dialled - done - failed < window:
                transport.dial(endpoint, server_key=key.encode())
                dialled += 1
            for event in transport.poll(1_000):
                if isinstance(event, Connected):
                    transport.close(event.conn)
                    done += 1
                elif isinstance(event, Closed):
                    failed += 1
        return {"took_ns": time.monotonic_ns() - begun, "failed": failed}

    serve({"cycle": cycle, "memory": memory}, ready={})


def memory() -> Answer:
    process = psutil.Process()
    return {"rss_bytes": process.memory_info().rss, "descriptors": process.num_fds()}


if __name__ == "__main__":
    if sys.argv[1] == "listen":
        listen()
    else:
        dial(*sys.argv[2:])
