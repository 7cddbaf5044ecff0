"""What a call has generated so far, kept so that it can be counted: while it streams, to see when it passes what is
reserved, and at its end when the provider's usage never comes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec

from shared.core.translators.base import Spoken

#: Bytes (as UTF-8) kept: far above any model's output. What goes beyond is counted a token a byte.
MAX_TEXT: Final = 1_048_576
#: Pieces of one call: its choices, their tool calls.
MAX_PIECES: Final = 1024
#: A delta of a few characters costs 64 bytes as a string of its own: so many are joined at a time.
FOLD: Final = 32

_json: Final = msgspec.json.Encoder().encode


#: Characters behind the last place where a text can be cut (see `_place`): beyond that it is cut anywhere, which may
#: make a token more or less. Prose has a place each five characters, Chinese has none.
MAX_TAIL: Final = 4096
#: Spaces looked at for a place.
MAX_LOOKS: Final = 32


class Piece:
    """One text as its deltas came."""

    __slots__ = ("_counted", "_folded", "_recent", "_tail", "_taken")

    def __init__(self) -> None:
        self._folded: list[str] = []  # of FOLD deltas each
        self._recent: list[str] = []
        self._counted = 0  # tokens of what stands before the tail
        self._taken = 0  # how many of `_folded` do, or are in it
        self._tail = ""  # from the last place on where the text can be cut

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

    def tokens(self, count: Callable[[str], int]) -> int:
        """Tokens by this table, or deltas if they are more; asked again, only what is new is counted."""
        if self._taken < len(self._folded):
            tail = self._tail + "".join(self._folded[self._taken :])
            self._taken = len(self._folded)
            at = _place(tail)
            if len(tail) - at > MAX_TAIL:
                at = len(tail)
            self._counted += count(tail[:at]) if at else 0
            self._tail = tail[at:]
        recent = self._tail + "".join(self._recent)
        return max(self._counted + (count(recent) if recent else 0), self.deltas())


def _place(text: str) -> int:
    """The last index at which the text can be cut so that both parts count apart what they count together; 0: none.

    Both tables cut a text into words first, each with the one space before it (tiktoken_ext/openai_public.py), so no
    token reaches over the gap between a letter or digit and a space that a letter follows."""
    at = len(text) - 1
    for _ in range(MAX_LOOKS):
        at = text.rfind(" ", 1, at)
        if at < 1:
            return 0
        before, after = text[at - 1], text[at + 1]
        if before.isascii() and before.isalnum() and after.isascii() and after.isalpha():
            return at
    return 0


class Texts:
    """`main`: the content of choice 0, the common case."""

    __slots__ = ("_pieces", "kept", "main", "uncounted")

    def __init__(self) -> None:
        self.main = Piece()
        self.kept = 0  # bytes, those beyond MAX_TEXT included
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

    def tokens(self, count: Callable[[str], int]) -> int:
        """Tokens of all pieces, those that are not kept at a byte each; see Piece.tokens."""
        return self.uncounted + sum(piece.tokens(count) for piece in (self.main, *self._pieces.values()))

    def keep(self, index: int, kind: str, number: int, text: str) -> None:
        """One delta of a choice: its `kind` of text; `number` is that of the tool call."""
        if not text:
            return
        size = len(text.encode(errors="replace"))
        self.kept += size
        if index == 0 and kind == "content":
            piece: Piece | None = self.main
        elif len(self._pieces) < MAX_PIECES:
            piece = self._pieces.setdefault((index, kind, number), Piece())
        else:
            piece = self._pieces.get((index, kind, number))
        if piece is None or self.kept > MAX_TEXT:
            self.uncounted += size
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
