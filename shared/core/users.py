"""Users of a tenant: who a request's `user` field names, as the opaque id of that user's budget level."""

import hmac
from typing import Final

LENGTH: Final = 16  # hex digits: 64 bits, for at most 10,000 users with a limit


def user_id(pepper: bytes, tenant: str, user: str) -> str:
    """HMAC-SHA-256 under KEY_PEPPER of tenant id, NUL and user field, its first 16 hex digits; "" for no user.

    No client's text becomes part of a Redis key or a subject (D6), and the same name at two tenants is two users.
    `user` must be encodable as UTF-8, as every parsed body is. Raises UnicodeEncodeError else.
    """
    if not user:
        return ""
    return hmac.digest(pepper, f"{tenant}\0{user}".encode(), "sha256").hex()[:LENGTH]
