"""Run: .venv/bin/python -m pytest tests/quant/test_repair.py -q"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.parts import LinearParts, factors, low_rank, merged
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import get_recipe
from bitdgdm.quant.repair import Factors, Learned, joined, repair
from bitdgdm.quant.stats import stats_of_rows

W3 = Recipe("test-w3a8", weight_bits=3, act_bits=8)


def quantized(
    recipe: Recipe, seed: int = 0
) -> tuple[nn.Sequential, dict[str, LinearParts], dict[str, Tensor]]:
    """Two layers with a ReLU between them, what they are made from, and the weights that they stand for."""
    g = torch.Generator().manual_seed(seed)
    weights = {"0": torch.randn(24, 16, generator=g) / 4, "2": torch.randn(8, 24, generator=g) / 5}
    parts, layers = {}, []
    for name, w in weights.items():
        stats = stats_of_rows(torch.randn(64, w.shape[1], generator=g), torch.ones(64, dtype=torch.int64), 10)
        parts[name], _ = decompose(w, recipe, stats)
        layers.append(QuantLinear.from_parts(parts[name], torch.randn(len(w), generator=g) / 9, recipe))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]), parts, weights


def full(net: nn.Sequential, weights: dict[str, Tensor]) -> nn.Sequential:
    """The same network before it was quantized."""
    layers = []
    for name, w in weights.items():
        linear = nn.Linear(w.shape[1], w.shape[0])
        linear.weight.data, linear.bias.data = w, net[int(name)].bias.clone()  # type: ignore[operator, union-attr]
        layers.append(linear.requires_grad_(False))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def rebuilt(
    net: nn.Sequential, parts: dict[str, LinearParts], found: dict[str, Learned], recipe: Recipe
) -> nn.Module:
    layers = []
    for name in ("0", "2"):
        factors, shift = found[name].factors, found[name].shift
        assert factors is not None and shift is not None
        bias = net[int(name)].bias + shift  # type: ignore[operator]
        layers.append(QuantLinear.from_parts(joined(parts[name], factors, recipe.factor_bits), bias, recipe))
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


@pytest.mark.parametrize("start", ["from zero", "from what was lost"])
def test_a_repaired_network_is_nearer_to_full_precision_on_inputs_it_did_not_see(start: str) -> None:
    net, parts, weights = quantized(W3)
    g = torch.Generator().manual_seed(5)
    seen, unseen = torch.randn(512, 16, generator=g), torch.randn(512, 16, generator=g)

    teacher = full(net, weights)

    def loss(step: int) -> Tensor:
        x = seen[step % 8 * 64 :][:64]
        return (net(x) - teacher(x)).square().mean()

    targets = weights if start == "from what was lost" else None
    found = repair(net, parts, loss, steps=150, rank=4, targets=targets, rate=5e-3)
    wanted = teacher(unseen)
    before = (net(unseen) - wanted).square().mean()
    after = (rebuilt(net, parts, found, W3)(unseen) - wanted).square().mean()
    assert after < 0.5 * before


def test_the_start_is_the_best_product_of_that_rank_for_what_was_lost() -> None:
    net, parts, weights = quantized(W3)
    found = repair(
        net, parts, lambda _: net(torch.ones(1, 16)).sum(), steps=1, rank=3, targets=weights, rate=0.0
    )
    for name, w in weights.items():
        lost = (w - merged(parts[name])).double()
        u, s, v = torch.linalg.svd(lost)
        best = (u[:, :3] * s[:3]) @ v[:3]
        factors, shift = found[name].factors, found[name].shift
        assert factors is not None and shift is not None and not shift.any()
        torch.testing.assert_close((factors.up @ factors.down.T).double(), best, atol=1e-5, rtol=1e-4)


def test_what_is_learned_is_what_the_joined_layer_computes() -> None:
    """The forward pass of training (rounding included) and the layer made from joined parts agree."""
    net, parts, weights = quantized(W3)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    outputs: list[Tensor] = []

    def loss(_: int) -> Tensor:
        outputs.append(net(x))
        return outputs[-1].square().mean()

    found = repair(net, parts, loss, steps=1, rank=4, targets=weights, rate=0.0)
    later = rebuilt(net, parts, found, W3)(x)
    torch.testing.assert_close(
        outputs[0].detach(), later, atol=0.02, rtol=0.01
    )  # factors are stored in bfloat16
    before = net(x)
    assert (outputs[0] - before).abs().max() > 0.1


def test_gradients_pass_the_rounding_as_if_it_were_the_identity() -> None:
    net, parts, _ = quantized(W3)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    seen: list[Tensor] = []

    def loss(_: int) -> Tensor:
        y = net(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        seen.append(gradient)
        return y.sum()

    repair(net, parts, loss, steps=1, rank=2, rate=0.0)
    hidden = net[0](x.detach())
    w0, w2 = merged(parts["0"]), merged(parts["2"])
    torch.testing.assert_close(seen[0], ((hidden > 0).float() * w2.sum(0)) @ w0)


def test_the_network_is_handed_back_untouched_also_when_the_loss_raises() -> None:
    net, parts, _ = quantized(W3)
    layers = list(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    norm = nn.LayerNorm(8)
    whole = nn.Sequential(*net, norm)

    def broken(step: int) -> Tensor:
        if step:
            raise RuntimeError("stop")
        return whole(torch.ones(2, 16)).square().sum()

    with pytest.raises(RuntimeError, match="stop"):
        repair(whole, parts, broken, steps=3, rank=2)
    assert [a is b for a, b in zip(whole, [*layers, norm], strict=True)] == [True] * 4
    assert all(p.requires_grad for p in norm.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_one_seed_gives_the_same_factors() -> None:
    def once(seed: int) -> Tensor:
        net, parts, weights = quantized(W3)
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
        wanted = full(net, weights)(x)
        found = repair(net, parts, lambda _: (net(x) - wanted).square().mean(), steps=5, rank=2, seed=seed)[
            "0"
        ]
        assert found.factors is not None
        return found.factors.down

    assert torch.equal(once(1), once(1)) and not torch.equal(once(1), once(2))


def test_a_bias_takes_back_the_mean_that_rounding_shifted() -> None:
    """One layer, no factors: the best shift is minus the mean error of the output."""
    net, parts, weights = quantized(Recipe("test-w8a4", weight_bits=8, act_bits=4, act_asymmetric=True))
    one, x = nn.Sequential(net[0]), torch.rand(4096, 16, generator=torch.Generator().manual_seed(6)) ** 3
    wanted = full(net, weights)[0](x)
    error = (one(x) - wanted).mean(0)
    found = repair(
        one, {"0": parts["0"]}, lambda _: (one(x) - wanted).square().mean(), steps=200, rank=0, rate=1e-3
    )["0"]
    assert found.factors is None and found.shift is not None
    assert (found.shift + error).norm() < 0.05 * error.norm()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("premul", ["none", "hadamard", "smooth"])
def test_joined_factors_add_their_product_to_the_weight(bits: int, premul: str) -> None:
    recipe = Recipe(
        "test-w4a8-r3", weight_bits=4, act_bits=8, rank=3, factor_bits=bits, premul=premul,
        calibration="uniform" if premul == "smooth" else "none",
    )  # fmt: skip
    _, parts, _ = quantized(recipe)
    g = torch.Generator().manual_seed(8)
    found = Factors(torch.randn(24, 5, generator=g), torch.randn(16, 5, generator=g))
    both = joined(parts["0"], found, bits)
    old, new = factors(parts["0"]), factors(both)
    assert old is not None and new is not None and low_rank(both) is not None
    assert new[0].shape == (24, 8) and new[1].shape == (16, 8)
    assert torch.equal(new[0][:, :3], old[0]) and torch.equal(new[1][:, :3], old[1])  # what was there stays
    added, wanted = merged(both) - merged(parts["0"]), found.up @ found.down.T
    tolerance = {4: 0.25, 8: 0.02, 16: 0.01}[bits]
    assert (added - wanted).norm() < tolerance * wanted.norm()
    assert both.qweight is parts["0"].qweight and both.scale is parts["0"].scale


def test_a_layer_without_rank_is_left_alone_and_lets_gradients_pass() -> None:
    net, parts, weights = quantized(W3)
    teacher, x = full(net, weights), torch.randn(64, 16, generator=torch.Generator().manual_seed(4))
    found = repair(
        net, parts, lambda _: (net(x) - teacher(x)).square().mean(), steps=30, rank={"0": 3}, rate=5e-3
    )
    assert found["2"].factors is None and found["2"].shift is not None and found["2"].shift.any()
    factors = found["0"].factors
    assert factors is not None and factors.down.shape == (16, 3)
    assert float(factors.up.abs().max()) > 1e-3  # it began at zero


def test_bad_requests_are_refused() -> None:
    net, parts, _ = quantized(get_recipe("rtn-w4a4"))
    with pytest.raises(ValueError, match="learn a bias only"):
        joined(replace(parts["0"], deflated=True), Factors(torch.ones(24, 1), torch.ones(16, 1)), 8)
    for rank, steps in ((-1, 3), (2, 0)):
        with pytest.raises(ValueError, match="nothing to repair"):
            repair(net, parts, lambda _: torch.ones(()), rank=rank, steps=steps)
    with pytest.raises(ValueError, match="loss of repair step 0 is nan"):
        repair(net, parts, lambda _: net(torch.ones(1, 16)).sum() * float("nan"), steps=1, rank=2)
    with pytest.raises(ValueError, match="what was learned is not finite"):
        repair(net, parts, lambda _: (net(torch.ones(1, 16)).sum() * 0).sqrt(), steps=1, rank=2)
    with pytest.raises(ValueError, match="layers differ: 2"):
        repair(net, {"0": parts["0"]}, lambda _: torch.ones(()), steps=1, rank=2)
    plain = nn.Sequential(nn.Linear(16, 24))
    with pytest.raises(ValueError, match="layers differ: 0"):
        repair(plain, {"0": parts["0"]}, lambda _: torch.ones(()), steps=1, rank=2)
