"""Token counts: exact, with the provider's own byte-pair tables (offline), and cheap upper bounds for reservations.

The tables are rs-bpe's o200k and cl100k, equal to tiktoken; loading one takes about 30 ms, once (`warm`).
"""

from typing import Final, Literal

Encoding = Literal["o200k", "cl100k"]

#: Model families that still use cl100k (tiktoken/model.py, MODEL_PREFIX_TO_ENCODING); all newer ones use o200k.
_CL100K: Final = ("gpt-4-", "gpt-3.5", "gpt-35-", "text-embedding-")


def encoding_for(model: str) -> Encoding:
    """The table of an upstream model name; o200k for names it does not know."""
    name = model.rpartition("/")[2]
    return "cl100k" if name == "gpt-4" or name.startswith(_CL100K) else "o200k"
