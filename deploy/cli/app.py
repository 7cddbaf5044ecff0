"""Every command but `up` (which main.py starts without this). Amounts: USD for people, nano-USD integers in JSON."""

import logging
from typing import Annotated, Any, Final

import typer

from deploy.cli import admin, app_ledger, app_tenants, control, doctor, prices, show
from deploy.cli.act import Data, Json, act
from deploy.cli.where import Where

_OPTIONS: Final = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
main = typer.Typer(no_args_is_help=True, help="Hotpath: an AI gateway. Start it with `hotpath up`.", **_OPTIONS)  # type: ignore[arg-type]
priced = typer.Typer(no_args_is_help=True, help="What models cost.", rich_markup_mode=None)
main.add_typer(app_tenants.keys, name="keys")
main.add_typer(app_tenants.tenant, name="tenant")
main.add_typer(app_tenants.budget, name="budget")
main.command("spend")(app_tenants.spend)
main.add_typer(app_ledger.ledger, name="ledger")
main.command("reconcile")(app_ledger.reconcile)
main.add_typer(priced, name="prices")


@priced.command("show")
def prices_show(
    model: Annotated[str, typer.Argument(help="As clients name it.")], json_out: Json = False, data: Data = ""
) -> None:
    """Every part of its price at each endpoint, and whether the catalogue or genai-prices says so."""
    act(data, json_out, lambda w: prices.show_model(w, model), show.price_table)


@main.command()
def circuits(json_out: Json = False, data: Data = "") -> None:
    """Endpoints called within the last day: whether their circuit is open, since when and for how long."""
    act(data, json_out, admin.list_circuits, show.circuit_table)


@main.command()
def trace(
    rid: Annotated[str, typer.Argument(help="The answer's X-BR-Request-Id.")], json_out: Json = False, data: Data = ""
) -> None:
    """The processes a request went through, with their times."""
    act(data, json_out, lambda w: admin.trace(w, rid), show.trace_table)


@main.command()
def restart(
    role: Annotated[str, typer.Argument(help="ingress, guardian, routing, provider, or all.")],
    json_out: Json = False,
    data: Data = "",
) -> None:
    """Replace a role's processes one at a time; no request is lost. New code and catalogue are taken up."""

    def say(text: str) -> None:
        if not json_out:
            print(text, flush=True)

    def work(where: Where) -> dict[str, Any]:
        return {"restarted": control.restart(where.data, role, say)}

    act(data, json_out, work, lambda done: f"restarted: {', '.join(one['name'] for one in done['restarted'])}")


@main.command("doctor")
def doctor_(json_out: Json = False, data: Data = "") -> None:
    """Check this machine and what runs on it; exit code 1 when something must be done."""
    checks = act(data, json_out, doctor.examine, show.check_lines)
    if any(check["state"] == "fail" for check in checks["checks"]):
        raise typer.Exit(1)


@main.command("env")
def env(
    role: Annotated[str, typer.Option(help="Only what this role needs (systemd, Kubernetes).")] = "",
    example: Annotated[bool, typer.Option("--example", help="Every setting with its default instead.")] = False,
    json_out: Json = False,
    data: Data = "",
) -> None:
    """What a Procfile runner needs, secrets included: `hotpath env > .env`, then `honcho start`."""
    if example:
        from deploy.cli import example as examples  # noqa: PLC0415 - only needed here

        print(examples.text(), end="")
        return
    from deploy.cli import envfile  # noqa: PLC0415 - only needed here

    def text(found: dict[str, str]) -> str:
        return "\n".join(f"{name}={value}" for name, value in found.items())

    def work(_: Where) -> dict[str, str]:
        found = envfile.lines(data)
        return envfile.of_role(found, role) if role else found

    act(data, json_out, work, text)


@main.command()
def serve(what: Annotated[str, typer.Argument(help="nats, redis or simulator")], data: Data = "") -> None:
    """Run one embedded server in the foreground (deploy/Procfile.dev)."""
    from deploy.cli import serve as serving  # noqa: PLC0415 - only needed here

    act(data, json_out=False, work=lambda _: serving.run(what, data), text=str)


@main.command()
def version(json_out: Json = False, data: Data = "") -> None:
    """The versions of Hotpath and what it runs on."""
    act(data, json_out, lambda _: admin.versions(), lambda found: "\n".join(f"{k} {v}" for k, v in found.items()))


@main.command("up", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def up(context: typer.Context) -> None:
    """Run everything on this machine (`hotpath up --help`)."""
    from deploy.cli import up as starting  # noqa: PLC0415 - main.py comes here only by `hotpath --option up`

    raise typer.Exit(starting.main(context.args))


def run() -> None:
    """Parse and run the command line."""
    logging.getLogger("hotpath").addHandler(logging.NullHandler())  # what goes wrong is told by the command itself
    main(prog_name="hotpath")
