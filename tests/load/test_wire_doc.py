"""deploy/WIRE.md says what the code does: its examples, subjects and error codes are read back."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.core.stream import WINDOW
from shared.wire import errors, messages, subjects
from tests.load import nats_client

DOC = (Path(__file__).resolve().parents[2] / "deploy" / "WIRE.md").read_text()
EXAMPLES = re.findall(r"^```json (\w+)\n(.*?)^```\n```hex\n(.*?)^```$", DOC, flags=re.DOTALL | re.MULTILINE)
DECODERS = {
    "Admit": messages.decode_admit,
    "Batch": messages.decode_batch,
    "Control": messages.decode_control,
    "Beat": messages.decode_beat,
}


def value(shown: Any) -> Any:
    """The example as msgpack would give it: {"bytes": text} is a bin."""
    if isinstance(shown, dict):
        if shown.keys() == {"bytes"}:
            return shown["bytes"].encode()
        return {name: value(part) for name, part in shown.items()}
    return [value(part) for part in shown] if isinstance(shown, list) else shown


def test_there_are_examples_of_everything() -> None:
    assert {name for name, _, _ in EXAMPLES} == set(DECODERS)
    assert len(EXAMPLES) == 7


@pytest.mark.parametrize(("name", "text", "packed"), EXAMPLES)
def test_an_example_is_what_its_bytes_say(name: str, text: str, packed: str) -> None:
    """JSON, bytes and Struct are one: decoded by our code, and encoded again to the same value."""
    data = bytes.fromhex(packed)
    shown = value(json.loads(text))
    assert msgspec.msgpack.decode(data) == shown
    decoded: Any = DECODERS[name](data)
    again = msgspec.msgpack.decode(messages.encode(decoded))
    assert _within(shown, again), (shown, again)
    if name == "Batch":
        for raw, frame in zip(decoded.frames, shown[4], strict=True):
            assert _within(frame, msgspec.msgpack.decode(messages.encode(messages.decode_frame(raw))))


def _within(shown: Any, encoded: Any) -> bool:
    """Everything shown survives our decoding; what is left out there are defaults."""
    if isinstance(shown, dict):
        known = set(messages.Ask.__struct_fields__) | set(messages.ErrorBody.__struct_fields__)
        known |= set(messages.Summary.__struct_fields__) | set(messages.Beat.__struct_fields__)
        defaults = {"v": messages.VERSION}
        return all(
            _within(part, encoded[name]) if name in encoded else name in known and part == defaults.get(name)
            for name, part in shown.items()
        )
    if isinstance(shown, list):
        return len(shown) <= len(encoded) and all(map(_within, shown, encoded))
    return bool(shown == encoded)


def test_the_deltas_of_the_examples_add_up_to_the_offset() -> None:
    sizes = [
        sum(len(frame["bytes"]) for frame in (part[4] for part in json.loads(text)[4] if part[0] == "d"))
        for name, text, _ in EXAMPLES
        if name == "Batch"
    ]
    assert sizes[0] == json.loads(EXAMPLES[1][1])[3] == 38


def test_every_frame_is_described_with_its_fields() -> None:
    for frame in (messages.Accepted, messages.Refused, messages.Delta, messages.End, messages.Failed):
        fields = ", ".join(frame.__struct_fields__)
        tag = frame.__struct_config__.tag
        assert f'| {frame.__name__} | `["{tag}", {fields}]` |' in DOC


def test_every_subject_is_the_codes_own() -> None:
    named = set(re.findall(r"`(hotpath\.v1\.[^`]*)`", DOC))
    you = "<you>"
    expected = {
        subjects.ADMIT,
        subjects.control("*"),
        subjects.control("<instance>"),
        subjects.beat("loadgen", "*"),
        subjects.beat("loadgen", you),
        subjects.reply("loadgen", "*"),
        subjects.reply("loadgen", you),
        subjects.reply("loadgen", f"{you}-<n>"),
        subjects.OUTCOME,
        subjects.USAGE,
        f"{subjects.PREFIX}.inbox.>",
        f"{subjects.PREFIX}.notice.*",
        f"{subjects.PREFIX}." + "{guardian,routing,provider}.<instance>",
    }
    assert named == expected


def _codes(kind: type[errors.HotpathError]) -> dict[str, int]:
    found = {kind.code: kind.status}
    for below in kind.__subclasses__():
        found |= _codes(below)
    return found


def test_every_code_is_listed_with_its_status() -> None:
    """Those that only HTTP can give are left out."""
    rows = DOC.split("## 9. Errors")[1].split("```")[0]
    listed: dict[str, int] = {}
    for group, status in re.findall(r"((?:`[a-z_]+`\s*)+)\((\d{3})\)", rows):
        listed |= dict.fromkeys(re.findall(r"`([a-z_]+)`", group), int(status))
    http_only = {"not_found", "method_not_allowed", "unsupported_media_type", "headers_too_large", "conflict"}
    families = {"internal_error", "service_unavailable"}
    assert listed == {
        code: status for code, status in _codes(errors.HotpathError).items() if code not in http_only | families
    }


def test_the_numbers_are_the_clients() -> None:
    assert "every 500 ms" in DOC
    assert nats_client.BEAT_S == nats_client.CREDIT_S == nats_client.HANDOFF_S == 0.5
    assert "every 250 ms" in DOC
    assert nats_client.PING_S == 0.25
    assert "for 1.5 s" in DOC
    assert nats_client.SILENT_S == 1.5
    assert nats_client.PAIR_WINDOW == 16 << 20
    assert "at most 32 KiB" in DOC
    assert WINDOW == 32 << 10
