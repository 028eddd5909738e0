"""A Ray cluster of two nodes on this machine, one of which is lost while a CRM trains; the run folder is the argument.

A process of its own: its Ray must not be that of other tests.
"""

import dataclasses
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster
from sample_data import small_config

from reclora_dist.config.schema import RayConfig
from reclora_dist.ray_app import session
from reclora_dist.ray_app.trainer import train_all

PATIENCE_S = 240.0
MIB = 1 << 20


def lose(cluster: Cluster, node: object, checkpoints: Path) -> None:
    """Kill the node as soon as there is a checkpoint."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and next(checkpoints.rglob("manifest.json"), None) is None:
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    print("node lost", flush=True)


def main(run: Path) -> None:
    """Train on both nodes, then on the one that is left."""
    session._choose_token()
    memory = {"num_cpus": 1, "object_store_memory": 100 * MIB}
    cluster = Cluster(initialize_head=True, head_node_args={**memory, "include_dashboard": False})
    node = cluster.add_node(**memory)
    base = small_config(run, ray=RayConfig(address=cluster.address, workers=2, min_workers=1))
    train = dataclasses.replace(base.crm_train, epochs=40, checkpoint_every=5)
    threading.Thread(target=lose, args=(cluster, node, run / "checkpoints"), daemon=True).start()
    with session.connect(base.ray):
        train_all(dataclasses.replace(base, crm_train=train), ("crm",))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
