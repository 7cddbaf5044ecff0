"""One pass over text for everything a tenant's policy names.

Measured on one core of a cloud machine (AMD EPYC, Python 3.11), in us per KiB of clean text: RE2 gate 1.6, a thousand
keywords 2.8, lower-casing 0.4; whole, with the body parsed, 6 (4 without keywords; 8 to 10 outside of ASCII and at
2 KiB, where some 8 us are fixed). A match costs 4 to 6 us more, twice that to redact. The worst a body may hold, a
candidate at every place that its validator rejects, is 1.2 ms per KiB. All of it is linear: the gate is an automaton,
and what it finds is judged by bounded expressions and moves it on by at least a byte.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final, Literal, get_args

import re2
from msgspec import Struct

from shared.core.pii.keywords import Automaton, to_characters
from shared.core.pii.patterns import BEFORE, PATTERNS, Kind, Pattern, decimals_end

Action = Literal["off", "flag", "redact", "block"]
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)

#: Above this many bytes a caller with an event loop scans in a thread. A prompt of 32 KiB with its JSON around it stays
#: on the loop: 0.2 ms when clean, and a thread may have to wait 5 ms for the interpreter's lock.
OFF_LOOP_BYTES: Final = 40_960
#: Candidates judged on an event loop, 14 us each at their worst: a scan that meets more begins again in a thread.
ON_LOOP_CANDIDATES: Final = 200
#: Occurrences of keywords that weigh as much as one candidate.
_LIGHT: Final = 16
#: Policies whose automata are kept: 40 MiB when all have a thousand words.
_CACHED: Final = 128
_BACKSLASH: Final = 0x5C


class Policy(Struct, frozen=True, kw_only=True):
    """What a tenant wants done: one action for personal data and keywords alike."""

    pii: Action = "off"
    keywords: tuple[str, ...] = ()  # whole words, in any case; `core.keywords.check_keywords` has their bounds


class Finding(Struct, frozen=True):
    """How often a kind was found. Never what was found (I9)."""

    kind: Kind
    count: int


class Span(Struct, frozen=True, order=True):
    """A match: characters `start` to `end` of the text."""

    start: int
    end: int
    kind: Kind


class Laborious(Exception):
    """There is more to judge in a text than its `Effort` allows."""


class Effort:
    """How many candidates may still be judged in one scan. Bounds its time whatever the text; not shared by threads."""

    def __init__(self, candidates: int) -> None:
        self._left = candidates

    def spend(self, candidates: int = 1) -> None:
        """Raises Laborious when they are used up."""
        self._left -= candidates
        if self._left < 0:
            raise Laborious


class Scanner:
    """Finds what one policy names. Holds nothing of what it reads; may be used by several threads at once."""

    def __init__(self, policy: Policy) -> None:
        """Raises ValueError when a keyword is out of bounds."""
        self.policy = policy
        active = policy.pii != "off"
        self._words = Automaton(policy.keywords) if active and policy.keywords else None
        self._numbers = NumberFinder(PATTERNS) if active else None

    def scan(self, texts: Iterable[str], effort: Effort | None = None) -> tuple[Finding, ...]:
        """What these texts hold, in order of the kinds' names. Raises Laborious."""
        return count(self.find("\0".join(texts), effort))

    def find(self, text: str, effort: Effort | None = None) -> list[Span]:
        """All matches in order; of those that overlap, all. Raises Laborious when `effort` is used up."""
        if self._numbers is None:
            return []
        data = text.encode("utf-8", "surrogatepass")
        found = list(self._numbers.find(data, effort))
        places = [(start, end) for start, end, _ in found]
        if places and len(data) != len(text):
            places = to_characters(data, places)
        spans = [Span(start, end, kind) for (start, end), (_, _, kind) in zip(places, found, strict=True)]
        if self._words is not None:
            words = self._words.find(text, None if effort is None else lambda some: effort.spend(-(-some // _LIGHT)))
            spans += [Span(start, end, "keyword") for start, end in words]
        spans.sort()
        return spans


class NumberFinder:
    """The patterns over UTF-8: one RE2 automaton shows where any of them may begin, then each is tried there."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        gated = [pattern for pattern in patterns if pattern.gate]
        self._literal = [pattern for pattern in patterns if not pattern.gate]
        self._by_first = [[pattern for pattern in gated if byte in pattern.first] for byte in range(256)]
        options = re2.Options()
        options.encoding = re2.Options.Encoding.LATIN1  # bytes: the patterns spell UTF-8 out
        options.never_capture = True
        gates = b"|".join(pattern.gate for pattern in gated)
        self._gate = re2.compile(BEFORE + b"(?:" + gates + b")", options)

    def find(self, data: bytes, effort: Effort | None = None) -> Iterator[tuple[int, int, Kind]]:
        """Matches as (start, end, kind) in bytes. Raises Laborious."""
        framed = b"\0" + data + b"\0"  # so that something stands before and behind everything
        for pattern in self._literal:
            if pattern.first not in framed:
                continue
            for found in pattern.regex.finditer(framed):
                if effort is not None:
                    effort.spend()
                span = pattern.check(found)
                if span is not None:
                    yield span[0] - 1, span[1] - 1, pattern.kind
        place = 0
        while (gate := self._gate.search(framed, place)) is not None:
            if effort is not None:
                effort.spend()
            start = gate.start()
            place = start + 1
            match = self._match(framed, place)
            if match is None and framed[start] == _BACKSLASH and framed[place] in b"nrtbf":
                place += 1  # behind the letter of an escape
                match = self._match(framed, place)
            if match is not None:
                yield match[0] - 1, match[1] - 1, match[2]
                place = match[1] - 1  # its last byte may be what stands before the next
            else:
                place = decimals_end(framed, place)

    def _match(self, framed: bytes, place: int) -> tuple[int, int, Kind] | None:
        """The first pattern that holds here."""
        if decimals_end(framed, place) > place:
            return None
        for pattern in self._by_first[framed[place]]:
            found = pattern.regex.match(framed, place)
            if found is not None:
                span = pattern.check(found)
                if span is not None:
                    return (*span, pattern.kind)
        return None


@lru_cache(maxsize=_CACHED)
def compile_policy(policy: Policy) -> Scanner:
    """The scanner of a policy: a few ms for a thousand keywords, then kept. Raises ValueError as `Scanner`."""
    return Scanner(policy)


def count(spans: Iterable[Span]) -> tuple[Finding, ...]:
    """How often each kind occurs, in order of their names."""
    return tuple(Finding(kind, number) for kind, number in sorted(Counter(span.kind for span in spans).items()))
