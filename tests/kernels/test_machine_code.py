"""Run: .venv/bin/python -m pytest tests/kernels/test_machine_code.py -q   (needs nvcc; SASS needs nvdisasm; no GPU)"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bitdgdm.kernels.build import Cubin, build, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc (CUDA toolkit 12.4 or later on the PATH)")

KERNELS = {
    "edge_attend": ("edge_attend",),
    "edge_ffn": ("edge_ffn", "edge_ffn_out"),
    "node": ("node_in", "node_mid", "node_out"),
    "graph_path": ("pool", "graph_in", "graph_mid"),
    "features": ("features",),
    "sample": ("embed", "sample", "advance"),
}
HOPPER = {
    "edge_wg": ("edge_attend",),
    "edge_ffn_wg": ("edge_ffn", "edge_ffn_out"),
    "node_wg": ("node_in", "node_mid", "node_out"),
    "node_wg_s8": ("node_in", "node_mid", "node_out"),
}
STEPS = {"80": 10, "89": 5, "90a": 16}
CASES = [(source, arch, 64) for source in KERNELS for arch in STEPS] + [("graph_path", "90a", 128)]
CASES += [(source, "90a", 64) for source in HOPPER]
WARPGROUP_PRODUCTS = {"edge_wg": ("HGMMA", 16), "edge_ffn_wg": ("HGMMA", 12), "node_wg": ("HGMMA", 65), "node_wg_s8": ("IGMMA", 24)}
PRODUCTS = {"edge_attend": 32, "edge_ffn": 32, "edge_ffn_out": 48, "node_in": 64, "node_mid": 64, "node_out": 64, "graph_mid": 32}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


def compiled(source: str, arch: str, dy: int, cache: Path) -> Cubin:
    defines = {"edge_attend": {"STEPS": STEPS[arch]}, "graph_path": {"DY": dy, "HIDDEN_Y": 2 * dy}}.get(source, {})
    return build(source, arch, defines, cache_in=cache)


def nvdisasm() -> str | None:
    """The toolkit's disassembler, or that of the PyPI package nvidia-cuda-nvdisasm."""
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")
    if found is None:
        try:
            import nvidia
        except ImportError:
            return None
        found = next((str(p) for root in nvidia.__path__ for p in Path(root).rglob("nvdisasm")), None)
    return found


def opcodes(cubin: Cubin, tool: str) -> dict[str, Counter[str]]:
    """Instructions of every kernel, counted."""
    text = subprocess.run([tool, "-c", str(cubin.path)], capture_output=True, text=True, check=True).stdout
    result: dict[str, Counter[str]] = {}
    for section in text.split(".section\t.text.")[1:]:
        name = re.match(r"\w+", section)
        assert name is not None
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", section)
        result[name.group()] = Counter(found)
    return result


@pytest.mark.parametrize(("source", "arch", "dy"), CASES)
def test_no_kernel_spills_or_uses_the_stack(source: str, arch: str, dy: int, cache: Path) -> None:
    resources = compiled(source, arch, dy, cache).resources
    assert set(resources) == set({**KERNELS, **HOPPER}[source])
    assert not {name: r for name, r in resources.items() if r.stack or r.spilled}


@pytest.mark.skipif(nvdisasm() is None, reason="needs nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize(("source", "arch", "dy"), CASES)
def test_products_run_on_tensor_cores_and_nothing_in_local_memory(source: str, arch: str, dy: int, cache: Path) -> None:
    tool = nvdisasm()
    assert tool is not None
    found = opcodes(compiled(source, arch, dy, cache), tool)
    assert set(found) == set({**KERNELS, **HOPPER}[source])
    for name, counts in found.items():
        assert not [op for op in counts if op.startswith(("LDL", "STL"))], name
        if source in HOPPER:
            kind, least = WARPGROUP_PRODUCTS[source]
            assert sum(n for op, n in counts.items() if op.startswith(kind)) >= least, (name, counts)
            continue
        products = sum(n for op, n in counts.items() if op.startswith("HMMA.16816.F32.BF16"))
        assert products >= PRODUCTS.get(name, 0), (name, products)
        if name == "edge_attend":
            assert sum(n for op, n in counts.items() if op.startswith("HFMA2") and "BF16" in op) >= 4  # FiLM in pairs
