"""Run: .venv/bin/python -m pytest tests/models/test_features.py -q"""

from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdgdm.models.digress_config import QM9_NO_H, Dims
from bitdgdm.models.features import cycles, extra_features, network_input

N = 9
CYCLES_X, OUTSIDE, VECTORS, CHARGE, VALENCY = slice(0, 3), 3, slice(4, 6), 6, 7
SIZE, CYCLES_Y, COMPONENTS, VALUES, WEIGHT, TIME = 0, slice(1, 5), 5, slice(6, 11), 11, 12


def batch(graphs: list[tuple[list[int], dict[tuple[int, int], int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot X, E (class 0 on the diagonal) and mask from (atoms, bonds by pair)."""
    X, E = torch.zeros(len(graphs), N, 4), torch.zeros(len(graphs), N, N, 5)
    mask = torch.zeros(len(graphs), N, dtype=torch.bool)
    for b, (atoms, bonds) in enumerate(graphs):
        n = len(atoms)
        X[b, torch.arange(n), torch.tensor(atoms)] = 1
        kinds = torch.zeros(n, n, dtype=torch.long)
        for (i, j), kind in bonds.items():
            kinds[i, j] = kinds[j, i] = kind
        E[b, :n, :n] = torch.eye(5)[kinds]
        mask[b, :n] = True
    return X, E, mask


def features(
    graphs: list[tuple[list[int], dict[tuple[int, int], int]]], t: float = 0.5
) -> tuple[Tensor, Tensor]:
    X, E, mask = batch(graphs)
    extra_x, extra_e, extra_y = extra_features(X, E, torch.full((len(graphs),), t), mask, QM9_NO_H)
    assert extra_e.shape == (len(graphs), N, N, 0)
    return extra_x, extra_y


def chain(*nodes: int) -> dict[tuple[int, int], int]:
    return {(i, j): 1 for i, j in pairwise(nodes)}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[int], dict[tuple[int, int], int]]:
    n = draw(st.integers(1, N))
    atoms = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return atoms, {pair: draw(st.integers(1, 4)) for pair in chosen}


# -- quirks of the published code -------------------------------------------------------------------------


def test_charge_and_valency_are_class_indices() -> None:
    x, _ = features([([0, 1, 3], {(0, 1): 2, (1, 2): 4})])  # C=N, N aromatic to F
    assert x[0, :3, VALENCY].tolist() == [2, 6, 4]  # an aromatic bond counts 4
    assert x[0, :3, CHARGE].tolist() == [0 - 2, 1 - 6, 3 - 4]  # C counts 0, N 1, O 2, F 3
    assert not x[0, 3:, CHARGE:].any()


def test_padding_weighs_like_the_first_atom_class() -> None:
    _, y = features([([2, 3], {}), ([2] * 9, {})])
    torch.testing.assert_close(y[:, WEIGHT], torch.tensor([16 + 19 + 7 * 12, 9 * 16]) / 150)


def test_eigenvalues_of_padding_follow_those_of_a_small_graph_and_then_twos() -> None:
    _, y = features([([0], {}), ([0, 0], {(0, 1): 1}), ([0] * 7, {}), ([0] * 9, {})])
    assert y[0, VALUES].tolist() == [18.0] * 5  # 2 n_pad / n
    torch.testing.assert_close(
        y[1, VALUES], torch.tensor([1.0, 9, 9, 9, 9])
    )  # the bond has eigenvalue 2 = 2 n / 2
    torch.testing.assert_close(y[2, VALUES], torch.tensor([18 / 7, 18 / 7, 2, 2, 2]))
    assert y[3, VALUES].tolist() == [2.0] * 5
    assert y[:, COMPONENTS].tolist() == [1, 1, 7, 9]


def test_cycle_counts_are_tenths_and_end_at_one() -> None:
    complete = {(i, j): 1 for i, j in permutations(range(9), 2) if i < j}
    x, y = features([([0] * 3, {(0, 1): 1, (1, 2): 1, (0, 2): 1}), ([0] * 9, complete)])
    assert x[0, :3, CYCLES_X].tolist() == [[pytest.approx(0.1), 0, 0]] * 3
    assert y[0, CYCLES_Y].tolist() == [pytest.approx(0.1), 0, 0, 0]
    assert (x[1, :, CYCLES_X] == 1).all() and (y[1, CYCLES_Y] == 1).all()


def test_size_and_time_stand_first_and_last() -> None:
    _, y = features([([0] * 4, {})], t=0.25)
    assert y[0, SIZE].item() == pytest.approx(4 / 9) and y[0, TIME].item() == 0.25


# -- the largest component, the eigenvectors --------------------------------------------------------------


def test_nodes_outside_the_largest_component_are_marked() -> None:
    x, y = features([([0] * 8, chain(5, 1, 6, 3) | chain(0, 4))])
    assert x[0, :, OUTSIDE].tolist() == [1, 0, 1, 0, 1, 0, 0, 1, 0]
    assert y[0, COMPONENTS] == 4


def test_of_two_largest_components_the_one_with_the_lowest_node_counts() -> None:
    x, _ = features([([0] * 5, chain(1, 4) | chain(2, 3)), ([0] * 6, chain(0, 5, 1) | chain(2, 3, 4))])
    assert x[0, :5, OUTSIDE].tolist() == [1, 0, 1, 1, 0]
    assert x[1, :6, OUTSIDE].tolist() == [0, 0, 1, 1, 1, 0]


def test_the_two_vectors_of_a_path_are_its_cosines_with_the_largest_entry_positive() -> None:
    x, _ = features([([0] * 5, chain(0, 1, 2, 3, 4))])
    place = torch.arange(5) + 0.5
    for column, wave in enumerate((torch.cos(torch.pi * place / 5), -torch.cos(torch.pi * 2 * place / 5))):
        torch.testing.assert_close(x[0, :5, VECTORS][:, column], wave / wave.norm(), atol=1e-6, rtol=0)
    assert not x[0, 5:].any()


def test_graphs_with_fewer_eigenvectors_get_zeros() -> None:
    x, _ = features([([0], {}), ([0, 0], {(0, 1): 1}), ([0] * 9, {})])
    assert not x[0, :, VECTORS].any() and not x[1, :, VECTORS][:, 1].any() and not x[2, :, VECTORS].any()
    torch.testing.assert_close(
        x[1, :2, VECTORS][:, 0], torch.tensor([0.5, -0.5]).sqrt().nan_to_num(-(0.5**0.5))
    )


# -- properties -------------------------------------------------------------------------------------------


@given(graphs(), graphs())
def test_a_graph_gets_the_same_bits_whoever_shares_its_batch(
    graph: tuple[list[int], dict[tuple[int, int], int]], other: tuple[list[int], dict[tuple[int, int], int]]
) -> None:
    alone_x, alone_y = features([graph])
    x, y = features([other, graph, other])
    assert torch.equal(x[1], alone_x[0]) and torch.equal(y[1], alone_y[0])


@given(graphs(), st.randoms())
def test_renumbering_the_nodes_renumbers_what_no_tie_decides(
    graph: tuple[list[int], dict[tuple[int, int], int]], random: object
) -> None:
    atoms, bonds = graph
    order = list(range(len(atoms)))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = [0] * len(atoms)
    for i, atom in enumerate(atoms):
        moved[order[i]] = atom
    x, y = features([graph, (moved, {(order[i], order[j]): kind for (i, j), kind in bonds.items()})])
    torch.testing.assert_close(y[1], y[0], atol=1e-6, rtol=0)
    exact = [0, 1, 2, CHARGE, VALENCY]
    torch.testing.assert_close(x[1, order][:, exact], x[0, : len(atoms)][:, exact], atol=0, rtol=0)
    assert x[1, :, OUTSIDE].sum() == x[0, :, OUTSIDE].sum()


@given(graphs())
def test_a_class_on_the_diagonal_changes_no_feature(
    graph: tuple[list[int], dict[tuple[int, int], int]],
) -> None:
    X, E, mask = batch([graph])
    t = torch.tensor([0.5])
    full = extra_features(X, E, t, mask, QM9_NO_H)
    empty = extra_features(X, E * (1 - torch.eye(N))[..., None], t, mask, QM9_NO_H)
    for ours, theirs in zip(full, empty, strict=True):
        assert torch.equal(ours, theirs)


def test_cycles_of_dense_graphs_of_64_nodes_are_counted_exactly() -> None:
    complete = 1 - torch.eye(64, dtype=torch.float64)[None]
    ring = torch.roll(torch.eye(64, dtype=torch.float64), 1, 0)[None]
    for graph, through in ((complete, 1.0), (ring + ring.transpose(1, 2), 0.0)):
        node, whole = cycles(graph)
        assert (node == through).all() and (whole == through).all()


def test_models_of_plain_graphs_have_no_charge_valency_or_weight() -> None:
    planar = replace(
        QM9_NO_H, dataset="planar", atoms=(), valencies=(), atom_weights=(), bonds=("none", "edge"),
        input_dims=Dims(X=7, E=2, y=12), output_dims=Dims(X=1, E=2, y=0),
        node_marginals=(1.0,), edge_marginals=(0.9, 0.1),
    )  # fmt: skip
    mask = torch.ones(2, N, dtype=torch.bool)
    X, E = torch.ones(2, N, 1), torch.eye(2)[torch.zeros(2, N, N, dtype=torch.long)]
    x, e, y = network_input(X, E, torch.tensor([0.1, 0.2]), mask, planar)
    assert (x.shape[-1], e.shape[-1], y.shape[-1]) == (7, 2, 12)
    torch.testing.assert_close(y[:, -1], torch.tensor([0.1, 0.2]))
