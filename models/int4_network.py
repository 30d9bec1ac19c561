"""A network of 4- to 8-bit integer recipes: a launch a layer for its edges, one for each other Linear (kernels/int4*.py), one for the
features, all else in PyTorch.

Guarantees: the integers are QuantLinear's; the branches (low rank, sparse, outliers) see the input in bf16. Directions
that a recipe takes out of the input (the metric "input") are two products in float32 before and after the launch. A Linear
that the kernel can't take stays a QuantLinear, edges that theirs can't take stay PyTorch's; a recipe that it doesn't compute is refused by name.
Knows nothing of: steps, sampling, which engine is chosen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from bitdgdm.infra.errors import KernelsUnavailable
from bitdgdm.kernels.build import CompilerMissing, KernelBroken
from bitdgdm.kernels.features import MOST_NODES, network_features
from bitdgdm.kernels.fits import OLDEST, defines
from bitdgdm.kernels.int4 import MOST_RANK, Int4Linear, int4_linear, pack, supports
from bitdgdm.kernels.int4_edge import Int4Edge, int4_edge, pack_edge
from bitdgdm.kernels.int4_edge import supports as supports_edge
from bitdgdm.kernels.launch import Device, Launcher, PyCudaMissing
from bitdgdm.kernels.network import feature_table
from bitdgdm.kernels.toolchain import missing
from bitdgdm.models.digress import XEyTransformerLayer
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.features import network_input
from bitdgdm.models.kernel_engine import kernel_shape
from bitdgdm.quant.artifact import Artifact
from bitdgdm.quant.linear import inner_tau
from bitdgdm.quant.parts import codes, factors, sparse
from bitdgdm.quant.recipe import Recipe

_FIXED = {
    "weight_format": "int", "weight_group": 0, "remainder": True, "columns": 0,
    "premul": "none", "act_format": "int", "act_scale": "token", "outlier_budget": 0, "cross_product": True,
}  # fmt: skip


def refusal(artifact: Artifact) -> str:
    """Why the kernel can't run the artifact's Linears on this machine's current GPU, or ""."""
    found = torch.cuda.get_device_capability()
    if found < OLDEST:
        return f"the GPU is sm_{found[0]}{found[1]}, int4_linear needs sm_{OLDEST[0]}{OLDEST[1]} or newer"
    for name in artifact.layers:
        reason = recipe_refusal(artifact.header.recipe.for_layer(name))
        if reason:
            return reason
    return missing()


def recipe_refusal(recipe: Recipe) -> str:
    """What of a layer's recipe the kernel doesn't compute, or ""."""
    for field, value in _FIXED.items():
        if getattr(recipe, field) != value:
            return f"int4_linear computes {field} {value}, recipe {recipe.name} says {getattr(recipe, field)}"
    ok, reason = supports(64, 64, act_bits=recipe.act_bits, weight_bits=recipe.weight_bits)
    if not ok:
        return f"{reason} of recipe {recipe.name}"
    if recipe.low_rank_metric != "input" and recipe.rank + recipe.repair_rank > MOST_RANK:
        return f"int4_linear takes rank {MOST_RANK} at most, not {recipe.rank + recipe.repair_rank}"
    return ""


class Int4Layer(nn.Module):
    """A drop-in for the QuantLinear of the same parts. x: float[..., in] -> [..., out] in the dtype of x."""

    def __init__(
        self, linear: Int4Linear, launcher: Launcher, directions: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """directions: L float32[out, R] and R float32[in, R] of the metric "input"."""
        super().__init__()
        self.linear, self._launcher = linear, launcher
        up, basis = directions if directions is not None else (None, None)
        self.register_buffer("_up", up)
        self.register_buffer("_basis", basis)

    @property
    def alone(self) -> bool:
        """Whether the launch is all there is to do."""
        return self._basis is None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self._basis, Tensor) and isinstance(self._up, Tensor):
            return self._deflated(x, self._basis, self._up)
        taken = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
        return int4_linear(taken, self.linear, self._launcher).to(x.dtype)

    def _deflated(self, x: Tensor, basis: Tensor, up: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).float()
            z = rows @ basis
            rest = torch.addmm(rows, z, basis.T, alpha=-1)  # as QuantLinear does it, so that the integers are its own
            y = int4_linear(rest, self.linear, self._launcher).addmm_(z, up.T)
            return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


class FusedEdges(nn.Module):
    """A drop-in for a transformer layer whose edges are one launch."""

    def __init__(self, layer: XEyTransformerLayer, edges: Int4Edge, launcher: Launcher) -> None:
        super().__init__()
        self._layer, self._edges, self._launcher = layer, edges, launcher

    def forward(
        self, x: Tensor, e: Tensor, y: Tensor, x_mask: Tensor, e_mask: Tensor, absent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See XEyTransformerLayer."""
        at = self._layer.self_attn
        counts = (~absent).sum((1, 2, 3), dtype=torch.int32)
        given = (e, at.q(x) * at.scale, at.k(x), at.v(x), at.y_e_mul(y), at.y_e_add(y))
        e32, q, k, v, mul, add = (t.float() for t in given)
        e_next, gathered = int4_edge(e32, q, k, v, (mul, add), counts, self._edges, self._launcher)
        x_next, y_next = self._layer.rest(x, e, y, gathered.to(x.dtype), x_mask)
        return x_next, e_next.to(e.dtype), y_next


def _fuse_edges(layer: XEyTransformerLayer, n_pad: int, launcher: Launcher) -> nn.Module:
    """The layer, or what stands in for it."""
    at = layer.self_attn
    found = (at.e_mul, at.e_add, at.e_out, layer.linE1, layer.linE2)
    linears = [m.linear for m in found if isinstance(m, Int4Layer) and m.alone]
    if len(linears) < len(found) or not supports_edge(linears, n_pad, launcher.shared_bytes)[0]:
        return layer
    norms = (layer.normE1.weight, layer.normE1.bias, layer.normE2.weight, layer.normE2.bias)
    return FusedEdges(layer, pack_edge(linears, norms), launcher)


def fuse(network: nn.Module, artifact: Artifact, launcher: Launcher) -> nn.Module:
    """Put FusedEdges and Int4Layers in the places of layers and Linears, in place. network: what `apply` made of the artifact."""
    for name, (parts, bias, tau) in artifact.layers.items():
        recipe = artifact.header.recipe.for_layer(name)
        both, directions = factors(parts), None
        if parts.deflated:
            both, directions = None, both
        up, down = both if both is not None else (None, None)
        ok, _ = supports(
            *parts.shape, rank=0 if up is None else up.shape[1], branches=True, arch=launcher.arch,
            shared_bytes=launcher.shared_bytes, act_bits=recipe.act_bits, weight_bits=recipe.weight_bits,
        )  # fmt: skip
        if not ok:
            continue
        assert parts.scale is not None
        packed = pack(
            codes(parts), parts.scale, bias, asymmetric=recipe.act_asymmetric, sigma=recipe.outlier_sigma,
            tau=None if tau is None or recipe.outlier_sigma is None else inner_tau(tau, recipe, None), up=up, down=down, sparse=sparse(parts),
            act_bits=recipe.act_bits, weight_bits=recipe.weight_bits, device=launcher.device,
        )  # fmt: skip
        owner, _, child = name.rpartition(".")
        setattr(network.get_submodule(owner), child, Int4Layer(packed, launcher, directions).to(launcher.device))
    layers = network.to(launcher.device).get_submodule("tf_layers")
    for name, layer in layers.named_children():
        if isinstance(layer, XEyTransformerLayer):
            setattr(layers, name, _fuse_edges(layer, artifact.header.n_pad, launcher))
    return network


def kernel_inputs(config: DigressConfig, launcher: Launcher) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """network_input whose features are one launch, if graphs are small enough for it."""
    shape = kernel_shape(config)
    table = feature_table(shape).to(launcher.device)

    def inputs(X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, ...]:
        x, e = (one_hot.argmax(-1).to(torch.uint8) for one_hot in (X, E))
        rows, y = network_features(x, e, node_mask.sum(1), table, shape, launcher)
        y[:, -1] = t
        return rows.to(X.dtype), E, y.to(X.dtype)

    return inputs if config.n_pad <= MOST_NODES else partial(network_input, config=config)


def open_gpu(config: DigressConfig) -> Device:
    """The current CUDA device, for a network of such dimensions. Raises: KernelsUnavailable."""
    with _own_errors():
        device = Device(torch.cuda.current_device())
    device.defines = defines(kernel_shape(config), device.shared_bytes)
    return device


@contextmanager
def on_stream(launcher: Launcher) -> Iterator[None]:
    """PyTorch's work and the launches in one order. Raises: KernelsUnavailable if a kernel can't be built."""
    with _own_errors(), launcher.stream() if isinstance(launcher, Device) else nullcontext():
        yield


@contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except (PyCudaMissing, CompilerMissing, KernelBroken) as e:
        raise KernelsUnavailable(str(e)) from e
