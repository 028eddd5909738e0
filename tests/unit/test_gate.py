"""The stacked gates against one small network per matrix."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reclora_dist.lora.gate import GateStack


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
    return lambda h: torch.softmax(second(torch.relu(first(norm(h)))) / gates.temperature, -1)


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
    gates = randomised(GateStack(matrices, state, hidden, experts, temperature, 0.1)).eval()
    h = 3 * torch.randn(batch, state) + 1
    mixture = gates(h)
    assert mixture.shape == (matrices, batch, experts)
    torch.testing.assert_close(mixture, one_by_one(gates, h), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixture.sum(-1), torch.ones(matrices, batch))


def test_a_higher_temperature_is_nearer_to_uniform() -> None:
    torch.manual_seed(0)
    h = torch.randn(6, 8)
    cold = randomised(GateStack(2, 8, 5, 4, 0.5, 0.0)).eval()
    entropies = []
    for temperature in (0.5, 1.0, 5.0, 1e6):
        cold.temperature = temperature
        entropies.append(torch.special.entr(cold(h)).sum(-1).mean().item())
    assert entropies == sorted(entropies)
    assert entropies[-1] == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-4)


def test_dropout_only_in_training() -> None:
    gates = randomised(GateStack(2, 8, 20, 4, 1.0, 0.5))
    h = torch.randn(3, 8)
    assert not torch.equal(gates.train()(h), gates(h))
    assert torch.equal(gates.eval()(h), gates(h))


def test_starts_as_linear_layers_do_with_zero_bias() -> None:
    torch.manual_seed(0)
    gates = GateStack(3, 256, 60, 16, 5.0, 0.1)
    assert 0.95 * 256**-0.5 < gates.w1.abs().max() <= 256**-0.5
    assert 0.95 * 60**-0.5 < gates.w2.abs().max() <= 60**-0.5
    assert not gates.b1.any()
    assert not gates.b2.any()
    assert not torch.equal(gates.w1[0], gates.w1[1]), "each matrix has a gate of its own"


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature {temperature} must be above 0"):
        GateStack(1, 2, 3, 4, temperature, 0.0)
