"""Answering futures that their caller may have left already."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

T = TypeVar("T")


def succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[Any], error: BaseException) -> None:  # Any: whatever it was to become
    if not future.done():
        future.set_exception(error)
