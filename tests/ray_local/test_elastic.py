"""Training goes on with the nodes that are left."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import CRM
from reclora_dist.contract.storage import Folder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
SCRIPT = Path(__file__).parents[1] / "elastic_cluster.py"


def test_a_lost_node_leaves_a_smaller_world_that_goes_on(prepared: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    shutil.rmtree(run / "crm")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-u", str(SCRIPT), str(run)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    resumed = re.search(r"crm: resuming after step (\d+), with 1 workers in place of 2", done.stdout)
    assert resumed, done.stdout[-4000:]
    assert "starting again from step" in done.stdout
    facts = read_manifest(Folder(str(run / "crm")), CRM).facts
    per_epoch = facts["history"][0]["step"]
    assert facts["steps"] == 40 * per_epoch > int(resumed.group(1))
    assert [entry["step"] for entry in facts["history"]] == [n * per_epoch for n in range(1, 41)], "none twice"
