"""A provider's bill as `hotpath reconcile` reads it: one JSON object a line, read strictly. Pure.

    {"request_id": "<rid>.<call>", "model": ..., "endpoint": ..., "input_tokens": ..., "output_tokens": ...,
     "cost_nano_usd": ...}

Further fields are left alone: an export may tell more. Whatever money hangs on must be there, once, and be a number
that is one.
"""

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from shared.wire import strict
from shared.wire.errors import ClientError

MAX_LINE_BYTES: Final = 64 * 1024
_REQUEST_ID: Final = re.compile(r"([0-9a-f]{32})\.([1-9][0-9]?)\Z")
_MAX_CALL: Final = 64

Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]


class _Line(Struct, frozen=True):
    request_id: str
    model: Name
    endpoint: Name
    input_tokens: Count
    output_tokens: Count
    cost_nano_usd: Count


class Billed(Struct, frozen=True):
    """What the provider charged for one call, nano-USD."""

    rid: str
    call: int
    cost: int


def read_line(line: bytes) -> Billed:
    """One line of the bill. Raises ValueError, which says what is wrong with it."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        found = msgspec.convert(strict.parse(line), _Line)
    except ClientError as error:
        raise ValueError("not a JSON object, or one with a field twice") from error
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    named = _REQUEST_ID.match(found.request_id)
    if named is None or int(named[2]) > _MAX_CALL:
        raise ValueError("request_id is not <32 hex digits>.<call>, with a call from 1 to 64")
    return Billed(named[1], int(named[2]), found.cost_nano_usd)
