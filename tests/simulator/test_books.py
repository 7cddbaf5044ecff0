"""The simulator's books against a transport that is closing, and against the gateway's own count of a prompt."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.simulator.answer import Answer
from deploy.simulator.bill import Line, prompt_tokens
from deploy.simulator.player import ClientLeft, Player
from deploy.simulator.wanted import Defaults, parse
from shared.core.tokens import count_prompt
from tests.load.work import TOOLS
from tests.simulator.asking import body


def player(*, closing: bool) -> tuple[Player, Line]:
    """A player whose transport is closing, or takes bytes."""
    wish = parse(json.dumps(body(stream=True)).encode(), Defaults())
    line = Line("r.1", wish.model, "default", True, wish.prompt_tokens)
    request: Any = SimpleNamespace(transport=SimpleNamespace(is_closing=lambda: closing))
    return Player(request, Answer(wish, "r.1"), line, None), line


async def test_nothing_is_counted_that_a_closing_transport_would_drop() -> None:
    """The event loop closes it when the client half-closes; the answer may have another chunk ready by then."""
    one, line = player(closing=True)
    with pytest.raises(ClientLeft):
        await one._write(b"data: x\n\n", 3)
    assert line.output_tokens == 0


async def test_what_was_handed_over_counts_even_if_the_wait_for_room_is_cancelled() -> None:
    one, line = player(closing=False)

    async def full(_data: bytes) -> None:
        raise asyncio.CancelledError

    one._response = SimpleNamespace(write=full)  # type: ignore[assignment]
    with pytest.raises(asyncio.CancelledError):
        await one._write(b"data: x\n\n", 3)
    assert line.output_tokens == 3


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Köln"}'}}


@pytest.mark.parametrize(
    "wish",
    [
        body("Hi"),
        body("日本語 и русский 😀 <|endoftext|>"),
        body("Hi", tools=TOOLS),
        body("Hi", functions=[tool["function"] for tool in TOOLS]),
        {"messages": [{"role": "user", "name": "ann", "content": "x" * 5000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            ]
        },
    ],
)
def test_both_books_count_a_prompt_alike(wish: dict[str, Any]) -> None:
    """Two implementations of one published rule: cut calls compare to the token (issue 2, acceptance 4)."""
    raw = json.dumps(wish, ensure_ascii=False, separators=(",", ":")).encode()
    assert prompt_tokens(wish) == count_prompt(raw, "o200k")
