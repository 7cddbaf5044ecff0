"""The catalogue is read whole or refused whole, with the path of the wrong field."""

import textwrap
from pathlib import Path

import pytest

from shared import catalog, prices
from shared.catalog import CatalogError
from shared.wire.messages import Price, Step

ENDPOINT = """
[[endpoints]]
id = "main"
provider = "openai"
base_url = "https://api.openai.com/v1"
"""
MODEL = """
[[models]]
name = "m"
endpoints = [{ endpoint = "main", model = "gpt-4o-mini" }]
max_output_tokens = 100
"""
PRICE = 'price = { input = "0.15", cached_input = "0.075", output = "0.60" }\n'
SHIPPED = Path(__file__).parent.parent / "deploy" / "catalog.toml"


def parse(text: str, **env: str) -> catalog.Catalog:
    """The catalogue of this text."""
    return catalog.parse(textwrap.dedent(text).encode(), env, Path())


def faults(text: str, **env: str) -> list[str]:
    """What is said of it."""
    with pytest.raises(CatalogError) as caught:
        parse(text, **env)
    return caught.value.errors


def test_a_whole_catalogue():
    got = parse(ENDPOINT + MODEL + PRICE)
    model = got.models["m"]
    assert model.steps == (Step("main", "gpt-4o-mini"),)
    assert model.price == Price(150_000_000, 75_000_000, 600_000_000)
    assert (model.max_output_tokens, model.encoding, model.owned_by) == (100, "o200k", "openai")
    endpoint = got.endpoints["main"]
    assert (endpoint.base_url, endpoint.key, endpoint.allow_private) == ("https://api.openai.com/v1", "", False)
    assert got.left_out == ()


@pytest.mark.parametrize(
    ("upstream", "said", "hides"),
    [
        ("gpt-4o", "", False),
        ("o4-mini", "", True),
        ("openai/gpt-5.2", "", True),
        ("mine", "true", True),
        ("o3", "false", False),
    ],
)
def test_models_that_hide_their_reasoning(upstream: str, said: str, hides: bool) -> None:
    """I1: a cut call of theirs is charged for more than was seen; the operator's word wins."""
    line = f"\nhidden_reasoning = {said}" if said else ""
    text = ENDPOINT + (
        f'[[models]]\nname = "m"\nendpoints = [{{ endpoint = "main", model = "{upstream}" }}]\n'
        f'max_output_tokens = 100\nprice = "free"{line}\n'
    )
    assert catalog.parse(text.encode(), {}, Path()).models["m"].hidden_reasoning is hides


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("x = 1", "file"),
        ("[[", "file"),
        (ENDPOINT + "x = 1", "endpoints[0]"),
        (ENDPOINT.replace('"main"', '"Main"'), "endpoints[0].id"),
        (ENDPOINT.replace('"main"', '"a\\n"'), "endpoints[0].id"),
        (ENDPOINT.replace('"main"', f'"{"a" * 33}"'), "endpoints[0].id"),
        (ENDPOINT.replace('"openai"', '"acme"'), "endpoints[0].provider"),
        (ENDPOINT + ENDPOINT, "endpoints[1].id"),
        (ENDPOINT + 'cap_field = "n"', "endpoints[0].cap_field"),
        (ENDPOINT + 'api_key_env = "A B"', "endpoints[0].api_key_env"),
        (ENDPOINT.replace("https://", "http://"), "endpoints[0].base_url"),
        (ENDPOINT.replace("https://", "ftp://"), "endpoints[0].base_url"),
        (ENDPOINT.replace("https://", "https://u:p@"), "endpoints[0].base_url"),
        (ENDPOINT.replace("/v1", "/v1?x=1"), "endpoints[0].base_url"),
        (ENDPOINT.replace("/v1", "/v1#x"), "endpoints[0].base_url"),
        (ENDPOINT.replace("/v1", "/v1?"), "endpoints[0].base_url"),
        (ENDPOINT.replace("/v1", "/v 1"), "endpoints[0].base_url"),
        (ENDPOINT.replace("/v1", "/\\r\\nX: 1"), "endpoints[0].base_url"),
        (ENDPOINT.replace("api.openai.com", "api.openai.com:99999"), "endpoints[0].base_url"),
        (ENDPOINT.replace("https://api.openai.com", "https://"), "endpoints[0].base_url"),
        (ENDPOINT + MODEL + PRICE + "x = 1", "models[0]"),
        (ENDPOINT + MODEL + PRICE + "token_safety_percent = -1", "models[0].token_safety_percent"),
        (ENDPOINT + MODEL + PRICE + MODEL + PRICE, "models[1].name"),
        (ENDPOINT + MODEL.replace('"m"', '""') + PRICE, "models[0].name"),
        (ENDPOINT + MODEL.replace('"m"', f'"{"é" * 129}"') + PRICE, "models[0].name"),
        (ENDPOINT + MODEL.replace('"m"', '"a\\u0000"') + PRICE, "models[0].name"),
        (ENDPOINT + MODEL.replace('"m"', '"a\\nb"') + PRICE, "models[0].name"),
        (ENDPOINT + MODEL.replace('"m"', "5") + PRICE, "models[0].name"),
        (ENDPOINT + MODEL.replace('"main"', '"other"') + PRICE, "models[0].endpoints[0].endpoint"),
        (ENDPOINT + MODEL.replace('"gpt-4o-mini"', '"a\\tb"') + PRICE, "models[0].endpoints[0].model"),
        (ENDPOINT + MODEL.replace("= 100", "= 0") + PRICE, "models[0].max_output_tokens"),
        (ENDPOINT + MODEL.replace("= 100", "= 1.5") + PRICE, "models[0].max_output_tokens"),
        (ENDPOINT + MODEL + "price = 5", "models[0].price"),
        (ENDPOINT + MODEL + 'price = "cheap"', "models[0].price"),
        (ENDPOINT + MODEL + PRICE.replace('"0.60"', "0.60"), "models[0].price.output"),
        (ENDPOINT + MODEL + PRICE.replace("0.60", "-1"), "models[0].price.output"),
        (ENDPOINT + MODEL + PRICE.replace("0.60", "NaN"), "models[0].price.output"),
        (ENDPOINT + MODEL + PRICE.replace("0.60", "10001"), "models[0].price.output"),
        (ENDPOINT + MODEL + PRICE.replace("0.15", "0.0000000001"), "models[0].price.input"),
        (ENDPOINT + MODEL + PRICE.replace("0.075", "1e-3"), "models[0].price.cached_input"),
        (ENDPOINT + MODEL + 'price = { input = "1" }', "models[0].price"),
    ],
)
def test_refused_with_the_path(text, path):
    assert [line.partition(":")[0] for line in faults(text)] == [path]


def test_the_same_step_twice_is_refused():
    step = '{ endpoint = "main", model = "gpt-4o-mini" }'
    assert faults(ENDPOINT + MODEL.replace(step, f"{step}, {step}") + PRICE)[0].startswith("models[0].endpoints[1]:")


def test_a_fault_does_not_repeat_a_password():
    """I9."""
    assert "hunter22" not in "".join(faults(ENDPOINT.replace("https://", "https://u:hunter22@")))


def test_known_models_are_priced_by_genai_prices():
    """D20: absent = genai-prices."""
    assert parse(ENDPOINT + MODEL).models["m"].price == Price(150_000_000, 75_000_000, 600_000_000)


@pytest.mark.parametrize("model", ["my-own-model", "gpt-5.4"])
def test_what_has_no_single_price_is_refused(model):
    """D20: unpriced_model; a price by prompt length (gpt-5.4) is none the ledger could hold to."""
    line = faults(ENDPOINT + MODEL.replace("gpt-4o-mini", model))[0]
    assert line.startswith("models[0].price: unpriced_model")


def test_the_dearest_endpoint_prices_the_model():
    """D1: at the dearest endpoint the request may reach."""
    steps = '{ endpoint = "main", model = "gpt-4o" }, { endpoint = "main", model = "gpt-4o-mini" }'
    got = parse(ENDPOINT + MODEL.replace('{ endpoint = "main", model = "gpt-4o-mini" }', steps))
    assert got.models["m"].price == Price(2_500_000_000, 1_250_000_000, 10_000_000_000)


def test_prices_may_be_free_or_without_a_cached_one():
    assert parse(ENDPOINT + MODEL + 'price = "free"').models["m"].price == Price(0, 0, 0)
    assert parse(ENDPOINT + MODEL + 'price = { input = "1", output = "2" }').models["m"].price.cached_input == 10**9


def test_an_endpoint_without_its_key_is_left_out():
    """A model with no endpoint left is not listed."""
    other = ENDPOINT.replace('"main"', '"local"').replace("https://api.openai.com", "http://127.0.0.1:1")
    text = ENDPOINT + 'api_key_env = "KEY"\n' + other + "allow_private = true\n" + MODEL + PRICE
    assert parse(text).left_out == ("main",)
    assert parse(text).why == {"main": "KEY is not set"}
    assert parse(text).models == {}
    assert set(parse(text).endpoints) == {"local"}
    assert parse(text, KEY="sk").models["m"].steps == (Step("main", "gpt-4o-mini"),)
    assert parse(text, KEY=" ").left_out == ("main",)


def test_a_key_from_a_file_beside_the_catalogue(tmp_path):
    path = tmp_path / "catalog.toml"
    path.write_text(ENDPOINT + 'api_key_env = "KEY"\napi_key_file = "openai.key"\n' + MODEL + PRICE)
    assert catalog.load(path, {}).left_out == ("main",)
    (tmp_path / "openai.key").write_text("sk-file\n")
    assert catalog.load(path, {}).endpoints["main"].key == "sk-file"
    assert catalog.load(path, {"KEY": "sk-env"}).endpoints["main"].key == "sk-env"


@pytest.mark.parametrize("key", ["a\r\nX-Admin: 1", "a b", "schlüssel", "\x00"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_unseen(key):
    lines = faults(ENDPOINT + 'api_key_env = "KEY"\n' + MODEL + PRICE, KEY=key)
    assert lines == ["endpoints[0].api_key_env: the key has characters that cannot stand in a header"]


def test_no_key_shows():
    """I9."""
    got = parse(ENDPOINT + 'api_key_env = "KEY"', KEY="sk-hunter22")
    assert "hunter22" not in repr(got)
    assert "hunter22" not in str(got.endpoints["main"])


def test_the_cap_is_named_as_the_host_wants_it():
    """OpenAI's newer models refuse max_tokens; compatible servers often know nothing else."""
    assert parse(ENDPOINT).endpoints["main"].cap_field == "max_completion_tokens"
    other = ENDPOINT.replace("api.openai.com", "api.example.com")
    assert parse(other).endpoints["main"].cap_field == "max_tokens"
    assert parse(other + 'cap_field = "max_completion_tokens"').endpoints["main"].cap_field == "max_completion_tokens"


def test_the_epoch_tells_files_apart():
    assert parse(ENDPOINT).epoch == parse(ENDPOINT).epoch != parse(ENDPOINT + "\n").epoch


def test_the_epoch_tells_prices_apart(monkeypatch):
    """The same file priced by another genai-prices is another epoch; a process without the key has the same one."""
    text = ENDPOINT + 'api_key_env = "KEY"\n' + MODEL
    before = parse(text).epoch
    assert parse(text, KEY="sk").epoch == before
    monkeypatch.setattr(prices, "known", lambda model, _: prices.of_row(prices.PriceRow(input="1", output="1"), model))
    assert parse(text).epoch != before


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(CatalogError, match="HOTPATH_CATALOG"):
        catalog.load(tmp_path / "none.toml", {})


def test_the_shipped_catalogue():
    """With a key it serves; without one nothing is listed and the key is named."""
    got = catalog.load(SHIPPED, {"OPENAI_API_KEY": "sk"})
    assert "gpt-4o-mini" in got.models
    assert catalog.load(SHIPPED, {}).why == {"openai-main": "OPENAI_API_KEY is not set"}


def test_shipped_prices_are_genai_prices_own():
    """What we ship was copied; a copy can drift."""
    got = catalog.load(SHIPPED, {"OPENAI_API_KEY": "sk"})
    for model in got.models.values():
        assert model.price == prices.known(model.steps[0].model, "https://api.openai.com/v1").price, model.name


# ---- prices by endpoint ----------------------------------------------------------------------------------------------

TWO = ENDPOINT + ENDPOINT.replace('"main"', '"other"').replace("api.openai.com", "api.example.com")


def model_of(steps: str, price: str = PRICE) -> catalog.Model:
    """One model over these steps."""
    text = f'[[models]]\nname = "m"\nendpoints = [{steps}]\nmax_output_tokens = 100\n'
    return parse(TWO + text + price).models["m"]


def test_an_endpoint_may_have_its_own_price():
    """I1: reserved at the dearest, settled at its own."""
    own = 'price = { input = "0.10", output = "0.90" }'
    got = model_of(f'{{ endpoint = "main", model = "a" }}, {{ endpoint = "other", model = "a", {own} }}')
    assert got.price == Price(150_000_000, 100_000_000, 900_000_000)
    assert got.prices == {
        "main": Price(150_000_000, 75_000_000, 600_000_000),
        "other": Price(100_000_000, 100_000_000, 900_000_000),
    }
    free = model_of('{ endpoint = "main", model = "a" }, { endpoint = "other", model = "a", price = "free" }')
    assert (free.price.output, free.prices) == (600_000_000, {"other": Price(0, 0, 0)})
    assert model_of('{ endpoint = "main", model = "a" }, { endpoint = "other", model = "a" }').prices == {}


def test_one_endpoint_with_two_models_has_two_prices():
    """I1: from genai-prices as well; the dearer one is the model's own and needs no entry."""
    got = model_of('{ endpoint = "main", model = "gpt-4o" }, { endpoint = "main", model = "gpt-4o-mini" }', "")
    assert got.prices == {"main gpt-4o-mini": Price(150_000_000, 75_000_000, 600_000_000)}
    assert [priced.price.output for priced in got.priced] == [10 * 10**9, 600_000_000]


def test_an_endpoint_without_its_key_reserves_nothing():
    """D1: the dearest the request may *reach*."""
    dear = TWO.replace('id = "other"', 'id = "other"\napi_key_env = "KEY"')
    text = (
        '[[models]]\nname = "m"\nendpoints = [{ endpoint = "main", model = "a" }, '
        '{ endpoint = "other", model = "a", price = { input = "9", output = "9" } }]\nmax_output_tokens = 100\n'
    )
    assert parse(dear + text + PRICE).models["m"].price.input == 150_000_000
    assert parse(dear + text + PRICE, KEY="sk").models["m"].price.input == 9 * 10**9


def test_every_part_has_its_source():
    """Catalogue, genai-prices, or the rule by which a part that neither gives was settled at load."""
    row = 'price = { input = "2", output = "8", cached_input = "1", audio_input = "40" }\n'
    one = model_of('{ endpoint = "main", model = "anthropic/claude-x" }', row).priced[0]
    assert one.price == Price(2 * 10**9, 10**9, 8 * 10**9, 25 * 10**8, 4 * 10**9, 40 * 10**9, 8 * 10**9)
    assert one.sources == (
        "catalogue", "catalogue", "catalogue", "input x 1.25", "input x 2", "catalogue", "as output",
    )  # fmt: skip
    audio = model_of('{ endpoint = "main", model = "gpt-audio" }', "").priced[0]
    assert (audio.price.audio_input, audio.price.audio_output) == (32 * 10**9, 64 * 10**9)
    assert audio.sources == (
        "genai-prices", "as input", "genai-prices", "as input", "as input", "genai-prices", "genai-prices",
    )  # fmt: skip


def test_anthropics_cache_writes_come_from_genai_prices():
    """Read and 5-minute writes as listed; an hour, not listed there, by Anthropic's rule."""
    got = prices.known("anthropic/claude-sonnet-4", "https://openrouter.ai/api/v1").price
    assert (got.cached_input, got.cache_write_5m, got.cache_write_1h) == (300_000_000, 3_750_000_000, 6 * 10**9)


@pytest.mark.parametrize("model", ["gpt-image-1", "gpt-5.6-luna", "claude-sonnet-4-5", "whisper-1", "moderation"])
def test_what_is_priced_by_more_than_its_tokens_is_refused(model):
    """D20: tiers by length, images dearer than text, hours."""
    url = "https://api.anthropic.com" if model.startswith("claude") else "https://api.openai.com/v1"
    with pytest.raises(prices.PriceError, match="unpriced_model"):
        prices.known(model, url)


@pytest.mark.parametrize("given", ['price = "cheap"', 'price = { input = "x", output = "1" }', "price = 5"])
def test_a_wrong_step_price_is_told_with_its_path(given):
    steps = f'{{ endpoint = "main", model = "a", {given} }}'
    line = faults(ENDPOINT + MODEL.replace('{ endpoint = "main", model = "gpt-4o-mini" }', steps) + PRICE)[0]
    assert line.startswith("models[0].endpoints[0].price")


def test_a_model_may_have_its_own_token_safety_factor():
    """A tokenizer that is not OpenAI's needs a wider bound."""
    assert parse(ENDPOINT + MODEL + PRICE).models["m"].token_safety_percent == 10
    assert parse(ENDPOINT + MODEL + PRICE + "token_safety_percent = 40").models["m"].token_safety_percent == 40
