"""RecLora as a whole: the CRM stays as it is, the mixture is its, and the score is the full model's."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load, save
from small_model import LORA, crm, llama, model, text_batch
from torch import nn
from transformers import LlamaForCausalLM

from reclora_dist.backbone.load import Backbone, load_backbone, load_tokenizer
from reclora_dist.backbone.tiny import build, train_tokenizer
from reclora_dist.config.schema import BackboneConfig, LoraConfig, TinyConfig
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.lora.adapter import load_trained
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.gate import GateStack, imbalance
from reclora_dist.lora.model import RecLora, parameter_role
from reclora_dist.train.stages import adapter_loss, text_loss

KINDS = {
    "crm": LoraConfig(experts=3, rank=2, gate_hidden=5, temperature=1.0),
    "user": LoraConfig(experts=3, rank=2, gate="user", state_dropout=0.1, state_noise=0.1),
    "id": LoraConfig(experts=3, rank=2, gate="id", head="offset"),
    "random": LoraConfig(experts=3, rank=2, gate="random", head="fusion"),
    "shared top 2": LoraConfig(experts=4, rank=4, mode="outputs", shared_gate=True, top_k=2, balance=0.1),
    "uniform": LoraConfig(experts=3, rank=2, gate="uniform", head="fusion"),
    "lora": LoraConfig(experts=1, rank=2, gate="none", head="offset"),
}
HEADS: tuple[Literal["offset"], Literal["answers"]] = ("offset", "answers")


def test_the_crm_stays_in_eval_mode_and_is_no_parameter() -> None:
    personal, batch = model(), text_batch()
    before = {name: value.clone() for name, value in personal.crm.state_dict().items()}
    personal.train()
    assert not any(module.training for module in personal.crm.modules())
    assert personal.training
    state = personal.crm(batch.crm).state
    assert torch.equal(personal.crm(batch.crm).state, state), "no dropout"
    nn.functional.cross_entropy(personal(batch), batch.label.long()).backward()
    assert all(p.grad is None and not p.requires_grad for p in personal.crm.parameters())
    assert all(torch.equal(personal.crm.state_dict()[name], value) for name, value in before.items())
    own = {id(p) for p in personal.crm.parameters()}
    assert not own & {id(p) for p in personal.parameters()}
    assert not any("crm" in name for name in personal.state_dict())


def test_all_banks_and_gates_get_gradients_and_nothing_else() -> None:
    personal, batch = model(), text_batch()
    nn.functional.cross_entropy(personal(batch), batch.label.long()).backward()
    reached = {name for name, p in personal.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, p in personal.named_parameters() if p.requires_grad}
    assert {parameter_role(name) for name in reached} == {"bank", "gate"}
    assert all(name.startswith("gates.") or ".bank." in name for name in reached)


def test_the_mixture_follows_the_crms_state() -> None:
    personal, batch = model().eval(), text_batch()
    mixture = personal.mixture(batch.crm)
    assert mixture is not None
    assert mixture.shape == (4, 4, 3)
    assert isinstance(personal.gates, GateStack)
    torch.testing.assert_close(mixture, personal.gates(personal.crm(batch.crm).state))
    assert not torch.allclose(mixture[:, 0], mixture[:, 1]), "samples differ"
    assert not torch.allclose(mixture[0], mixture[1]), "matrices differ"


def test_the_crm_moves_with_the_model() -> None:
    personal = model().double()
    assert personal.crm.logit.weight.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_are_the_same_with_gradient_checkpointing() -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        personal, batch = model(LoraConfig(experts=3, rank=2, gate_hidden=5, gate_dropout=0.0)), text_batch()
        if checkpointing:
            personal.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        nn.functional.cross_entropy(personal.train()(batch), batch.label.long()).backward()
        return {name: p.grad for name, p in personal.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], msg=name)


@pytest.mark.parametrize("lora", KINDS.values(), ids=list(KINDS))
def test_a_packed_batch_gives_the_same_scores_and_gradients(lora: LoraConfig) -> None:
    lora = dataclasses.replace(lora, gate_dropout=0.0, state_dropout=0.0, state_noise=0.0)

    def outcome(batch: TextBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        personal = model(lora).train()
        logits = personal(batch)
        nn.functional.cross_entropy(logits, batch.label.long()).backward()
        return logits.detach(), {name: p.grad for name, p in personal.named_parameters() if p.grad is not None}

    batch = text_batch()
    assert not batch.attention_mask.all(), "some samples are padded"
    padded, packed = outcome(batch), outcome(batch.packed())
    torch.testing.assert_close(packed, padded)
    assert batch.packed().input_ids.shape == (1, int(batch.attention_mask.sum()))


def test_parts_of_a_batch_are_trimmed_and_score_alike() -> None:
    personal, batch = model().eval(), text_batch()
    order = torch.argsort(batch.last)
    short = batch.take(order[:2])
    assert short.input_ids.shape == (2, int(batch.last[order[1]]) + 1)
    torch.testing.assert_close(personal(short), personal(batch)[order[:2]])
    assert (batch.size, batch.tokens) == (24, int(batch.attention_mask.sum()))


def test_a_uniform_gate_is_the_average_bank() -> None:
    uniform = model(LoraConfig(experts=3, rank=2, gate="uniform")).eval()
    plain = model(LoraConfig(experts=1, rank=2, gate="none")).eval()
    for name, bank in uniform.banks.items():
        plain.banks[name].A.data = bank.A.data.mean(0, keepdim=True)
        plain.banks[name].B.data = bank.B.data.mean(0, keepdim=True)
    assert uniform.gates is None
    torch.testing.assert_close(uniform(text_batch()), plain(text_batch()))


def test_plain_lora_is_one_expert_without_gate() -> None:
    plain = model(LoraConfig(experts=1, rank=2, gate="none")).eval()
    gated = model(LoraConfig(experts=1, rank=2, gate="crm")).eval()
    for name, bank in plain.banks.items():
        gated.banks[name].load_state_dict(bank.state_dict())
    assert plain.mixture(text_batch().crm) is None
    torch.testing.assert_close(plain(text_batch()), gated(text_batch()))


def test_several_experts_need_a_gate() -> None:
    with pytest.raises(ValueError, match="gate 'none' needs experts = 1, not 3; or take gate 'uniform'"):
        model(LoraConfig(experts=3, gate="none"))


def test_new_banks_leave_the_backbones_logits() -> None:
    personal, batch = model().eval(), text_batch()
    for bank in personal.banks.values():
        nn.init.zeros_(bank.B)
    causal = llama().eval()
    full = causal(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(personal(batch), full[torch.arange(4), batch.last][:, [7, 9]])


def test_right_padding_changes_no_logit() -> None:
    for encoder in (False, True):  # the decoder stands in for an encoder: what matters is the pooling
        personal, batch = model(encoder=encoder).eval(), text_batch()
        for row in range(len(batch)):
            own = int(batch.last[row]) + 1
            alone = TextBatch(
                CrmBatch(**{k: v[row : row + 1] for k, v in vars(batch.crm).items()}),
                batch.input_ids[row : row + 1, :own],
                batch.attention_mask[row : row + 1, :own],
                batch.last[row : row + 1],
            )
            torch.testing.assert_close(personal(alone)[0], personal(batch)[row])


def test_a_loaded_causal_model_scores_as_the_full_one(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Yes or No: will they like it?"] * 50, 300)
    causal = build(TinyConfig(hidden=16, layers=2, heads=2), len(tokenizer))
    causal.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load_backbone(BackboneConfig(), str(tmp_path)).eval()
    assert_full_softmax(backbone, tmp_path, len(tokenizer))


def test_a_real_llama_scores_as_the_full_one(real_model: Any) -> None:
    path = Path(real_model.path("stories260K"))
    assert_full_softmax(load_backbone(BackboneConfig(kind="causal"), str(path)).eval(), path, 500)


def assert_full_softmax(backbone: Backbone, path: Path, vocabulary: int) -> None:
    """The backbone's two logits, soft-maxed, are the full softmax restricted to the answers."""
    tokenizer = load_tokenizer(str(path))
    answers = []
    for word in ("No", "Yes"):
        first = next(
            i for i in tokenizer(f" {word}", add_special_tokens=False)["input_ids"] if tokenizer.decode([i]).strip()
        )
        answers.append(first)
    batch = text_batch(vocabulary)
    full = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    logits = full(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    every = torch.softmax(logits[torch.arange(4), batch.last], -1)[:, answers]
    ours = torch.softmax(backbone(batch.input_ids, batch.attention_mask, batch.last), -1)
    torch.testing.assert_close(ours, every / every.sum(-1, keepdim=True))
    assert not any(parameter.shape[0] == 2 for parameter in backbone.parameters()), "no head is trained"


def test_an_encoder_has_a_trained_head(real_model: Any) -> None:
    path = real_model.path("all-MiniLM-L6-v2")
    config = BackboneConfig(kind="encoder", targets=("query", "value"), top_layers=2)
    backbone, twin = load_backbone(config, path), load_backbone(config, path)
    assert backbone.head is not None
    assert twin.head is not None
    assert torch.equal(backbone.head.weight, twin.head.weight), "the seed sets where the head starts"
    personal, batch = RecLora(backbone, crm(), config, LORA), text_batch(1000)
    personal(batch).square().mean().backward()
    reached = {name for name, p in personal.named_parameters() if p.grad is not None}
    assert {"backbone.head.weight", "backbone.head.bias"} <= reached
    assert parameter_role("backbone.head.weight") == "other"
    assert len(personal.banks) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_that_is_trained_and_never_the_crm(kind: str) -> None:
    lora = KINDS[kind]
    for encoder in (False, True):
        personal, batch = model(lora, encoder).train(), text_batch()
        adapter_loss(personal)(personal(batch), batch).backward()
        reached = {name for name, p in personal.named_parameters() if p.grad is not None}
        assert reached == {name for name, p in personal.named_parameters() if p.requires_grad}
        assert any(name.startswith("gates.") for name in reached) == (lora.gate in ("crm", "user", "id"))
        heads = {name.partition(".")[0] for name in reached if parameter_role(name) == "other"}
        assert heads == ({"fusion"} if lora.head == "fusion" else {"backbone"} if encoder else set())
        assert all(p.grad is None for p in personal.crm.parameters())
        assert not any(module.training for module in personal.crm.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_of_any_kind_scores_the_same_to_the_bit(kind: str) -> None:
    personal, batch = model(KINDS[kind]).eval(), text_batch()
    with torch.no_grad():
        for p in personal.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape))
    content = save({name: p for name, p in personal.named_parameters() if p.requires_grad})
    other = model(KINDS[kind]).eval()
    assert kind == "uniform" or not torch.equal(other(batch), personal(batch))
    load_trained(other, load(content), "here")
    assert torch.equal(other(batch), personal(batch))


@pytest.mark.parametrize("gate", ["crm", "user", "id", "random", "uniform"])
def test_one_expert_is_plain_lora_whatever_the_gate(gate: Any) -> None:
    plain, batch = model(LoraConfig(experts=1, rank=2, gate="none")).eval(), text_batch()
    for mode in ("weights", "outputs"):
        gated = model(LoraConfig(experts=1, rank=2, gate=gate, mode=mode)).eval()  # type: ignore[arg-type]
        for name, bank in plain.banks.items():
            gated.banks[name].load_state_dict(bank.state_dict())
        torch.testing.assert_close(plain(batch), gated(batch))


@pytest.mark.parametrize("gate", ["crm", "user", "id", "random", "uniform"])
def test_mixtures_of_every_gate_sum_to_1(gate: Any) -> None:
    for shared in (False, gate != "uniform"):
        mixture = model(LoraConfig(experts=3, rank=2, gate=gate, shared_gate=shared)).eval().mixture(text_batch().crm)
        assert mixture is not None
        assert mixture.shape == (4, 4, 3)
        torch.testing.assert_close(mixture.sum(-1), torch.ones(4, 4))
        if shared:
            assert mixture.stride()[0] == 0, "expanded, not copied"
        if gate == "uniform":
            assert torch.equal(mixture, torch.full_like(mixture, 1 / 3))


def other_target(batch: TextBatch) -> TextBatch:
    """The same users and histories before another item; statistics of the user alone are kept."""
    rows = batch.crm
    item_counts = torch.tensor([1.0, 1.0, 0.0, 0.0])
    changed = dataclasses.replace(rows, item=rows.item % 9 + 1, statistics=rows.statistics + 5 * item_counts)
    return dataclasses.replace(batch, crm=changed)


@pytest.mark.parametrize(("gate", "moves"), [("crm", True), ("user", False), ("id", False), ("random", False)])
def test_only_the_crms_gate_knows_the_target_item(gate: Any, moves: bool) -> None:
    personal, batch = model(LoraConfig(experts=3, rank=2, gate=gate)).eval(), text_batch()
    one, other = personal.mixture(batch.crm), personal.mixture(other_target(batch).crm)
    assert one is not None
    assert other is not None
    assert torch.equal(one, other) != moves


def test_a_matrix_gate_gives_r_by_r_numbers_per_matrix_and_sample() -> None:
    for gate in ("crm", "user"):
        mixture = model(LoraConfig(experts=1, rank=2, mode="matrix", gate=gate)).mixture(text_batch().crm)  # type: ignore[arg-type]
        assert mixture is not None
        assert mixture.shape == (4, 4, 4)


def test_an_encoder_with_an_offset_starts_at_the_crms_score() -> None:
    personal, batch = model(LoraConfig(experts=3, rank=2, head="offset"), encoder=True).eval(), text_batch()
    score = torch.softmax(personal(batch), dim=-1)[:, 1]
    torch.testing.assert_close(score, torch.sigmoid(personal.crm(batch.crm).logit))


def test_the_offset_is_the_crms_logit_on_yes() -> None:
    offset, plain, batch = (*(model(LoraConfig(experts=1, gate="none", head=h)).eval() for h in HEADS), text_batch())
    for name, bank in plain.banks.items():
        offset.banks[name].load_state_dict(bank.state_dict())
    difference = offset(batch) - plain(batch)
    torch.testing.assert_close(difference[:, 1], offset.crm(batch.crm).logit, atol=1e-5, rtol=1e-4)
    assert not difference[:, 0].any()


def test_a_blend_trains_the_answers_alone_and_scores_with_a_mean() -> None:
    blend, batch = model(LoraConfig(experts=1, gate="none", head="blend", blend=0.2)), text_batch()
    plain = model(LoraConfig(experts=1, gate="none"))
    plain.load_state_dict(blend.state_dict())
    answers = plain.eval()(batch)
    torch.testing.assert_close(blend.train()(batch), answers)
    scored = blend.eval()(batch)
    crm = blend.crm(batch.crm).logit
    torch.testing.assert_close(scored.diff(dim=1)[:, 0], 0.2 * answers.diff(dim=1)[:, 0] + 0.8 * crm)
    assert not torch.allclose(scored, answers)


def test_fusion_reads_the_text_and_the_crms_state_whatever_their_scale() -> None:
    for encoder in (False, True):
        personal, batch = model(LoraConfig(experts=1, gate="none", head="fusion"), encoder).eval(), text_batch()
        assert personal.fusion is not None
        logits = personal(batch)
        assert logits.shape == (4, 2)
        pooled = personal.backbone.pooled(batch.input_ids, batch.attention_mask, batch.last)
        state = personal.crm(batch.crm).state
        torch.testing.assert_close(personal.fusion(pooled, state), logits)
        torch.testing.assert_close(personal.fusion(1000 * pooled, 1000 * state), logits, atol=1e-2, rtol=1e-2)
        assert not torch.allclose(personal.fusion(pooled.roll(1, 0), state), logits)
        assert not torch.allclose(personal.fusion(pooled, state.roll(1, 0)), logits)


def test_a_foreign_mixture_takes_the_place_of_the_own_and_of_nothing_else() -> None:
    personal, batch = model(LoraConfig(experts=3, rank=2, head="offset", temperature=0.1)).eval(), text_batch()
    own = personal.mixture(batch.crm)
    assert own is not None
    torch.testing.assert_close(personal(batch, own), personal(batch))
    foreign = personal(batch, own.roll(1, 1))
    assert not torch.allclose(foreign, personal(batch))
    for bank in personal.banks.values():
        nn.init.zeros_(bank.B)
    torch.testing.assert_close(personal(batch, own.roll(1, 1)), personal(batch), msg="the CRM's logit is the row's own")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_the_balance_loss_evens_the_use_out_with_and_without_gradient_checkpointing() -> None:
    lora = LoraConfig(experts=3, rank=2, balance=0.5, temperature=0.2, gate_dropout=0.0)
    found = []
    for checkpointing in (False, True):
        personal, batch = model(lora).train(), text_batch()
        if checkpointing:
            personal.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        logits = personal(batch)
        mixture = personal.mixture(batch.crm)
        assert mixture is not None
        loss = adapter_loss(personal)(logits, batch)
        torch.testing.assert_close(loss, text_loss(logits, batch) + 0.5 * imbalance(mixture))
        loss.backward()
        found.append({name: p.grad for name, p in personal.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)
    optimiser = torch.optim.SGD(personal.gates.parameters(), lr=0.1)  # type: ignore[union-attr]
    before = imbalance(mixture).item()
    for _ in range(20):
        optimiser.zero_grad()
        personal(batch)
        (adapter_loss(personal)(torch.zeros(4, 2), batch)).backward()
        optimiser.step()
    assert imbalance(personal.mixture(batch.crm)).item() < before / 2  # type: ignore[arg-type]
