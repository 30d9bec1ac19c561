"""Run: .venv/bin/python -m pytest tests/quant/test_linear.py

The expectation is the formula in NumPy (plain_linear.py): activation codes in float32 as documented, the integer
product in int64, everything else in float64.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bitdgdm.quant.activations import quantize_tokens, row_threshold
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear, set_time
from bitdgdm.quant.parts import merged
from bitdgdm.quant.product import exact_product
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe
from tests.quant.plain_linear import expected
from tests.quant.samples import T, any_stats, layer_recipes, needed

R2 = get_recipe("bitdgdm-w4a4-r16-s1")
PLAIN = Recipe("plain", 4, 4)
VARIANTS = (
    *layer_recipes(),
    R2.changed(name="16-bit factors", factor_bits=16),
    R2.changed(name="4-bit factors", factor_bits=4),
    R2.changed(name="no factors", rank=0),
    R2.changed(name="no sparse part", alpha=0.0),
    R2.changed(name="symmetric", act_asymmetric=False),
    Recipe("8-bit asymmetric", 8, 8, act_asymmetric=True, outlier_sigma=4.0),
    Recipe("4-bit weights, 8-bit asymmetric", 4, 8, act_asymmetric=True),
    Recipe("weights only", 4, 16, rank=4, alpha=0.05, weight_clip="mse"),
    Recipe("w3a6", 3, 6),
    Recipe("w6a6", 6, 6, act_asymmetric=True),
    PLAIN.changed(name="fp8", weight_format="fp8", weight_bits=8, act_format="fp8", act_bits=8),
    PLAIN.changed(name="fp8 one", weight_bits=8, weight_format="fp8", act_format="fp8", act_bits=8, act_scale="one"),
    PLAIN.changed(name="fp8 weights", weight_format="fp8", weight_bits=8, rank=2, alpha=0.05),
    PLAIN.changed(name="fp8 inputs", act_format="fp8", act_bits=8, outlier_budget=2),
    PLAIN.changed(name="fp8 static", act_format="fp8", act_bits=8, act_scale="static", act_bins=3),
    PLAIN.changed(name="log inputs", act_format="log", rank=2, outlier_budget=2),
    PLAIN.changed(name="log inputs, smoothed", act_format="log", act_bits=6, premul="smooth", weight_group=16),
    PLAIN.changed(name="static", act_scale="static", act_asymmetric=True, act_bins=4, act_range="mse"),
    PLAIN.changed(name="static symmetric", act_scale="static", act_range="quantile", outlier_sigma=3.0),
    PLAIN.changed(name="static learned", act_scale="static", act_bins=3, act_groups="learned"),
    PLAIN.changed(name="static smooth", act_scale="static", act_groups="smooth"),
    PLAIN.changed(name="groups", weight_group=16, outlier_budget=3, act_asymmetric=True, rank=2),
    PLAIN.changed(name="codebook", weight_format="codebook", act_bits=16, alpha=0.02, sparse_choice="sensitivity"),
    PLAIN.changed(name="binary", weight_format="binary", weight_bits=1, alpha=0.1, sparse_choice="salient"),
    PLAIN.changed(name="columns", columns=3, act_asymmetric=True, rank=2, alpha=0.02, outlier_sigma=3.0),
    PLAIN.changed(name="columns by weight", columns=2, column_choice="weight", rounding="gptq"),
    PLAIN.changed(name="smooth", premul="smooth", outlier_sigma=3.0, rank=2, alpha=0.05),
    PLAIN.changed(name="hadamard", premul="hadamard", rank=2, alpha=0.05, columns=1),
    PLAIN.changed(name="duquant", premul="duquant", rounding="gptq", outlier_budget=2),
    PLAIN.changed(name="duquant weights only", premul="duquant", act_bits=16),
    PLAIN.changed(name="literal", remainder=False, rank=4, alpha=0.05, factor_bits=4, outlier_sigma=3.0),
    PLAIN.changed(name="literal in 16 bit", remainder=False, rank=4, factor_bits=16, premul="smooth", alpha=0.1),
    PLAIN.changed(name="literal, no cross product", remainder=False, rank=4, alpha=0.05, factor_bits=8,
                  outlier_budget=2, cross_product=False),
    R2.changed(name="no cross product", cross_product=False),
    PLAIN.changed(name="magnitude", alpha=0.05, sparse_choice="magnitude", rank=2),
    PLAIN.changed(name="output metric", rank=4, solver="svd", low_rank_metric="output", rounding="gptq", alpha=0.02),
    PLAIN.changed(name="input metric", rank=3, solver="svd", low_rank_metric="input", rounding="gptq", act_asymmetric=True,
                  outlier_sigma=2.5),
    PLAIN.changed(name="input metric, transformed", rank=2, solver="svd", low_rank_metric="input", premul="hadamard",
                  factor_bits=8, outlier_budget=2),
    PLAIN.changed(name="input metric, weights only", rank=2, solver="svd", low_rank_metric="input", act_bits=16),
    PLAIN.changed(name="clip by output", rounding="gptq", weight_clip="output"),
    PLAIN.changed(name="clip by output, groups", rounding="gptq", weight_clip="output", weight_group=16),
    PLAIN.changed(name="fp8 gptq", rounding="gptq", weight_bits=8, weight_format="fp8", act_format="fp8", act_bits=8,
                  act_scale="one"),
    PLAIN.changed(name="outlier pursuit", solver="outlier-pursuit", rank=3, alpha=0.05),
    PLAIN.changed(name="adaround", rounding="adaround", weight_clip="mse"),
)  # fmt: skip
assert len({r.name for r in VARIANTS}) == len(VARIANTS)
LONG_SUMS = (
    "bitdgdm-w4a4-r16-s1", "rtn-w8a8", "8-bit asymmetric", "4-bit weights, 8-bit asymmetric", "static", "groups", "fp8",
    "literal", "hadamard",
)  # fmt: skip
each_recipe = pytest.mark.parametrize("recipe", VARIANTS, ids=lambda recipe: recipe.name)


def decomposed(w, recipe, seed=0):
    """Parts of any weight; rows of statistics where the recipe needs them."""
    return decompose(w, recipe, needed(recipe, w.shape[1], seed), contributions=False)[0]


def made(w, recipe, bias=None, tau=None):
    layer = QuantLinear.from_parts(decomposed(w, recipe), bias, recipe, tau)
    set_time(layer, torch.tensor([7]))
    return layer


def check(recipe, w, x, tau=None, seed=0):
    parts = decomposed(torch.from_numpy(w), recipe, seed)
    bias = np.random.default_rng(seed).standard_normal(w.shape[0]).astype(np.float32)
    layer = QuantLinear.from_parts(
        parts, torch.from_numpy(bias), recipe, None if tau is None else torch.from_numpy(tau)
    )
    for t in (1, T // 2, T) if parts.bin_of_t is not None else (None,):
        if t is not None:
            set_time(layer, torch.full((3,), t))
        y, loss = expected(x, parts, bias, recipe, tau, t)
        assert (np.abs(layer(torch.from_numpy(x)).double().numpy() - y) <= loss).all()


@each_recipe
@pytest.mark.parametrize("shape", [(24, 64), (33, 71), (1, 5), (5, 1)], ids=str)
def test_the_output_equals_the_formula_on_random_input(recipe, shape):
    check_random(recipe, shape)


@pytest.mark.parametrize("shape", [(64, 256), (7, 2048)], ids=str)
@pytest.mark.parametrize("name", LONG_SUMS)
def test_the_output_equals_the_formula_where_sums_are_long(name, shape):
    check_random(next(r for r in VARIANTS if r.name == name), shape)


def check_random(recipe, shape):
    rng = np.random.default_rng(shape[1])
    w = rng.standard_t(5, shape).astype(np.float32) * 0.1
    x = rng.standard_t(3, (9, shape[1])).astype(np.float32)
    check(recipe, w, x)
    check(recipe, w, x, tau=rng.uniform(0, 3, shape[1]).astype(np.float32))


@each_recipe
def test_the_output_equals_the_formula_on_adversarial_tokens(recipe):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((24, 40)).astype(np.float32)
    w[5] = 0
    w[:, 7] *= 1000
    normal = rng.standard_normal(40).astype(np.float32)
    one_huge, one_hot, half_off = normal.copy(), np.zeros(40, np.float32), np.maximum(normal, 0)
    one_huge[11], one_hot[2] = 1e30, 1
    scaled = [normal * np.float32(size) for size in (0, 1e-42, 1e-38, 1e25)]
    constant = [np.full(40, value, np.float32) for value in (3, -3)]
    tokens = np.stack(
        [normal, one_huge, one_hot, half_off, -half_off, np.abs(normal) + 50, *scaled, *constant]
    )
    check(recipe, w, tokens)
    check(recipe, w, tokens, tau=np.abs(normal))  # every entry of the first token is at its threshold


@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from(VARIANTS),
    st.integers(0, 2**31),
    st.floats(-30, 30),
)
def test_the_output_equals_the_formula_for_any_size_and_scale(k, n, recipe, seed, exponent):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32)
    x = (rng.standard_cauchy((4, k)) * 2.0**exponent).astype(np.float32)
    check(recipe, w, x, seed=seed)


@pytest.mark.parametrize("k", [1, 64, 256, 1024, 1041, 2048, 5000])
@pytest.mark.parametrize(("low", "high", "top"), [(-127, 127, 127), (0, 255, 255), (0, 15, 15)])
def test_the_integer_product_is_exact_at_the_extremes(k, low, high, top):
    rng = np.random.default_rng(k)
    weight_low = -128 if top > 15 else -8
    mixed = rng.integers(weight_low, -weight_low, (3, k))
    q = np.concatenate([np.full((1, k), high), np.full((1, k), low), rng.integers(low, high + 1, (3, k))])
    w = np.concatenate([np.full((1, k), weight_low), np.full((1, k), -weight_low - 1), mixed])
    product = exact_product(torch.from_numpy(q).float(), torch.from_numpy(w).float(), top, -weight_low)
    assert np.array_equal(product.numpy(), (q.astype(np.int64) @ w.T.astype(np.int64)).astype(np.float32))


@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_the_integer_product_is_exact_for_any_shape(m, k, n, seed):
    rng = np.random.default_rng(seed)
    q, w = rng.integers(-127, 128, (m, k)), rng.integers(-128, 128, (n, k))
    product = exact_product(torch.from_numpy(q).float(), torch.from_numpy(w).float(), 127, 128)
    assert np.array_equal(product.numpy(), q @ w.T)


def test_float_and_int8_units_give_the_same_output(monkeypatch):
    layer = QuantLinear.from_parts(decompose(torch.randn(40, 300), R2)[0], torch.randn(40), R2)
    x = torch.randn(50, 300)
    as_it_is = layer(x)
    monkeypatch.setattr("bitdgdm.quant.product._int8_is_exact", lambda: False)
    assert torch.equal(layer(x), as_it_is)


@given(st.integers(0, 2**31), st.sampled_from([4, 8]))
def test_unsigned_codes_with_the_row_sum_correction_give_the_same_integers(seed, bits):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, 50)) + rng.uniform(-3, 3)).astype(np.float32)
    w = rng.integers(-8, 8, (6, 50))
    q, s = quantize_tokens(torch.from_numpy(x), bits, asymmetric=True)
    zero = np.rint(np.minimum(x.min(1, keepdims=True), 0) * (np.float32(1) / s.numpy())).astype(np.int64)
    unsigned = q.numpy().astype(np.int64) - zero
    assert unsigned.min() >= 0 and unsigned.max() <= 2**bits - 1
    corrected = unsigned @ w.T + zero * w.sum(axis=1)
    assert np.array_equal(corrected, q.numpy().astype(np.int64) @ w.T)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_zero_is_represented_exactly_and_rounding_costs_at_most_one_step(asymmetric):
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) + 2
    x[:, ::3] = 0
    q, s = quantize_tokens(x, 4, asymmetric)
    assert not (q * s)[:, ::3].any()
    assert float(((q * s - x).abs() / s).max()) <= 1.0


def test_asymmetric_codes_spend_all_levels_on_a_one_sided_token():
    x = torch.linspace(0, 1, 64)[None]
    errors = []
    for asymmetric in (True, False):
        q, s = quantize_tokens(x, 4, asymmetric)
        errors.append(float((q * s - x).norm()))
    assert errors[0] < 0.55 * errors[1]


@given(st.integers(1, 60), st.floats(1.0, 5.0), st.integers(0, 2**31))
def test_fewer_than_k_over_sigma_squared_entries_are_outliers(k, sigma, seed):
    x = torch.from_numpy(np.random.default_rng(seed).standard_cauchy((5, k)).astype(np.float32))
    count = (x.abs() > row_threshold(x, sigma)).sum(dim=1)
    assert bool((count < k / sigma**2 * (1 + 1e-6)).all())


def test_an_outlier_passes_in_16_bit_and_does_not_coarsen_the_rest_of_its_token():
    rng = np.random.default_rng(1)
    recipe = Recipe("outliers", 8, 4, outlier_sigma=3.0)
    parts, _ = decompose(torch.from_numpy(rng.standard_normal((64, 256)).astype(np.float32)), recipe)
    layer, weight = QuantLinear.from_parts(parts, None, recipe), merged(parts).double()
    x = torch.from_numpy(rng.standard_normal((8, 256)).astype(np.float32)).clamp(-2, 2)
    x[:, 9] = 0
    error = layer(x).double() - x.double() @ weight.T
    x[:, 9] = 300
    error_beside_outlier = layer(x).double() - x.double() @ weight.T
    assert torch.allclose(error, error_beside_outlier, atol=1e-3)


def test_full_precision_is_the_linear_itself():
    linear = nn.Linear(37, 11)
    parts, _ = decompose(linear.weight, get_recipe("fp32"))
    x = torch.randn(5, 37)
    layer = QuantLinear.from_parts(parts, linear.bias, get_recipe("fp32"))
    assert torch.equal(layer(x), linear(x))


@each_recipe
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_spoils_its_own_output_and_no_other(recipe, bad):
    rng = np.random.default_rng(2)
    layer = made(torch.from_numpy(rng.standard_normal((6, 30))), recipe)
    x = torch.from_numpy(rng.standard_normal((4, 30))).float()
    clean = layer(x)
    x[2, 5] = bad
    y = layer(x)
    assert not bool(torch.isfinite(y[2]).any())
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@each_recipe
def test_any_leading_shape_an_empty_batch_and_bfloat16_work(recipe):
    layer = made(torch.randn(6, 30), recipe, torch.randn(6))
    x = torch.randn(2, 3, 4, 30)
    assert torch.allclose(layer(x), layer(x.view(24, 30)).view(2, 3, 4, 6), rtol=1e-5, atol=1e-6)
    assert layer(x[:0]).shape == (0, 3, 4, 6) and layer(x[0, 0, 0]).shape == (6,)
    half = x.bfloat16()
    assert torch.equal(layer(half), layer(half.float()).bfloat16())


@each_recipe
def test_autocast_does_not_change_the_result(recipe):
    layer = made(torch.randn(6, 30), recipe, torch.randn(6))
    x = torch.randn(5, 30)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


@each_recipe
def test_no_shape_depends_on_data(recipe):
    layer = made(torch.randn(6, 30), recipe, torch.randn(6), torch.rand(30))
    layer(torch.zeros(1, 30))  # what is found out once about the machine may look at values
    with FakeTensorMode(allow_non_fake_inputs=True):  # a read of any value would raise here
        y = layer(torch.empty(2, 5, 30))
    assert y.shape == (2, 5, 6)


def test_a_bias_or_threshold_of_another_length_is_refused():
    parts, _ = decompose(torch.randn(6, 30), R2)
    for bias, tau, name in ((torch.zeros(7), None, "bias"), (torch.zeros(6), torch.zeros(31), "tau")):
        with pytest.raises(ValueError, match=name):
            QuantLinear.from_parts(parts, bias, R2, tau)


def on_gpu(recipe, seed=0):
    """(layer on the CPU, its copy on the GPU, tokens)."""
    rng = np.random.default_rng(seed)
    parts = decomposed(torch.from_numpy(rng.standard_t(4, (64, 2048)).astype(np.float32)), recipe)
    layers = [QuantLinear.from_parts(parts, torch.ones(64), recipe).to(device) for device in ("cpu", "cuda")]
    for layer in layers:
        set_time(layer, torch.tensor([7]).to(layer.codes.device if layer.codes is not None else "cpu"))
    return *layers, torch.from_numpy(rng.standard_t(3, (40, 2048)).astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_a_gpu_gets_the_same_codes_scales_and_integers(bits, asymmetric):
    host, there, x = on_gpu(Recipe("any", 8, bits, act_asymmetric=asymmetric))
    (q, s), (q_there, s_there) = (quantize_tokens(t, bits, asymmetric) for t in (x, x.cuda()))
    assert torch.equal(q, q_there.cpu()) and torch.equal(s, s_there.cpu())
    product = exact_product(q, host.codes, 2**bits - 1, 128)
    assert torch.equal(product, exact_product(q_there, there.codes, 2**bits - 1, 128).cpu())


@pytest.mark.gpu
@each_recipe
def test_a_gpu_gives_the_same_output_also_replayed_from_a_graph(recipe):
    host, there, x = on_gpu(recipe)
    still = x.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        there(still)  # allocates what a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = there(still)
    still.copy_(x.flip(0))
    graph.replay()
    expected_y = host(x.flip(0))
    torch.cuda.synchronize()
    assert float((y.cpu() - expected_y).norm()) <= 1e-5 * float(expected_y.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", layer_recipes(), ids=lambda recipe: recipe.name)
def test_a_gpu_decomposes_as_well_as_a_cpu(recipe):
    w = torch.from_numpy(np.random.default_rng(0).standard_t(4, (96, 160)).astype(np.float32))
    (here, report), (there, report_there) = (decompose(v, recipe, any_stats(160)) for v in (w, w.cuda()))
    assert all(t.device.type == "cpu" for t in there.tensors().values())
    assert here.tensors().keys() == there.tensors().keys()
    assert report_there.relative_error == pytest.approx(report.relative_error, rel=0.02, abs=1e-9)
