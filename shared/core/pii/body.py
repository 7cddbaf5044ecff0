"""The texts of a chat body: where they are, and the body without what must not be sent.

Read are all strings that a provider puts before a model or keeps beside the request: contents, text parts, names, the
arguments of called functions, descriptions and examples of tools, documents, metadata, `user`. Not read: what the
protocol itself means (roles, types, ids, names of functions, schema words), addresses and data of images, audio and
files, and keys outside of arguments. A text that is JSON is read as what it says, escapes undone, keys and numbers too,
and stays valid JSON.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import orjson
from msgspec import Struct

from shared.core.pii.engine import Effort, Finding, Scanner, Span

#: A redaction may uncover a match (`v 1.2.3.4` without its keyword `v`). Natural text needs one round more than none.
ROUNDS: Final = 6

#: Keys whose string, or list of strings, is of the protocol.
_STRUCTURAL: Final = frozenset({
    "$ref", "data", "detail", "file_data", "file_id", "format", "id", "include", "modalities", "model", "name",
    "pattern", "prompt_cache_key", "reasoning_effort", "required", "role", "service_tier", "stop", "tool_call_id",
    "tool_choice", "type", "verbosity",
})  # fmt: skip
#: Keys whose value is not a text whatever it is.
_OPAQUE: Final = frozenset(["image_url", "input_audio", "logit_bias", "stop", "stream_options", "tool_choice"])

_STRING: Final = re.compile(r'("(?:[^"\\]|\\.)*+")')
_ESCAPE: Final = re.compile(r"\\(?:[^u]|u[0-9A-Fa-f]{4}(?:\\u[0-9A-Fa-f]{4})*+)")
_ESCAPES: Final = {r"\n": "\n", r"\"": '"', r"\\": "\\", r"\/": "/", r"\t": "\t", r"\r": "\r", r"\b": "\b", r"\f": "\f"}
_LITERAL: Final = re.compile(r"[-+.0-9A-Za-z]+")  # of JSON outside of strings: numbers, true, false, null
_HEAD: Final = 64  # characters in which a JSON text must open


class Unredactable(ValueError):
    """After `ROUNDS` redactions it still matches: made to, nobody writes such a text."""


class Redacted(Struct, frozen=True):
    """A body fit to be sent, the very same bytes when nothing was found."""

    body: bytes
    findings: tuple[Finding, ...]


class _Slot(Struct):
    """One text and where it stands. `read` is what is scanned: itself, or with JSON escapes undone."""

    holder: Any  # dict or list
    key: Any
    text: str
    read: str


def scan_body(body: bytes, scanner: Scanner, effort: Effort | None = None) -> tuple[Finding, ...]:
    """What a checked body (`wire.openai.parse_chat`) holds. Raises ValueError when it is not JSON, Laborious."""
    return scanner.scan([slot.read for slot in _slots(orjson.loads(body))], effort)


def redact_body(body: bytes, scanner: Scanner, effort: Effort | None = None) -> Redacted:
    """Each match replaced by `[REDACTED:<kind>]`, until nothing matches; nothing else is touched.

    `body` is our own compact serialisation. Raises Unredactable, ValueError when it is not JSON, and Laborious when the
    `effort` is used up (of all rounds together, each match once more for its redaction).
    """
    fields = orjson.loads(body)
    counts: Counter[Any] = Counter()
    for _ in range(ROUNDS):
        slots = _slots(fields)
        spans = scanner.find("\0".join([slot.read for slot in slots]), effort)
        if not spans:
            break
        if effort is not None:
            effort.spend(len(spans))
        counts.update(span.kind for span in spans)
        _redact_slots(slots, _merge(spans))
    else:
        raise Unredactable("the text still matches after all rounds")
    if not counts:
        return Redacted(body, ())
    return Redacted(orjson.dumps(fields), tuple(Finding(kind, number) for kind, number in sorted(counts.items())))


# ---- where the texts are ---------------------------------------------------------------------------------------------


def _slots(fields: dict[str, Any]) -> list[_Slot]:
    slots: list[_Slot] = []
    for key, value in fields.items():
        if key == "messages":
            for message in value:
                _collect(message, slots)
                name = message.get("name")
                if type(name) is str:
                    slots.append(_Slot(message, "name", name, name))
        elif key == "metadata" and type(value) is dict:
            slots += [_Slot(value, name, text, text) for name, text in value.items() if type(text) is str]
        elif type(value) is str:
            if key not in _STRUCTURAL:
                slots.append(_slot(fields, key, value))
        elif key not in _OPAQUE and (type(value) is dict or type(value) is list):
            _collect(value, slots)
    return slots


def _collect(value: dict[str, Any] | list[Any], slots: list[_Slot]) -> None:
    """All texts below, in order. As deep as `wire.strict` lets a body be."""
    for key, item in value.items() if type(value) is dict else enumerate(value):
        kind = type(item)
        if kind is str:
            if key not in _STRUCTURAL:
                slots.append(_slot(value, key, item))
        elif (kind is dict or kind is list) and key not in _OPAQUE and not (kind is list and key in _STRUCTURAL):
            _collect(item, slots)


def _slot(holder: Any, key: Any, text: str) -> _Slot:
    read = _unescape(text) if "\\" in text and _is_json(text) else text
    return _Slot(holder, key, text, read)


def _is_json(text: str) -> bool:
    """Whether it is a JSON object or array."""
    if text[:_HEAD].lstrip()[:1] not in {"{", "["}:
        return False
    try:
        orjson.loads(text)
    except ValueError:
        return False
    return True


def _unescape(text: str) -> str:
    """JSON with the escapes of its strings undone; quotes around them kept."""
    return _ESCAPE.sub(_undo, text)


def _undo(escape: re.Match[str]) -> str:
    written = escape[0]
    return _ESCAPES.get(written) or orjson.loads(f'"{written}"')


# ---- without what was found ------------------------------------------------------------------------------------------


def _merge(spans: Sequence[Span]) -> list[Span]:
    """Those that overlap as one, under the name of the first (the longest of those that begin together)."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            merged[-1] = Span(last.start, max(last.end, span.end), last.kind)
        else:
            merged.append(span)
    return merged


class _Cursor:
    """Hands out spans to the pieces of text that they fall into, in order."""

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans
        self._next = 0

    def take(self, start: int, end: int) -> list[Span]:
        """The parts of spans inside of [start, end), counted from start. Calls must come in order of the text."""
        inside: list[Span] = []
        while self._next < len(self._spans) and self._spans[self._next].end <= start:
            self._next += 1
        place = self._next
        while place < len(self._spans) and self._spans[place].start < end:
            span = self._spans[place]
            inside.append(Span(max(span.start, start) - start, min(span.end, end) - start, span.kind))
            place += 1
        return inside


def _redact_slots(slots: list[_Slot], spans: list[Span]) -> None:
    cursor = _Cursor(spans)
    start = 0
    for slot in slots:
        end = start + len(slot.read)
        inside = cursor.take(start, end)
        if inside:
            redact = _redact_json if _is_json(slot.text) else _splice
            slot.holder[slot.key] = redact(slot.text, inside)
        start = end + 1  # the NUL between


def _splice(text: str, spans: list[Span]) -> str:
    out: list[str] = []
    place = 0
    for span in spans:
        out += (text[place : span.start], _placeholder(span))
        place = span.end
    return "".join([*out, text[place:]])


def _redact_json(text: str, spans: list[Span]) -> str:
    """In a string only what matches; a number or literal as a whole, as a string; punctuation never."""
    cursor = _Cursor(spans)
    out: list[str] = []
    start = 0
    for place, piece in enumerate(_STRING.split(text)):  # between strings, string, between ...
        reading = _unescape(piece) if "\\" in piece else piece
        end = start + len(reading)
        if place % 2:
            inside = cursor.take(start + 1, end - 1)
            piece = orjson.dumps(_splice(reading[1:-1], inside)).decode() if inside else piece  # noqa: PLW2901
        else:
            piece = _redact_literals(piece, cursor.take(start, end))  # noqa: PLW2901
        out.append(piece)
        start = end
    return "".join(out)


def _redact_literals(gap: str, spans: list[Span]) -> str:
    if not spans:
        return gap
    cursor = _Cursor(spans)

    def redact(literal: re.Match[str]) -> str:
        inside = cursor.take(*literal.span())
        return f'"{_placeholder(inside[0])}"' if inside else literal[0]

    return _LITERAL.sub(redact, gap)


def _placeholder(span: Span) -> str:
    """S2-30."""
    return f"[REDACTED:{span.kind}]"
