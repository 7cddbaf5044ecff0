"""The reader of the NATS protocol: the same operations however the bytes were cut (I11), and hostile bytes end it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bus import protocol
from shared.bus.protocol import Parser, ProtocolError

STREAM = (
    b'INFO {"max_payload":1}\r\n+OK\r\nPING\r\nMSG a.b 1 5\r\nhello\r\nMSG a.b 1 in.box 0\r\n\r\n'
    b"HMSG in.box 2 16 16\r\nNATS/1.0 503\r\n\r\n\r\nHMSG a 3 re.ply 12 17\r\nNATS/1.0\r\n\r\nhello\r\n"
    b"MSG a 1 17\r\nMSG a 1 2\r\nxx\r\nPI\r\n-ERR 'Permissions Violation'\r\nPONG\r\n"
)
EXPECTED = [
    (b"INFO", b'{"max_payload":1}'),
    (b"+OK", b""),
    (b"PING", b""),
    (b"1", b"a.b", b"", b"hello", False),
    (b"1", b"a.b", b"in.box", b"", False),
    (b"2", b"in.box", b"", b"", True),
    (b"3", b"a", b"re.ply", b"hello", False),
    (b"1", b"a", b"", b"MSG a 1 2\r\nxx\r\nPI", False),
    (b"-ERR", b"'Permissions Violation'"),
    (b"PONG", b""),
]


def collect() -> tuple[Parser, list[tuple[object, ...]]]:
    seen: list[tuple[object, ...]] = []
    return Parser(lambda *message: seen.append(message), lambda *line: seen.append(line)), seen


def test_whole() -> None:
    parser, seen = collect()
    parser.feed(STREAM)
    assert seen == EXPECTED
    assert parser.held == 0


def test_byte_by_byte() -> None:
    parser, seen = collect()
    for position in range(len(STREAM)):
        parser.feed(STREAM[position : position + 1])
    assert seen == EXPECTED


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_cut_anywhere(cuts: list[int]) -> None:
    parser, seen = collect()
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in pairwise(edges):
        parser.feed(STREAM[start:end])
    assert seen == EXPECTED


@pytest.mark.parametrize(
    "line",
    [
        b"MSG\r\n", b"MSG a\r\n", b"MSG a 1\r\n", b"MSG a 1 x\r\n", b"MSG a 1 -5\r\n", b"MSG a 1 r s 5\r\n",
        b"HMSG a 1 9 5\r\n", b"HMSG a 1 5\r\n", b"MSG a 1 %d\r\n" % (protocol.MAX_MESSAGE + 1),
    ],
)  # fmt: skip
def test_malformed_messages(line: bytes) -> None:
    parser, seen = collect()
    with pytest.raises(ProtocolError):
        parser.feed(line)
    assert not seen


def test_a_payload_of_another_length_than_its_line_says_is_noticed() -> None:
    """I6: out of step, the reader would take one request's bytes for another's."""
    parser, seen = collect()
    with pytest.raises(ProtocolError):
        parser.feed(b"MSG a 1 4\r\nhello\r\nPING\r\n")
    assert not seen


def test_a_503_with_a_payload_is_a_message_and_another_status_is_its_text() -> None:
    """JetStream ends a pull with 404, 408 or 409 and nothing else."""
    parser, seen = collect()
    parser.feed(b"HMSG a 1 16 18\r\nNATS/1.0 503\r\n\r\nhi\r\nHMSG a 1 16 16\r\nNATS/1.0 404\r\n\r\n\r\n")
    assert seen == [(b"1", b"a", b"", b"hi", False), (b"1", b"a", b"", b"NATS/1.0 404\r\n\r\n", False)]


def test_an_endless_line_is_not_kept() -> None:
    parser, _ = collect()
    for _ in range(protocol.MAX_LINE // 1000):
        parser.feed(b"x" * 1000)
    with pytest.raises(ProtocolError):
        parser.feed(b"x" * 1000)
    assert parser.held <= protocol.MAX_LINE + 1000


def test_a_large_message_in_small_pieces_is_joined_once() -> None:
    """Quadratic copying would take minutes: 32 MiB in pieces of 1 KiB."""
    parser, seen = collect()
    size = 32 * 1024 * 1024
    parser.feed(b"MSG a 1 %d\r\n" % size)
    piece = bytes(1024)
    for _ in range(size // 1024):
        parser.feed(piece)
    parser.feed(b"\r\n")
    assert len(seen) == 1
    assert len(seen[0][3]) == size  # type: ignore[arg-type]
