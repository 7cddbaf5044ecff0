"""One strict parse of a client's JSON (S1-H4a), and its bounds. Pure.

By jiter with duplicate keys refused: a body that two parsers read differently is how a cheap model's price is paid for
a dear one (GHSA-4gph). The bounds keep one body from holding every other request: whatever 1 MiB of JSON holds, it is
read or refused within 50 ms (faults 30 to 33).
"""

import math
from typing import Any, Final

import jiter
import orjson

from shared.wire.errors import ClientError, InvalidJson

MAX_DEPTH: Final = 64  # containers inside one another; a real request has 5, a tool schema 15
MAX_KEYS: Final = 1000  # keys of one object; the largest tool schemas have some hundred
#: Quotes that open or close a string. The parser takes 1 us a key: 200,000 of them would hold every other request for
#: 0.2 s (faults 33); 10,000 messages have 80,000 quotes.
MAX_QUOTES: Final = 100_000
MAX_ITEMS: Final = 50_000  # of one array
#: Objects and arrays in all: a million of them in 1 MiB would hold the others for 0.1 s; 10,000 messages have 20,000.
MAX_CONTAINERS: Final = 50_000


def parse(body: bytes) -> dict[str, Any]:
    """The object in it. Raises InvalidJson, ClientError."""
    if len(body) > 2 * MAX_QUOTES and body.count(b'"') - body.count(b'\\"') > MAX_QUOTES:
        raise ClientError(f"The request body has more than {MAX_QUOTES // 2} strings and keys.")
    try:
        fields = jiter.from_json(body, allow_inf_nan=False, cache_mode="keys", catch_duplicate_keys=True)
    except ValueError as exc:
        raise InvalidJson(_explain(str(exc))) from exc
    if type(fields) is not dict:
        raise ClientError("Invalid request body: object expected")
    large = len(body) > 2 * MAX_ITEMS
    if large or body.count(b"{") + body.count(b"[") > MAX_DEPTH or body.count(b":") > MAX_KEYS:
        _check_size(fields)
    return fields


def _explain(reason: str) -> str:
    """The seed's own message (S1-H4b), unless ours helps more; never the client's text."""
    if reason.startswith("Detected duplicate key"):
        return "Invalid JSON in request body: duplicate key"
    if reason.startswith("recursion limit"):
        return f"Invalid JSON in request body: nested deeper than {MAX_DEPTH}"
    return ""


def _check_size(fields: dict[str, Any]) -> None:
    """Depth, keys per object, items per array and containers in all, level by level. Called only when the length
    or the count of brackets or colons allows a breach."""
    level: list[Any] = [fields]
    containers = 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if type(item) is dict:
                if len(item) > MAX_KEYS:
                    raise ClientError(f"An object in the request body has more than {MAX_KEYS} keys.")
                below += [value for value in item.values() if type(value) is dict or type(value) is list]
            else:
                if len(item) > MAX_ITEMS:
                    raise ClientError(f"An array in the request body has more than {MAX_ITEMS} items.")
                below += [value for value in item if type(value) is dict or type(value) is list]
            if containers + len(below) > MAX_CONTAINERS:
                raise ClientError(f"The request body has more than {MAX_CONTAINERS} objects and arrays.")
        if not below:
            return
        containers += len(below)
        level = below
    raise ClientError(f"The request body is nested deeper than {MAX_DEPTH}.")


def serialise(fields: dict[str, Any], body: bytes, *, exact: bool) -> bytes:
    """Compact JSON. Refuses integers beyond 64 bits and numbers beyond a double, which parsers read differently.

    jiter reads 1e400 as infinity and orjson writes that as null: so more nulls out than in (or, when fields were
    dropped, any null) means that we must look.
    """
    try:
        out = orjson.dumps(fields)
    except orjson.JSONEncodeError as exc:
        raise ClientError("A number in the request body is out of range.") from exc
    nulls = out.count(b"null")
    if nulls and (not exact or nulls != body.count(b"null")) and _has_infinity(fields):
        raise ClientError("A number in the request body is out of range.")
    return out


def _has_infinity(value: Any) -> bool:
    """Bounded by MAX_DEPTH."""
    if type(value) is float:
        return math.isinf(value)
    if type(value) is dict:
        return any(_has_infinity(item) for item in value.values())
    return type(value) is list and any(_has_infinity(item) for item in value)
