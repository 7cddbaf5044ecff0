"""The quality of an answer, by the table of core/quality.py, and D13's efficiency (S2-25)."""

from typing import Any

import orjson
import pytest

from shared.core import quality
from shared.core.translators.base import Spoken
from tests.core.translating import translator

PROSE = "The quick brown fox jumps over the lazy dog while seven wizards hurriedly box up jugs of plum liquor. "
#: 4 KiB that repeat nothing heavily, with and without spaces.
LONG = " ".join(f"word{number % 500} is {number}" for number in range(500))[:4096]
DENSE = "".join(chr(0x4E00 + number * 7919 % 5000) for number in range(4096))


def spoken(text: str = "Hello.", reason: str = "stop", *, refused: bool = False, arguments: Any = ()) -> Spoken:
    return Spoken(text, reason, refused, bool(arguments), tuple(arguments))


@pytest.mark.parametrize(
    ("choice", "wanted", "expected"),
    [
        (spoken(), "", 1.0),
        (spoken(PROSE), "", 1.0),
        (spoken(LONG), "", 1.0),
        (spoken(DENSE), "", 1.0),
        (spoken("", "tool_calls", arguments=['{"city":"Paris"}', "{}"]), "", 1.0),
        (spoken(""), "", 0.0),
        (spoken("", "length"), "", 0.0),
        (spoken(reason="length"), "", 0.6),
        (spoken(reason="content_filter"), "", 0.1),
        (spoken("", refused=True), "", 0.3),
        (spoken("", refused=True), "json", 0.3),  # a refusal is no broken JSON
        (spoken('{"a": 1}'), "object", 1.0),
        (spoken(' [1, "é"] '), "json", 1.0),
        (spoken("[1]"), "object", 0.2),
        (spoken('{"a": 1'), "json", 0.2),
        (spoken('{"a": 1} {}'), "json", 0.2),
        (spoken("```json\n{}\n```"), "json", 0.2),
        (spoken('{"a": NaN}'), "json", 0.2),
        (spoken("[" * 100_000), "json", 0.2 * 0.4),
        (spoken('{"a": 1', "length"), "json", 0.6 * 0.2),
        (spoken("", "tool_calls", arguments=["{}", '{"city":']), "", 0.2),
        (spoken("", "tool_calls", arguments=['"Paris"']), "", 0.2),
        (spoken("the same " * 200), "", 0.4),
        (spoken(LONG + "I am sorry, I cannot go on like this. " * 150), "", 0.4),
        (spoken("ha" * 500), "", 0.4),
        (spoken("もう一度言います。" * 100), "", 0.4),
        (spoken("ha" * 50), "", 1.0),  # short
    ],
)  # fmt: skip
def test_the_table(choice: Spoken, wanted: Any, expected: float) -> None:
    assert quality.quality([choice], wanted) == pytest.approx(expected)


def test_choices_are_averaged_and_what_was_cut_is_worth_nothing() -> None:
    assert quality.quality([spoken(), spoken("")]) == 0.5
    assert quality.quality([spoken()], cut=True) == quality.quality([]) == 0.0


@pytest.mark.parametrize(
    ("quality_", "share", "expected"),
    [(1.0, 1.0, 1.0), (1.0, 0.866, 0.87), (0.6, 0.5, 0.3), (0.0, 1.0, 0.0), (1.0, 5.0, 1.0), (-1.0, 1.0, 0.0)],
)  # fmt: skip
def test_efficiency_has_two_digits(quality_: float, share: float, expected: float) -> None:
    """D13."""
    assert quality.efficiency(quality_, share) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ""), ({"response_format": None}, ""), ({"response_format": {}}, ""),
        ({"response_format": {"type": "text"}}, ""), ({"response_format": {"type": "json_object"}}, "object"),
        ({"response_format": {"type": "json_schema"}}, "json"), ({"messages": [{"content": '"response_format"'}]}, ""),
    ],
)  # fmt: skip
def test_what_was_asked_for(body: dict[str, Any], expected: str) -> None:
    assert quality.format_of(orjson.dumps(body)) == expected


def test_what_a_stream_said_by_choice() -> None:
    """Text, refusal, calls and reasons of interleaved choices."""
    call = translator(n=3)
    for index, delta in (
        (0, {"content": "He"}), (1, {"refusal": "No."}), (0, {"content": "llo"}), (2, {"tool_calls": [
            {"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}},
            {"index": 1, "id": "b", "function": {"name": "g", "arguments": '{"a'}}]}),
        (2, {"tool_calls": [{"index": 1, "function": {"arguments": '":1}'}}]}),
    ):  # fmt: skip
        call.feed(orjson.dumps({"choices": [{"index": index, "delta": delta, "finish_reason": None}]}))
    for index, reason in enumerate(("stop", "content_filter", "tool_calls")):
        call.feed(orjson.dumps({"choices": [{"index": index, "delta": {}, "finish_reason": reason}]}))
    assert call.spoken() == [
        Spoken("Hello", "stop", refused=False, called=False, arguments=()),
        Spoken("", "content_filter", refused=True, called=False, arguments=()),
        Spoken("", "tool_calls", refused=False, called=True, arguments=('{"a":1}',)),
    ]


def test_what_a_whole_answer_said() -> None:
    """And one that said nothing at all is still a choice."""
    call = translator(stream=False)
    message = {"role": "assistant", "content": "Hi"}
    empty = {"role": "assistant", "content": None}
    choices = [{"index": 0, "message": message, "finish_reason": "length"}, {"index": 1, "message": empty}]
    call.whole(orjson.dumps({"choices": choices}))
    assert [(one.text, one.reason) for one in call.spoken()] == [("Hi", "length"), ("", "")]
