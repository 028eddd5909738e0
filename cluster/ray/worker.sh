#!/usr/bin/env bash
# Joins this machine to a Ray cluster, in the foreground:
#
#   PATH=$PWD/.venv/bin:$PATH cluster/ray/worker.sh <head's address>:6379 [further arguments of `ray start`]
#
# Trap avoided: run folders must be seen under the same URI by all nodes (a shared mount, or an object store).
set -euo pipefail
head=${1:?"usage: worker.sh <head's address>:<port> [arguments of ray start]"}
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec ray start --block \
    --address "$head" \
    --metrics-export-port "${METRICS_PORT:-8090}" \
    --disable-usage-stats \
    "$@"
