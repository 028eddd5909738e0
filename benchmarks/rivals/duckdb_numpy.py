"""The same shards by a straightforward script: DuckDB numbers, sorts and counts; numpy retrieves, user by user.

python benchmarks/rivals/duckdb_numpy.py RAW VECTORS OUT
"""

import sys

import duckdb
from common import LIKE, write_users

SQL = """
WITH raw AS (SELECT user_id, item_id, timestamp * 1000 AS time, rating FROM read_parquet('{raw}/events/**/*.parquet')),
users AS (SELECT user_id, row_number() OVER (ORDER BY min(time), user_id) AS "user" FROM raw GROUP BY user_id),
items AS (SELECT item_id, row_number() OVER (ORDER BY min(time), item_id) AS item FROM raw GROUP BY item_id),
events AS (
    SELECT "user"::INTEGER AS "user", item::INTEGER AS item, time, rating::TINYINT AS level,
        (rating >= {like})::TINYINT AS label
    FROM raw JOIN users USING (user_id) JOIN items USING (item_id)
)
SELECT *,
    coalesce(count(*) OVER before_item, 0) AS item_events, coalesce(sum(label) OVER before_item, 0) AS item_likes,
    coalesce(count(*) OVER before_user, 0) AS user_events, coalesce(sum(label) OVER before_user, 0) AS user_likes
FROM events
WINDOW before_item AS (PARTITION BY item ORDER BY time RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING),
    before_user AS (PARTITION BY "user" ORDER BY time RANGE BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
ORDER BY "user", time, item
"""


def main(raw: str, vectors: str, out: str) -> None:
    """Raw events to CRM shards."""
    write_users(duckdb.sql(SQL.format(raw=raw, like=LIKE)).fetchnumpy(), vectors, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
