"""Run: .venv/bin/python -m pytest tests/kernels/test_reference.py -q   (half of it needs g++; no GPU)

The twins against the product's own float64 code and QuantLinear; the kernels, in the emulator, against the twins.
"""

import copy
import functools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdgdm.kernels import reference
from bitdgdm.kernels.denoise import Denoiser, Noise
from bitdgdm.kernels.fits import defines
from bitdgdm.kernels.network import Shape, prepare
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.features import network_input
from bitdgdm.models.philox import philox
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.parts import codes
from bitdgdm.quant.recipe_book import get_recipe
from tests.kernels.conftest import Case, make_case
from tests.kernels.emulate import Emulator

EMULATED = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
TIME, SEED = 250, 0xFEDCBA9876543210


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """What the twins make of the case's graphs: rows, one-hot E, y in float64."""
    graphs = zip(case.x.numpy(), case.e.numpy(), case.n.tolist(), strict=True)
    found = [reference.features(x, e, n, TIME, case.shape) for x, e, n in graphs]
    rows, y = (torch.from_numpy(np.stack(part)) for part in zip(*found, strict=True))
    return rows, case.one_hot()[1].double(), y


@pytest.mark.parametrize("name", ["qm9_case", "moses_case"])
def test_a_step_of_the_twins_is_the_network_in_float64(name: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    rows, e, y = inputs_of(case)
    weights = {name: t.double() for name, t in case.weights.items()}
    wanted = copy.deepcopy(case.net).double()(rows, e, y, case.mask)
    for ours, theirs in zip(
        reference.forward(weights, case.shape, rows, e, y, case.mask), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@functools.cache
def qm9_shape() -> Shape:
    return make_case(QM9_NO_H, [9]).shape


@given(n=st.integers(1, 9), seed=st.integers(0, 10**6), density=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_features_are_those_of_the_product_for_graphs_of_any_size_and_density(
    n: int, seed: int, density: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < n
    x = torch.randint(4, (9,), generator=g) * mask
    e = (torch.randint(1, 5, (9, 9), generator=g) * (torch.rand(9, 9, generator=g) < density)).triu(1)
    e = (e + e.T) * (mask[:, None] & mask)
    one_hot = torch.eye(4, dtype=torch.float64)[x] * mask[:, None]
    edges = torch.eye(5, dtype=torch.float64)[e] * (mask[:, None] & mask)[..., None]
    rows, y = reference.features(x.numpy(), e.numpy(), n, TIME, qm9_shape())
    time = torch.tensor([TIME / 500], dtype=torch.float64)
    want_rows, _, want_y = network_input(one_hot[None], edges[None], time, mask[None], QM9_NO_H)
    np.testing.assert_allclose(rows[:n], want_rows[0, :n], atol=1e-7)
    np.testing.assert_allclose(y, want_y[0], atol=1e-7)


@given(
    seed=st.integers(0, 2**64 - 1),
    i=st.integers(0, 2**62),
    time=st.integers(0, 1000),
    slot=st.integers(0, 9999),
)
def test_uniform_numbers_are_those_of_the_product(seed: int, i: int, time: int, slot: int) -> None:
    wanted = philox(seed, torch.tensor([i]), time, torch.tensor([slot]))
    assert float(reference.uniform(seed, i, time, slot)) == float(wanted)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_8_bit_linear_is_quant_linear_to_the_last_bit(scale: float) -> None:
    torch.manual_seed(2)
    weight, bias, recipe = torch.randn(48, 80), torch.randn(48), get_recipe("rtn-w8a8")
    parts = decompose(weight, recipe)[0]
    x = torch.randn(33, 80) * scale
    x[3], x[4, 7] = 0, 900 * scale
    assert parts.scale is not None
    ours = reference.integer_linear(x, codes(parts).to(torch.int8), parts.scale.float(), torch.zeros(48))
    layer = QuantLinear.from_parts(parts, None, recipe)
    assert torch.equal(ours, layer(x))
    assert (reference.round_rows(x)[0].abs().amax(-1) == 127).logical_or(x.abs().amax(-1) == 0).all()
    assert torch.equal(ours + bias, QuantLinear.from_parts(parts, bias, recipe)(x))


def batch_of(case: Case) -> Denoiser:
    """The case in the emulator, at time TIME, with made-up tables."""
    torch.manual_seed(4)
    k, m = case.shape.classes_x, case.shape.classes_e
    tables = torch.rand(2, k, k, k), torch.rand(2, m, m, m)
    noise = Noise(torch.tensor([500, TIME, 7], dtype=torch.int32), *tables)
    launcher = Emulator({**case.shape.defines, "edge_attend": {"STEPS": 16}})
    ids = torch.arange(len(case.n)) + 2**40
    network = prepare(case.weights, case.shape, torch.device("cpu"))
    batch = Denoiser(network, noise, case.n, ids, SEED, launcher)
    batch.x.copy_(case.x)
    batch.e.copy_(case.e)
    batch.step.fill_(1)
    return batch


@EMULATED
@pytest.mark.parametrize("name", ["qm9_case", "moses_case"])
def test_the_features_kernel_is_its_twin(name: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    rows, _, y = inputs_of(case)
    plain_x, plain_y = torch.full(rows.shape, float("nan")), torch.full(y.shape, float("nan"))
    batch_of(case).features(plain_x, plain_y)
    assert (plain_x - rows)[case.mask].abs().max() < 1e-6 and (plain_y - y).abs().max() < 1e-6


def graphs_of_many_kinds(n_pad: int) -> Case:
    """Sparse, dense, complete, empty, in pieces, rings, trees; of 1 node to n_pad."""
    g = torch.Generator().manual_seed(n_pad)
    sizes = [n_pad] * 8 + [1, 2, 3, n_pad - 1, n_pad - 2, n_pad // 2 + 1, n_pad // 2, n_pad // 3]
    case = make_case(replace(QM9_NO_H, n_pad=n_pad, n_nodes=(0.0, *(1 / n_pad,) * n_pad)), sizes)
    density = torch.tensor([0.08, 0.15, 0.4, 1.0, 0.0, 0.1, 0.0, 0.0] + [0.3] * 8)
    e = torch.rand(len(sizes), n_pad, n_pad, generator=g) < density[:, None, None]
    i = torch.arange(n_pad)
    e[6, i[:-1], i[1:]], e[6, 0, n_pad - 1] = True, True
    e[7, i[1:] // 2, i[1:]] = True
    e = e.triu(1) * torch.randint(1, 5, e.shape, generator=g) * (case.mask[:, :, None] & case.mask[:, None])
    return replace(case, e=e + e.transpose(1, 2))


@EMULATED
@pytest.mark.parametrize("n_pad", [9, 27, 40])
def test_the_features_of_a_graph_are_those_of_the_twin_in_any_batch(n_pad: int) -> None:
    case = graphs_of_many_kinds(n_pad)
    rows, _, y = inputs_of(case)

    def computed(pick: list[int], defines: dict[str, dict[str, int]]) -> tuple[Tensor, Tensor]:
        some = replace(case, n=case.n[pick], x=case.x[pick], e=case.e[pick])
        batch = batch_of(some)
        batch.launcher = Emulator(defines)
        plain_x, plain_y = torch.full((len(pick), *rows.shape[1:]), float("nan")), torch.full((len(pick), y.shape[1]), 0.0)
        batch.features(plain_x, plain_y)
        plain_x[~some.mask] = 0  # nobody's
        return plain_x, plain_y

    every = list(range(len(case.n)))
    together_x, together_y = computed(every, case.shape.defines)
    assert (together_x - rows).abs().max() < 1e-6 and (together_y - y).abs().max() < 1e-6
    for pick in (every[::-1], [3, 5, 8], [13]):
        x, y_of = computed(pick, defines(case.shape, 232448))
        assert torch.equal(x, together_x[pick]) and torch.equal(y_of, together_y[pick])


@EMULATED
@pytest.mark.parametrize("name", ["qm9_case", "moses_case"])
def test_a_step_of_the_kernels_errs_at_most_twice_as_much_as_the_twins_in_bf16(
    name: str, request: pytest.FixtureRequest
) -> None:
    case: Case = request.getfixturevalue(name)
    batch, inputs = batch_of(case), inputs_of(case)
    batch.forward()
    exact = reference.forward(case.weights, case.shape, *inputs, case.mask)
    low = reference.forward(case.weights, case.shape, *(t.bfloat16() for t in inputs), case.mask)
    for ours, want, rounded in zip(batch.logits(), exact, low, strict=True):
        norm = want.norm()
        assert (ours - want).norm() / norm <= 2 * (rounded.double() - want).norm() / norm + 1e-4


@EMULATED
def test_the_sample_kernel_draws_what_its_twin_draws(moses_case: Case) -> None:
    batch, shape = batch_of(moses_case), moses_case.shape
    batch.logits_x.normal_(0, 2)
    batch.logits_e.normal_(0, 2)
    logits_x, logits_e = (t.numpy() for t in batch.logits())
    tables_x, tables_e = batch.noise.tables_x[1].numpy(), batch.noise.tables_e[1].numpy()
    x, e = moses_case.x.numpy(), moses_case.e.numpy()
    batch.draw()
    for g, n in enumerate(moses_case.n.tolist()):
        for i in range(n):
            u = reference.uniform(SEED, 2**40 + g, 7, i)
            assert int(batch.x[g, i]) == reference.draw(logits_x[g, i], tables_x[x[g, i]], u)
            for j in range(i + 1, n):
                u = reference.uniform(SEED, 2**40 + g, 7, shape.n_pad + shape.n_pad * i + j)
                wanted = reference.draw(logits_e[g, i, j], tables_e[e[g, i, j]], u)
                assert int(batch.e[g, i, j]) == int(batch.e[g, j, i]) == wanted
