#!/usr/bin/env bash
# Starts the head of a Ray cluster on this machine, in the foreground (Ctrl-C or SIGTERM ends it):
#
#   PATH=$PWD/.venv/bin:$PATH cluster/ray/head.sh [further arguments of `ray start`]
#
# Traps avoided: the dashboard, which takes jobs, stays on the loopback (reach it through `ssh -L 8265:127.0.0.1:8265`);
# the metrics port is fixed so that Prometheus can name it. It answers without a token: keep it inside the network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" create

exec ray start --head --block \
    --port "${RAY_PORT:-6379}" \
    --dashboard-host 127.0.0.1 \
    --dashboard-port "${DASHBOARD_PORT:-8265}" \
    --metrics-export-port "${METRICS_PORT:-8090}" \
    --disable-usage-stats \
    "$@"
