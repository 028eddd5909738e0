"""The command line's configuration: everything shipped composes, what is wrong is named with its remedy."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from reclora_dist.cli import train
from reclora_dist.cli.compose import CONFIGS, command, lenient, load
from reclora_dist.config.check import check_config, shuffled_names
from reclora_dist.config.load import ConfigError
from reclora_dist.config.run import RunFailed
from reclora_dist.config.schema import Config, EngineConfig, LoraConfig, TinyConfig
from reclora_dist.contract.manifest import ContractError
from reclora_dist.ray_app.pipeline import plan, run_stages

OPTIONS = sorted(
    f"{path.parent.relative_to(CONFIGS)}={path.stem}" for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS
)


def test_the_groups_are_there() -> None:
    assert {option.partition("=")[0] for option in OPTIONS} >= {"adapters", "backbone", "crm", "data", "engine"}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_option_composes(option: str) -> None:
    config = load([option])
    assert isinstance(config, Config)
    group, _, name = option.partition("=")
    if group == "engine":
        stage = config.engine.zero_stage
        assert config.engine == (EngineConfig(kind="torch") if name == "torch" else EngineConfig(zero_stage=stage))
        assert name in ("torch", f"zero{stage}")
    if group == "data":
        check_config(config)
    if group == "backbone":
        assert config.backbone.kind == name
        assert ("backbone" in {stage.name for stage in plan(config)}) == (name == "tiny")
    if group in ("adapters", "crm"):
        check_config(config)
    if group == "crm":
        assert config.crm.kind == name


def test_the_default_is_the_demo() -> None:
    config = load()
    check_config(config)
    assert config.paths.run == str(Path("runs/demo").resolve())
    assert config.synthesise is not None
    assert config.engine == EngineConfig("deepspeed", 2)
    assert config.ray.workers == 2
    assert set(config.adapters) == {"lora", "uniform", "reclora"}
    assert config.adapters["lora"] == LoraConfig(experts=1, gate="none")
    assert config.compare == (("reclora", "lora"), ("reclora", "uniform"))
    assert config.serve.check
    stages = [stage.name for stage in plan(config)]
    assert stages == [
        "synthesise", "events", "backbone", "vectors", "histories", "shards", "quality", "crm",
        "adapter lora", "adapter uniform", "adapter reclora", "evaluation", "service",
    ]  # fmt: skip


def test_what_no_file_sets_is_the_dataclasses_default() -> None:
    config, default = load(), Config()
    assert config.backbone.tiny == TinyConfig()
    assert config.crm == default.crm
    assert config.retrieval == default.retrieval


def test_settings_and_groups_together() -> None:
    config = load(
        ["data=movielens_1m", "adapters=ilora", "engine=zero3", "events.source.path=ml", "adapters.ilora.rank=16",
         "crm.dnn=[64,64]", "spark.conf={spark.executor.cores:2}", "ray.address=auto", "adapters.more.experts=2"]
    )  # fmt: skip
    assert config.events.source.kind == "movielens_1m"
    assert config.events.source.path == str(Path("ml").resolve()), "workers run in other folders"
    assert config.synthesise is None
    assert config.engine.zero_stage == 3
    assert config.adapters["ilora"].rank == 16
    assert config.adapters["ilora"].mode == "outputs"
    assert config.adapters["more"] == LoraConfig(experts=2)
    assert config.crm.dnn == (64, 64)
    assert config.spark.conf == {"spark.executor.cores": "2"}


def test_a_spark_property_may_be_a_boolean_or_a_number() -> None:
    config = load(["spark.conf={spark.authenticate: true, spark.speculation: False, spark.task.cpus: 2, spark.a: yes}"])
    assert config.spark.conf == {
        "spark.authenticate": "true", "spark.speculation": "false", "spark.task.cpus": "2", "spark.a": "yes",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"config spark\.conf = 'fast'"):
        load(["spark.conf=fast"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("crm.embeding=8", "config crm.embeding = 8: no such key; did you mean 'crm.embedding'?"),
        ("lora_trian.lr=1", "no such key; did you mean 'lora_train'?"),
        ("synthesise.user=9", "config synthesise.user = 9: no such key; did you mean 'synthesise.users'?"),
        ("adapters.reclora.expert=4", "no such key; did you mean 'adapters.reclora.experts'?"),
        ("backbone.tiny.qqq=1", "no such key; known keys: hidden, layers, heads"),
        ("crm.embedding=wide", "config crm.embedding = 'wide': input should be a valid integer"),
        ("engine.zero_stage=4", "config engine.zero_stage = 4: input should be 0, 1, 2 or 3"),
        (
            "events.split=by_user",
            "config events.split = 'by_user': input should be 'global_time', 'per_user' or 'dates'",
        ),
        ("events.fractions=[0.8,0.2]", "config events.fractions"),
        ("retrieval=recent", "config retrieval = 'recent'"),
        ("crm_train=null", "config crm_train = None"),
        ("adapters.reclora.gate=mean", "input should be 'crm', 'user', 'id', 'random', 'uniform' or 'none'"),
    ],
)
def test_a_typo_or_a_wrong_type_is_named_with_its_remedy(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([setting])
    assert words in str(error.value)


def test_every_problem_is_a_line() -> None:
    with pytest.raises(ConfigError) as error:
        load(["crm.embeding=8", "ray.workers=many", "evaluate.bins=3"])
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["compare=[[reclora,loraa]]"],
            "compare names 'loraa'; there are: crm, lora, reclora, running_averages, uniform",
        ),
        (["retrieval.short=99"], "retrieval.short 99 is above retrieval.long 60"),
        (
            ["compare=[[reclora,'reclora (shuffled)']]"],
            "compare names 'reclora (shuffled)'; there are: crm, lora, reclora, running_averages, uniform",
        ),
        (
            ["adapters.reclora.gate=user"],
            "adapters.reclora.gate 'user' must not know the target item, but retrieval.strategy 'semantic' chooses "
            "histories by it; take strategy 'recent', or gate 'crm'",
        ),
        (["adapters.lora.experts=2"], "adapters.lora: gate 'none' needs experts = 1, not 2; or take gate 'uniform'"),
        (["crm.kind=din"], "crm.kind 'din' reads the newest events, retrieval.strategy is 'semantic': take crm=din"),
        (["crm=sasrec", "crm.heads=3"], "crm.embedding 16 is not a multiple of crm.heads 3"),
        (["evaluate.history_bands=[10,10]"], "evaluate.history_bands [10, 10] must ascend from above 0"),
        (["evaluate.history_bands=[0]"], "evaluate.history_bands [0] must ascend from above 0"),
        (["evaluate.rare=0"], "evaluate.rare 0 is below 1"),
        (["evaluate.ranking_users=-1"], "evaluate.ranking_users -1 is below 0; 0 turns the ranking off"),
        (
            ["ray.workers=3", "lora_train.batch_size=2"],
            "lora_train.batch_size 2 leaves some of 3 workers without a sample",
        ),
        (["lora_train.micro_tokens=100"], "micro_tokens 100 holds no prompt of prompt.max_tokens 256"),
        (["engine.zero_stage=2", "engine.offload_parameters=cpu"], "needs engine.zero_stage 3 or higher, not 2"),
        (
            ["+adapters.crm.experts=2"],
            "adapters.crm: the evaluation calls something else so; give the adapter another name",
        ),
        (
            ["+adapters.seconds.experts=2"],
            "adapters.seconds: the evaluation calls something else so; give the adapter another name",
        ),
        (["+adapters={a/b: {experts: 2}}"], "adapters: 'a/b' cannot name an adapter; take letters, digits"),
        (["ray.min_workers=3"], "ray.min_workers 3 is above ray.workers 2"),
        (["serve.replicas=0"], "serve.replicas 0 must be at least 1"),
        (["serve.threads=0"], "serve.threads 0 must be at least 1"),
        (["serve.max_batch=0"], "serve.max_batch 0 must be at least 1"),
        (["serve.max_candidates=0"], "serve.max_candidates 0 must be at least 1"),
        (["serve.batch_wait_ms=-1"], "serve.batch_wait_ms -1.0 must be at least 0"),
        (["serve.gpus=-1"], "serve.gpus -1.0 must be at least 0"),
        (["serve.port=99999"], "serve.port 99999 is no port; give 1 to 65535, or 0 for any free one"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_any_work(settings: list[str], words: str) -> None:
    with pytest.raises(ValueError) as error:
        check_config(load(settings))
    assert words in str(error.value)


def test_the_experiment_leaves_the_crm_the_learning_rate_of_its_log() -> None:
    base = ["data=movielens_1m", "backbone=encoder", "backbone.path=model"]
    assert load([*base, "experiment=movielens"]).crm_train.lr == load(base).crm_train.lr == 0.008


def test_only_what_builds_the_events_asks_for_the_raw_log(tmp_path: Path) -> None:
    config = load(["data=movielens_1m", f"paths.run={tmp_path}"])
    with pytest.raises(ValueError, match=r"events\.source\.path is empty; give the folder of the raw log"):
        run_stages(config, ("",))
    with pytest.raises(ContractError, match="shards"):
        run_stages(config, ("crm",))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": 0}, "experts 0 must be at least 1"),
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"temperature": 0.0}, "gate temperature 0.0 must be above 0"),
        ({"temperature": -1.0}, "gate temperature -1.0 must be above 0"),
        ({"gate_dropout": 1.0}, "gate_dropout 1.0 must be at least 0 and below 1"),
        ({"state_noise": -0.1}, "state_noise -0.1 must be at least 0"),
        ({"top_k": 17}, "top_k 17 must be 0 (all) or up to experts = 16"),
        ({"gate": "uniform", "top_k": 2}, "top_k 2 means nothing to gate 'uniform'; leave it out"),
        ({"gate": "uniform", "shared_gate": True}, "shared_gate True means nothing to gate 'uniform'; leave it out"),
        ({"mode": "outputs", "rank": 6, "experts": 4}, "rank 6 cannot be split over 4 experts; take a multiple of 4"),
        ({"mode": "matrix"}, "mode 'matrix' has one pair, not experts = 16; set experts = 1"),
        (
            {"mode": "matrix", "experts": 1, "gate": "id"},
            "mode 'matrix' needs a gate that makes matrices, not 'id'; take 'crm' or 'user'",
        ),
        ({"mode": "matrix", "experts": 1, "top_k": 1}, "mode 'matrix' has no weights for top_k 1 to choose from"),
        ({"mode": "matrix", "experts": 1, "balance": 0.1}, "balance 0.1 has no trained weights of several experts"),
        ({"gate": "random", "balance": 0.1}, "balance 0.1 has no trained weights of several experts to even out"),
        ({"blend": 1.0}, "blend 1.0 must be above 0 and below 1"),
        ({"gate": "id", "state_dropout": 0.1}, "state_dropout 0.1 needs a gate that reads a state, not 'id'; set 0"),
    ],
)
def test_an_adapter_that_cannot_work_is_refused(settings: dict[str, object], words: str) -> None:
    lora = dataclasses.replace(LoraConfig(), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(f"adapters.x: {words}")):
        check_config(dataclasses.replace(load(), adapters={"x": lora}, compare=()))


def test_a_shuffled_control_can_be_compared_if_there_is_one() -> None:
    asked = ["evaluate.shuffled=true", "compare=[[reclora,'reclora (shuffled)']]"]
    check_config(load(asked))
    assert shuffled_names(load(asked)) == {"reclora": "reclora (shuffled)"}, "lora and uniform have nothing to shuffle"
    assert not shuffled_names(load())


@pytest.mark.parametrize(
    ("argument", "passed"),
    [
        ("crm.embedding=8", "++crm.embedding=8"),
        ("typo.key=1", "++typo.key=1"),
        ("paths.run=a=b", "++paths.run=a=b"),
        ("data=goodreads", "data=goodreads"),
        ("engine=zero3", "engine=zero3"),
        ("hydra.run.dir=x", "hydra.run.dir=x"),
        ("+new.key=1", "+new.key=1"),
        ("++any.key=1", "++any.key=1"),
        ("~synthesise", "~synthesise"),
        ("--help", "--help"),
        ("-m", "-m"),
    ],
)
def test_lenient_lets_settings_pass_hydra_and_leaves_the_rest(argument: str, passed: str) -> None:
    assert lenient(argument) == passed


@pytest.mark.parametrize(("given", "kept"), [("s3://bucket/run", True), ("/data/run", True), ("runs/own", False)])
def test_local_paths_become_absolute_and_uris_stay(given: str, kept: bool) -> None:
    settings = ("paths.run", "paths.shards", "events.source.path", "serve.adapter")
    config = load([f"{setting}={given}" for setting in settings])
    found = {config.paths.run, config.paths.shards, config.events.source.path, config.serve.adapter}
    assert found == {given if kept else str(Path(given).resolve())}


def test_a_hub_id_stays_and_a_models_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = load(["backbone=causal", "backbone.path=model", "embed.path=owner/name"])
    assert config.backbone.path == str(tmp_path / "model")
    assert config.embed.path == "owner/name"
    assert load().embed.path == ""


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What ``python -m reclora_dist.cli.train ARGUMENTS`` says as it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 2
    return capsys.readouterr().err.strip()


def test_the_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(monkeypatch, capsys, "crm.embeding=8", f"paths.run={tmp_path}")
    assert said == "error: config crm.embeding = 8: no such key; did you mean 'crm.embedding'?"
    assert not list(tmp_path.iterdir())


def test_a_stage_without_its_input_says_which_stage_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(monkeypatch, capsys, f"paths.run={tmp_path}")
    assert said.startswith(f"error: '{tmp_path}/shards' has no manifest.json: the stage that writes 'reclora.shards'")
    assert len(said.splitlines()) == 1


def test_a_run_that_fails_says_so_in_one_line_and_where_ray_has_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(config: Config) -> None:
        error = RunFailed("crm: the workers failed 2 times in a row")
        error.add_note("Ray's logs of this run are in /tmp/x")
        raise error

    monkeypatch.setattr(sys, "argv", ["lost"])
    with pytest.raises(SystemExit) as end:
        command(lost)()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told == "error: crm: the workers failed 2 times in a row\nRay's logs of this run are in /tmp/x\n"


def test_where_the_shards_are_given_no_stage_makes_any() -> None:
    assert [stage.name for stage in plan(load())][:2] == ["synthesise", "events"]
    given = plan(load(["paths.shards=elsewhere"]))
    names = ["backbone", "crm", "adapter lora", "adapter uniform", "adapter reclora", "evaluation", "service"]
    assert [stage.name for stage in given] == names
