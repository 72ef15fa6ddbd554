"""One optimiser step against the floor: its operations over the matrix-product rate measured in the same run.

    python -m benchmarks.step [--big] [--threads 2]

Prints, for a SmolLM2-sized block (and with --big for a 7B-sized one), what a step of each method takes, which share
of the machine's rate that is, and what SDE adds against its share of the operations. Also times two parts of a
step alone: fake quantization with clipping (plain autograd operations, compiled, in closed form) and causal attention
(torch's, ours).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import truediv

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import RESULTS, write_json
from makeweight.calib.capture import place
from makeweight.methods.base import Context
from makeweight.models.attention import speed_up
from makeweight.numerics.attention import causal_attention
from makeweight.numerics.flips import Curvature
from makeweight.numerics.flops import matmul_rate, step_flops
from makeweight.numerics.grid import clipped_grid, from_codes, grouped, qparams
from makeweight.numerics.memory import keep_freed_memory
from makeweight.numerics.precision import name_of, named_dtype
from makeweight.numerics.scheme import Scheme
from makeweight.plan import compose
from makeweight.sweep.block import Block
from makeweight.sweep.chain import Chain, Steps
from makeweight.sweep.descent import Descent
from makeweight.sweep.judge import Judge

METHODS = ("lwc", "lwc+sde", "lwc+sde+cl", "autoround", "flipround", "flipround+cl")
SEQLEN = 512
SCHEME = Scheme(bits=3, group_size=64)
SIZES = {  # hidden size, intermediate size, query heads, key and value heads
    "SmolLM2-135M block": (576, 1536, 9, 3),
    "7B block": (4096, 11008, 32, 32),
}
FILE = RESULTS / "step.json"


def layers(title: str, count: int, device: torch.device) -> list[Block]:
    """Build random decoder layers of a size, with the arguments that they are called with."""
    from transformers import LlamaConfig, LlamaModel

    hidden, inner, heads, kv_heads = SIZES[title]
    config = LlamaConfig(
        vocab_size=8,
        num_hidden_layers=count,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    model = LlamaModel(config).requires_grad_(False)
    speed_up(model)
    dtype = named_dtype("auto", device)
    place(model, device, dtype)
    positions_1T = torch.arange(SEQLEN, device=device).unsqueeze(0)
    probe = torch.zeros(1, SEQLEN, hidden, dtype=dtype, device=device)
    kwargs = {
        "position_embeddings": model.rotary_emb(probe, positions_1T),
        "attention_mask": None,
    }
    blocks = []
    for index, module in enumerate(model.layers):
        names = tuple(name for name, part in module.named_modules() if isinstance(part, nn.Linear))
        blocks.append(Block(index, module, names, kwargs))
    return blocks


def alternate(
    works: Mapping[str, Callable[[], object]], device: torch.device, *, budget: float
) -> dict[str, list[float]]:
    """Return the seconds of every call of each, called in turn so that a busy moment hits all of them."""
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    end, rounds = time.perf_counter() + budget * len(works), 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return times


def middle(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median seconds of each."""
    return {name: statistics.median(found) for name, found in times.items()}


def measure_block(title: str, batch: int, device: torch.device, budget: float) -> list[dict[str, float | str]]:
    """Time one step of every method on one block."""
    blocks, hidden, dtype = layers(title, 3, device), SIZES[title][0], named_dtype("auto", device)
    shapes = [(weight.shape[0], weight.shape[1]) for weight in blocks[0].state().values()]
    hidden_BTD = torch.randn(batch, SEQLEN, hidden, device=device).to(dtype)
    context = Context(scheme=SCHEME, scale_dtype=torch.bfloat16, dtype=dtype, steps=1)
    plans = {method: compose(method) for method in METHODS}
    ahead = {method: len(plan.loss.weights()) - 1 for method, plan in plans.items()}

    def stepper(method: str) -> Callable[[], object]:
        plan = plans[method]
        chain = Chain.build(blocks[0].state(), Steps(maps=plan.maps, grid=plan.grid), context).to(device)
        judge = Judge(blocks=tuple(blocks[: ahead[method] + 1]), weights=plan.loss.weights(), device=device)
        chain.quantizer.take_curvature(lambda: {name: _flat(weight_OI) for name, weight_OI in chain.base.items()})
        descent = Descent(chain.learnables(), steps=1)
        targets = [hidden_BTD] * len(judge.blocks)

        def step() -> None:
            loss = judge.loss(judge.errors(chain(), hidden_BTD, targets))
            descent.zero_grad()
            loss.backward()
            descent.step(1)

        return step

    rates = [matmul_rate(device, rows=batch * SEQLEN, size=hidden, dtype=dtype)]
    times = alternate({method: stepper(method) for method in METHODS}, device, budget=budget)
    took = middle(times)
    rates.append(matmul_rate(device, rows=batch * SEQLEN, size=hidden, dtype=dtype))
    rows: list[dict[str, float | str]] = []
    for method, plan in plans.items():
        work, rate = step_flops(shapes, hidden, batch, SEQLEN, ahead=ahead[method], band=plan.band), max(rates)
        rows.append(
            {
                "block": title, "method": method, "tokens": batch * SEQLEN, "seconds": took[method],
                "gflop": work / 1e9, "rate_gflops": rate / 1e9, "share_of_rate": work / took[method] / rate,
                "times_lwc": statistics.median(map(truediv, times[method], times["lwc"])),
            }
        )  # fmt: skip
    return rows


def _flat(weight_OI: Tensor) -> Curvature:
    """Return a curvature that is the same everywhere: what it is does not change the time of a step."""
    return torch.ones_like(weight_OI[:, :1]), torch.ones_like(weight_OI[0])


def sde_overhead(rows: Sequence[dict[str, float | str]]) -> float:
    """Return the time SDE adds to `lwc`, round by round, over the time of `lwc` times SDE's share of the operations."""
    found = {row["method"]: row for row in rows}
    lwc, sde = found["lwc"], found["lwc+sde"]
    return (float(sde["times_lwc"]) - 1) / (float(sde["gflop"]) / float(lwc["gflop"]) - 1)


def plain_grid(weight_OI: Tensor, low_OG: Tensor, high_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Fake-quantize with plain operations and autograd's own backward, for comparison."""
    weight_OGS = grouped(weight_OI, SCHEME.group_size)
    bottom_OG = weight_OGS.amin(-1).clamp(max=0) * low_OG
    top_OG = weight_OGS.amax(-1).clamp(min=0) * high_OG
    scale_OG = (top_OG - bottom_OG) / (SCHEME.qmax - SCHEME.qmin)
    zero_OG = qparams(bottom_OG.detach(), top_OG.detach(), SCHEME, torch.bfloat16)[1]
    scaled_OGS = weight_OGS / scale_OG.unsqueeze(-1) + zero_OG.unsqueeze(-1)
    rounded_OGS = scaled_OGS + (scaled_OGS.round() - scaled_OGS).detach()
    codes_OGS = rounded_OGS.clamp(SCHEME.qmin, SCHEME.qmax)
    return from_codes(codes_OGS, scale_OG, zero_OG).flatten(1).to(dtype)


def fused_grid(weight_OI: Tensor, low_OG: Tensor, high_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """Fake-quantize in closed form, as the methods do."""
    return clipped_grid(weight_OI, low_OG, high_OG, SCHEME, scale_dtype=torch.bfloat16, dtype=dtype)


def measure_grid(device: torch.device, budget: float) -> dict[str, float]:
    """Time fake quantization, forward and backward, over the weights of a SmolLM2 block."""
    weight = (torch.randn(6144, 576, device=device) * 0.02).requires_grad_()
    low, high = (torch.full((6144, 9), 0.98, device=device, requires_grad=True) for _ in range(2))
    dtype = named_dtype("auto", device)
    grad = torch.randn(6144, 576, device=device).to(dtype)
    ways = {"plain": plain_grid, "compiled": torch.compile(plain_grid, dynamic=False), "closed form": fused_grid}

    def run(way: Callable[..., Tensor]) -> None:
        way(weight, low, high, dtype).backward(grad)
        weight.grad = low.grad = high.grad = None

    try:
        run(ways["compiled"])
    except RuntimeError as error:
        print(f"nothing can be compiled here and is left out: {str(error).splitlines()[0]}")
        del ways["compiled"]
    return middle(alternate({name: partial(run, way) for name, way in ways.items()}, device, budget=budget))


def torch_attention(query_BHTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor) -> Tensor:
    """Attend as transformers does, with torch's fused kernel."""
    return F.scaled_dot_product_attention(query_BHTD, key_BKTD, value_BKTD, is_causal=True, enable_gqa=True)


def measure_attention(batch: int, device: torch.device, budget: float) -> dict[str, float]:
    """Time causal attention, forward and backward, with the heads of a SmolLM2 block."""
    hidden, _, heads, kv_heads = SIZES["SmolLM2-135M block"]
    width = hidden // heads
    shapes = [(batch, count, SEQLEN, width) for count in (heads, kv_heads, kv_heads)]
    dtype = named_dtype("auto", device)
    parts = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    grad = torch.randn(shapes[0], device=device).to(dtype)
    ways = {"torch": torch_attention, "ours": partial(causal_attention, scale=width**-0.5)}

    def run(way: Callable[..., Tensor]) -> None:
        torch.autograd.grad(way(*parts), parts, grad)

    return middle(alternate({name: partial(run, way) for name, way in ways.items()}, device, budget=budget))


def main() -> None:
    """Measure, print, and keep the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--big", action="store_true", help="the 7B-sized block as well (minutes on a CPU)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens per step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="time budget of each figure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = torch.device(args.device)
    found: dict[str, object] = json.loads(FILE.read_text()) if FILE.is_file() else {}
    machine = {"device": device.type, "threads": args.threads, "torch": torch.__version__}
    machine["dtype"] = name_of(named_dtype("auto", device))
    for title in SIZES if args.big else list(SIZES)[:1]:
        rows = measure_block(title, args.batch, device, args.seconds)
        found[title] = [{**row, **machine} for row in rows]
        rate = f"{rows[0]['rate_gflops']:.0f} GFLOP/s in {machine['dtype']}"
        print(f"{title}, {args.batch} x {SEQLEN} tokens, {rate}")
        for row in rows:
            print(f"  {row['method']:<12} {row['seconds']:8.3f} s  {row['share_of_rate']:6.1%} of that rate")
        print(f"  lwc+sde costs {sde_overhead(rows):.2f} times its share of the operations more than lwc")
    parts = {
        "fake quantization of a block's weights": measure_grid(device, args.seconds),
        f"causal attention, {args.batch} x {SEQLEN} tokens": measure_attention(args.batch, device, args.seconds),
    }
    for title, times in parts.items():
        first = next(iter(times))
        print(f"{title}, forward and backward")
        for name, took in times.items():
            print(f"  {name:<12} {took * 1e3:7.1f} ms  {times[first] / took:5.1f} x {first}")
    write_json(FILE, found | parts)


if __name__ == "__main__":
    main()
