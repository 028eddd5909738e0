# Image of Spark drivers and executors on Kubernetes: Spark, Python, the base dependencies. No torch, no Ray.
#
#   docker build -f cluster/docker/spark.Dockerfile -t reclora-dist-spark:0.1.0 .
#
# Traps avoided: Spark's own Python image carries a Python older than 3.11, so Spark is copied into an image of the
# Python that the Ray image has, too; driver and executors must have the same minor version. Spark 4.3 needs Java 17
# with the module jdk.incubator.vector, which a distribution's OpenJDK has.
ARG SPARK_IMAGE=apache/spark:4.3.0-scala2.13-java17-ubuntu
FROM ${SPARK_IMAGE} AS spark

FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openjdk-17-jre-headless tini procps \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 185 --create-home spark
COPY --from=spark /opt/spark /opt/spark
COPY --from=spark /opt/entrypoint.sh /opt/entrypoint.sh
ENV SPARK_HOME=/opt/spark \
    PYSPARK_PYTHON=/usr/local/bin/python \
    PYSPARK_DRIVER_PYTHON=/usr/local/bin/python

WORKDIR /opt/reclora
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY reclora_dist reclora_dist
COPY spark_jobs spark_jobs
# pyspark itself comes with /opt/spark; pip's copy of it would be a second Spark.
RUN pip install --no-cache-dir -c constraints.txt . pandas matplotlib

USER 185
WORKDIR /opt/spark/work-dir
ENTRYPOINT ["/opt/entrypoint.sh"]
