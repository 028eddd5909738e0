import subprocess
import sys

import pytest

HEAVY = ("numpy", "pyarrow", "fsspec", "pydantic", "torch", "transformers", "ray", "pyspark", "deepspeed", "hydra")


def loaded_by(statement):
    """Heavy packages that a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_the_package_itself_loads_nothing():
    assert loaded_by("import reclora_dist") == set()


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("reclora_dist.config.schema", set()),
        ("reclora_dist.telemetry.names", set()),
        ("reclora_dist.contract.manifest", {"fsspec"}),
        ("reclora_dist.contract.schema", {"fsspec", "pyarrow", "numpy"}),
        ("reclora_dist.retrieval", {"numpy"}),
    ],
)
def test_what_executors_import_is_light(module, allowed):
    assert loaded_by(f"import {module}") <= allowed


@pytest.mark.parametrize("job", ["build_events", "retrieve_history", "write_shards", "synthesise", "report_quality"])
def test_spark_jobs_load_no_model_library(job):
    assert not loaded_by(f"import spark_jobs.{job}") & {"torch", "transformers", "ray", "deepspeed", "hydra"}
