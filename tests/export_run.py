"""Adapters of random weights, exported and scored by PEFT; a module of its own, because two test files import it."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sample_data import small_config
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

from reclora_dist.backbone.load import answer_ids, load_tokenizer, mean_pool
from reclora_dist.cli.export import export_user
from reclora_dist.config.schema import BackboneConfig, Config, ExportConfig, LoraConfig, RetrievalConfig
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import CRM
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.build import load_crm
from reclora_dist.evaluate.scorer import Scorer, feature_store
from reclora_dist.lora.adapter import AdapterIdentity, save_adapter
from reclora_dist.lora.batch import TextBatch
from reclora_dist.train import stages

ITEMS = [f"i{n}" for n in range(1, 9)]
FACTS = {"steps": 3, "best_step": 2, "validation_auc": 0.75, "history": [{"step": 2, "validation_auc": 0.75}]}


def write_bert(run: Path) -> BackboneConfig:
    """A small BERT of random weights at ``bert/``, with the tokenizer of the run's LLaMA."""
    folder, tokenizer = run / "bert", load_tokenizer(str(run / "backbone"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.cls_token, tokenizer.sep_token = "<s>", "</s>"
    tokenizer.save_pretrained(folder)
    return BackboneConfig(kind="encoder", path=str(folder), targets=("query", "value"))


def save_random(run: Path, lora: LoraConfig, backbone: BackboneConfig | None = None) -> str:
    """An adapter of a kind, all of its trained weights random; returns its folder."""
    config = small_config(run, adapters={"some": lora}, retrieval=RetrievalConfig("recent", long=8, short=4))
    config = config if backbone is None else dataclasses.replace(config, backbone=backbone)
    crm, folder = Folder(str(run / "crm")), Folder(str(run / "adapters" / "some"))
    manifest = read_manifest(crm, CRM)
    model = stages.build_model(config, lora, load_crm(crm, manifest))
    torch.manual_seed(1)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for value in trained.values():
        nn.init.normal_(value, std=0.3)
    identity = AdapterIdentity("", parents(config))
    save_adapter(folder, stages.adapter_config(config, "some"), trained, (crm, manifest), identity, FACTS)
    return folder.uri


def parents(config: Config) -> dict[str, str]:
    return dict(stages.adapter_target(config, "some").parents)


def export(adapter: str, out: Path, user: str = "") -> Path:
    """The PEFT folder of a user."""
    export_user(ExportConfig(adapter, user, str(out)))
    return out


def assert_peft_scores_the_same(adapter: str, folder: Path, user: str) -> np.ndarray:
    """PEFT's scores of a user and some items are the scorer's, merged or not; returns them."""
    scorer = Scorer.from_pretrained(adapter, device="cpu")
    rows = feature_store(adapter, scorer.config).rows(ITEMS, scorer.config.retrieval, user=user)
    expected, batch = scorer.score(rows), scorer.collate(rows)
    base = scorer.config.backbone_path
    path = base if Path(base).is_absolute() else str(Path(adapter) / base)
    causal = scorer.config.backbone.kind != "encoder"
    loaded = PeftModel.from_pretrained((AutoModelForCausalLM if causal else AutoModel).from_pretrained(path), folder)
    score = _causal_score if causal else _encoder_score
    with loaded.eval().disable_adapter():
        assert np.abs(score(loaded, batch, folder, path) - expected).max() > 1e-3, "the adapter does something"
    for model in (loaded, loaded.merge_and_unload()):
        np.testing.assert_allclose(score(model, batch, folder, path), expected, atol=1e-5)
    return expected


@torch.inference_mode()
def _causal_score(model: nn.Module, batch: TextBatch, folder: Path, path: str) -> np.ndarray:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    answers = answer_ids(load_tokenizer(path), ("No", "Yes"))
    return torch.softmax(logits[torch.arange(len(batch)), batch.last][:, answers].double(), -1)[:, 1].numpy()


@torch.inference_mode()
def _encoder_score(model: nn.Module, batch: TextBatch, folder: Path, path: str) -> np.ndarray:
    hidden = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    head = load_file(folder / "head.safetensors")
    logits = F.linear(mean_pool(hidden, batch.attention_mask), head["weight"], head["bias"])
    return torch.softmax(logits.double(), -1)[:, 1].numpy()
