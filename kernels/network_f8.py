"""The weights of a graph transformer as the kernels of 8-bit floats (those that end in _f8) want them.

Guarantees: a pure function of (weights, codes, shape). Codes reach the products unchanged; what is folded into their
scales and biases is exact algebra but for the rounding of vectors to f16 in edge attention: 1 / sqrt(df), log2(e) and
the scale of e_mul into q, log2(e) into e_add, ln(2) into FiLM by y_e_mul, the 1 of (1 + m) into biases, a power of two
between values and FiLM by y_x_mul. A network whose
f16 sums could overflow is refused. What padding becomes is computed as the kernels compute the rows.
Knows nothing of: launches, batches, where the codes came from.

A Linear reads its input cast to e4m3 with saturation: y = (codes @ cast(x)) * scale + bias.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from bitdgdm.kernels.network import DE, DX, LOG2E, Layer, Network, Shape, edge_table, feature_table
from bitdgdm.kernels.pack import pack_code_slabs, pack_pairs, pack_slabs, pack_weight

LARGEST, HALF_SUM = 448.0, 32768.0  # of e4m3; what a sum of f16 may come to, a factor of two below its end
VALUES = 2.0**-4  # what values are kept times, so that their weighted sums stay in f16
_FILM = ("y_e_mul", "y_e_add", "y_x_mul", "y_x_add")


@dataclass(frozen=True)
class Codes:
    """A Linear in e4m3: W ~ value * scale[:, None]. value: float32[out, in] that e4m3 holds; scale: float32[out]."""

    value: Tensor
    scale: Tensor


def cast(x: Tensor) -> Tensor:
    """x rounded to e4m3, saturated, as float32."""
    return x.float().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


def overflow(weights: Mapping[str, Tensor], codes: Mapping[str, Codes], shape: Shape) -> str:
    """Why the f16 sums of the scores could overflow, or "".

    |sum| <= |w| |e| with the norm of a LayerNorm's result bounded by sqrt(d) max |gamma| + |beta|.
    """
    for i in range(shape.layers):
        if i == 0:
            norm = edge_table(weights, shape.classes_e).norm(dim=1).max()
        else:
            gamma, beta = (weights[f"tf_layers.{i - 1}.normE2.{kind}"].float() for kind in ("weight", "bias"))
            norm = math.sqrt(DE) * gamma.abs().max() + beta.norm()
        for kind in ("e_mul", "e_add"):
            name = f"tf_layers.{i}.self_attn.{kind}"
            w, scale = _half_weight(codes[name])
            bound = (w.norm(dim=1) * norm * 1.07 + (weights[f"{name}.bias"].float().abs() + 1) / scale).max()
            if not bound <= HALF_SUM:
                return f"the sums of {name} may come to {float(bound):.3g}, the kernels keep them in f16 up to {HALF_SUM:.0f}"
    return ""


def prepare_f8(weights: Mapping[str, Tensor], codes: Mapping[str, Codes], shape: Shape, device: torch.device) -> Network:
    """Pack a network. weights: float32, named as published; codes: every Linear of the layers that feeds an output."""
    w = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in weights.items()}
    c = {name: Codes(k.value.cpu().float(), _positive(k.scale.cpu().float())) for name, k in codes.items()}
    query = LOG2E / math.sqrt(DX // shape.heads)

    def vector(*parts: Tensor) -> Tensor:
        return torch.cat([p.flatten() for p in parts]).to(device, torch.float32)

    def lines(name: str, factor: Tensor | float = 1.0) -> Tensor:
        return _lines(c[name].scale * factor, w[f"{name}.bias"] * factor)

    def qkv(i: int) -> tuple[list[Tensor], list[Tensor]]:
        q, k, v = (f"tf_layers.{i}.self_attn.{n}" for n in "qkv")
        mul = _half_weight(c[f"tf_layers.{i}.self_attn.e_mul"])[1]
        keys = [_slabs(c[name].value[half]) for half in (slice(0, 128), slice(128, 256)) for name in (k, v)]
        return [*_halves(c[q].value), *keys], [lines(q, mul * query), lines(k), lines(v, VALUES)]

    def film(i: int) -> tuple[Tensor, Tensor]:
        packed, bias, scale = [], [], []
        for kind in _FILM:
            name = f"tf_layers.{i}.self_attn.{kind}"
            factor = {"y_e_mul": math.log(2), "y_x_mul": 1 / VALUES}.get(kind, 1.0)
            packed.append(_chunks(c[name].value))
            bias.append((w[f"{name}.bias"] + (1.0 if kind.endswith("mul") else 0.0)) * factor)
            scale.append(c[name].scale * factor)
        return torch.cat(packed), torch.cat((*bias, *scale))

    pads, layers = _padding(w, c, shape.layers), []
    for i in range(shape.layers):
        at, last = f"tf_layers.{i}", i == shape.layers - 1
        block = f"{at}.self_attn"
        names = (f"{block}.x_out", f"{at}.linX1", f"{at}.linX2")
        node = [part for name in names for part in _halves(c[name].value)]
        node_vec = [lines(name) for name in names]
        if last:
            for k in range(0, 256, 64):
                node += [_raw(pack_slabs(w["mlp_out_X.0.weight"][k : k + 64]))]
                node += [_raw(pack_slabs(w["mlp_out_X.2.weight"][:, k : k + 64], rows=16))]
            node_vec += [_lines(torch.ones(256), w["mlp_out_X.0.bias"]), _padded(w["mlp_out_X.2.bias"], 32)]
        else:
            more, more_vec = qkv(i + 1)
            node, node_vec = node + more, node_vec + more_vec
        node_vec += [_lines(w[f"{at}.{n}.weight"], w[f"{at}.{n}.bias"]) for n in ("normX1", "normX2")]
        ffn = [_slabs(c[f"{at}.linE1"].value), _slabs(c[f"{at}.linE2"].value)]
        ffn_vec = [lines(f"{at}.linE1"), lines(f"{at}.linE2"), _half_lines(w, f"{at}.normE2")]
        if last:
            ffn += [_raw(pack_slabs(w["mlp_out_E.0.weight"])), _raw(pack_slabs(w["mlp_out_E.2.weight"], rows=16))]
            ffn_vec += [_lines(torch.ones(128), w["mlp_out_E.0.bias"]), _padded(w["mlp_out_E.2.bias"], 16)]
        (mul, mul_scale), (add, add_scale) = (_half_weight(c[f"{block}.{kind}"]) for kind in ("e_mul", "e_add"))
        score = [(w[f"{block}.e_mul.bias"] + 1) / mul_scale, add_scale * LOG2E, w[f"{block}.e_add.bias"] * LOG2E]
        score = [x.half().view(16, 2, 4, 2) for x in (*score, torch.zeros(256))]
        graph = graph_vec = pad = None
        if not last:
            graph, graph_vec = _graph_layer(w, c, at, *film(i + 1))
            graph, graph_vec, pad = graph.to(device), graph_vec.to(device), vector(*pads[i])
        layers.append(
            Layer(
                w_mul=pack_weight(mul, dtype=torch.float16).to(device),
                w_add=pack_weight(add, dtype=torch.float16).to(device),
                score_bias=torch.stack(score, dim=3).contiguous().to(device),
                w_e_out=_slabs(c[f"{block}.e_out"].value).to(device),
                e_out_vec=vector(lines(f"{block}.e_out"), _half_lines(w, f"{at}.normE1")),
                ffn1=torch.cat(ffn).to(device),
                ffn2=None,
                ffn_vec=vector(*ffn_vec),
                node=torch.cat(node).to(device),
                node_vec=vector(*node_vec),
                graph=graph,
                graph_vec=graph_vec,
                pad=pad,
            )
        )
    first, first_vec = qkv(0)
    in_ks = -(-shape.channels_x // 16)
    ends = [pack_slabs(w["mlp_in_X.0.weight"][k : k + 128], cols=16 * in_ks) for k in (0, 128)]
    ends += [pack_slabs(w["mlp_in_X.2.weight"][k : k + 64]) for k in range(0, 256, 64)]
    in_vec = [_lines(torch.ones(256), w[f"mlp_in_X.{k}.bias"]) for k in (0, 2)]
    graph_film, graph_film_vec = film(0)
    graph_in = [_raw(pack_weight(w["mlp_in_y.0.weight"], cols=16)), _raw(pack_weight(w["mlp_in_y.2.weight"])), graph_film]
    nothing = torch.zeros(0, device=device)
    return Network(
        shape, hopper=True, int8=False, layers=tuple(layers),
        edge_table=edge_table(w, shape.classes_e).to(device, torch.float16),
        node_in=torch.cat([*(_raw(e) for e in ends), *first]).to(device), node_in_vec=vector(*in_vec, *first_vec),
        graph_in=torch.cat(graph_in).to(device),
        graph_in_vec=vector(w["mlp_in_y.0.bias"], w["mlp_in_y.2.bias"], graph_film_vec),
        edge_out1=nothing, edge_out2=nothing, feature_table=feature_table(shape).to(device), fp8=True,
    )  # fmt: skip


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)  # a row of zeros may have none


def _half_weight(c: Codes) -> tuple[Tensor, Tensor]:
    """codes * 2^k, which f16 holds exactly, and the scale that is left, in [1, 2) where k isn't at an end."""
    power = torch.exp2(torch.floor(torch.log2(_positive(c.scale.float()))).clamp(-14, 6))
    return c.value * power[:, None], _positive(c.scale.float()) / power


def _lines(scale: Tensor, bias: Tensor) -> Tensor:
    """(scale, scale, bias, bias) of every pair of channels."""
    return torch.stack((scale.view(-1, 2), bias.view(-1, 2)), dim=1).flatten()


def _half_lines(w: Mapping[str, Tensor], norm: str) -> Tensor:
    """The same of gamma and beta as f16, in the places of half as many floats."""
    return _lines(w[f"{norm}.weight"], w[f"{norm}.bias"]).half().view(torch.float32)


def _padded(v: Tensor, size: int) -> Tensor:
    return torch.cat((v, v.new_zeros(size - len(v))))


def _raw(t: Tensor) -> Tensor:
    return t.flatten().view(torch.uint8)


def _bytes(value: Tensor) -> Tensor:
    return value.to(torch.float8_e4m3fn).view(torch.uint8)


def _slabs(value: Tensor) -> Tensor:
    return pack_code_slabs(_bytes(value)).flatten()


def _halves(value: Tensor) -> list[Tensor]:
    return [_slabs(value[k : k + 128]) for k in (0, 128)]


def _steps(value: Tensor) -> Tensor:
    """Blocks of mma.sync, one k step after the other."""
    return pack_pairs(pack_weight(_bytes(value), dtype=torch.uint8)).flatten()


def _chunks(value: Tensor) -> Tensor:
    """The same, 16 output channels after the other."""
    return pack_pairs(pack_weight(_bytes(value), dtype=torch.uint8).transpose(0, 1)).flatten()


def _graph_layer(
    w: Mapping[str, Tensor], c: Mapping[str, Codes], at: str, film: Tensor, film_vec: Tensor
) -> tuple[Tensor, Tensor]:
    block = f"{at}.self_attn"
    pooled = [f"{block}.{n}" for n in ("y_y", "x_y.lin", "e_y.lin")]
    matrices = [_steps(torch.cat([c[name].value for name in pooled], dim=1))]
    matrices += [_steps(c[f"{block}.y_out.{k}"].value) for k in (0, 2)]
    matrices += [_chunks(c[f"{at}.lin_y1"].value), _steps(c[f"{at}.lin_y2"].value), film]
    vectors = [torch.stack([w[f"{name}.bias"] for name in pooled]).sum(0), *(c[name].scale for name in pooled)]
    for name in (f"{block}.y_out.0", f"{block}.y_out.2"):
        vectors += [w[f"{name}.bias"], c[name].scale]
    vectors += [w[f"{at}.norm_y1.{kind}"] for kind in ("weight", "bias")]
    for name in (f"{at}.lin_y1", f"{at}.lin_y2"):
        vectors += [w[f"{name}.bias"], c[name].scale]
    vectors += [w[f"{at}.norm_y2.{kind}"] for kind in ("weight", "bias")]
    return torch.cat(matrices), torch.cat([*vectors, film_vec])


def _padding(w: Mapping[str, Tensor], c: Mapping[str, Codes], layers: int) -> list[tuple[Tensor, Tensor]]:
    """What every padded row of X and of E holds at the input of each layer: 0 before the first."""
    rows, result = [torch.zeros(DX), torch.zeros(DE)], []
    for i in range(layers):
        result.append((rows[0], rows[1]))
        rows = [_pad_layer(w, c, f"tf_layers.{i}", kind, row) for kind, row in zip("XE", rows, strict=True)]
    return result


def _pad_layer(w: Mapping[str, Tensor], c: Mapping[str, Codes], at: str, kind: str, row: Tensor) -> Tensor:
    def norm(name: str, value: Tensor) -> Tensor:
        return layer_norm(value, value.shape, w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"])

    def dense(name: str, value: Tensor) -> Tensor:
        return c[f"{at}.{name}"].value @ cast(value) * c[f"{at}.{name}"].scale + w[f"{at}.{name}.bias"]

    row = norm(f"norm{kind}1", row)
    return norm(f"norm{kind}2", row + dense(f"lin{kind}2", dense(f"lin{kind}1", row).relu()))
