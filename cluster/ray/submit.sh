#!/usr/bin/env bash
# Runs a command of this checkout on the cluster and follows its output:
#
#   cluster/ray/submit.sh python -m reclora_dist.cli.train data=movielens_1m paths.run=/data/runs/ml-1m ray.workers=4
#
# Trap avoided: without the token `ray job submit` gets a bare 401.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"

cd "$here/../.."
exec ray job submit \
    --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" \
    --working-dir . \
    --runtime-env cluster/runtime_env.yaml \
    -- "$@"
