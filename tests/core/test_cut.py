"""A stream that is cut since nothing more is paid for: to its client it ends as at its cap (DESIGN 4, acceptance 4)."""

from typing import Any

import orjson

from shared.core.translators.openai import OpenAITranslator
from tests.core.translating import translator

COMMON = {"id": "c1", "created": 7, "model": "real", "system_fingerprint": "fp"}


def feed(call: OpenAITranslator, *choices: dict[str, Any], **more: Any) -> bytes:
    """One chunk."""
    return call.feed(orjson.dumps({**COMMON, "object": "x", "choices": choices, **more}))


def says(index: int, text: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "finish_reason": finish}


def chunks(data: bytes) -> list[dict[str, Any]]:
    events = data.split(b"\n\n")
    assert events.pop() == b""
    return [orjson.loads(event.removeprefix(b"data: ")) for event in events]


def test_each_open_choice_gets_its_chunk_and_the_last_one_the_payload() -> None:
    """n = 4: one had finished, two are open, one has not begun: its role comes with its end."""
    call = translator(n=4, include_usage=True)
    for choice in (says(0, ""), says(1, "a"), says(0, "b"), says(2, "c")):
        assert feed(call, choice)
    assert feed(call, says(2, "", "stop")) == b""  # held until something follows
    assert feed(call, says(1, "d")) != b""
    call.cut()
    call.close(10, 4, 99)
    *ends, used = chunks(call.tail(b'{"cut":"budget"}'))
    assert [end["choices"] for end in ends] == [
        [{"index": 0, "delta": {}, "finish_reason": "length"}],
        [{"index": 1, "delta": {}, "finish_reason": "length"}],
        [{"index": 3, "delta": {"role": "assistant", "content": ""}, "finish_reason": "length"}],
    ]
    assert [end.get("x_br") for end in ends] == [None, None, {"cut": "budget"}]
    assert all(end["usage"] is None for end in ends)
    assert used["choices"] == []
    assert used["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 99,
        "total_tokens": 109,
        "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip
    for each in (*ends, used):
        assert {name: each[name] for name in COMMON} == COMMON
        assert each["object"] == "chat.completion.chunk"


def test_what_comes_after_it_is_counted_and_not_passed_on() -> None:
    """A drain may bring text, a finish and the usage: the client, who lacks the text, is still told "length"."""
    call = translator()
    feed(call, says(0, ""))
    feed(call, says(0, "one"))
    call.cut()
    feed(call, says(0, " two"))
    assert feed(call, {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}}) == b""
    assert feed(call, says(0, "", "stop")) == b""
    assert feed(call, usage={"prompt_tokens": 3, "completion_tokens": 2}) == b""
    assert call.finished
    assert call.usage is not None
    assert call.texts() == [("one two", 2), ("f", 1)]
    call.close(3, 0, 2)
    [end] = chunks(call.tail(b""))
    assert end["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert "usage" not in end


def test_what_was_held_stays_before_it() -> None:
    """A choice that finished, while the other one has not begun."""
    call = translator(n=2)
    feed(call, says(0, "a"))
    feed(call, says(0, "", "stop"))
    call.cut()
    call.close(1, 0, 1)
    first, second = chunks(call.tail(b"{}"))
    assert first["choices"][0]["finish_reason"] == "stop"
    assert second["choices"][0] == {
        "index": 1, "delta": {"role": "assistant", "content": ""}, "finish_reason": "length",
    }  # fmt: skip
    assert ("x_br" in first, "x_br" in second) == (False, True)


def test_a_stream_whose_chunks_say_little() -> None:
    """No id, no model: the end has none either, and is a chunk all the same."""
    call = translator()
    call.feed(b'{"choices":[{"delta":{"content":"a"}}]}')
    call.cut()
    call.close(1, 0, 1)
    [end] = chunks(call.tail(b""))
    assert end == {
        "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}],
    }  # fmt: skip


def test_bytes_written_are_told_as_they_come() -> None:
    """`written` bounds the tokens: bytes, not characters."""
    call = translator()
    feed(call, says(0, ""))
    for text, size in (("abc", 3), ("é", 5), ("日本", 11)):
        feed(call, says(0, text))
        assert call.written == size
    call.feed(b'{"choices":[{"index":0,"delta":{"content":"\\u00e9"}}]}')  # in ASCII, as Python's json writes it
    assert call.written == 13
    assert call.tokens(lambda text: len(text.encode())) == 13


def test_nothing_to_go_by() -> None:
    """A cut before any chunk with a choice cannot be (nothing was written), and does no harm."""
    call = translator()
    call.close(1, 0, 1)
    assert call.tail(b"") == b""
    call.cut()
    call.close(1, 0, 1)
    assert chunks(call.tail(b""))[0]["choices"][0]["finish_reason"] == "length"
