"""Commands about briefs: send, reply, check, inbox, read."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, BinaryIO

import click

from broker_free.errors import InvalidInput, TooLarge
from broker_free.limits import Limits
from zmail import render, times
from zmail.cli.options import Options, Verb, now_ms
from zmail.errors import ZmailError

LISTED = 20  # of a listing, unless -n says otherwise

# What cannot be sent is not read to its end.
_TEXT_BYTES_MAX = Limits().body_bytes_max + Limits().metadata_bytes_max
_LOST = ("dead", "expired", "cancelled")  # states that no wait can end well after


@click.command(cls=Verb)
@click.argument("to", nargs=-1, metavar="[TO]...")
@click.option("-s", "--title", help="The title; else the first line of the text.")
@click.option("-m", "--message", metavar="TEXT", help="The text.")
@click.option("-f", "--file", metavar="FILE.md", help="A whole brief, frontmatter and all; - is stdin.")
@click.option("--action", "actions", multiple=True, metavar="TEXT", help="Something to do; may be repeated.")
@click.option("--priority", metavar="P", help="low, normal, high or urgent.")
@click.option("--project", metavar="NAME", help="What it belongs to.")
@click.option("--due", metavar="DATE", help="YYYY-MM-DD, or RFC 3339.")
@click.option("--cc", multiple=True, metavar="TO", help="Who gets a copy; may be repeated.")
@click.option("--intent", metavar="I", help="ask, info or ack.")
@click.option("--ttl", metavar="T", help="Worthless after 30s, 15m, 2h, 3d, 1w.")
@click.option(
    "--wait", type=click.Choice(["delivered", "read"]), help="Until every recipient has it, or read it."
)
@click.option("--timeout", metavar="T", help="Of --wait; 30s unless given.")
@click.pass_obj
def send(
    options: Options,
    /,
    *,
    title: str | None,
    message: str | None,
    file: str | None,
    timeout: str | None,
    wait: str | None,
    **given: Any,  # handed on as it is
) -> None:
    """Send a brief. TO: bravo, bravo@server2, @server2 (all there), all.

    \b
    Example:
      zmail send all -s "Deploy blocked" -m "Migration 42 fails." --action "Review it"
    """
    if timeout is not None and wait is None:
        raise click.UsageError("--timeout is of no use without --wait")
    body, markdown = _text(message, file)
    patience_ms = times.parse_duration(timeout or "30s")
    answer = options.mailbox.send(title=title, body=body, markdown=markdown, **given)
    try:
        if wait:
            answer |= options.mailbox.wait_state(answer["id"], wait, timeout_ms=patience_ms)
    finally:  # whatever became of the wait, it is sent
        options.answer(answer, partial(render.send_text, now_ms=now_ms(), colour=options.colour))
    if wait and (lost := [each["address"] for each in answer["recipients"] if each["state"] in _LOST]):
        raise ZmailError(f"it will never be {wait} by {', '.join(lost)}")


@click.command(cls=Verb)
@click.argument("brief", metavar="ID")
@click.option("-s", "--title", help="A title of its own; else that of the brief, with Re: before it.")
@click.option("-m", "--message", metavar="TEXT", help="The text.")
@click.option("-f", "--file", metavar="FILE.md", help="The text, from a file; - is stdin.")
@click.option("--action", "actions", multiple=True, metavar="TEXT", help="Something to do; may be repeated.")
@click.pass_obj
def reply(
    options: Options,
    *,
    brief: str,
    title: str | None,
    message: str | None,
    file: str | None,
    actions: tuple[str, ...],
) -> None:
    """Answer a brief, in its thread.

    \b
    Example:
      zmail reply 5f8a01c2 -m "Done, it is deployed."
    """
    body, markdown = _text(message, file)
    result = options.mailbox.reply(brief, body=body or markdown or "", title=title, actions=actions)
    options.answer(result, partial(render.reply_text, now_ms=now_ms(), colour=options.colour))


@click.command(cls=Verb)
@click.pass_obj
def check(options: Options) -> None:
    """Say how much is unread, and from whom. Marks nothing.

    \b
    Example:
      zmail check
    """
    options.answer(
        options.mailbox.check(), partial(render.check_text, now_ms=now_ms(), colour=options.colour)
    )


@click.command(cls=Verb)
@click.option("--all", "all_", is_flag=True, help="Those that were read, too.")
@click.option("--from", "sender", metavar="A", help="From this sender only.")
@click.option("--since", metavar="T", help="From then on: 2h, 3d, 2026-04-01.")
@click.option("-n", "--limit", type=click.IntRange(min=0), default=LISTED, show_default=True, help="0: all.")
@click.pass_obj
def inbox(options: Options, *, all_: bool, sender: str | None, since: str | None, limit: int) -> None:
    """List unread briefs, newest first. Marks nothing.

    \b
    Example:
      zmail inbox --all --since 1d
    """
    result = options.mailbox.inbox(all=all_, sender=sender, since=since, limit=limit)
    options.answer(result, partial(render.inbox_text, now_ms=now_ms(), colour=options.colour))


@click.command(cls=Verb)
@click.argument("brief", metavar="ID")
@click.option("--raw", is_flag=True, help="As Markdown with frontmatter, the form that send -f takes.")
@click.option("--peek", is_flag=True, help="Leave it unread, and tell the sender nothing.")
@click.pass_obj
def read(options: Options, *, brief: str, raw: bool, peek: bool) -> None:
    """Show one brief in full, and mark it read. ID: the whole or its end, from 6 characters on.

    \b
    Example:
      zmail read 5f8a01c2
    """
    result = options.mailbox.read(brief, raw=raw, peek=peek)
    options.answer(
        result, _markdown if raw else partial(render.read_text, now_ms=now_ms(), colour=options.colour)
    )


COMMANDS = (send, reply, check, inbox, read)


def _markdown(answer: dict[str, Any]) -> str:
    return str(answer["markdown"])


def _text(message: str | None, file: str | None) -> tuple[str | None, str | None]:
    """Return the text given with -m, or that of the file given with -f. Exactly one of them is."""
    if (message is None) == (file is None):
        raise click.UsageError("give the text with -m TEXT or with -f FILE, one of them")
    return message, None if file is None else _read_text(file)


def _read_text(file: str) -> str:
    name = "stdin" if file == "-" else file
    try:
        if file == "-":
            content = _content(sys.stdin.buffer, name)
        else:
            with open(file, "rb") as stream:
                content = _content(stream, name)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8 text (byte {error.start})") from None


def _content(stream: BinaryIO, name: str) -> bytes:
    content = stream.read(_TEXT_BYTES_MAX + 1)
    if len(content) > _TEXT_BYTES_MAX:
        raise TooLarge(
            f"{name} is larger than a brief may be ({Limits().body_bytes_max} bytes)",
            hint="send its path instead",
        )
    return content
