"""The bank against a plain loop over tokens and experts, values and gradients, and against PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reclora_dist.lora.bank import Bank, Mode, mixes_first

MODES: tuple[Mode, ...] = ("weights", "outputs", "matrix")
SHARED: tuple[Mode, ...] = ("weights", "outputs")
"""Modes of several experts."""


@contextmanager
def form(mixing_first: bool) -> Iterator[None]:
    """Which form the ``weights`` mode takes, whatever the shape; mixtures per token have but one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reclora_dist.lora.bank.mixes_first", lambda k, x, m: mixing_first and m.dim() < 3)
        yield


def filled(bank: Bank, seed: int = 0) -> Bank:
    """The bank with a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bank.B.copy_(torch.randn(bank.B.shape, generator=generator))
    return bank


def loop(bank: Bank, x: Tensor, mixture: Tensor, output: Tensor) -> Tensor:
    """What the bank stands for, one token and one expert at a time; mixture [batch, length, width]."""
    rows = []
    for token, weights in zip(x.flatten(0, 1), mixture.flatten(0, 1), strict=True):
        experts = list(zip(weights, bank.A, bank.B, strict=False))
        if bank.mode == "weights":
            a = sum(w * a_k for w, a_k, _ in experts)
            b = sum(w * b_k for w, _, b_k in experts)
            rows.append(token @ a.T @ b)  # type: ignore[union-attr]
        elif bank.mode == "outputs":
            rows.append(sum(w * (token @ a_k.T @ b_k) for w, a_k, b_k in experts))
        else:
            rows.append(bank.B[0].T @ weights.view(bank.rank, bank.rank) @ bank.A[0] @ token)
    return output + bank.scale * torch.stack(rows).view(output.shape)  # type: ignore[arg-type]


def gradients(function: Any, bank: Bank, *inputs: Tensor) -> list[Tensor]:
    """The output and the gradients of the inputs, A and B under a fixed cotangent."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    cotangent = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output)
    return [output, *torch.autograd.grad((output * cotangent).sum(), [*leaves, bank.A, bank.B])]


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    mixing_first=st.booleans(),
    packed=st.booleans(),
    batch=st.integers(1, 4),
    length=st.integers(1, 5),
    d_in=st.integers(1, 7),
    d_out=st.integers(1, 7),
    experts=st.integers(1, 5),
    rank=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_loop(
    mode: Mode,
    mixing_first: bool,
    packed: bool,
    batch: int,
    length: int,
    d_in: int,
    d_out: int,
    experts: int,
    rank: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    experts = 1 if mode == "matrix" else experts
    bank = filled(Bank(d_in, d_out, experts, rank * experts if mode == "outputs" else rank, 16.0, mode), seed).double()
    x, output = torch.randn(batch, length, d_in).double(), torch.randn(batch, length, d_out).double()
    mixture = torch.rand(batch, bank.width).double()
    segments = torch.randint(0, batch, (batch, length)) if packed else torch.arange(batch)[:, None].expand(-1, length)
    with form(mixing_first):
        ours = gradients(lambda x, m, o: bank(x, m[segments] if packed else m, o), bank, x, mixture, output)
    theirs = gradients(lambda x, m, o: loop(bank, x, m[segments], o), bank, x, mixture, output)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixing_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_float32_stays_close_to_the_float64_loop_at_real_widths(mode: Mode, mixing_first: bool) -> None:
    torch.manual_seed(0)
    bank = filled(Bank(384, 256, 1 if mode == "matrix" else 16, 16, 16.0, mode))
    x, output = torch.randn(2, 4, 384), torch.randn(2, 4, 256)
    mixture = torch.softmax(torch.randn(2, bank.width), -1)
    with form(mixing_first):
        found = gradients(bank, bank, x, mixture, output)
    bank.double()
    doubles = (x.double(), mixture.double(), output.double())
    expected = gradients(lambda x, m, o: loop(bank, x, m[:, None].expand(-1, 4, -1), o), bank, *doubles)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize(("experts", "length"), [(2, 64), (3, 10), (16, 2), (3, 11), (16, 3)])
def test_the_form_follows_the_shape(experts: int, length: int) -> None:
    x, mixture = torch.randn(2, length, 4), torch.rand(2, experts)
    assert mixes_first(experts, x, mixture) == (experts > 2 and experts * length > 32)
    assert not mixes_first(experts, x, torch.rand(2, length, experts)), "a token has no pair of its own"


@pytest.mark.parametrize("mode", MODES)
def test_an_input_without_a_length_is_a_length_of_one(mode: Mode) -> None:
    bank = filled(Bank(6, 5, 1 if mode == "matrix" else 4, 4, 8.0, mode))
    x, mixture = torch.randn(3, 6), torch.rand(3, bank.width)
    torch.testing.assert_close(bank(x, mixture), bank(x[:, None], mixture)[:, 0])


@pytest.mark.parametrize("mode", SHARED)
def test_one_expert_is_plain_lora(mode: Mode) -> None:
    bank = filled(Bank(12, 10, 1, 4, 8.0, mode))
    x = torch.randn(3, 5, 12)
    plain = 8.0 / 4 * (x @ bank.A[0].T @ bank.B[0])
    torch.testing.assert_close(bank(x, None), plain)
    assert torch.equal(bank(x, torch.ones(3, 1)), bank(x, None))


def test_the_identity_as_matrix_is_plain_lora() -> None:
    bank = filled(Bank(12, 10, 1, 4, 8.0, "matrix"))
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(bank(x, torch.eye(4).flatten().expand(3, -1)), bank(x, None))


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
    bank = Bank(6, 5, 1 if mode == "matrix" else 4, 4, 16.0, mode)
    output = torch.randn(2, 3, 5)
    assert torch.equal(bank(torch.randn(2, 3, 6), torch.rand(2, bank.width), output), output)


def test_the_scale_is_alpha_over_the_rank_of_one_pair() -> None:
    assert Bank(6, 5, 4, 8, 16.0, "weights").scale == 2
    assert Bank(6, 5, 4, 8, 16.0, "outputs").scale == 8
    assert Bank(6, 5, 4, 8, 16.0, "outputs").A.shape == (4, 2, 6)


def test_a_rank_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 6 cannot be split over 4 experts; take a multiple of 4"):
        Bank(6, 5, 4, 6, 16.0, "outputs")


def test_a_matrix_of_several_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="mode 'matrix' has one pair of matrices, not experts = 4; take experts = 1"):
        Bank(6, 5, 4, 6, 16.0, "matrix")


def test_a_mixture_of_another_width_or_none_for_several_experts_is_refused() -> None:
    bank, x = Bank(6, 5, 4, 2, 16.0), torch.randn(2, 3, 6)
    with pytest.raises(
        ValueError, match=r"a mixture of shape \[2, 1\] for a bank in 'weights' mode that takes 4 numbers"
    ):
        bank(x, torch.rand(2, 1))
    with pytest.raises(ValueError, match=r"4 experts and no mixture; set one, \[batch, 4\]"):
        bank(x, None)


class Kernels(TorchDispatchMode):
    """Counts the operators that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "mixing_first"), [("weights", True), ("weights", False), ("outputs", False)])
def test_the_number_of_kernels_does_not_grow_with_the_experts(mode: Mode, mixing_first: bool) -> None:
    def kernels(experts: int) -> int:
        bank = Bank(16, 12, experts, 64, 100.0, mode)  # pairs of rank 1 would save one
        x, mixture = torch.randn(2, 3, 16, requires_grad=True), torch.rand(2, experts, requires_grad=True)
        with form(mixing_first), Kernels() as counter:
            bank(x, mixture, torch.zeros(2, 3, 12)).sum().backward()
        return counter.count

    assert kernels(2) == kernels(8) == kernels(32) <= 24
