"""The commands `keys`, `tenant`, `budget` and `spend`."""

from typing import Annotated, Any

import typer

from deploy.cli import show, tenants
from deploy.cli.act import Data, Json, act
from shared.state.policies import KeyChange

TenantName = Annotated[str, typer.Argument(help="The tenant's name.")]
Period = Annotated[str, typer.Option(help="day, month or lifetime (UTC).")]
OfKey = Annotated[
    str | None, typer.Option("--key", metavar="ID", help="Of this key of the tenant.", show_default=False)
]
OfUser = Annotated[
    str | None,
    typer.Option("--user", metavar="NAME", help="Of this user of the tenant (field `user`).", show_default=False),
]
Expires = Annotated[str | None, typer.Option(help="30d, 12h, a UTC date or time, or `never`.", show_default=False)]
Models = Annotated[
    str | None, typer.Option(help="The models it may ask for: a,b or `none` for all.", show_default=False)
]
Rpm = Annotated[int | None, typer.Option(help="Requests a minute; 0: no limit.", show_default=False)]
Tpm = Annotated[int | None, typer.Option(help="Tokens a minute; 0: no limit.", show_default=False)]

keys = typer.Typer(no_args_is_help=True, help="API keys of the tenants.", rich_markup_mode=None)
tenant = typer.Typer(no_args_is_help=True, help="What holds for a tenant.", rich_markup_mode=None)
budget = typer.Typer(no_args_is_help=True, help="What tenants spent, and their limits.", rich_markup_mode=None)


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Option("--tenant", help="The tenant the key belongs to; made if it is new.")],
    limit_usd: Annotated[str, typer.Option(help="The TENANT's limit in USD for --period.")] = "none",
    period: Period = "month",
    key_limit_usd: Annotated[str, typer.Option(help="The key's own limit in USD for --key-period.")] = "none",
    key_period: Period = "month",
    expires: Expires = None,
    models: Models = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="May publish requests over NATS (load tests).")
    ] = False,
    json_out: Json = False,
    data: Data = "",
) -> None:
    """Make a key; it is shown this once."""

    def change(now: int) -> KeyChange:
        return tenants.key_change(expires, models, rpm, tpm, now)

    def work(where: Any) -> Any:
        return tenants.create_key(
            where, name, synthetic=synthetic, limit=limit_usd, period=period, key_limit=key_limit_usd,
            key_period=key_period, change=change,
        )  # fmt: skip

    act(data, json_out, work, show.new_key)


@keys.command("list")
def keys_list(
    name: Annotated[str, typer.Option("--tenant", help="Only this tenant's.")] = "",
    json_out: Json = False,
    data: Data = "",
) -> None:
    """All keys, without their secret part."""
    act(data, json_out, lambda where: tenants.list_keys(where, name), show.key_table)


@keys.command("set")
def keys_set(
    key_id: Annotated[str, typer.Argument(help="As `keys list` shows it, or `bootstrap` (GATEWAY_API_KEY).")],
    expires: Expires = None,
    models: Models = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    json_out: Json = False,
    data: Data = "",
) -> None:
    """Change what a key may do, everywhere within 1 s; its budget: `hotpath budget set --key`."""

    def work(where: Any) -> Any:
        return tenants.set_key(where, key_id, lambda now: tenants.key_change(expires, models, rpm, tpm, now))

    act(data, json_out, work, lambda found: show.key_table({"keys": [found]}))


@keys.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="As `keys list` shows it.")], json_out: Json = False, data: Data = ""
) -> None:
    """Revoke a key, everywhere within 1 s."""
    act(data, json_out, lambda where: tenants.revoke_key(where, key_id), lambda done: f"revoked {done['key_id']}")


@tenant.command("show")
def tenant_show(name: TenantName, json_out: Json = False, data: Data = "") -> None:
    """The tenant's policy."""
    act(data, json_out, lambda where: tenants.show_tenant(where, name), show.tenant_lines)


@tenant.command("set")
def tenant_set(
    name: TenantName,
    mode: Annotated[str | None, typer.Option(help="off, observe or active.", show_default=False)] = None,
    pii: Annotated[str | None, typer.Option(help="off, flag, redact or block.", show_default=False)] = None,
    keywords: Annotated[str | None, typer.Option(help="a,b or `none`.", show_default=False)] = None,
    clamp: Annotated[
        bool | None,
        typer.Option("--clamp/--no-clamp", help="Shorten answers to the budget's headroom.", show_default=False),
    ] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    json_out: Json = False,
    data: Data = "",
) -> None:
    """Change the tenant's policy, everywhere within 1 s."""

    def work(where: Any) -> Any:
        return tenants.set_tenant(where, name, mode=mode, pii=pii, keywords=keywords, clamp=clamp, rpm=rpm, tpm=tpm)

    act(data, json_out, work, show.tenant_lines)


@budget.command("show")
def budget_show(
    name: TenantName, key: OfKey = None, user: OfUser = None, json_out: Json = False, data: Data = ""
) -> None:
    """Settled, pending and unconfirmed of the current day, month and lifetime."""
    act(data, json_out, lambda where: tenants.show_budget(where, name, key, user), show.budget_table)


@budget.command("set")
def budget_set(
    name: TenantName,
    limit_usd: Annotated[str, typer.Option(help="USD, or `none` for no limit.")],
    period: Period = "month",
    key: OfKey = None,
    user: OfUser = None,
    json_out: Json = False,
    data: Data = "",
) -> None:
    """Set or clear a limit of a tenant, or of a key or user of it."""
    act(data, json_out, lambda where: tenants.set_budget(where, name, limit_usd, period, key, user), show.budget_table)


def spend(
    name: TenantName,
    by: Annotated[str, typer.Option(help="model, key or day.")] = "model",
    days: Annotated[int, typer.Option(help="Only the last so many days (UTC); 0: all.")] = 0,
    json_out: Json = False,
    data: Data = "",
) -> None:
    """What a tenant's models, keys or days cost."""
    act(data, json_out, lambda where: tenants.spend(where, name, by, days), show.spend_table)
