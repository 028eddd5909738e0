#!/usr/bin/env bash
# Runs one Spark job on a standalone cluster:
#
#   MASTER=spark://head:7077 EVENT_LOG=file:///data/spark-events cluster/spark/standalone.sh build_events \
#       --raw /data/logs --out /data/runs/logs/events --config events.json
#
# Trap avoided: executors take the `python3` on their PATH unless they are told; it must be the driver's minor version.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
shift

spark-submit \
    --master "${MASTER:?set MASTER to spark://host:7077}" \
    "${options[@]}" \
    --conf "spark.ui.showConsoleProgress=$terminal" \
    --conf "spark.pyspark.python=${PYSPARK_PYTHON:-python3}" \
    "$job" "$@"
