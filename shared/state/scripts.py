"""The Lua scripts: loaded from lua/ once, run by digest, loaded again into a server that forgot them (NOSCRIPT)."""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

from hiredis import ReplyError
from msgspec import Struct

from shared.state.base import NotApplied
from shared.state.pipeline import Pipeline
from shared.state.resp import pack

_FOLDER: Final = Path(__file__).parent / "lua"
#: What stands in front of every ledger script, in this order; and what further parts some of them stand on. Each script
#: gets only what it needs: a function that is defined costs 0.3 us in each run, called or not.
LEDGER: Final = ("_balances", "_entries")
_PARTS: Final = {
    "reserve": ("_sweep", "_open", "_rated", "_rates"),
    "dispatch": ("_open",),
    "topup": ("_open",),
    "settle": ("_post", "_rated"),
    "correct": ("_post",),
    "void": ("_rated",),
    "expire": ("_sweep",),
}

#: A line of Lua that names numbers: local NUMBER, COST = 1, 4
_NAMED: Final = re.compile(r"^local ([A-Z_]+(?:, [A-Z_]+)*) = (-?[\d.e-]+(?:, -?[\d.e-]+)*)(?= --|$)", re.MULTILINE)


class Script(Struct, frozen=True):
    """One script: its whole text and the digest Redis knows it by."""

    name: str
    text: bytes
    digest: bytes


@cache
def load(name: str, *prelude: str) -> Script:
    """lua/<name>.lua, with the fragments lua/<prelude>.lua between its shebang and its body."""
    shebang, _, body = (_FOLDER / f"{name}.lua").read_text("utf-8").partition("\n")
    shared = [(_FOLDER / f"{part}.lua").read_text("utf-8") for part in prelude]
    text = _written_out("\n".join([shebang, *shared, body])).encode()
    return Script(name, text, digest(text))


def _written_out(text: str) -> str:
    """The script with its named numbers in place of their names, outside strings.

    Each local of the script that a function refers to is an object of its own in every run: 2 us with all the places of
    an entry, in a script of 16 (measured: five percent of reserve + dispatch + settle).
    """
    numbers: dict[str, str] = {}
    for line in _NAMED.finditer(text):
        numbers.update(zip(line[1].split(", "), line[2].split(", "), strict=True))
    if not numbers:
        return text
    text = _NAMED.sub("", text)
    word = re.compile(rf"'[^'\n]*'|\b(?:{'|'.join(numbers)})\b")
    return word.sub(lambda found: numbers.get(found[0], found[0]), text)


def ledger_script(name: str) -> Script:
    """A script of the ledger, with the parts it stands on."""
    return load(name, *LEDGER, *_PARTS.get(name, ()))


def digest(text: bytes) -> bytes:
    """What Redis names a script by: its SHA-1 in hex, an address, not a safeguard."""
    return hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()


class Scripts:
    """Runs scripts on the pipelined connection."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._loading: set[bytes] = set()

    async def run(self, script: Script, keys: tuple[bytes, ...], args: tuple[bytes | int, ...], within: float) -> Any:
        """The script's answer. Raises StateUnavailable: no answer within so many seconds; NotApplied: an error reply.

        NOSCRIPT means that nothing ran, so loading the script and asking again is no retry in the ledger's sense.
        """
        give_up = self._pipeline.now() + within
        tail = (len(keys), *keys, *args)
        reply = await self._pipeline.send(pack((b"EVALSHA", script.digest, *tail)), within)
        if _forgotten(reply):
            self._load(script)  # on one connection the load has run before the digest is looked up again
            again = pack((b"EVALSHA", script.digest, *tail))
            try:
                reply = await self._pipeline.send(again, give_up - self._pipeline.now())
            finally:
                self._loading.discard(script.digest)
        if _forgotten(reply):  # flushed again in between
            reply = await self._pipeline.send(pack((b"EVAL", script.text, *tail)), give_up - self._pipeline.now())
        if type(reply) is ReplyError:
            raise NotApplied(f"{script.name}: {reply}")
        return reply

    def _load(self, script: Script) -> None:
        """One load serves all the calls that found the script gone."""
        if script.digest not in self._loading:
            self._loading.add(script.digest)
            self._pipeline.cast(pack((b"SCRIPT", b"LOAD", script.text)))


def _forgotten(reply: Any) -> bool:
    return type(reply) is ReplyError and str(reply).startswith("NOSCRIPT")
