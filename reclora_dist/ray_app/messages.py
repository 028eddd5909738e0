"""What the scoring service takes and gives, with the words and examples of its OpenAPI page."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Split = Literal["validation", "test"]
Status = Literal["pending", "running", "done", "failed"]

Time = Annotated[int, Field(ge=-(2**53), le=2**53)]
"""Milliseconds since the epoch that every JSON reader keeps exact, and every table holds."""

MAX_TEXT = 1000
"""Characters of an id, or of a name or value in a profile, at most: errors quote them."""

Text = Annotated[str, Field(max_length=MAX_TEXT)]


def _short_names(profile: dict[str, Text]) -> dict[str, Text]:
    """Checked as a whole: the place of an error would quote a long name in full."""
    longest = max(map(len, profile), default=0)
    if longest > MAX_TEXT:
        raise ValueError(f"a field's name has {longest} characters, at most {MAX_TEXT} are taken")
    return profile


class Message(BaseModel):
    """Base of all messages: an unknown key is an error, so that a typo does not pass unseen."""

    model_config = ConfigDict(extra="forbid")


class Event(Message):
    """One event of an explicit history."""

    item: Annotated[Text, Field(description="item id as in the log")]
    rating: Annotated[float, Field(description="a rating on the log's scale")]
    time: Annotated[
        Time | None, Field(description="milliseconds since the epoch; left out in all events, their order counts")
    ] = None


class ScoreRequest(Message):
    """Candidate items for one user, who is named or described by a history."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user": "17", "candidates": ["1193", "661", "914"]},
                {
                    "history": [{"item": "1193", "rating": 5}, {"item": "661", "rating": 3}],
                    "profile": {"gender": "F"},
                    "candidates": ["914", "3408"],
                },
            ]
        }
    )

    user: Annotated[
        Text | None, Field(description="id of a user of the log, hashed if the log's are; or send history")
    ] = None
    history: Annotated[list[Event] | None, Field(description="what the user did, oldest first; or send user")] = None
    candidates: Annotated[list[Text], Field(description="item ids to score")]
    time: Annotated[
        Time | None,
        Field(description="score as of this moment (milliseconds since the epoch): later events are not seen"),
    ] = None
    profile: Annotated[
        dict[str, Text],
        AfterValidator(_short_names),
        Field(description="user fields by name, instead of the log's"),
    ] = {}


class ItemScore(Message):
    """One candidate's answer."""

    item: Annotated[str, Field(description="item id")]
    title: Annotated[str, Field(description="the item's title")]
    score: Annotated[float, Field(description="probability that the user likes the item")]


class ScoreResponse(Message):
    """Scores in the order of the candidates."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "reclora",
                    "time": 978300760001,
                    "scores": [{"item": "914", "title": "My Fair Lady (1964)", "score": 0.7312}],
                }
            ]
        }
    )

    model: Annotated[str, Field(description="name of the adapter")]
    time: Annotated[int, Field(description="the moment that was scored: only events before it were seen")]
    scores: Annotated[list[ItemScore], Field(description="one per candidate, in the order asked")]


class EvaluationRequest(Message):
    """A split to evaluate the adapter on."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"split": "validation", "limit": 500}]})

    split: Annotated[Split, Field(description="which held-out samples")]
    limit: Annotated[
        int | None, Field(ge=1, le=2**53, description="score only this many samples, the first of the split")
    ] = None


class Interval(Message):
    """A value with its 95 % bootstrap interval; null where it is undefined on these samples."""

    mean: float | None
    low: float | None
    high: float | None


class Evaluation(Message):
    """Where an evaluation stands, and its metrics once it is done."""

    id: Annotated[str, Field(description="ask for it again at /v1/evaluations/{id}")]
    split: Split
    limit: int | None
    status: Annotated[Status, Field(description="pending: waits for a free CPU")]
    samples: Annotated[int | None, Field(description="samples scored")] = None
    seconds: Annotated[float | None, Field(description="time it took, loading included")] = None
    metrics: Annotated[dict[str, Interval], Field(description="empty until done")] = {}
    error: Annotated[str | None, Field(description="why it failed")] = None


class Health(Message):
    """Answer of a service that is ready to score."""

    status: Literal["ok"] = "ok"
    model: Annotated[str, Field(description="name of the adapter")]
    users: Annotated[int, Field(description="users of the log")]
    items: Annotated[int, Field(description="items of the log")]


class Problem(Message):
    """Why a request was refused, and what to do."""

    detail: str


@dataclass(frozen=True)
class Rejected:
    """A refusal that travels between replicas as a value, so that it keeps its words."""

    detail: str
