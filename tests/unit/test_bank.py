"""The bank against a plain loop over samples and experts, values and gradients, and against PEFT."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reclora_dist.lora.bank import Bank, Mode

MODES: tuple[Mode, ...] = ("weights", "outputs")


def filled(bank: Bank, seed: int = 0) -> Bank:
    """The bank with a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bank.B.copy_(torch.randn(bank.B.shape, generator=generator))
    return bank


def loop(bank: Bank, x: Tensor, mixture: Tensor) -> Tensor:
    """What the bank stands for, one sample and one expert at a time."""
    rows = []
    for sample, weights in zip(x, mixture, strict=True):
        experts = list(zip(weights, bank.A, bank.B, strict=True))
        if bank.mode == "weights":
            a = sum(w * a_k for w, a_k, _ in experts)
            b = sum(w * b_k for w, _, b_k in experts)
            rows.append(sample @ a.T @ b)  # type: ignore[union-attr]
        else:
            rows.append(sum(w * (sample @ a_k.T @ b_k) for w, a_k, b_k in experts))
    return bank.scale * torch.stack(rows)  # type: ignore[arg-type]


def gradients(function: Any, bank: Bank, x: Tensor, mixture: Tensor) -> list[Tensor]:
    """The output and the gradients of x, mixture, A and B under a fixed cotangent."""
    x, mixture = x.clone().requires_grad_(), mixture.clone().requires_grad_()
    output = function(x, mixture)
    cotangent = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)
    return [output, *torch.autograd.grad((output * cotangent).sum(), [x, mixture, bank.A, bank.B])]


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    batch=st.integers(1, 4),
    length=st.integers(1, 5),
    d_in=st.integers(1, 7),
    d_out=st.integers(1, 7),
    experts=st.integers(1, 5),
    width=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_loop(
    mode: Mode, batch: int, length: int, d_in: int, d_out: int, experts: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rank = width if mode == "weights" else width * experts
    bank = filled(Bank(d_in, d_out, experts, rank, 16.0, mode), seed).double()
    x, mixture = torch.randn(batch, length, d_in).double(), torch.rand(batch, experts).double()
    ours = gradients(bank, bank, x, mixture)
    theirs = gradients(lambda x, m: loop(bank, x, m), bank, x, mixture)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_float32_stays_close_to_the_float64_loop_at_real_widths(mode: Mode) -> None:
    torch.manual_seed(0)
    bank = filled(Bank(384, 256, 16, 16, 16.0, mode))
    x, mixture = torch.randn(4, 20, 384), torch.softmax(torch.randn(4, 16), -1)
    found = gradients(bank, bank, x, mixture)
    bank.double()
    expected = gradients(lambda x, m: loop(bank, x, m), bank, x.double(), mixture.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
def test_one_expert_is_plain_lora(mode: Mode) -> None:
    bank = filled(Bank(12, 10, 1, 4, 8.0, mode))
    x = torch.randn(3, 5, 12)
    plain = 8.0 / 4 * (x @ bank.A[0].T @ bank.B[0])
    torch.testing.assert_close(bank(x, None), plain)
    torch.testing.assert_close(bank(x, torch.ones(3, 1)), plain)


def test_one_expert_is_pefts_lora_in_values_and_gradients() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"proj": nn.Linear(12, 10)})
    frozen = nn.Linear(12, 10).requires_grad_(False)
    frozen.load_state_dict(base["proj"].state_dict())
    theirs = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["proj"]), base)["proj"]
    bank = filled(Bank(12, 10, 1, 4, 8.0))
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(bank.A[0])
        b.copy_(bank.B[0].T)
    x = torch.randn(3, 5, 12)
    mine, peft = frozen(x) + bank(x, None), theirs(x)
    torch.testing.assert_close(mine, peft)
    mine.square().sum().backward()
    peft.square().sum().backward()
    torch.testing.assert_close(bank.A.grad[0], a.grad)  # type: ignore[index]
    torch.testing.assert_close(bank.B.grad[0].T, b.grad)  # type: ignore[index]


def test_a_starts_like_pefts_and_b_at_zero() -> None:
    bank = Bank(300, 10, 4, 8, 16.0)
    bound = 300**-0.5  # kaiming_uniform(a=√5)
    assert 0.95 * bound < bank.A.abs().max() <= bound
    assert not bank.B.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_new_bank_changes_nothing(mode: Mode) -> None:
    bank = Bank(6, 5, 4, 4, 16.0, mode)
    assert not bank(torch.randn(2, 3, 6), torch.rand(2, 4)).any()


def test_the_scale_is_alpha_over_the_rank_of_one_pair() -> None:
    assert Bank(6, 5, 4, 8, 16.0, "weights").scale == 2
    assert Bank(6, 5, 4, 8, 16.0, "outputs").scale == 8
    assert Bank(6, 5, 4, 8, 16.0, "outputs").A.shape == (4, 2, 6)


def test_a_rank_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 6 cannot be split over 4 experts; take a multiple of 4"):
        Bank(6, 5, 4, 6, 16.0, "outputs")


class Kernels(TorchDispatchMode):
    """Counts the operators that reach the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_kernels_does_not_grow_with_the_experts(mode: Mode) -> None:
    def kernels(experts: int) -> int:
        bank = Bank(16, 12, experts, 32, 16.0, mode)  # pairs of rank 1 would save one
        x, mixture = torch.randn(2, 3, 16, requires_grad=True), torch.rand(2, experts, requires_grad=True)
        with Kernels() as counter:
            bank(x, mixture).sum().backward()
        return counter.count

    assert kernels(2) == kernels(16) < 60
