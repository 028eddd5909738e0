"""The gates: the stacked ones against one small network per matrix, a user's rows, and how evenly experts are used."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from reclora_dist.config.schema import LoraConfig
from reclora_dist.lora.gate import RANDOM_ROWS, GateStack, IdGate, RandomGate, gate_use, imbalance, mix


def stack(matrices: int, state: int, hidden: int, experts: int, temperature: float, dropout: float = 0.0) -> GateStack:
    config = LoraConfig(experts=experts, gate_hidden=hidden, temperature=temperature, gate_dropout=dropout)
    return GateStack(matrices, state, config)


def randomised(gates: GateStack) -> GateStack:
    """Gates whose norms and biases are not at their start values."""
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return gates


def one_by_one(gates: GateStack, state: Tensor) -> Tensor:
    """The gates as method.md words them, a network for each matrix."""
    return torch.stack([network(gates, matrix)(state) for matrix in range(len(gates.w1))])


def network(gates: GateStack, matrix: int) -> Any:
    state, hidden, experts = *gates.w1.shape[1:], gates.w2.shape[2]
    norm, first, second = nn.LayerNorm(state), nn.Linear(state, hidden), nn.Linear(hidden, experts)
    with torch.no_grad():
        for module, weight, bias in (
            (norm, gates.norm_weight[matrix, 0], gates.norm_bias[matrix, 0]),
            (first, gates.w1[matrix].T, gates.b1[matrix, 0]),
            (second, gates.w2[matrix].T, gates.b2[matrix, 0]),
        ):
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    return lambda h: torch.softmax(second(torch.relu(first(norm(h)))) / gates.config.temperature, -1)


@settings(max_examples=25, deadline=None)
@given(
    matrices=st.integers(1, 5),
    batch=st.integers(1, 4),
    state=st.integers(2, 9),
    hidden=st.integers(1, 6),
    experts=st.integers(1, 5),
    temperature=st.floats(0.5, 5),
)
def test_equals_one_network_per_matrix(
    matrices: int, batch: int, state: int, hidden: int, experts: int, temperature: float
) -> None:
    torch.manual_seed(0)
    gates = randomised(stack(matrices, state, hidden, experts, temperature, 0.1)).eval()
    h = 3 * torch.randn(batch, state) + 1
    mixture = gates(h)
    assert mixture.shape == (matrices, batch, experts)
    torch.testing.assert_close(mixture, one_by_one(gates, h), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixture.sum(-1), torch.ones(matrices, batch))


def test_a_higher_temperature_is_nearer_to_uniform() -> None:
    torch.manual_seed(0)
    h = torch.randn(6, 8)
    gates = randomised(stack(2, 8, 5, 4, 0.5)).eval()
    entropies = []
    for temperature in (0.5, 1.0, 5.0, 1e6):
        gates.config = LoraConfig(temperature=temperature)
        entropies.append(torch.special.entr(gates(h)).sum(-1).mean().item())
    assert entropies == sorted(entropies)
    assert entropies[-1] == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-4)


def test_dropout_only_in_training() -> None:
    gates = randomised(stack(2, 8, 20, 4, 1.0, 0.5))
    h = torch.randn(3, 8)
    assert not torch.equal(gates.train()(h), gates(h))
    assert torch.equal(gates.eval()(h), gates(h))


def test_starts_as_linear_layers_do_with_zero_bias() -> None:
    torch.manual_seed(0)
    gates = stack(3, 256, 60, 16, 5.0)
    assert 0.95 * 256**-0.5 < gates.w1.abs().max() <= 256**-0.5
    assert 0.95 * 60**-0.5 < gates.w2.abs().max() <= 60**-0.5
    assert not gates.b1.any()
    assert not gates.b2.any()
    assert not torch.equal(gates.w1[0], gates.w1[1]), "each matrix has a gate of its own"


@settings(max_examples=25, deadline=None)
@given(experts=st.integers(1, 7), kept=st.integers(1, 7), seed=st.integers(0, 99))
def test_top_k_keeps_the_k_largest_and_their_proportions(experts: int, kept: int, seed: int) -> None:
    kept = min(kept, experts)
    logits = 3 * torch.randn(2, 5, experts, generator=torch.Generator().manual_seed(seed))
    every = mix(logits, LoraConfig(experts=experts, temperature=2.0))
    found = mix(logits, LoraConfig(experts=experts, temperature=2.0, top_k=kept))
    assert ((found > 0).sum(-1) == kept).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 5))
    shares = torch.where(found > 0, every, 0.0)
    torch.testing.assert_close(found, shares / shares.sum(-1, keepdim=True))
    assert (every[found == 0].numel() == 0) or (every.amax(-1) == shares.amax(-1)).all()


def test_gradients_flow_through_the_kept_experts_alone() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]], requires_grad=True)
    mixture = mix(logits, LoraConfig(experts=4, temperature=1.0, top_k=2))
    (gradient,) = torch.autograd.grad(mixture[0, 0], logits)
    assert (gradient != 0).tolist() == [[True, False, True, False]]


def test_a_matrix_gate_gives_r_by_r_numbers_and_starts_near_the_identity() -> None:
    torch.manual_seed(0)
    gates = GateStack(3, 8, LoraConfig(experts=1, rank=4, mode="matrix", temperature=1e-6)).eval()
    found = gates(torch.randn(5, 8))
    assert found.shape == (3, 5, 16)
    torch.testing.assert_close(found.mean((0, 1)).view(4, 4), torch.eye(4), atol=0.5, rtol=0)
    assert not torch.allclose(found[0, 0], found[0, 1]), "samples differ"
    with torch.no_grad():
        gates.w2.zero_()
    assert torch.equal(gates(torch.randn(1, 8))[0].view(4, 4), torch.eye(4))


@pytest.mark.parametrize("changes", [{"state_dropout": 0.5}, {"state_noise": 0.3}])
def test_the_state_is_disturbed_in_training_only(changes: dict[str, float]) -> None:
    torch.manual_seed(0)
    gates, h = randomised(GateStack(2, 8, LoraConfig(experts=3, gate_dropout=0.0, **changes))), torch.randn(4, 8)
    still = randomised(GateStack(2, 8, LoraConfig(experts=3, gate_dropout=0.0)))
    still.load_state_dict(gates.state_dict())
    assert not torch.equal(gates.train()(h), gates(h))
    assert torch.equal(gates.eval()(h), still.train()(h))


def test_noise_has_its_standard_deviation_whatever_the_states_scale() -> None:
    gates = GateStack(1, 4000, LoraConfig(state_noise=0.3, gate_hidden=1))
    state = 100 * torch.randn(3, 4000) + 7
    assert float((gates.train()._normed(state) - gates.eval()._normed(state)).std()) == pytest.approx(0.3, rel=0.05)


class Kernels(TorchDispatchMode):
    """Counts the operators that reach the backend."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_k", [0, 2])
def test_the_number_of_kernels_grows_neither_with_the_experts_nor_with_the_matrices(top_k: int) -> None:
    def kernels(matrices: int, experts: int) -> list[int]:
        config = LoraConfig(experts=experts, top_k=top_k, balance=0.1)
        made = [GateStack(matrices, 8, config), IdGate(matrices, 9, config), RandomGate(matrices, config, 0)]
        counts = []
        for gate in made:
            with Kernels() as counter:
                found = gate(torch.randn(4, 8) if isinstance(gate, GateStack) else torch.arange(4))
                imbalance(found)
            counts.append(counter.count)
        return counts

    assert kernels(2, 3) == kernels(40, 16)


def test_a_new_users_mixture_is_uniform_and_learned_ones_are_their_own() -> None:
    gate = IdGate(2, 5, LoraConfig(experts=3, temperature=1.0))
    torch.testing.assert_close(gate(torch.tensor([0, 4])), torch.full((2, 2, 3), 1 / 3))
    with torch.no_grad():
        gate.logits.weight[4] = torch.arange(6.0)
    found = gate(torch.tensor([3, 4, 99]))
    torch.testing.assert_close(found[:, 1], torch.softmax(torch.arange(6.0).view(2, 3), -1))
    torch.testing.assert_close(found[:, [0, 2]], torch.full((2, 2, 3), 1 / 3), msg="99 is beyond the table")
    gate(torch.tensor([2, 2]))[..., 0].sum().backward()
    assert gate.logits.weight.grad is not None
    assert gate.logits.weight.grad.any(1).nonzero().flatten().tolist() == [2]


def test_random_mixtures_follow_from_user_and_seed_and_nothing_is_trained() -> None:
    config, users = LoraConfig(experts=4, temperature=1.0), torch.tensor([7, 8, 7, 7 + RANDOM_ROWS])
    gate, twin, other = (RandomGate(2, config, seed) for seed in (0, 0, 1))
    found = gate(users)
    assert found.shape == (2, 4, 4)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4))
    assert torch.equal(found, twin(users))
    assert torch.equal(found[:, 0], found[:, 2])
    assert torch.equal(found[:, 0], found[:, 3]), "the table has an end"
    assert not torch.allclose(found[:, 0], found[:, 1])
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found, other(users))
    assert not list(gate.parameters()) and not gate.state_dict()


def test_imbalance_is_0_for_even_use_and_rises_to_k_minus_1() -> None:
    def of(*rows: list[float]) -> float:
        return float(imbalance(torch.tensor([rows])))

    even = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]
    assert of([0.25] * 4) == pytest.approx(0, abs=1e-6)
    assert of(*even) == pytest.approx(0, abs=1e-6), "one expert each, but all alike in sum"
    assert of([1.0, 0, 0, 0]) == pytest.approx(3)
    growing = [of([0.25 + 3 * d, *[0.25 - d] * 3]) for d in (0.0, 0.05, 0.1, 0.2)]
    assert growing == sorted(growing) and len(set(growing)) == 4


def test_imbalance_is_the_squared_variation_of_the_experts_mean_weights() -> None:
    mixture = torch.softmax(torch.randn(3, 6, 5), -1)
    importance = mixture.sum(1)
    expected = (importance.std(-1, correction=0) / importance.mean(-1)).square().mean()
    torch.testing.assert_close(imbalance(mixture), expected)
    with_an_even_one = torch.stack([torch.full((6, 5), 0.2), mixture[0]])
    torch.testing.assert_close(imbalance(with_an_even_one), imbalance(mixture[:1]) / 2)


def test_the_use_of_experts() -> None:
    mixture = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.8], [0.2, 0.8]]])
    use = gate_use(mixture)
    entropy = torch.special.entr(torch.tensor([0.2, 0.8])).sum() / torch.tensor(2.0).log()
    assert use.entropy == pytest.approx((0 + 1 + 2 * float(entropy)) / 4, rel=1e-5)
    assert use.weight == pytest.approx([1.9 / 4, 2.1 / 4])
    assert use.largest == [0.5, 0.5]
