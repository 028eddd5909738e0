"""The project's own promises: documented commands work, everything is pinned, the Makefile says what is missing."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from reclora_dist.cli.compose import load
from reclora_dist.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
CLUSTER = [p for p in (ROOT / "cluster").rglob("*") if p.suffix in (".sh", ".yaml", ".Dockerfile")]


def commands():
    """Every ``python -m <our module> setting=value ...`` of pages and manifests, as (file, module, settings)."""
    for path in sorted(p for p in [*PAGES, *CLUSTER] if p.exists()):
        text = re.sub(r"\\\n#?\s*", " ", path.read_text())
        if path.suffix == ".yaml":
            text = re.sub(r"\n\s+(?=[\w.]+=)", " ", text)
        for match in re.finditer(r"python3? -m ((?:reclora_dist|spark_jobs)[\w.]+)(?![\w.{<])([^\n`#|;&]*)", text):
            words = shlex.split(match[2])
            yield pytest.param(match[1], [w for w in words if "=" in w], id=f"{path.name}:{' '.join(words)[:40]}")


def make(*arguments, **environment):
    """Run make as a shell would, not as a part of the make that may have started the tests."""
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True, env=clean | environment
    )


@pytest.mark.parametrize(("module", "settings"), list(commands()))
def test_a_documented_command_names_a_module_and_settings_that_exist(module, settings):
    assert importlib.util.find_spec(module)
    if module.startswith("reclora_dist.cli"):
        assert isinstance(load(settings), Config)


def test_links_between_pages_lead_somewhere():
    for page in (p for p in PAGES if p.exists()):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_constraints_pin_everything_that_is_asked_for():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact versions, no local builds"
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert len(pinned) == len(lines)
    wanted = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    assert {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted} <= pinned
    assert not any("petastorm" in requirement for requirement in wanted), "it is installed on its own"
    assert "petastorm" in pinned


def test_a_spark_executor_needs_no_model_library():
    names = " ".join([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["spark"]])
    assert not re.search(r"\b(torch|ray|transformers|deepspeed|hydra-core)\b", names)


def test_make_lists_its_targets():
    listed = re.findall(r"^  make (\w+)", make().stdout, re.MULTILINE)
    assert listed == ["help", "setup", "demo", "test", "lint", "bench", "study", "wheel"]


@pytest.mark.parametrize("target", ["setup", "demo", "test"])
def test_make_looks_for_java_first_and_says_how_to_install_it(target):
    done = make(target, JAVA_HOME="/nowhere")
    assert done.returncode == 2
    assert "Spark needs Java 17 or newer; found none. Install it and try again:" in done.stderr
    for hint in (
        "apt install openjdk-17-jre-headless",
        "dnf install java-21-openjdk-headless",
        "brew install openjdk@17",
    ):
        assert hint in done.stderr


def test_make_bench_says_which_there_are():
    done = make("-o", ".venv/.ready", "bench", "NAME=nothing")
    assert done.returncode == 2
    assert "make bench NAME=<one of:" in done.stderr


def test_no_file_of_ours_reads_a_pickle():
    """Nothing unpickles what a path gives: neither pickle nor torch.load nor numpy's allow_pickle."""
    for path in sorted(p for package in ("reclora_dist", "spark_jobs") for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path
