"""What an operator's keywords may be, and when two texts are the same word. `pii.keywords` looks for them.

Apart from the engine, so that whoever stores a policy can check it without loading one.
"""

import re
from collections.abc import Sequence
from typing import Final

MAX_KEYWORDS: Final = 1000
MAX_KEYWORD_CHARS: Final = 128
_WITHIN: Final = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]"
_AT_ENDS: Final = r"[^\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
#: No control characters and no separators of lines or paragraphs; no white space at the ends. Also good as JSON Schema.
PATTERN: Final = f"^{_AT_ENDS}({_WITHIN}*{_AT_ENDS})?$"
#: Keywords that end in one another (`card`, `credit card`) are all found at one place: more than this many of them at
#: one place would make the work many times the text.
MAX_NESTED: Final = 4

_KEYWORD: Final = re.compile(PATTERN)


def check_keywords(words: Sequence[str]) -> None:
    """Raises ValueError, which says which word is wrong (by its place, the text of a policy is not for logs)."""
    if len(words) > MAX_KEYWORDS:
        raise ValueError(f"at most {MAX_KEYWORDS} keywords, these are {len(words)}")
    for place, word in enumerate(words, 1):
        if not 0 < len(word) <= MAX_KEYWORD_CHARS:
            raise ValueError(f"keyword {place}: 1 to {MAX_KEYWORD_CHARS} characters, this has {len(word)}")
        if not _KEYWORD.fullmatch(word):
            raise ValueError(f"keyword {place}: no control characters, and no space around it")
    folded = sorted({fold(word)[::-1] for word in words})
    nested: list[str] = []
    for word in folded:  # in this order all that end in a word follow it
        while nested and not word.startswith(nested[-1]):
            nested.pop()
        nested.append(word)
        if len(nested) > MAX_NESTED:
            raise ValueError(f"more than {MAX_NESTED} keywords end in one another")


def fold(text: str) -> str:
    """Lower case, as many characters as before."""
    return text.lower() if text.isascii() else text.replace("\u0130", "i").lower().replace("\u03c2", "\u03c3")
