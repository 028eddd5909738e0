"""Training of RecLoRA on a large language model: each ZeRO stage, and the usual recipe beside it.

    make bench NAME=zero                        SmolLM-135M's sizes, two processes, the demo's prompts; one JSON last
    make bench NAME=zero RAW=path/to/ml-100k    prompts of MovieLens-100K, whose lengths differ
    make bench NAME=zero RAW=path/to/ml-100k ARGS="--model llama_7b --processes 1 --samples 512"      on a GPU

A LLaMA with random weights is written once, with the tokenizer of the run's own tiny backbone. RecLoRA (8 experts) is
then trained by processes under torchrun: DDP and ZeRO 0 (in float32, on CPUs) to 3, with and without offload (to a
disk on request, for that needs libaio), each from a fresh start on the same samples; and plain LoRA by transformers'
Trainer and PEFT in as many processes, in turns with the fastest of ours.
`samples_vs_trainer`: the fastest of ours over the Trainer, goal 2; `logloss`: binary log loss on the same validation
samples after training. Needs the extra `bench`.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from reclora_dist.backbone.load import answer_ids, load_tokenizer
from reclora_dist.cli.compose import load
from reclora_dist.config.run import folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate.scorer import Scorer, text_collator
from reclora_dist.train.stages import adapter_config

ROOT = Path(__file__).resolve().parents[1]
ENGINES = {
    "ddp": ["engine=torch"],
    "zero0": ["engine=zero0"],
    "zero1": ["engine=zero1"],
    "zero2": ["engine=zero2"],
    "zero3": ["engine=zero3"],
    "zero2 offloaded": ["engine=zero2", "engine.offload_optimizer=cpu"],
    "zero3 offloaded": ["engine=zero3", "engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"],
    "zero3 on disk": [
        "engine=zero3", "engine.offload_optimizer=nvme", "engine.offload_parameters=nvme",
        "engine.nvme_path=runs/zero/disk",
    ],
}  # fmt: skip
SHAPES = {
    "smollm_135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
    },
    "llama_1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32_000,
    },
    "llama_7b": {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32_000,
    },
}  # fmt: skip
VALIDATION = 64
DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"
USUAL = [name for name in ENGINES if name != "zero3 on disk" and (name != "zero0" or DTYPE == "float32")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/zero", help="folder of the run")
    parser.add_argument("--raw", help="folder of MovieLens-100K; without it, the demo's log")
    parser.add_argument("--model", default="smollm_135m", choices=list(SHAPES), help="sizes of the language model")
    parser.add_argument("--processes", type=int, default=2, help="of a training, each with a GPU if there are some")
    parser.add_argument("--samples", type=int, default=192, help="training samples of each")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step, over all processes")
    parser.add_argument("--rounds", type=int, default=2, help="turns of our fastest and the Trainer; 0: ours alone")
    parser.add_argument(
        "--engines", nargs="*", default=USUAL, choices=list(ENGINES), help="none: DDP and the Trainer only"
    )
    parser.add_argument(
        "--tokens", type=int, default=768, help="ours: padded tokens of a forward pass; 0: its samples, as the Trainer"
    )
    parser.add_argument("--set", nargs="*", default=[], help="further settings of ours")
    arguments = parser.parse_args()
    home = arguments.run.resolve()
    log = ["data=movielens_100k", f"events.source.path={arguments.raw}"] if arguments.raw else ["synthesise.users=600"]
    common = [*log, f"paths.run={home}", "serve.check=false", "compare=[]"]
    common += [f"shards.text_train={arguments.samples}", f"shards.text_validation={VALIDATION}"]
    for command in ("prepare", "train"):
        program = [sys.executable, "-m", f"reclora_dist.cli.{command}", *common, "~adapters"]
        subprocess.run(program, check=True, cwd=ROOT)
    model = home / arguments.model
    write_model(model, home / "backbone", arguments.model)
    common += ["adapters=reclora", "adapters.reclora.experts=8", "adapters.reclora.temperature=1.0"]
    common += ["backbone=causal", f"backbone.path={model}", f"backbone.dtype={DTYPE}"]
    each = arguments.batch // arguments.processes
    tokens, samples = (arguments.tokens, 0) if arguments.tokens else (0, each)
    common += [f"lora_train.micro_tokens={tokens}", f"lora_train.micro_batch={samples}"]
    common += [f"lora_train.batch_size={arguments.batch}"]
    common += ["prompt.max_tokens=512", "lora_train.epochs=1", "lora_train.log_every=1000"]
    common += ["lora_train.checkpoint_every=1000", *arguments.set]
    rival = home / "trainer"
    write_rival(load(common), rival, each)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(arguments.processes)]
    found = {name: ours(start, common + ENGINES[name], home) for name in arguments.engines}
    fastest = max(found, key=lambda name: found[name]["samples_per_second"]) if found else "ddp"
    turns = [(ours(start, common + ENGINES[fastest], home), trainer(start, rival)) for _ in range(arguments.rounds)]
    ratios = [one["samples_per_second"] / other["samples_per_second"] for one, other in turns]
    trainers = turns[-1][1]["logloss"] if turns else None
    result = {
        "samples_vs_trainer": round(statistics.median(ratios), 3) if ratios else None,
        "samples_vs_trainer_range": [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "fastest": fastest,
        "logloss": {"ours": validation_loss(load(common), home), "trainer": trainers},
        "turns": turns,
        "engines": found,
    }
    print(json.dumps(result))


def write_model(home: Path, tokenizer: Path, shape: str) -> None:
    """Random weights, in several files; the tokenizer of the run's tiny backbone."""
    load_tokenizer(str(tokenizer)).save_pretrained(home)
    if (home / "config.json").exists():
        return
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU draws seven billion numbers for minutes
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(getattr(torch, DTYPE))
    model.save_pretrained(home, max_shard_size="200MB" if shape == "smollm_135m" else "4GB")
    del model
    torch.cuda.empty_cache()


def ours(start: list[str], settings: list[str], home: Path) -> dict:
    """Costs of a training from a fresh start."""
    for name in ("adapters", "checkpoints", "training", "tensorboard"):
        shutil.rmtree(home / name, ignore_errors=True)
    subprocess.run([*start, "-m", "reclora_dist.cli.train", *settings], check=True, cwd=ROOT)
    costs = json.loads((home / "training" / "reclora.json").read_text())
    keys = ("samples_per_second", "tokens_per_second", "mfu", "communication_share", "data_wait_share")
    found = {key: round(costs[key], 4) for key in keys}
    found["peak_memory_mib"] = int(costs["peak_memory_bytes"]) >> 20
    print(f"{settings[-1]}: {json.dumps(found)}", flush=True)
    return found


def validation_loss(config: Config, home: Path) -> float:
    """Log loss of the adapter that was trained last, on the validation samples."""
    shards = manifest(config, "shards", SHARDS)
    rows = read_parts(folder(config, "shards"), shards.select("text/split=validation/"))
    scores = Scorer.load(Folder(str(home / "adapters" / "reclora")), threads=2).score(rows)
    labels = rows["label"].to_numpy()
    loss = F.binary_cross_entropy(torch.from_numpy(scores), torch.from_numpy(labels.astype(np.float64)))
    return round(float(loss), 4)


def trainer(start: list[str], home: Path) -> dict:
    """The usual recipe."""
    command = [*start, str(ROOT / "benchmarks/rivals/trainer_lora.py"), str(home)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found: dict = json.loads(done.stdout.splitlines()[-1])
    print(f"Trainer: {json.dumps(found)}", flush=True)
    return found


def write_rival(config: Config, home: Path, per_device: int) -> None:
    """The same prompts as token ids."""
    home.mkdir(parents=True, exist_ok=True)
    path = config.backbone.path
    collate = text_collator(adapter_config(config, "reclora"), folder(config, "events"), path)
    shards = manifest(config, "shards", SHARDS)
    for split in ("train", "validation"):
        batch = collate(read_parts(folder(config, "shards"), shards.select(f"text/split={split}/")))
        rows = [
            {"ids": batch.input_ids[i, : int(batch.last[i]) + 1].tolist(), "label": int(batch.label[i])}
            for i in range(len(batch))
        ]
        (home / f"{split}.json").write_text(json.dumps(rows))
    lora = config.adapters["reclora"]
    settings = {
        "model": path, "dtype": DTYPE, "threads": 1, "rank": lora.rank, "alpha": lora.alpha, "per_device": per_device,
        "lr": config.lora_train.lr, "answers": answer_ids(load_tokenizer(path), config.backbone.answers),
    }  # fmt: skip
    (home / "settings.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
