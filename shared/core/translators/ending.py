"""The end of an OpenAI stream: our payload in its last chunk (D5), and an end that its provider did not write, as the
real server ends a choice that came to its cap.

Source: https://platform.openai.com/docs/api-reference/chat-streaming. A tool call stays with the arguments it has so
far, as it does there (guides/structured-outputs, "edge cases": `finish_reason: "length"`, incomplete JSON).
"""

from collections.abc import Iterable
from typing import Any, Final

import msgspec
from msgspec import Raw

from shared.core import sse

#: Fields that an answer and all its chunks have, with one value.
SHARED: Final[tuple[str, ...]] = ("id", "created", "model", "system_fingerprint")

_fields: Final = msgspec.json.Decoder(dict[str, Raw]).decode
_json: Final = msgspec.json.Encoder().encode


def base(sample: bytes) -> dict[str, Any]:
    """The fields of a chunk but for its choices, as in this one (or in this whole answer)."""
    try:
        fields = _fields(sample)
    except (ValueError, RecursionError):
        fields = {}
    found: dict[str, Any] = {name: fields[name] for name in SHARED if name in fields}
    found["object"] = "chat.completion.chunk"
    return found


def by_cap(sample: bytes, choices: Iterable[int], begun: set[int], *, usage: bool) -> list[bytes]:
    """An event for each of these choices; one that has not begun gets its role. `usage`: the client asked for it, so
    all chunks but its own have it as null."""
    shared = base(sample)
    if usage:
        shared["usage"] = None
    events = []
    for index in choices:
        delta = {} if index in begun else {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "finish_reason": "length"}
        events.append(sse.encode(_json({**shared, "choices": [choice]})))
    return events


def used(sample: bytes, prompt: int, cached: int, completion: int) -> bytes:
    """The event with the usage, in tokens."""
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return sse.encode(_json({**base(sample), "choices": [], "usage": counts}))


def insert(event: bytes, x_br: bytes) -> bytes:
    """The event with `"x_br"` as its last key; one that the provider sent is replaced."""
    payload = event[6:-2].strip()
    if b'"x_br"' in payload:
        fields = _fields(payload)
        fields.pop("x_br", None)
        payload = _json(fields)
    return b"data: " + payload[:-1] + b',"x_br":' + x_br + b"}\n\n"
