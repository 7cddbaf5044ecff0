"""Packing of commands."""

from collections.abc import Callable

import hiredis

#: One command as RESP bytes.
pack: Callable[[tuple[bytes | int | str, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]  # its stub knows commands of one argument only
