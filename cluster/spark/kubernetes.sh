#!/usr/bin/env bash
# Runs one Spark job on Kubernetes with the image of cluster/docker/spark.Dockerfile, driver on this machine or pod:
#
#   MASTER=k8s://https://cluster:6443 IMAGE=registry/reclora-dist-spark:0.1.0 EVENT_LOG=file:///data/spark-events \
#       cluster/spark/kubernetes.sh build_events --raw /data/logs --out /data/runs/logs/events
#
# Traps avoided: executors see only what is mounted, so the volume claim of the run folders (CLAIM) is mounted at /data
# in them, and the driver must have it there, too; executors call back to the driver, so it needs an address that pods
# can reach (DRIVER_HOST).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"
shift

volume=spark.kubernetes.executor.volumes.persistentVolumeClaim.runs
spark-submit \
    --master "${MASTER:?set MASTER to k8s://https://host:port}" \
    --deploy-mode client \
    "${options[@]}" \
    --conf "spark.ui.showConsoleProgress=$terminal" \
    --conf "spark.kubernetes.container.image=${IMAGE:-reclora-dist-spark:0.1.0}" \
    --conf "spark.kubernetes.namespace=${NAMESPACE:-default}" \
    --conf "spark.driver.host=${DRIVER_HOST:-$(hostname -i)}" \
    --conf "spark.executor.instances=${EXECUTORS:-4}" \
    --conf "$volume.options.claimName=${CLAIM:-reclora-runs}" \
    --conf "$volume.mount.path=/data" \
    --conf "$volume.mount.readOnly=false" \
    "$job" "$@"
