"""The HTTP face alone: no Ray, no model."""

import asyncio
from collections import Counter

import httpx
import pytest
from fastapi.testclient import TestClient

from reclora_dist.config.schema import ServeConfig
from reclora_dist.ray_app.api import build_api
from reclora_dist.ray_app.messages import (
    Evaluation,
    EvaluationRequest,
    Health,
    ItemScore,
    Rejected,
    ScoreRequest,
    ScoreResponse,
)
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.telemetry.names import Metric


class Backend:
    """Scores every item with the length of its id; refuses user `bad`, fails on user `broken`, never answers `late`."""

    def __init__(self) -> None:
        self.waits = asyncio.Event()

    async def score(self, request: ScoreRequest) -> ScoreResponse | Rejected:
        if request.user == "bad":
            return Rejected("user 'bad' is not in the log: send the user's history instead")
        if request.user == "broken":
            raise RuntimeError("secret detail")
        if request.user == "late":
            self.waits.set()
            await asyncio.sleep(3600)
        scores = [ItemScore(item=item, title="", score=1 / len(item)) for item in request.candidates]
        return ScoreResponse(model="m", time=request.time or 0, scores=scores)

    async def health(self) -> Health:
        return Health(model="m", users=1, items=2)

    async def start(self, request: EvaluationRequest) -> Evaluation | Rejected:
        if request.limit == 1:
            return Rejected("8 evaluations are unfinished, the most allowed: wait for one to end")
        return Evaluation(id="e1", split=request.split, limit=request.limit, status="pending")

    async def find(self, identifier: str) -> Evaluation | None:
        return Evaluation(id="e1", split="test", limit=None, status="running") if identifier == "e1" else None


class CountingMeters(NullMeters):
    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.timed: Counter[str] = Counter()

    def add(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        super().add(metric, value, **labels)
        self.requests[labels["endpoint"], labels["status"]] += int(value)

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        super().observe(metric, value, **labels)
        self.timed[labels["endpoint"]] += 1


@pytest.fixture
def meters() -> CountingMeters:
    return CountingMeters()


@pytest.fixture
def client(meters: CountingMeters) -> TestClient:
    backend = Backend()
    return TestClient(build_api(backend, backend, ServeConfig(max_candidates=3, max_history=2), meters))


def test_scores_come_in_the_order_asked(client: TestClient) -> None:
    answer = client.post("/v1/score", json={"user": "u", "candidates": ["ccc", "a", "bb"], "time": 5})
    assert answer.status_code == 200
    assert [s["item"] for s in answer.json()["scores"]] == ["ccc", "a", "bb"]
    assert answer.json()["time"] == 5


def test_a_refusal_keeps_the_librarys_words(client: TestClient) -> None:
    answer = client.post("/v1/score", json={"user": "bad", "candidates": ["a"]})
    assert answer.status_code == 422
    assert answer.json() == {"detail": "user 'bad' is not in the log: send the user's history instead"}


MALFORMED = {
    "candidates missing": ({"user": "u"}, "body.candidates: Field required"),
    "number as id": ({"user": "u", "candidates": [7]}, "body.candidates.0: Input should be a valid string, found 7"),
    "typo": ({"user": "u", "candidates": ["a"], "tiem": 3}, "body.tiem: Extra inputs are not permitted, found 3"),
    "rating as word": (
        {"history": [{"item": "a", "rating": "good"}], "candidates": ["a"]},
        "body.history.0.rating: Input should be a valid number, unable to parse string as a number, found 'good'",
    ),
    "a time beyond int64": (
        {"user": "u", "candidates": ["a"], "time": 10**30},
        "body.time: Input should be less than or equal to 9007199254740992",
    ),
    "a time that no table holds": (
        {"history": [{"item": "a", "rating": 1, "time": -(2**63)}], "candidates": ["a"]},
        "body.history.0.time: Input should be greater than or equal to -9007199254740992",
    ),
    "a long user": (
        {"user": "u" * 1001, "candidates": ["a"]},
        "body.user: String should have at most 1000 characters, found 'uuu",
    ),
    "a long candidate": (
        {"user": "u", "candidates": ["a", "b" * 1001]},
        "body.candidates.1: String should have at most 1000 characters, found 'bbb",
    ),
    "a long item": (
        {"history": [{"item": "a" * 1001, "rating": 1}], "candidates": ["a"]},
        "body.history.0.item: String should have at most 1000 characters, found 'aaa",
    ),
    "a long profile value": (
        {"user": "u", "candidates": ["a"], "profile": {"gender": "F" * 1001}},
        "body.profile.gender: String should have at most 1000 characters, found 'FFF",
    ),
    "a long profile key": (
        {"user": "u", "candidates": ["a"], "profile": {"g" * 100_000: "F"}},
        "body.profile: Value error, a field's name has 100000 characters, at most 1000 are taken, found {'ggg",
    ),
    "too many candidates": ({"user": "u", "candidates": ["a"] * 4}, "4 candidates, this service takes at most 3"),
    "long history": (
        {"history": [{"item": "a", "rating": 1}] * 3, "candidates": ["a"]},
        "3 history events, this service takes at most 2",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_gets_one_sentence(client: TestClient, case: str) -> None:
    body, words = MALFORMED[case]
    answer = client.post("/v1/score", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(words)
    assert len(answer.json()["detail"]) < 400


def test_a_body_that_is_no_json_is_refused_and_not_echoed_in_full(client: TestClient) -> None:
    answer = client.post("/v1/score", content=b"x" * 10_000, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert len(answer.json()["detail"]) < 300


def test_a_failure_shows_no_detail_to_the_client(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    answer = client.post("/v1/score", json={"user": "broken", "candidates": ["private"]})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the service failed on this request; its log says why"}
    assert "secret detail" in caplog.text
    assert "private" not in caplog.text


def test_evaluations_are_accepted_found_and_limited(client: TestClient) -> None:
    started = client.post("/v1/evaluations", json={"split": "validation"})
    assert (started.status_code, started.json()["status"]) == (202, "pending")
    assert client.get("/v1/evaluations/e1").json()["status"] == "running"
    unknown = client.get("/v1/evaluations/e2")
    assert (unknown.status_code, unknown.json()["detail"][:27]) == (404, "evaluation 'e2' is unknown:")
    assert client.post("/v1/evaluations", json={"split": "test", "limit": 1}).status_code == 429
    wrong = client.post("/v1/evaluations", json={"split": "train"})
    assert wrong.json()["detail"].startswith("body.split: Input should be 'validation' or 'test', found 'train'")
    beyond = client.post("/v1/evaluations", json={"split": "test", "limit": 10**30})
    assert beyond.status_code == 422
    assert beyond.json()["detail"].startswith("body.limit: Input should be less than or equal to 9007199254740992")


def test_a_request_that_ray_serve_gives_up_is_counted_and_timed(meters: CountingMeters) -> None:
    backend = Backend()
    transport = httpx.ASGITransport(build_api(backend, backend, ServeConfig(), meters))

    async def give_up() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            body = {"user": "late", "candidates": ["a"]}
            asked = asyncio.create_task(client.post("/v1/score", json=body))
            await backend.waits.wait()
            asked.cancel()
            await asked

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(give_up())
    assert meters.requests == {("/v1/score", "cancelled"): 1}
    assert meters.timed == {"/v1/score": 1}


def test_requests_are_counted_by_route_and_status(client: TestClient, meters: CountingMeters) -> None:
    client.get("/healthz")
    client.get("/v1/evaluations/e1")
    client.get("/v1/evaluations/e2")
    client.get("/no/such/path")
    client.post("/v1/score", json={"user": "broken", "candidates": ["a"]})
    assert meters.requests == {
        ("/healthz", "200"): 1,
        ("/v1/evaluations/{identifier}", "200"): 1,
        ("/v1/evaluations/{identifier}", "404"): 1,
        ("other", "404"): 1,
        ("/v1/score", "500"): 1,
    }


def test_the_openapi_page_has_every_route_with_examples(client: TestClient) -> None:
    page = client.get("/openapi.json").json()
    assert set(page["paths"]) == {"/v1/score", "/healthz", "/v1/evaluations", "/v1/evaluations/{identifier}"}
    assert page["components"]["schemas"]["ScoreRequest"]["examples"]
    assert client.get("/docs").status_code == 200
