"""What a call has generated so far, kept so that it can be counted when the provider's usage never comes."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec

#: Characters kept: far above any model's output. What goes beyond is counted a token a byte.
MAX_TEXT: Final = 1_048_576
#: Pieces of one call: its choices, their tool calls.
MAX_PIECES: Final = 1024

_json: Final = msgspec.json.Encoder().encode


class Texts:
    """`main`: the content of choice 0, the common case, appended to directly (with `kept`) by who is in a hurry."""

    __slots__ = ("_pieces", "kept", "main", "uncounted")

    def __init__(self) -> None:
        self.main: list[str] = []
        self.kept = 0  # characters, those beyond MAX_TEXT included
        self.uncounted = 0  # bytes beyond it
        self._pieces: dict[tuple[int, str, int], list[str]] = {}

    def all(self) -> list[tuple[str, int]]:
        """(text, deltas it came in) of each piece."""
        return [("".join(piece), len(piece)) for piece in (self.main, *self._pieces.values()) if piece]

    def keep(self, index: int, kind: str, number: int, text: str) -> None:
        """One delta of a choice: its `kind` of text; `number` is that of the tool call."""
        self.kept += len(text)
        if index == 0 and kind == "content":
            piece: list[str] | None = self.main
        elif len(self._pieces) < MAX_PIECES:
            piece = self._pieces.setdefault((index, kind, number), [])
        else:
            piece = self._pieces.get((index, kind, number))
        if piece is None or self.kept > MAX_TEXT:
            self.uncounted += len(text.encode(errors="replace"))
        else:
            piece.append(text)

    def keep_calls(self, index: int, calls: Any) -> None:
        """The tool calls of one delta or message: names and arguments."""
        for position, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):
                number = call.get("index")
                for holder in (call.get("function"), call.get("custom")):
                    if isinstance(holder, dict):
                        self._keep_call(index, number if type(number) is int else position, holder)

    def _keep_call(self, index: int, number: int, holder: dict[str, Any]) -> None:
        for kind in ("name", "arguments", "input"):
            value = holder.get(kind)
            if value:
                self.keep(index, kind, number, value if isinstance(value, str) else _json(value).decode())


def strings(value: Any) -> Iterator[str]:
    """A content string, or the texts of content parts (some servers send a list)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value[:MAX_PIECES]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text
