"""What the client tests are pointed at: the simulator itself (is it a fair stand-in?) and Hotpath in front of it."""

from dataclasses import dataclass
from typing import Any, Final

from tests.e2e.sim import Sim

TOOLS: Final[list[Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Calls {name}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("get_weather", "get_time")
]


@dataclass(frozen=True)
class Target:
    """A base URL with /v1, a key for it, and the simulator that answers in the end."""

    url: str
    key: str
    sim: Sim
    gateway: bool


def with_v1(url: str) -> str:
    """A base URL as the SDKs want it."""
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def says(text: str) -> list[Any]:
    """One user message. The simulator obeys `[[sim chunks=60 pace=5 seed=3]]` inside it."""
    return [{"role": "user", "content": text}]


def target_of(run: dict[str, Any]) -> Target:
    """A running `hotpath up`, by its run.json."""
    return Target(with_v1(run["url"]), run["api_key"], Sim(run["simulator_url"]), gateway=True)
