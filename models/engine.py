"""The seam where a network meets the hardware: noisy graphs in, logits of the clean graphs out.

Guarantees: an engine is a pure function of (X, E, t, mask) on one device, without host synchronisation; on a
CPU it computes on exactly one thread, because a matrix product's result depends on the number of threads.
Knows nothing of: noise schedules, random numbers, molecules, campaigns.

The sampler sees the Protocol `Engine` only. A kernel engine is another class with these members, returned by
`load_engine` for the (recipe, architecture) pairs that it supports; it must also be independent of a graph's
companions for a fixed batch shape, keep n_pad, and take node_mask as it is (rows of real nodes come first).
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from bitdgdm.infra.errors import ArtifactCorrupt, BadInput
from bitdgdm.models.digress import GraphTransformer, build
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.features import network_input
from bitdgdm.models.source import BUILTIN_PREFIX, SourceModel, is_source_file, load_source
from bitdgdm.quant.artifact import apply, load_artifact

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine(Protocol):
    """What the sampler needs of a network on a device.

    name: model and recipe, for messages. dtype: of the matrix products that aren't quantized.
    """

    name: str
    config: DigressConfig
    device: torch.device
    dtype: torch.dtype

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32[B, n_pad, node classes] and float32[B, n_pad, n_pad, edge classes], E symmetric.

        X: float32[B, n_pad, node classes] and E: float32[B, n_pad, n_pad, edge classes], one-hot, 0 where
        padded. t: int64[B], 1..T. node_mask: bool[B, n_pad], True for real nodes, which come first.
        """
        ...


class TorchEngine:
    """The reference engine: features and network in PyTorch, on a CPU or on a CUDA device."""

    def __init__(
        self,
        network: nn.Module,
        config: DigressConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str = "digress",
    ) -> None:
        self.name, self.config, self.device, self.dtype = name, config, torch.device(device), dtype
        self._network = network.to(self.device).eval().requires_grad_(False)

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Engine.logits`."""
        time = t.to(torch.float32) / self.config.diffusion_steps
        with torch.inference_mode(), one_thread(self.device):
            inputs = network_input(X, E, time, node_mask, self.config)
            with self._autocast():
                out_X, out_E = self._network(*inputs, node_mask)
        return out_X.float(), out_E.float()

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def load_engine(
    model: str | Path | SourceModel,
    device: str = "auto",
    precision: str = "fp32",
    digest: str | None = None,
) -> Engine:
    """Return the engine of a source model or of a quantized artifact.

    model: a SourceModel, "builtin:...", or the path of either kind of file.
    device: "auto" (CUDA when there is one), "cpu" or "cuda". precision: "fp32" or "bf16" (CUDA only).
    digest: when given, the model must have it.
    Raises: BadInput for a device or precision that isn't there; ArtifactCorrupt for another digest; what
    `load_source` and `load_artifact` raise.
    """
    kind = resolve_device(device)
    if precision not in PRECISIONS or (precision == "bf16" and kind == "cpu"):
        raise BadInput(f"precision {precision!r} is not there on {kind}. Use fp32 (or bf16 on a GPU)")
    network, config, name, found = _open(model)
    if digest is not None and digest != found:
        raise ArtifactCorrupt(str(model), f"its digest is {found}, the campaign names {digest}")
    return TorchEngine(network, config, kind, PRECISIONS[precision], name)


def _open(model: str | Path | SourceModel) -> tuple[nn.Module, DigressConfig, str, str]:
    """Return (network, config, name, digest)."""
    if not isinstance(model, SourceModel):
        name = str(model)
        if name.startswith(BUILTIN_PREFIX) or is_source_file(Path(name)):
            model = load_source(name)
    if isinstance(model, SourceModel):
        return build(model.config, model.weights, model.name), model.config, model.name, model.digest
    artifact = load_artifact(model)
    config = DigressConfig.from_dict(artifact.header.model_config)
    name = f"{artifact.header.source.get('name', config.dataset)} {artifact.header.recipe.name}"
    return apply(GraphTransformer(config), artifact), config, name, artifact.digest


def resolve_device(device: str) -> str:
    """Return "cpu" or "cuda". Raises: BadInput for another name, or for "cuda" where there is none."""
    there = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if there else "cpu"
    if device not in ("cpu", "cuda"):
        raise BadInput(f"there is no device {device!r}. Use auto, cpu or cuda")
    if device == "cuda" and not there:
        raise BadInput("PyTorch finds no CUDA device on this machine. Use --device cpu or --device auto")
    return device


@cache
def hardware_name(device: torch.device | str) -> str:
    """Return what computes, for lineage: "NVIDIA H200", or the CPU's model name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute on one CPU thread inside the block; does nothing for other devices."""
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
