"""Token counts by the published formula, and bounds that hold."""

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.core import tokens

HELLO = {"role": "user", "content": "hello world"}  # 1 + 2 tokens in both tables
CALLED = {"id": "1", "type": "function", "function": {"name": "hello", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def body(*messages: Any, **fields: Any) -> bytes:
    return orjson.dumps({"model": "m", "messages": list(messages), **fields})


@pytest.mark.parametrize(
    ("messages", "count"),
    [
        ([HELLO], 3 + 3 + 1 + 2),
        ([HELLO, HELLO], 3 + 2 * (3 + 1 + 2)),
        ([{**HELLO, "name": "bob"}], 3 + 3 + 1 + 2 + 1 + 1),
        ([{"role": "user", "content": [{"type": "text", "text": "hello world"}] * 2}], 3 + 3 + 1 + 2 + 2),
        ([{"role": "assistant", "content": None}], 3 + 3 + 1),
        ([{"role": "assistant", "tool_calls": [CALLED]}], 3 + 3 + 1 + 1 + 1),
        ([{"role": "assistant", "content": None, "function_call": CALLED["function"]}], 3 + 3 + 1 + 1 + 1),
    ],
)  # fmt: skip
def test_prompt_formula(messages, count):
    """OpenAI cookbook: 3 a message, its tokens, 1 for a name, 3 for the reply."""
    assert tokens.count_prompt(body(*messages), "o200k") == count


def test_tools_count_as_the_json_they_are_sent_as():
    plain = tokens.count_prompt(body(HELLO), "o200k")
    with_tools = tokens.count_prompt(body(HELLO, tools=[TOOL]), "o200k")
    assert with_tools - plain == tokens.count_text(orjson.dumps([TOOL]).decode(), "o200k")


@pytest.mark.parametrize(
    ("model", "encoding"),
    [("gpt-4o-mini", "o200k"), ("gpt-4.1", "o200k"), ("gpt-5", "o200k"), ("o4-mini", "o200k"), ("gpt-4", "cl100k"),
     ("gpt-4-turbo", "cl100k"), ("gpt-3.5-turbo", "cl100k"), ("openai/gpt-4-0613", "cl100k"), ("llama", "o200k")],
)  # fmt: skip
def test_encoding_by_model(model, encoding):
    """S1-L2: a real tokenizer by model."""
    assert tokens.encoding_for(model) == encoding


def test_the_tables_are_tiktokens():
    """Counts the OpenAI cookbook prints for tiktoken and the same texts; special tokens are plain text to us."""
    assert tokens.count_text("tiktoken is great!", "o200k") == 6
    assert tokens.count_text("tiktoken is great!", "cl100k") == 6
    assert tokens.count_text("お誕生日おめでとう", "cl100k") == 9
    assert tokens.count_text("お誕生日おめでとう", "o200k") == 8
    assert tokens.count_text("<|endoftext|>", "o200k") == 7


@settings(deadline=None)
@given(st.lists(st.text(max_size=400), min_size=1, max_size=5))
def test_bound_is_above_the_count(texts):
    """D1: what is reserved is never below what we would count."""
    raw = body(*({"role": "user", "content": text} for text in texts))
    assert tokens.bound_prompt(raw, "o200k") > tokens.count_prompt(raw, "o200k")
    assert tokens.size_prompt(raw, "o200k").bound == tokens.bound_prompt(raw, "o200k")


@pytest.mark.parametrize("text", ["a" * 40_000, " " * 40_000, "é" * 40_000, "\U0001f600" * 20_000, "1 \x00" * 20_000])
def test_bound_of_a_large_body_counts_bytes(text):
    """Above 32 KiB nothing is tokenized: the bound holds and is quick."""
    raw = body({"role": "user", "content": text})
    assert tokens.bound_prompt(raw, "o200k") > max(len(text.encode()), tokens.count_prompt(raw, "o200k"))


def test_images_and_other_parts_are_bounded():
    """By the dearest rule of the models that may get it; where the rule is unknown the largest image there is."""
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}
    audio = {"type": "input_audio", "input_audio": {"data": "B" * 1000, "format": "wav"}}
    plain = tokens.bound_prompt(body({"role": "user", "content": []}), "o200k")
    raw = body({"role": "user", "content": [image]})
    assert tokens.bound_prompt(raw, "o200k", ("gpt-4o",)) >= plain + 85
    assert tokens.bound_prompt(raw, "o200k", ("gpt-4o", "gpt-4o-mini")) >= plain + 2833
    assert tokens.bound_prompt(raw, "o200k", ("gpt-4o", "gpt-4o-mini")) < plain + 2833 * 1.2
    assert tokens.bound_prompt(raw, "o200k", ("llava",)) >= plain + 12_000
    assert tokens.bound_prompt(body({"role": "user", "content": [audio]}), "o200k") > plain + 1000


def test_a_models_safety_factor_is_its_own():
    """The catalogue's `token_safety_percent`."""
    raw = body({"role": "user", "content": "hello world " * 500})
    count = tokens.count_prompt(raw, "o200k")
    for percent in (0, 10, 200):
        bound = tokens.bound_prompt(raw, "o200k", (), percent)
        assert bound == count + -(-count * percent // 100) + tokens.MARGIN_TOKENS


def test_a_prompt_nobody_billed_is_counted_with_all_its_parts():
    """I1: a cut call with an image, audio and a schema is charged no less than the bill."""
    parts = [{"type": "image_url", "image_url": {"url": "https://x/a.png"}}, {"type": "input_audio", "input_audio": {}}]
    message = {"role": "user", "content": parts}
    plain = tokens.count_prompt(body(message), "o200k")
    counted, opaque = tokens.cover_prompt(body(message, response_format={"type": "json_object"}), "o200k", "gpt-4o")
    assert counted > plain + 85 + 8 * 170
    assert opaque == len(orjson.dumps(parts[1]))
    assert tokens.cover_prompt(body(HELLO), "o200k", "gpt-4o") == (tokens.count_prompt(body(HELLO), "o200k"), 0)


@pytest.mark.parametrize("words", [50, 50_000])  # tokenized, and counted in bytes
@pytest.mark.parametrize(
    "build",
    [
        lambda text: body(HELLO, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": text}}),
        lambda text: body(HELLO, documents=[text]),
        lambda text: body({"role": "assistant", "content": "", "refusal": text}),
        lambda text: body({"role": "assistant", "reasoning_content": text, "content": None}),
        lambda text: body({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"input": text}}]}),
    ],
)  # fmt: skip
def test_the_bound_covers_what_the_formula_does_not_count(build, words):
    """D1: a provider bills a response_format's schema as input; other servers put fields of their own in the prompt."""
    text = "lorem " * words
    assert tokens.bound_prompt(build(text), "o200k") >= tokens.count_text(text, "o200k")
    assert tokens.count_prompt(build(text), "o200k") < 30


def test_fields_that_reach_no_model_are_not_reserved_for():
    fields = {"metadata": {"k": "v" * 500}, "stop": ["x"] * 4, "logit_bias": {"5": 1}, "user": "u" * 500}
    assert tokens.bound_prompt(body(HELLO, **fields), "o200k") == tokens.bound_prompt(body(HELLO), "o200k")


def test_estimate_is_four_characters_a_token_and_the_tools():
    """S2-09."""
    assert tokens.estimate_prompt(9, 5) == 3 + 2
    sized = tokens.size_prompt(body(HELLO, tools=[TOOL]), "o200k")
    assert sized.estimate == tokens.estimate_prompt(len("user" + HELLO["content"]), len(orjson.dumps([TOOL])))
