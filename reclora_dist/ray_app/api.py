"""The HTTP face of the service: a FastAPI application over two backends; it knows neither Ray nor models."""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

import reclora_dist
from reclora_dist.config.schema import ServeConfig
from reclora_dist.ray_app.messages import (
    Evaluation,
    EvaluationRequest,
    Health,
    Problem,
    Rejected,
    ScoreRequest,
    ScoreResponse,
)
from reclora_dist.telemetry import names
from reclora_dist.telemetry.meters import Meters

_DESCRIPTION = (
    "Scores candidate items for a user with one RecLoRA adapter, and evaluates the adapter on held-out samples. "
    'Every refusal is `{"detail": ...}` with the offending value and the remedy.'
)
_PROBLEMS: dict[int | str, dict[str, Any]] = {422: {"model": Problem, "description": "the request cannot be answered"}}
_SHOWN = 80
_CANCELLED = "cancelled"

log = logging.getLogger(__name__)


class Scoring(Protocol):
    """Scores requests, several at a time."""

    async def score(self, request: ScoreRequest) -> ScoreResponse | Rejected:
        """Answer or refuse one request."""

    async def health(self) -> Health:
        """Say what is being served."""


class Evaluations(Protocol):
    """Runs evaluations in the background."""

    async def start(self, request: EvaluationRequest) -> Evaluation | Rejected:
        """Accept or refuse an evaluation."""

    async def find(self, identifier: str) -> Evaluation | None:
        """Where an evaluation stands; None where there is none of that id."""


def build_api(scoring: Scoring, evaluations: Evaluations, config: ServeConfig, meters: Meters) -> FastAPI:
    """The application with all routes. Request bodies are never logged."""
    api = FastAPI(title="RecLoRA scoring service", version=reclora_dist.__version__, description=_DESCRIPTION)
    api.add_exception_handler(RequestValidationError, _malformed)
    api.middleware("http")(_measured(meters))
    _add_scoring(api, scoring, config)
    _add_evaluations(api, evaluations)
    return api


def _add_scoring(api: FastAPI, scoring: Scoring, config: ServeConfig) -> None:
    @api.post("/v1/score", response_model=ScoreResponse, responses=_PROBLEMS, summary="Score candidates for a user")
    async def score(request: ScoreRequest) -> Any:
        too_long = _too_long(request, config)
        answer = Rejected(too_long) if too_long else await scoring.score(request)
        return _refusal(422, answer.detail) if isinstance(answer, Rejected) else answer

    @api.get("/healthz", summary="Whether the service is ready to score")
    async def healthz() -> Health:
        return await scoring.health()


def _add_evaluations(api: FastAPI, evaluations: Evaluations) -> None:
    busy: dict[int | str, dict[str, Any]] = {429: {"model": Problem, "description": "too many unfinished evaluations"}}
    unknown: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "no such evaluation"}}

    @api.post(
        "/v1/evaluations",
        response_model=Evaluation,
        status_code=202,
        responses=_PROBLEMS | busy,
        summary="Evaluate the adapter in the background",
    )
    async def start(request: EvaluationRequest) -> Any:
        answer = await evaluations.start(request)
        return _refusal(429, answer.detail) if isinstance(answer, Rejected) else answer

    @api.get(
        "/v1/evaluations/{identifier}",
        response_model=Evaluation,
        responses=unknown,
        summary="Status and metrics of an evaluation",
    )
    async def find(identifier: str) -> Any:
        found = await evaluations.find(identifier)
        if found is None:
            return _refusal(404, f"evaluation {identifier!r} is unknown: start one with POST /v1/evaluations")
        return found


def _too_long(request: ScoreRequest, config: ServeConfig) -> str:
    """Why a request is too large; empty if it is not."""
    parts = [("candidates", len(request.candidates), config.max_candidates)]
    parts.append(("history events", len(request.history or ()), config.max_history))
    for what, found, limit in parts:
        if found > limit:
            return f"{found} {what}, this service takes at most {limit}: send fewer, or raise the limit in its config"
    return ""


def _refusal(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


async def _malformed(request: Request, error: Exception) -> Response:
    """One sentence for a body that does not have the request's form."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    place = ".".join(str(part) for part in first.get("loc", ()))[:_SHOWN]  # an unknown key may be long
    found = repr(first.get("input"))
    shown = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…"
    return _refusal(422, f"{place}: {first.get('msg', error)}, found {shown}; /docs shows the form of a request")


def _measured(meters: Meters) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    """Middleware that counts and times requests, and answers 500 without details where an answer failed.

    A request that Ray Serve gives up (no replica in time, or the client has gone) has status ``cancelled``.
    """

    async def middleware(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        start, status = time.perf_counter(), _CANCELLED
        try:
            response = await answer(request)
            status = str(response.status_code)
        except Exception:  # the service's edge: the client gets 500, the log gets the traceback
            log.exception("request failed: %s %s", request.method, _endpoint(request))
            response = _refusal(500, "the service failed on this request; its log says why")
            status = "500"
        finally:  # asyncio.CancelledError is no Exception: it goes on from here
            endpoint = _endpoint(request)
            meters.add(names.SERVE_REQUESTS, endpoint=endpoint, status=status)
            meters.observe(names.SERVE_LATENCY_SECONDS, time.perf_counter() - start, endpoint=endpoint)
        return response

    return middleware


def _endpoint(request: Request) -> str:
    """The matched path template, so that ids and stray paths do not become label values."""
    return getattr(request.scope.get("route"), "path", "other")
