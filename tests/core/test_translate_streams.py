"""Streams written after the providers' documentation, and the simulator's: any cut gives the same output (I11)."""

from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.core import sse
from shared.core.translators.base import Usage
from tests.core.translating import Said, run

RECORDED = Path(__file__).parent.parent / "recorded"

#: file -> (n, text of choice 0 and what else was generated, usage, error code)
EXPECTED: dict[str, tuple[int, list[str], Usage | None, str]] = {
    "openai-text": (1, ["Hello, Zürich 👋\r\ndata: [DONE]\r\n"], Usage(15, 4, 10), ""),
    "openai-tools": (1, ["get_weather", '{"city":"Paris"}', "get_time", "{}"], Usage(82, 0, 31), ""),
    "openai-two-choices": (2, ["Yes", "No  no"], Usage(9, 0, 4), ""),
    "azure-filter": (1, ["Color"], None, ""),
    "openrouter": (1, ["Four", "Let me"], Usage(14, 0, 5), ""),
    "openrouter-error": (1, ["Half"], None, "upstream_error"),
    "deepseek-reasoning": (1, ["9.11", "嗯,"], Usage(17, 0, 9), ""),
    "vllm": (1, ["Hi"], Usage(11, 0, 2), ""),
}


def recorded(name: str) -> bytes:
    return (RECORDED / f"{name}.sse").read_bytes()


def chunks_of(out: bytes) -> list[dict[str, object]]:
    """Every event of an output, each one line of JSON (C8)."""
    events = out.split(b"\n\n")
    assert events.pop() == b""
    assert all(event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event for event in events)
    return [orjson.loads(event[6:]) for event in events]


def test_every_recording_is_expected_and_names_its_source() -> None:
    assert {path.stem for path in RECORDED.glob("*.sse")} == set(EXPECTED)
    for name in EXPECTED:
        assert recorded(name).startswith(b": Written after https://"), name


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_recording_says(name: str) -> None:
    """Text, usage, errors; every event of the provider in its order, untouched but for x_br."""
    n, texts, usage, code = EXPECTED[name]
    said = run(recorded(name), n=n, include_usage=True)
    assert (said.texts, said.usage, said.code) == (texts, usage, code)
    sent = [line[6:] for line in recorded(name).splitlines() if line.startswith(b"data: {")]
    if not code and name != "vllm":
        plain = run(recorded(name), n=n, include_usage=True, x_br=b"")
        assert plain.out == b"".join(b"data: " + event + b"\n\n" for event in sent)
        assert [chunk.get("x_br") for chunk in chunks_of(said.out)].count({"cost": 1}) == 1
        last = [chunk for chunk in chunks_of(said.out) if any(c.get("finish_reason") for c in chunk["choices"])][-1]  # type: ignore[attr-defined]
        assert last["x_br"] == {"cost": 1}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_cut_at_every_byte(name: str, include_usage: bool, end: bytes) -> None:
    """I11, faults 115, 116: byte by byte, and in two at some hundred places, with each line end."""
    n = EXPECTED[name][0]
    expected = run(recorded(name), n=n, include_usage=include_usage)
    data = recorded(name).replace(b"\n", end)
    assert run(data, list(range(len(data))), n=n, include_usage=include_usage) == expected
    for at in range(0, len(data), 7):
        assert run(data, [at], n=n, include_usage=include_usage) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(EXPECTED)), st.lists(st.integers(0, 4000), max_size=12), st.integers(0, 4000), st.booleans()
)
def test_any_cut_of_any_recording_ended_anywhere(name: str, cuts: list[int], end: int, bom: bool) -> None:
    """I11 and I5: also for streams that break off; what a broken stream said is a prefix of the whole one."""
    data = recorded(name)[:end]
    n = EXPECTED[name][0]
    one: Said = run(data, n=n)
    assert run((b"\xef\xbb\xbf" if bom else b"") + data, cuts, n=n) == one
    if one.code:
        full = run(recorded(name), n=n)
        assert full.out.startswith(one.out) or full.code


def test_simulator_like_stream_at_full_speed() -> None:
    """A thousand chunks in one read, in reads of an odd size, and byte by byte."""
    head = b'data: {"id":"chatcmpl-sim0","object":"chat.completion.chunk","created":1760000000,"model":"sim-fast",'
    chunk = head + b'"choices":[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}],"usage":null}\n\n'
    data = chunk % (b'{"role":"assistant","content":"","refusal":null}', b"null")
    data += b"".join(chunk % (b'{"content":" word%d"}' % i, b"null") for i in range(1000))
    data += chunk % (b"{}", b'"stop"')
    data += b'data: {"choices":[],"usage":{"prompt_tokens":8,"completion_tokens":1000}}\n\ndata: [DONE]\n\n'
    one = run(data)
    assert one.usage == Usage(8, 0, 1000)
    assert one.pieces == [1000]
    assert one.texts == ["".join(f" word{i}" for i in range(1000))]
    assert run(data, list(range(0, len(data), 1021))) == one
    assert run(data, list(range(len(data)))) == one
    assert len(chunks_of(one.out)) == 1002
    assert sse.encode(orjson.dumps(chunks_of(one.out)[1])) in data
