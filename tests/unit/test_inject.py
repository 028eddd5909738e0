"""Banks in real transformers models: where they go, what is frozen, what gradient checkpointing changes (nothing)."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import AutoModel

from reclora_dist.backbone.tiny import build
from reclora_dist.config.schema import LoraConfig, TinyConfig
from reclora_dist.lora.inject import Conditioning, PersonalisedLinear, inject

CONFIG = LoraConfig(experts=3, rank=2, alpha=4.0)


def llama(layers: int = 3) -> Any:
    torch.manual_seed(0)
    return build(TinyConfig(hidden=16, layers=layers, heads=2), 50).get_decoder()


def tokens(batch: int = 2, length: int = 7, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def randomise(banks: Any) -> None:
    torch.manual_seed(2)
    for bank in banks.values():
        nn.init.normal_(bank.B, std=0.5)


def test_targets_are_wrapped_in_order_and_the_rest_is_frozen() -> None:
    model = llama()
    banks = inject(model, ["q_proj", "v_proj"], CONFIG, Conditioning())
    assert list(banks) == [f"layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qv"]
    wrapped = [model.get_submodule(name) for name in banks]
    assert [layer.index for layer in wrapped] == list(range(6))
    assert all(isinstance(layer, PersonalisedLinear) for layer in wrapped)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.bank.{m}" for name in banks for m in "AB"}


def test_only_the_top_layers() -> None:
    banks = inject(llama(), ["q_proj", "down_proj"], CONFIG, Conditioning(), top_layers=2)
    assert sorted({int(name.split(".")[1]) for name in banks}) == [1, 2]
    assert len(banks) == 4


def test_every_linear_of_a_block_with_its_own_shape() -> None:
    model = llama(1)
    shapes = {
        name.rpartition(".")[2]: module.weight.shape for name, module in model.named_modules() if is_linear(module)
    }
    banks = inject(model, list(shapes), CONFIG, Conditioning())
    assert len(banks) == 7
    for name, bank in banks.items():
        d_out, d_in = shapes[name.rpartition(".")[2]]
        assert bank.A.shape == (3, 2, d_in)
        assert bank.B.shape == (3, 2, d_out)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        (["q_proj", "mlp.down_proj"], ["self_attn.q_proj", "mlp.down_proj"]),
        ([], ["self_attn.q_proj", "self_attn.v_proj"]),
    ],
)
def test_targets_are_last_names_or_ends_of_the_full_name_or_left_to_us(targets: list[str], names: list[str]) -> None:
    assert list(inject(llama(1), targets, CONFIG, Conditioning())) == [f"layers.0.{name}" for name in names]
    with pytest.raises(ValueError, match="no linear layer"):
        inject(llama(1), ["attn.q_proj", "proj"], CONFIG, Conditioning())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_all_linear_is_what_peft_takes() -> None:
    torch.manual_seed(0)
    causal = build(TinyConfig(hidden=16, layers=2, heads=2), 50)
    theirs = get_peft_model(copy.deepcopy(causal), PeftConfig(target_modules="all-linear"))
    found = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(inject(causal, ["all-linear"], CONFIG, Conditioning())) == found
    assert not any("lm_head" in name for name in found)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"]])
def test_one_expert_in_a_llama_is_pefts_lora(targets: list[str]) -> None:
    model, x = llama(2), tokens()
    settings = PeftConfig(r=2, lora_alpha=4, target_modules=targets if len(targets) > 1 else targets[0])
    theirs = get_peft_model(copy.deepcopy(model), settings)
    banks = inject(model, targets, LoraConfig(experts=1, rank=2, alpha=4.0, gate="none"), Conditioning())
    randomise(banks)
    pairs = []
    for name, bank in banks.items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        pairs += [(bank.A, layer.lora_A["default"].weight), (bank.B, layer.lora_B["default"].weight)]
        layer.lora_A["default"].weight.data.copy_(bank.A.data[0])
        layer.lora_B["default"].weight.data.copy_(bank.B.data[0].T)
    outputs = [found(input_ids=x, use_cache=False).last_hidden_state for found in (model, theirs)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for place, (mine, peft) in enumerate(pairs):
        torch.testing.assert_close(mine.grad[0].T if place % 2 else mine.grad[0], peft.grad)


class Int8Linear(nn.Module):
    """A quantised layer without a weight of floating point."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        scale = base.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale.detach())
        self.register_buffer("integers", (base.weight / scale).round().to(torch.int8).detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.integers.to(x.dtype) * self.scale.to(x.dtype)).T


def test_a_quantised_base_is_only_called() -> None:
    model, conditioning = llama(2), Conditioning()
    exact = model(tokens()).last_hidden_state
    for name, module in [(n, m) for n, m in model.named_modules() if is_linear(m)]:
        model.set_submodule(name, Int8Linear(module))
    banks = inject(model, ["q_proj", "v_proj"], CONFIG, conditioning)
    conditioning.mixture = torch.softmax(torch.randn(4, 2, 3), -1)
    found = model(tokens()).last_hidden_state
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0.05)
    randomise(banks)
    assert all(gradient.any() for gradient in gradients(model, banks, tokens()))


def test_banks_of_a_bfloat16_base_stay_in_float32() -> None:
    """Steps of 1e-5 are kept in float32 weights and lost in nearly all bfloat16 ones."""
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, conditioning = llama(2).to(dtype), Conditioning()
        banks = inject(model, ["q_proj", "v_proj"], CONFIG, conditioning)
        randomise(banks)
        torch.manual_seed(4)
        mixture = torch.softmax(torch.randn(4, 2, 3), -1).requires_grad_()
        conditioning.mixture = mixture
        outputs[dtype] = model(tokens(), use_cache=False).last_hidden_state
        outputs[dtype].float().square().mean().backward()
        assert mixture.grad is not None
        assert all(p.dtype == p.grad.dtype == torch.float32 for bank in banks.values() for p in bank.parameters())
    assert outputs[torch.bfloat16].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[torch.bfloat16].float(), outputs[torch.float32], atol=0.1, rtol=0.1)
    weight = banks["layers.0.self_attn.q_proj"].A
    before = weight.detach().clone()
    torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0).step()
    assert (weight != before).float().mean() > 0.9
    assert (weight.bfloat16() == before.bfloat16()).float().mean() > 0.9


def test_several_samples_in_a_row_score_as_padded_ones() -> None:
    lengths = [7, 3, 5]
    model, conditioning, x = llama(2), Conditioning(), tokens(3)
    banks = inject(model, ["q_proj", "v_proj", "down_proj"], CONFIG, conditioning)
    randomise(banks)
    mixture = torch.softmax(torch.randn(6, 3, 3), -1).requires_grad_()
    leaves = [mixture, *(p for bank in banks.values() for p in bank.parameters())]
    real = torch.arange(7) < torch.tensor(lengths)[:, None]
    conditioning.mixture = mixture
    padded = model(input_ids=x * real, attention_mask=real.long(), use_cache=False).last_hidden_state[real]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    conditioning.segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model(input_ids=x[real][None], position_ids=places, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(packed, padded)
    found, expected = (torch.autograd.grad(y.square().sum(), leaves) for y in (packed, padded))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_mixture_is_cast_and_spread_once_for_all_matrices() -> None:
    conditioning = Conditioning(torch.rand(2, 3, 4), torch.tensor([[0, 0, 2], [1, 1, 0]]))
    first, second = (conditioning.row(index, torch.bfloat16) for index in (0, 1))
    assert first is not None
    assert first is conditioning.row(0, torch.bfloat16)
    assert second is not None
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    torch.testing.assert_close(first[0, 2], conditioning.mixture[0, 2].bfloat16())  # type: ignore[index]
    conditioning.mixture = torch.zeros(2, 3, 4)
    assert not conditioning.row(0, torch.bfloat16).any(), "a new mixture counts at once"  # type: ignore[union-attr]


def test_no_match_names_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"no linear layer is named any of \['query'\]; this backbone has: down_proj, .*v_proj"
    ):
        inject(llama(), ["query"], CONFIG, Conditioning())


def test_each_matrix_takes_its_own_row_of_the_mixture_and_each_sample_its_own_column() -> None:
    model, conditioning, x = llama(), Conditioning(), tokens()
    banks = inject(model, ["q_proj", "v_proj"], CONFIG, conditioning)
    randomise(banks)
    conditioning.mixture = torch.softmax(torch.randn(6, 2, 3), -1)
    both = model(x).last_hidden_state
    for sample in range(2):
        conditioning.mixture, kept = conditioning.mixture[:, sample : sample + 1], conditioning.mixture
        torch.testing.assert_close(model(x[sample : sample + 1]).last_hidden_state[0], both[sample])
        conditioning.mixture = kept
    conditioning.mixture = conditioning.mixture.flip(0)
    assert not torch.allclose(model(x).last_hidden_state, both)


def gradients(model: Any, banks: Any, x: torch.Tensor, *more: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the banks and of ``more`` in training mode, dropout seeded."""
    model.train()
    torch.manual_seed(5)
    loss = model(x, use_cache=False).last_hidden_state.square().mean()
    return list(torch.autograd.grad(loss, [*(p for bank in banks.values() for p in bank.parameters()), *more]))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_the_same_with_gradient_checkpointing(dropout: float) -> None:
    model, conditioning = llama(), Conditioning()
    config = LoraConfig(experts=3, rank=2, alpha=4.0, dropout=dropout)
    banks = inject(model, ["q_proj", "v_proj"], config, conditioning)
    randomise(banks)
    conditioning.mixture = torch.softmax(torch.randn(6, 2, 3), -1).requires_grad_()
    plain = gradients(model, banks, tokens(), conditioning.mixture)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model, banks, tokens(), conditioning.mixture)
    assert all(p.any() for p in plain)
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "targets", "matrices"),
    [("stories260K", ["q_proj", "v_proj"], 10), ("all-MiniLM-L6-v2", ["query", "value"], 12)],
)
def test_real_weights_are_unchanged_by_new_banks_and_reached_by_gradients(
    real_model: Any, name: str, targets: list[str], matrices: int
) -> None:
    model = AutoModel.from_pretrained(real_model.path(name), dtype=torch.float32).eval()
    x = tokens(vocabulary=300)
    before = model(input_ids=x).last_hidden_state
    original = copy.deepcopy(model.state_dict())
    conditioning = Conditioning()
    banks = inject(model, targets, CONFIG, conditioning)
    assert len(banks) == matrices
    conditioning.mixture = torch.softmax(torch.randn(matrices, 2, 3), -1)
    torch.testing.assert_close(model(input_ids=x).last_hidden_state, before)
    randomise(banks)
    model(input_ids=x).last_hidden_state.square().mean().backward()
    assert all(bank.A.grad is not None and bank.A.grad.any() for bank in banks.values())
    kept = {key.replace(".base.", "."): value for key, value in model.state_dict().items() if ".bank." not in key}
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[key], original[key]) for key in original)
