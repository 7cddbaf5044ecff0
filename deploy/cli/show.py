"""How results look to people: tables by rich on a terminal, plain lines otherwise."""

import time
from typing import TYPE_CHECKING, Any, Final

from shared.core import money

if TYPE_CHECKING:  # rich costs 45 ms, and whoever asks for JSON needs none of it
    from rich.table import Table

#: Columns when the output goes to a file or a pipe: nothing is wrapped or cut there.
PLAIN_WIDTH: Final = 250


def out(what: Any) -> None:
    """Print a table or text; text goes out exactly as it is (a `.env` must not be wrapped)."""
    if isinstance(what, str):
        print(what)
    else:
        from rich.console import Console  # noqa: PLC0415 - see above

        console = Console()
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
        console.print(what)


def _table(*names: str) -> "Table":
    from rich.table import Table  # noqa: PLC0415 - see above

    return Table(*names, box=None, pad_edge=False, header_style="bold")


def _usd(nano: int | None) -> str:
    return "-" if nano is None else money.show_usd(nano)


def new_key(made: dict[str, Any]) -> str:
    """The key, this once."""
    return f"{made['key']}\n(key id {made['key_id']}, tenant id {made['tenant_id']}; the key is not shown again)"


def key_table(found: dict[str, Any]) -> "Table":
    """One row per key."""
    table = _table("key id", "tenant", "made", "expires", "models", "rpm", "tpm", "")
    for key in found["keys"]:
        notes = [word for word in ("synthetic", "revoked") if key[word]]
        table.add_row(
            key["key_id"], key["tenant"], _time(key["created"]), _time(key["expires"]), " ".join(key["models"]),
            _rate(key["rpm"]), _rate(key["tpm"]), ", ".join(notes),
        )  # fmt: skip
    return table


def _time(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(ms / 1000)) if ms else ""


def _rate(number: int) -> str:
    return str(number) if number else ""


def tenant_lines(found: dict[str, Any]) -> str:
    """One line per setting."""
    rows = {
        "tenant": f"{found['tenant']} (id {found['tenant_id']}{', synthetic' if found['synthetic'] else ''})",
        "mode": found["mode"],
        "pii": found["pii"],
        "keywords": ", ".join(found["keywords"]) or "none",
        "clamp": "yes" if found["clamp"] else "no",
        "requests a minute": _rate(found["rpm"]) or "no limit",
        "tokens a minute": _rate(found["tpm"]) or "no limit",
    }
    return "\n".join(f"{name:<18} {value}" for name, value in rows.items())


def budget_table(found: dict[str, Any]) -> "Table":
    """One row per level and period, in USD."""
    table = _table("tenant", "level", "period", "settled", "pending", "unconfirmed", "limit")
    of = found.get("key") or found.get("user") or ""
    for level in found["levels"]:
        amounts = (_usd(level[name]) for name in ("settled", "pending", "unconfirmed", "limit"))
        table.add_row(found["tenant"], f"{level['level']} {of}".strip(), level["period"], *amounts)
    return table


def spend_table(found: dict[str, Any]) -> "Table":
    """One row per model, key or day, and the sum."""
    counts = [
        name for name in ("requests", "input_tokens", "output_tokens") if any(name in row for row in found["rows"])
    ]
    held = [name for name in ("pending", "unconfirmed") if any(name in row for row in found["rows"])]
    table = _table(found["by"], "settled", *held, *(name.replace("_", " ") for name in counts))
    for row in found["rows"]:
        amounts = (_usd(row.get(name)) for name in ("settled", *held))
        table.add_row(row["name"], *amounts, *(str(row.get(name, "")) for name in counts))
    table.add_row("total", _usd(found["settled"]))
    return table


def ledger_table(found: dict[str, Any]) -> "Table":
    """One row per upstream call."""
    table = _table("request", "call", "state", "held", "cost", "")
    for entry in found["entries"]:
        note = "estimated" if entry["estimated"] else ""
        table.add_row(
            entry["rid"], str(entry["call"]), entry["state"], _usd(entry["amount"]), _usd(entry["cost"]), note
        )
    return table


def circuit_table(found: dict[str, Any]) -> "Table":
    """One row per endpoint."""
    table = _table("endpoint", "state", "failures in a row", "open for", "may be called in", "probe", "last minute")
    for row in found["circuits"]:
        times = (
            "" if row[name] is None else f"{row[name] / 1000:.1f} s" for name in ("open_ms", "wait_ms", "probe_ms")
        )
        minute = f"{row['failed']} of {row['calls']} failed"
        table.add_row(row["endpoint"], row["state"], str(row["failures"]), *times, minute)
    return table


def trace_table(found: dict[str, Any]) -> "Table":
    """One row per process."""
    table = _table("role", "instance", "pid", "at (UTC)", "own work")
    for hop in found["hops"]:
        at = time.strftime("%H:%M:%S", time.gmtime(hop["at"] / 1000)) + f".{hop['at'] % 1000:03d}"
        table.add_row(hop["role"], hop["instance"], str(hop["pid"]), at, f"{hop['took_us'] / 1000:.2f} ms")
    return table


def price_table(found: dict[str, Any]) -> "Table":
    """A row for each part at each endpoint, in USD per million tokens."""
    table = _table("endpoint", "model", "part", "USD per million", "from")
    table.caption = f"{found['catalogue']}, epoch {found['epoch']}; genai-prices {found['genai_prices']}"
    for row in found["endpoints"]:
        endpoint = row["endpoint"] if row["usable"] else f"{row['endpoint']} (no key)"
        for part, price in row["prices"].items():
            table.add_row(endpoint, row["model"], part, _usd(price["nano_usd_per_million"]), price["source"])
            endpoint = ""
    for part, nano in found["reserved_at"].items() if len(found["endpoints"]) > 1 else ():
        table.add_row("reserved at" if part == "input" else "", "", part, _usd(nano), "the dearest")
    return table


def check_lines(found: dict[str, Any]) -> str:
    """One line per check; what to do stands under it."""
    checks = found["checks"]
    wide = max(len(check["name"]) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check['state']:<4}  {check['name']:<{wide}}  {check['found']}")
        if check["do"]:
            lines.append(f"{'':<{wide + 8}}-> {check['do']}")
    return "\n".join(lines)
