"""What each kernel computes, in plain NumPy and PyTorch: the twin that tests compare with (law L7).

Guarantees: every function is the formula of one kernel on dense tensors with a mask, in the dtype of its arguments
(float64 for a reference); nothing is packed, fused, folded or skipped. `forward` strings them together to one step.
Knows nothing of: layouts, launches, devices. Weights go by the names of the published DiGress checkpoints.

B graphs, n = n_pad nodes; mask: bool[B, n]; x: [B, n, 256], e: [B, n, n, 64], y: [B, dy].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from bitdgdm.kernels.network import Shape

Weights = Mapping[str, Tensor]
CLUSTER, TIE, ZERO = 1e-6, 2e-4, 1e-5  # see features.cu


def dense(w: Weights, name: str, x: Tensor) -> Tensor:
    """A Linear by name. One that has `codes` (e4m3 values) and `scale` reads its input cast to e4m3 with saturation."""
    bias = w[f"{name}.bias"].to(x.dtype)
    if f"{name}.codes" not in w:
        return linear(x, w[f"{name}.weight"].to(x.dtype), bias)
    top = torch.finfo(torch.float8_e4m3fn).max
    rounded = x.float().clamp(-top, top).to(torch.float8_e4m3fn).to(x.dtype)
    return linear(rounded, w[f"{name}.codes"].to(x.dtype)) * w[f"{name}.scale"].to(x.dtype) + bias


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """A LayerNorm by name."""
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"].to(x.dtype), w[f"{name}.bias"].to(x.dtype))


def mlp(w: Weights, first: str, second: str, x: Tensor) -> Tensor:
    """Linear, ReLU, Linear."""
    return dense(w, second, dense(w, first, x).relu())


def pairs(mask: Tensor) -> Tensor:
    """bool[B, n, n, 1]: both nodes are real."""
    return (mask[:, :, None] & mask[:, None])[..., None]


# -- features.cu --------------------------------------------------------------------------------------------


def features(
    x: NDArray[np.int64], e: NDArray[np.int64], n: int, time: int, shape: Shape
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One graph's rows of the network's input: float64[n_pad, channels_x], float64[channels_y].

    x: [n_pad], e: [n_pad, n_pad]: classes, 0 beyond the n nodes.
    """
    n_pad, real = shape.n_pad, np.arange(shape.n_pad) < n
    a = (e > 0).astype(np.int64)
    node, graph = cycles(a)
    laplacian = np.diag(np.where(real, a.sum(1), 2 * n_pad)) - a
    values, vectors = np.linalg.eigh(laplacian.astype(np.float64))
    components = int((values / max(n, 1) < ZERO).sum())
    outside = not_in_largest(values, vectors, n)
    basis = canonical_basis(values, vectors, components)
    columns = [np.eye(shape.classes_x)[x], node, outside[:, None], basis]
    per_graph = [n / n_pad, *graph, components]
    per_graph += [*(values / max(n, 1))[components : components + 5], 2.0, 2.0, 2.0, 2.0, 2.0][:5]
    if shape.molecular:
        valency = e.sum(1)
        columns.append(np.stack((x - valency, valency), axis=1))
        per_graph.append(sum(shape.atom_weights[k] for k in x) / shape.max_weight)
    rows = np.concatenate(columns, axis=1) * real[:, None]
    return rows, np.array([*per_graph, time / shape.diffusion_steps])


def cycles(a: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tenths of the cycles of length 3, 4, 5 through each node [n, 3] and of length 3..6 in the graph [4], at most 1.

    Source: the closed forms of cvignac/DiGress, extra_features.py (length 5 counts too many, as published).
    """
    a2, a3 = a @ a, a @ a @ a
    d, walks = a.sum(1), [np.diag(np.linalg.matrix_power(a, k)) for k in range(6)]
    c3 = walks[3]
    c4 = walks[4] - d * (d - 1) - a @ d
    c5 = walks[5] - 2 * c3 * d - a @ c3 + c3
    c6 = (
        (a3 * a3).sum() - 3 * (c3 * c3).sum() + 9 * (a * a2 * a2).sum() - 6 * (d * walks[4]).sum()
        + 6 * walks[4].sum() - 4 * c3.sum() + 4 * (d**3).sum() + 3 * a3.sum() - 12 * (d * d).sum() + 4 * d.sum()
    )  # fmt: skip
    node = np.stack((c3, c4, c5), axis=1) / 2
    graph = np.array([c3.sum() / 6, c4.sum() / 8, c5.sum() / 10, c6 / 12])
    return np.minimum(node / 10, 1), np.minimum(graph / 10, 1)


def pivot(diagonal: NDArray[np.float64]) -> int:
    """The first place within TIE of the largest."""
    return int(np.argmax(diagonal >= (1 - TIE) * diagonal.max()))


def not_in_largest(values: NDArray[np.float64], vectors: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """1 for nodes outside the largest component: the projector on eigenvalue 0 holds 1 / size inside one."""
    zero, real = vectors[:, values / max(n, 1) < ZERO], np.arange(len(values)) < n
    projector = zero @ zero.T
    inverse_size = np.diag(projector) + np.where(real, 0.0, 2.0)
    p = pivot(1 / np.maximum(inverse_size, 1e-3))
    return np.where(real & (projector[:, p] <= 0.5 * inverse_size[p]), 1.0, 0.0)


def canonical_basis(
    values: NDArray[np.float64], vectors: NDArray[np.float64], first: int
) -> NDArray[np.float64]:
    """Eigenvectors `first` and `first + 1` [n, 2]: columns of the projector at its pivot, zeros beyond the last."""
    n, taken, result = len(values), np.zeros(len(values)), np.zeros((len(values), 2))
    for k, number in enumerate((first, first + 1)):
        value = values[min(number, n - 1)]
        if k and abs(values[min(first, n - 1)] - value) > CLUSTER:
            taken = np.zeros(n)
        space = vectors[:, np.abs(values - value) <= CLUSTER]
        rest = space @ space.T - np.outer(taken, taken)
        p = pivot(np.diag(rest))
        taken = rest[:, p] / math.sqrt(max(rest[p, p], 1e-30))
        result[:, k] = taken * (number < n)
    return result


# -- sample.cu ----------------------------------------------------------------------------------------------


def embed(w: Weights, one_hot: Tensor, mask: Tensor) -> Tensor:
    """The input MLP of E on one-hot classes (all zero: no class), 0 on padding. The input is symmetric."""
    return mlp(w, "mlp_in_E.0", "mlp_in_E.2", one_hot).relu() * pairs(mask)


def uniform(seed: int, sample_id: int, time: int, slot: int) -> np.float32:
    """Philox4x32-10, first word to (0, 1]. Source: Salmon et al., SC 2011."""
    counter = [sample_id & 0xFFFFFFFF, sample_id >> 32, time, slot]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (b >> 32) ^ counter[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ counter[3] ^ key[1], a & 0xFFFFFFFF
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.float32(((counter[0] >> 8) + 1) * 2.0**-24)


def draw(logits: Sequence[np.float32], table: NDArray[np.float32], u: np.float32) -> int:
    """The class that u falls into. table: float32[x_0, next] of the present class; sums in class order, in float32."""
    top = max(logits)
    p = [np.exp(value - top, dtype=np.float32) for value in logits]
    total = np.float32(0)
    for value in p:
        total += value
    weights = np.zeros(len(p), np.float32)
    for value, row in zip(p, table, strict=True):
        weights += value / total * row
    if not weights.any():
        weights[:] = 1e-5
    cumulated = np.cumsum(weights, dtype=np.float32)
    return int((cumulated[:-1] < u * cumulated[-1]).sum())


# -- graph_path.cu ------------------------------------------------------------------------------------------


def pool(rows: Tensor) -> Tensor:
    """Mean, min, max and unbiased std over all rows, padding included: [B, rows, d] -> [B, 4 d]."""
    return torch.cat((rows.mean(1), rows.amin(1), rows.amax(1), rows.std(1)), dim=-1)


@dataclass(frozen=True)
class Film:
    """What y says to the next layer: factors and summands of E and X, [B, 256] each."""

    e_mul: Tensor
    e_add: Tensor
    x_mul: Tensor
    x_add: Tensor


def film(w: Weights, layer: int, y: Tensor) -> Film:
    """FiLM vectors of a layer; the factors include the 1 of (1 + m)."""
    at = f"tf_layers.{layer}.self_attn.y_"
    e_mul, e_add, x_mul, x_add = (dense(w, at + k, y) for k in ("e_mul", "e_add", "x_mul", "x_add"))
    return Film(e_mul + 1, e_add, x_mul + 1, x_add)


def graph_in(w: Weights, y: Tensor) -> tuple[Tensor, Film]:
    """Input MLP of y and the FiLM vectors of layer 0."""
    y = mlp(w, "mlp_in_y.0", "mlp_in_y.2", y).relu()
    return y, film(w, 0, y)


def graph_mid(w: Weights, layer: int, pooled_x: Tensor, pooled_e: Tensor, y: Tensor) -> tuple[Tensor, Film]:
    """The y path of a layer that isn't the last, and the FiLM vectors of the next. pooled: of the layer's inputs."""
    at = f"tf_layers.{layer}"
    block = f"{at}.self_attn"
    new = (
        dense(w, f"{block}.y_y", y)
        + dense(w, f"{block}.x_y.lin", pooled_x)
        + dense(w, f"{block}.e_y.lin", pooled_e)
    )
    y = norm(w, f"{at}.norm_y1", y + mlp(w, f"{block}.y_out.0", f"{block}.y_out.2", new))
    y = norm(w, f"{at}.norm_y2", y + mlp(w, f"{at}.lin_y1", f"{at}.lin_y2", y))
    return y, film(w, layer + 1, y)


# -- edge_attend, edge_ffn ----------------------------------------------------------------------------------


def edge_attend(
    w: Weights, layer: int, heads: int, e: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Film, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """E after e_out, residual and LayerNorm; and the values gathered for X, after FiLM: [B, n, 256]."""
    at, block = f"tf_layers.{layer}", f"tf_layers.{layer}.self_attn"
    score = q[:, :, None] * k[:, None] / math.sqrt(q.shape[-1] // heads)
    score = score * (dense(w, f"{block}.e_mul", e) + 1) + dense(w, f"{block}.e_add", e)
    modulated = score * f.e_mul[:, None, None] + f.e_add[:, None, None]
    e1 = norm(w, f"{at}.normE1", e + dense(w, f"{block}.e_out", modulated) * pairs(mask))
    weights = score.masked_fill(~mask[:, None, :, None], -math.inf).softmax(dim=2).nan_to_num()
    gathered = (weights * v[:, None]).sum(2)
    return e1, gathered * f.x_mul[:, None] + f.x_add[:, None]


def edge_ffn(w: Weights, layer: int, e1: Tensor) -> Tensor:
    """Feed-forward net of E, residual and LayerNorm."""
    at = f"tf_layers.{layer}"
    return norm(w, f"{at}.normE2", e1 + mlp(w, f"{at}.linE1", f"{at}.linE2", e1))


# -- node ---------------------------------------------------------------------------------------------------


def queries(w: Weights, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a layer."""
    q, k, v = (dense(w, f"tf_layers.{layer}.self_attn.{name}", x) for name in "qkv")
    return q, k, v


def node_update(w: Weights, layer: int, gathered: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """x_out, residual, LayerNorm, feed-forward net, residual, LayerNorm."""
    at = f"tf_layers.{layer}"
    x = norm(w, f"{at}.normX1", x + dense(w, f"{at}.self_attn.x_out", gathered) * mask[..., None])
    return norm(w, f"{at}.normX2", x + mlp(w, f"{at}.linX1", f"{at}.linX2", x))


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes of rows, int64[M, K], and their scales float32[M, 1]; one rounding an operation.

    x: float32[M, K].
    """
    scale = (x.abs().amax(-1, keepdim=True) * (1 / 127)).clamp_min(torch.finfo(torch.float32).tiny)
    return (x * scale.reciprocal()).round().clamp(-127, 127).long(), scale


def integer_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """A Linear in 8 bit: the sum is an exact integer, then float32. codes: int8[N, K], scale, bias: float32[N]."""
    q, row_scale = round_rows(x)
    return (q @ codes.long().T).float() * row_scale * scale + bias


# -- a step -------------------------------------------------------------------------------------------------


def forward(
    w: Weights, shape: Shape, rows: Tensor, one_hot: Tensor, y: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The network: logits [B, n, classes_x], 0 on padding, and [B, n, n, classes_e], also 0 on the diagonal.

    rows: [B, n, channels_x], one_hot: [B, n, n, classes_e], y: [B, channels_y], all of one dtype.
    """
    at_x, at_e = mask[..., None], pairs(mask)
    x, e = mlp(w, "mlp_in_X.0", "mlp_in_X.2", rows).relu() * at_x, embed(w, one_hot, mask)
    y, f = graph_in(w, y)
    for layer in range(shape.layers):
        e1, gathered = edge_attend(w, layer, shape.heads, e, *queries(w, layer, x), f, mask)
        if layer < shape.layers - 1:
            y, f = graph_mid(w, layer, pool(x), pool(e.flatten(1, 2)), y)
        e, x = edge_ffn(w, layer, e1), node_update(w, layer, gathered, x, mask)
    logits_x = (mlp(w, "mlp_out_X.0", "mlp_out_X.2", x) + rows[..., : shape.classes_x]) * at_x
    logits_e = mlp(w, "mlp_out_E.0", "mlp_out_E.2", e) + one_hot
    off_diagonal = ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)[..., None]
    return logits_x, (logits_e + logits_e.transpose(1, 2)) / 2 * (at_e & off_diagonal)
