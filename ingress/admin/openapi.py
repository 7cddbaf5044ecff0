"""The OpenAPI 3.1 document of the admin API, made from its table. `python -m ingress.admin.openapi` prints it."""

import json
import re
from typing import Any, Final

import msgspec
from msgspec import Struct

from ingress.admin.operations import OPERATIONS, PARAMETERS, Operation

VERSION: Final = "1"
_REF: Final = "#/components/schemas/{name}"

#: What any request may get, and why.
_ALWAYS: Final = {
    400: "The request is not valid.",
    401: "Not the admin key. Failures are logged for the SIEM.",
    431: "The request's headers are too large.",
    500: "A fault of the gateway's.",
    503: "Redis does not answer, this process leaves, or it has too much to do. `Retry-After` says when to ask again.",
}
_NOT_FOUND: Final = "There is no such tenant, key or request."
_CONTRARY: Final = {409: "It contradicts what is there, or itself; the message says how."}
_WITH_BODY: Final = {413: "The body is too large.", 415: "Not application/json, or with a Content-Encoding."}


class Fault(Struct, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Failure(Struct, kw_only=True):
    """Every error has this shape, as everywhere in the gateway."""

    error: Fault


def document() -> dict[str, Any]:
    """The document as JSON values."""
    types = {each for row in OPERATIONS for each in (row.answer, row.body) if each is not None} | {Failure}
    ordered = sorted(types, key=lambda each: each.__name__)
    _, components = msgspec.json.schema_components(ordered, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for row in OPERATIONS:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row)
    paths["/openapi.json"] = {
        "get": {
            "operationId": "openapi",
            "summary": "This document",
            "responses": {
                "200": {"description": "OpenAPI 3.1.", "content": _content({"type": "object"})},
                **_errors({}),
            },
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Hotpath admin API",
            "version": VERSION,
            "description": "Tenants, keys, policies, budgets and spend. Amounts are integers of nano-USD (1 USD ="
            " 1,000,000,000), times Unix milliseconds. What is changed holds in every process within a second.",
        },
        "security": [{"adminKey": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"adminKey": {"type": "http", "scheme": "bearer", "description": "ADMIN_API_KEY"}},
            "schemas": components,
        },
    }


def _operation(row: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {"operationId": row.does, "summary": row.summary}
    parameters = [
        {
            "name": name, "in": "path", "required": True, "description": PARAMETERS[name][1],
            "schema": {"type": "string", "pattern": f"^{PARAMETERS[name][0]}$"},
        }
        for name in re.findall(r"\{(\w+)\}", row.path)
    ]  # fmt: skip
    if row.query is not None:
        parameters += _query(row.query)
    if parameters:
        found["parameters"] = parameters
    more = {404: _NOT_FOUND} if "{" in row.path or row.query is not None else {}
    if row.contrary:
        more |= _CONTRARY
    if row.body is not None:
        found["requestBody"] = {"required": True, "content": _content(_ref(row.body))}
        more |= _WITH_BODY
    good = {"description": row.summary + ".", "content": _content(_ref(row.answer))}
    found["responses"] = {str(row.status): good, **_errors(more)}
    return found


def _query(kind: type[Struct]) -> list[dict[str, Any]]:
    _, components = msgspec.json.schema_components([kind], ref_template=_REF)
    found = []
    for name, schema in components[kind.__name__]["properties"].items():
        text = schema.pop("description", "")
        found.append({"name": name, "in": "query", "required": False, "description": text, "schema": schema})
    return found


def _errors(more: dict[int, str]) -> dict[str, Any]:
    statuses = sorted((_ALWAYS | more).items())
    return {str(status): {"description": text, "content": _content(_ref(Failure))} for status, text in statuses}


def _ref(kind: type[Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def render() -> bytes:
    """As it is served, and kept in openapi.json."""
    return (json.dumps(document(), indent=1) + "\n").encode()


if __name__ == "__main__":
    print(render().decode(), end="")  # noqa: T201 - that is what it is for
