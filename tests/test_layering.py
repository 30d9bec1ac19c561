"""Run: .venv/bin/python -m pytest tests/test_layering.py

The rules of the house, read from the syntax tree of every floor: who may import whom, which file may hold
which dangerous thing, how a file looks. Nothing of the project is imported here except in a subprocess.
"""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANK = {"infra": 1, "kernels": 1, "quant": 2, "models": 3, "tasks": 4, "pipelines": 5}
MODULES = sorted(path for floor in RANK for path in (ROOT / floor).rglob("*.py"))

# Where a third party's package may be imported: whole floors or single files.
ONLY_IN = {
    "ray": ("infra/cluster.py", "tasks", "pipelines"),
    "mlflow": ("infra/registry.py",),
    "pycuda": ("kernels",),
    "torch": ("kernels", "quant", "models", "tasks", "pipelines"),
    "rdkit": ("models", "tasks", "pipelines"),
}
# Of infra, the model floors may use what does no I/O.
PURE_INFRA = {"bitdgdm.infra.errors", "bitdgdm.infra.version", "bitdgdm.infra.fingerprint"}
# Modules and functions through which data can run code (law L5).
CODE_IN_DATA = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LOADS_PICKLES = {"torch.load", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load", "torch.package"}
THE_IMPORTER = "models/importer.py"
# File -> why it must catch all.
MAY_CATCH_ALL = {
    "tasks/sample_unit.py": "whatever one unit raises must not stop the others (law L6)",
    "pipelines/generate.py": "what ends the thread that waits for workers must reach the command",
}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "base", "misc"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=relative(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("bitdgdm", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of all that `path` imports, inside functions too.

    `from bitdgdm.infra import errors` gives bitdgdm.infra.errors, so a name tells the module where it is one.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            yield from ((a.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def dotted(node: ast.AST) -> str:
    """Return "a.b.c" of a name or attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def lies_in(path: Path, places: tuple[str, ...]) -> bool:
    return any(relative(path) == place or relative(path).startswith(place + "/") for place in places)


def test_imports_between_floors_point_downward() -> None:
    wrong = []
    for path in MODULES:
        own = path.relative_to(ROOT).parts[0]
        for line, name in imports(path):
            if not name.startswith("bitdgdm."):
                continue
            other = name.split(".")[1]
            if other not in RANK or (other != own and RANK[other] >= RANK[own]):
                wrong.append(f"{relative(path)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_model_floors_use_only_the_parts_of_infra_that_do_no_io() -> None:
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for path in MODULES
        if lies_in(path, ("quant", "models"))
        for line, name in imports(path)
        if name.startswith("bitdgdm.infra") and ".".join(name.split(".")[:3]) not in PURE_INFRA
    ]
    assert not wrong, "\n".join(wrong)


def test_a_floor_is_always_imported_under_the_name_bitdgdm() -> None:
    scripts = [ROOT / "bitdgdm.py", *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for path in [*MODULES, *scripts]
        for line, name in imports(path)
        if name.split(".")[0] in RANK
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_a_heavy_dependency_stays_on_its_floors(package: str) -> None:
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for path in MODULES
        if not lies_in(path, ONLY_IN[package])
        for line, name in imports(path)
        if name.split(".")[0] == package
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_importer_touches_pickles() -> None:
    wrong = []
    for path in MODULES:
        if relative(path) == THE_IMPORTER:
            continue
        wrong += [
            f"{relative(path)}:{line} imports {name}"
            for line, name in imports(path)
            if name.split(".")[0] in CODE_IN_DATA or name in LOADS_PICKLES
        ]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and dotted(node) in LOADS_PICKLES:
                wrong.append(f"{relative(path)}:{node.lineno} uses {dotted(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                allowed = ast.unparse(node.value) == "False"
                wrong += [] if allowed else [f"{relative(path)}:{node.lineno} allows pickles"]
    assert not wrong, "\n".join(wrong)


def test_every_torch_load_of_the_importer_reads_weights_only() -> None:
    path = ROOT / THE_IMPORTER
    loads = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call) and dotted(n.func) == "torch.load"]
    for load in loads:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in load.keywords}
        assert keywords.get("weights_only") == "True", f"{relative(path)}:{load.lineno}"


def catch_alls(path: Path) -> list[int]:
    """Return the lines of handlers and `suppress` calls that swallow Exception or all there is."""
    lines = []

    def is_broad(kind: ast.AST) -> bool:
        return dotted(kind).split(".")[-1] in ("Exception", "BaseException")

    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type] if node.type else []
            broad = not kinds or any(map(is_broad, kinds))
            cleanup = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if broad and not cleanup:
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("suppress"):
            lines += [node.lineno for kind in node.args if is_broad(kind)]
    return lines


def test_only_the_unit_boundary_catches_every_error() -> None:
    found = {relative(path): lines for path in MODULES if (lines := catch_alls(path))}
    wrong = [f"{path}:{line}" for path, lines in found.items() if path not in MAY_CATCH_ALL for line in lines]
    assert not wrong, "catches every error outside the unit boundary: " + ", ".join(wrong)
    stale = set(MAY_CATCH_ALL) - set(found)
    assert not stale, f"no longer needs its place in MAY_CATCH_ALL: {sorted(stale)}"


def test_every_module_opens_with_a_docstring() -> None:
    bare = [relative(path) for path in [*MODULES, ROOT / "bitdgdm.py"] if not ast.get_docstring(tree(path))]
    assert not bare, bare


def test_every_test_file_says_first_how_to_run_it() -> None:
    silent = [
        relative(path)
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest" not in path.read_text(encoding="utf-8").split("\n", 1)[0]
    ]
    assert not silent, silent


def test_no_module_is_named_after_nothing() -> None:
    empty = [relative(path) for path in MODULES if {path.stem, path.parent.name} & EMPTY_NAMES]
    assert not empty, empty


def test_no_file_grows_past_400_lines() -> None:
    files = [*MODULES, *(path for floor in RANK for path in (ROOT / floor).rglob("*.cu*"))]
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {path: length for path, length in lengths.items() if length > 400}


def test_the_packages_of_the_distribution_are_those_of_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    in_tree = {module_name(path) for path in MODULES if path.name == "__init__.py"}
    assert sorted(listed) == sorted(in_tree)
    assert {module_name(path / "__init__.py") for path in {path.parent for path in MODULES}} == in_tree


def test_every_floor_carries_its_types() -> None:
    assert [floor for floor in RANK if not (ROOT / floor / "py.typed").is_file()] == []


def test_the_root_is_no_package() -> None:
    assert not (ROOT / "__init__.py").exists()


IMPORT_ALL = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pycuda":
            raise ImportError("pycuda is hidden by the test")

sys.meta_path.insert(0, Refuse())
failed = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
torch = sys.modules.get("torch")
if torch is not None and torch.cuda.is_initialized():
    failed.append("an import started CUDA")
ray = sys.modules.get("ray")
if ray is not None and ray.is_initialized():
    failed.append("an import started Ray")
print("\\n".join(failed))
sys.exit(bool(failed))
"""


def test_every_module_imports_without_gpu_cuda_or_pycuda() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *(module_name(path) for path in MODULES)],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("floor", sorted(RANK))
def test_a_floor_refuses_to_be_taken_for_a_package_of_its_own_name(floor: str) -> None:
    argv = [sys.executable, "-c", f"import {floor}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and f"import it as bitdgdm.{floor}" in done.stderr
