"""Repair the layers of a quantized network on molecules that the full-precision network draws by itself.

Guarantees: no data set is read; only factors and biases of the layers change; for one seed the same factors on one kind of
machine.
Knows nothing of: how factors are learned (quant/repair.py) and which layers a recipe quantizes.

The loss is the KL divergence of the predicted classes from full precision's, nodes + 5 edges as in divergence.py, on
the states of the full-precision sampler; every step sees molecules at one time, and all times in turn.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bitdgdm.models.digress import build
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.divergence import EDGE_WEIGHT, Predictions, States, own_trajectory
from bitdgdm.models.engine import TorchEngine
from bitdgdm.models.features import network_input
from bitdgdm.models.source import SourceModel
from bitdgdm.quant.artifact import Layer
from bitdgdm.quant.linear import QuantLinear, set_time
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.repair import Learned, joined, repair

BATCH = 16
"""Molecules of one step."""

_SHOWN = 0.2  # of the time that the whole takes, drawing the molecules


def repaired(
    source: SourceModel,
    recipe: Recipe,
    layers: Mapping[str, Layer],
    *,
    molecules: int = 64,
    steps: int = 50,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> dict[str, Layer]:
    """Return every layer with factors of rank `repair_rank` and a bias learned in `repair_steps` steps.

    layers: every QuantLinear of the network; those of rank 0 by an override, kept in 16 bit, or with a
    remainder that is deflated by its factors, get a bias only.
    molecules, steps: of the trajectories that are learned from. progress is told the fraction that is done.
    Raises: ValueError if the recipe asks for no repair or the loss isn't finite; LogitsNotFinite.
    """
    config = source.config
    engine = TorchEngine(build(config, source.weights, source.name), config, device, name=source.name)

    def told(part: float, whole: float, before: float) -> None:
        if progress is not None:
            progress(before + whole * part)

    states, wanted = own_trajectory(
        engine, config, molecules, steps, seed, lambda done: told(done, _SHOWN, 0.0)
    )
    network = quantized(source, recipe, layers).to(device)
    batches = Batches(states, wanted, seed, torch.device(device))
    found = repair(
        network,
        {name: parts for name, (parts, _, _) in layers.items()},
        lambda step: divergence_loss(network, config, *batches.of(step)),
        steps=recipe.repair_steps,
        rank={
            name: 0 if parts.deflated else recipe.for_layer(name).repair_rank
            for name, (parts, _, _) in layers.items()
        },
        targets={name: source.weights[f"{name}.weight"] for name in layers},
        seed=seed,
        progress=lambda done: told(done, 1 - _SHOWN, _SHOWN),
    )
    return {name: _with(layer, found[name], recipe.for_layer(name)) for name, layer in layers.items()}


def _with(layer: Layer, found: Learned, recipe: Recipe) -> Layer:
    parts, bias, tau = layer
    if found.factors is not None:
        parts = joined(parts, found.factors, recipe.factor_bits)
    if bias is not None and found.shift is not None:
        bias = bias.float().cpu() + found.shift
    return parts, bias, tau


def quantized(source: SourceModel, recipe: Recipe, layers: Mapping[str, Layer]) -> nn.Module:
    """The network with `layers` in the place of its Linears."""
    network = build(source.config, source.weights, source.name)
    for name, (parts, bias, tau) in layers.items():
        owner, _, child = name.rpartition(".")
        layer = QuantLinear.from_parts(parts, bias, recipe.for_layer(name), tau)
        setattr(network.get_submodule(owner), child, layer)
    return network


class Batches:
    """Which states and predictions each step sees: all times in a random order, then again in another one."""

    def __init__(self, states: list[States], wanted: Predictions, seed: int, device: torch.device) -> None:
        self._states, self._wanted, self._device = states, wanted, device
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []

    def of(self, step: int) -> tuple[States, Tensor, Tensor]:
        """States of up to BATCH molecules at one time and the logits wanted for them, on the device."""
        if not self._order:
            self._order = torch.randperm(len(self._states), generator=self._generator).tolist()
        k = self._order.pop()
        s = self._states[k]
        some = torch.randperm(len(s), generator=self._generator)[:BATCH]
        X, E, mask, x, e = (
            v[some].to(self._device) for v in (s.X, s.E, s.mask, self._wanted.X[k], self._wanted.E[k])
        )
        return States(s.t, X, E, mask), x, e


def divergence_loss(
    network: nn.Module, config: DigressConfig, states: States, want_x: Tensor, want_e: Tensor
) -> Tensor:
    """KL_X + 5 KL_E of one batch, with gradients."""
    t = torch.full((len(states),), states.t, device=states.X.device)
    set_time(network, t)
    inputs = network_input(states.X, states.E, t / config.diffusion_steps, states.mask, config)
    x, e = network(*inputs, states.mask)
    pairs = states.mask[:, :, None] & states.mask[:, None, :]
    pairs = pairs & ~torch.eye(pairs.shape[1], dtype=torch.bool, device=pairs.device)
    return _mean_kl(want_x, x, states.mask) + EDGE_WEIGHT * _mean_kl(want_e, e, pairs)


def _mean_kl(p: Tensor, q: Tensor, real: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * real).sum() / real.sum().clamp(min=1)
