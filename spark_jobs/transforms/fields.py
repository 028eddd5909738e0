"""Categorical fields to positions, and an item's words."""

import string
from collections.abc import Mapping, Sequence

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

MAX_VALUES = 200_000
"""Values of a field, at most: they lie in the manifest, and on the driver."""


def categories(
    frame: DataFrame, fields: Sequence[str], key: str = "", known: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """The distinct values of every field, sorted; by days those ``known`` already, then by first appearance and name.

    Args:
        frame: profiles.
        fields: the names of the fields.
        key: column with the profiles' position, if the values are to follow it.
        known: values that have their places already.

    Raises:
        ValueError: a field has more than about MAX_VALUES values.
    """
    if not fields:
        return {}
    sizes = frame.agg(*[F.approx_count_distinct(name).alias(name) for name in fields]).first()
    for name in fields:
        if sizes is not None and sizes[name] > MAX_VALUES:
            raise ValueError(
                f"field {name!r} has about {sizes[name]:,} values, more than {MAX_VALUES:,}, so it is no category. "
                "Leave it out of source.item_fields or source.user_fields."
            )
    pairs = F.explode(F.create_map(*[part for name in fields for part in (F.lit(name), F.col(name))]))
    place = F.col(key) if key else F.lit(0)
    found = frame.select(place.alias("place"), pairs.alias("field", "value")).where(F.col("value").isNotNull())
    rows = found.groupBy("field", "value").agg(F.min("place").alias("first")).collect()
    values = {name: list((known or {}).get(name, ())) for name in fields}
    there = {name: set(words) for name, words in values.items()}
    for row in sorted(rows, key=lambda row: (row["first"], row["value"])):
        if row["value"] not in there[row["field"]]:
            values[row["field"]].append(row["value"])
    return values


def with_fields(frame: DataFrame, values: Mapping[str, Sequence[str]]) -> DataFrame:
    """Add the column ``fields``: each value's position from 1, 0 where it is unknown (array<int>)."""
    for name, words in values.items():
        rows = [(word, position) for position, word in enumerate(words, 1)]
        table = frame.sparkSession.createDataFrame(rows, f"`{name}` string, `_{name}` int")
        frame = frame.join(F.broadcast(table), name, "left")
    places = [F.coalesce(F.col(f"_{name}"), F.lit(0)) for name in values]
    column = F.array(*places) if places else F.array().cast("array<int>")
    return frame.withColumn("fields", column).drop(*[f"_{name}" for name in values])


def worded(template: str, fields: Sequence[str]) -> Column:
    """The text of an item: ``template`` with {title} and fields filled in; an unknown value reads "unknown".

    Raises:
        ValueError: the template names a field that items do not have, or is no template.
    """
    known = ["title", *fields]
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"item_text = {template!r} is no template ({error}); write a field as {{title}}") from error
    columns = []
    for words, name, _, _ in pieces:
        columns.append(F.lit(words))
        if name is not None:
            if name not in known:
                raise ValueError(f"item_text = {template!r} names {name!r}; items have: {', '.join(known)}")
            columns.append(F.coalesce(F.col(name), F.lit("unknown")))
    return F.concat(*columns)
