"""MovieLens as GroupLens publishes it: 1M (``::`` in Latin-1), 100K (tabs and bars) and 25M (CSV)."""

from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F

from reclora_dist.contract.storage import Folder
from spark_jobs.sources.raw import RawLog, decoded, delimited, events_of, spark_path, table_of, text

_GENDERS = {"F": "female", "M": "male"}
_AGES = {"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56+"}
_JOBS = (
    "other", "academic or educator", "artist", "clerical or admin", "college student", "customer service",
    "doctor or health care", "executive or manager", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales or marketing", "scientist", "self-employed", "technician or engineer", "tradesman or craftsman",
    "unemployed", "writer",
)  # fmt: skip
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_USER_FIELDS = ("gender", "age", "job", "zip")


def movielens_1m(spark: SparkSession, folder: Folder) -> RawLog:
    """``ratings.dat``, ``movies.dat``, ``users.dat``; codes of gender, age and job become the README's words."""
    options: dict[str, str | bool] = {"sep": "::", "encoding": "ISO-8859-1", "quote": ""}
    ratings = delimited(spark, [spark_path(folder, "ratings.dat")], ["user", "movie", "rating", "time"], options)
    movies = delimited(spark, [spark_path(folder, "movies.dat")], ["movie", "title", "genre"], options)
    users = delimited(spark, [spark_path(folder, "users.dat")], ["user", "gender", "age", "job", "zip"], options)
    fields: dict[str, str | Column] = {
        "user_id": "user",
        "gender": decoded("gender", _GENDERS),
        "age": decoded("age", _AGES),
        "job": decoded("job", {str(code): word for code, word in enumerate(_JOBS)}),
        "zip": "zip",
    }
    return RawLog(
        events_of(ratings, "user", "movie", "rating", "time"),
        table_of(movies, {"item_id": "movie", "title": "title", "genre": "genre"}),
        table_of(users, fields),
        ("genre",),
        _USER_FIELDS,
    )


def movielens_100k(spark: SparkSession, folder: Folder) -> RawLog:
    """``u.data``, ``u.item`` and, where it is there, ``u.user``; genre flags become names joined by ``|``."""
    bars: dict[str, str | bool] = {"sep": "|", "encoding": "ISO-8859-1", "quote": ""}
    ratings = delimited(
        spark, [spark_path(folder, "u.data")], ["user", "movie", "rating", "time"], {"sep": "\t", "quote": ""}
    )
    flags = [f"flag{number}" for number in range(len(_GENRES))]
    movies = delimited(
        spark, [spark_path(folder, "u.item")], ["movie", "title", "released", "video", "url", *flags], bars
    )
    named = [F.when(text(flag) == "1", F.lit(genre)) for flag, genre in zip(flags, _GENRES, strict=True)]
    genre = F.nullif(F.concat_ws("|", *named), F.lit(""))
    items = table_of(movies, {"item_id": "movie", "title": "title", "genre": genre})
    events = events_of(ratings, "user", "movie", "rating", "time")
    if not folder.exists("u.user"):
        return RawLog(events, items, None, ("genre",))
    users = delimited(spark, [spark_path(folder, "u.user")], ["user", "age", "gender", "job", "zip"], bars)
    fields: dict[str, str | Column] = {
        "user_id": "user", "gender": decoded("gender", _GENDERS), "age": "age", "job": "job", "zip": "zip",
    }  # fmt: skip
    return RawLog(events, items, table_of(users, fields), ("genre",), _USER_FIELDS)


def movielens_25m(spark: SparkSession, folder: Folder) -> RawLog:
    """``ratings.csv`` and ``movies.csv``; there are no users' profiles."""
    options: dict[str, str | bool] = {"header": True, "quote": '"', "escape": '"'}
    ratings = delimited(
        spark, [spark_path(folder, "ratings.csv")], ["userId", "movieId", "rating", "timestamp"], options
    )
    movies = delimited(spark, [spark_path(folder, "movies.csv")], ["movieId", "title", "genres"], options)
    return RawLog(
        events_of(ratings, "userId", "movieId", "rating", "timestamp"),
        table_of(movies, {"item_id": "movieId", "title": "title", "genre": "genres"}),
        None,
        ("genre",),
    )
