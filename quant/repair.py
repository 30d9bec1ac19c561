"""Repair a quantized network by a short distillation: beside each frozen layer a product of two small factors is learned,
and a shift of its bias.

Guarantees: codes, scales and sparse entries stay as they are; the network is handed back as it was, also when
the loss raises; for one seed and one loss the same factors on one kind of machine.
Knows nothing of: the network, its data and the loss, which are the caller's.

Forward, a layer computes exactly what it will compute later, rounding included, plus x R L^T and the shift. Backward, the rounding of
weights and inputs counts as the identity (straight-through).
Source: Hu et al., LoRA, ICLR 2022, for the form; here L R^T starts from zero or from the largest part of what
quantization lost (Guo et al., LQ-LoRA, ICLR 2024). Rounding shifts means, which a bias takes back at no cost in bits
(Nagel et al., Data-Free Quantization, ICCV 2019, by a closed form).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.low_rank import store_factors
from bitdgdm.quant.packing import pack
from bitdgdm.quant.parts import LinearParts, factor_codes, merged
from bitdgdm.quant.robust_pca import truncated_svd
from bitdgdm.quant.transform import into, transform_of

RATE = 2e-4
"""Largest learning rate of AdamW for factors; it rises over a tenth of the steps and falls to zero by a cosine."""

_SHIFT_RATE = 1.0  # of the rate of factors


@dataclass(frozen=True)
class Factors:
    """L float32[out, R] and R float32[in, R] of what is added to a weight, L R^T, in the layer's own input space."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Learned:
    """What was learned beside one layer. shift: float32[out], to be added to its bias, None if it has none."""

    factors: Factors | None
    shift: Tensor | None


def repair(
    network: nn.Module,
    parts: Mapping[str, LinearParts],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rank: int | Mapping[str, int],
    targets: Mapping[str, Tensor] | None = None,
    rate: float = RATE,
    seed: int = 0,
    progress: Callable[[float], object] | None = None,
) -> dict[str, Learned]:
    """Learn factors and shifts for the QuantLinears of `network` and return them on the CPU, by name.

    parts: what every QuantLinear of the network was made from. rank: of all, or by name; a layer of rank 0 gets no
    factors. loss: a scalar of step k, computed by running `network` with gradients.
    targets: full-precision weights [out, in] by name; factors start from the largest part of what is lost of them,
    without them from zero. Of a layer narrower than `rank` the factors have its width.
    progress is told the fraction of the steps that is done. Raises: ValueError if a loss isn't finite, if there is
    nothing to repair, or a QuantLinear has no parts.
    """
    ranks = (
        dict.fromkeys(parts, rank) if isinstance(rank, int) else {name: rank.get(name, 0) for name in parts}
    )
    if not parts or min(ranks.values()) < 0 or steps < 1:
        raise ValueError(f"nothing to repair: {len(parts)} layers, rank {rank}, {steps} steps")
    there = {name for name, module in network.named_modules() if isinstance(module, QuantLinear)}
    if there != set(parts):
        raise ValueError(f"parts and quantized layers differ: {', '.join(sorted(there ^ set(parts)))}")
    generator = torch.Generator().manual_seed(seed)
    starts = {
        name: _start(p, ranks[name], None if targets is None else targets[name], generator)
        for name, p in parts.items()
        if ranks[name]
    }
    with _beside(network, parts, starts) as learned:
        factors = [f for layer in learned.values() for f in (layer.up, layer.down) if f is not None]
        shifts = [layer.shift for layer in learned.values() if layer.shift is not None]
        groups = [{"params": factors, "times": 1.0}, {"params": shifts, "times": _SHIFT_RATE}]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        free = [*factors, *shifts]
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["times"] * _warm(step, steps)
            value = loss(step)
            if not bool(torch.isfinite(value)):
                raise ValueError(f"the loss of repair step {step} is {float(value.detach())}")
            for factor, gradient in zip(
                free, torch.autograd.grad(value, free, allow_unused=True), strict=True
            ):
                factor.grad = gradient
            optimizer.step()
            if progress is not None:
                progress((step + 1) / steps)
        if not all(bool(torch.isfinite(p).all()) for p in free):
            raise ValueError(f"what was learned is not finite after {steps} repair steps")
        return {name: layer.learned() for name, layer in learned.items()}


def joined(parts: LinearParts, found: Factors, bits: int) -> LinearParts:
    """The parts with L R^T of `found` among their factors, stored in `bits` like those that they may have.

    Raises: ValueError if the remainder is deflated by the factors: then they aren't only something added.
    """
    if parts.deflated:
        raise ValueError("factors that deflate the remainder take no others; learn a bias only (rank 0)")
    t = transform_of(parts.premul, parts.shape[1], parts.smooth, parts.permutation, parts.swaps)
    new = store_factors(found.up, into(found.down.T, t).T.contiguous(), bits)
    both: dict[str, Any] = dict(new)
    if parts.proj_up is None:
        return replace(parts, **both)
    for name in ("proj_up", "proj_down"):
        old, old_scale = getattr(parts, name), getattr(parts, f"{name}_scale")
        new_scale = new.get(f"{name}_scale")
        codes = torch.cat((factor_codes(old, old_scale), factor_codes(new[name], new_scale)), dim=1)
        if old_scale is None or new_scale is None:
            both[name] = codes.to(old.dtype)
            continue
        integers = codes.to(torch.int8)
        both[name] = integers if bits == 8 else pack(integers, bits)
        both[f"{name}_scale"] = torch.cat((old_scale, new_scale))
    return replace(parts, **both)


class _Beside(nn.Module):
    """A frozen layer and the factors that are learned beside it. weight: float32[out, in], what the layer stands for."""

    def __init__(self, layer: QuantLinear, weight: Tensor, start: Factors | None) -> None:
        super().__init__()
        device = next(iter(layer.buffers())).device
        self.layer, self.weight = layer, weight.to(device)
        self.up = None if start is None else nn.Parameter(start.up.to(device))
        self.down = None if start is None else nn.Parameter(start.down.to(device))
        self.shift = None if layer.bias is None else nn.Parameter(torch.zeros_like(layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        straight = F.linear(x, self.weight)
        y = straight + (self.layer(x) - straight).detach()
        if self.up is not None and self.down is not None:
            y = y + (x @ self.down) @ self.up.T
        return y if self.shift is None else y + self.shift

    def learned(self) -> Learned:
        up, down, shift = (
            None if p is None else p.detach().cpu().clone() for p in (self.up, self.down, self.shift)
        )
        return Learned(None if up is None or down is None else Factors(up, down), shift)


@contextmanager
def _beside(
    network: nn.Module, parts: Mapping[str, LinearParts], starts: Mapping[str, Factors]
) -> Iterator[dict[str, _Beside]]:
    """Put factors beside the named layers; nothing else of the network learns inside the block."""
    learning = {p: p.requires_grad for p in network.parameters()}
    layers = {name: network.get_submodule(name) for name in parts}
    placed: dict[str, _Beside] = {}
    try:
        for p in learning:
            p.requires_grad_(False)
        for name, layer in layers.items():
            assert isinstance(layer, QuantLinear)
            placed[name] = _Beside(layer, merged(parts[name]), starts.get(name))
            _replace(network, name, placed[name])
        yield placed
    finally:
        for name, layer in layers.items():
            _replace(network, name, layer)
        for p, learns in learning.items():
            p.requires_grad_(learns)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    setattr(network.get_submodule(owner), child, module)


def _start(parts: LinearParts, rank: int, target: Tensor | None, generator: torch.Generator) -> Factors:
    rank = min(rank, *parts.shape)
    if target is None:
        down = torch.randn(parts.shape[1], rank, generator=generator) / math.sqrt(parts.shape[1])
        return Factors(torch.zeros(parts.shape[0], rank), down)
    left, right = truncated_svd((target.float().cpu() - merged(parts))[None], rank)
    return Factors(left[0], right[0])


def _warm(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
