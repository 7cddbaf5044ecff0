"""What `hotpath prices` does: every part of a model's price at each endpoint, and where it comes from (D20)."""

from importlib import metadata
from typing import Any, Final

from deploy.cli.admin import Failed
from deploy.cli.where import Where
from shared.catalog import CatalogError
from shared.catalog import load as load_catalog
from shared.core import pricing
from shared.prices import PARTS

MAX_NAMED: Final = 20  # models in an error


def show_model(where: Where, name: str) -> dict[str, Any]:
    """Nano-USD per million tokens. Endpoints without their key are shown too: `usable` false; the model's own price,
    at which requests are reserved, is the dearest of those that are usable. Raises Failed."""
    path = where.catalogue()
    try:
        catalog = load_catalog(path, where.env, keyless=True)
    except CatalogError as exc:
        raise Failed(f"{path} is refused:\n{exc}") from exc
    model = catalog.models.get(name)
    if model is None:
        some = ", ".join(sorted(catalog.models)[:MAX_NAMED])
        raise Failed(f"{path} has no model {name!r}; of its {len(catalog.models)}: {some}")
    rows = [
        (step, priced, step.endpoint not in catalog.left_out)
        for step, priced in zip(model.steps, model.priced, strict=True)
    ]
    usable = [priced.price for _, priced, is_usable in rows if is_usable] or [priced.price for _, priced, _ in rows]
    reserved = pricing.dearest(usable)
    return {
        "model": name,
        "catalogue": path,
        "epoch": catalog.epoch,
        "genai_prices": metadata.version("genai-prices"),
        "reserved_at": {part: getattr(reserved, part) for part in PARTS},
        "endpoints": [
            {
                "endpoint": step.endpoint,
                "model": step.model,
                "usable": is_usable,
                "prices": {
                    part: {"nano_usd_per_million": getattr(priced.price, part), "source": source}
                    for part, source in zip(PARTS, priced.sources, strict=True)
                },
            }
            for step, priced, is_usable in rows
        ],
    }
