"""Run: .venv/bin/python -m pytest tests/models/test_kernel_engine.py -q   (needs g++; no GPU)

The kernels run in the emulator of tests/kernels, so the engine is whole but for the device.
"""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bitdgdm.infra.errors import BadInput, DeviceMemoryFull, KernelsUnavailable, LogitsNotFinite
from bitdgdm.kernels.build import CompilerMissing
from bitdgdm.kernels.denoise import Denoiser
from bitdgdm.kernels.fits import batch_that_fits, bytes_per_graph
from bitdgdm.models import engine as engines
from bitdgdm.models import kernel_engine
from bitdgdm.models.digress import GraphTransformer, quantizable
from bitdgdm.models.digress_config import QM9_NO_H, Dims, HiddenDims
from bitdgdm.models.engine import Choice, TorchEngine, choose_engine, describe, load_engine
from bitdgdm.models.kernel_engine import KernelEngine, kernel_shape, refusal, shortfall
from bitdgdm.models.sampler import Graphs, sample_batches, sample_ids, start_chain
from bitdgdm.models.seam import LoopEngine
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe_book import get_recipe, recipes
from tests.kernels.emulate import Emulator

EMULATED = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")
SMALL = replace(QM9_NO_H, n_layers=2, diffusion_steps=20, n_nodes=(0.0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0))
SEED = 2**63 + 5
STEPS = 2


def network() -> GraphTransformer:
    torch.manual_seed(5)
    return GraphTransformer(SMALL).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def engine() -> KernelEngine:
    defines = {**kernel_shape(SMALL).defines, "edge_attend": {"STEPS": 16}}
    return KernelEngine(network(), SMALL, "small", Emulator(defines))


@pytest.fixture(scope="module")
def whole(engine: KernelEngine) -> Graphs:
    return sample_ids(engine, SMALL, SEED, 5, 7, STEPS, 8)


def equal(a: Graphs, b: Graphs) -> bool:
    return torch.equal(a.n, b.n) and torch.equal(a.X, b.X) and torch.equal(a.E, b.E)


@EMULATED
def test_the_engine_has_both_sides_of_the_seam(engine: KernelEngine) -> None:
    assert isinstance(engine, LoopEngine)
    assert not isinstance(TorchEngine(network(), SMALL), LoopEngine)


@EMULATED
def test_logits_are_near_the_networks_own_in_float32_with_and_without_a_diagonal(
    engine: KernelEngine,
) -> None:
    torch.manual_seed(1)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    X = torch.eye(4)[torch.randint(4, (3, 9))] * mask[..., None]
    upper = torch.randint(5, (3, 9, 9)).triu(1)
    with_diagonal = (
        torch.eye(5)[upper + upper.transpose(1, 2)] * (mask[:, :, None] & mask[:, None])[..., None]
    )
    for E in (with_diagonal, with_diagonal * (1 - torch.eye(9))[..., None]):
        for ours, exact in zip(
            engine.logits(X, E, torch.full((3,), 7), mask),
            TorchEngine(network(), SMALL).logits(X, E, torch.full((3,), 7), mask),
            strict=True,
        ):
            assert ours.shape == exact.shape and ours.dtype == torch.float32
            assert (ours - exact).norm() / exact.norm() < 0.01
    with pytest.raises(ValueError, match="one time a batch"):
        engine.logits(X, with_diagonal, torch.tensor([1, 2, 3]), mask)


@EMULATED
def test_ids_have_their_graphs_whatever_the_batch_and_nobody_else_is_computed(
    engine: KernelEngine, whole: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    run = kernel_engine.denoise
    monkeypatch.setattr(
        kernel_engine,
        "denoise",
        lambda batch, *a, **k: (sizes.append(batch.layout.count), run(batch, *a, **k)),
    )
    batches = list(sample_batches(engine, SMALL, SEED, 5, 7, STEPS, 3))
    assert [first for first, _ in batches] == [5, 8, 11] and sizes == [3, 3, 1]
    assert equal(Graphs.concat([graphs for _, graphs in batches]), whole)
    assert equal(sample_ids(engine, SMALL, SEED, 9, 1, STEPS, 64), whole[4:5])
    assert sizes[-1] == 1


@EMULATED
def test_the_sampler_gives_the_kernels_the_same_start_as_the_torch_path(
    engine: KernelEngine, whole: Graphs
) -> None:
    torch_path = sample_ids(TorchEngine(network(), SMALL), SMALL, SEED, 5, 7, STEPS, 8)
    assert torch.equal(torch_path.n, whole.n)
    same = (torch_path.X == whole.X).float().mean()
    assert same > 0.9  # bf16 may move a draw that lies on an edge; a random graph would agree in half


@EMULATED
def test_progress_rises_to_one(engine: KernelEngine) -> None:
    seen: list[float] = []
    sample_ids(engine, SMALL, SEED, 0, 3, STEPS, 2, on_progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1


class LittleMemory(Denoiser):
    """Has room for `room` graphs."""

    room = 2

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        if self.layout.count > self.room:
            raise torch.OutOfMemoryError(f"no room for {self.layout.count}")


@EMULATED
def test_a_batch_that_does_not_fit_runs_in_smaller_ones_with_equal_results(
    engine: KernelEngine, whole: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_engine, "Denoiser", LittleMemory)
    monkeypatch.setattr(engine, "_fits", None)
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(kernel_engine.log, "warning", lambda *words: told.append(words))
    seen: list[float] = []
    graphs = sample_ids(engine, SMALL, SEED, 5, 7, STEPS, 7, on_progress=seen.append)
    assert equal(graphs, whole) and seen == sorted(seen) and seen[-1] == 1
    assert [words[2:] for words in told] == [(7, 3), (3, 1)]

    monkeypatch.setattr(LittleMemory, "room", 0)
    with pytest.raises(DeviceMemoryFull, match="2 molecules at a time; not even one fits"):
        sample_ids(engine, SMALL, SEED, 5, 2, STEPS, 2)


def allocated(batch: Denoiser) -> int:
    """Bytes of every tensor of a batch."""
    owners = (vars(batch), vars(batch.layout))
    stores = (t.untyped_storage() for o in owners for t in o.values() if isinstance(t, torch.Tensor))
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def test_the_memory_of_a_batch_is_at_most_what_is_foretold(engine: KernelEngine) -> None:
    shape, size = kernel_shape(SMALL), 640
    chain = start_chain(SMALL, SEED, torch.arange(size), STEPS)
    largest = replace(chain, n=torch.full((size,), SMALL.n_pad))
    used = allocated(engine.batch(largest)) + chain.x.nbytes + chain.e.nbytes
    assert 0.8 * size * bytes_per_graph(shape) < used <= size * bytes_per_graph(shape)
    assert batch_that_fits(shape, 0) == 0
    assert batch_that_fits(shape, (64 << 20) + 5 * bytes_per_graph(shape)) == 5


@EMULATED
def test_any_count_runs_in_parts_that_the_free_memory_holds(
    engine: KernelEngine, whole: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Counted(Denoiser):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            sizes.append(self.layout.count)

    monkeypatch.setattr(kernel_engine, "Denoiser", Counted)
    monkeypatch.setattr(engine, "_fits", None)
    free = (64 << 20) + 3 * bytes_per_graph(kernel_shape(SMALL)) + 1
    monkeypatch.setattr(engine, "_free_bytes", lambda: free)
    assert equal(sample_ids(engine, SMALL, SEED, 5, 7, STEPS, 7), whole)
    assert sizes == [3, 3, 1]


@EMULATED
def test_a_network_that_gives_nan_is_an_error_and_not_a_molecule() -> None:
    net = network()
    net.mlp_out_X[2].bias.fill_(float("nan"))
    defines = {**kernel_shape(SMALL).defines, "edge_attend": {"STEPS": 16}}
    broken = KernelEngine(net, SMALL, "broken", Emulator(defines))
    with pytest.raises(LogitsNotFinite, match="broken gave NaN or infinity for samples 9 to 10"):
        sample_ids(broken, SMALL, SEED, 9, 2, STEPS, 8)


def test_a_recipe_a_width_and_a_gpu_that_the_kernels_cannot_serve_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, recipe, name = network(), get_recipe("rtn-w4a4"), quantizable(SMALL)[0]
    assert name == "tf_layers.0.self_attn.q"
    q = net.tf_layers[0].self_attn.q
    net.tf_layers[0].self_attn.q = QuantLinear.from_parts(decompose(q.weight, recipe)[0], q.bias, recipe)
    assert "rtn-w4a4" in refusal(net, SMALL)
    eight = get_recipe("rtn-w8a8")
    net.tf_layers[0].self_attn.q = QuantLinear.from_parts(decompose(q.weight, eight)[0], q.bias, eight)
    monkeypatch.setattr(kernel_engine, "missing", lambda: "")
    gpu = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "edges" in shortfall(net) and shortfall(network()) == ""
    assert refusal(net, SMALL) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "integer products" in refusal(net, SMALL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "the GPU is sm_75" in refusal(network(), SMALL)
    gpu.shared_memory_per_block_optin = 65536
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert "node needs 67584 bytes of shared memory a block, sm_89 has 65536" in refusal(network(), SMALL)
    narrow = replace(
        SMALL, hidden_dims=HiddenDims(64, 64, 64, 8, 64, 128), hidden_mlp_dims=Dims(256, 128, 128)
    )
    with pytest.raises(KernelsUnavailable, match=r"q\.weight is \[64, 64\].*--engine torch"):
        KernelEngine(GraphTransformer(narrow), narrow)


IN_8_BIT_FLOATS = ("fp8-one-w8a8", "gptq-fp8-one-w4a8")


def in_8_bit_floats(net: GraphTransformer, names: tuple[str, ...], recipe_name: str) -> GraphTransformer:
    """By a recipe, but for the inputs that gptq would see: its codes are chosen without."""
    recipe = get_recipe(recipe_name)
    unseen = recipe.changed(rounding="nearest", weight_clip="absmax", calibration="none")
    for name in names:
        owner, _, attribute = name.rpartition(".")
        linear = net.get_submodule(name)
        layer = QuantLinear.from_parts(decompose(linear.weight, unseen)[0], linear.bias, recipe)
        setattr(net.get_submodule(owner), attribute, layer)
    return net


@pytest.mark.parametrize("recipe", IN_8_BIT_FLOATS)
def test_a_recipe_of_8_bit_floats_is_computed_as_it_says_in_every_linear_or_refused(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(kernel_engine, "missing", lambda: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    names = quantizable(SMALL)
    whole = in_8_bit_floats(network(), names, recipe)
    assert refusal(whole, SMALL) == "" and shortfall(whole) == ""
    assert names[5] in refusal(in_8_bit_floats(network(), (*names[:5], *names[6:]), recipe), SMALL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert "8-bit floats are written for sm_90" in refusal(whole, SMALL)
    whole.tf_layers[0].normE2.weight.fill_(1e6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "tf_layers.1.self_attn.e_" in refusal(whole, SMALL)


def test_every_recipe_of_the_book_is_run_or_refused_by_name(fake_gpu: pytest.MonkeyPatch) -> None:
    net, name = network(), quantizable(SMALL)[0]
    owner, _, attribute = name.rpartition(".")
    linear, plain = net.get_submodule(name), get_recipe("rtn-w8a8")
    layer = QuantLinear.from_parts(decompose(linear.weight, plain)[0], linear.bias, plain)
    setattr(net.get_submodule(owner), attribute, layer)
    assert refusal(net, SMALL) == ""
    for recipe in (r for r in recipes() if r.act_quantized):
        layer.recipe = recipe.for_layer(name)
        reason = refusal(net, SMALL)
        assert not reason or recipe.name in reason or "8-bit floats in every Linear" in reason


def test_integers_that_8_bit_floats_do_not_hold_are_refused(fake_gpu: pytest.MonkeyPatch) -> None:
    names, recipe = quantizable(SMALL), get_recipe("gptq-fp8-one-w4a8")
    for bits, refused in ((4, False), (6, True)):
        wide = recipe.changed(weight_bits=bits, rounding="nearest", weight_clip="absmax", calibration="none")
        net = network()
        for name in names:
            owner, _, attribute = name.rpartition(".")
            linear = net.get_submodule(name)
            layer = QuantLinear.from_parts(decompose(linear.weight, wide)[0], linear.bias, wide)
            setattr(net.get_submodule(owner), attribute, layer)
            assert layer.codes is not None
            held = torch.equal(layer.codes.to(torch.float8_e4m3fn).float(), layer.codes)
            assert held or refused
        assert bool(refusal(net, SMALL)) == refused


@EMULATED
@pytest.mark.parametrize("recipe", IN_8_BIT_FLOATS)
def test_an_engine_of_8_bit_floats_gives_the_logits_of_quant_linear(recipe: str) -> None:
    net = in_8_bit_floats(network(), quantizable(SMALL), recipe)
    ours = KernelEngine(net, SMALL, "fp8", Emulator(kernel_shape(SMALL).defines))
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    torch.manual_seed(1)
    X = torch.eye(4)[torch.randint(4, (2, 9))] * mask[..., None]
    upper = torch.randint(5, (2, 9, 9)).triu(1)
    E = torch.eye(5)[upper + upper.transpose(1, 2)] * (mask[:, :, None] & mask[:, None])[..., None]
    t = torch.full((2,), 7)
    quant, exact = (TorchEngine(n, SMALL).logits(X, E, t, mask) for n in (net, network()))
    for mine, want, full in zip(ours.logits(X, E, t, mask), quant, exact, strict=True):
        assert (mine - want).norm() <= (want - full).norm()


def test_a_missing_compiler_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object) -> None:
        raise CompilerMissing("node.cu", kernel_engine.__file__)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel_engine, "open_device", no_compiler)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(KernelsUnavailable, match=r"no nvcc.*bitdgdm doctor"):
        KernelEngine(network(), SMALL)


def test_on_a_cpu_torch_runs_and_kernels_by_name_are_refused() -> None:
    assert choose_engine("builtin:digress-qm9", "cpu") == Choice("cpu", "fp32", "torch")
    with pytest.raises(KernelsUnavailable, match="the device is the CPU"):
        load_engine("builtin:digress-qm9", "cpu", engine="kernels")
    with pytest.raises(BadInput, match="no engine 'cudnn'"):
        load_engine("builtin:digress-qm9", "cpu", engine="cudnn")


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    gpu = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernel_engine, "missing", lambda: "")
    return monkeypatch


def test_a_gpu_gets_the_kernels_unless_something_is_asked_for_or_missing(
    fake_gpu: pytest.MonkeyPatch,
) -> None:
    model = "builtin:digress-qm9"
    assert choose_engine(model) == Choice("cuda", "bf16", "kernels")
    assert choose_engine(model, engine="torch") == Choice("cuda", "fp32", "torch")
    assert choose_engine(model, precision="bf16", engine="torch") == Choice("cuda", "bf16", "torch")
    asked = choose_engine(model, precision="fp32")
    assert (asked.engine, asked.precision) == ("torch", "fp32") and "fp32 was asked for" in asked.reason
    with pytest.raises(KernelsUnavailable, match="fp32 was asked for"):
        choose_engine(model, precision="fp32", engine="kernels")

    fake_gpu.setattr(kernel_engine, "missing", lambda: "PyCUDA is not installed")
    fallen = choose_engine(model)
    assert fallen == Choice("cuda", "fp32", "torch", "not our kernels: PyCUDA is not installed")
    with pytest.raises(KernelsUnavailable, match="PyCUDA is not installed"):
        choose_engine(model, engine="kernels")

    fake_gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    fake_gpu.setattr(kernel_engine, "missing", lambda: "")
    fake_gpu.setattr(engines, "hardware_name", lambda _: "Old GPU")
    old = choose_engine(model)
    assert "sm_75" in old.reason
    assert describe(old, "digress-qm9").startswith(
        "digress-qm9: PyTorch in fp32 on Old GPU (not our kernels: "
    )
