"""The SSE parser and encoder: any cut, any line end, bounded (I11, S0-10, faults 66, 115-120, 132, 136)."""

import itertools
import time

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.core import sse


def parse(
    data: bytes, cuts: list[int] | None = None, limit: int = sse.MAX_EVENT
) -> tuple[list[bytes], bytes, bytes, bool]:
    """Everything a parser says about these bytes, cut at these places."""
    parser = sse.Parser(limit)
    found: list[bytes] = []
    edges = [0, *sorted(cuts or []), len(data)]
    for start, end in itertools.pairwise(edges):
        found += parser.feed(data[start:end])
    return found, parser.rest(), parser.stray(), parser.failed


def one_by_one(data: bytes, limit: int = sse.MAX_EVENT) -> tuple[list[bytes], bytes, bytes, bool]:
    return parse(data, list(range(1, len(data))), limit)


TEXT = (
    'data: {"a":"h\u00e9\u2028\U0001f600"}\n\n: note\n\ndata:x\ndata:  y\ndata\n\n'
    "event: error\nid: \x00\nretry: 1\nfoo: bar\ndata: z\n\ndata: [DONE]\n\n"
)


def test_specification_cases() -> None:
    """Faults 118, 119: one space is dropped, several data lines are joined, `data` alone is an empty line."""
    assert parse(TEXT.encode())[0] == ['{"a":"h\u00e9\u2028\U0001f600"}'.encode(), b"x\n y\n", b"z", b"[DONE]"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_each_line_end_and_each_cut_give_the_same(end: str) -> None:
    """Faults 115, 116: LF, CRLF, CR; every single cut, every pair of neighbours, byte by byte."""
    expected = parse(TEXT.encode())
    data = TEXT.replace("\n", end).encode()
    assert parse(data) == expected
    assert one_by_one(data) == expected
    for at in range(len(data) + 1):
        assert parse(data, [at]) == expected
        assert parse(data, [at, min(at + 1, len(data))]) == expected


def test_mixed_line_ends() -> None:
    assert parse(b"data: a\r\ndata: b\rdata: c\n\r\n\rdata: d\r\r")[0] == [b"a\nb\nc", b"d"]


@given(
    st.lists(
        st.sampled_from(
            [
                b"data: a",
                b"data:b",
                b"data",
                b":c",
                b"\n",
                b"\r",
                b"\r\n",
                b"\n\n",
                b"{",
                b'"e"}',
                b"\xef\xbb\xbf",
                b"x: y",
            ]
        )
    ),
    st.data(),
)
def test_any_cut_of_any_stream(tokens: list[bytes], data: st.DataObject) -> None:
    """I11, with the whole stream in one read as the reference, and small limits."""
    stream = b"".join(tokens)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    limit = data.draw(st.sampled_from([6, 11, sse.MAX_EVENT]))
    whole = parse(stream, limit=limit)
    assert parse(stream, cuts, limit) == whole
    assert one_by_one(stream, limit) == whole


def test_byte_order_mark_at_the_start_only() -> None:
    """Faults 117."""
    assert one_by_one(b"\xef\xbb\xbfdata: a\n\n")[0] == [b"a"]
    assert parse(b"data: \xef\xbb\xbfa\n\n\xef\xbb\xbfdata: b\n\n")[0] == [b"\xef\xbb\xbfa"]


def test_event_over_the_limit_fails_and_keeps_what_came_before() -> None:
    """Faults 66, 132: an error at the cap, no memory beyond it."""
    stream = b"data: a\n\ndata: " + b"x" * (sse.MAX_EVENT + 1) + b"\n\ndata: b\n\n"
    assert parse(stream) == ([b"a"], b"", b"", True)
    many = b"data: a\n\n" + b"data: xxxxxxxxx\n" * (sse.MAX_EVENT // 15 + 1) + b"\ndata: b\n\n"
    assert parse(many) == ([b"a"], b"", b"", True)
    exact = b"data:" + b"x" * (sse.MAX_EVENT - 5)
    assert parse(exact + b"\n\n")[0] == [exact[5:]]
    assert parse(exact + b"x\n\n") == ([], b"", b"", True)


def test_long_line_in_small_pieces_is_not_quadratic() -> None:
    """1 MiB in pieces of 16 bytes: 65k feeds, joined once. Copying at each would move 34 GB."""
    parser = sse.Parser()
    piece = b"x" * 16
    started = time.perf_counter()
    parser.feed(b"data: ")
    for _ in range(65_000):
        assert parser.feed(piece) == []
    assert parser.feed(b"\n\n")[0] == piece * 65_000
    assert time.perf_counter() - started < 2


def test_endless_comments_cost_nothing() -> None:
    parser = sse.Parser()
    for _ in range(2000):
        assert parser.feed(b": keep-alive " + b"x" * 1000 + b"\n\n") == []
    assert not parser.failed
    assert parser.feed(b"data: a\n\n") == [b"a"]


def test_event_without_its_blank_line() -> None:
    """Faults 120: kept apart, for the translator to judge."""
    assert parse(b"data: a\n\ndata: b")[:2] == ([b"a"], b"b")
    assert parse(b"data: a\n\ndata: b\n")[:2] == ([b"a"], b"b")
    assert parse(b"data: a\n\n")[:2] == ([b"a"], b"")


def test_json_outside_of_events_is_kept_bounded() -> None:
    """Faults 129: an error in plain JSON after the events."""
    assert parse(b'data: a\n\n{"error": {\n "message": "no"\n}}')[2] == b'{"error": {\n "message": "no"\n}}'
    assert parse(b'data: a\n\n{"error":1}\n')[2] == b'{"error":1}'
    assert parse(b"{" + b"x" * sse.MAX_STRAY)[2] == b""


@pytest.mark.parametrize("payload", [b'{"a":"\xe2\x80\xa8"}', b"{}", b"[1]"])
def test_encoder_leaves_valid_payloads_untouched(payload: bytes) -> None:
    assert sse.encode(payload) == b"data: " + payload + b"\n\n"


def test_encoder_writes_json_with_line_ends_again() -> None:
    """S0-10: no bare CR or LF; numbers keep their digits."""
    assert sse.encode(b'{"a":\r\n 1.00,\n"b":"\\n"}') == b'data: {"a":1.00,"b":"\\n"}\n\n'


@pytest.mark.parametrize(
    "payload", [b'{"a":"x\ny"}', b"a\rb", b'{"a":\n', b'{"a":"\xff"\n}', b"\n", b"[" * 5000 + b"\n"]
)
def test_encoder_refuses_what_is_not_json(payload: bytes) -> None:
    """Faults 136: a raw line end inside a string is invalid JSON, not to be passed on."""
    with pytest.raises(sse.NotJson):
        sse.encode(payload)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_encoded_json_is_one_event_again(value: object) -> None:
    """Whatever the JSON, pretty-printed too: exactly one event, with the same value."""
    try:
        compact, pretty = orjson.dumps(value), orjson.dumps(value, option=orjson.OPT_INDENT_2)
    except orjson.JSONEncodeError:
        return  # lone surrogates
    for text in (compact, pretty):
        found, rest, stray, failed = one_by_one(sse.encode(text))
        assert [orjson.loads(event) for event in found] == [value]
        assert (rest, stray, failed) == (b"", b"", False)
