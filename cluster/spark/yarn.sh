#!/usr/bin/env bash
# Runs one Spark job on YARN, driver included:
#
#   ENVIRONMENT=hdfs:///envs/reclora.tar.gz EVENT_LOG=hdfs:///spark-events cluster/spark/yarn.sh build_events \
#       --raw hdfs:///logs --out hdfs:///runs/logs/events --set k_core=5
#
# Traps avoided: YARN nodes rarely have the right Python, so a packed environment (venv-pack or conda-pack) goes with
# the job and both driver and executors use it. Data and results are on HDFS: the driver's disk is gone when it ends. The
# path of a container's folder is too long for a socket file.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
shift

spark-submit \
    --master yarn \
    --deploy-mode cluster \
    "${options[@]}" \
    --archives "${ENVIRONMENT:?set ENVIRONMENT to a packed Python environment}#environment" \
    --conf spark.pyspark.python=./environment/bin/python \
    --conf spark.python.unix.domain.socket.enabled=false \
    --conf "spark.executor.instances=${EXECUTORS:-4}" \
    "$job" "$@"
