"""Personal data and keywords: found, left alone, replaced (S2-28, S2-30); linear (faults 149), silent (I9)."""

import re
import time
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.core import pii
from shared.core.keywords import MAX_NESTED, check_keywords, fold
from shared.core.pii import patterns, validators
from shared.core.pii.engine import NumberFinder, Scanner
from shared.core.pii.keywords import Automaton

WORDS = ("Acme", "new york", "new", "c++", "v", "0", "email", "機密", "größe")
SCANNER = Scanner(pii.Policy(pii="redact", keywords=WORDS))
PLAIN = Scanner(pii.Policy(pii="redact"))

# ---- what is one -----------------------------------------------------------------------------------------------------

FOUND = {
    "email": [
        "foo@example.com", "first.last+tag@mail.example.co.uk", "O'Brien@x.ie", "a_b%c@xn--bcher-kva.xn--p1ai",
        "jürgen@münchen.de", "x@a-b.io",
    ],
    "phone": [
        "555-123-4567", "(415) 555-2671", "(415)555-2671", "415.555.2671", "415 555 2671", "415 555-2671",
        "1-800-555-0199", "+1 (415) 555-2671", "+14155552671", "+1-415-555-2671", "+44 20 7946 0958",
        "+49 (0)30 901820", "+33 1 42 68 53 00", "+4915112345678", "415\u2011555\u20112671", "+49\u00a030\u00a0901820",
    ],
    "ssn": ["123-45-6789", "123 45 6789", "123\u201145\u20116789"],
    "credit_card": [
        "4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "5555555555554444", "2223003122003222",
        "378282246310005", "3782 822463 10005", "30569309025904", "6011111111111117", "3530111333300000",
        "4222222222222", "6212345678901232", "4111\u00a01111\u00a01111\u00a01111",
    ],
    "ip": [
        "192.168.1.1", "8.8.8.8", "203.0.113.195", "1.2.3.4", "2001:db8::1", "fe80::1ff:fe23:4567:890a",
        "2001:0db8:85a3:0000:0000:8a2e:0370:7334", "FD00::1234",
    ],
}  # fmt: skip
AROUND = ["{}", "it is {}.", "({})", '"{}"', "x: {}, and", "是{}。", "\\n{}\\n", "<{}>", "a={};"]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_found_whatever_stands_around(kind, text):
    """S2-28."""
    for around in AROUND:
        whole = around.format(text)
        assert [(whole[span.start : span.end], span.kind) for span in PLAIN.find(whole)] == [(text, kind)], whole


@pytest.mark.parametrize(
    ("text", "kind", "part"),
    [
        ("card 4111 1111 1111 1111 123 exp", "credit_card", "4111 1111 1111 1111"),  # its security code
        ("1234 4111 1111 1111 1111", "credit_card", "4111 1111 1111 1111"),
        ("my phone number is 4155552671", "phone", "4155552671"),
        ('{"phone_number": "030/901820"}', "phone", "030/901820"),
        ("call me at 06 12 34 56 78", "phone", "06 12 34 56 78"),
        ("SSN: 123456789", "ssn", "123456789"),
        ('"ssn":"123456789"', "ssn", "123456789"),
        ("phone 4111111111111111", "credit_card", "4111111111111111"),
        ("tel 192.168.100.200", "ip", "192.168.100.200"),
        ("http://192.168.1.1:8080/x", "ip", "192.168.1.1"),
        ("\\nfoo@example.com", "email", "foo@example.com"),
        ("mailto:foo@example.com?subject=x", "email", "foo@example.com"),
        ("2001:db8::1: port unreachable", "ip", "2001:db8::1"),
        ("+1 415 555 2671 2024", "phone", "+1 415 555 2671"),
        ("card_4111111111111111", "credit_card", "4111111111111111"),
    ],
)  # fmt: skip
def test_found_in_context(text, kind, part):
    assert [(text[span.start : span.end], span.kind) for span in PLAIN.find(text)] == [(part, kind)]


@pytest.mark.parametrize(
    "text",
    [
        "1764123072 1764123072123 1764123072123456789", "2026-11-26 02:11:12.123456", "20261126021112",
        "build v1.2.3.4, version 1.2.3.4, ==1.2.3.4, ~=10.2.3.4", "1.2.3.4.5",
        "255.255.255.0 10.0.0.0/8 127.0.0.1 0.0.0.0",
        "300.1.2.3 01.2.3.4", "0.4111111111111111 3.141592653589793", "4111111111111112", "a4111111111111111",
        "41111111111111110000", "000-12-3456 666-12-3456 900-12-3456 123-00-4567 123-45-0000", "123456789",
        "4155552671",
        "std::string a::b dead::beef 12:34:56 00:1a:2b:3c:4d:5e", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
        "12345678-1234-1234-1234-123456789012", "ISBN 978-3-16-148410-0", "git diff @@ -1,5 +1,7 @@",
        "logo@2x.png @decorator",
        "a@b @x.com foo@bar", "x +25000000 +0530 UTC+02:00", "100 200 3000", "phone 2026-11-26 10",
        "smartphone 1234567", "+14155552671234",
        "lat 52.5200066 lon 13.4049540", "$1,234,567.89 1 000 000", "phone_id: 1234567", "1e+12345678901",
    ],
)  # fmt: skip
def test_left_alone(text):
    """Timestamps, ids, versions, fractions, hashes."""
    assert PLAIN.scan([text]) == ()


@given(st.text("0123456789", min_size=12, max_size=18))
def test_luhn_holds_for_one_check_digit(digits):
    assert sum(validators.luhn(digits + last) for last in "0123456789") == 1


def test_a_policy_that_is_off_looks_for_nothing():
    scanner = pii.compile_policy(pii.Policy(pii="off", keywords=("acme",)))
    assert scanner.scan(["acme foo@example.com"]) == ()


def test_findings_are_kinds_and_counts():
    """I9: never what was found."""
    findings = SCANNER.scan(["a@b.co and c@d.co", "ACME", "123-45-6789"])
    assert findings == (pii.Finding("email", 2), pii.Finding("keyword", 1), pii.Finding("ssn", 1))


# ---- keywords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ACME acme_x xacme acme.", ["ACME", "acme"]),
        ("New York, newer new yorker", ["New", "New York", "new"]),  # `new` inside of what is no `new york`
        ("c++ c+ C++11 xc++", ["c++", "C++"]),
        ("这是機密文件", ["機密"]),
        ("GRÖẞE größe Größen", ["GRÖẞE", "größe"]),
        ("x" * 65_530 + " acme acme " + "é" * 65_530 + " acme", ["acme"] * 3),  # across the chunks
        ("[REDACTED:email] email", ["email"]),
    ],
)
def test_keywords_are_whole_words_in_any_case(text, found):
    spans = sorted(Automaton(WORDS).find(text))
    assert sorted(text[start:end] for start, end in spans) == sorted(found)


@given(
    st.lists(st.text("ab -Σé機", min_size=1, max_size=4), min_size=1, max_size=6).map(
        lambda words: [word.strip() for word in words if word.strip()]
    ),
    st.text("abAB -_.ΣςéÉ機İ1", max_size=40),
)
def test_keywords_agree_with_looking_everywhere(words, text):
    def letter(char: str) -> bool:
        return (char.isalnum() or char == "_") and char != "機"

    try:
        automaton = Automaton(words or ["a"])
    except ValueError as exc:
        assert str(MAX_NESTED) in str(exc)  # noqa: PT017
        return
    folded = fold(text)
    expected = {
        (start, start + len(word))
        for word in map(fold, words or ["a"])
        for start in range(len(text))
        if folded.startswith(word, start)
        and not any(
            0 < place < len(text) and letter(text[place - 1]) and letter(text[place])
            for place in (start, start + len(word))
        )
    }
    assert set(automaton.find(text)) == expected


def test_folding_keeps_every_place():
    """Spans of the folded text are spans of the text."""
    assert all(len(fold(chr(code))) == 1 for code in range(0x20000))


@pytest.mark.parametrize(
    "words",
    [["a"] * 1001, ["a" * 129], [""], [" a"], ["a\nb"], ["a\x00"], ["d", "cd", "bcd", "abcd", "xabcd"]],
)
def test_keywords_have_bounds(words):
    with pytest.raises(ValueError, match="keyword"):
        check_keywords(words)
    check_keywords(["x" * 128, *(f"word {number}" for number in range(999))])


# ---- bodies ----------------------------------------------------------------------------------------------------------


def body(*messages: Any, **fields: Any) -> bytes:
    return orjson.dumps({"model": "acme/new", "messages": list(messages), **fields})


def called(arguments: str) -> dict[str, Any]:
    call = {"id": "a@b.co", "type": "function", "function": {"name": "acme", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_every_text_is_redacted_and_nothing_else():
    """S2-30. Ids, names of functions, schema words, the model and images are not texts."""
    tool = {
        "type": "function",
        "function": {
            "name": "acme",
            "description": "mail a@b.co",
            "parameters": {"properties": {"new": {"type": "string", "default": "x@y.co"}}, "required": ["new"]},
        },
    }  # fmt: skip
    image = {"type": "image_url", "image_url": {"url": "https://x.co/a@b.co"}}
    text = {"type": "text", "text": "ip 192.168.1.1"}
    sent = body(
        {"role": "user", "name": "a@b.co", "content": "SSN 123-45-6789, ACME"},
        {"role": "user", "content": [text, image]},
        {"role": "tool", "tool_call_id": "a@b.co", "content": "+14155552671"},
        tools=[tool], tool_choice={"type": "function", "function": {"name": "acme"}}, metadata={"name": "a@b.co"},
        user="a@b.co", temperature=0.1, stop=["acme"],
    )  # fmt: skip
    redacted = pii.redact_body(sent, SCANNER)
    places = [
        (b'"name":"a@b.co"', b'"name":"[REDACTED:email]"'),
        (b"SSN 123-45-6789, ACME", b"SSN [REDACTED:ssn], [REDACTED:keyword]"),
        (b"ip 192.168.1.1", b"ip [REDACTED:ip]"),
        (b"+14155552671", b"[REDACTED:phone]"),
        (b"mail a@b.co", b"mail [REDACTED:email]"),
        (b"x@y.co", b"[REDACTED:email]"),
        (b'"user":"a@b.co"', b'"user":"[REDACTED:email]"'),
    ]
    expected = sent
    for before, after in places:
        assert before in sent
        expected = expected.replace(before, after)
    assert redacted.body == expected
    assert {finding.kind: finding.count for finding in redacted.findings} == {
        "email": 5, "ssn": 1, "keyword": 1, "ip": 1, "phone": 1,
    }  # fmt: skip
    assert pii.scan_body(sent, SCANNER) == redacted.findings


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{ "to": "a@b.co",\n "n": 1.50 }', '{ "to": "[REDACTED:email]",\n "n": 1.50 }'),
        (r'{"to": "a\u0040b.co\nx", "y": "\u00fc"}', r'{"to": "[REDACTED:email]\nx", "y": "\u00fc"}'),
        ('{"card": 4111111111111111}', '{"card": "[REDACTED:credit_card]"}'),
        ('{"a@b.co": [-0, null, true]}', '{"[REDACTED:email]": ["[REDACTED:keyword]", null, true]}'),
        (r'{"x": "\"acme\" \\ 123-45-6789"}', r'{"x": "\"[REDACTED:keyword]\" \\ [REDACTED:ssn]"}'),
        ("not json a@b.co", "not json [REDACTED:email]"),
        ('{"broken": "a@b.co', '{"broken": "[REDACTED:email]'),
    ],
)
def test_arguments_stay_json(arguments, expected):
    redacted = pii.redact_body(body(called(arguments)), SCANNER)
    assert redacted.body == body(called(expected))


def test_what_redaction_uncovers_is_redacted_too():
    """`v 1.2.3.4` is a version, until the keyword `v` is gone."""
    redacted = pii.redact_body(body({"role": "user", "content": "v 1.2.3.4"}), SCANNER)
    assert orjson.loads(redacted.body)["messages"][0]["content"] == "[REDACTED:keyword] [REDACTED:ip]"


def test_a_text_that_goes_on_matching_is_refused(monkeypatch):
    monkeypatch.setattr("shared.core.pii.body.ROUNDS", 2)
    with pytest.raises(pii.Unredactable):
        pii.redact_body(body({"role": "user", "content": "v 1.2.3.4"}), SCANNER)


PIECES = st.sampled_from([
    *(text for texts in FOUND.values() for text in texts), *WORDS, "a@b.co", "1", "12", "123", "4567", "415", "555",
    "0000", "4111", "1111", "13.5", "+", "-", ".", " ", "(", ")", "/", ":", "::", "@", "x", "é", "機", "\\n", "\n", '"',
    "\\", "phone ", "tel: ", "ssn ", "version ", "v", "[REDACTED:email]", "[", "{", "}", "]", "\x00", "=",
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=12).map("".join)
VALUES = st.recursive(
    TEXTS | st.integers(0, 10**19) | st.floats(allow_nan=False, allow_infinity=False) | st.none(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXTS, values, max_size=3),
    max_leaves=5,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    arguments = draw(VALUES.map(lambda value: orjson.dumps({"x": value}, option=orjson.OPT_INDENT_2).decode()))
    return body(
        {"role": "user", "content": draw(TEXTS)},
        {"role": "user", "name": draw(TEXTS), "content": [{"type": "text", "text": draw(TEXTS)}]},
        called(arguments),
        documents=[draw(TEXTS)],
    )


def shape(value: Any) -> Any:
    """A body without its texts."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value)


@settings(max_examples=250, deadline=None)
@given(bodies())
def test_redacted_means_that_nothing_matches(sent):
    redacted = pii.redact_body(sent, SCANNER)
    assert pii.scan_body(redacted.body, SCANNER) == ()
    assert (redacted.body is sent) == (redacted.findings == ()) == (pii.scan_body(sent, SCANNER) == ())
    assert shape(orjson.loads(redacted.body)) == shape(orjson.loads(sent))
    orjson.loads(orjson.loads(redacted.body)["messages"][2]["tool_calls"][0]["function"]["arguments"])


# ---- the gate --------------------------------------------------------------------------------------------------------


@settings(max_examples=250, deadline=None)
@given(TEXTS)
@example("4111 1111 1111 1111 1111 1111")
@example("\\fe80::1ff:fe23:4567:890a")  # a backslash and `f`: no escape
@example("2671::(415) 555-2671")  # the end of one match stands before the next
def test_the_gate_misses_nothing(text):
    """Wherever a pattern holds, something was found; and no match is longer than its pattern says (for streaming)."""
    framed = b"\0" + text.encode() + b"\0"
    found = [(start + 1, end + 1) for start, end, _ in NumberFinder(patterns.PATTERNS).find(framed[1:-1])]
    for before in re.finditer(b"(?=(" + patterns.BEFORE + b"))", framed, re.DOTALL):
        place = before.end(1)
        if patterns.decimals_end(framed, place) > place:
            continue
        for pattern in patterns.PATTERNS:
            match = pattern.regex.match(framed, place)
            span = pattern.check(match) if match else None
            if match and span:
                assert any(start < span[1] and span[0] < end for start, end in found), (text, pattern.kind)
                assert len(framed[span[0] : match.end()].decode()) <= pattern.longest
                assert framed[place] in pattern.first


@pytest.mark.parametrize(
    "unit",
    [" 1.1.1.1", " 999.1.1.1", "a@b.co ", " 212-555-0123", " tel 1234567", "4111 1111 1111 1112 ", "acme ", "v "],
)
def test_a_text_made_of_candidates_is_given_up(unit):
    """On an event loop: 40 KiB of addresses took 70 ms there. What a person writes is read to its end."""
    for scanner in (SCANNER, Scanner(pii.Policy(pii="flag", keywords=WORDS))):
        whole = body({"role": "user", "content": unit * (32_768 // len(unit))})
        with pytest.raises(pii.Laborious):
            pii.scan_body(whole, scanner, pii.Effort(pii.ON_LOOP_CANDIDATES))
        with pytest.raises(pii.Laborious):
            pii.redact_body(whole, scanner, pii.Effort(pii.ON_LOOP_CANDIDATES))
        some = body({"role": "user", "content": unit * 50 + "x" * 16_384})
        effort = pii.Effort(pii.ON_LOOP_CANDIDATES)
        assert pii.redact_body(some, scanner, effort) == pii.redact_body(some, scanner)


HOSTILE = [
    "4", "4111 ", "4111-1111-1111-1112 ", "a@b.", "a@", "@", "a" * 64 + "@" + "b" * 63 + ".", "000-12-3456 ", "phone ",
    "phone 2020-11-11 1", "+9(9(9(", "1.2.3.0 ", "2001:", "2001::1:: ", "(415) 555-000", "a@b.co ", "1.", "\\n", '{"',
    "acme", "v", "İ", "ab ", "[REDACTED:email]", "[", "-", "123-45-6789 ",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_linear_whatever_the_text(unit):
    """faults 149: four times the text costs four times as much, not sixteen."""
    took = []
    for size in (8_192, 32_768):
        sent = body({"role": "user", "content": unit * (size // len(unit))})
        best = 9.0
        for _ in range(4):
            began = time.process_time()
            pii.redact_body(sent, SCANNER)
            best = min(best, time.process_time() - began)
        took.append(best)
    small, large = took
    assert large < max(9 * small, 0.005)
