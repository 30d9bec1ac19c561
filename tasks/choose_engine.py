"""Choose the engine of a campaign on a machine of the pool.

Guarantees: the answer is of the hardware that will do the work, not of the one that submits it: a head node without a
GPU starts campaigns on workers that have one.
Knows nothing of: campaigns.
"""

import tempfile
from pathlib import Path

import ray

from bitdgdm.models.engine import Choice, choose_engine


@ray.remote(max_retries=3)
def choose_engine_task(model: bytes, device: str, precision: str, engine: str, digest: str) -> Choice:
    """`choose_engine` for the bytes of a model file. Raises: as `choose_engine`."""
    with tempfile.TemporaryDirectory(prefix="bitdgdm-") as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(model)
        return choose_engine(path, device, precision, engine, digest)
