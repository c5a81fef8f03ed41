"""Write .cog/openapi_schema.json from predict.py, byte for byte as Cog's build writes it.

Without that file Cog's server validates nothing, and outside of a Cog image nobody else writes it. The form is that
of pkg/schema/openapi_spec.go in replicate/cog, version 0.23.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import _predictor

_COMPONENTS = "#/components/schemas/"
_TIMES = ("created_at", "started_at", "completed_at")


class _InOrder(dict[str, Any]):
    """An object whose keys stay in the order of declaration; all others are sorted, as Go sorts its maps."""


def inputs(predictor: Path) -> dict[str, _predictor.Field]:
    """The inputs of predict.py in order. Raises PredictorError."""
    return _predictor.read(predictor).inputs


def write(predictor: Path, target: Path) -> None:
    """Write the schema of `predictor` to `target`, whole or not at all. Raises PredictorError."""
    text = render(_predictor.read(predictor))
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, target)
    except BaseException:
        os.unlink(part)
        raise


def is_current(predictor: Path, target: Path) -> bool:
    """Whether `target` already holds the schema of `predictor`. Raises PredictorError."""
    text = render(_predictor.read(predictor))
    try:
        return target.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def render(predictor: _predictor.Predictor) -> str:
    """The file's text: four spaces of indentation and a newline at the end."""
    return _text(_document(predictor), "") + "\n"


def _document(predictor: _predictor.Predictor) -> dict[str, Any]:
    fields = predictor.inputs.values()
    input_schema: dict[str, Any] = {
        "title": "Input",
        "type": "object",
        "properties": _InOrder((f.name, _property(f, order)) for order, f in enumerate(fields)),
    }
    if required := [f.name for f in fields if f.required]:
        input_schema["required"] = required
    schemas = _InOrder(Input=input_schema, Output=predictor.output | {"title": "Output"})
    schemas |= {f.name: _enumeration(f.name, list(f.choices), f.type) for f in fields if f.choices}
    schemas |= _fixed_schemas()
    predict: dict[str, Any] = {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": _content(_ref("PredictionRequest")),
        "responses": {"200": _response(_ref("PredictionResponse")), "422": _invalid()},
    }
    if predictor.streaming:
        predict["x-cog-streaming"] = True
    cancel = {
        "summary": "Cancel",
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [
            {"in": "path", "name": "prediction_id", "required": True, "schema": _plain("Prediction Id", "string")}
        ],
        "responses": {"200": _response({}), "422": _invalid()},
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "dev"},
        "paths": _InOrder(
            {
                "/": {"get": _simple("Root", "root__get")},
                "/health-check": {"get": _simple("Healthcheck", "healthcheck_health_check_get")},
                "/predictions": {"post": predict},
                "/predictions/{prediction_id}/cancel": {"post": cancel},
            }
        ),
        "components": {"schemas": schemas},
    }


def _property(field: _predictor.Field, order: int) -> dict[str, Any]:
    made: dict[str, Any] = {"x-order": order} | field.keywords
    if field.choices:
        made["allOf"] = [_ref(field.name)]
    else:
        made |= {"title": _title(field.name)} | field.schema
    if field.has_default:
        made["default"] = field.default
    if field.nullable:
        made["nullable"] = True
    return made


def _fixed_schemas() -> dict[str, Any]:
    """The components that every predictor has, in Cog's order."""
    times = {name: _plain(_title(name), "string") | {"format": "date-time"} for name in _TIMES}
    return {
        "PredictionRequest": _plain("PredictionRequest", "object")
        | {"properties": {"id": _plain("Id", "string"), "input": _ref("Input")}},
        "PredictionResponse": _plain("PredictionResponse", "object")
        | {
            "properties": {
                **{name: _plain(_title(name), "string") for name in ("id", "version", "status", "error", "logs")},
                **times,
                "metrics": _plain("Metrics", "object"),
                "input": _ref("Input"),
                "output": _ref("Output"),
            }
        },
        "Status": _enumeration("Status", ["starting", "processing", "succeeded", "canceled", "failed"], "string"),
        "HTTPValidationError": _plain("HTTPValidationError", "object")
        | {"properties": {"detail": _plain("Detail", "array") | {"items": _ref("ValidationError")}}},
        "ValidationError": _plain("ValidationError", "object")
        | {
            "required": ["loc", "msg", "type"],
            "properties": {
                "loc": _plain("Location", "array") | {"items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
                "msg": _plain("Message", "string"),
                "type": _plain("Error Type", "string"),
            },
        },
    }


def _title(name: str) -> str:
    """`top_p` as "Top P"."""
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _plain(title: str, kind: str) -> dict[str, Any]:
    return {"title": title, "type": kind}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _COMPONENTS + name}


def _enumeration(name: str, values: list[Any], kind: str) -> dict[str, Any]:
    return {"title": name, "description": "An enumeration.", "enum": values, "type": kind}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _response(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "Successful Response"} | _content(schema)


def _invalid() -> dict[str, Any]:
    return {"description": "Validation Error"} | _content(_ref("HTTPValidationError"))


def _simple(summary: str, operation: str) -> dict[str, Any]:
    return {"summary": summary, "operationId": operation, "responses": {"200": _response({})}}


def _text(value: Any, indent: str) -> str:
    """`value` as Go's encoding/json writes it, indented by four spaces."""
    inner = indent + "    "
    if isinstance(value, dict) and value:
        keys = list(value) if isinstance(value, _InOrder) else sorted(value)
        lines = ",\n".join(f"{inner}{_text(key, '')}: {_text(value[key], inner)}" for key in keys)
        return f"{{\n{lines}\n{indent}}}"
    if isinstance(value, list | tuple) and value:
        lines = ",\n".join(inner + _text(item, inner) for item in value)
        return f"[\n{lines}\n{indent}]"
    if isinstance(value, float):
        return _number(value)
    # Go escapes what a browser could take for markup, and two line ends of JavaScript.
    plain = json.dumps(value, ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", plain)


def _number(value: float) -> str:
    """1.0 is 1; an exponent only below 1e-6 and from 1e21."""
    if value == 0 or 1e-6 <= abs(value) < 1e21:
        return format(Decimal(repr(value)), "f").removesuffix(".0")
    return re.sub(r"e-0(\d)$", r"e-\1", repr(value))
