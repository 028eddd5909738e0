"""Banks in real transformers models: where they go, what is frozen, what gradient checkpointing changes (nothing)."""

import copy
from typing import Any

import pytest
import torch
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


def test_no_match_names_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"no Linear layer is named any of \['query'\]; this backbone has: down_proj, .*v_proj"
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


def gradients(model: Any, banks: Any, x: torch.Tensor) -> list[torch.Tensor]:
    model.train()
    loss = model(x, use_cache=False).last_hidden_state.square().mean()
    return list(torch.autograd.grad(loss, [p for bank in banks.values() for p in bank.parameters()]))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_are_the_same_with_gradient_checkpointing() -> None:
    model, conditioning = llama(), Conditioning()
    banks = inject(model, ["q_proj", "v_proj"], CONFIG, conditioning)
    randomise(banks)
    conditioning.mixture = torch.softmax(torch.randn(6, 2, 3), -1)
    plain = gradients(model, banks, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model, banks, tokens())
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
