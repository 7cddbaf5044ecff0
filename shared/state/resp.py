"""Packing of commands."""

from typing import cast

import hiredis


def pack(command: tuple[bytes | int | str, ...]) -> bytes:
    """One command as RESP bytes."""
    return hiredis.pack_command(cast("tuple[bytes]", command))  # hiredis's stub knows commands of one argument only
