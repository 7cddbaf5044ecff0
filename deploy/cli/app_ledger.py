"""The commands `ledger ...` and `reconcile`."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli import admin, show, verify
from deploy.cli import rebuild as rebuilding
from deploy.cli import reconcile as reconciling
from deploy.cli.act import Data, Json, act
from deploy.cli.where import Where

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


@ledger.command("rebuild")
def ledger_rebuild(
    tenant: Annotated[str, typer.Argument(help="Only this tenant (its id, where the registry is lost).")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing.")] = False,
    json_out: Json = False,
    data: Data = "",
) -> None:
    """Give Redis back what it lost, from journal and second copy; exit code 1 when verify is not content then."""

    def told(found: dict[str, Any]) -> str:
        return rebuilding.text(found) + ("\n" + verify.text(found["verify"]) if found["verify"] else "")

    found = act(data, json_out, lambda w: rebuilding.rebuild(w, tenant, dry_run=dry_run), told)
    if found["verify"] and not found["verify"]["right"]:
        raise typer.Exit(1)


def reconcile(
    bill: Annotated[Path, typer.Option(metavar="FILE", help="The provider's export: one JSON object a line.")],
    tenant: Annotated[str, typer.Option(help="Only this tenant's calls.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out lines that cannot be read.")] = False,
    post_unknown: Annotated[str, typer.Option(metavar="TENANT", help="Charge calls nobody knows to this one.")] = "",
    complete: Annotated[
        str,
        typer.Option(
            metavar="all|FROM/UNTIL",
            help="The bill has EVERY call of EVERY provider in this time (UTC): close at 0 what it does not mention and"
            " was never certain (unconfirmed, estimated). Wait until the providers' exports cover the time.",
        ),
    ] = "",
    json_out: Json = False,
    data: Data = "",
) -> None:
    """Put the books right by a provider's bill, and say by how much they were off (0 when right)."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def work(where: Where) -> Any:
        span = reconciling.span(complete, int(time.time() * 1000)) if complete else None
        options = reconciling.Options(
            tenant=tenant, dry_run=dry_run, skip_bad=skip_bad, post_unknown=post_unknown, complete=span
        )
        return reconciling.reconcile(where, bill, options, say)

    act(data, json_out, work, reconciling.text)
