"""Where aiohttp does what we cannot have, and what is done instead."""

import asyncio
from typing import Any, Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler
from yarl import URL

_NOWHERE: Final = URL()


def make_request(
    message: RawRequestMessage, payload: StreamReader, protocol: RequestHandler, writer: AbstractStreamWriter,
    task: "asyncio.Task[None]",
) -> web.BaseRequest:  # fmt: skip
    """Make aiohttp's request. `CONNECT` without a target has neither URL nor path, which its constructor does not
    expect: it would raise past every handler, and the connection stay open for ever (aiohttp 3.14)."""
    if message.url is None:
        message = message._replace(url=_NOWHERE, path="")
    return web.BaseRequest(message, payload, protocol, writer, task, asyncio.get_running_loop())


def masked(exc: BaseException | None) -> Any:
    """The exception's type and traceback without its text, which may quote the client (I9)."""
    return None if exc is None else (RuntimeError, RuntimeError(type(exc).__name__), exc.__traceback__)
