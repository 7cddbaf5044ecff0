"""The OpenAI dialect: what is sent, what a bad stream does, whole answers, refusals (faults 62-77, 115-144)."""

from typing import Any

import msgspec
import orjson
import pytest

from shared.core.translators import failures, registry
from shared.core.translators.base import UpstreamFailure, Usage
from shared.core.translators.openai import MAX_HELD
from shared.core.translators.texts import MAX_TEXT, Texts
from shared.wire.errors import UpstreamInvalid, UpstreamTruncated
from shared.wire.messages import Step
from tests.core.translating import SECRET, ask, run, translator

STEP = Step("main", "real/model")


def chunk(content: str | None = None, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    return orjson.dumps({"choices": [{"index": index, "delta": delta, "finish_reason": finish}], **more})


def stream(*payloads: bytes) -> bytes:
    return b"".join(b"data: " + payload + b"\n\n" for payload in payloads)


HELLO = (chunk(""), chunk("Hel"), chunk("lo"))
STOP = chunk(finish="stop")
USAGE = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
DONE = b"[DONE]"


# ---- what is sent ----------------------------------------------------------------------------------------------------


def sent(body: bytes, *, stream: bool = True, cap_field: str = "max_tokens") -> dict[str, Any]:
    call = translator(stream=stream)
    request = call.request(ask(body, stream=stream), STEP, 77, cap_field)
    assert request.path == "/chat/completions"
    fields: dict[str, Any] = orjson.loads(request.body)
    return fields


def test_model_cap_and_usage_are_written_and_nothing_else() -> None:
    """D1: the cap always goes upstream; numbers travel digit by digit."""
    body = b'{"model":"m","messages":[{"role":"user","content":"\xc3\xa9"}],"seed":1.00,"x":null,"stream":true}'
    request = translator().request(ask(body), STEP, 77, "max_tokens")
    assert request.body == (
        b'{"model":"real/model","messages":[{"role":"user","content":"\xc3\xa9"}],"seed":1.00,"x":null,"stream":true,'
        b'"max_tokens":77,"stream_options":{"include_usage":true}}'
    )
    assert ("Accept", "text/event-stream") in request.headers


@pytest.mark.parametrize(
    ("given", "cap_field", "expected"),
    [
        (b'"max_tokens":5000', "max_completion_tokens", {"max_tokens": 77}),
        (b'"max_completion_tokens":9', "max_tokens", {"max_completion_tokens": 77}),
        (b'"max_tokens":1,"max_completion_tokens":2', "max_tokens", {"max_tokens": 77, "max_completion_tokens": 77}),
        (b'"x":1', "max_completion_tokens", {"max_completion_tokens": 77}),
        (b'"max_tokens":null', "max_completion_tokens", {"max_tokens": 77}),
    ],
)
def test_the_cap_goes_into_the_client_s_own_field(given: bytes, cap_field: str, expected: dict[str, int]) -> None:
    fields = sent(b'{"model":"m",' + given + b"}", cap_field=cap_field)
    assert {key: value for key, value in fields.items() if key.startswith("max_")} == expected


def test_other_stream_options_are_kept() -> None:
    options = b'{"model":"m","stream_options":{"include_usage":false,"include_obfuscation":false}}'
    assert sent(options)["stream_options"] == {"include_usage": True, "include_obfuscation": False}
    assert sent(b'{"model":"m","stream_options":null}')["stream_options"] == {"include_usage": True}
    assert "stream_options" not in sent(b'{"model":"m"}', stream=False)


def test_the_key_is_in_the_static_headers_only_when_there_is_one() -> None:
    dialect = registry.dialect("openai")
    assert dialect.headers("k")[0] == ("Authorization", "Bearer k")
    assert [name for name, _ in dialect.headers("")] == ["Content-Type"]


# ---- a good end ------------------------------------------------------------------------------------------------------


def test_usage_chunk_goes_only_to_a_client_that_asked() -> None:
    data = stream(*HELLO, STOP, USAGE, DONE)
    assert USAGE not in run(data).out
    asked = run(data, include_usage=True)
    assert asked.out.endswith(b"data: " + USAGE + b"\n\n")
    assert asked.usage == run(data).usage == Usage(3, 0, 2)


def test_x_br_is_the_last_key_of_the_last_chunk_with_a_finish_reason() -> None:
    """D5; one that a provider sends is replaced."""
    assert run(stream(*HELLO, STOP, USAGE, DONE)).out.endswith(b'"finish_reason":"stop"}],"x_br":{"cost":1}}\n\n')
    spoofed = chunk(finish="stop", x_br={"cost": 0})
    assert run(stream(*HELLO, spoofed, DONE)).out.count(b"x_br") == 1
    assert b'"x_br":{"cost":1}' in run(stream(*HELLO, spoofed, DONE)).out


def test_finish_without_done_is_a_good_end() -> None:
    """Faults 124, also without the last blank line (120)."""
    assert run(stream(*HELLO, STOP)).code == ""
    assert run(stream(*HELLO, STOP)[:-2]) == run(stream(*HELLO, STOP))
    assert run(stream(*HELLO, STOP)[:-1]) == run(stream(*HELLO, STOP))


def test_what_follows_done_is_ignored() -> None:
    """Faults 122, and another gateway's `[DONE] {json}`."""
    good = run(stream(*HELLO, STOP, USAGE, DONE))
    assert run(stream(*HELLO, STOP, USAGE, DONE, DONE, chunk("more"), b"{broken")) == good
    assert run(stream(*HELLO, STOP, USAGE, b'[DONE] {"cost":2}')) == good


def test_malformed_after_the_finish_costs_only_the_usage() -> None:
    broken = run(stream(*HELLO, STOP, b'{"usage":{', DONE))
    assert (broken.code, broken.usage) == ("", None)
    assert b"Hel" in broken.out
    assert run(stream(*HELLO, STOP, b'{"error":{"message":"late"}}', DONE)).code == ""


def test_nan_in_usage_is_repaired_and_not_believed() -> None:
    """Faults 77: NaN."""
    said = run(
        stream(*HELLO, STOP, b'{"choices":[],"usage":{"prompt_tokens":NaN,"completion_tokens":2}}', DONE),
        include_usage=True,
    )
    assert (said.code, said.usage) == ("", None)
    assert b"NaN" not in said.out


def test_halves_of_a_surrogate_pair_pass_escaped() -> None:
    """JavaScript servers cut emoji in two; the bytes are valid JSON."""
    said = run(stream(chunk(""), b'{"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}', STOP, DONE))
    assert said.code == ""
    assert b'"\\ud83d"' in said.out


# ---- a bad end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (stream(*HELLO), "upstream_truncated"),
        (stream(*HELLO, DONE), "upstream_truncated"),
        (b"", "upstream_truncated"),
        (stream(*HELLO) + b'data: {"choices":[{"del', "upstream_truncated"),
        (stream(*HELLO, b"{broken"), "upstream_invalid_response"),
        (stream(*HELLO, b"NaN"), "upstream_invalid_response"),
        (stream(*HELLO, b"[1]"), "upstream_invalid_response"),
        (stream(*HELLO, b'{"choices":{}}'), "upstream_invalid_response"),
        (stream(*HELLO, b'{"choices":[{"delta":{"content":"a\rb"}}]}'), "upstream_invalid_response"),
        (stream(*HELLO, b'{"a":"\xff","choices":[]}'), "upstream_invalid_response"),
        (stream(*HELLO, b'{"a":' + b"[" * 5000), "upstream_invalid_response"),
        (stream(*HELLO, b'{"error":{"message":"no","type":"server_error","code":null}}'), "upstream_error"),
        (stream(*HELLO, b'{"error":{"message":"no","code":429}}'), "upstream_rate_limited"),
        (stream(*HELLO, b'{"error":"no"}'), "upstream_error"),
        (stream(*HELLO) + b'{"error": {\n"message": "no"}}', "upstream_error"),
        (stream(*HELLO, chunk("x", index=1), STOP, DONE), "upstream_truncated"),
    ],
)
def test_a_bad_end_is_an_error_and_what_came_before_was_given_out(data: bytes, code: str) -> None:
    """Faults 63, 64, 121, 123, 126, 127, 129, 136: never a silent end, never malformed SSE."""
    said = run(data, n=2)
    assert said.code == code
    if data:
        assert said.out.startswith(stream(*HELLO))


@pytest.mark.parametrize(
    "odd",
    [
        b'{"choices":[]}', b"{}", b'{"choices":null}', b'{"choices":[{"index":0,"delta":null}]}',
        b'{"choices":[{"index":0,"delta":{"content":null}}]}', b'{"choices":[{"index":7,"delta":{"content":"x"}}]}',
        b'{"choices":[{"index":null,"delta":{"content":[{"type":"text","text":"x"}]}}]}', b"", b" ",
        b'{"choices":[{}]}', b'{"choices":[{"index":-1,"delta":{"tool_calls":[null,{"index":"a","function":1}]}}]}',
        b'{"choices":[{"index":0,"delta":{"tool_calls":{"a":1},"function_call":{"name":"f","arguments":{}}}}]}',
    ],
)  # fmt: skip
def test_odd_chunks_do_no_harm(odd: bytes) -> None:
    """Faults 125: no crash, and the stream ends well."""
    assert run(stream(chunk(""), odd, *HELLO, odd, STOP, odd, DONE)).code == ""
    assert run(stream(odd, *HELLO, STOP, DONE)).code == ""


def test_what_is_held_back_is_bounded() -> None:
    said = run(stream(*HELLO, STOP, *[chunk("late")] * MAX_HELD))
    assert said.code == "upstream_invalid_response"


def test_started_only_when_something_billed_came() -> None:
    """The Plan may be walked until then: a role chunk is no token."""
    call = translator()
    assert call.feed(chunk("")) != b""
    assert not call.started
    call.feed(chunk("x"))
    assert call.started


def test_text_kept_for_counting_is_bounded() -> None:
    texts = Texts()
    for _ in range(3):
        texts.keep(0, "content", 0, "é" * (MAX_TEXT // 2))
    assert texts.all() == [("é" * (MAX_TEXT // 2), 1)]
    assert texts.uncounted == 2 * MAX_TEXT
    call = translator()
    call.feed(chunk(""))
    for _ in range(40):
        call.feed(chunk("x" * (MAX_TEXT // 32)))
    assert sum(len(text) for text, _ in call.texts()) <= MAX_TEXT + MAX_TEXT // 32
    assert sum(len(text) for text, _ in call.texts()) + call.uncounted() == 40 * (MAX_TEXT // 32)


# ---- whole answers ---------------------------------------------------------------------------------------------------

WHOLE = (
    b'{"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, "message": '
    b'{"role": "assistant", "content": "Hi", "refusal": null, "tool_calls": [{"id": "t1", "type": "function", '
    b'"function": {"name": "f", "arguments": "{}"}}]}, "finish_reason": "tool_calls"}], '
    b'"usage": {"prompt_tokens": 5, "completion_tokens": 6}}'
)


def test_a_whole_answer_passes_untouched() -> None:
    call = translator(stream=False)
    assert call.whole(WHOLE) == WHOLE
    assert call.usage == Usage(5, 0, 6)
    assert [text for text, _ in call.texts()] == ["Hi", "f", "{}"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{}",
        b"[]",
        b"null",
        b'{"choices":[]}',
        b'{"choices":[{}]}',
        WHOLE[:80],
        b'\xff{"choices":1}',
        b"[" * 5000,
    ],
)
def test_a_malformed_whole_answer_is_invalid(body: bytes) -> None:
    """Faults 76."""
    with pytest.raises(UpstreamInvalid):
        translator(stream=False).whole(body)


def test_an_error_object_instead_of_an_answer() -> None:
    with pytest.raises(UpstreamFailure) as caught:
        translator(stream=False).whole(b'{"error":{"message":"overloaded","code":529}}')
    assert caught.value.failure.retryable
    assert caught.value.failure.error.status == 502


def test_a_whole_answer_instead_of_a_stream_becomes_one() -> None:
    """Faults 131: converted, with the tool call numbered and the usage as asked."""
    call = translator(include_usage=True)
    first = call.whole_as_stream(WHOLE)
    rest = call.tail(b'{"cost":1}')
    events = [orjson.loads(event[6:]) for event in (first + rest).split(b"\n\n") if event]
    assert events[0]["choices"][0]["delta"]["tool_calls"][0]["index"] == 0
    assert events[0]["choices"][0]["delta"]["content"] == "Hi"
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[1]["choices"][0]["finish_reason"] == "tool_calls"
    assert events[1]["x_br"] == {"cost": 1}
    assert events[2]["usage"]["prompt_tokens"] == 5
    assert call.usage == Usage(5, 0, 6)
    again = translator()
    assert b"".join((again.whole_as_stream(WHOLE), again.tail(b""))).count(b"data: ") == 2


# ---- refusals --------------------------------------------------------------------------------------------------------


def refuse(
    status: int, message: str = "no", headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, str, bool, bool, bool]:
    body = orjson.dumps({"error": {"message": message, **fields}})
    found = translator().failure(status, headers or {}, body)
    return found.error.status, found.error.code, found.retryable, found.same_endpoint, found.endpoint_fault


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, (400, "upstream_rejected", False, False, False)),
        (404, (404, "upstream_rejected", False, False, False)),
        (413, (413, "upstream_rejected", False, False, False)),
        (422, (422, "upstream_rejected", False, False, False)),
        (401, (502, "provider_auth", True, False, True)),
        (403, (502, "provider_auth", True, False, True)),
        (402, (502, "upstream_error", True, False, True)),
        (408, (502, "upstream_error", True, True, False)),
        (429, (429, "upstream_rate_limited", True, False, False)),
        (418, (502, "upstream_error", True, False, True)),
        (500, (502, "upstream_error", True, True, True)),
        (503, (502, "upstream_error", True, True, True)),
        (529, (502, "upstream_error", True, True, True)),
        (101, (502, "upstream_invalid_response", True, False, True)),
        (204, (502, "upstream_invalid_response", True, False, True)),
        (206, (502, "upstream_invalid_response", True, False, True)),
        (302, (502, "upstream_invalid_response", True, False, True)),
    ],
)
def test_what_a_status_means(status: int, expected: tuple[int, str, bool, bool, bool]) -> None:
    """Faults 68-71, 140."""
    assert refuse(status) == expected


def test_the_provider_s_code_and_param_are_passed_when_they_are_names() -> None:
    """Faults 71."""
    found = translator().failure(
        400, {}, b'{"error":{"message":"too long","code":"context_length_exceeded","param":"messages[0]"}}'
    )
    assert (found.error.code, found.error.param, found.error.message) == (
        "context_length_exceeded",
        "messages[0]",
        "too long",
    )
    odd = translator().failure(400, {}, b'{"error":{"message":5,"code":"a b","param":{"x":1}}}')
    assert (odd.error.code, odd.error.param) == ("upstream_rejected", None)
    assert odd.error.message == "The provider rejected the request."


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "5"}, 5000), ({"retry-after": "0.5"}, 500),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1500),
        ({"retry-after": "1000000000"}, 600_000), ({"retry-after": "1e9"}, 1000), ({"retry-after": "-5"}, 1000),
        ({}, 1000), ({"retry-after": "0"}, 1), ({"retry-after": "soon"}, 1000), ({"retry-after": "\u0665"}, 1000),
        ({"retry-after": "Sat, 21 Nov 2026 10:00:07 GMT", "date": "Sat, 21 Nov 2026 10:00:00 GMT"}, 7000),
        ({"retry-after": "Sat, 21 Nov 2026 10:00:07 GMT"}, 1000),
        ({"retry-after": "Sat, 21 Nov 2020 10:00:07 GMT", "date": "Sat, 21 Nov 2026 10:00:00 GMT"}, 1),
    ],
)  # fmt: skip
def test_retry_after_is_clamped(headers: dict[str, str], expected: int) -> None:
    """Faults 68."""
    assert failures.retry_after_ms(headers) == expected
    assert translator().failure(429, headers, b"").error.retry_after_ms == expected


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        (f"bad key {SECRET}.", SECRET),
        ("Incorrect key sk-proj-abcdefgh12345678", "sk-proj"),
        ("see https://api.internal:8443/v1?x=1 now", "api.internal"),
        ("Bearer abc.def", "abc.def"),
        ("token " + "A1" * 30, "A1A1"),
        ("a\r\nb\u2028c\x00", "\n"),
    ],
)
def test_secrets_urls_and_controls_are_scrubbed(text: str, gone: str) -> None:
    """Faults 144: a provider that echoes our key."""
    body = orjson.dumps({"error": {"message": text}})
    for status in (400, 500):
        assert gone not in translator().failure(status, {}, body).error.message
    assert gone not in run(stream(b'{"error":' + orjson.dumps({"message": text}) + b"}")).message


def test_messages_are_bounded_and_bodies_of_any_kind_are_read() -> None:
    assert len(failures.scrub("x " * 100_000)) <= failures.MAX_MESSAGE
    for body in (
        b"",
        b"<html>",
        b"[]",
        b"[{}]",
        b'"x"',
        b'{"error":null}',
        b'{"error":"why"}',
        b'{"detail":[1]}',
        b"\xff",
        b"[" * 5000,
    ):
        found = translator().failure(400, {}, body)
        assert found.error.status == 400
        assert msgspec.json.encode(found.error)
    assert translator().failure(400, {}, b'{"error":"why"}').error.message == "why"
    assert translator().failure(400, {}, b'{"message":"vllm"}').error.message == "vllm"


def test_a_truncated_stream_is_told_from_a_malformed_one() -> None:
    call = translator()
    call.feed(chunk("x"))
    with pytest.raises(UpstreamTruncated):
        call.finish(b'{"choi', b"")
