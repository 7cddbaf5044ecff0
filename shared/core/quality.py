"""How good an answer is, from what is known when it has ended (S2-25), and its efficiency (D13). Pure.

A choice begins at 1 and is multiplied by each of these that holds; the answer's quality is the mean of its choices:

    0     it says nothing: no text, no tool call, no refusal; or the answer was cut or ended in an error
    0.1   the provider's filter ended it (finish_reason content_filter)
    0.3   the model refused (OpenAI's `refusal`)
    0.6   it was cut off by the output cap (finish_reason length)
    0.2   JSON was asked for (response_format) and the text is not one JSON value, an object where json_object was asked
    0.2   the arguments of a tool call are not a JSON object
    0.4   it repeats itself heavily

Repeats itself: of the last 2 KiB of text, at least 40 words of which fewer than a tenth differ; or, where there are few
spaces, its last 16 characters eight times over. JSON above 256 KiB is taken on trust. What a text means is not judged.

Efficiency = quality x min(1, the cheapest eligible endpoint's cost for this usage / the actual cost), to two digits.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import msgspec
from msgspec import Raw, Struct

from shared.core.translators.base import Spoken

FILTERED: Final = 0.1
REFUSED: Final = 0.3
TRUNCATED: Final = 0.6
NOT_JSON: Final = 0.2
REPEATS: Final = 0.4

#: What response_format asks of the text: "" = nothing, json = any JSON value, object = a JSON object.
Format = Literal["", "json", "object"]

_SAMPLE: Final = 2048  # characters looked at for repetition: 20 us
_LEAST: Final = 200  # a shorter text may repeat itself
_WORDS: Final = 40
_DISTINCT: Final = 10  # percent
_PROBE: Final = 16
_TIMES: Final = 8
_MAX_JSON: Final = 262_144  # characters


class _Asked(Struct):
    response_format: Any = None


_asked: Final = msgspec.json.Decoder(_Asked).decode
_valid: Final = msgspec.json.Decoder(Raw).decode


def format_of(body: bytes) -> Format:
    """What a checked chat body asks its text to be."""
    if b'"response_format"' not in body:  # a large prompt is not read for nothing
        return ""
    wanted = _asked(body).response_format
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    return "object" if kind == "json_object" else "json" if kind == "json_schema" else ""


def quality(choices: Sequence[Spoken], wanted: Format = "", *, cut: bool = False) -> float:
    """0 to 1, by the table above. `cut`: the answer did not end well."""
    if cut or not choices:
        return 0.0
    return sum(_score(choice, wanted) for choice in choices) / len(choices)


def efficiency(quality: float, share: float) -> float:
    """D13, from the quality and `pricing.cheapest_share`."""
    return round(min(1.0, max(0.0, quality)) * min(1.0, max(0.0, share)), 2)


def _score(choice: Spoken, wanted: Format) -> float:
    if not (choice.text or choice.called or choice.refused):
        return 0.0
    score = 1.0
    if choice.reason == "content_filter":
        score *= FILTERED
    elif choice.reason == "length":
        score *= TRUNCATED
    if choice.refused:
        score *= REFUSED
    elif wanted and choice.text and not _is_json(choice.text, an_object=wanted == "object"):
        score *= NOT_JSON
    if not _are_objects(choice.arguments):
        score *= NOT_JSON
    if repeats(choice.text):
        score *= REPEATS
    return score


def repeats(text: str) -> bool:
    """Whether the end of a text is little but repetition."""
    if len(text) < _LEAST:
        return False
    sample = text[-_SAMPLE:]
    words = sample.split()
    if len(words) >= _WORDS:
        return len(set(words)) * 100 < len(words) * _DISTINCT
    return sample.count(sample[-_PROBE:]) >= _TIMES


def _are_objects(arguments: Iterable[str]) -> bool:
    return all(_is_json(text, an_object=True) for text in arguments)


def _is_json(text: str, *, an_object: bool) -> bool:
    if len(text) > _MAX_JSON:
        return True
    if an_object and not text.lstrip().startswith("{"):
        return False
    try:
        _valid(text)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors; so is a lone surrogate
        return False
    return True
