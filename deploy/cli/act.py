"""How every command is carried out: find the Hotpath, do the work, print its result, or in one line what failed."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from deploy.cli import admin, control, show
from deploy.cli.where import Where, find
from shared.settings import SettingsError

Json = Annotated[bool, typer.Option("--json", help="Print JSON; amounts are integers of nano-USD.")]
Data = Annotated[str, typer.Option("--data", metavar="DIR", help="Data directory of a running `hotpath up`.")]


def act(data: str, json_out: bool, work: Callable[[Where], Any], text: Callable[[Any], Any]) -> Any:
    """The result, printed; a failure is one line on stderr and exit code 1 (78: settings)."""
    try:
        result = work(find(data))
    except SettingsError as exc:
        print(f"hotpath: {exc}\n(is `hotpath up` running? name its directory: --data DIR)", file=sys.stderr)
        raise typer.Exit(78) from exc
    except (admin.Failed, control.Refused, ValueError, OSError) as exc:
        print(f"hotpath: {exc}", file=sys.stderr)
        raise typer.Exit(1) from exc
    if json_out:
        print(json.dumps(result))
    else:
        show.out(text(result))
    return result
