"""Run: pytest tests/pipelines/test_model_files.py"""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from pathlib import Path
from bitdgdm.infra import registry
from bitdgdm.pipelines.model_files import locate

made = Path("model.safetensors")
made.write_bytes(b"weights")
registry.register("m", {"model.safetensors": made}, {}, [])
uri, path = locate("models:/m")
assert uri == "models:/m/1" and path.read_bytes() == b"weights"
"""


def test_a_model_fetched_from_the_registry_is_gone_with_the_process(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "TMPDIR": str(tmp_path / "tmp"),
        "BITDGDM_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", PROGRAM], env=env, cwd=tmp_path, check=True, timeout=120)
    assert not list((tmp_path / "tmp").iterdir())
