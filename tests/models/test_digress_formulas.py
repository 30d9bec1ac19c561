"""Run: .venv/bin/python -m pytest tests/models/test_digress_formulas.py -q

The shipped network against a second evaluation in float64 NumPy, one graph at a time, written from the
formulas: cycles by enumeration (of length 5 by the published formula, which counts more), components by
walking, spectrum by LAPACK on the unpadded graph, the network as in the paper.
"""

from itertools import permutations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bitdgdm.models.digress import build
from bitdgdm.models.features import network_input
from bitdgdm.models.source import load_source

Array = NDArray[np.float64]
SHIPPED = load_source("builtin:digress-qm9")
N_PAD = 9


# -- features of one graph: atoms int[n], bonds int[n, n] -------------------------------------------------


def cycles_by_enumeration(adjacent: NDArray[np.bool_], length: int) -> tuple[list[int], int]:
    """Simple cycles of a length through each node, and in all: returning paths, 2 * length for each."""
    n = len(adjacent)
    through = [0] * n
    for first in range(n):
        stack = [(first,)]
        while stack:
            path = stack.pop()
            if len(path) == length:
                through[first] += adjacent[path[-1], first]
                continue
            stack += [(*path, j) for j in range(n) if adjacent[path[-1], j] and j not in path]
    return [count // 2 for count in through], sum(through) // (2 * length)


def five_cycles_as_published(adjacent: NDArray[np.bool_]) -> tuple[list[float], float]:
    """Closed walks of length 5 less those around a triangle; too many where two triangles share an edge."""
    a = adjacent.astype(np.int64)
    triangles, degree = np.diag(np.linalg.matrix_power(a, 3)), a.sum(1)
    twice = np.diag(np.linalg.matrix_power(a, 5)) - 2 * triangles * degree - a @ triangles + triangles
    return list(twice / 2), twice.sum() / 10


def components_by_walking(adjacent: NDArray[np.bool_]) -> list[set[int]]:
    left, found = list(range(len(adjacent))), []
    while left:
        seen, frontier = {left[0]}, [left[0]]
        while frontier:
            new = [j for j in range(len(adjacent)) if adjacent[frontier[-1], j] and j not in seen]
            frontier.pop()
            seen |= set(new)
            frontier += new
        found.append(seen)
        left = [i for i in left if i not in seen]
    return found


def eigen_features(adjacent: NDArray[np.bool_], components: int) -> tuple[list[float], Array]:
    """The five eigenvalue channels and the two eigenvector channels by the documented rule."""
    n = len(adjacent)
    laplacian = np.diag(adjacent.sum(1)) - adjacent.astype(float)
    values, vectors = np.linalg.eigh(laplacian)
    scaled = [*(values[components:] / n), *[2 * N_PAD / n] * (N_PAD - n), *[2.0] * 5][:5]
    chosen = np.zeros((n, 2))
    spaces: dict[int, Array] = {}
    for column, number in enumerate(range(components, min(components + 2, n))):
        start = next(i for i in range(n) if abs(values[i] - values[number]) < 1e-6)
        member = np.abs(values - values[number]) < 1e-6
        projector = spaces.get(start, vectors[:, member] @ vectors[:, member].T)
        diagonal = np.diag(projector)
        p = next(i for i in range(n) if diagonal[i] >= (1 - 2e-4) * diagonal.max())
        chosen[:, column] = projector[:, p] / np.sqrt(projector[p, p])
        spaces[start] = projector - np.outer(chosen[:, column], chosen[:, column])
    return scaled, chosen


def inputs_of(atoms: NDArray[np.int64], bonds: NDArray[np.int64], t: float) -> tuple[Array, Array, Array]:
    """X [9, 12], E [9, 9, 5], y [13] of one graph, padded."""
    n = len(atoms)
    adjacent = bonds > 0
    counts: dict[int, tuple] = {k: cycles_by_enumeration(adjacent, k) for k in (3, 4, 6)}
    counts[5] = five_cycles_as_published(adjacent)
    parts = components_by_walking(adjacent)
    largest = max(parts, key=len)  # the first among equals is the one with the lowest node
    eigenvalues, eigenvectors = eigen_features(adjacent, len(parts))
    X = np.zeros((N_PAD, 12))
    for i in range(n):
        valency = bonds[i].sum()
        channels = [min(counts[k][0][i] / 10, 1) for k in (3, 4, 5)]
        X[i] = [
            *np.eye(4)[atoms[i]],
            *channels,
            i not in largest,
            *eigenvectors[i],
            atoms[i] - valency,
            valency,
        ]
    E = np.zeros((N_PAD, N_PAD, 5))
    E[:n, :n] = np.eye(5)[bonds]
    mass = sum((12, 14, 16, 19)[a] for a in atoms) + 12 * (N_PAD - n)  # padding weighs like class 0
    cycles = [min(counts[k][1] / 10, 1) for k in (3, 4, 5, 6)]
    return X, E, np.array([n / 9, *cycles, len(parts), *eigenvalues, mass / 150, t])


# -- the network ------------------------------------------------------------------------------------------

W = {name: tensor.double().numpy() for name, tensor in SHIPPED.weights.items()}


def linear(name: str, x: Array) -> Array:
    return x @ W[f"{name}.weight"].T + W[f"{name}.bias"]


def mlp(name: str, x: Array) -> Array:
    return linear(f"{name}.2", np.maximum(linear(f"{name}.0", x), 0))


def layer_norm(name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * W[f"{name}.weight"] + W[f"{name}.bias"]


def pooled(rows: Array) -> Array:
    return np.concatenate([rows.mean(0), rows.min(0), rows.max(0), rows.std(0, ddof=1)])


def logits_by_formula(X: Array, E: Array, y: Array, n: int) -> tuple[Array, Array]:
    real = np.arange(N_PAD) < n
    mx, me = real[:, None].astype(float), (real[:, None] & real)[..., None].astype(float)
    classes_x, classes_e = X[:, :4], E
    x = np.maximum(mlp("mlp_in_X", X), 0) * mx
    e = np.maximum(mlp("mlp_in_E", E), 0)
    e = (e + e.transpose(1, 0, 2)) / 2 * me
    g = np.maximum(mlp("mlp_in_y", y), 0)
    for i in range(9):
        at, layer = f"tf_layers.{i}.self_attn", f"tf_layers.{i}"
        q, k, v = (linear(f"{at}.{name}", x) for name in "qkv")
        score = q[:, None] * k[None] / np.sqrt(256 / 8)
        score = score * (linear(f"{at}.e_mul", e) + 1) + linear(f"{at}.e_add", e)
        e_new = linear(f"{at}.y_e_add", g) + (linear(f"{at}.y_e_mul", g) + 1) * score
        e_new = linear(f"{at}.e_out", e_new) * me
        weight = np.exp(score[:, :n] - score[:, :n].max(1, keepdims=True))
        attention = weight / weight.sum(1, keepdims=True)
        gathered = (attention * v[None, :n]).sum(1)
        x_new = linear(f"{at}.y_x_add", g) + (linear(f"{at}.y_x_mul", g) + 1) * gathered
        x_new = linear(f"{at}.x_out", x_new) * mx
        g_new = linear(f"{at}.y_y", g) + linear(f"{at}.x_y.lin", pooled(x))
        g_new = mlp(f"{at}.y_out", g_new + linear(f"{at}.e_y.lin", pooled(e.reshape(-1, e.shape[-1]))))
        for kind, old, new in (("X", x, x_new), ("E", e, e_new), ("_y", g, g_new)):
            norm, lin = f"{layer}.norm{kind}", f"{layer}.lin{kind}"
            middle = layer_norm(f"{norm}1", old + new)
            hidden = np.maximum(linear(f"{lin}1", middle), 0)
            result = layer_norm(f"{norm}2", middle + linear(f"{lin}2", hidden))
            x, e, g = (
                result if kind == "X" else x,
                result if kind == "E" else e,
                result if kind == "_y" else g,
            )
    out_e = (mlp("mlp_out_E", e) + classes_e) * (1 - np.eye(N_PAD))[..., None]
    return (mlp("mlp_out_X", x) + classes_x) * mx, (out_e + out_e.transpose(1, 0, 2)) / 2 * me


# -- both -------------------------------------------------------------------------------------------------


def ragged_batch(seed: int, density: float) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], Array]:
    """18 graphs, each size from 1 to 9 twice, in random order; density 0..1 is the share of bonded pairs."""
    rng = np.random.default_rng(seed)
    atoms, bonds = [], []
    for n in rng.permutation([*range(1, 10)] * 2):
        atoms.append(rng.choice(4, n, p=[0.723, 0.115, 0.159, 0.003]))
        kinds = np.triu(
            rng.choice([1, 2, 3, 4], (n, n), p=[0.8, 0.1, 0.05, 0.05]) * (rng.random((n, n)) < density), 1
        )
        bonds.append(kinds + kinds.T)
    return atoms, bonds, rng.integers(1, 501, len(atoms)) / 500


def as_tensors(atoms: list[NDArray[np.int64]], bonds: list[NDArray[np.int64]]) -> tuple[torch.Tensor, ...]:
    B = len(atoms)
    X, E, mask = torch.zeros(B, 9, 4), torch.zeros(B, 9, 9, 5), torch.zeros(B, 9, dtype=torch.bool)
    for b, (a, k) in enumerate(zip(atoms, bonds, strict=True)):
        n = len(a)
        X[b, :n], E[b, :n, :n], mask[b, :n] = torch.eye(4)[a], torch.eye(5)[k], True
    return X, E, mask


@pytest.mark.parametrize(("seed", "density"), [(0, 0.0), (1, 0.15), (2, 0.27), (3, 0.5), (4, 1.0)])
def test_logits_equal_a_float64_evaluation_of_the_formulas_for_graphs_of_1_to_9_nodes(
    seed: int, density: float
) -> None:
    atoms, bonds, t = ragged_batch(seed, density)
    X, E, mask = as_tensors(atoms, bonds)
    net = build(SHIPPED.config, SHIPPED.weights)
    with torch.inference_mode():
        inputs = network_input(X, E, torch.tensor(t, dtype=torch.float32), mask, SHIPPED.config)
        ours = net(*inputs, mask)
    worst_feature = worst_logit = 0.0
    for b, (a, k) in enumerate(zip(atoms, bonds, strict=True)):
        expected_inputs = inputs_of(a, k, t[b])
        expected = logits_by_formula(*expected_inputs, len(a))
        pairs = [(inputs[i][b], expected_inputs[i]) for i in range(3)]
        worst_feature = max(worst_feature, *(np.abs(o.double().numpy() - w).max() for o, w in pairs))
        worst_logit = max(
            worst_logit, *(np.abs(ours[i][b].double().numpy() - expected[i]).max() for i in range(2))
        )
    assert worst_feature < 1e-6
    assert worst_logit < 1e-4


def test_an_empty_diagonal_and_class_0_on_it_are_both_passed_on_as_they_are() -> None:
    atoms, bonds, t = ragged_batch(7, 0.3)
    X, E, mask = as_tensors(atoms, bonds)
    E = E * (1 - torch.eye(9))[..., None]  # as in the first step, where z_T has no class on the diagonal
    net = build(SHIPPED.config, SHIPPED.weights)
    with torch.inference_mode():
        ours = net(*network_input(X, E, torch.tensor(t, dtype=torch.float32), mask, SHIPPED.config), mask)
    for b, (a, k) in enumerate(zip(atoms, bonds, strict=True)):
        x, e, y = inputs_of(a, k, t[b])
        expected = logits_by_formula(x, e * (1 - np.eye(9))[..., None], y, len(a))
        for i in range(2):
            np.testing.assert_allclose(ours[i][b].numpy(), expected[i], atol=1e-4)


def test_the_enumeration_finds_the_cycles_of_known_graphs() -> None:
    complete = ~np.eye(6, dtype=bool)
    for length, expected in ((3, 20), (4, 45), (5, 72), (6, 60)):
        assert cycles_by_enumeration(complete, length)[1] == expected
    ring = np.zeros((5, 5), dtype=bool)
    for i, j in permutations(range(5), 2):
        ring[i, j] = (i - j) % 5 in (1, 4)
    assert cycles_by_enumeration(ring, 5) == five_cycles_as_published(ring) == ([1] * 5, 1)
