"""The course of a training for people: TensorBoard event files, and MLflow on request."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from reclora_dist.config.redact import redacted
from reclora_dist.config.schema import Config
from reclora_dist.contract.storage import Folder

Record = Callable[[int, Mapping[str, float]], None]
"""(step, values by name)"""


@contextmanager
def recording(config: Config, stage: str, resolved: Mapping[str, Any]) -> Iterator[Record]:
    """A function that hands the figures of a step on to whom ``config.tracking`` names.

    TensorBoard's files lie at ``tensorboard/<stage>`` of the run; where that is no local folder there are none. A run
    that goes on writes a further file; of a step that was done twice the later figures count.

    Args:
        stage: ``crm`` or the name of an adapter.
        resolved: the resolved configuration; without secrets, MLflow's parameters.

    Raises:
        ValueError: MLflow is asked for and not installed.
    """
    with ExitStack() as stack:
        records = []
        folder = Folder(config.paths.run).child(f"tensorboard/{stage}")
        if config.tracking.tensorboard and isinstance(folder.fs, LocalFileSystem):
            records.append(stack.enter_context(_tensorboard(folder)))
        if config.tracking.mlflow:
            records.append(stack.enter_context(_mlflow(config, stage, resolved)))

        def record(step: int, values: Mapping[str, float]) -> None:
            for each in records:
                each(step, values)

        yield record


@contextmanager
def _tensorboard(folder: Folder) -> Iterator[Record]:
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder.local())) as writer:

        def record(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield record


@contextmanager
def _mlflow(config: Config, stage: str, resolved: Mapping[str, Any]) -> Iterator[Record]:
    try:
        import mlflow
    except ImportError as error:
        raise ValueError(
            f"tracking.mlflow is {config.tracking.mlflow!r}, but MLflow is not installed: pip install "
            "'reclora-dist[mlflow]', or leave it empty"
        ) from error
    client = mlflow.MlflowClient(config.tracking.mlflow)
    name = f"{config.paths.run.rstrip('/').rpartition('/')[2]}/{stage}"
    found = client.get_experiment_by_name("reclora")
    experiment = found.experiment_id if found else client.create_experiment("reclora")
    run = client.create_run(experiment, run_name=name).info.run_id
    for key, value in _flat(redacted(resolved)).items():
        client.log_param(run, key, str(value)[:250])

    def record(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            client.log_metric(run, key, value, step=step)

    status = "FAILED"
    try:
        yield record
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat
