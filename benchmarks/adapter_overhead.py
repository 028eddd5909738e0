"""What personalisation costs: a training step of RecLoRA against one of plain LoRA by PEFT, on the same backbone.

    make bench NAME=adapter_overhead                                     one JSON object last
    make bench NAME=adapter_overhead ARGS="--shapes llama_7b --device cuda --dtype bfloat16"

A step is forward and backward without the optimiser: the same tokens, adapters of rank 8 on the query and value
projections, the logits of two answers at the last position. RecLoRA's has its gates, which read a random state of the
CRM; the CRM's own forward is left out. Weights are random, nothing is downloaded. All ways run in turns within one
process; a figure is the median of the ratios of each turn, with a 95 % bootstrap interval over the turns. On a CPU it
is the processor time of one thread, so that neighbours on the machine count less. First it is checked, in float32 on
the first two layers, that one expert makes PEFT's logits and gradients, and that the loop over the experts makes ours.

`k8`, `k16`: RecLoRA over PEFT's plain LoRA. `loop_k16`: a loop over 16 experts, each applied to all tokens, over ours.
`heterogeneous`: a batch of different users over one of copies of a single user. Each is the worst of the shapes.
`memory`: the most bytes that tensors made in a step hold at once (cuda: in the allocator), over PEFT's.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from reclora_dist.backbone.load import Backbone
from reclora_dist.config.schema import LoraConfig
from reclora_dist.lora.bank import Bank
from reclora_dist.lora.gate import GateStack
from reclora_dist.lora.inject import Conditioning, PersonalisedLinear, inject

RANK, ALPHA, STATE = 8, 16.0, 256


@dataclass(frozen=True)
class Shape:
    """A backbone by its sizes, and the batch it is measured with."""

    build: Callable[[int], nn.Module]
    layers: int
    targets: tuple[str, str]
    batch: int
    length: int


def minilm(layers: int) -> nn.Module:
    """The widths of MiniLM, without dropout and pooler."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 12}
    return BertModel(
        BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), add_pooling_layer=False
    )


def llama(hidden: int, inner: int, layers: int) -> nn.Module:
    """A LLaMA with heads of 128 or 64."""
    heads = hidden // (128 if hidden > 1024 else 64)
    return LlamaModel(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=16_000,
            use_cache=False,
        )
    )


SHAPES = {
    "minilm": Shape(minilm, 6, ("query", "value"), 16, 64),
    "llama_100m": Shape(partial(llama, 768, 2048), 12, ("q_proj", "v_proj"), 4, 64),
    "llama_7b": Shape(partial(llama, 4096, 11_008), 32, ("q_proj", "v_proj"), 4, 512),
}


@dataclass(frozen=True)
class Inputs:
    """A batch: tokens, and the CRM's state of each user."""

    ids: Tensor
    mask: Tensor
    last: Tensor
    state: Tensor

    @classmethod
    def random(cls, batch: int, length: int, device: torch.device) -> "Inputs":
        """Different users, full rows."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 10_000, (batch, length), generator=generator).to(device)
        state = torch.randn(batch, STATE, generator=generator).to(device)
        return cls(ids, torch.ones_like(ids), torch.full((batch,), length - 1, device=device), state)

    def copies(self) -> "Inputs":
        """As many copies of the first user."""
        return Inputs(self.ids[:1].expand_as(self.ids), self.mask, self.last, self.state[:1].expand_as(self.state))


@dataclass
class Way:
    """A backbone with adapters, and the gates of RecLoRA."""

    backbone: Backbone
    conditioning: Conditioning = field(default_factory=Conditioning)
    gates: GateStack | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        modules = nn.ModuleDict({"backbone": self.backbone, **({"gates": self.gates} if self.gates else {})})
        return {name: p for name, p in modules.named_parameters() if p.requires_grad}

    def step(self, inputs: Inputs) -> Tensor:
        """Forward and backward; returns the logits [batch, 2]."""
        if self.gates is not None:
            self.conditioning.mixture = self.gates(inputs.state)
        logits = self.backbone(inputs.ids, inputs.mask, inputs.last)
        F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % 2).backward()
        return logits.detach()

    def clear(self) -> None:
        """Drop gradients and what the last step left."""
        self.backbone.zero_grad(set_to_none=True)
        self.conditioning.mixture = None
        if self.gates is not None:
            self.gates.zero_grad(set_to_none=True)


class LoopedBank(nn.Module):
    """A bank in `weights` mode as others do it: each expert in turn, on all tokens."""

    def __init__(self, bank: Bank) -> None:
        super().__init__()
        self.A, self.B, self.scale = bank.A, bank.B, bank.scale

    def forward(self, x: Tensor, mixture: Tensor, output: Tensor) -> Tensor:
        """See `Bank`."""
        weights = mixture.T[:, :, None, None]
        hidden = sum(w * F.linear(x, a) for w, a in zip(weights, self.A.to(x.dtype), strict=True))
        return output + self.scale * sum(w * (hidden @ b) for w, b in zip(weights, self.B.to(x.dtype), strict=True))


def shared(backbone: Backbone) -> Backbone:
    """Another module tree over the same weights."""
    return copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})


def plain(backbone: Backbone, shape: Shape) -> Way:
    """PEFT's own LoRA, with a B that is not zero."""
    own = shared(backbone)
    settings = PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(shape.targets), lora_dropout=0.0)
    own.model = get_peft_model(own.model, settings)
    way = Way(own)
    randomise({name: p for name, p in way.trained().items() if "lora_B" in name})
    return way


def personal(backbone: Backbone, shape: Shape, experts: int, loop: bool = False) -> Way:
    """Banks of K experts with gates; the same weights with and without `loop`. One expert goes without a gate."""
    torch.manual_seed(2)
    way, config = Way(shared(backbone)), LoraConfig(experts=experts, rank=RANK, alpha=ALPHA)
    banks = inject(way.backbone.model, shape.targets, config, way.conditioning)
    way.backbone.to(backbone.answers.device)
    randomise({name: bank.B for name, bank in banks.items()})
    if experts > 1:
        gates = GateStack(len(banks), STATE, config)
        way.gates = gates.to(backbone.answers.device)
    for layer in [m for m in way.backbone.modules() if loop and isinstance(m, PersonalisedLinear)]:
        layer.bank = LoopedBank(layer.bank)
    return way


def randomise(parameters: dict[str, nn.Parameter]) -> None:
    """Small random numbers."""
    for parameter in parameters.values():
        nn.init.normal_(parameter, std=0.02)


Pairs = list[tuple[Tensor, Tensor]]


def against_peft(theirs: Way, ours: Way, inputs: Inputs) -> Pairs:
    """Logits and gradients of PEFT and of one expert with the same weights; parameters come in order, A, B, A, B."""
    pairs = list(zip(ours.trained().values(), theirs.trained().values(), strict=True))
    turned = [i % 2 == 1 for i in range(len(pairs))]  # B is stored the other way round
    with torch.no_grad():
        for (bank, peft), turn in zip(pairs, turned, strict=True):
            bank[0] = peft.T if turn else peft
    logits = [(ours.step(inputs), theirs.step(inputs))]
    return logits + [(b.grad[0].T if turn else b.grad[0], p.grad) for (b, p), turn in zip(pairs, turned, strict=True)]


def against_loop(ours: Way, loop: Way, inputs: Inputs) -> Pairs:
    """Logits and gradients of the loop and of ours, which have the same weights."""
    logits = []
    for way in (ours, loop):
        torch.manual_seed(3)  # dropout of the gates
        logits.append(way.step(inputs))
    pairs = zip(ours.trained().values(), loop.trained().values(), strict=True)
    return [(logits[0], logits[1]), *((a.grad, b.grad) for a, b in pairs)]


def check(shape: Shape, inputs: Inputs) -> float:
    """Largest difference relative to the largest entry of its tensor; stops if it is above 1e-3."""
    backbone = frozen(shape, 2, inputs.ids.device, torch.float32)
    ours, loop = (personal(backbone, shape, 16, loop=loop) for loop in (False, True))
    pairs = against_peft(plain(backbone, shape), personal(backbone, shape, 1), inputs)
    pairs += against_loop(ours, loop, inputs)
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if not worst <= 1e-3:
        raise SystemExit(f"ways that should agree differ by {worst:.3g} (allowed: 1e-3); times are not compared")
    return worst


def frozen(shape: Shape, layers: int, device: torch.device, dtype: torch.dtype) -> Backbone:
    """A backbone of random weights."""
    torch.manual_seed(0)
    with device:
        model = shape.build(layers).to(dtype)
        answers = torch.randn(2, model.config.hidden_size, dtype=dtype)
    return Backbone(model, answers, model.config.hidden_size).train()


def seconds(way: Way, inputs: Inputs) -> float:
    """Time of a step."""
    way.clear()
    cuda = inputs.ids.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    started = clock()
    way.step(inputs)
    if cuda:
        torch.cuda.synchronize()
    return clock() - started


class Live(TorchDispatchMode):
    """Follows how many bytes the tensors hold that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self._known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, Tensor):
                    self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def peak_bytes(way: Way, inputs: Inputs) -> int:
    """The most bytes alive within a step, parameters left out."""
    way.clear()
    if inputs.ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way.step(inputs)
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        way.step(inputs)
    return live.peak


def measured(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict:
    """All figures of one shape."""
    inputs = Inputs.random(shape.batch, shape.length, device)
    worst = check(shape, inputs)
    backbone = frozen(shape, shape.layers, device, dtype)
    ways = {
        "plain": plain(backbone, shape),
        "k8": personal(backbone, shape, 8),
        "k16": personal(backbone, shape, 16),
        "loop": personal(backbone, shape, 16, loop=True),
    }
    runs = {**{name: (way, inputs) for name, way in ways.items()}, "copies": (ways["k16"], inputs.copies())}
    times = in_turns(runs, rounds)
    peaks = {name: peak_bytes(*run) for name, run in runs.items() if name != "copies"}
    return {
        "batch": shape.batch,
        "length": shape.length,
        "largest_difference": float(f"{worst:.2g}"),
        "plain_ms": round(statistics.median(times["plain"]) * 1e3, 1),
        "k8": ratio(times["k8"], times["plain"]),
        "k16": ratio(times["k16"], times["plain"]),
        "loop_k16": ratio(times["loop"], times["k16"]),
        "heterogeneous": ratio(times["k16"], times["copies"]),
        "plain_mib": round(peaks["plain"] / 2**20, 1),
        "memory": {name: round(peak / peaks["plain"], 3) for name, peak in peaks.items()},
    }


def in_turns(runs: dict[str, tuple[Way, Inputs]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each, one of each in every round; the first two rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 2):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(*runs[name]))
    return {name: spent[2:] for name, spent in times.items()}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Median of the ratios of each round and its 95 % bootstrap interval."""
    ratios = np.array(above) / np.array(below)
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"median": round(float(np.median(ratios)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["minilm", "llama_100m"], choices=list(SHAPES), help="backbones")
    parser.add_argument("--batch", type=int, help="samples of a batch; the shape's own if left out")
    parser.add_argument("--length", type=int, help="tokens of a sample; the shape's own if left out")
    parser.add_argument("--rounds", type=int, default=15, help="turns that count")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="type of the frozen weights"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {}
    for name in arguments.shapes:
        shape = SHAPES[name]
        sizes = {"batch": arguments.batch or shape.batch, "length": arguments.length or shape.length}
        shape = dataclasses.replace(shape, **sizes)
        shapes[name] = measured(
            shape, torch.device(arguments.device), getattr(torch, arguments.dtype), arguments.rounds
        )
        print(f"{name}: {json.dumps(shapes[name])}", flush=True)
    worst = {key: max(found[key]["median"] for found in shapes.values()) for key in ("k8", "k16", "heterogeneous")}
    least = min(found["loop_k16"]["median"] for found in shapes.values())
    print(json.dumps({**worst, "loop_k16": least, "device": arguments.device, "shapes": shapes}))


if __name__ == "__main__":
    main()
