"""The manifests and scripts of cluster/ name things that exist: versions, modules, settings, volumes, ports, images."""

import importlib
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from ray.serve._private.common import RequestProtocol
from ray.serve._private.request_ingress_metrics import RequestIngressMetrics
from ray.serve.schema import ServeDeploySchema

import reclora_dist
from reclora_dist.cli.compose import load
from reclora_dist.config.check import check_config
from reclora_dist.config.load import ConfigError, build
from reclora_dist.contract.manifest import ContractError, Manifest, commit
from reclora_dist.contract.schema import ADAPTER
from reclora_dist.contract.storage import Folder
from reclora_dist.ray_app.declared import build_application
from reclora_dist.ray_app.service import APPLICATION
from spark_jobs.arguments import parser as parser_of
from spark_jobs.arguments import settings

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
SCRIPTS = sorted(CLUSTER.glob("*/*.sh"))
SPARK_SCRIPTS = [path for path in SCRIPTS if path.parent.name == "spark" and path.name != "job.sh"]
DOCKERFILES = sorted((CLUSTER / "docker").glob("*.Dockerfile"))
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)


def name_of(path):
    return path.name


def clusters(document):
    """The RayCluster specifications inside a KubeRay document."""
    spec = document["spec"]
    found = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}
    return [found[document["kind"]]] if document["kind"] in found else []


def groups(cluster):
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


CLUSTERS = [(path.name, c) for path in KUBERAY for d in yaml.safe_load_all(path.read_text()) for c in clusters(d)]


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.yaml")), ids=name_of)
def test_yaml_parses_and_says_what_it_is_for(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all(isinstance(document, dict) for document in documents)
    if path.parent.name == "kuberay" or path.parent == CLUSTER:
        header = path.read_text().split("\n\n")[0]
        assert re.match(r"# \w", header)
        assert re.search(r"# Traps? avoided: ", path.read_text())


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_kuberay_kinds(path):
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"].startswith("Ray"):
            assert document["apiVersion"] == "ray.io/v1"
        assert document["metadata"]["name"].startswith("reclora")


def test_no_two_heads_share_a_kubernetes_service():
    """KubeRay calls it <name>-head-svc, of a RayCluster and of a RayService alike."""
    documents = [yaml.safe_load(path.read_text()) for path in KUBERAY if path.name.startswith("ray")]
    names = [document["metadata"]["name"] for document in documents]
    assert len(set(names)) == len(names), names
    pages = [*CLUSTER.rglob("*.yaml"), *(ROOT / "docs").rglob("*.md")]
    texts = " ".join(path.read_text() for path in pages)
    of_kind = {document["kind"]: document["metadata"]["name"] for document in documents}
    assert set(re.findall(r"([\w-]+)-serve-svc", texts)) == {of_kind["RayService"]}
    assert set(re.findall(r"([\w-]+)-head-svc", texts)) == {of_kind["RayCluster"]}


@pytest.mark.parametrize(("name", "cluster"), CLUSTERS, ids=[name for name, _ in CLUSTERS])
def test_clusters_are_of_our_ray_version_and_ask_for_a_token(name, cluster):
    assert cluster["rayVersion"] == CONSTRAINTS["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    images = {c["image"] for group in groups(cluster) for c in group["template"]["spec"]["containers"]}
    assert len(images) == 1, "all nodes must have the same Ray and Python"


@pytest.mark.parametrize(("name", "cluster"), CLUSTERS, ids=[name for name, _ in CLUSTERS])
def test_pods_are_consistent(name, cluster):
    for group in groups(cluster):
        spec = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert container["image"].split(":")[1].removesuffix("-gpu") == reclora_dist.__version__
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            assert container["resources"]["requests"] == container["resources"]["limits"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert str(ports["metrics"]) == group["rayStartParams"]["metrics-export-port"]
        claim = yaml.safe_load((CLUSTER / "kuberay" / "volume.yaml").read_text())
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=name_of)
def test_dockerfiles_take_our_versions_and_existing_files(path):
    text = path.read_text()
    major_minor = re.search(r"py(\d)(\d+)|python:(\d\.\d+)", text)
    python = major_minor[3] or f"{major_minor[1]}.{major_minor[2]}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python == "3.11"
    assert project["requires-python"] == ">=3.11,<3.13"
    for image, version in re.findall(r"(rayproject/ray|apache/spark):(\d+\.\d+\.\d+)", text):
        assert version == CONSTRAINTS["ray" if "ray" in image else "pyspark"]
    for image, version in re.findall(r"-t (reclora-dist-\w+):(\d+\.\d+\.\d+)", text):
        assert version == reclora_dist.__version__, image
    for name, version in re.findall(r"(\w+)==([\d.]+)", text):
        assert CONSTRAINTS[name] == version
    for extra in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert set(extra.split(",")) <= set(project["optional-dependencies"])
    for line in re.findall(r"^COPY (?!--from)(?:--chown=\w+ )?(.*)$", text, re.MULTILINE):
        missing = [name for name in line.split()[:-1] if not (ROOT / name).exists()]
        assert not set(missing) - {"README.md"}


def test_the_job_gives_its_workers_what_it_asks_for():
    job = yaml.safe_load((CLUSTER / "kuberay" / "rayjob.yaml").read_text())["spec"]
    config = load(shlex.split(job["entrypoint"])[3:])
    check_config(config)
    workers = job["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers["replicas"] * int(limits["nvidia.com/gpu"]) == config.ray.workers * config.ray.gpus_per_worker
    assert int(limits["cpu"]) >= config.ray.cpus_per_worker
    assert config.paths.run.startswith("/data/")
    assert config.backbone.path.startswith("/data/")


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=name_of)
def test_scripts_are_bash_and_say_what_they_are_for(path):
    subprocess.run(["bash", "-n", path], check=True)
    lines = path.read_text().splitlines()
    comment = lines[1 if lines[0].startswith("#!") else 0]
    assert comment.startswith("# ")
    if lines[0].startswith("#!"):
        assert path.stat().st_mode & 0o111
        assert "set -euo pipefail" in lines


def test_spark_scripts_name_every_job():
    listed = re.search(r"choose one of ([\w, ]+)", (CLUSTER / "spark" / "job.sh").read_text())[1]
    entries = {path.stem for path in (ROOT / "spark_jobs").glob("*.py") if "\nJOB = Job(" in path.read_text()}
    assert set(listed.split(", ")) == entries


def documented_submissions():
    """Every ``cluster/spark/<script>.sh <job> <arguments>`` of pages and scripts."""
    for path in [*SPARK_SCRIPTS, ROOT / "docs" / "operations.md"]:
        text = re.sub(r"\s*\\\n#?\s*", " ", path.read_text())
        for script, job, arguments in re.findall(r"cluster/spark/(\w+)\.sh (\w+) (--[^\n`#|;&]*)", text):
            yield pytest.param(script, job, shlex.split(arguments), id=f"{path.name}:{script}:{job}")


@pytest.mark.parametrize(("script", "job", "arguments"), list(documented_submissions()))
def test_a_documented_submission_names_a_script_a_job_and_options_that_exist(script, job, arguments):
    assert CLUSTER / "spark" / f"{script}.sh" in SPARK_SCRIPTS
    found = importlib.import_module(f"spark_jobs.{job}").JOB
    parser = parser_of(found.name, found.summary, found.config, found.inputs, found.optional)
    given = parser.parse_args(arguments)
    build(found.config, settings("{}", given.settings))


def test_the_documented_way_to_hand_settings_to_spark_jobs(tmp_path):
    page = (ROOT / "docs" / "operations.md").read_text()
    given, code = re.search(r"python - (data=\S+ [^<]*)<<'END'\n(.*?)^END$", page, re.MULTILINE | re.DOTALL).groups()
    command = [sys.executable, "-", *given.split()]
    subprocess.run(
        command, input=code, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    jobs = {
        "events": "build_events",
        "retrieval": "retrieve_history",
        "shards": "write_shards",
        "quality": "report_quality",
    }
    for section, job in jobs.items():
        found = importlib.import_module(f"spark_jobs.{job}").JOB
        assert build(found.config, settings(str(tmp_path / f"{section}.json"), [])) == getattr(
            load(given.split()), section
        )


def submitted(script, tmp_path, *arguments, stderr=subprocess.PIPE, **environment):
    """Run a script with a spark-submit that prints what it was told."""
    (tmp_path / "spark-submit").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "spark-submit").chmod(0o755)
    (tmp_path / "our.whl").touch()
    places = {"MASTER": "spark://head:7077", "ENVIRONMENT": "hdfs:///env.tar.gz", "EVENT_LOG": "hdfs:///spark-events"}
    given = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WHEEL": str(tmp_path / "our.whl"), **places, **environment}
    return subprocess.run([script, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True, env=given)


@pytest.fixture(scope="module")
def submit_options():
    """The options of the real spark-submit."""
    command = [Path(sys.executable).with_name("spark-submit"), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(re.findall(r"^ +(--[\w-]+)", told.stdout + told.stderr, re.MULTILINE))


@pytest.mark.parametrize("script", SPARK_SCRIPTS, ids=name_of)
def test_spark_scripts_submit_the_job_with_wheel_tuning_and_event_log(script, submit_options, tmp_path):
    done = submitted(script, tmp_path, "build_events", "--raw", "a folder", "--out", "out")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    entry = told.index(str(ROOT / "spark_jobs" / "build_events.py"))
    assert told[entry + 1 :] == ["--raw", "a folder", "--out", "out"]
    options = told[:entry]
    assert options[options.index("--py-files") + 1] == str(tmp_path / "our.whl")
    assert options[options.index("--properties-file") + 1] == str(CLUSTER / "spark" / "spark-defaults.conf")
    assert "spark.eventLog.dir=hdfs:///spark-events" in options
    assert {option for option in options if option.startswith("--")} <= submit_options


def test_only_a_driver_at_a_terminal_draws_the_bar(tmp_path):
    script = CLUSTER / "spark" / "standalone.sh"
    assert "spark.ui.showConsoleProgress=false" in submitted(script, tmp_path, "build_events").stdout
    _, terminal = pty.openpty()
    shown = submitted(script, tmp_path, "build_events", stderr=terminal).stdout
    assert "spark.ui.showConsoleProgress=true" in shown


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ({"WHEEL": "/nowhere.whl"}, "/nowhere.whl is not there: run `make wheel`"),
        ({"EVENT_LOG": ""}, "set EVENT_LOG to the folder of the event logs"),
        ({"MASTER": ""}, "set MASTER to spark://host:7077"),
    ],
)
def test_spark_scripts_say_what_is_missing(missing, told, tmp_path):
    done = submitted(CLUSTER / "spark" / "standalone.sh", tmp_path, "build_events", "--out", "out", **missing)
    assert done.returncode and not done.stdout
    assert told in done.stderr


def test_a_wheel_older_than_the_code_is_refused(tmp_path):
    shutil.copytree(CLUSTER / "spark", tmp_path / "cluster" / "spark")
    for package in ("reclora_dist", "spark_jobs"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    wheel = tmp_path / "dist" / f"reclora_dist-{reclora_dist.__version__}-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    script = tmp_path / "cluster" / "spark" / "standalone.sh"
    assert submitted(script, tmp_path, "build_events", WHEEL="").returncode == 0
    os.utime(wheel, (0, 0))
    done = submitted(script, tmp_path, "build_events", WHEEL="")
    assert done.returncode == 2
    assert f"{wheel} is older than the code: run `make wheel` again" in done.stderr


@pytest.mark.parametrize("name", ["train", "session"])
def test_an_unknown_spark_job_is_refused(name):
    done = subprocess.run([CLUSTER / "spark" / "standalone.sh", name], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{name} is no Spark job; choose one of synthesise" in done.stderr


def test_a_worker_without_the_token_is_refused(tmp_path):
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [CLUSTER / "ray" / "worker.sh", "127.0.0.1:1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "No token at" in done.stderr


def test_prometheus_scrapes_the_ports_that_are_exported():
    config = yaml.safe_load((CLUSTER / "monitoring" / "prometheus" / "prometheus.yaml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    for script in ("head.sh", "worker.sh"):
        port = re.search(r"METRICS_PORT:-(\d+)", (CLUSTER / "ray" / script).read_text())[1]
        assert targets["ray"] == [f"127.0.0.1:{port}"]
    monitor = yaml.safe_load((CLUSTER / "kuberay" / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    pods = [group["template"]["spec"]["containers"][0] for _, cluster in CLUSTERS for group in groups(cluster)]
    assert all(endpoint["port"] in {port["name"] for port in pod["ports"]} for pod in pods)


def test_the_head_writes_a_token_that_only_its_user_reads(tmp_path):
    source = f"source {CLUSTER / 'ray' / 'environment.sh'} create; echo $RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-euc", source], capture_output=True, text=True, check=True, env=environment)
    mode, path = done.stdout.split()
    assert mode == "token"
    assert Path(path).stat().st_mode & 0o777 == 0o600
    assert len(Path(path).read_text()) == 64


def test_what_nodes_write_to_a_shared_folder_is_as_open_as_their_user_wants_it(tmp_path):
    source = f"umask 022; source {CLUSTER / 'ray' / 'environment.sh'} create; umask"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-euc", source], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "0022"
    assert (tmp_path / ".ray").stat().st_mode & 0o777 == 0o700


def test_alerts_ask_ray_serve_for_counters_and_tags_that_it_has():
    text = (CLUSTER / "monitoring" / "prometheus" / "alerts.yaml").read_text()
    own = RequestIngressMetrics(RequestProtocol.HTTP, source="proxy", node_id="", node_ip_address="")
    counters = [own.request_counter.info, own.request_error_counter.info]
    known = {f"ray_{counter['name']}_total": set(counter["tag_keys"]) for counter in counters}
    asked = re.findall(r"(ray_serve_\w+)\{([^}]*)\}", text)
    assert asked
    for name, tags in asked:
        assert set(re.findall(r"(\w+)=", tags)) <= known[name]
        assert f'application="{APPLICATION}"' in tags


@pytest.fixture
def serve_config():
    service = yaml.safe_load((CLUSTER / "kuberay" / "rayservice.yaml").read_text())
    return ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))


def test_the_serve_config_is_one_that_ray_takes(serve_config):
    application = serve_config.applications[0]
    assert application.name == APPLICATION
    assert serve_config.http_options.host == "0.0.0.0"
    module, _, attribute = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), attribute) is build_application


def test_the_serve_config_builds_our_application(serve_config, tmp_path):
    folder = Folder(str(tmp_path / "adapter"))
    commit(folder, Manifest(ADAPTER.name, ADAPTER.version, "", {}, ()))
    args = serve_config.applications[0].args

    def built(**serve):
        return build_application({**args, "serve": serve})

    assert type(built(**{**args["serve"], "adapter": folder.uri})).__name__ == "Application"
    with pytest.raises(ContractError, match=r"has no manifest.json"):
        built(adapter=str(tmp_path))
    with pytest.raises(ConfigError, match=r"serve.adapter = '': name the adapter folder"):
        built()
    with pytest.raises(ConfigError, match=r"serve.replica = 3: no such key; did you mean 'serve.replicas'"):
        built(adapter=folder.uri, replica=3)


def test_the_job_environment_has_only_known_fields():
    environment = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    assert set(environment) == {"excludes", "env_vars"}
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
