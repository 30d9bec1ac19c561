"""A small network of the kernels' widths with random weights, and graphs of all sizes."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bitdgdm.kernels.network import Shape
from bitdgdm.models.digress import GraphTransformer
from bitdgdm.models.digress_config import QM9_NO_H, DigressConfig, Dims, HiddenDims

MOSES_LIKE = replace(
    QM9_NO_H,
    dataset="moses-like", n_pad=12, hidden_mlp_dims=Dims(256, 128, 256), input_dims=Dims(16, 5, 13), output_dims=Dims(8, 5, 0),
    hidden_dims=HiddenDims(256, 64, 128, 8, 256, 128), node_marginals=(0.125,) * 8, n_nodes=(0.0, *(1 / 12,) * 12),
    atoms=tuple("CNSOFXBH"), valencies=(4, 3, 2, 2, 1, 1, 1, 1), atom_weights=(12.0, 14.0, 32.0, 16.0, 19.0, 35.4, 79.9, 1.0),
    max_weight=350.0,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, its float32 twin in torch, and graphs: n [B], x [B, n_pad], e [B, n_pad, n_pad] symmetric."""

    config: DigressConfig
    shape: Shape
    net: GraphTransformer
    weights: dict[str, Tensor]
    n: Tensor
    x: Tensor
    e: Tensor

    @property
    def mask(self) -> Tensor:
        return torch.arange(self.config.n_pad) < self.n[:, None]

    def one_hot(self) -> tuple[Tensor, Tensor]:
        pair = self.mask[:, :, None] & self.mask[:, None]
        x = torch.eye(self.config.output_dims.X)[self.x] * self.mask[..., None]
        return x, torch.eye(self.config.output_dims.E)[self.e] * pair[..., None]


def make_case(config: DigressConfig, n: list[int], scale: float = 1.0) -> Case:
    """Random weights of two layers; `scale` multiplies q, so that scores grow."""
    torch.manual_seed(7)
    config = replace(config, n_layers=2)
    net = GraphTransformer(config).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if "norm" in name:
            p.add_(0.3 * torch.randn_like(p))
        if name.endswith("self_attn.q.weight"):
            p.mul_(scale)
    sizes = torch.tensor(n)
    mask = torch.arange(config.n_pad) < sizes[:, None]
    x = torch.randint(0, config.output_dims.X, mask.shape) * mask
    e = (torch.randint(0, 9, (*mask.shape, config.n_pad)) - 4).clamp(min=0).triu(1)
    e = (e + e.transpose(1, 2)) * (mask[:, :, None] & mask[:, None])
    h = config.hidden_dims
    shape = Shape(
        2, config.n_pad, config.output_dims.X, config.output_dims.E, h.dy, config.hidden_mlp_dims.y, h.n_head,
        config.diffusion_steps, config.atom_weights, config.max_weight,
    )  # fmt: skip
    return Case(config, shape, net, dict(net.state_dict()), sizes, x, e)


@pytest.fixture(scope="session")
def qm9_case() -> Case:
    return make_case(QM9_NO_H, [9, 9, 5, 9, 1, 8, 2])


@pytest.fixture(scope="session")
def moses_case() -> Case:
    return make_case(MOSES_LIKE, [12, 7, 11])
