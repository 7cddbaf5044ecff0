"""`hotpath prices show`: what each part costs at each endpoint, and who says so (D20)."""

from pathlib import Path
from typing import Any

import pytest

from deploy.cli import prices, show
from deploy.cli.admin import Failed
from deploy.cli.where import Where

CATALOGUE = """
[[endpoints]]
id = "main"
provider = "openai"
base_url = "https://api.openai.com/v1"
api_key_env = "KEY"

[[endpoints]]
id = "other"
provider = "openai"
base_url = "https://api.example.com/v1"

[[models]]
name = "m"
endpoints = [
    { endpoint = "main", model = "gpt-4o-mini" },
    { endpoint = "other", model = "big", price = { input = "9", output = "1", audio_input = "20" } },
]
max_output_tokens = 100
"""


def shown(tmp_path: Path, name: str = "m", text: str = CATALOGUE, **env: str) -> dict[str, Any]:
    """What the command gives as JSON."""
    path = tmp_path / "catalog.toml"
    path.write_text(text)
    return prices.show_model(Where(tmp_path, None, {"HOTPATH_CATALOG": str(path), **env}), name)


def test_every_part_at_every_endpoint(tmp_path: Path) -> None:
    """With its source; what is reserved is the dearest of what may be called, part by part (D1)."""
    found = shown(tmp_path, KEY="sk")
    main, other = found["endpoints"]
    assert main["prices"]["cached_input"] == {"nano_usd_per_million": 75_000_000, "source": "genai-prices"}
    assert main["prices"]["cache_write_1h"] == {"nano_usd_per_million": 150_000_000, "source": "as input"}
    assert other["prices"]["audio_input"] == {"nano_usd_per_million": 20 * 10**9, "source": "catalogue"}
    assert (main["usable"], other["usable"]) == (True, True)
    reserved = found["reserved_at"]
    assert (reserved["input"], reserved["output"], reserved["audio_input"]) == (9 * 10**9, 10**9, 20 * 10**9)
    assert found["epoch"] > 0


def test_no_key_is_needed_to_look(tmp_path: Path) -> None:
    """And what has none is not reserved for."""
    found = shown(tmp_path)
    assert [row["usable"] for row in found["endpoints"]] == [False, True]
    assert found["reserved_at"]["cached_input"] == 9 * 10**9
    table = show.price_table(found)
    assert "main (no key)" in list(table.columns[0].cells)
    assert "$0.075" in list(table.columns[3].cells)


def test_what_is_not_there_or_not_priced(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no model 'n'"):
        shown(tmp_path, "n")
    with pytest.raises(Failed, match="unpriced_model"):
        shown(tmp_path, "m", CATALOGUE.replace("gpt-4o-mini", "nobody-knows"))


def test_without_a_catalogue_given_it_is_ours(tmp_path: Path) -> None:
    """The one we ship, wherever the command is called; a running simulator's own before it."""
    assert prices.show_model(Where(tmp_path, None, {}), "gpt-4o")["catalogue"].endswith("deploy/catalog.toml")
    run = {"simulator_url": "http://127.0.0.1:1"}
    assert Where(tmp_path, run, {}).catalogue() == str(tmp_path / "catalog.toml")
    assert Where(tmp_path, run, {"HOTPATH_CATALOG": "mine.toml"}).catalogue() == "mine.toml"
