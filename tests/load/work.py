"""What a load run asks, and what one request came to: the mix, the bodies, the result of each."""

import random
from collections.abc import Iterator
from typing import Any, Final, Literal

from msgspec import Struct, field

Kind = Literal["whole", "stream", "tools"]
KINDS: Final[tuple[Kind, ...]] = ("whole", "stream", "tools")

TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Look up the {what} of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name, what in (("weather", "weather"), ("calendar", "public holidays"))
]


class Mix(Struct, frozen=True, kw_only=True):
    """How the requests are made up. Weights need not add up to anything; `leave` is a share of the streams."""

    weights: dict[Kind, int]
    model: str = "sim-fast"
    tools_model: str = "sim-tools"
    chunks: int = 0  # words asked of the simulator; 0: its own default
    max_tokens: int = 256
    leave: float = 0.0
    seed: int = 0


class Job(Struct, frozen=True):
    """One request to make. `leave_after`: give up after so many pieces of text; 0: stay to the end."""

    number: int
    kind: Kind
    body: dict[str, Any]
    leave_after: int = 0


class Result(Struct):
    """How one request ended. `status` is "ok", "left" or an error code; times in milliseconds."""

    kind: Kind
    status: str = ""
    http: int = 0
    latency: float = 0.0
    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    cost_nano: int = 0
    deliveries: int = 1


def parse_weights(text: str) -> dict[Kind, int]:
    """`whole=5,stream=4,tools=1`. Raises ValueError."""
    weights: dict[Kind, int] = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        kinds = [kind for kind in KINDS if kind == name.strip()]
        if not kinds or not count.strip().isdigit():
            raise ValueError(f"not a mix: {text!r}; write for example whole=5,stream=4,tools=1")
        weights[kinds[0]] = int(count)
    if not sum(weights.values()):
        raise ValueError("the mix is empty")
    return weights


def _body(mix: Mix, kind: Kind, dice: random.Random) -> dict[str, Any]:
    directive = f" [[sim chunks={mix.chunks}]]" if mix.chunks else ""
    prompt = f"Tell me about number {dice.randrange(1_000_000)}.{directive}"
    body: dict[str, Any] = {
        "model": mix.tools_model if kind == "tools" else mix.model,
        "messages": [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": prompt}],
        "max_tokens": mix.max_tokens,
    }
    if kind == "tools":
        body["tools"] = TOOLS
    if kind == "stream" or (kind == "tools" and dice.random() < 0.5):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def jobs(mix: Mix) -> Iterator[Job]:
    """Requests without end, the same for the same mix."""
    dice = random.Random(mix.seed)
    kinds, weights = list(mix.weights), list(mix.weights.values())
    number = 0
    while True:
        (kind,) = dice.choices(kinds, weights)
        body = _body(mix, kind, dice)
        leaves = body.get("stream") and dice.random() < mix.leave
        yield Job(number, kind, body, dice.randint(1, 12) if leaves else 0)
        number += 1
