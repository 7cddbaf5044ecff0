"""The one strict parse of a client's body: every case of the list of bad inputs, with the status it must give.

Numbers are those of the list (groups A, D and E); each must be refused, or accepted, in under 100 ms.
"""

import contextlib
import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.wire import openai
from shared.wire.errors import ClientError, InvalidJson, MissingModel, ModelNotFound
from shared.wire.openai import parse_chat

MESSAGES = [{"role": "user", "content": "hi"}]
QUICK_S = 0.1
MIB = 1_048_576


def body(**fields: Any) -> bytes:
    """A valid request with these fields over it."""
    return orjson.dumps({"model": "m", "messages": MESSAGES, **fields})


def raw(text: bytes) -> bytes:
    """A valid request with one more raw member."""
    return body()[:-1] + b"," + text + b"}"


def content(text: bytes) -> bytes:
    """A valid request whose message content is these raw bytes."""
    return b'{"model":"m","messages":[{"role":"user","content":"' + text + b'"}]}'


REFUSED: dict[str, bytes] = {
    "1 empty": b"",
    "2 null": b"null",
    "3 array": b"[]",
    "4 string": b'"x"',
    "5 number": b"1",
    "6 trailing comma": b'{"model":"m","messages":[],}',
    "7 single quotes": b"{'model':'m'}",
    "9 comment after": b'{"model":"m"}/**/',
    "9 comment after a valid one": body() + b"/**/",
    "9 second document": body() + body(),
    "10 NaN": raw(b'"temperature":NaN'),
    "11 Infinity": raw(b'"temperature":Infinity'),
    "12 -Infinity": raw(b'"temperature":-Infinity'),
    "13 1e400 where known": raw(b'"temperature":1e400'),
    "13 1e400 where unknown": raw(b'"x":{"y":[1e400]}'),
    "13 1e400 beside a null": raw(b'"x":1e400,"y":null'),
    "13 1e400 beside a dropped null": raw(b'"x":1e400,"api_key":null'),
    "13 -1e400": raw(b'"x":-1e400'),
    "13 400 digits": raw(b'"x":' + b"9" * 400 + b".5"),
    "14 max_tokens beyond 64 bits": raw(b'"max_tokens":99999999999999999999999999'),
    "14 unknown beyond 64 bits": raw(b'"x":99999999999999999999999999'),
    "16 duplicate model": b'{"model":"cheap","model":"gpt-4o","messages":[{"role":"user","content":"hi"}]}',
    "16 duplicate by escape": b'{"model":"cheap","m\\u006fdel":"gpt-4o","messages":[{"role":"user","content":"hi"}]}',
    "16 duplicate below": raw(b'"x":{"a":1,"a":2}'),
    "18 lone surrogate": content(b"\\ud800"),
    "18 reversed pair": content(b"\\udc00\\ud800"),
    "19 surrogate in UTF-8": content(b"\xed\xa0\x80"),
    "20 overlong": content(b"\xc0\xaf"),
    "21 truncated": content(b"\xe5"),
    "22 above U+10FFFF": content(b"\xf4\x90\x80\x80"),
    "23 BOM": b"\xef\xbb\xbf" + body(),
    "24 UTF-16": b"\xff\xfe" + body().decode().encode("utf-16-le"),
    "25 raw NUL": content(b"\x00"),
    "27 raw newline": content(b"a\x0ab"),
    "29 500 nested arrays": raw(b'"metadata":' + b"[" * 500 + b"]" * 500),
    "29 500 nested where unknown": raw(b'"x":' + b"[" * 500 + b"]" * 500),
    "29 65 deep": raw(b'"x":' + b"[" * 64 + b"]" * 64),
    "30 100,000 brackets": b"[" * 100_000,
    "31 50,000 nested": b'[{"":' * 50_000 + b"1",
    "32 1 MiB stop": raw(b'"stop":[' + b"1," * (MIB // 2 - 100) + b"1]"),
    "32 17 stops": body(stop=["a"] * 17),
    "33 200,000 keys": raw(b'"x":{' + b",".join(b'"%d":1' % i for i in range(70_000)) + b"}"),
    "33 1001 keys at the top": body(**{f"k{i}": 1 for i in range(1001)}),
    "33 100,002 quotes": raw(b'"x":[' + b'"aaaa",' * 50_000 + b"1]"),
    "32 50,001 items": raw(b'"x":[' + b"1," * 50_000 + b"1]"),
    "32 50,001 containers": raw(b'"x":[' + b",".join([b"[" + b"{}," * 9_999 + b"1]"] * 5) + b"]"),
    "34 empty key alone": b'{"":1}',
    "34 empty key": raw(b'"":1'),
    "35 __proto__ alone": b'{"__proto__":{"admin":true}}',
    "36 true": body(max_tokens=True),
    "37 10.0": raw(b'"max_tokens":10.0'),
    "38 '10'": body(max_tokens="10"),
    "39 -1": body(max_tokens=-1),
    "39 0": body(max_tokens=0),
    "40 -0": raw(b'"max_tokens":-0'),
    "40 max_completion_tokens -0": raw(b'"max_completion_tokens":-0'),
    "42 stream 'true'": body(stream="true"),
    "42 stream 1": body(stream=1),
    "104 user with a pattern": body(user="res:*"),
    "104 user with NUL": body(user="\x00"),
    "104 1 MB user": body(user="u" * 1_000_000),
    "108 list": body(model=["a", "b"]),
    "108 object": body(model={"$ne": ""}),
    "108 null": body(model=None),
    "108 empty": body(model=""),
    "108 absent": b'{"messages":[{"role":"user","content":"hi"}]}',
    "111 file URL": body(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
    "112 10,000 properties": body(tools=[{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(10_000)}}}}]),
    "113 response_format junk": body(response_format="junk"),
    "114 1 MB metadata": body(metadata={"a": "x" * 1_000_000}),
    "114 many metadata": body(metadata={f"k{i}": "v" for i in range(65)}),
    "metadata beyond 64 bits": raw(b'"metadata":{"a":99999999999999999999999999}'),
}  # fmt: skip

SHAPES: dict[str, bytes] = {
    "no messages": b'{"model":"m"}',
    "messages null": body(messages=None),
    "messages empty": body(messages=[]),
    "messages object": body(messages={"role": "user"}),
    "message string": body(messages=["hi"]),
    "role unknown": body(messages=[{"role": "root", "content": "x"}]),
    "role list": body(messages=[{"role": ["user"], "content": "x"}]),
    "role missing": body(messages=[{"content": "x"}]),
    "user content null": body(messages=[{"role": "user", "content": None}]),
    "user content missing": body(messages=[{"role": "user"}]),
    "content number": body(messages=[{"role": "user", "content": 5}]),
    "content object": body(messages=[{"role": "user", "content": {"type": "text"}}]),
    "part string": body(messages=[{"role": "user", "content": ["x"]}]),
    "part without type": body(messages=[{"role": "user", "content": [{"text": "x"}]}]),
    "text part without text": body(messages=[{"role": "user", "content": [{"type": "text"}]}]),
    "image string": body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]),
    "name number": body(messages=[{"role": "user", "content": "x", "name": 5}]),
    "tool without id": body(messages=[{"role": "tool", "content": "x"}]),
    "tool with id null": body(messages=[{"role": "tool", "content": "x", "tool_call_id": None}]),
    "tool_calls object": body(messages=[{"role": "assistant", "content": None, "tool_calls": {}}]),
    "tool_call without id": body(messages=[{"role": "assistant", "tool_calls": [{"type": "function"}]}]),
    "tool_call without function": body(messages=[{"role": "assistant", "tool_calls": [{"id": "a"}]}]),
    "tool_call type number": body(messages=[{"role": "assistant", "tool_calls": [{"id": "a", "type": 1}]}]),
    "arguments object": body(messages=[{"role": "assistant", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}]}]),
    "function_call string": body(messages=[{"role": "assistant", "content": "", "function_call": "f"}]),
    "tools object": body(tools={}),
    "tools of strings": body(tools=["f"]),
    "tool without type": body(tools=[{"function": {"name": "f"}}]),
    "tool without name": body(tools=[{"type": "function", "function": {}}]),
    "tool schema string": body(tools=[{"type": "function", "function": {"name": "f", "parameters": "x"}}]),
    "513 tools": body(tools=[{"type": "x"}] * 513),
    "functions object": body(functions={}),
    "functions without name": body(functions=[{}]),
    "tool_choice number": body(tool_choice=1),
    "stream_options list": body(stream=True, stream_options=[]),
    "include_usage string": body(stream=True, stream_options={"include_usage": "yes"}),
    "n 0": body(n=0),
    "n 17": body(n=17),
    "n true": body(n=True),
    "temperature string": body(temperature="1"),
    "temperature true": body(temperature=True),
    "temperature 2.1": body(temperature=2.1),
    "top_p -1": body(top_p=-1),
    "seed float": body(seed=1.5),
    "seed beyond 63 bits": body(seed=2**63),
    "logprobs 1": body(logprobs=1),
    "logit_bias list": body(logit_bias=[]),
    "metadata list": body(metadata=[]),
    "stop number": body(stop=1),
    "priority tier": body(service_tier="priority"),
    "prediction": body(prediction={"type": "content", "content": "x"}),
    "stored file": body(messages=[{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]),
}  # fmt: skip


@pytest.mark.parametrize("text", [*REFUSED.values(), *SHAPES.values()], ids=[*REFUSED, *SHAPES])
def test_refused(text):
    """Bad inputs, groups A, D, E, and the shapes of the dialect: 400, quickly, in a message that is safe to show."""
    began = time.perf_counter()
    with pytest.raises(ClientError) as caught:
        parse_chat(text)
    assert time.perf_counter() - began < QUICK_S
    assert caught.value.status == 400
    assert len(caught.value.text) < 300
    assert caught.value.text.isprintable()


ACCEPTED: dict[str, bytes] = {
    "26 escaped NUL": content(b"\\u0000"),
    "28 line separators": content("\u2028\u2029\u0085".encode()),
    "29 63 deep": raw(b'"x":' + b"[" * 63 + b"]" * 63),
    "33 1000 keys": body(x={f"k{i}": 1 for i in range(1000)}),
    "32 50,000 items": raw(b'"x":[' + b"1," * 49_999 + b"1]"),
    "32 49,900 containers": raw(b'"x":[' + b",".join([b"[" + b"{}," * 9_970 + b"1]"] * 5) + b"]"),
    "33 99,000 quotes, and more in a text": raw(
        b'"x":[' + b'"aa",' * 49_000 + b"1]," + b'"y":"' + b'\\"' * 100_000 + b'"'
    ),
    "35 __proto__": raw(b'"__proto__":{"admin":true}'),
    "107 slash": body(model="anthropic/claude-sonnet-4"),
    "107 colons": body(model="ft:gpt-4o:org::id"),
    "107 at": body(model="meta-llama/Llama-3.1-8B@v2"),
    "111 metadata address": body(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}}]}]),
    "112 recursive $ref and a bad pattern": body(tools=[{"type": "function", "function": {"name": "f", "parameters": {
        "$ref": "#", "pattern": "(a+)+$"}}}]),
    "113 response_format unknown": body(response_format={"type": "junk"}),
    "nulls are as not given": body(stream=None, max_tokens=None, n=None, temperature=None, stop=None, tools=None,
                                   stream_options=None, user=None, metadata=None),
    "assistant with calls only": body(messages=[{"role": "assistant", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]),
    "assistant with a custom call": body(messages=[{"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "custom", "custom": {"name": "f", "input": "x"}}]}]),
    "tool answer": body(messages=[{"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "x"}]}]),
    "parts of kinds to come": body(messages=[{"role": "user", "content": [{"type": "hologram", "data": 1}]}]),
    "developer": body(messages=[{"role": "developer", "content": ""}]),
    "fields to come": body(reasoning_effort="high", verbosity="low", thinking={"x": [1, 2.5, None]}),
    "seed of 63 bits": body(seed=2**63 - 1),
    "stop string": body(stop="\n"),
    "tools": body(tools=[{"type": "function", "function": {"name": "f", "strict": True}}], tool_choice="auto"),
}  # fmt: skip


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_and_nothing_lost(text):
    """What is sent on says exactly what the client said, for any reader of JSON."""
    assert orjson.loads(parse_chat(text).body) == orjson.loads(text)


def test_invalid_json_says_the_seeds_words():
    """S1-H4b."""
    with pytest.raises(InvalidJson) as caught:
        parse_chat(b"{")
    error = caught.value.body()
    assert (error.status, error.type, error.code) == (400, "invalid_request_error", "invalid_json")
    assert error.message == "Invalid JSON in request body"


def test_missing_model_says_the_seeds_words():
    """S1-H4c."""
    with pytest.raises(MissingModel) as caught:
        parse_chat(b"{}")
    assert caught.value.text == "missing model"


def test_an_error_names_the_field():
    with pytest.raises(ClientError) as caught:
        parse_chat(body(messages=[*MESSAGES, {"role": "user", "content": [{"type": "text", "text": "a"}, {}]}]))
    assert caught.value.param == "messages[1].content[1]"


def test_a_name_too_long_for_any_catalogue_is_not_found():
    """D6, bad inputs 96: 404, and the name goes no further."""
    with pytest.raises(ModelNotFound) as caught:
        parse_chat(body(model="b" * 5000))
    assert caught.value.status == 404
    with pytest.raises(ModelNotFound):
        parse_chat(body(model="é" * 129))
    assert parse_chat(body(model="é" * 128)).model == "é" * 128


@pytest.mark.parametrize("key", ["Model", "MODEL", "Max_Tokens", "\u017ftream", "\u212aey", "N"])
def test_a_known_name_in_other_letters_goes_no_further(key):
    """Bad inputs 17: a reader that folds case (Go) must not see a second model, cap or stream."""
    got = parse_chat(body(**{key: "gpt-4o"}))
    assert got.model == "m"
    assert (key in orjson.loads(got.body)) == (key == "\u212aey")  # no field of ours


@pytest.mark.parametrize(
    "key",
    ["api_base", "base_url", "api_key", "custom_llm_provider", "extra_headers", "mock_response", "user_config",
     "API_BASE", "mock_tool_calls", "vertex_project", "aws_secret_access_key"],
)  # fmt: skip
def test_what_would_send_it_elsewhere_is_dropped(key):
    """Bad inputs 109."""
    got = parse_chat(body(**{key: "http://169.254.169.254/"}))
    assert orjson.loads(got.body) == orjson.loads(body())
    assert got.body == body()


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, (False, False, 0, 1)),
        ({"stream": True}, (True, False, 0, 1)),
        ({"stream": True, "stream_options": {"include_usage": True}}, (True, True, 0, 1)),
        ({"stream_options": {"include_usage": None}}, (False, False, 0, 1)),
        ({"max_tokens": 7, "n": 3}, (False, False, 7, 3)),
        ({"max_tokens": 7, "max_completion_tokens": 5}, (False, False, 5, 1)),
    ],
)
def test_what_the_gateway_reads(fields, wanted):
    got = parse_chat(body(**fields))
    assert (got.stream, got.include_usage, got.max_output, got.n) == wanted


@pytest.mark.parametrize("number", [b"0.1", b"0.30000000000000004", b"1e22", b"5e-324", b"-1.5", b"9007199254740993",
                                    b"18446744073709551615", b"-9223372036854775808"])  # fmt: skip
def test_numbers_keep_their_value(number):
    """A float stays that float and an integer that integer."""
    got = orjson.loads(parse_chat(raw(b'"x":' + number)).body)["x"]
    assert got == orjson.loads(number)
    assert type(got) is type(orjson.loads(number))


texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(json_values)
def test_any_json_survives(value):
    text = orjson.dumps({"model": "m", "messages": MESSAGES, "extension": value})
    got = parse_chat(text)
    assert orjson.loads(got.body) == orjson.loads(text)
    assert parse_chat(got.body).body == got.body


@given(st.binary(max_size=200))
def test_garbage_is_a_client_error(text):
    with pytest.raises(ClientError):
        parse_chat(text)


@given(json_values)
def test_any_value_in_any_known_field_is_taken_or_refused(value):
    """Nothing but a ClientError ever comes out."""
    for field in [*openai._CHECKS, "messages", "model"]:
        with contextlib.suppress(ClientError):
            parse_chat(body(**{field: value}))


@given(json_values)
def test_any_value_in_a_message_is_taken_or_refused(value):
    keys = ("role", "content", "name", "tool_calls", "function_call", "tool_call_id")
    for key in keys:
        for role in ("user", "assistant", "tool"):
            with contextlib.suppress(ClientError):
                parse_chat(body(messages=[{"role": role, "content": "x", key: value}]))


def test_models_page():
    """S2-33: what `client.models.list()` reads."""
    page = orjson.loads(openai.models_page([("a/b", "openai")]))
    assert page["object"] == "list"
    assert page["data"] == [{"id": "a/b", "object": "model", "created": 0, "owned_by": "openai"}]
