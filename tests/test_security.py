"""Key files that are never lost, shown or overwritten; node ids; invitations that say when they are mistyped."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import string
import threading
from pathlib import Path

import pytest
import zmq.utils.z85
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_free.errors import InvalidInput, UnsuitableHome
from broker_free.security import (
    Invitation,
    KeyPair,
    key_bytes_of,
    load_or_create_keys,
    node_id_of,
    z85_of,
)
from broker_free.transport import new_keypair, public_of
from tests.conftest import need_root

KEYS = KeyPair(public=z85_of(bytes(range(32))), secret=z85_of(bytes(range(100, 132))))
INVITATION = Invitation(
    endpoints=("tcp://192.0.2.7:7400", "tcp://[2001:db8::1]:7400"),
    server_key=KEYS.public,
    secret=KEYS.secret,
    expires_ms=1_900_000_000_000,
)


def unwanted() -> KeyPair:
    raise AssertionError("no new keys may be made here")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A key file as a node makes it."""
    path = tmp_path / "home" / "keys.json"
    load_or_create_keys(path, lambda: KEYS)
    return path


# ── Keys and ids ────────────────────────────────────────────────────────────────────────────────────────────


@given(st.binary(min_size=32, max_size=32))
def test_key_text_is_z85_as_zeromq_writes_it(raw: bytes) -> None:
    assert z85_of(raw) == zmq.utils.z85.encode(raw)
    assert key_bytes_of(z85_of(raw)) == raw


@pytest.mark.parametrize(
    "text", [b"", b"0" * 39, b"0" * 41, b"0" * 39 + b'"', b"0" * 39 + b"\xff", b"#" * 40]
)
def test_text_that_is_no_key_is_invalid_and_is_not_quoted(text: bytes) -> None:
    with pytest.raises(InvalidInput) as refusal:
        key_bytes_of(text)
    assert not text or text.decode("latin-1") not in str(refusal.value)


def test_a_node_id_is_a_hash_of_the_public_key() -> None:
    digest = hashlib.blake2b(bytes(range(32))).digest()
    assert node_id_of(KEYS.public) == base64.b32encode(digest[:20]).decode().lower()
    assert len(node_id_of(KEYS.public)) == 32
    assert set(node_id_of(KEYS.public)) <= set(string.ascii_lowercase + "234567")


def test_a_new_key_pair_belongs_together() -> None:
    keys = new_keypair()
    assert public_of(keys.secret) == keys.public
    assert new_keypair() != keys


def test_secrets_do_not_show_in_a_repr() -> None:
    for holder in (KEYS, INVITATION):
        assert KEYS.secret.decode() not in repr(holder)


# ── The key file ────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_are_made_once_and_then_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "keys.json"
    assert load_or_create_keys(path, lambda: KEYS).current == KEYS
    assert load_or_create_keys(path, unwanted).current == KEYS


def test_the_key_file_and_its_folder_are_the_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_or_create_keys(tmp_path / "home" / "keys.json", lambda: KEYS)
    finally:
        os.umask(before)
    assert (tmp_path / "home" / "keys.json").stat().st_mode & 0o7777 == 0o600
    assert (tmp_path / "home").stat().st_mode & 0o7777 == 0o700


def test_making_keys_leaves_no_other_file(kept: Path) -> None:
    assert [path.name for path in kept.parent.iterdir()] == ["keys.json"]


def test_nodes_that_start_at_once_end_up_with_the_same_keys(tmp_path: Path) -> None:
    path = tmp_path / "home" / "keys.json"
    barrier = threading.Barrier(8)
    got: list[KeyPair] = []

    def start() -> None:
        barrier.wait()
        got.append(load_or_create_keys(path, new_keypair))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert set(got) == {load_or_create_keys(path, unwanted)}
    assert [found.name for found in path.parent.iterdir()] == ["keys.json"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o610])
def test_a_key_file_that_others_may_open_is_refused_with_the_command_that_helps(
    kept: Path, mode: int
) -> None:
    kept.chmod(mode)
    with pytest.raises(UnsuitableHome, match=f"{mode:04o}") as refusal:
        load_or_create_keys(kept, unwanted)
    assert refusal.value.hint == f"chmod 600 {kept}"
    kept.chmod(0o600)
    assert load_or_create_keys(kept, unwanted).current == KEYS


def test_a_folder_that_others_may_enter_is_refused_before_a_key_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(UnsuitableHome, match="0755") as refusal:
        load_or_create_keys(folder / "keys.json", unwanted)
    assert refusal.value.hint == f"chmod 700 {folder}"
    assert list(folder.iterdir()) == []


def test_a_key_file_of_another_user_is_refused(kept: Path) -> None:
    need_root()
    os.chown(kept, 12_345, -1)
    with pytest.raises(UnsuitableHome, match="12345"):
        load_or_create_keys(kept, unwanted)


def damaged_files() -> list[bytes]:
    good = {"version": 1, "public": KEYS.public.decode(), "secret": KEYS.secret.decode(), "check": "?"}
    return [
        b"",
        b"\0" * 200,
        b"not json",
        b"[]",
        b"{}",
        b"[" * 4000,
        json.dumps(good).encode(),  # the checksum is wrong
        json.dumps({**good, "version": 2}).encode(),
        json.dumps({**good, "secret": 7}).encode(),
        json.dumps({**good, "secret": "short"}).encode(),
        json.dumps({**good, "public": "é" * 40}).encode(),
    ]


@pytest.mark.parametrize("text", damaged_files())
def test_a_damaged_key_file_is_refused_kept_and_explained(kept: Path, text: bytes) -> None:
    kept.write_bytes(text)
    with pytest.raises(UnsuitableHome, match="cannot be used") as refusal:
        load_or_create_keys(kept, unwanted)
    assert "restore" in (refusal.value.hint or "")
    assert "move it away" in (refusal.value.hint or "")
    assert KEYS.secret.decode() not in str(refusal.value)
    assert kept.read_bytes() == text


def test_every_flipped_bit_of_a_key_file_is_noticed(kept: Path) -> None:
    good = kept.read_bytes()
    for at in range(len(good) * 8):
        bad = bytearray(good)
        bad[at // 8] ^= 1 << at % 8
        kept.write_bytes(bad)
        try:
            keys = load_or_create_keys(kept, unwanted)
        except UnsuitableHome:
            continue
        assert keys == KEYS  # the bit was in the white space


@pytest.mark.parametrize("target", ["elsewhere.json", "missing.json"])
def test_a_link_in_place_of_the_key_file_is_refused(kept: Path, target: str) -> None:
    kept.rename(kept.with_name("elsewhere.json"))
    kept.symlink_to(kept.with_name(target))
    with pytest.raises(UnsuitableHome, match="symbolic link"):
        load_or_create_keys(kept, unwanted)


def test_a_pipe_or_folder_in_place_of_the_key_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    tmp_path.chmod(0o700)
    for name in ("pipe", "folder"):
        with pytest.raises(UnsuitableHome):
            load_or_create_keys(tmp_path / name, unwanted)


def test_a_home_that_cannot_be_made_is_unsuitable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnsuitableHome, match="cannot keep the keys"):
        load_or_create_keys(tmp_path / "file" / "keys.json", unwanted)


# ── Invitations ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_invitation_survives_being_written_down() -> None:
    assert Invitation.decode(INVITATION.encode()) == INVITATION


def test_a_code_is_one_token_that_is_safe_in_a_shell_and_a_url() -> None:
    code = INVITATION.encode()
    assert code.startswith("zm1-")
    assert set(code) <= set(string.ascii_letters + string.digits + "-_")


@settings(max_examples=200)
@given(
    endpoints=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=5).map(tuple),
    server=st.binary(min_size=32, max_size=32),
    secret=st.binary(min_size=32, max_size=32),
    expires_ms=st.integers(0, 2**64 - 1),
)
def test_every_invitation_survives_being_written_down(
    endpoints: tuple[str, ...], server: bytes, secret: bytes, expires_ms: int
) -> None:
    invitation = Invitation(
        endpoints=endpoints, server_key=z85_of(server), secret=z85_of(secret), expires_ms=expires_ms
    )
    assert Invitation.decode(invitation.encode()) == invitation


def test_line_breaks_and_spaces_around_and_inside_a_code_do_no_harm() -> None:
    code = INVITATION.encode()
    assert Invitation.decode(f"  {code[:70]}\n{code[70:140]}\r\n {code[140:]}\n") == INVITATION


def test_every_typo_is_noticed() -> None:
    code = INVITATION.encode()
    for at in range(len(code)):
        for typo in ("A", "b", "7", "_", ""):
            if code[at : at + 1] == typo:
                continue
            with pytest.raises(InvalidInput):
                Invitation.decode(code[:at] + typo + code[at + 1 :])


def test_every_code_that_is_cut_short_or_too_long_is_noticed() -> None:
    code = INVITATION.encode()
    for length in range(len(code)):
        with pytest.raises(InvalidInput):
            Invitation.decode(code[:length])
    for more in ("A", "AA", "AAAA", code):
        with pytest.raises(InvalidInput):
            Invitation.decode(code + more)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "starts with zm1-"),
        ("hello", "starts with zm1-"),
        ("zm2-AAAA", "another version"),
        ("zm1-", "mistyped or cut short"),
        ("zm1-AAAA", "mistyped or cut short"),
        ("zm1-AAéA", "'é'"),
        ("zm1-AA+A", "'\\+'"),
    ],
)
def test_a_wrong_code_is_told_what_is_wrong_with_it(text: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as refusal:
        Invitation.decode(text)
    assert refusal.value.hint


@given(st.binary(max_size=200))
def test_a_forged_code_with_a_right_checksum_is_read_or_refused_but_never_crashes(body: bytes) -> None:
    check = hashlib.blake2b(b"zm1-" + body, digest_size=6).digest()
    code = "zm1-" + base64.urlsafe_b64encode(body + check).decode().rstrip("=")
    try:
        invitation = Invitation.decode(code)
    except InvalidInput:
        return
    assert invitation.encode() == code


@pytest.mark.parametrize("endpoints", [(), ("",), ("x" * 256,), ("x",) * 256])
def test_an_invitation_that_cannot_be_written_is_refused(endpoints: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput):
        Invitation(endpoints=endpoints, server_key=KEYS.public, secret=KEYS.secret, expires_ms=0).encode()
