"""GET /v1/models and /v1/models/{name}: what this key may ask for. A name may contain / : @ (D6)."""

from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec

from ingress.auth import Auth
from ingress.middleware import Visit
from ingress.protocol import Reply
from shared.catalog import Model
from shared.wire import errors
from shared.wire.openai import models_page

PREFIX: Final = "/v1/models/"
#: D6: 256 bytes of name, each of them three characters when percent-encoded.
_LONGEST: Final = 3 * 256

_json: Final = msgspec.json.Encoder().encode


class Models:
    """The model list, made once: the catalogue of a process does not change."""

    def __init__(self, auth: Auth, models: Mapping[str, Model]) -> None:
        self._auth = auth
        self._models = models
        self._page = models_page((model.name, model.owned_by) for model in models.values())

    async def every(self, visit: Visit) -> Reply:
        """The list. Raises Unauthorized, RegistryDown, ClientError."""
        allowed = (await self._auth.tenant(visit.request, visit.label)).models
        if not allowed:
            return visit.json(self._page)
        return visit.json(
            models_page((model.name, model.owned_by) for model in self._models.values() if model.name in allowed)
        )

    async def one(self, visit: Visit) -> Reply:
        """One model, by its exact name. Raises ModelNotFound besides."""
        allowed = (await self._auth.tenant(visit.request, visit.label)).models
        model = self._find(visit.path[len(PREFIX) :])
        if allowed and model.name not in allowed:
            raise errors.ModelNotFound
        return visit.json(model_object(model))

    def _find(self, quoted: str) -> Model:
        if len(quoted) > _LONGEST:
            raise errors.ModelNotFound
        try:
            name = unquote_to_bytes(quoted.encode("utf-8", "surrogateescape")).decode()
        except UnicodeDecodeError as error:
            raise errors.ModelNotFound from error
        model = self._models.get(name)
        if model is None:
            raise errors.ModelNotFound
        return model


def model_object(model: Model) -> bytes:
    """The model as the list shows it, alone."""
    return _json({"id": model.name, "object": "model", "created": 0, "owned_by": model.owned_by})
