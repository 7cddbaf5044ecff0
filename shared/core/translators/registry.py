"""Which dialect a provider kind of the catalogue speaks."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from shared.core.translators.base import Dialect
from shared.core.translators.openai import OpenAI

DIALECTS: Final[Mapping[str, Dialect]] = MappingProxyType({"openai": OpenAI()})


def dialect(provider: str) -> Dialect:
    """Raises KeyError for a kind the catalogue does not allow either."""
    return DIALECTS[provider]
