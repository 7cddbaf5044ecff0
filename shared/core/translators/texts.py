"""What a call has generated so far, kept so that it can be counted when the provider's usage never comes."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from shared.core.translators.base import Spoken

#: Characters kept: far above any model's output. What goes beyond is counted a token a byte.
MAX_TEXT: Final = 1_048_576
#: Pieces of one call: its choices, their tool calls.
MAX_PIECES: Final = 1024
#: A delta of a few characters costs 64 bytes as a string of its own: so many are joined at a time.
FOLD: Final = 32

_json: Final = msgspec.json.Encoder().encode


class Piece:
    """One text as its deltas came."""

    __slots__ = ("_folded", "_recent")

    def __init__(self) -> None:
        self._folded: list[str] = []  # of FOLD deltas each
        self._recent: list[str] = []

    def append(self, delta: str) -> None:
        """One more."""
        recent = self._recent
        recent.append(delta)
        if len(recent) == FOLD:
            self._folded.append("".join(recent))
            recent.clear()

    def text(self) -> str:
        """All of it."""
        return "".join((*self._folded, *self._recent))

    def deltas(self) -> int:
        """How many it came in."""
        return len(self._folded) * FOLD + len(self._recent)


class Texts:
    """`main`: the content of choice 0, the common case."""

    __slots__ = ("_pieces", "kept", "main", "uncounted")

    def __init__(self) -> None:
        self.main = Piece()
        self.kept = 0  # characters, those beyond MAX_TEXT included
        self.uncounted = 0  # bytes beyond it
        self._pieces: dict[tuple[int, str, int], Piece] = {}

    def all(self) -> list[tuple[str, int]]:
        """(text, deltas it came in) of each piece."""
        return [(piece.text(), piece.deltas()) for piece in (self.main, *self._pieces.values()) if piece.deltas()]

    def spoken(self, reasons: Mapping[int, str]) -> list[Spoken]:
        """By choice, in their order; `reasons` are the finish_reasons that came."""
        found: dict[int, dict[str, list[str]]] = {index: {} for index in reasons}
        if self.main.deltas():
            found.setdefault(0, {})["content"] = [self.main.text()]
        for (index, kind, _), piece in self._pieces.items():
            found.setdefault(index, {}).setdefault(kind, []).append(piece.text())
        return [
            Spoken(
                text="".join(kinds.get("content", ())),
                reason=reasons.get(index, ""),
                refused="refusal" in kinds,
                called="name" in kinds or "arguments" in kinds,
                arguments=tuple(kinds.get("arguments", ())),
            )
            for index, kinds in sorted(found.items())
        ]

    def keep(self, index: int, kind: str, number: int, text: str) -> None:
        """One delta of a choice: its `kind` of text; `number` is that of the tool call."""
        self.kept += len(text)
        if index == 0 and kind == "content":
            piece: Piece | None = self.main
        elif len(self._pieces) < MAX_PIECES:
            piece = self._pieces.setdefault((index, kind, number), Piece())
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
