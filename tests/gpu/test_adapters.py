"""On an accelerator: the bank is its float64 self on the CPU, and the bench of adapters runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reclora_dist.lora.bank import Bank, Mode

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device: the test needs one"),
]


def gradients(bank: Bank, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of x, mixture, output, A and B, in float64 on the CPU."""
    x, mixture, output = (t.clone().requires_grad_() for t in tensors.values())
    result = bank(x, mixture, output)
    result.double().square().sum().backward()
    leaves: list[Any] = [x, mixture, output, bank.A, bank.B]
    return [result.detach().double().cpu(), *(leaf.grad.double().cpu() for leaf in leaves)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("mode", "experts"), [("weights", 16), ("weights", 2), ("outputs", 4), ("matrix", 1)])
def test_values_and_gradients_are_those_of_the_cpu(
    mode: Mode, experts: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    bank = Bank(512, 256, experts, 8, 16.0, mode)
    torch.nn.init.normal_(bank.B, std=0.1)
    twin = Bank(512, 256, experts, 8, 16.0, mode).double()
    twin.load_state_dict(bank.state_dict())
    shapes = {"x": (4, 64, 512), "mixture": (4, bank.width), "output": (4, 64, 256)}
    tensors = {name: torch.rand(shape).to(dtype) for name, shape in shapes.items()}
    found = gradients(bank.cuda(), {name: t.cuda() for name, t in tensors.items()})
    expected = gradients(twin, {name: t.double() for name, t in tensors.items()})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def test_the_bench_compares_with_peft_and_prints_its_figures() -> None:
    command = [sys.executable, "benchmarks/adapter_overhead.py", "--shapes", "llama_100m", "--device", "cuda"]
    command += ["--dtype", "bfloat16", "--rounds", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert {"k8", "k16", "loop_k16", "heterogeneous"} <= json.loads(done.stdout.splitlines()[-1]).keys()
