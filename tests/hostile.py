"""Attackers: strangers that speak raw ZMTP, and members that send whatever they like. For tests and soak runs.

A ZMTP 3.1 greeting is 64 bytes: FF 8×00 7F, version 3 1, the mechanism in 20 bytes, as-server, 31×00. Then come frames:
flags, a length of 1 or 8 bytes, the content.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import zmq

from broker_free import frames
from broker_free.security import KeyPair
from broker_free.transport import new_keypair

LONG: Final = 0x02
COMMAND: Final = 0x04


def greeting(mechanism: bytes, *, minor: int = 1, as_server: bool = False) -> bytes:
    head = b"\xff" + bytes(8) + b"\x7f" + bytes((3, minor))
    return head + mechanism.ljust(20, b"\0") + bytes((as_server,)) + bytes(31)


def command(name: bytes, body: bytes) -> bytes:
    content = bytes((len(name),)) + name + body
    return bytes((COMMAND | LONG,)) + struct.pack(">Q", len(content)) + content


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=2)


def say(port: int, data: bytes) -> None:
    """Connect, say it, and read until the other side has had enough."""
    with contextlib.suppress(OSError), connected(port) as one:
        one.sendall(data)
        one.settimeout(0.2)
        while one.recv(4096):
            pass


def flood_of_connects(port: int, rng: random.Random) -> None:
    for _ in range(20):
        with contextlib.suppress(OSError):
            connected(port).close()


def slowloris(port: int, rng: random.Random) -> None:
    """Hold connections open inside the greeting."""
    held = []
    with contextlib.suppress(OSError):
        for _ in range(20):
            one = connected(port)
            one.sendall(greeting(b"CURVE")[: rng.randrange(64)])
            held.append(one)
    for one in held:
        one.close()


def wrong_mechanism(port: int, rng: random.Random) -> None:
    ready = command(b"READY", b"\x0bSocket-Type\0\0\0\x06DEALER")
    say(port, greeting(rng.choice((b"NULL", b"PLAIN", b"GSSAPI", b"X" * 20))) + ready)


def wrong_curve(port: int, rng: random.Random) -> None:
    """A CURVE HELLO of the right size with nonsense in it, and sizes that are none."""
    body = b"\x01\x00" + bytes(72) + rng.randbytes(32 + 8 + 80)
    say(port, greeting(b"CURVE") + command(b"HELLO", body[: rng.choice((len(body), 10, 199))]))


def oversize(port: int, rng: random.Random) -> None:
    size = struct.pack(">Q", rng.choice((1 << 62, (1 << 63) - 1, (1 << 64) - 1, 1 << 31)))
    say(port, greeting(rng.choice((b"NULL", b"CURVE"))) + bytes((LONG,)) + size + bytes(4096))


def endless(port: int, rng: random.Random) -> None:
    """Frames that say that more follows, before anybody has proven anything."""
    part = b"\x01\xff" + bytes(255)
    say(port, greeting(b"NULL") + command(b"READY", b"") + part * 2_000)


def garbage(port: int, rng: random.Random) -> None:
    say(port, rng.randbytes(rng.randrange(1, 3_000)))


def wrong_key(port: int, rng: random.Random) -> None:
    """A real client whose key nobody knows, or that knows another key of the server."""
    with zmq.Context() as context:
        one = client(context, port, server_key=new_keypair().public, keys=new_keypair())
        with contextlib.suppress(zmq.Again):  # it is never connected
            one.send_multipart([b"BF", b"", b"", b""], zmq.NOBLOCK)
        one.poll(50)
        one.close()


STRANGERS: Final[dict[str, Callable[[int, random.Random], None]]] = {
    one.__name__: one
    for one in (
        flood_of_connects,
        slowloris,
        wrong_mechanism,
        wrong_curve,
        oversize,
        endless,
        garbage,
        wrong_key,
    )
}


@contextmanager
def strangers_at(port: int, *, seed: int) -> Iterator[Counter[str]]:
    """Attack a port in every way at once, from another process; the counts are there at the end.

    That process gives way to others: on a real attack the attacker's own work is done by another machine.
    """
    attacker = subprocess.Popen(
        [sys.executable, "-m", "tests.hostile", str(port), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[1],
    )
    done: Counter[str] = Counter()
    try:
        yield done
    finally:
        said, _ = attacker.communicate(b"\n", timeout=60)
        done.update(json.loads(said))


def attack(port: int, *, seed: int) -> Counter[str]:
    """Attack until standard input says that it is enough, and each way was taken once."""
    done: Counter[str] = Counter()
    is_over = threading.Event()

    def go_on(name: str, rng: random.Random) -> None:
        while not (is_over.is_set() and done[name]):
            with contextlib.suppress(OSError):
                STRANGERS[name](port, rng)
            done[name] += 1

    threads = [
        threading.Thread(target=go_on, args=(name, random.Random(f"{seed}/{name}")), daemon=True)
        for name in STRANGERS
    ]
    for thread in threads:
        thread.start()
    sys.stdin.readline()
    is_over.set()
    for thread in threads:
        thread.join(20)
    return done


def client(
    context: zmq.Context[zmq.Socket[bytes]], port: int, *, server_key: bytes, keys: KeyPair
) -> zmq.Socket[bytes]:
    made = context.socket(zmq.DEALER)
    made.set(zmq.LINGER, 0)
    made.set(zmq.SNDTIMEO, 2_000)
    made.set(zmq.IMMEDIATE, 1)
    made.set(zmq.CURVE_SERVERKEY, server_key)
    made.set(zmq.CURVE_PUBLICKEY, keys.public)
    made.set(zmq.CURVE_SECRETKEY, keys.secret)
    made.connect(f"tcp://127.0.0.1:{port}")
    return made


_VALUES: Final = (
    b"null",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 5_000,
    str(2**63).encode(),
    str(2**63 - 1).encode(),
    rb'"\ud800"',
    b'"' + b"x" * 9_000 + b'"',
    b"[" * 3_000 + b"]" * 3_000,
    b'{"a":' * 500 + b"1" + b"}" * 500,
    b"true",
    b"[]",
    b"{}",
    b'[["x",1]]',
    b'["x",-5]',
    b'"\\u0000\\n\\u001b[2J"',
)
_KEYS: Final = (
    *(
        "node_id",
        "boot",
        "about",
        "last_acked",
        "in_doubt",
        "nonce",
        "have",
        "regressed",
        "row",
        "at",
        "reason",
    ),
    *("code", "kind", "detail", "id", "ids", "key", "first_key", "features", "versions", "limits", "name"),
    *("endpoints", "beat", "public_key", "round", "root", "leaf", "leaves", "part", "size", "digest", "data"),
)


def random_frame(rng: random.Random, *, node_id: str, session: int) -> list[bytes]:
    """Make a frame as no honest node would: right and wrong heads, fields, metadata and bodies in every mixture."""
    kind = rng.randrange(32)
    head = b"BF" + bytes((rng.choice((1, 2, 2, 2, 3)), kind))
    fields = struct.pack(
        ">QQBBHI",
        rng.choice((session, rng.getrandbits(64))),
        rng.choice((0, 1, 2, 2**63, 2**64 - 1)),
        rng.choice((0, 1, 255)),
        rng.randrange(256),
        rng.getrandbits(16),
        rng.getrandbits(32),
    )
    pairs = [b'"%s":%s' % (rng.choice(_KEYS).encode(), rng.choice(_VALUES)) for _ in range(rng.randrange(6))]
    if rng.random() < 0.5:
        pairs.append(b'"node_id":"%s"' % node_id.encode())
        pairs += [b'"boot":%d' % rng.choice((1, 2**62)), b'"in_doubt":[]']
    meta = rng.choice((b"{" + b",".join(pairs) + b"}", b"", rng.randbytes(30), rng.choice(_VALUES)))
    record = struct.pack(">II", len(meta), 3) + meta + b"abc"
    body = rng.choice(
        (b"", rng.randbytes(60), rng.choice(_VALUES), record * rng.randrange(4), b"[" + meta + b"]")
    )
    whole = [head, fields, meta, body]
    if rng.random() < 0.1:
        rng.shuffle(whole)
    return whole[: rng.choice((4, 4, 4, 4, 4, 4, 1, 3))] + [b"more"] * (rng.random() < 0.05)


def hello(node_id: str, session: int) -> list[bytes]:
    meta = {"node_id": node_id, "boot": 1, "about": {}, "last_acked": None, "in_doubt": []}
    return frames.encode(frames.Frame(kind=frames.HELLO, session=session, credit_messages=9, meta=meta))


def random_seed() -> int:
    return int.from_bytes(os.urandom(4), "big")


if __name__ == "__main__":
    os.nice(19)
    print(json.dumps(attack(int(sys.argv[1]), seed=int(sys.argv[2]))), flush=True)
