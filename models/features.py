"""What DiGress tells its network besides the noisy classes: cycles, spectrum, chemistry, size, time.

Guarantees: the channels, their order and their quirks are those of the published code ("all" features); a
graph's features are a function of that graph only (integers counted exactly, spectrum by
bitdgdm.models.eigen); no host synchronisation.
Knows nothing of: the network, noise, sampling.

Where it differs from the published code, on purpose: sign and basis of eigenvectors and "the largest
component" follow a fixed rule where the published code takes what the eigensolver returns (see
`not_in_largest` and eigen.basis_vectors).
Source: github.com/cvignac/DiGress, extra_features.py and extra_features_molecular.py.
"""

import torch
from torch import Tensor

from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.eigen import basis_vectors, pivot, projector_column, projector_diagonal, symmetric_eigen

ZERO = 1e-5  # an eigenvalue / n below this counts as 0, that is as one more component


def network_input(
    X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor, config: DigressConfig
) -> tuple[Tensor, ...]:
    """The three inputs of GraphTransformer.

    X: float[B, n_pad, classes] and E: float[B, n_pad, n_pad, classes], one-hot, zero outside the mask (the
    diagonal of E may be zero or class 0); t: float[B], step / T; node_mask: bool[B, n_pad].
    Returns X [B, n_pad, input X], E [B, n_pad, n_pad, input E], y [B, input y] in X's type.
    """
    extra_x, _, y = extra_features(X, E, t, node_mask, config)
    return torch.cat((X, extra_x), dim=-1), E, y


def extra_features(
    X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor, config: DigressConfig
) -> tuple[Tensor, ...]:
    """The channels that follow the classes; arguments as in `network_input`.

    Returns extra_X [B, n_pad, 6 or 8]: cycles of length 3, 4, 5 through the node, not in the largest
    component, 2 eigenvectors, then charge and valency of molecules; extra_E [B, n_pad, n_pad, 0];
    extra_y [B, 12 or 13]: n / n_pad, cycles of length 3..6, components, 5 eigenvalues, then weight of
    molecules, then t.
    """
    adjacency = E[..., 1:].sum(-1).to(torch.float64)
    n = node_mask.sum(1, keepdim=True)
    node_cycles, graph_cycles = cycles(adjacency)
    components, eigenvalues, outside, eigenvectors = spectrum(adjacency, node_mask)
    per_node = [node_cycles * node_mask[..., None], outside[..., None], eigenvectors]
    per_graph = [n / config.n_pad, graph_cycles, components, eigenvalues]
    if config.molecular:
        per_node += [*charge_and_valency(X, E)]
        per_graph.append(weight(X, config))
    per_graph.append(t.reshape(-1, 1))
    extra_x = torch.cat([channel.to(X.dtype) for channel in per_node], dim=-1)
    extra_y = torch.cat([channel.to(X.dtype) for channel in per_graph], dim=-1)
    return extra_x, E[..., :0], extra_y


def cycles(a: Tensor) -> tuple[Tensor, Tensor]:
    """Cycles through each node (length 3, 4, 5) and in the graph (3..6), a tenth of them and at most 1.

    Quirk, as published: the formula for length 5 counts too many where two triangles share an edge.
    a: float64[B, n, n] of 0 and 1; all sums below are integers under 2^53, so they are exact in any order.
    Returns [B, n, 3] and [B, 4].
    """
    a2 = a @ a
    a3 = a2 @ a
    a4 = a3 @ a
    a5 = a4 @ a
    d = a.sum(-1)
    diag2, diag3, diag4 = (torch.diagonal(p, dim1=1, dim2=2) for p in (a2, a3, a4))
    diag5 = torch.diagonal(a5, dim1=1, dim2=2)
    trace6 = (a3 * a3).sum((1, 2))

    c3 = diag3
    c4 = diag4 - d * (d - 1) - (a * d[:, None]).sum(-1)
    c5 = diag5 - 2 * diag3 * d - (a * diag3[:, None]).sum(-1) + diag3
    c6 = (
        trace6
        - 3 * (diag3 * diag3).sum(-1)
        + 9 * (a * a2 * a2).sum((1, 2))
        - 6 * (diag2 * diag4).sum(-1)
        + 6 * diag4.sum(-1)
        - 4 * diag3.sum(-1)
        + 4 * (diag2**3).sum(-1)
        + 3 * a3.sum((1, 2))
        - 12 * (diag2 * diag2).sum(-1)
        + 4 * diag2.sum(-1)
    )
    node = torch.stack((c3, c4, c5), dim=-1) / 2
    graph = torch.stack((c3.sum(-1) / 6, c4.sum(-1) / 8, c5.sum(-1) / 10, c6 / 12), dim=-1)
    return (node / 10).clamp(max=1), (graph / 10).clamp(max=1)


def spectrum(a: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Laplacian features. a: float64[B, n_pad, n_pad], node_mask: bool[B, n_pad].

    Padded nodes get 2 n_pad on the diagonal, so their eigenvalues come last and enter the eigenvalue
    features of small graphs, as published; after them come 2s. Eigenvalues are divided by n.
    Returns components [B, 1], the first 5 eigenvalues that are not 0 [B, 5], not_in_largest [B, n_pad], the
    first two eigenvectors that are not of eigenvalue 0 [B, n_pad, 2] (0 where there are none).
    """
    n_pad = a.shape[1]
    mask = node_mask.to(a.dtype)
    a = a * mask[:, :, None] * mask[:, None]
    laplacian = torch.diag_embed(a.sum(-1) + 2 * n_pad * (1 - mask)) - a
    values, vectors = symmetric_eigen(laplacian)

    scaled = values / mask.sum(1, keepdim=True).clamp(min=1)
    zero = scaled < ZERO
    components = zero.sum(1)
    extended = torch.cat((scaled, scaled.new_full((len(a), 5), 2.0)), dim=1)
    wanted = components[:, None] + torch.arange(5, device=a.device)
    eigenvalues = extended.gather(1, wanted)

    outside = not_in_largest(vectors, zero.to(a.dtype), mask)
    eigenvectors = basis_vectors(values, vectors, components) * mask[..., None]
    return components[:, None], eigenvalues, outside, eigenvectors


def not_in_largest(vectors: Tensor, zero: Tensor, mask: Tensor) -> Tensor:
    """1 for nodes outside the largest component; of equally large ones, that with the lowest node counts.

    The projector on the eigenspace of 0 holds 1/size for two nodes of one component and 0 else.
    (The published code takes the most common rounded entry of whatever first vector the solver returns.)
    vectors: float64[B, n, n]; zero: float64[B, n], 1 for columns of eigenvalue 0; mask: float64[B, n].
    Returns [B, n].
    """
    inverse_size = projector_diagonal(vectors, zero) + 2 * (1 - mask)
    largest = pivot(1 / inverse_size.clamp(min=1e-3))
    together = projector_column(vectors, zero, largest) > 0.5 * inverse_size.gather(1, largest)
    return (~together).to(mask.dtype) * mask


def charge_and_valency(X: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, 1] each. Quirk, as published: class indices stand for valencies, both of atoms and of bonds.

    The published code takes the argmax of one-hots scaled by valency or bond order, which is the class
    index: an atom counts its index (C 0, N 1, O 2, F 3) and an aromatic bond 4.
    """
    valency = E.argmax(-1).sum(-1)
    return (X.argmax(-1) - valency)[..., None], valency[..., None]


def weight(X: Tensor, config: DigressConfig) -> Tensor:
    """Sum of atom weights / max_weight, [B, 1]. Quirk, as published: padding weighs like class 0."""
    classes = X.argmax(-1)
    counts = [(classes == kind).sum(-1, keepdim=True).to(torch.float64) for kind in range(X.shape[-1])]
    total = sum(
        (w * count for w, count in zip(config.atom_weights, counts, strict=True)), torch.zeros_like(counts[0])
    )
    return total / config.max_weight
