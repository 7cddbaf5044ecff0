"""The simulator's own books: its prices, how it counts a prompt, and one line per call of what it wrote.

Input tokens are those of OpenAI's published rule (cookbook, "How to count tokens with tiktoken"): 3 a message, plus
the tokens of its role, of all its text and of its name (and 1 for having one), plus 3 for the reply. What the rule
leaves open is settled thus: an assistant's `tool_calls` count the tokens of each function's name and arguments, and
`tools` (and the older `functions`) count the tokens of their compact JSON, keys in the order sent.

Output tokens are those written to the socket: one per content chunk; for a tool call the tokens of its name when the
name is written, then those of each fragment of its arguments, which add up to the tokens of name and arguments.
`usage.completion_tokens` of a whole answer and of a stream that ended is the same number.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import orjson
from msgspec import Struct, field
from rs_bpe.bpe import openai as encodings

#: Newest lines kept; an older one is dropped and counted, so that a long load test does not eat the machine.
MAX_LINES: Final = 1_000_000

encoding: Final = encodings.o200k_base()


class Price(Struct, frozen=True):
    """Nano-USD per million tokens."""

    input: int
    cached_input: int
    output: int


_PAID: Final = Price(150_000_000, 75_000_000, 600_000_000)  # $0.15, $0.075 and $0.60 per million tokens

PRICES: Final[dict[str, Price]] = {
    "sim-fast": _PAID,
    "sim-paced": _PAID,
    "sim-tools": _PAID,
    "sim-free": Price(0, 0, 0),
}


def cost(price: Price, input_tokens: int, cached_tokens: int, output_tokens: int) -> int:
    """Nano-USD, rounded up once over the whole call."""
    exact = (
        (input_tokens - cached_tokens) * price.input + cached_tokens * price.cached_input + output_tokens * price.output
    )
    return -(-exact // 1_000_000)


@lru_cache(maxsize=4096)
def _count_short(text: str) -> int:
    return int(encoding.count(text))


def count_text(text: str) -> int:
    """Tokens of a text. Short ones are remembered: a load test sends the same prompt again and again."""
    return _count_short(text) if len(text) <= 4096 else int(encoding.count(text))


def message_texts(message: dict[str, Any]) -> list[str]:
    """The texts of a message's content: the string, or every text part."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]


def _message_tokens(message: dict[str, Any]) -> int:
    total = 3
    role, name, calls = message.get("role"), message.get("name"), message.get("tool_calls")
    if isinstance(role, str):
        total += count_text(role)
    if isinstance(name, str):
        total += count_text(name) + 1
    total += sum(count_text(text) for text in message_texts(message))
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            total += count_text(str(function.get("name") or "")) + count_text(str(function.get("arguments") or ""))
    return total


def prompt_tokens(body: dict[str, Any]) -> int:
    """Input tokens of a request body, by the rule above."""
    total = 3 + sum(_message_tokens(message) for message in body["messages"])
    for name in ("tools", "functions"):
        if body.get(name):
            total += count_text(orjson.dumps(body[name]).decode())
    return total


def now_ms() -> int:
    """The wall clock."""
    return time.time_ns() // 1_000_000


class Line(Struct):
    """One call: opened when a request was accepted, grown by every token written."""

    request_id: str
    model: str
    endpoint: str
    stream: bool
    input_tokens: int
    cached_tokens: int = 0
    output_tokens: int = 0
    complete: bool = False  # the whole answer was written, its finish_reason (or the whole body) included
    usage_sent: bool = False  # and so was a true `usage`: who read it knows this line exactly
    at_ms: int = field(default_factory=now_ms)  # wall clock, when it was accepted
    ended_ms: int = 0  # the same clock, when it was over or its client was found gone; 0: it goes on

    def show(self) -> dict[str, Any]:
        """The line as /_sim/bill tells it."""
        return {
            "request_id": self.request_id,
            "model": self.model,
            "endpoint": self.endpoint,
            "at_ms": self.at_ms,
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "cost_nano_usd": cost(PRICES[self.model], self.input_tokens, self.cached_tokens, self.output_tokens),
            "complete": self.complete,
            "usage_sent": self.usage_sent,
            "stream": self.stream,
            "ended_ms": self.ended_ms,
        }


class Bill:
    """All lines, oldest first, at most `limit`."""

    def __init__(self, limit: int = MAX_LINES) -> None:
        self._lines: deque[Line] = deque(maxlen=limit)
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._lines)

    def open(self, line: Line) -> Line:
        """Enter a call."""
        if len(self._lines) == self._lines.maxlen:
            self.dropped += 1
        self._lines.append(line)
        return line

    def show(self, wanted: Callable[[Line], bool]) -> list[dict[str, Any]]:
        """The lines that are wanted."""
        return [line.show() for line in self._lines if wanted(line)]

    def clear(self) -> None:
        """Forget everything; a call still under way writes on into its own, forgotten line."""
        self._lines.clear()
        self.dropped = 0
