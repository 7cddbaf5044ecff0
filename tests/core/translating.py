"""Runs bytes through parser and translator as the provider worker does, and tells everything that came out."""

import itertools

from msgspec import Struct

from shared.core import sse
from shared.core.translators.base import UpstreamFailure, Usage
from shared.core.translators.openai import OpenAI, OpenAITranslator
from shared.wire.errors import HotpathError
from shared.wire.messages import Ask, ReplyTo

SECRET = "plain words, no pattern"  # only its value gives it away


class Said(Struct):
    """`code`: of the error it ended with, "" when it ended well."""

    out: bytes
    code: str
    message: str
    usage: Usage | None
    texts: list[str]
    pieces: list[int]
    started: bool


def ask(body: bytes = b"{}", *, stream: bool = True, n: int = 1, include_usage: bool = False) -> Ask:
    return Ask(
        rid="0" * 32,
        tenant="t",
        key="k",
        reply=ReplyTo("ingress", "i", 1),
        stream=stream,
        n=n,
        include_usage=include_usage,
        body=body,
    )


def translator(*, stream: bool = True, n: int = 1, include_usage: bool = False) -> OpenAITranslator:
    return OpenAI().translator(ask(stream=stream, n=n, include_usage=include_usage), (SECRET,))


def run(
    data: bytes, cuts: list[int] | None = None, *, n: int = 1, include_usage: bool = False, x_br: bytes = b'{"cost":1}'
) -> Said:
    """The stream `data`, cut at these places, to its end."""
    parser, call = sse.Parser(), translator(n=n, include_usage=include_usage)
    out: list[bytes] = []
    code = message = ""
    try:
        for start, end in itertools.pairwise([0, *sorted(cuts or []), len(data)]):
            for event in parser.feed(data[start:end]):
                out.append(call.feed(event))  # noqa: PERF401 - what came before an error counts
            if parser.failed:
                code = "too_large"
                break
        else:
            out.append(call.finish(parser.rest(), parser.stray()))
            out.append(call.tail(x_br))
    except UpstreamFailure as exc:
        code, message = exc.failure.error.code, exc.failure.error.message
    except HotpathError as exc:
        code, message = exc.code, exc.text
    return Said(
        out=b"".join(out),
        code=code,
        message=message,
        usage=call.usage,
        texts=[text for text, _ in call.texts()],
        pieces=[count for _, count in call.texts()],
        started=call.started,
    )
