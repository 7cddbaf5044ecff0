"""What is read ahead of the parser: every bound at its edge, however the bytes are cut (faults 45, 59, 60, 63)."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingress.framing import (
    FREE_CHUNKS,
    LEAST_CHUNK,
    MAX_CHUNK_LINE,
    MAX_HEAD,
    MAX_TRAILERS,
    BadFraming,
    Framing,
)

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
PLAIN = b"POST / HTTP/1.1\r\nHost: x\r\ncontent-LENGTH:\t 12 \r\nX: y\r\n\r\n0123\r\n\r\n4567"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-encoding: chunked\r\n\r\n"
BODY = b'A;a=b\r\n0123456789\r\n001 ; x="\xe9"\r\nx\r\n0\r\n\r\n'
TRAILED = b"5\r\n0\r\n\r\n\r\n0;last\r\nX-Sum: 1\r\nX: 2\r\n\r\n"
#: Bodies that look like heads, heads that follow at once, empty lines before a request line (RFC 9112 2.2).
STREAM = GET + PLAIN + CHUNKED + BODY + b"\r\n" + GET + CHUNKED + TRAILED + PLAIN + GET


def fed(pieces: list[bytes]) -> Framing:
    """After these pieces."""
    framing = Framing()
    for piece in pieces:
        framing.feed(piece)
    return framing


def at_rest(framing: Framing) -> bool:
    """Between two requests: a head above the bound is noticed at exactly its length."""
    framing.feed(b"a" * MAX_HEAD)
    with pytest.raises(BadFraming) as caught:
        framing.feed(b"aaaa")  # three of them could be the head's end
    return caught.value.head


def test_byte_by_byte() -> None:
    assert at_rest(fed([STREAM[at : at + 1] for at in range(len(STREAM))]))


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_any_cuts(cuts: list[int]) -> None:
    """I11 of the door: the reading does not depend on how the bytes were cut."""
    edges = [0, *sorted(cuts), len(STREAM)]
    assert at_rest(fed([STREAM[low:high] for low, high in itertools.pairwise(edges)]))


@given(st.lists(st.integers(1, 5000), max_size=20), st.integers(1, 700))
def test_any_chunks(sizes: list[int], step: int) -> None:
    body = b"".join(b"%x\r\n" % size + b"\r" * size + b"\r\n" for size in sizes) + b"0\r\n\r\n"
    data = CHUNKED + body + GET
    assert at_rest(fed([data[at : at + step] for at in range(0, len(data), step)]))


@pytest.mark.parametrize("step", [1 << 20, 7, 1])
def test_a_length_with_many_zeros(step: int) -> None:
    """The parser reads it (51: leading zeros), so it is read here; else the body's head would announce a body that is
    none, and no bound would hold for what follows."""
    body = b"POST / HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n"
    data = b"POST / HTTP/1.1\r\nContent-Length: %b%d\r\n\r\n%b" % (b"0" * 40, len(body), body)
    assert at_rest(fed([data[at : at + step] for at in range(0, len(data), step)]))


@pytest.mark.parametrize("step", [1 << 20, 4096, 1])
def test_bounds(step: int) -> None:
    """Each bound is served at its length and refused one byte above, whole or in pieces."""
    line = b"1;" + b"x" * (MAX_CHUNK_LINE - 4)
    trailer = b"X: " + b"y" * (MAX_TRAILERS - 3)
    pairs = [
        (GET[:-4] + b"z" * (MAX_HEAD - len(GET) + 4) + b"\r\n\r\n", GET[:-4] + b"z" * MAX_HEAD + b"\r\n\r\n"),
        (CHUNKED + line + b"\r\nx\r\n0\r\n\r\n", CHUNKED + line + b"x\r\nx\r\n0\r\n\r\n"),
        (CHUNKED + b"0\r\n" + trailer + b"\r\n\r\n", CHUNKED + b"0\r\n" + trailer + b"y\r\n\r\n"),
    ]
    for good, bad in pairs:
        assert at_rest(fed([good[at : at + step] for at in range(0, len(good), step)]))
        with pytest.raises(BadFraming):
            fed([bad[at : at + step] for at in range(0, len(bad), step)])


def test_many_chunks() -> None:
    """Small ones are free up to a number; from there on their average counts."""
    tiny = b"1\r\nx\r\n"
    fed([CHUNKED, tiny * FREE_CHUNKS, b"0\r\n\r\n"])
    with pytest.raises(BadFraming):
        fed([CHUNKED, tiny * (FREE_CHUNKS + 1)])
    least = b"%x\r\n" % LEAST_CHUNK + b"x" * LEAST_CHUNK + b"\r\n"
    assert at_rest(fed([CHUNKED, least * (FREE_CHUNKS * 2), b"0\r\n\r\n"]))


@pytest.mark.parametrize(
    "line",
    [
        b"5;\nhello\r\n",
        b"5\nhello\r\n",
        b"g\r\n",
        b"-1\r\n",
        b"5 5\r\n",
        b"11111111111111111\r\n",
        b";x\r\n",
        b"5;\x00\r\n",
    ],
)
def test_chunk_lines_that_are_none(line: bytes) -> None:
    with pytest.raises(BadFraming):
        fed([CHUNKED + line])


def test_an_endless_chunk_line_is_refused_before_it_ends() -> None:
    fed([CHUNKED + b"5;" + b"x" * (MAX_CHUNK_LINE - 3)])
    with pytest.raises(BadFraming):
        fed([CHUNKED + b"5;" + b"x" * (MAX_CHUNK_LINE - 2)])
