"""The description of the HTTP door, as ``/api/openapi.json`` gives it."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from toolkit.health.report import Status, Verdict
from toolkit.monitor.orders import MOST_DATASETS, PATTERNS
from toolkit.run_record import RunState

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER = {"type": "number"}
_STATE = {"type": "string", "enum": [state.value for state in RunState]}


def _or_null(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


def _object(properties: dict[str, Any], *, required: list[str] | None = None) -> dict[str, Any]:
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed}


def _answer(meaning: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"schema": schema}}}


def _schema(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _errors(**meanings: str) -> dict[str, Any]:
    """Answers with a sentence, by status; those that any path may give included."""
    every = {
        "s403": "It was sent by a foreign page, or the monitor is read-only.",
        "s405": "This path does not serve that method.",
        "s500": "The monitor or its disk has a fault.",
    }
    both = {**every, **meanings}
    return {name[1:]: _answer(both[name], _schema("Error")) for name in sorted(both)}


_SILENT = "The Redis server cannot be asked."

_CHANGES = {
    "s400": "The body says something that is not allowed.",
    "s401": "The token is missing or wrong.",
    "s408": "The body did not come in time.",
    "s413": "The body is too large.",
    "s415": "The body is not application/json.",
    "s503": _SILENT,
}

_BOOKS = (
    "found",
    "indexed",
    "duplicates",
    "failed",
    "excluded",
    "pending",
    "embedded",
    "reused",
    "kept",
)

_RUN = {
    "run_id": _TEXT,
    "index": _TEXT,
    "state": _STATE,
    **{name: {"type": "integer"} for name in _BOOKS},
    "batches": {"type": "object", "additionalProperties": _COUNT},
    "fallback_reason": _or_null(_TEXT),
    "moves": {"type": "array", "items": {"type": "object"}},
    "recall_at_10": _or_null(_NUMBER),
    "fidelity": _or_null(_TEXT),
    "seconds": _NUMBER,
    "error": _or_null(_TEXT),
    "host": _TEXT,
    "encoder": _TEXT,
    "road": _TEXT,
    "device": _TEXT,
    "started": _NUMBER,
    "ended": _or_null(_NUMBER),
    "stage": _TEXT,
    "done": _COUNT,
    "total": _COUNT,
    "rate": _NUMBER,
    "eta_s": _or_null(_NUMBER),
    "is_here": {"type": "boolean"},
}

_CHECK = {
    "name": _TEXT,
    "status": {"type": "string", "enum": [status.value for status in Status]},
    "detail": _TEXT,
    "cure": _or_null(_TEXT),
    "latency_ms": _or_null(_NUMBER),
}

_SCHEMAS = {
    "Error": _object(
        {"error": {**_TEXT, "description": "What is wrong, in one sentence."}, "run_id": _TEXT},
        required=["error"],
    ),
    "BuildOrder": {
        **_object(
            {
                "dataset_names": {
                    "type": "array",
                    "description": "Folders of the datasets folder.",
                    "items": _TEXT,
                    "minItems": 1,
                    "maxItems": MOST_DATASETS,
                    "uniqueItems": True,
                },
                "distributed": {
                    "type": "boolean",
                    "default": True,
                    "description": "Use the workers if they work, else this machine.",
                },
                "pretrained": {
                    "type": "boolean",
                    "default": True,
                    "description": "Whether with the model's own weights; else random ones.",
                },
                "name": {
                    **_TEXT,
                    "pattern": PATTERNS["name"],
                    "description": "The index; by default the datasets' names joined by +.",
                },
                "model": {
                    **_TEXT,
                    "pattern": PATTERNS["model"],
                    "description": "A timm name; by default TOOLKIT_MODEL.",
                },
            },
            required=["dataset_names"],
        ),
        "additionalProperties": False,
        "example": {"dataset_names": ["1", "2"], "distributed": True},
    },
    "Nothing": {"type": "object", "maxProperties": 0, "additionalProperties": False},
    "Told": _object({"run_id": _TEXT, "index": _TEXT, "state": _STATE, "url": _TEXT}),
    "Run": _object(_RUN),
    "RunWithFailures": _object(
        {**_RUN, "failures": {"type": "array", "items": {"type": "object"}}}
    ),
    "Health": _object(
        {
            "verdict": _or_null({"type": "string", "enum": [v.value for v in Verdict]}),
            "reason": _or_null(_TEXT),
            "checks": {"type": "array", "items": _object(_CHECK)},
            "age_s": {"type": "number", "minimum": 0},
        }
    ),
}


def _get(name: str, meaning: str, schema: dict[str, Any], **errors: str) -> dict[str, Any]:
    answers = {"200": _answer("As it is now.", schema), **_errors(**errors)}
    return {"operationId": name, "summary": meaning, "responses": answers}


def _post(name: str, meaning: str, order: str, **errors: str) -> dict[str, Any]:
    body = {"application/json": {"schema": _schema(order)}}
    answers = {"202": _answer("It was asked for.", _schema("Told"))}
    return {
        "operationId": name,
        "summary": meaning,
        "requestBody": {"required": True, "content": body},
        "responses": {**answers, **_errors(**_CHANGES, **errors)},
        "security": [{}, {"token": []}],
    }


_RUN_ID = {
    "name": "run_id",
    "in": "path",
    "required": True,
    "schema": {**_TEXT, "pattern": PATTERNS["run_id"]},
}

_NO_RUN = "There is no such run."

#: The whole description.
DESCRIPTION: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "Image index toolkit: monitor",
        "version": metadata.version("image-index-toolkit"),
    },
    "paths": {
        "/api/build_index": {
            "post": _post(
                "build_index",
                "Start a build that outlives the monitor.",
                "BuildOrder",
                s404="There is no such dataset.",
                s409="The index is being built by the run named.",
                s422="The run named failed before it was running; later ends are in the run.",
                s429="Another build is being started; try again in a moment.",
            )
        },
        "/api/runs": {
            "get": _get(
                "runs",
                "The live runs, then the newest.",
                {"type": "array", "items": _schema("Run")},
            )
        },
        "/api/runs/{run_id}": {
            "parameters": [_RUN_ID],
            "get": _get("run", "One run.", _schema("RunWithFailures"), s404=_NO_RUN, s503=_SILENT),
        },
        "/api/runs/{run_id}/cancel": {
            "parameters": [_RUN_ID],
            "post": _post(
                "cancel",
                "Ask a run to stop.",
                "Nothing",
                s404=_NO_RUN,
                s409="The run has ended already.",
            ),
        },
        "/api/health": {"get": _get("health", "The doctor's quick look.", _schema("Health"))},
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "What Prometheus reads.",
                "responses": {
                    "200": {
                        "description": "Prometheus' text format.",
                        "content": {"text/plain": {"schema": _TEXT}},
                    },
                    **_errors(),
                },
            }
        },
    },
    "components": {
        "schemas": _SCHEMAS,
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    },
}
