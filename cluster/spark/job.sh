# Sourced by the scripts beside it: sets `job` to the job's entry file, `options` to what spark-submit is told everywhere
# (the code, the tuning, where the event log is kept), and `terminal` to whether a driver here may draw Spark's bar.
#
# Traps avoided: executors have no checkout. The wheel (`make wheel`; or any, named in WHEEL) is pure Python and goes
# with the job as --py-files; what it depends on (pyproject.toml's base dependencies and pandas) is on the nodes. A
# --properties-file hides the cluster's own spark-defaults.conf unless --load-spark-defaults is given. Spark writes no
# event log into a folder that does not exist, and does not start. Under spark-submit the driver's Python writes into a
# pipe, so that it cannot see whether there is a terminal.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$here")")
name=${1:?"usage: $(basename "$0") synthesise|build_events|retrieve_history|write_shards|report_quality [arguments of the job]"}
job="$root/spark_jobs/$name.py"
if [ ! -f "$job" ] || ! grep -q __main__ "$job"; then
    echo "$name is no Spark job; choose one of synthesise, build_events, retrieve_history, write_shards, report_quality" >&2
    exit 2
fi
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/reclora_dist/__init__.py")
wheel=${WHEEL:-$root/dist/reclora_dist-$version-py3-none-any.whl}
if [ ! -f "$wheel" ]; then
    echo "$wheel is not there: run \`make wheel\`, or name a wheel in WHEEL" >&2
    exit 2
fi
if [ -z "${WHEEL:-}" ] && [ -n "$(find "$root/reclora_dist" "$root/spark_jobs" -name '*.py' -newer "$wheel" -print -quit)" ]; then
    echo "$wheel is older than the code: run \`make wheel\` again" >&2
    exit 2
fi
options=(
    --properties-file "${PROPERTIES:-$here/spark-defaults.conf}"
    --load-spark-defaults
    --py-files "$wheel"
    --conf "spark.eventLog.dir=${EVENT_LOG:?set EVENT_LOG to the folder of the event logs, e.g. hdfs:///spark-events; it must exist}"
)
terminal=$([ -t 2 ] && echo true || echo false)
