"""The graph transformer of DiGress: clean-graph logits from a noisy graph and its features.

Guarantees: parameter names are those of the published checkpoints; the result for a graph depends on that
graph and on n_pad only, not on its companions in the batch (up to the rounding of the matrix library); no
host synchronisation, so that a call can be captured in a CUDA graph. What feeds no output (the y path of the
last layer) is not built.
Knows nothing of: features, noise, sampling, where weights come from, quantization (a Linear may be swapped
for any module with the same signature).

Source: Vignac et al., DiGress, ICLR 2023; names and quirks as in github.com/cvignac/DiGress.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitdgdm.infra.errors import ModelMismatch
from bitdgdm.models.digress_config import DigressConfig, HiddenDims
from bitdgdm.quant.thresholds import k_sigma


def pool(x: Tensor) -> Tensor:
    """Mean, min, max and unbiased std over all rows, padding included. x: [B, rows, d] -> [B, 4 d]."""
    mean = x.mean(1, keepdim=True)
    deviation = (x - mean).square().sum(1).div(x.shape[1] - 1).sqrt()  # ten times as fast as x.std on a CPU
    return torch.cat((mean.squeeze(1), x.amin(1), x.amax(1), deviation), dim=-1)


class Pooled(nn.Module):
    """A Linear of the pooled rows; a module of its own because the published parameter names say so."""

    def __init__(self, d: int, dy: int) -> None:
        super().__init__()
        self.lin = nn.Linear(4 * d, dy)

    def forward(self, rows: Tensor) -> Tensor:
        return self.lin(pool(rows.flatten(1, -2)))


class NodeEdgeBlock(nn.Module):
    """Attention whose scores keep the feature axis and are modulated by edges (E) and by the graph (y)."""

    def __init__(self, h: HiddenDims, last: bool) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(h.dx // h.n_head)
        self.q, self.k, self.v = (nn.Linear(h.dx, h.dx) for _ in range(3))
        self.e_add, self.e_mul = (nn.Linear(h.de, h.dx) for _ in range(2))
        self.y_e_mul, self.y_e_add, self.y_x_mul, self.y_x_add = (nn.Linear(h.dy, h.dx) for _ in range(4))
        self.x_out, self.e_out = nn.Linear(h.dx, h.dx), nn.Linear(h.dx, h.de)
        self.last = last
        if not last:
            self.y_y = nn.Linear(h.dy, h.dy)
            self.x_y, self.e_y = Pooled(h.dx, h.dy), Pooled(h.de, h.dy)
            self.y_out = nn.Sequential(nn.Linear(h.dy, h.dy), nn.ReLU(), nn.Linear(h.dy, h.dy))

    def attend(self, x: Tensor, e: Tensor, y: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """What each node gathers [B, n, dx] and what each edge becomes [B, n, n, de].

        x: [B, n, dx], e: [B, n, n, de], y: [B, dy]; absent: bool[B, 1, n, 1], true for padded nodes.
        Scores of padded pairs are finite and arbitrary: they leave through outputs that are masked later.
        """
        score = (self.q(x) * self.scale)[:, :, None] * self.k(x)[:, None]
        score = torch.addcmul(self.e_add(e), score, self.e_mul(e) + 1)  # [B, i, j, dx]
        e_new = torch.addcmul(self.y_e_add(y)[:, None, None], score, (self.y_e_mul(y) + 1)[:, None, None])

        # far below any score, yet finite: a graph without nodes must not give NaN
        veto = absent.to(score.dtype) * (torch.finfo(score.dtype).min / 2)
        attention = (score + veto).softmax(dim=2)
        return (attention * self.v(x)[:, None]).sum(dim=2), self.e_out(e_new)

    def nodes(self, gathered: Tensor, y: Tensor) -> Tensor:
        """Node outputs [B, n, dx] of what `attend` gathered."""
        return self.x_out(torch.addcmul(self.y_x_add(y)[:, None], gathered, (self.y_x_mul(y) + 1)[:, None]))

    def graph(self, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
        """Graph outputs [B, dy]; not of the last layer."""
        return self.y_out(self.y_y(y) + self.x_y(x) + self.e_y(e))


class XEyTransformerLayer(nn.Module):
    """One layer: attention, then a feed-forward net for each of X, E and y; LayerNorm after each residual."""

    def __init__(self, h: HiddenDims, last: bool) -> None:
        super().__init__()
        self.self_attn = NodeEdgeBlock(h, last)
        self.linX1, self.linX2 = nn.Linear(h.dx, h.dim_ffX), nn.Linear(h.dim_ffX, h.dx)
        self.linE1, self.linE2 = nn.Linear(h.de, h.dim_ffE), nn.Linear(h.dim_ffE, h.de)
        self.normX1, self.normX2 = nn.LayerNorm(h.dx), nn.LayerNorm(h.dx)
        self.normE1, self.normE2 = nn.LayerNorm(h.de), nn.LayerNorm(h.de)
        if not last:
            self.lin_y1, self.lin_y2 = nn.Linear(h.dy, h.dim_ffy), nn.Linear(h.dim_ffy, h.dy)
            self.norm_y1, self.norm_y2 = nn.LayerNorm(h.dy), nn.LayerNorm(h.dy)

    def forward(
        self, x: Tensor, e: Tensor, y: Tensor, x_mask: Tensor, e_mask: Tensor, absent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, n, dx], e: [B, n, n, de], y: [B, dy]; x_mask: [B, n, 1], e_mask: [B, n, n, 1] as floats;
        absent: bool[B, 1, n, 1], true for padded nodes.
        """
        gathered, e_new = self.self_attn.attend(x, e, y, absent)
        x_next, y_next = self.rest(x, e, y, gathered, x_mask)
        e = self.normE1(e + e_new * e_mask)
        return x_next, self.normE2(e + self.linE2(self.linE1(e).relu())), y_next

    def rest(self, x: Tensor, e: Tensor, y: Tensor, gathered: Tensor, x_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The next nodes and graph channels: all that is not of edges. gathered: what attention found, [B, n, dx]."""
        x_next = self.normX1(x + self.self_attn.nodes(gathered, y) * x_mask)
        x_next = self.normX2(x_next + self.linX2(self.linX1(x_next).relu()))
        if not self.self_attn.last:
            y = self.norm_y1(y + self.self_attn.graph(x, e, y))
            y = self.norm_y2(y + self.lin_y2(self.lin_y1(y).relu()))
        return x_next, y


def _mlp(d_in: int, d_hidden: int, d_out: int, *, relu_out: bool) -> nn.Sequential:
    layers = [nn.Linear(d_in, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d_out)]
    return nn.Sequential(*layers, nn.ReLU()) if relu_out else nn.Sequential(*layers)


class GraphTransformer(nn.Module):
    """Noisy graph with features -> logits of the clean graph."""

    def __init__(self, config: DigressConfig) -> None:
        super().__init__()
        d_in, d_out, d_mlp, h = (
            config.input_dims,
            config.output_dims,
            config.hidden_mlp_dims,
            config.hidden_dims,
        )
        self.classes_x, self.classes_e = d_out.X, d_out.E
        self.mlp_in_X = _mlp(d_in.X, d_mlp.X, h.dx, relu_out=True)
        self.mlp_in_E = _mlp(d_in.E, d_mlp.E, h.de, relu_out=True)
        self.mlp_in_y = _mlp(d_in.y, d_mlp.y, h.dy, relu_out=True)
        self.tf_layers = nn.ModuleList(
            XEyTransformerLayer(h, last=i == config.n_layers - 1) for i in range(config.n_layers)
        )
        self.mlp_out_X = _mlp(h.dx, d_mlp.X, d_out.X, relu_out=False)
        self.mlp_out_E = _mlp(h.de, d_mlp.E, d_out.E, relu_out=False)

    def forward(self, X: Tensor, E: Tensor, y: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the clean classes.

        X: float[B, n, input X] (the class one-hot first), E: float[B, n, n, input E] symmetric,
        y: float[B, input y], node_mask: bool[B, n]. n must be n_pad: the network pools over padded rows.
        Returns X float[B, n, classes], 0 on padded rows, and E float[B, n, n, classes], symmetric, 0 on the
        diagonal and on padded rows and columns.
        """
        x_mask = node_mask[..., None].to(X.dtype)
        e_mask = x_mask[:, :, None] * x_mask[:, None]
        absent = ~node_mask[:, None, :, None]

        x, e, g = self.mlp_in_X(X) * x_mask, self.mlp_in_E(E), self.mlp_in_y(y)
        e = (e + e.transpose(1, 2)) / 2 * e_mask
        for layer in self.tf_layers:
            x, e, g = layer(x, e, g, x_mask, e_mask, absent)

        x = (self.mlp_out_X(x) + X[..., : self.classes_x]) * x_mask
        e = self.mlp_out_E(e) + E[..., : self.classes_e]
        off_diagonal = 1 - torch.eye(E.shape[1], dtype=e.dtype, device=e.device)[..., None]
        return x, (e + e.transpose(1, 2)) / 2 * (e_mask * off_diagonal)


_BLOCK_LINEARS = (
    *("q", "k", "v", "e_add", "e_mul", "y_e_mul", "y_e_add", "y_x_mul", "y_x_add"),
    *("y_y", "x_y.lin", "e_y.lin", "x_out", "e_out", "y_out.0", "y_out.2"),
)
_FFN_LINEARS = ("linX1", "linX2", "linE1", "linE2", "lin_y1", "lin_y2")
_Y_PATH = tuple(f"self_attn.{name}" for name in ("y_y", "x_y.lin", "e_y.lin", "y_out.0", "y_out.2"))


def layer_linears(config: DigressConfig) -> tuple[str, ...]:
    """Names of all Linears inside the layers, 22 a layer, dead ones included."""
    inside = (*(f"self_attn.{name}" for name in _BLOCK_LINEARS), *_FFN_LINEARS)
    return tuple(f"tf_layers.{i}.{name}" for i in range(config.n_layers) for name in inside)


def dead(config: DigressConfig) -> tuple[str, ...]:
    """Names of the seven layer Linears that feed nothing: the y path of the last layer."""
    return tuple(f"tf_layers.{config.n_layers - 1}.{name}" for name in (*_Y_PATH, "lin_y1", "lin_y2"))


def quantizable(config: DigressConfig) -> tuple[str, ...]:
    """Names of the layer Linears that feed an output; input and output MLPs (< 2 % of the work) stay out."""
    unused = set(dead(config))
    return tuple(name for name in layer_linears(config) if name not in unused)


_FED_BY_THE_LAYER: dict[str, tuple[str, ...]] = {"normX1": ("linX1",), "normE1": ("linE1",), "norm_y1": ("lin_y1",)}
_FED_BY_THE_LAYER_BEFORE = {
    "normX2": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "normE2": ("self_attn.e_add", "self_attn.e_mul"),
    "norm_y2": tuple(f"self_attn.{name}" for name in ("y_e_mul", "y_e_add", "y_x_mul", "y_x_add", "y_y")),
}


def thresholds(weights: Mapping[str, Tensor], config: DigressConfig, k: float) -> dict[str, Tensor]:
    """Outlier thresholds of the inputs that a LayerNorm gives: float32[d_in] by name of the Linear.

    Only there does a closed form hold for every token. Layer 0's attention reads the in-MLPs, and x_out, e_out, x_y,
    e_y, y_out and the second Linears of the feed-forward nets read products or a ReLU: not in the result.
    """
    found: dict[str, Tensor] = {}
    useless = set(dead(config))
    for i in range(config.n_layers):
        fed = [(i, *pair) for pair in _FED_BY_THE_LAYER.items()]
        fed += [(i - 1, *pair) for pair in _FED_BY_THE_LAYER_BEFORE.items()] if i else []
        for owner, norm, readers in fed:
            names = [name for reader in readers if (name := f"tf_layers.{i}.{reader}") not in useless]
            if names:
                gamma, beta = (
                    weights[f"tf_layers.{owner}.{norm}.{kind}"].float() for kind in ("weight", "bias")
                )
                found |= dict.fromkeys(names, k_sigma(gamma, beta, k))
    return found


def dead_tensors(config: DigressConfig) -> frozenset[str]:
    """Names of published tensors that feed no output: `dead`, their norms and mlp_out_y."""
    norms = (f"tf_layers.{config.n_layers - 1}.norm_y{i}" for i in (1, 2))
    modules = (*dead(config), *norms, "mlp_out_y.0", "mlp_out_y.2")
    return frozenset(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


def live_weights(weights: Mapping[str, Tensor], config: DigressConfig) -> dict[str, Tensor]:
    """The weights that the network has: all but `dead_tensors`."""
    unused = dead_tensors(config)
    return {name: tensor for name, tensor in weights.items() if name not in unused}


def check_weights(
    weights: Mapping[str, Tensor], config: DigressConfig, where: str = "the checkpoint"
) -> None:
    """Compare names and shapes with the network's. Raises: ModelMismatch that lists every difference."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in GraphTransformer(config).state_dict().items()}
    found = {name: tuple(t.shape) for name, t in live_weights(weights, config).items()}
    problems = [f"missing {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unknown {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(found[name])}, not {list(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    if problems:
        raise ModelMismatch(where, sorted(problems))


def build(
    config: DigressConfig, weights: Mapping[str, Tensor], where: str = "the checkpoint"
) -> GraphTransformer:
    """A network in evaluation mode, in float32, on the weights' device.

    weights: any float type; `dead_tensors` may be there or not. Raises: ModelMismatch.
    """
    check_weights(weights, config, where)
    with torch.device("meta"):
        net = GraphTransformer(config)
    state = {name: tensor.to(torch.float32) for name, tensor in live_weights(weights, config).items()}
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)
