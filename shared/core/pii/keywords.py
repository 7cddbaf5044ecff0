"""An operator's words, found by one Aho-Corasick automaton (3 us/KB for a thousand words, linear).

Case does not count, whole words do: `card` is not in `discard`. Scripts that write no spaces (Chinese, Japanese, Thai
and their neighbours) have no such bounds. Equal is equal after lower-casing, character by character: no normalisation
of Unicode beyond that, and `ss` is not `ß`.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final

from ahocorasick_rs import BytesAhoCorasick, Implementation

from shared.core.keywords import check_keywords, fold

#: Bytes given to the automaton at once, which bounds the list that it returns.
_CHUNK: Final = 65_536
#: Up to this many bytes of keywords the automaton is a full table: 1.3 times as fast, 240 bytes of memory a byte (else
#: 25, so that a thousand words take 0.3 MiB, and 2.3 MiB when each has 128 characters).
_TABLE_BYTES: Final = 2_048
_PLACEHOLDER: Final = re.compile(r"\[REDACTED:[a-z_]{1,16}\]")
_SPACELESS: Final = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0xD7FF), (0xF900, 0xFAFF))
_ASTRAL_CJK: Final = 0x20000
#: By byte of UTF-8: 1 a letter for sure, 0 none for sure, 2 not decided by one byte. Two neighbours whose product is 1
#: are of one word.
_LETTERS: Final = bytes(2 if byte > 0x7F else int(chr(byte).isalnum() or byte == 0x5F) for byte in range(256))


class Automaton:
    """The words of one policy. May be used by several threads at once."""

    def __init__(self, words: Sequence[str]) -> None:
        """Raises ValueError as `check_keywords`."""
        check_keywords(words)
        encoded = sorted({fold(word).encode() for word in words})
        table = sum(map(len, encoded)) <= _TABLE_BYTES
        self._find = BytesAhoCorasick(
            encoded, implementation=Implementation.DFA if table else Implementation.ContiguousNFA
        ).find_matches_as_indexes
        self._longest = max(map(len, encoded))

    def find(self, text: str, spend: Callable[[int], None] | None = None) -> Iterator[tuple[int, int]]:
        """The spans of whole words, in characters, in order of their ends; they may overlap. What was redacted
        already is not read. `spend` is told how many occurrences are to be judged, and may raise."""
        spans = self._occurrences(text, spend)
        if spans and "[REDACTED:" in text:
            spans = _outside(spans, [found.span() for found in _PLACEHOLDER.finditer(text)])
        for start, end in spans:
            if not (_joined(text, start) or _joined(text, end)):
                yield start, end

    def _occurrences(self, text: str, spend: Callable[[int], None] | None) -> list[tuple[int, int]]:
        """Where keywords are, without most of those that are part of a longer word."""
        folded = fold(text)
        data = folded.encode("utf-8", "surrogatepass")
        found: list[tuple[int, int]] = []
        for begin in range(0, len(data), _CHUNK):
            # framed by a byte of the neighbouring chunks, or by none
            matches = self._find(data[begin : begin + _CHUNK + self._longest], overlapping=True)
            if matches:
                if spend is not None:
                    spend(len(matches))
                near = data[max(0, begin - 1) : begin + _CHUNK + self._longest + 1].translate(_LETTERS)
                near = near if begin else b"\0" + near
                near += b"\0"
                found += [
                    (begin + start, begin + end)
                    for _, start, end in matches
                    if start < _CHUNK and near[start] * near[start + 1] != 1 and near[end] * near[end + 1] != 1
                ]
        return found if len(data) == len(folded) else to_characters(data, found)


def _outside(spans: list[tuple[int, int]], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that touch no hole (in order, apart from each other)."""
    starts = [start for start, _ in holes]
    return [(start, end) for start, end in spans if not (at := bisect_left(starts, end)) or holes[at - 1][1] <= start]


def _joined(text: str, place: int) -> bool:
    """Whether one word goes on across this place."""
    return 0 < place < len(text) and _is_letter(text[place - 1]) and _is_letter(text[place])


def _is_letter(char: str) -> bool:
    """A character of a word, in a script that puts something between words."""
    if char.isascii():
        return char.isalnum() or char == "_"
    code = ord(char)
    return char.isalnum() and code < _ASTRAL_CJK and not any(low <= code <= high for low, high in _SPACELESS)


def to_characters(data: bytes, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of UTF-8 as spans of characters, in one pass over the bytes. Their ends must lie between characters."""
    places = sorted({place for span in spans for place in span})
    count, characters = 0, {0: 0}
    for before, place in pairwise([0, *places]):
        count += len(data[before:place].decode("utf-8", "surrogatepass"))
        characters[place] = count
    return [(characters[start], characters[end]) for start, end in spans]
