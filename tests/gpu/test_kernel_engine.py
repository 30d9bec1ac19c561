"""Run: python -m pytest tests/gpu/test_kernel_engine.py -q   (needs a GPU, nvcc and PyCUDA; two GPUs for one test)

The engine as a campaign uses it, on a device. The same sources run in an emulator in tests/kernels and tests/models.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitdgdm.kernels.step_graph import denoise
from bitdgdm.models.digress import GraphTransformer, build, quantizable
from bitdgdm.models.digress_config import QM9_NO_H as QM9
from bitdgdm.models.engine import TorchEngine, load_engine
from bitdgdm.models.kernel_engine import KernelEngine
from bitdgdm.models.noise import posterior
from bitdgdm.models.philox import edge_slots, node_slots, philox
from bitdgdm.models.sampler import Graphs, draw, sample_ids, start_chain
from bitdgdm.models.seam import Chain
from bitdgdm.models.source import load_source
from bitdgdm.quant.decompose import decompose
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe_book import get_recipe

pytestmark = pytest.mark.gpu
if torch.cuda.is_available():
    pytest.importorskip("pycuda", reason="needs PyCUDA: pip install 'bitdgdm[gpu]'")

ROOT = Path(__file__).resolve().parents[2]
SEED, STEPS = 2**63 + 5, 6
RECIPES = ("rtn-w8a8", "fp8-one-w8a8", "gptq-fp8-one-w4a8")
MODELS = ("builtin:digress-qm9", *RECIPES)


@pytest.fixture(scope="module", params=MODELS)
def engine(request: pytest.FixtureRequest) -> KernelEngine:
    return open_kernels(request.param)


def open_kernels(model: str) -> KernelEngine:
    if model in RECIPES:
        return KernelEngine(eight_bit(model), QM9, model)
    found = load_engine(model, "cuda", engine="kernels")
    assert isinstance(found, KernelEngine)
    return found


def eight_bit(name: str) -> GraphTransformer:
    """The shipped network by a recipe, but for the inputs that gptq would see."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("8-bit products are written for sm_90")
    network, recipe = build(QM9, load_source("builtin:digress-qm9").weights), get_recipe(name)
    recipe = recipe.changed(rounding="nearest", weight_clip="absmax", calibration="none")
    for name in quantizable(QM9):
        linear = network.get_submodule(name)
        owner, _, attribute = name.rpartition(".")
        layer = QuantLinear.from_parts(decompose(linear.weight, recipe)[0], linear.bias, recipe)
        setattr(network.get_submodule(owner), attribute, layer)
    return network


@pytest.fixture(scope="module")
def bf16() -> KernelEngine:
    return open_kernels("builtin:digress-qm9")


@pytest.fixture(scope="module")
def whole(engine: KernelEngine) -> Graphs:
    return sample_ids(engine, QM9, SEED, 0, 4096, STEPS, 4096)


def equal(a: Graphs, b: Graphs) -> bool:
    return torch.equal(a.n, b.n) and torch.equal(a.X, b.X) and torch.equal(a.E, b.E)


def the_chain(engine: KernelEngine, ids: Tensor, steps: int = STEPS) -> Chain:
    return start_chain(QM9, SEED, ids.to(engine.device), steps)


def test_ids_give_equal_bytes_one_by_one_in_sevens_and_again(engine: KernelEngine, whole: Graphs) -> None:
    assert len(torch.unique(whole.E.flatten(1), dim=0)) > 3000
    assert equal(sample_ids(engine, QM9, SEED, 0, 4096, STEPS, 4096), whole)
    assert equal(sample_ids(engine, QM9, SEED, 0, 210, STEPS, 7), whole[:210])
    assert equal(sample_ids(engine, QM9, SEED, 1001, 3, STEPS, 1), whole[1001:1004])


def test_shuffled_ids_give_equal_bytes(engine: KernelEngine, whole: Graphs) -> None:
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(1))
    x, e, finite = engine.denoise(the_chain(engine, order))
    assert finite
    assert torch.equal(x.cpu(), whole.X[order]) and torch.equal(e.cpu(), whole.E[order])


def test_a_captured_step_gives_the_bytes_of_its_launches(engine: KernelEngine, whole: Graphs) -> None:
    batch = engine.batch(the_chain(engine, torch.arange(300)))
    with torch.inference_mode():
        denoise(batch, STEPS, capture=False)
        torch.cuda.synchronize()
        assert torch.equal(batch.x.cpu().to(torch.int8), whole.X[:300])
        assert torch.equal(batch.e.cpu().to(torch.int8), whole.E[:300])


DIGEST = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.gpu.test_kernel_engine import QM9, SEED, STEPS, digest, open_kernels, sample_ids
print(digest(sample_ids(open_kernels(sys.argv[2]), QM9, SEED, 0, 512, STEPS, 512)))
"""


def digest(graphs: Graphs) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in (graphs.n, graphs.X, graphs.E))).hexdigest()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_equal_bytes(engine: KernelEngine) -> None:
    model = engine.name if engine.name in RECIPES else "builtin:digress-qm9"
    wanted = digest(sample_ids(engine, QM9, SEED, 0, 512, STEPS, 512))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    at_once = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST, str(ROOT), model], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": path},
        )
        for gpu in "01"
    ]  # fmt: skip
    for gpu, process in enumerate(at_once):
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.strip() == wanted, f"GPU {gpu}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_process_drives_two_gpus_with_equal_bytes(bf16: KernelEngine) -> None:
    wanted = sample_ids(bf16, QM9, SEED, 0, 512, STEPS, 512)
    for gpu in (1, 0):
        with torch.cuda.device(gpu):
            there = open_kernels("builtin:digress-qm9")
            assert there.device.index == gpu
            assert equal(sample_ids(there, QM9, SEED, 0, 512, STEPS, 512), wanted)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def a_state(device: torch.device, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """One-hots and mask of graphs of all sizes, as a sampler would give them."""
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(9) < torch.randint(1, 10, (size, 1), generator=g)
    X = torch.eye(4)[torch.randint(4, (size, 9), generator=g)] * mask[..., None]
    upper = (torch.randint(8, (size, 9, 9), generator=g) - 4).clamp(min=0).triu(1)
    E = torch.eye(5)[upper + upper.transpose(1, 2)] * (mask[:, :, None] & mask[:, None])[..., None]
    return X.to(device), E.to(device), mask.to(device)


@pytest.mark.parametrize("time", [500, 250, 1])
def test_logits_are_as_near_to_float32_as_torch_in_bf16(bf16: KernelEngine, time: int) -> None:
    source = load_source("builtin:digress-qm9")
    X, E, mask = a_state(bf16.device)
    t = torch.full((len(X),), time, device=bf16.device)
    exact, low = (
        TorchEngine(build(QM9, source.weights), QM9, "cuda", dtype).logits(X, E, t, mask)
        for dtype in (torch.float32, torch.bfloat16)
    )
    for ours, want, theirs in zip(bf16.logits(X, E, t, mask), exact, low, strict=True):
        assert relative(ours, want) <= 2 * relative(theirs, want) + 1e-4


@pytest.mark.parametrize("name", RECIPES)
def test_an_8_bit_network_gives_the_logits_of_quant_linear(name: str) -> None:
    ours, theirs = KernelEngine(eight_bit(name), QM9), TorchEngine(eight_bit(name), QM9, "cuda")
    full = TorchEngine(build(QM9, load_source("builtin:digress-qm9").weights), QM9, "cuda")
    X, E, mask = a_state(ours.device)
    t = torch.full((len(X),), 100, device=ours.device)
    for mine, quant, exact in zip(*(e.logits(X, E, t, mask) for e in (ours, theirs, full)), strict=True):
        assert relative(mine, exact) <= 1.5 * relative(quant, exact) + 0.005
        assert relative(mine, quant) <= 2 * relative(quant, exact) + 0.01


def test_draws_are_those_of_the_torch_sampler_bit_for_bit(bf16: KernelEngine) -> None:
    chain = the_chain(bf16, torch.arange(512))
    batch = bf16.batch(chain)
    rows, cols = torch.triu_indices(9, 9, 1, device=bf16.device)
    mask = torch.arange(9, device=bf16.device) < chain.n[:, None]
    with torch.inference_mode(), batch.launcher.stream():  # type: ignore[attr-defined]
        for k, s in enumerate(chain.times[1:]):
            batch.forward()
            x, e, (lx, le) = batch.x.long(), batch.e.long(), batch.logits()
            slots = torch.cat((node_slots(9, bf16.device), edge_slots(9, rows, cols)))
            u = philox(SEED, chain.ids[:, None], s, slots)
            want_x = draw(posterior(lx.softmax(-1), x, chain.node_tables[k]), u[:, :9]) * mask
            p_e = posterior(le[:, rows, cols].softmax(-1), e[:, rows, cols], chain.edge_tables[k])
            want_e = draw(p_e, u[:, 9:]) * (mask[:, rows] & mask[:, cols])
            batch.draw()
            # expf on the device and torch's exp may differ in the last bit: a draw on an edge may fall either way
            assert (
                int((batch.x.long() != want_x).sum()) + int((batch.e[:, rows, cols].long() != want_e).sum())
                <= 1
            )


@pytest.fixture
def little_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    room = (torch.cuda.memory_reserved() + (48 << 20)) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(room)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_batch_beyond_the_memory_is_cut_and_gives_equal_bytes(
    bf16: KernelEngine, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "_fits", None)
    cut = sample_ids(bf16, QM9, SEED, 0, 1500, STEPS, 1500)
    assert bf16._fits is not None and bf16._fits < 1500
    torch.cuda.set_per_process_memory_fraction(1.0)
    monkeypatch.setattr(bf16, "_fits", None)
    assert equal(sample_ids(bf16, QM9, SEED, 0, 1500, STEPS, 1500), cut)
