"""Run: .venv/bin/python -m pytest tests/kernels/test_machine_code.py -q   (no GPU)

Needs nvcc and nvdisasm: of the CUDA toolkit, or from PyPI as the extra dev installs them.
"""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bitdgdm.kernels.build import Cubin, build, find_nvcc, find_tool
from bitdgdm.kernels.fits import defines, supports
from bitdgdm.kernels.network import Shape

NVDISASM = find_tool("nvdisasm")
pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc: pip install 'cuda-toolkit[nvcc]'"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="nvcc needs g++"),
    pytest.mark.skipif(NVDISASM is None, reason="needs nvdisasm: pip install nvidia-cuda-nvdisasm"),
]

KERNELS = {
    "edge_attend": ("edge_attend",),
    "edge_ffn": ("edge_ffn", "edge_ffn_out"),
    "node": ("node_in", "node_mid", "node_out"),
    "graph_path": ("pool", "graph_in", "graph_mid"),
    "features": ("features",),
    "sample": ("embed", "sample", "advance"),
    "int4": ("int4_linear", "int4_linear_asymmetric", "int4_long", "int4_long_asymmetric"),
    "int4_narrow": tuple(f"int4_{k}{kind}" for k in (64, 128, 256) for kind in ("", "_asymmetric")),
    "int4_edge": ("int4_edge", "int4_edge_asymmetric"),
    "int8_narrow": tuple(f"int4_{k}{kind}" for k in (64, 128, 256) for kind in ("", "_asymmetric")),
    "int8_edge": ("int4_edge", "int4_edge_asymmetric"),
}
HOPPER = {
    "edge_wg": ("edge_attend",),
    "edge_ffn_wg": ("edge_ffn", "edge_ffn_out"),
    "node_wg": ("node_in", "node_mid", "node_out"),
    "node_wg_s8": ("node_in", "node_mid", "node_out"),
    "edge_f8": ("edge_attend",),
    "edge_ffn_f8": ("edge_ffn_out",),
    "node_f8": ("node_in", "node_mid", "node_out"),
    "graph_path_f8": ("pool", "graph_in", "graph_mid"),
}
SHARED_BYTES = {"80": 166912, "89": 101376, "90a": 232448}  # the most of a block, CUDA C++ programming guide
CASES = [(source, arch, 64) for source in KERNELS for arch in SHARED_BYTES]
CASES += [(source, arch, 128) for source in ("graph_path", "features") for arch in SHARED_BYTES]
CASES += [(source, "90a", 64) for source in HOPPER] + [("graph_path_f8", "90a", 128)]
WARPGROUP_PRODUCTS = {"edge_wg": ("HGMMA", 16), "edge_ffn_wg": ("HGMMA", 12), "node_wg": ("HGMMA", 65), "node_wg_s8": ("IGMMA", 24)}
WARPGROUP_PRODUCTS |= {"edge_f8": ("QGMMA", 16), "edge_ffn_f8": ("QGMMA", 8), "node_f8": ("QGMMA", 24), "graph_path_f8": ("HMMA.16816.F32", 0)}
PRODUCTS = {"edge_attend": 32, "edge_ffn": 32, "edge_ffn_out": 48, "node_in": 64, "node_mid": 64, "node_out": 64, "graph_mid": 32}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


def shape(dy: int) -> Shape:
    """QM9 (dy 64) or MOSES (dy 128)."""
    return Shape(9, 9, 4, 5, 64, 128, 8, 500) if dy == 64 else Shape(12, 27, 8, 5, 128, 256, 8, 500)


def compiled(source: str, arch: str, dy: int, cache: Path) -> Cubin:
    """As `open_device` has it compiled on such a GPU."""
    return build(source, arch, defines(shape(dy), SHARED_BYTES[arch]).get(source), cache_in=cache)


def opcodes(cubin: Cubin) -> dict[str, Counter[str]]:
    """Instructions of every kernel, counted."""
    command = [str(NVDISASM), "-c", str(cubin.path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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


@pytest.mark.parametrize(("source", "arch", "dy"), CASES)
def test_products_run_on_tensor_cores_and_nothing_in_local_memory(source: str, arch: str, dy: int, cache: Path) -> None:
    found = opcodes(compiled(source, arch, dy, cache))
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


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("source", ["int4", "int4_narrow", "int4_edge"])
def test_codes_of_4_bit_are_multiplied_as_they_are_but_on_hopper(source: str, arch: str, cache: Path) -> None:
    for name, counts in opcodes(compiled(source, arch, 64, cache)).items():
        products = {op: n for op, n in counts.items() if op.startswith("IMMA")}
        kind = "IMMA.16832.S8.S8" if arch == "90a" else f"IMMA.16864.{'U4' if 'asymmetric' in name else 'S4'}.S4"
        assert set(products) == {kind} and products[kind] >= 8, (name, products)


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("source", ["int8_narrow", "int8_edge"])
def test_codes_of_8_bit_are_multiplied_as_they_are(source: str, arch: str, cache: Path) -> None:
    for name, counts in opcodes(compiled(source, arch, 64, cache)).items():
        products = {op: n for op, n in counts.items() if op.startswith("IMMA")}
        kind = f"IMMA.16832.{'U8' if 'asymmetric' in name else 'S8'}.S8"
        assert set(products) == {kind} and products[kind] >= 16, (name, products)


@pytest.mark.parametrize("dy", [64, 128])
@pytest.mark.parametrize(("capability", "arch"), [((8, 0), "80"), ((8, 6), "89"), ((8, 9), "89"), ((9, 0), "90a")])
def test_the_gpus_that_are_compiled_for_have_room_for_the_shipped_shapes(
    dy: int, capability: tuple[int, int], arch: str
) -> None:
    assert supports(shape(dy), capability, SHARED_BYTES[arch]) == (True, "")
