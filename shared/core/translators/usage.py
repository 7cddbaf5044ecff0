"""An OpenAI `usage` object -> the canonical record; None when it cannot be believed (faults 77, 138).

    prompt_tokens      = uncached (text, images) + cached_tokens + cache_write_tokens + audio_tokens
    completion_tokens  = text (reasoning_tokens included) + audio_tokens

A usage without believable totals is no usage: the call is counted by us. A detail that is absent is 0. One that cannot
be read is 0 too, and details that claim more than their total are cut down to it, the dearest kept: the whole is
priced, no part of it twice, and the record is marked `doubtful`. Some servers (xAI's, Gemini's compatible one) leave
reasoning out of completion_tokens and show it in total_tokens only: it was billed, so it is added.
Fields: openai-python src/openai/types/completion_usage.py; `cache_write_tokens` is OpenRouter's and newer OpenAI's.
"""

from typing import Any, Final

import msgspec

from shared.core.translators.base import Usage

#: No model's context or output comes near; a number above it is noise, not a bill.
MAX_TOKENS: Final = 20_000_000
#: Bytes of a provider's own usage object that go into the usage record.
MAX_RAW: Final = 1024

_json: Final = msgspec.json.Encoder().encode


def read(raw: Any) -> Usage | None:
    """None for anything but counts: absent, strings, booleans, negative, fractions, absurd, or a prompt of nothing."""
    if not isinstance(raw, dict):
        return None
    prompt, completion = _count(raw.get("prompt_tokens")), _count(raw.get("completion_tokens"))
    if not prompt or completion is None:
        return None
    before, after = raw.get("prompt_tokens_details"), raw.get("completion_tokens_details")
    if not before and not after:
        return Usage(prompt, 0, completion)
    written, heard, cached, odd = _parts(before, "cache_write_tokens", "audio_tokens", "cached_tokens")
    spoken, reasoning, _, odd_after = _parts(after, "audio_tokens", "reasoning_tokens", "")
    if reasoning and _count(raw.get("total_tokens")) == prompt + completion + reasoning:
        completion += reasoning
    audio_input = min(heard, prompt)
    write = min(written, prompt - audio_input)
    cache_read = min(cached, prompt - audio_input - write)
    audio_output = min(spoken, completion)
    text = completion - audio_output
    over = heard + written + cached > prompt or spoken > completion or reasoning > completion
    return Usage(
        uncached=prompt - audio_input - write - cache_read,
        cache_read=cache_read,
        text_output=text,
        cache_write_5m=write,
        audio_input=audio_input,
        audio_output=audio_output,
        reasoning=min(reasoning, text),
        doubtful=over or odd or odd_after,
    )


def keep(sent: Any) -> bytes:
    """The provider's own usage as JSON, for the usage record; b"" for none. More than `MAX_RAW` bytes are dropped, and
    a small object says so in their place."""
    if sent is None:
        return b""
    raw = _json(sent)
    return raw if len(raw) <= MAX_RAW else b'{"dropped_bytes":%d}' % len(raw)


def _parts(details: Any, *names: str) -> tuple[Any, ...]:
    """The named counts, and whether one of them was there and no count."""
    if details is None:
        return (*(0 for _ in names), False)
    if not isinstance(details, dict):
        return (*(0 for _ in names), True)
    found = [details.get(name) for name in names]
    counts = [0 if value is None else _count(value) for value in found]
    return (*(count or 0 for count in counts), None in counts)


def _count(value: Any) -> int | None:
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None
