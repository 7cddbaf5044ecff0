"""A provider's usage -> the canonical record: each token in one part, the whole always there (faults 77, 138)."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core.translators import usage
from shared.core.translators.base import Usage
from tests.core.translating import translator


def told(prompt: Any = 100, completion: Any = 50, before: Any = None, after: Any = None, **more: Any) -> dict[str, Any]:
    """A usage object as OpenAI sends it."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": before,
        "completion_tokens_details": after,
        **more,
    }


@pytest.mark.parametrize(
    "raw",
    [
        None, [], "x", {}, {"prompt_tokens": 3}, told(0, 0), told(0), told(-3), told(3, -1), told("3", "many"),
        told(True), told(3, True), told(1e30), told(3, 10**15), told(3, 1.5), told(float("nan")), told(float("inf")),
        told(None), told([3]), told(usage.MAX_TOKENS + 1),
    ],
)  # fmt: skip
def test_what_cannot_be_believed_is_none(raw: Any) -> None:
    """Counted by us instead."""
    assert usage.read(raw) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (told(), Usage(100, 0, 50)),
        (told(100.0, 0), Usage(100, 0, 0)),
        (told(before={"cached_tokens": 30, "audio_tokens": 0}), Usage(70, 30, 50)),
        (
            told(before={"cached_tokens": 30, "audio_tokens": 20, "cache_write_tokens": 10, "text_tokens": 80}),
            Usage(40, 30, 50, cache_write_5m=10, audio_input=20),
        ),
        (told(after={"reasoning_tokens": 40}), Usage(100, 0, 50, reasoning=40)),
        (told(after={"reasoning_tokens": 30, "audio_tokens": 20}), Usage(100, 0, 30, audio_output=20, reasoning=30)),
        (told(before={"cached_tokens": None}, after={}), Usage(100, 0, 50)),
        # reasoning outside of completion_tokens (xAI, Gemini's compatible endpoint): it is in the total, and billed
        (told(after={"reasoning_tokens": 70}, total_tokens=220), Usage(100, 0, 120, reasoning=70)),
        (told(after={"reasoning_tokens": 40}, total_tokens=150), Usage(100, 0, 50, reasoning=40)),
        # contradictions: the whole stays, the dearest part is kept
        (told(before={"cached_tokens": 130}), Usage(0, 100, 50, doubtful=True)),
        (
            told(before={"cached_tokens": 60, "audio_tokens": 70}),
            Usage(0, 30, 50, audio_input=70, doubtful=True),
        ),
        (
            told(before={"cached_tokens": 60, "audio_tokens": 70, "cache_write_tokens": 90}),
            Usage(0, 0, 50, cache_write_5m=30, audio_input=70, doubtful=True),
        ),
        (told(after={"audio_tokens": 70}), Usage(100, 0, 0, audio_output=50, doubtful=True)),
        (told(after={"reasoning_tokens": 70}), Usage(100, 0, 50, reasoning=50, doubtful=True)),
        # details that cannot be read: the whole at the full price
        (told(before={"cached_tokens": "9"}), Usage(100, 0, 50, doubtful=True)),
        (told(before={"cached_tokens": -9}), Usage(100, 0, 50, doubtful=True)),
        (told(before={"cached_tokens": True}), Usage(100, 0, 50, doubtful=True)),
        (told(after={"reasoning_tokens": 1e30}), Usage(100, 0, 50, doubtful=True)),
        (told(before=[1]), Usage(100, 0, 50, doubtful=True)),
    ],
)  # fmt: skip
def test_parts(raw: Any, expected: Usage) -> None:
    """No part twice, never less than the whole."""
    assert usage.read(raw) == expected


anything = st.one_of(st.none(), st.integers(-5, 200), st.floats(), st.booleans(), st.text(max_size=2))
details = st.one_of(
    st.none(),
    st.lists(anything, max_size=1),
    st.dictionaries(
        st.sampled_from(["cached_tokens", "cache_write_tokens", "audio_tokens", "reasoning_tokens"]), anything
    ),
)


@given(st.integers(1, 100), st.integers(0, 100), details, details, anything)
def test_whatever_is_said_of_the_parts_they_add_up(
    prompt: int, completion: int, before: Any, after: Any, total: Any
) -> None:
    """Each part is at least 0, and their sum is what was billed."""
    found = usage.read(told(prompt, completion, before, after, total_tokens=total))
    assert found is not None
    assert found.input_tokens == prompt
    assert found.output_tokens in (completion, completion + found.reasoning)
    assert min(getattr(found, part) for part in found.__struct_fields__) >= 0
    assert found.reasoning <= found.text_output


def test_the_providers_own_words_are_kept_up_to_a_size() -> None:
    """At most 1 KiB of them; what is larger is said to have been there."""
    assert usage.keep(None) == b""
    assert orjson.loads(usage.keep(told())) == told()
    large = {"x": "y" * 2000}
    assert orjson.loads(usage.keep(large)) == {"dropped_bytes": len(orjson.dumps(large))}
    assert len(usage.keep({"x": "y" * (usage.MAX_RAW - 8)})) == usage.MAX_RAW


def test_a_stream_keeps_what_it_was_told_last() -> None:
    """Believed or not: the last thing said is the provider's word, the last thing believed is what is charged."""
    call = translator()
    for said in (told(3, 1), told(3, 2), {"prompt_tokens": "many"}):
        call.feed(orjson.dumps({"choices": [], "usage": said}))
    assert call.usage == Usage(3, 0, 2)
    assert call.usage_sent == {"prompt_tokens": "many"}
