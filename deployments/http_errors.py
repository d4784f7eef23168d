"""Errors over HTTP: one shape (OpenAI's), the field named, nothing repeated of what was sent.

400 a bad value: the same request fails again. 429 the queue is full, 503 no replica answers:
try later. 500 is our bug, found in the log by its request id.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from deployments import request_ids
from deployments.resend import QueueFull
from deployments.schemas import InvalidRequest, ReplicaUnavailable, explain

logger = logging.getLogger("ray.serve")


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every error looks like."""

    error: Error


RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}}


def error_body(error: InvalidRequest) -> dict[str, Any]:
    return {
        "message": str(error),
        "type": "invalid_request_error",
        "param": error.param or None,
        "code": error.code,
    }


def answer(
    status: int, body: Mapping[str, Any], *, retry_after_s: int | None = None
) -> JSONResponse:
    headers = {"x-should-retry": "false" if retry_after_s is None else "true"}
    if retry_after_s is not None:
        headers["retry-after"] = str(retry_after_s)
    return JSONResponse({"error": body}, status, headers)


def try_later(status: int, message: str, code: str) -> JSONResponse:
    body = {"message": message, "type": "server_error", "param": None, "code": code}
    return answer(status, body, retry_after_s=1)


def internal_error(error: Exception) -> JSONResponse:
    return answer(500, internal_error_body(error))


def internal_error_body(error: Exception) -> dict[str, Any]:
    """Logs our bug under the id of its request, which is all that the client is told."""
    request_id = request_ids.current()
    logger.error("request %s failed", request_id, exc_info=error)
    return {
        "message": f"internal error, logged under request id {request_id}",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


def install_error_handlers(app: FastAPI) -> None:
    """Every error in one shape; none repeats what the client sent."""

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        body_field = getattr(request.scope.get("route"), "body_field", None)
        model = body_field.field_info.annotation if body_field else None
        return answer(400, error_body(explain(error.errors(), model)))

    @app.exception_handler(InvalidRequest)
    async def invalid(request: Request, error: InvalidRequest) -> JSONResponse:
        return answer(404 if error.code == "model_not_found" else 400, error_body(error))

    @app.exception_handler(QueueFull)
    async def busy(request: Request, error: QueueFull) -> JSONResponse:
        return try_later(429, "too many requests are waiting", "queue_full")

    @app.exception_handler(ReplicaUnavailable)
    @app.exception_handler(TimeoutError)
    async def unavailable(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, ReplicaUnavailable):
            error = ReplicaUnavailable()
        return try_later(503, error.told, error.code)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = "invalid_request_error"
        body = {"message": error.detail, "type": kind, "param": None, "code": None}
        return answer(error.status_code, body)
