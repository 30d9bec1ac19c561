"""The weights of a graph transformer as the kernels want them: packed, concatenated, scaled.

Guarantees: a pure function of (weights, shape); everything that is folded in is exact algebra: 1 / sqrt(df) and log2(e)
into q, log2(e) into e_add, ln(2) into FiLM by y_e_mul, the 1 of (1 + m) into biases, the constant rows that padding
becomes (computed in float64).
Knows nothing of: launches, batches. Names of weights are those of the published DiGress checkpoints.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from bitdgdm.kernels.pack import pack_code_slabs, pack_slabs, pack_weight

LOG2E = math.log2(math.e)
DX, DE, FFX, FFE, FFY = 256, 64, 256, 128, 2048  # what the kernels are written for


@dataclass(frozen=True)
class Shape:
    """What of a network varies between the data sets that the kernels serve."""

    layers: int
    n_pad: int
    classes_x: int
    classes_e: int
    dy: int
    hidden_y: int
    heads: int
    diffusion_steps: int
    atom_weights: tuple[float, ...] = ()  # empty: not molecules
    max_weight: float = 1.0

    @property
    def molecular(self) -> bool:
        """Whether charge, valency and weight are features."""
        return bool(self.atom_weights)

    @property
    def channels_x(self) -> int:
        """Channels of a row of the network's input."""
        return self.classes_x + 6 + 2 * self.molecular

    @property
    def channels_y(self) -> int:
        """Channels of the network's input for a graph."""
        return 12 + self.molecular

    @property
    def defines(self) -> dict[str, dict[str, int]]:
        """Macros of the sources that depend on the shape."""
        in_ks = {"IN_KS": -(-self.channels_x // 16)}
        sources = ("features", "node", "node_wg", "node_wg_s8", "node_f8")
        y = {"DY": self.dy, "HIDDEN_Y": self.hidden_y}
        return {**dict.fromkeys(sources, in_ks), "graph_path": y, "graph_path_f8": y}


def supports(weights: Mapping[str, Tensor], shape: Shape) -> tuple[bool, str]:
    """Whether the kernels can run the network, and why not."""
    wanted = {
        "tf_layers.0.self_attn.q.weight": (DX, DX),
        "tf_layers.0.self_attn.e_out.weight": (DE, DX),
        "tf_layers.0.linX1.weight": (FFX, DX),
        "tf_layers.0.linE1.weight": (FFE, DE),
        "tf_layers.0.self_attn.y_e_mul.weight": (DX, shape.dy),
        "mlp_in_X.0.weight": (256, shape.channels_x),
        "mlp_in_E.2.weight": (DE, 128),
        "mlp_in_y.0.weight": (shape.hidden_y, shape.channels_y),
        "mlp_out_X.0.weight": (256, DX),
        "mlp_out_E.0.weight": (128, DE),
    }
    if shape.layers > 1:
        wanted["tf_layers.0.lin_y1.weight"] = (FFY, shape.dy)
    for name, dims in wanted.items():
        if name not in weights or tuple(weights[name].shape) != dims:
            found = list(weights[name].shape) if name in weights else "missing"
            return False, f"{name} is {found}, the kernels are written for {list(dims)}"
    if shape.dy not in (64, 128) or shape.n_pad > 64 or shape.classes_x > 16 or shape.classes_e > 8:
        return False, (
            f"dy={shape.dy}, n_pad={shape.n_pad}, {shape.classes_x} node and {shape.classes_e} edge classes; the kernels "
            "take dy 64 or 128, n_pad up to 64, 16 node and 8 edge classes"
        )
    return True, ""


@dataclass(frozen=True)
class Integers:
    """A Linear in 8 bit: W ~ codes * scale[:, None], its input rounded at run time with one scale a row.

    codes: int8[out, in]; scale: float32[out].
    """

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Layer:
    """Packed weights of one layer, on the device. Layouts are written at the kernels. None where nothing reads it."""

    w_mul: Tensor
    w_add: Tensor
    score_bias: Tensor
    w_e_out: Tensor
    e_out_vec: Tensor
    ffn1: Tensor
    ffn2: Tensor | None
    ffn_vec: Tensor
    node: Tensor
    node_vec: Tensor
    graph: Tensor | None
    graph_vec: Tensor | None
    pad: Tensor | None


@dataclass(frozen=True)
class Network:
    """All of a network, on the device."""

    shape: Shape
    hopper: bool  # packed for the kernels that end in _wg
    int8: bool  # products of the node path in s8
    layers: tuple[Layer, ...]
    edge_table: Tensor  # bf16[classes + 1, 64]
    node_in: Tensor
    node_in_vec: Tensor
    graph_in: Tensor
    graph_in_vec: Tensor
    edge_out1: Tensor
    edge_out2: Tensor
    feature_table: Tensor  # float64: max weight, T, weights
    fp8: bool = False  # packed for the kernels that end in _f8


def prepare(
    weights: Mapping[str, Tensor], shape: Shape, device: torch.device, *, hopper: bool | None = None,
    integers: Mapping[str, Integers] | None = None,
) -> Network:
    """Pack a network. weights: float32, named as published. Raises: ValueError with the reason of `supports`.

    hopper: for the kernels of sm_90a rather than those of any GPU; None asks the device. integers: by name of a Linear,
    instead of its weight.
    """
    integers = integers or {}
    weights = dict(weights) | {f"{name}.weight": c.codes.float() * c.scale.float()[:, None] for name, c in integers.items()}
    if hopper is None:
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    ok, reason = supports(weights, shape)
    if not ok:
        raise ValueError(reason)
    w = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in weights.items()}
    pack = pack_slabs if hopper else pack_weight

    def packed(*names: str, rows: int | None = None, cols: int | None = None) -> Tensor:
        parts = [pack(w[f"{name}.weight"], rows, cols).flatten() for name in names]
        return torch.cat(parts).to(device)

    int8 = hopper and "tf_layers.0.linX1" in integers

    def node_linear(name: str, factor: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        """Packed weight as bytes, bias and (8 bit) scales."""
        bias = w[f"{name}.bias"] * factor
        if int8:
            return pack_code_slabs(integers[name].codes.cpu()).flatten().view(torch.uint8), [bias, integers[name].scale.cpu() * factor]
        return pack(w[f"{name}.weight"] * factor).flatten().view(torch.uint8), [bias]

    def node_linears(*names: str) -> tuple[list[Tensor], list[Tensor]]:
        query = LOG2E / math.sqrt(DX // shape.heads)
        parts = [node_linear(n, query if n.endswith(".q") else 1.0) for n in names]
        return [m for m, _ in parts], [v for _, vec in parts for v in vec]

    def vector(*parts: Tensor) -> Tensor:
        return torch.cat([p.flatten() for p in parts]).to(device, torch.float32)

    def film(i: int) -> tuple[Tensor, Tensor]:
        name = f"tf_layers.{i}.self_attn"
        m, b = {}, {}
        for kind in ("y_e_mul", "y_e_add", "y_x_mul", "y_x_add"):
            scale = math.log(2) if kind == "y_e_mul" else 1.0
            one = 1.0 if kind.endswith("mul") else 0.0
            m[kind], b[kind] = w[f"{name}.{kind}.weight"] * scale, (w[f"{name}.{kind}.bias"] + one) * scale
        return torch.cat([pack_weight(x).transpose(0, 1).flatten() for x in m.values()]), torch.cat(list(b.values()))

    pads = _padding(w, shape.layers)
    layers = []
    for i in range(shape.layers):
        at, last = f"tf_layers.{i}", i == shape.layers - 1
        block = f"{at}.self_attn"
        mul, add = w[f"{block}.e_mul.bias"] + 1, w[f"{block}.e_add.bias"] * LOG2E
        norms = [w[f"{at}.{n}.{kind}"] for n in ("normX1", "normX2") for kind in ("weight", "bias")]
        names = [f"{block}.x_out", f"{at}.linX1", f"{at}.linX2"]
        node, biases = node_linears(*names, *([] if last else [f"tf_layers.{i + 1}.self_attn.{n}" for n in "qkv"]))
        if last:
            node += [packed("mlp_out_X.0").cpu().view(torch.uint8), packed("mlp_out_X.2", rows=16).cpu().view(torch.uint8)]
            out = torch.zeros(16 if hopper else 512)
            out[: shape.classes_x] = w["mlp_out_X.2.bias"]
            biases += [w["mlp_out_X.0.bias"], out]
        ffn_vec = [w[f"{at}.linE1.bias"], w[f"{at}.linE2.bias"], w[f"{at}.normE2.weight"], w[f"{at}.normE2.bias"]]
        if last:
            out_e = torch.zeros(16)
            out_e[: shape.classes_e] = w["mlp_out_E.2.bias"]
            ffn_vec += [w["mlp_out_E.0.bias"], out_e]
        pairs = [b.view(16, 2, 4, 2) for b in (mul, add)]
        score_bias = torch.stack([p for p in pairs for _ in (0, 1)], dim=3) if hopper else torch.stack(pairs, dim=3)
        ffn = [packed(f"{at}.linE1"), packed(f"{at}.linE2")]
        if hopper and last:
            ffn += [packed("mlp_out_E.0"), packed("mlp_out_E.2", rows=16)]
        graph = graph_vec = pad = None
        if not last:
            graph, graph_vec = _graph_layer(w, at, *film(i + 1))
            graph, graph_vec, pad = graph.to(device), graph_vec.to(device), vector(*pads[i])
        layers.append(
            Layer(
                w_mul=pack_weight(w[f"{block}.e_mul.weight"]).to(device),
                w_add=pack_weight(w[f"{block}.e_add.weight"] * LOG2E).to(device),
                score_bias=score_bias.contiguous().to(device),
                w_e_out=packed(f"{block}.e_out"),
                e_out_vec=vector(w[f"{block}.e_out.bias"], w[f"{at}.normE1.weight"], w[f"{at}.normE1.bias"]),
                ffn1=torch.cat(ffn) if hopper else ffn[0],
                ffn2=None if hopper else ffn[1],
                ffn_vec=vector(*ffn_vec),
                node=torch.cat(node).to(device),
                node_vec=vector(*biases, *norms),
                graph=graph,
                graph_vec=graph_vec,
                pad=pad,
            )
        )

    first, first_bias = node_linears(*(f"tf_layers.0.self_attn.{n}" for n in "qkv"))
    graph_film, graph_film_bias = film(0)
    in_x = packed("mlp_in_X.0", cols=-(-shape.channels_x // 16) * 16).cpu().view(torch.uint8)
    return Network(
        shape,
        hopper,
        int8,
        tuple(layers),
        edge_table=edge_table(w, shape.classes_e).to(device, torch.bfloat16),
        node_in=torch.cat((in_x, packed("mlp_in_X.2").cpu().view(torch.uint8), *first)).to(device),
        node_in_vec=vector(w["mlp_in_X.0.bias"], w["mlp_in_X.2.bias"], *first_bias),
        graph_in=torch.cat(
            (pack_weight(w["mlp_in_y.0.weight"], cols=16).flatten(), pack_weight(w["mlp_in_y.2.weight"]).flatten(), graph_film)
        ).to(device),
        graph_in_vec=vector(w["mlp_in_y.0.bias"], w["mlp_in_y.2.bias"], graph_film_bias),
        edge_out1=packed("mlp_out_E.0"),
        edge_out2=packed("mlp_out_E.2", rows=16),
        feature_table=feature_table(shape).to(device),
    )  # fmt: skip


def feature_table(shape: Shape) -> Tensor:
    """What the features kernel knows of a data set, float64: max weight, T, a weight a class."""
    weights = shape.atom_weights or (0.0,) * shape.classes_x
    return torch.tensor([shape.max_weight, shape.diffusion_steps, *weights], dtype=torch.float64)


def _graph_layer(w: Mapping[str, Tensor], at: str, film: Tensor, film_bias: Tensor) -> tuple[Tensor, Tensor]:
    block = f"{at}.self_attn"
    pooled = torch.cat([w[f"{block}.{n}.weight"] for n in ("y_y", "x_y.lin", "e_y.lin")], dim=1)
    names = (f"{block}.y_out.0", f"{block}.y_out.2", f"{at}.lin_y1", f"{at}.lin_y2")
    packed = [pack_weight(m) for m in (pooled, *(w[f"{n}.weight"] for n in names))]
    packed[3] = packed[3].transpose(0, 1)  # lin_y1: one hidden chunk after the other
    matrices = [m.flatten() for m in packed]
    vectors = [
        w[f"{block}.y_y.bias"] + w[f"{block}.x_y.lin.bias"] + w[f"{block}.e_y.lin.bias"],
        *(w[f"{n}.bias"] for n in names[:2]),
        *(w[f"{at}.norm_y1.{kind}"] for kind in ("weight", "bias")),
        *(w[f"{n}.bias"] for n in names[2:]),
        *(w[f"{at}.norm_y2.{kind}"] for kind in ("weight", "bias")),
        film_bias,
    ]
    return torch.cat([*matrices, film]), torch.cat(vectors)


def edge_table(w: Mapping[str, Tensor], classes: int) -> Tensor:
    """The input MLP of E for each class and for no class at all: [classes + 1, 64]."""
    hidden = torch.cat((w["mlp_in_E.0.weight"].T, torch.zeros(1, 128))) + w["mlp_in_E.0.bias"]
    return (hidden.relu() @ w["mlp_in_E.2.weight"].T + w["mlp_in_E.2.bias"]).relu()


def _padding(w: Mapping[str, Tensor], layers: int) -> list[tuple[Tensor, Tensor]]:
    """What every padded row of X and of E holds at the input of each layer: 0 before the first."""
    x, e = torch.zeros(DX, dtype=torch.float64), torch.zeros(DE, dtype=torch.float64)
    result = []
    for i in range(layers):
        result.append((x.float(), e.float()))
        x, e = _pad_layer(w, f"tf_layers.{i}", "X", x), _pad_layer(w, f"tf_layers.{i}", "E", e)
    return result


def _pad_layer(w: Mapping[str, Tensor], at: str, kind: str, row: Tensor) -> Tensor:
    def get(name: str) -> Tensor:
        return w[f"{at}.{name}"].double()

    def norm(name: str, value: Tensor) -> Tensor:
        return layer_norm(value, value.shape, get(f"{name}.weight"), get(f"{name}.bias"))

    row = norm(f"norm{kind}1", row)
    hidden = (get(f"lin{kind}1.weight") @ row + get(f"lin{kind}1.bias")).relu()
    return norm(f"norm{kind}2", row + get(f"lin{kind}2.weight") @ hidden + get(f"lin{kind}2.bias"))
