"""An OpenAI `usage` object -> the canonical record; None when it cannot be believed (faults 77, 138)."""

from typing import Any, Final

from shared.core.translators.base import Usage

#: No model's context or output comes near; a number above it is noise, not a bill.
MAX_TOKENS: Final = 20_000_000


def read(raw: Any) -> Usage | None:
    """None for anything but counts: absent, strings, booleans, negative, fractions, absurd, or a prompt of nothing."""
    if not isinstance(raw, dict):
        return None
    prompt, completion = _count(raw.get("prompt_tokens")), _count(raw.get("completion_tokens"))
    if not prompt or completion is None:
        return None
    details = raw.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    return Usage(prompt, min(cached or 0, prompt), completion)


def _count(value: Any) -> int | None:
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None
