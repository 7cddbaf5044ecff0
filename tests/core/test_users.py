"""Users of a tenant as opaque ids (D6)."""

import hashlib
import hmac
import re

from shared.core.users import user_id
from shared.state.books import check_level

PEPPER = b"pepper"


def test_it_is_a_level_of_the_ledger():
    """What the ingress makes, the CLI must be able to make again."""
    made = user_id(PEPPER, "acme", "ann@example.com")
    assert re.fullmatch("[0-9a-f]{16}", made)
    assert made == hmac.new(PEPPER, b"acme\0ann@example.com", hashlib.sha256).hexdigest()[:16]
    assert check_level(f"u:{made}") == f"u:{made}"
    assert user_id(PEPPER, "acme", "") == ""


def test_tenants_and_names_do_not_run_into_one_another():
    made = {user_id(PEPPER, *pair) for pair in (("a", "bc"), ("ab", "c"), ("a", "b"), ("b", "b"), ("a", "é"))}
    assert len(made) == 5
    assert user_id(b"other", "a", "b") not in made
