# Sourced by the scripts beside it: builds our wheel, sets `wheel` to its path and `job` to the job's entry.
#
# Trap avoided: executors have no checkout. The wheel is pure Python and goes with the job as --py-files, so that driver
# and executors run the same code; what it depends on (pyproject.toml's base dependencies and pandas) is on the nodes.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
name=${1:?"usage: $(basename "$0") synthesise|build_events|retrieve_history|write_shards [arguments of the job]"}
job="$root/spark_jobs/$name.py"
if [ ! -f "$job" ]; then
    echo "$name is no Spark job; choose one of synthesise, build_events, retrieve_history, write_shards" >&2
    exit 2
fi
dist=$(mktemp -d)
trap 'rm -rf "$dist"' EXIT
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$dist" "$root"
wheel=$(echo "$dist"/reclora_dist-*.whl)
