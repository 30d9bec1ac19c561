"""Run: .venv/bin/python -m pytest tests/kernels/test_denoise.py -q   (needs g++; no GPU)

A whole step in the emulator: the same CUDA sources, every thread a fiber. What the emulator can't see (ptxas, memory
ordering, clocks) is checked on a GPU by tests/gpu and benchmarks/kernels_smoke.py.
"""

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitdgdm.kernels import reference as twin
from bitdgdm.kernels.denoise import Denoiser, Noise
from bitdgdm.kernels.fits import defines
from bitdgdm.kernels.network import Integers, prepare, supports
from bitdgdm.kernels.pack import from_tiles, to_tiles
from bitdgdm.kernels.step_graph import denoise
from bitdgdm.models.digress_config import QM9_NO_H
from bitdgdm.models.features import network_input
from bitdgdm.models.noise import cosine_schedule, posterior, posterior_table
from bitdgdm.models.philox import edge_slots, node_slots, philox
from bitdgdm.models.sampler import draw
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.parts import codes
from bitdgdm.quant.recipe_book import get_recipe
from tests.kernels.conftest import Case, make_case
from tests.kernels.emulate import Emulator

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
TIMES = (500, 250, 1, 0)
SEED = 0xFEDCBA9876543210


def noise_of(case: Case) -> Noise:
    schedule = cosine_schedule(500)

    def tables(m: tuple[float, ...]) -> Tensor:
        pairs = zip(TIMES, TIMES[1:], strict=False)  # noqa: RUF007
        return torch.from_numpy(np.stack([posterior_table(schedule, np.array(m), t, s) for t, s in pairs])).float()

    return Noise(torch.tensor(TIMES), tables(case.config.node_marginals), tables(case.config.edge_marginals))


def batch_of(
    case: Case, pick: list[int] | None = None, step: int = 1, hopper: bool = False,
    integers: dict[str, Integers] | None = None, **emulator: int,
) -> Denoiser:  # fmt: skip
    keep = torch.tensor(pick if pick is not None else range(len(case.n)))
    network = prepare(case.weights, case.shape, torch.device("cpu"), hopper=hopper, integers=integers)
    noise = noise_of(case)
    noise = Noise(noise.times.to(torch.int32), noise.tables_x, noise.tables_e)
    launcher = Emulator(defines(case.shape, emulator.get("shared_bytes", 232448)), **emulator)
    batch = Denoiser(network, noise, case.n[keep], keep * 10**12 + 3, SEED, launcher)
    batch.x.copy_(case.x[keep])
    batch.e.copy_(case.e[keep])
    batch.step.fill_(step)
    return batch


def reference(case: Case, step: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits in float32 and in torch's own bf16."""
    x, e = case.one_hot()
    if step == 0:
        e = e * (1 - torch.eye(case.config.n_pad))[..., None]
    inputs = network_input(x, e, torch.full((len(x),), TIMES[step] / 500), case.mask, case.config)
    exact = case.net(*inputs, case.mask)
    with torch.autocast("cpu", torch.bfloat16):
        low = case.net(*inputs, case.mask)
    return exact, tuple(t.float() for t in low)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", ["qm9_case", "moses_case"])
@pytest.mark.parametrize(("step", "hopper"), [(0, False), (1, False), (1, True)])
def test_logits_are_as_near_to_float32_as_bf16_in_torch(
    name: str, step: int, hopper: bool, request: pytest.FixtureRequest
) -> None:
    case = request.getfixturevalue(name)
    batch = batch_of(case, step=step, hopper=hopper)
    batch.forward()
    exact, low = reference(case, step)
    for ours, want, theirs in zip(batch.logits(), exact, low, strict=True):
        assert relative(ours, want) <= 2 * relative(theirs, want) + 1e-4


def test_features_are_those_of_the_torch_code(qm9_case: Case, moses_case: Case) -> None:
    for case in (qm9_case, moses_case):
        batch, config = batch_of(case), case.config
        plain_x = torch.full((len(case.n), config.n_pad, config.input_dims.X), float("nan"))
        plain_y = torch.full((len(case.n), config.input_dims.y), float("nan"))
        batch.features(plain_x, plain_y)
        x, e = case.one_hot()
        want_x, _, want_y = network_input(x, e, torch.full((len(x),), TIMES[1] / 500), case.mask, config)
        assert (plain_x - want_x)[case.mask].abs().max() < 1e-6
        assert (plain_y - want_y).abs().max() < 1e-6


@pytest.mark.parametrize("n_pad", [9, 12, 27])
def test_pooled_rows_are_those_of_the_graph_wherever_it_lies(n_pad: int) -> None:
    sizes = [n_pad] * 17 + [1 + 7 * k % n_pad for k in range(23)]
    case = make_case(replace(QM9_NO_H, n_pad=n_pad, n_nodes=(0.0, *(1 / n_pad,) * n_pad)), sizes)
    x, e = torch.randn(40, n_pad, 256).bfloat16().float(), (torch.randn(40, n_pad, n_pad, 64) - 3).bfloat16().float()
    pad = torch.randn(320)
    x = torch.where(case.mask[..., None], x, pad[:256])
    e = torch.where((case.mask[:, :, None] & case.mask[:, None])[..., None], e, pad[256:])
    every = torch.cat((twin.pool(x.double()), twin.pool(e.double().flatten(1, 2))), dim=1)

    def pooled(pick: list[int]) -> Tensor:
        batch = batch_of(case, pick)
        at = batch.layout
        graph, i = at.rows[:, 0].long(), at.rows[:, 3].long()
        batch.X.copy_(to_tiles(x[pick][graph, i]))
        j = torch.arange(at.m_tiles) - at.tile_start.long()[at.tile_of.long()]
        rows = at.tile_of.long()[:, None] * 16 + torch.arange(16)
        batch.E.copy_(to_tiles(e[pick][graph[rows], i[rows], j[:, None]].view(-1, 64)))
        batch.z.fill_(float("nan"))
        batch.pool(replace(batch.network.layers[0], pad=pad), batch.E)
        return from_tiles(batch.z)[: len(pick)].float()

    together = pooled(list(range(40)))
    assert ((together - every).abs() <= 2**-8 * every.abs() + 1e-5).all()
    for pick in (torch.randperm(40).tolist(), [39, 3, 21], [0], list(range(18, 40))):
        assert torch.equal(pooled(pick), together[pick])


def test_draws_are_those_of_the_torch_sampler_bit_for_bit(qm9_case: Case) -> None:
    case, n_pad = qm9_case, qm9_case.config.n_pad
    for step in range(3):
        batch = batch_of(case, step=step)
        batch.logits_x.normal_(0, 2)
        batch.logits_e.normal_(0, 2)
        logits_x, logits_e = batch.logits()
        rows, cols = torch.triu_indices(n_pad, n_pad, 1)
        u = philox(SEED, batch.ids[:, None], TIMES[step + 1], torch.cat((node_slots(n_pad), edge_slots(n_pad, rows, cols))))
        want_x = draw(posterior(logits_x.softmax(-1), case.x, batch.noise.tables_x[step]), u[:, :n_pad]) * case.mask
        upper = posterior(logits_e[:, rows, cols].softmax(-1), case.e[:, rows, cols], batch.noise.tables_e[step])
        real = case.mask[:, rows] & case.mask[:, cols]
        want_e = draw(upper, u[:, n_pad:]) * real
        batch.draw()
        assert torch.equal(batch.x.long(), want_x)
        assert torch.equal(batch.e.long()[:, rows, cols], want_e)
        assert torch.equal(batch.e, batch.e.transpose(1, 2))
        assert int(batch.step) == step + 1 and int(batch.not_finite) == 0


@pytest.mark.parametrize("hopper", [False, True])
def test_a_graph_does_not_depend_on_its_companions_or_on_the_machine(qm9_case: Case, hopper: bool) -> None:
    together = batch_of(qm9_case, step=0, hopper=hopper)
    denoise(together, 2)
    small, smaller = {"multiprocessors": 3, "shared_bytes": 166912}, {"shared_bytes": 101376}  # sm_80, sm_89
    for pick, emulator in (([6, 2, 0], {}), ([4], {}), ([3, 1], small), ([5, 0], smaller)):
        if hopper:
            emulator = {key: value for key, value in emulator.items() if key == "multiprocessors"}
        apart = batch_of(qm9_case, pick, step=0, hopper=hopper, **emulator)
        denoise(apart, 2)
        assert torch.equal(apart.x, together.x[pick])
        assert torch.equal(apart.e, together.e[pick])


def assert_no_trace(batch_of_ids: Callable[[Case, list[int] | None], Denoiser]) -> None:
    """What other launches left in the buffers, even if it isn't finite, changes no result.

    As many graphs as pooled rows need to take the place of keys; behind the last of them rows are padded, and it reads
    keys of those, since the tile has a larger graph.
    """
    case = make_case(QM9_NO_H, [9, 4, 9, 7] * 16 + [3])
    used, few = batch_of_ids(case, None), batch_of_ids(case, [0, 1, 64])
    assert used.z.data_ptr() == used.kv.data_ptr() and few.z.data_ptr() != few.kv.data_ptr()
    for buffer in (used.E, used.E1, used.kv[: used.layout.tiles * 16], used.q, used.X, used.gathered, used.film_e, used.film_x):
        buffer.fill_(math.nan)
    for batch in (used, few):
        batch.forward()
    assert all(torch.equal(a[[0, 1, 64]], b) for a, b in zip(used.logits(), few.logits(), strict=True))


@pytest.mark.parametrize("hopper", [False, True])
def test_buffers_that_share_memory_leave_no_trace(hopper: bool) -> None:
    assert_no_trace(lambda case, pick: batch_of(case, pick, hopper=hopper))


@pytest.mark.parametrize("hopper", [False, True])
def test_scores_beyond_the_range_of_exp_are_gathered_exactly(hopper: bool) -> None:
    case = make_case(QM9_NO_H, [9, 4, 9], scale=4000.0)
    batch = batch_of(case, hopper=hopper)
    batch.forward()
    exact, low = reference(case, 1)
    for ours, want, theirs in zip(batch.logits(), exact, low, strict=True):
        assert ours.isfinite().all()
        assert relative(ours, want) <= 2 * relative(theirs, want) + 1e-4


def test_8_bit_nodes_round_as_quant_linear_does(qm9_case: Case) -> None:
    case, recipe = qm9_case, get_recipe("rtn-w8a8")
    net, integers = copy.deepcopy(case.net), {}
    for name, module in list(net.named_modules()):
        parent, _, kind = name.rpartition(".")
        if isinstance(module, torch.nn.Linear) and kind in ("q", "k", "v", "x_out", "linX1", "linX2"):
            parts, _ = decompose(module.weight, recipe)
            integers[name] = Integers(codes(parts), parts.scale.float())
            setattr(net.get_submodule(parent), kind, QuantLinear.from_parts(parts, module.bias, recipe))
    plain, ours = batch_of(case, hopper=True), batch_of(case, hopper=True, integers=integers)
    plain.forward()
    ours.forward()
    exact, _ = reference(case, 1)
    want, _ = reference(replace(case, net=net), 1)
    for got, bf16, full, rounded in zip(ours.logits(), plain.logits(), exact, want, strict=True):
        # two independent errors: of bf16 elsewhere and of a few codes that bf16 moves across a rounding edge
        assert relative(got, rounded) <= 2 * relative(bf16, full) + relative(rounded, full)


def test_logits_that_are_not_finite_are_reported(qm9_case: Case) -> None:
    batch = batch_of(qm9_case)
    batch.logits_e[0, 1, 2] = float("nan")
    batch.draw()
    assert int(batch.not_finite) == 1


def test_a_network_of_other_widths_is_refused_with_the_reason(qm9_case: Case) -> None:
    weights = dict(qm9_case.weights)
    weights["tf_layers.0.linX1.weight"] = torch.zeros(128, 256)
    ok, reason = supports(weights, qm9_case.shape)
    assert not ok and "tf_layers.0.linX1.weight is [128, 256]" in reason
