"""What cluster/spark says to Spark is something that Spark knows."""

import re
from pathlib import Path

from pyspark.sql import SparkSession

from spark_jobs import session

CONF = Path(__file__).parents[2] / "cluster" / "spark"
FAMILIES = ("spark.metrics.conf.", "spark.kubernetes.executor.volumes.")
"""Prefixes whose remainder is free: what follows names a sink, or a volume."""
REGISTRIES = ("internal.config.package", "internal.config.UI", "deploy.k8s.Config", "deploy.yarn.config.package")
"""Objects of Spark that register its properties when they are loaded."""


def lines(name: str) -> list[str]:
    return [line for line in (CONF / name).read_text().splitlines() if line and not line.startswith("#")]


def properties() -> dict[str, str]:
    """The properties of spark-defaults.conf."""
    pairs = [line.split(maxsplit=1) for line in lines("spark-defaults.conf")]
    assert len({key for key, _ in pairs}) == len(pairs), "each property once"
    return dict(pairs)


def known(spark: SparkSession, key: str) -> bool:
    jvm = spark.sparkContext._jvm
    assert jvm
    for name in REGISTRIES:
        jvm.java.lang.Class.forName(f"org.apache.spark.{name}$")
    return jvm.org.apache.spark.internal.config.ConfigEntry.findEntry(key) is not None


def test_every_property_is_one_that_spark_knows(spark: SparkSession) -> None:
    scripts = {key for path in CONF.glob("*.sh") for key in re.findall(r"--conf \"?(spark[\w.]+)=", path.read_text())}
    assert {"spark.eventLog.dir", "spark.kubernetes.container.image", "spark.pyspark.python"} <= scripts
    keys = {key for key in {*properties(), *scripts} if not key.startswith(FAMILIES)}
    assert [key for key in sorted(keys) if not known(spark, key)] == []
    assert not known(spark, "spark.executor.pyspark.memry"), "Spark itself takes any name"


def test_every_sink_is_a_class_of_spark(spark: SparkSession) -> None:
    settings = [line.split("=") for line in lines("metrics.properties")]
    classes = {value for key, value in settings if key.endswith(".class")}
    classes |= {value for key, value in properties().items() if key.endswith(".class")}
    assert classes
    for name in classes:
        assert spark.sparkContext._jvm.java.lang.Class.forName(name).getName() == name


def test_the_tuning_table_names_what_the_file_sets() -> None:
    page = (CONF.parents[1] / "docs" / "operations.md").read_text()
    table = re.search(r"\| what one sees .*?\n\n", page, re.DOTALL)
    assert table
    named = set(re.findall(r"`(spark\.[\w.]+)`", table[0]))
    assert named and named <= set(properties())


def test_a_sites_own_time_zone_shifts_no_time(spark) -> None:
    """The session runs already; starting again sets what may be changed in it."""
    again = session.start("tests", "local[2]", "1g", 2, {"spark.sql.session.timeZone": "Asia/Tokyo"})
    assert again.conf.get("spark.sql.session.timeZone") == "UTC"
