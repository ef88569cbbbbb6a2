"""The command line: each command parses, asks one Mailbox verb and renders the answer. Only here is click known."""

from __future__ import annotations

from zmail.cli.app import run

__all__ = ["run"]
