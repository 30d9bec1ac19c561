"""Run: .venv/bin/python -m pytest tests/models/test_digress.py -q"""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bitdgdm.infra.errors import ModelMismatch
from bitdgdm.models.digress import (
    GraphTransformer,
    build,
    check_weights,
    dead,
    dead_tensors,
    layer_linears,
    live_weights,
    quantizable,
    thresholds,
)
from bitdgdm.models.digress_config import QM9_NO_H, DigressConfig, Dims, HiddenDims
from bitdgdm.models.features import network_input
from bitdgdm.models.source import load_source

SHIPPED = load_source("builtin:digress-qm9")
TINY = replace(
    QM9_NO_H,
    n_layers=3,
    hidden_mlp_dims=Dims(X=16, E=12, y=12),
    hidden_dims=HiddenDims(dx=32, de=16, dy=24, n_head=4, dim_ffX=40, dim_ffE=20, dim_ffy=56),
)


def tiny(seed: int = 0) -> GraphTransformer:
    torch.manual_seed(seed)
    return GraphTransformer(TINY).eval().requires_grad_(False)


def random_inputs(
    size: int, seed: int, config: DigressConfig = TINY
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Network inputs with arbitrary features: X, E symmetric, y, mask; sizes 1..n_pad."""
    g = torch.Generator().manual_seed(seed)
    n = config.n_pad
    mask = torch.arange(n) < torch.randint(1, n + 1, (size, 1), generator=g)
    X = torch.randn(size, n, config.input_dims.X, generator=g) * mask[..., None]
    E = torch.randn(size, n, n, config.input_dims.E, generator=g)
    E = (E + E.transpose(1, 2)) * (mask[:, :, None] & mask[:, None])[..., None]
    return X, E, torch.randn(size, config.input_dims.y, generator=g), mask


def noisy_molecules(size: int, seed: int) -> tuple[Tensor, ...]:
    """Inputs of the shipped network for random graphs of 1..9 atoms."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(9) < torch.randint(1, 10, (size, 1), generator=g)
    X = torch.eye(4)[torch.randint(4, (size, 9), generator=g)] * mask[..., None]
    bonds = torch.multinomial(torch.tensor([0.72, 0.24, 0.03, 0.01]), size * 81, True, generator=g)
    upper = bonds.reshape(size, 9, 9).triu(1)
    E = torch.eye(5)[upper + upper.transpose(1, 2)] * (mask[:, :, None] & mask[:, None])[..., None]
    return *network_input(X, E, torch.rand(size, generator=g), mask, SHIPPED.config), mask


# -- what the network computes ----------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(9)))
def test_renumbering_the_nodes_renumbers_the_logits(seed: int, order: list[int]) -> None:
    X, E, y, _ = random_inputs(3, seed)
    mask = torch.ones(3, 9, dtype=torch.bool)
    net = tiny(seed)
    out_X, out_E = net(X, E, y, mask)
    moved_X, moved_E = net(X[:, order], E[:, order][:, :, order], y, mask)
    torch.testing.assert_close(moved_X, out_X[:, order], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(moved_E, out_E[:, order][:, :, order], atol=2e-5, rtol=1e-4)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_what_stands_in_padded_rows_is_ignored(seed: int) -> None:
    X, E, y, mask = random_inputs(4, seed)
    noise_X, noise_E, _, _ = random_inputs(4, seed + 1)
    pairs = (mask[:, :, None] & mask[:, None])[..., None]
    net = tiny(seed)
    dirty = net(torch.where(mask[..., None], X, 1e3 * noise_X), torch.where(pairs, E, 1e3 * noise_E), y, mask)
    for ours, theirs in zip(dirty, net(X, E, y, mask), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_a_graph_gets_the_same_bits_whoever_shares_its_batch() -> None:
    net = build(SHIPPED.config, SHIPPED.weights)
    ours, others = noisy_molecules(8, 1), noisy_molecules(8, 2)
    expected = net(*ours)
    mixed = [other.clone() for other in others]
    for tensor, own in zip(mixed, ours, strict=True):
        tensor[3] = own[3]
    for out, want in zip(net(*mixed), expected, strict=True):
        assert torch.equal(out[3], want[3])


def test_a_graph_gets_the_same_logits_in_a_batch_of_any_size_up_to_rounding() -> None:
    net = build(SHIPPED.config, SHIPPED.weights)
    batch = noisy_molecules(8, 4)
    together = net(*batch)
    for i in range(8):
        for out, want in zip(net(*(tensor[i : i + 1] for tensor in batch)), together, strict=True):
            torch.testing.assert_close(out[0], want[i], atol=1e-4, rtol=0)


def test_logits_are_zero_on_padding_and_on_the_diagonal_and_symmetric() -> None:
    X, E, y, mask = random_inputs(16, 3)
    out_X, out_E = tiny()(X, E, y, mask)
    assert not out_X[~mask].any() and out_X[mask].all()
    assert torch.equal(out_E, out_E.transpose(1, 2))
    real = mask[:, :, None] & mask[:, None] & ~torch.eye(9, dtype=torch.bool)
    assert not out_E[~real].any() and out_E[real].all()


def test_a_slot_without_nodes_gives_no_nan() -> None:
    X, E, y, mask = random_inputs(4, 3)
    mask[2] = False
    for out in tiny()(X, E, y, mask):
        assert torch.isfinite(out).all() and not out[2].any()


# -- names ------------------------------------------------------------------------------------------------


def test_the_layer_linears_are_those_of_the_published_checkpoint() -> None:
    matrices = {
        n.removesuffix(".weight") for n, w in SHIPPED.weights.items() if n.endswith("weight") and w.dim() == 2
    }
    assert {name for name in matrices if name.startswith("tf_layers.")} == set(layer_linears(SHIPPED.config))


def test_quantizable_linears_feed_an_output_and_dead_ones_do_not() -> None:
    torch.manual_seed(0)
    net = GraphTransformer(TINY)
    out_X, out_E = net(*random_inputs(6, 0))
    (out_X.square().sum() + out_E.square().sum()).backward()
    moved = {
        name.removesuffix(".weight")
        for name, p in net.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert set(quantizable(TINY)) <= moved
    assert not set(dead(TINY)) & {name for name, _ in net.named_modules()}
    assert sorted((*quantizable(TINY), *dead(TINY))) == sorted(layer_linears(TINY))


def test_every_quantizable_name_is_a_linear_of_the_network() -> None:
    net = tiny()
    assert all(isinstance(net.get_submodule(name), nn.Linear) for name in quantizable(TINY))


def test_tensors_that_feed_nothing_may_be_there_or_not() -> None:
    config, weights = SHIPPED.config, SHIPPED.weights
    batch = noisy_molecules(3, 5)
    bare = live_weights(weights, config)
    assert set(weights) - set(bare) == set(dead_tensors(config))
    for with_them, without in zip(build(config, weights)(*batch), build(config, bare)(*batch), strict=True):
        assert torch.equal(with_them, without)


def test_missing_unknown_and_misshapen_tensors_are_all_listed() -> None:
    weights = dict(SHIPPED.weights)
    del weights["tf_layers.2.self_attn.q.weight"]
    weights["tf_layers.9.linX1.weight"] = torch.zeros(1)
    weights["mlp_in_X.0.weight"] = torch.zeros(256, 11)
    with pytest.raises(ModelMismatch) as caught:
        check_weights(weights, SHIPPED.config, "file.ckpt")
    assert caught.value.problems == (
        "missing tf_layers.2.self_attn.q.weight",
        "mlp_in_X.0.weight is [256, 11], not [256, 12]",
        "unknown tf_layers.9.linX1.weight",
    )
    assert "\n" not in str(caught.value)


def test_weights_of_16_bit_give_a_network_of_32_bit() -> None:
    net = build(SHIPPED.config, SHIPPED.weights)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in net.parameters())


# -- thresholds -------------------------------------------------------------------------------------------


def seen_rows(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """On random molecules: what each layer Linear reads, and what each LayerNorm gives."""
    read: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, n=name: read.__setitem__(n, args[0]))
        elif isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _, __, out, n=name: given.__setitem__(n, out))
    with torch.inference_mode():
        net(*noisy_molecules(16, 6))
    return read, given


def test_exactly_the_linears_that_read_a_layer_norm_have_its_threshold() -> None:
    read, given = seen_rows(build(SHIPPED.config, SHIPPED.weights))
    taus = thresholds(SHIPPED.weights, SHIPPED.config, 3.0)
    for name in quantizable(SHIPPED.config):
        norm = next(
            (n for n, out in given.items() if out is read[name] or torch.equal(out, read[name])), None
        )
        assert (norm is None) == (name not in taus), name
        if norm:
            gamma, beta = (SHIPPED.weights[f"{norm}.{kind}"].float() for kind in ("weight", "bias"))
            torch.testing.assert_close(taus[name], beta.abs() + 3 * gamma.abs())


def test_thresholds_at_the_layer_norm_bound_hold_for_every_row_that_is_seen() -> None:
    read, _ = seen_rows(build(SHIPPED.config, SHIPPED.weights))
    for width in (64, 256):
        for name, tau in thresholds(SHIPPED.weights, SHIPPED.config, math.sqrt(width - 1)).items():
            if read[name].shape[-1] == width:
                assert (read[name].abs() <= tau * (1 + 1e-5) + 1e-6).all(), name


def test_thresholds_are_those_of_quantizable_linears_and_fit_their_inputs() -> None:
    taus = thresholds(SHIPPED.weights, SHIPPED.config, 3.0)
    assert set(taus) < set(quantizable(SHIPPED.config))
    for name, tau in taus.items():
        assert tau.shape == (SHIPPED.weights[f"{name}.weight"].shape[1],) and tau.dtype == torch.float32


# -- config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QM9_NO_H, TINY], ids=["qm9", "tiny"])
def test_a_config_comes_back_from_json_unchanged(config: DigressConfig) -> None:
    assert DigressConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_pad": 8}, "n_nodes"),
        ({"node_marginals": (0.5, 0.5, 0.5, 0.5)}, "node_marginals"),
        ({"edge_marginals": (1.0,)}, "edge_marginals"),
        ({"edge_marginals": (float("nan"), 1.0, 0.0, 0.0, 0.0)}, "edge_marginals"),
        ({"n_nodes": (1.0, *[0.0] * 9)}, "without nodes"),
        ({"atoms": ("C", "N")}, "atoms"),
        ({"input_dims": Dims(X=13, E=5, y=13)}, "input dims"),
        ({"output_dims": Dims(X=4, E=5, y=1)}, "regressor"),
        ({"n_layers": 0}, "n_layers"),
        ({"hidden_dims": replace(QM9_NO_H.hidden_dims, n_head=7)}, "n_head"),
        ({"hidden_dims": replace(QM9_NO_H.hidden_dims, dx=-256)}, "dx"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict[str, object], word: str) -> None:
    with pytest.raises(ModelMismatch, match=word):
        replace(QM9_NO_H, **change)


@pytest.mark.parametrize("damage", [{"surprise": 1}, {"hidden_dims": {"dx": 256}}, {"n_nodes": "many"}])
def test_a_stored_config_with_other_keys_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(ModelMismatch):
        DigressConfig.from_dict({**QM9_NO_H.to_dict(), **damage})
    stored = QM9_NO_H.to_dict()
    del stored["valencies"], stored["output_dims"]
    with pytest.raises(ModelMismatch, match="output_dims is missing"):
        DigressConfig.from_dict(stored)
