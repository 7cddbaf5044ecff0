"""What `hotpath ledger verify` does: shared/state/audit.py for one tenant or all."""

from typing import Any, Final

import msgspec

from deploy.cli.admin import Failed, with_state
from deploy.cli.copy import CopyUnavailable, opened, scan
from deploy.cli.where import Where
from shared.core import money
from shared.settings import Settings
from shared.state.audit import Audit, audit
from shared.state.redis import State


def verify(where: Where, tenant: str) -> dict[str, Any]:
    """{"right": bool, "copy": "" or why the second copy was not compared, "tenants": [{"tenant" (name), "lines",
    "settled", "pending", "unconfirmed", "calls", "estimated", "copied", "missing", "differences": [{"kind", "text",
    "do"}], "untold", ...}]}. Raises Failed."""

    async def work(state: State) -> dict[str, Any]:
        return await examine(state, where.settings(), await wanted(state, tenant))

    return with_state(where, work)


async def examine(state: State, settings: Settings, names: dict[str, str]) -> dict[str, Any]:
    """The same for tenants by id and name. Raises StateUnavailable."""
    why, scanned = "", None
    try:
        async with opened(settings) as copy:
            until = state.clock.now()
            scanned = await scan(copy, set(names))
    except CopyUnavailable as error:
        why = str(error)
    found = []
    for tenant in names:
        if scanned is None:
            found.append(await audit(state.ledger, tenant))
        else:
            span = (scanned.since or until, until)
            found.append(await audit(state.ledger, tenant, scanned.settlements.get(tenant, {}), span))
    rows = [{**msgspec.to_builtins(each), "tenant": names[each.tenant]} for each in found]
    return {"right": all(is_right(each) for each in found), "copy": why, "tenants": rows}


def is_right(found: Audit) -> bool:
    """Whether nothing differs."""
    return not found.differences and not found.untold


async def wanted(state: State, tenant: str) -> dict[str, str]:
    """Ids and names: of one tenant by its name, or of all. Raises Failed (there is no such tenant)."""
    if not tenant:
        return {each.tenant_id: each.tenant for each in await state.admin.list_tenants()}
    tenant_id = await state.tenant_by_name(tenant)
    if tenant_id is None:
        raise Failed(f"there is no tenant {tenant}; `hotpath keys create --tenant {tenant}` makes one")
    return {tenant_id: tenant}


_SUMS: Final = ("settled", "pending", "unconfirmed")


def text(found: dict[str, Any]) -> str:
    """A line per tenant, and under it a line per difference with what to do."""
    lines = [f"{found['copy']}: not compared"] if found["copy"] else []
    for row in found["tenants"]:
        sums = ", ".join(f"{name} {money.show_usd(row[name])}" for name in _SUMS)
        wrong = len(row["differences"]) + row["untold"]
        right = "right" if not wrong else f"{wrong} difference{'s' if wrong > 1 else ''}"
        counts = f"{row['lines']} lines of the journal, {row['calls']} calls posted, {row['copied']} of them copied"
        lines.append(f"{row['tenant']}: {right}; {counts}; {sums}")
        if row["missing"]:
            lines.append(f"  {row['missing']} calls are missing in copy (NATS was away; no fault)")
        for each in row["differences"]:
            lines.append(f"  {each['kind']}: {each['text']}")
            lines.append(f"    -> {each['do']}")
        if row["untold"]:
            lines.append(f"  and {row['untold']} more")
    return "\n".join(lines)
