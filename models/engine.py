"""The engines: a network of a file on a device, by PyTorch or by our kernels.

Guarantees: which engine, device and precision run is decided by `choose_engine` alone, from the request, the model
and this machine; what was asked for by name is never replaced by something else. On a CPU an engine computes on
exactly one thread, because a matrix product's result depends on the number of threads.
Knows nothing of: noise schedules, random numbers, molecules, campaigns.

The sampler sees the protocols of seam.py only.
"""

import logging
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bitdgdm.infra.errors import ArtifactCorrupt, BadInput, KernelsUnavailable
from bitdgdm.models.digress import GraphTransformer, build
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.features import network_input
from bitdgdm.models.int4_network import fuse, kernel_inputs, on_stream, open_gpu
from bitdgdm.models.int4_network import refusal as int4_refusal
from bitdgdm.models.kernel_engine import KernelEngine, refusal, shortfall
from bitdgdm.models.seam import Engine
from bitdgdm.models.source import BUILTIN_PREFIX, SourceModel, is_source_file, load_source
from bitdgdm.quant.artifact import Artifact, apply, load_artifact
from bitdgdm.quant.linear import set_time

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


ENGINES = ("auto", "torch", "kernels")
FUSED_LINEARS = "features, a layer's edges and each other integer Linear are one of our kernels each, the rest is PyTorch"
log = logging.getLogger("bitdgdm.engine")


@dataclass(frozen=True)
class Choice:
    """What will run. reason: why it isn't the kernels, or what they compute otherwise than the recipe says, or ""."""

    device: str
    precision: str
    engine: str
    reason: str = ""


class TorchEngine:
    """The reference engine: features and network in PyTorch, on a CPU or on a CUDA device."""

    def __init__(
        self,
        network: nn.Module,
        config: DigressConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str = "digress",
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        inputs: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]] | None = None,
    ) -> None:
        """around: what a call of the network runs in, e.g. a stream. inputs: `network_input` of another make."""
        self.name, self.config, self.device, self.dtype = name, config, torch.device(device), dtype
        self._network = network.to(self.device).eval().requires_grad_(False)
        self._around = around
        self._inputs = inputs or partial(network_input, config=config)

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Engine.logits`."""
        time = t.to(torch.float32) / self.config.diffusion_steps
        with torch.inference_mode(), one_thread(self.device), self._around():
            inputs = self._inputs(X, E, time, node_mask)
            set_time(self._network, t)
            with self._autocast():
                out_X, out_E = self._network(*inputs, node_mask)
        return out_X.float(), out_E.float()

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


@dataclass(frozen=True)
class _Opened:
    network: nn.Module
    config: DigressConfig
    name: str
    artifact: Artifact | None = None


def load_engine(
    model: str | Path | SourceModel,
    device: str = "auto",
    precision: str = "auto",
    digest: str | None = None,
    engine: str = "auto",
) -> Engine:
    """Return the engine of a source model or of a quantized artifact.

    model: a SourceModel, "builtin:...", or the path of either kind of file. device, precision, engine: see
    `choose_engine`. digest: when given, the model must have it.
    Raises: what `choose_engine` raises.
    """
    opened = _open(model, digest)
    choice = _choose(opened, device, precision, engine)
    if choice.device == "cuda":
        log.info("%s", describe(choice, opened.name))
    if choice.engine == "kernels" and choice.reason == FUSED_LINEARS:
        return _with_int4(opened, choice)
    if choice.engine == "kernels":
        return KernelEngine(opened.network, opened.config, opened.name)
    return TorchEngine(
        opened.network, opened.config, choice.device, PRECISIONS[choice.precision], opened.name
    )


def _with_int4(opened: _Opened, choice: Choice) -> TorchEngine:
    assert opened.artifact is not None
    device = open_gpu(opened.config)
    network = fuse(opened.network.to(device.device), opened.artifact, device)
    dtype, inputs = PRECISIONS[choice.precision], kernel_inputs(opened.config, device)
    return TorchEngine(network, opened.config, device.device, dtype, opened.name, lambda: on_stream(device), inputs)


def choose_engine(
    model: str | Path | SourceModel,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    digest: str | None = None,
) -> Choice:
    """Open a model, build its network, and say what would run it here.

    device: "auto" (CUDA when there is one), "cpu" or "cuda". engine: "kernels", "torch", or "auto": the kernels
    where they can run the model on this GPU, else PyTorch. precision of what isn't quantized: "fp32", "bf16" (CUDA
    only) or "auto": bf16 with the kernels, fp32 between those of 4-bit recipes and in PyTorch.
    Raises: BadInput for a device, precision or engine that isn't there; KernelsUnavailable if they were asked for;
    ArtifactCorrupt for another digest; what `load_source` and `load_artifact` raise.
    """
    return _choose(_open(model, digest), device, precision, engine)


def describe(choice: Choice, name: str) -> str:
    """Return one line for people."""
    here = choice.device == "cpu" or torch.cuda.is_available()
    where = hardware_name(choice.device) if here else "a GPU of the cluster"
    by = "our CUDA kernels" if choice.engine == "kernels" else "PyTorch"
    return f"{name}: {by} in {choice.precision} on {where}" + (f" ({choice.reason})" if choice.reason else "")


def _choose(opened: _Opened, device: str, precision: str, engine: str) -> Choice:
    kind = resolve_device(device)
    if engine not in ENGINES:
        raise BadInput(f"there is no engine {engine!r}. Use {', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    if precision not in ("auto", *PRECISIONS) or (precision == "bf16" and kind == "cpu"):
        raise BadInput(f"precision {precision!r} is not there on {kind}. Use fp32 (or bf16 on a GPU)")
    plain = "fp32" if precision == "auto" else precision
    if kind == "cpu" or engine == "torch":
        if engine == "kernels":
            raise KernelsUnavailable("they run on a GPU and the device is the CPU", "Use --engine torch")
        return Choice(kind, plain, "torch")
    reason = (
        "precision fp32 was asked for, the kernels compute in bf16"
        if precision == "fp32"
        else refusal(opened.network, opened.config)
    )
    if not reason and engine == "auto":
        reason = shortfall(opened.network)  # a recipe computed in part is run only by name
    if not reason:
        return Choice(kind, "bf16", "kernels", shortfall(opened.network))
    artifact = opened.artifact
    asked = engine == "kernels" or (precision == "auto" and artifact is not None and _all_of_4_bit(artifact))
    if asked and artifact is not None and not int4_refusal(artifact):
        return Choice(kind, plain, "kernels", FUSED_LINEARS)
    if engine == "kernels":
        raise KernelsUnavailable(reason)
    return Choice(kind, plain, "torch", f"not our kernels: {reason}")


def _all_of_4_bit(artifact: Artifact) -> bool:
    """Inputs of 8 bit run on the kernels by name only: those have not been timed yet."""
    return all(artifact.header.recipe.for_layer(name).act_bits == 4 for name in artifact.layers)


def _open(model: str | Path | SourceModel, digest: str | None) -> _Opened:
    if not isinstance(model, SourceModel):
        name = str(model)
        if name.startswith(BUILTIN_PREFIX) or is_source_file(Path(name)):
            model = load_source(name)
    if isinstance(model, SourceModel):
        opened = _Opened(build(model.config, model.weights, model.name), model.config, model.name)
        found = model.digest
    else:
        artifact = load_artifact(model)
        config = DigressConfig.from_dict(artifact.header.model_config)
        name = f"{artifact.header.source.get('name', config.dataset)} {artifact.header.recipe.name}"
        opened = _Opened(apply(GraphTransformer(config), artifact), config, name, artifact)
        found = artifact.digest
    if digest is not None and digest != found:
        raise ArtifactCorrupt(str(model), f"its digest is {found}, the campaign names {digest}")
    return opened


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
