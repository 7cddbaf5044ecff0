"""Mixed versions (faults 83): what a newer build may send is ignored or refused by every decoder."""

import inspect
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.wire import messages, records
from tests.wire.samples import ASK, FRAMES, NOISE, SAMPLES, STORED, newer

ALL = [(name, sample) for name, samples in {**SAMPLES, **STORED}.items() for sample in samples]
DECODERS = {
    **{name: getattr(messages, name) for name in SAMPLES},
    **{name: getattr(records, name) for name in STORED},
}


def named(pair: tuple[str, Any]) -> str:
    return type(pair[1]).__name__


def test_every_decoder_and_every_message_has_a_sample() -> None:
    """A new message is tried here too."""
    assert SAMPLES.keys() == {name for name in vars(messages) if name.startswith("decode_")}
    assert STORED.keys() == {name for name in vars(records) if name.startswith("decode_")}
    tagged = {
        kind
        for kind in (*vars(messages).values(), *vars(records).values())
        if inspect.isclass(kind) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag is not None
    }
    assert tagged <= {type(sample) for _, sample in ALL}


@pytest.mark.parametrize("pair", ALL, ids=named)
def test_what_a_newer_build_adds_is_ignored(pair: tuple[str, Any]) -> None:
    """Unknown fields of maps and elements behind arrays, at every depth."""
    decode, sample = DECODERS[pair[0]], pair[1]
    assert decode(messages.encode(sample)) == sample
    assert decode(messages.encode(newer(sample))) == sample


@pytest.mark.parametrize("pair", ALL, ids=named)
def test_what_an_older_build_leaves_out_has_its_default(pair: tuple[str, Any]) -> None:
    """Fields that have a default may be missing, at the end of an array too."""
    decode, sample = DECODERS[pair[0]], pair[1]
    fields = msgspec.structs.fields(sample)
    optional = {field.name: field.default for field in fields if not field.required}
    raw = msgspec.msgpack.decode(messages.encode(sample))
    if isinstance(raw, dict):
        without = {name: value for name, value in raw.items() if name not in optional}
    else:
        without = raw[: len(raw) - len(optional)]
    assert decode(messages.encode(without)) == msgspec.structs.replace(sample, **optional)


def unreadable(decode: Callable[[bytes], Any], payload: bytes) -> bool:
    """Whether it is refused, with an error that every caller catches."""
    try:
        decode(payload)
    except messages.UNREADABLE:
        return True
    return False


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
def test_noise(decode: Callable[[bytes], Any]) -> None:
    """Refused by every decoder, and by nothing else than the errors that every caller catches."""
    assert [payload for payload in NOISE if not unreadable(decode, payload)] == []


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@given(noise=st.binary(max_size=200), data=st.data())
def test_no_bytes_raise_anything_else(decode: Callable[[bytes], Any], noise: bytes, data: st.DataObject) -> None:
    """Garbage, and a valid message with a part of it overwritten."""
    pairs = [sample for name, sample in ALL if DECODERS[name] is decode]
    message = bytearray(messages.encode(data.draw(st.sampled_from(pairs))))
    at = data.draw(st.integers(0, len(message)))
    message[at : at + len(noise)] = noise
    unreadable(decode, noise)
    unreadable(decode, bytes(message))


@pytest.mark.parametrize("name", ["decode_admit", "decode_route", "decode_call", "decode_control"])
def test_an_unknown_kind(name: str) -> None:
    """Of a request or a control message: refused."""
    raw = {**msgspec.msgpack.decode(messages.encode(SAMPLES[name][0])), "kind": "newer"}
    assert unreadable(getattr(messages, name), messages.encode(raw))
    assert unreadable(getattr(messages, name), messages.encode({**raw, "kind": 7}))


def test_an_unknown_value_of_a_closed_set() -> None:
    """A form of the cost payload that this build cannot write is no request it can serve."""
    raw = {"kind": "admit", "ask": {**msgspec.msgpack.decode(messages.encode(ASK)), "done": "trailer"}}
    assert unreadable(messages.decode_admit, messages.encode(raw))


@pytest.mark.parametrize("more", [[], [b"x"], [{"any": [1]}, None, "thing"]])
def test_an_unknown_kind_of_frame_is_counted(more: list[Any]) -> None:
    """It has a stream, a delivery and a seq like every frame."""
    raw = messages.encode(["newer", 7, 1, 3, *more])
    assert unreadable(messages.decode_frame, raw)
    assert messages.unknown_frame(raw) == messages.Unknown("newer", 7, 1, 3)
    assert messages.unknown_frame(msgspec.Raw(raw)) == messages.Unknown("newer", 7, 1, 3)


def test_a_broken_frame_is_no_unknown_one() -> None:
    """A kind that is known but cannot be read must leave a hole: text would be missing without a word."""
    for frame in FRAMES:
        tag = frame.__struct_config__.tag
        cuts: list[list[Any]] = [[tag, 7, 1, 3], [tag, 7, 1, 3, [], [], []], [tag, 7, 1]]
        for broken in cuts:
            assert unreadable(messages.decode_frame, messages.encode(broken))
            assert messages.unknown_frame(messages.encode(broken)) is None
    for raw in (*NOISE, messages.encode(["newer", 7, 1]), messages.encode(["newer", "7", 1, 3])):
        assert messages.unknown_frame(raw) is None


def test_the_known_kinds_are_the_frames() -> None:
    assert {frame.__struct_config__.tag for frame in FRAMES} == messages._KINDS
