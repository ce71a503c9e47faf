"""What a client is told when something is wrong: OpenAI's shape of errors, and its status codes."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat.errors import UserError
from nanochat.serving.requests import Busy
from nanochat.serving.seen import TooLarge

logger = logging.getLogger(__name__)
INNER = ("text", "image", "other", "str", "ImageUrl", "TextPart")  # names of alternatives, not of fields
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """status: of HTTP. param: the field that is wrong. code: a word that programs can compare."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int = 0
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def as_api_error(error: BaseException) -> ApiError:
    """What a client may know of an error. Internal ones are logged and not exposed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="rate_limit_exceeded", retry_after=error.retry_after)
    if isinstance(error, TooLarge):
        return ApiError(400, str(error), param="messages", code="image_too_large")
    if isinstance(error, UserError):
        line = " ".join(str(error).split())[:500]
        return ApiError(400, line, code="context_length_exceeded" if "do not fit the context" in line else None)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def error_body(error: ApiError) -> dict[str, Any]:
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: BaseException) -> JSONResponse:
    told = as_api_error(error)
    headers = {"Retry-After": str(told.retry_after)} if told.retry_after else {}
    if told.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(told), told.status, headers)


def of_validation(error: RequestValidationError) -> ApiError:
    """One line about the most specific thing that does not fit the schema."""
    found = max(error.errors(), key=lambda each: len(each["loc"]))
    param = ".".join(str(part) for part in found["loc"][1:] if part not in INNER and "[" not in str(part)) or None
    if found["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {found.get('ctx', {}).get('error', found['msg'])}", code="invalid_json"
        )
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    message = " ".join(found["msg"].split())[:300].removeprefix("Value error, ")
    return ApiError(
        400, f"{param}: {message}" if param else f"the body does not fit: {message}", param, "invalid_value"
    )


def install(app: FastAPI) -> None:
    """Answer every error of the app in OpenAI's shape."""

    async def told(request: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(of_validation(error))

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"there is no {request.url.path} here: /docs lists what there is",
            405: f"{request.url.path} does not take {request.method}: /docs lists what it takes",
        }.get(error.status_code, str(error.detail))
        response = error_response(ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    for kind in (ApiError, Busy, UserError, Exception):
        app.add_exception_handler(kind, told)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
