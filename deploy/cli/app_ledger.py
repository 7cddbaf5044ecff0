"""The commands `ledger ...`."""

from typing import Annotated

import typer

from deploy.cli import admin, show, verify
from deploy.cli.act import Data, Json, act

Tenant = Annotated[str, typer.Argument(help="The tenant's name.")]

ledger = typer.Typer(no_args_is_help=True, help="Every call and its money.", rich_markup_mode=None)


@ledger.command("show")
def ledger_show(
    tenant: Tenant,
    rid: Annotated[str, typer.Argument(help="Only this request (X-BR-Request-Id).")] = "",
    json_out: Json = False,
    data: Data = "",
) -> None:
    """A tenant's calls: state, what was held, what it cost."""
    act(data, json_out, lambda w: admin.show_ledger(w, tenant, rid), show.ledger_table)


@ledger.command("verify")
def ledger_verify(
    tenant: Annotated[str, typer.Argument(help="Only this tenant.")] = "", json_out: Json = False, data: Data = ""
) -> None:
    """Whether journal, balances, entries, leases and the second copy agree; exit code 1 when they do not."""
    found = act(data, json_out, lambda w: verify.verify(w, tenant), verify.text)
    if not found["right"]:
        raise typer.Exit(1)
