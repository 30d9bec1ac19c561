"""The engine that runs a DiGress network by our CUDA kernels, all steps of a batch on the device.

Guarantees: a graph's bytes are a function of (network, seed, id, times), whatever the batch (law L1), so a batch that
doesn't fit into the device's free memory is cut, so that any count runs; a network whose recipe the kernels don't know is refused with the reason.
Of an 8-bit integer recipe (absmax, one scale a row) the products of nodes run on integers, exactly as QuantLinear rounds
them; the products of edges and of y run in bf16 on the dequantized weights, so their inputs aren't rounded to 8 bit. A
recipe whose inputs are cast to e4m3 with scale one, weights in e4m3 or in integers of few bits with a scale a row, is
computed as it says, every Linear.
Knows nothing of: how a kernel works, files, campaigns. Errors of the kernels' floor become this project's here.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from bitdgdm.infra.errors import DeviceMemoryFull, KernelsUnavailable
from bitdgdm.kernels.build import CompilerMissing, KernelBroken
from bitdgdm.kernels.denoise import Denoiser, Noise
from bitdgdm.kernels.fits import batch_that_fits
from bitdgdm.kernels.fits import supports as fits_gpu
from bitdgdm.kernels.launch import Device, Launcher, PyCudaMissing
from bitdgdm.kernels.network import Integers, Network, Shape, prepare, supports
from bitdgdm.kernels.network_f8 import Codes, overflow, prepare_f8
from bitdgdm.kernels.step_graph import denoise, open_device
from bitdgdm.kernels.toolchain import missing
from bitdgdm.models.digress import quantizable
from bitdgdm.models.digress_config import DigressConfig
from bitdgdm.models.seam import Chain
from bitdgdm.quant.linear import QuantLinear
from bitdgdm.quant.recipe import Recipe
from bitdgdm.quant.recipe_book import recipes

log = logging.getLogger("bitdgdm.engine")
LEAST_SHARED = 101376  # of a block on sm_86 and sm_89; newer PyTorch says what it is here
HOPPER = (9, 0)
# what a network's codes don't show: a name, and how they were chosen
NOT_RUN = {"name", "summary", "source", "cost", "version", "weight_clip", "rounding", "calibration"}


def kernel_shape(config: DigressConfig) -> Shape:
    """What the kernels want to know of a config."""
    return Shape(
        config.n_layers, config.n_pad, config.output_dims.X, config.output_dims.E, config.hidden_dims.dy,
        config.hidden_mlp_dims.y, config.hidden_dims.n_head, config.diffusion_steps,
        config.atom_weights if config.molecular else (), config.max_weight,
    )  # fmt: skip


def refusal(network: nn.Module, config: DigressConfig) -> str:
    """Why the kernels can't run `network` on this machine's current GPU, or "" if they can."""
    return _network_refusal(network, config) or missing() or _device_refusal(_rounded(network), config)


def shortfall(network: nn.Module) -> str:
    """What of the network's recipe the kernels compute otherwise than it says, or "" if nothing."""
    if not _rounded(network) or _is_fp8(network):
        return ""
    return "of an 8-bit recipe they round the inputs of node products only; edges and y are computed in bf16"


def _rounded(network: nn.Module) -> dict[str, QuantLinear]:
    """The Linears that round their input at run time."""
    named = network.named_modules()
    return {name: m for name, m in named if isinstance(m, QuantLinear) and m.recipe.act_quantized}


def _is_fp8(network: nn.Module) -> bool:
    return any(m.recipe.act_format == "fp8" for m in _rounded(network).values())


def _run(recipe: Recipe) -> dict[str, object]:
    """What of a recipe there is to compute: integers that e4m3 holds are 8-bit floats where the inputs are."""
    floats = recipe.act_format == "fp8" and recipe.codes_are_fp8
    as_floats = {"weight_format": "fp8", "weight_bits": 8} if floats else {}
    return {field: value for field, value in vars(recipe).items() if field not in NOT_RUN} | as_floats


INT8 = _run(Recipe("", 8, 8))
FP8 = _run(Recipe("", 8, 8, weight_format="fp8", act_format="fp8", act_scale="one"))


def _network_refusal(network: nn.Module, config: DigressConfig) -> str:
    rounded, shape = _rounded(network), kernel_shape(config)
    wanted = FP8 if _is_fp8(network) else INT8
    for module in rounded.values():
        if _run(module.recipe) != wanted:
            known = ", ".join(r.name for r in recipes() if _run(r) in (INT8, FP8))
            return f"they don't compute recipe {module.recipe.name} (quantized ones that they do: {known})"
    ok, reason = supports(_weights(network), shape)
    if not ok or wanted is not FP8:
        return "" if ok else reason
    left_out = sorted(set(quantizable(config)) - set(rounded))
    if left_out:
        return f"they compute 8-bit floats in every Linear of the layers, and {left_out[0]} isn't quantized"
    return overflow(_weights(network), _codes(network), shape)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Every weight and bias by its published name; of a rounded Linear what its codes stand for."""
    weights = dict(network.state_dict())
    for name, m in _rounded(network).items():
        assert m.codes is not None and m.scale is not None
        weights[f"{name}.weight"] = m.codes * m.scale[:, None]
    return weights


def _integers(network: nn.Module) -> dict[str, Integers]:
    found = {}
    for name, m in _rounded(network).items():
        assert m.codes is not None and m.scale is not None
        found[name] = Integers(m.codes.to(torch.int8), m.scale)
    return found


def _codes(network: nn.Module) -> dict[str, Codes]:
    found = {}
    for name, m in _rounded(network).items():
        assert m.codes is not None and m.scale is not None
        found[name] = Codes(m.codes, m.scale)
    return found


def _packed(network: nn.Module, shape: Shape, device: torch.device) -> Network:
    if _is_fp8(network):
        return prepare_f8(_weights(network), _codes(network), shape, device)
    return prepare(_weights(network), shape, device, integers=_integers(network))


def _device_refusal(rounded: Mapping[str, QuantLinear], config: DigressConfig) -> str:
    found = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    shared = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED)
    ok, reason = fits_gpu(kernel_shape(config), found, shared)
    if not ok:
        return reason
    if rounded and found != HOPPER:
        of = "floats" if any(m.recipe.act_format == "fp8" for m in rounded.values()) else "integer products"
        return f"the GPU is sm_{found[0]}{found[1]}, their 8-bit {of} are written for sm_90"
    return ""


@contextmanager
def _own_errors() -> Iterator[None]:
    """Turn what the kernels' floor raises into errors with a way out."""
    try:
        yield
    except (PyCudaMissing, CompilerMissing, KernelBroken) as e:
        raise KernelsUnavailable(str(e)) from e


class KernelEngine:
    """A LoopEngine on one CUDA device; see seam.py."""

    def __init__(
        self,
        network: nn.Module,
        config: DigressConfig,
        name: str = "digress",
        launcher: Launcher | None = None,
    ) -> None:
        """launcher: where kernels run; the current CUDA device when left out.

        Raises: KernelsUnavailable.
        """
        shape = kernel_shape(config)
        reason = _network_refusal(network, config)
        if reason:
            raise KernelsUnavailable(reason)
        with _own_errors():
            self._launcher = launcher or open_device(shape, torch.cuda.current_device())
        self.name, self.config, self.dtype = name, config, torch.bfloat16
        self.device = self._launcher.device
        self._network = _packed(network, shape, self.device)
        self._fits: int | None = None  # graphs at a time, once the memory was found too small

    def denoise(
        self, chain: Chain, on_step: Callable[[int], object] | None = None
    ) -> tuple[Tensor, Tensor, bool]:
        """See `LoopEngine.denoise`. A batch that doesn't fit runs in parts, with equal results."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # begin() waits for no stream
        return self.begin(lambda: chain, on_step)()

    def begin(
        self, start: Callable[[], Chain], on_step: Callable[[int], object] | None = None
    ) -> Callable[[], tuple[Tensor, Tensor, bool]]:
        """See `LoopEngine.begin`. Of a batch that doesn't fit only the last part is still running then."""
        with self._on_device(), self._launcher.apart() if isinstance(self._launcher, Device) else nullcontext():
            chain = start()
            total, steps, first = len(chain.ids), len(chain.times) - 1, 0
            parts: list[_Result] = []
            while first < total:
                part = chain.part(first, min(self._fits or total, self._room(), total - first))
                size = len(part.ids)

                def told(step: int, first: int = first, size: int = size) -> None:
                    if on_step is not None:
                        on_step((first * steps + size * step) // total)

                result = self._run(part, told)
                if result is None:
                    if size == 1:
                        raise DeviceMemoryFull(str(self.device), total, 0)
                    self._fits = size // 2
                    torch.cuda.empty_cache()
                    log.warning(
                        "%s has no memory for %d molecules at a time, trying %d", self.device, size, self._fits
                    )
                    continue
                first += size
                if first < total:
                    result.wait()
                parts.append(result)

        def finished() -> tuple[Tensor, Tensor, bool]:
            found = [part.wait() for part in parts]
            x, e = (torch.cat([f[k] for f in found]) for k in (0, 1))
            return x, e, all(int(f[2]) == 0 for f in found)

        return finished

    def _room(self) -> int:
        """Graphs at a time for which there is memory now; at least one, so that a full device is found out by trying."""
        free = self._free_bytes()
        return sys.maxsize if free is None else max(1, batch_that_fits(self._network.shape, free))

    def _free_bytes(self) -> int | None:
        """What the device and the allocator's cache have left; None for a Launcher without memory of its own."""
        if self.device.type != "cuda":
            return None
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + cached

    def logits(self, X: Tensor, E: Tensor, t: Tensor, node_mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `Engine.logits`. For comparisons: it waits for the device. Raises: ValueError if t differs in the batch."""
        times = t.unique().tolist()
        if len(times) != 1:
            raise ValueError(f"the kernels take one time a batch, not {len(times)}")
        later = bool(E.diagonal(dim1=1, dim2=2).any())  # z_T alone has no class on the diagonal
        tables = (torch.zeros(1 + later, k, k, k) for k in (X.shape[-1], E.shape[-1]))
        ids = torch.zeros(len(X), dtype=torch.int64)
        with self._on_device():
            noise = Noise(torch.tensor([*times * (1 + later), 0], dtype=torch.int32), *tables)
            batch = self._batch(noise, node_mask.sum(1), ids, 0, X.argmax(-1), E.argmax(-1))
            batch.step.fill_(int(later))
            with self._launcher.stream() if isinstance(self._launcher, Device) else nullcontext():
                batch.forward()
                return batch.logits()

    def batch(self, chain: Chain) -> Denoiser:
        """The buffers of a chain at its start. Raises: torch.OutOfMemoryError."""
        with self._on_device():
            noise = Noise(torch.tensor(chain.times, dtype=torch.int32), chain.node_tables, chain.edge_tables)
            return self._batch(noise, chain.n, chain.ids, chain.seed, chain.x, chain.e)

    def _run(self, chain: Chain, on_step: Callable[[int], object]) -> "_Result | None":
        """Queue all steps of a batch; None if there is no memory for it."""
        try:
            batch = self.batch(chain)
            denoise(batch, len(chain.times) - 1, join=False, on_step=on_step)
            return _Result(batch)
        except torch.OutOfMemoryError:
            return None

    def _batch(self, noise: Noise, n: Tensor, ids: Tensor, seed: int, x: Tensor, e: Tensor) -> Denoiser:
        batch = Denoiser(self._network, noise, n, ids, seed, self._launcher)
        batch.x.copy_(x)
        batch.e.copy_(e)
        return batch

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        on = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on, torch.inference_mode(), _own_errors():
            yield


class _Result:
    """Classes of a batch on their way to the CPU; keeps the batch alive until they are there."""

    def __init__(self, batch: Denoiser) -> None:
        self._batch: Denoiser | None = batch
        self._event: torch.cuda.Event | None = None
        on_device, device = (batch.x, batch.e, batch.not_finite), batch.launcher
        if not isinstance(device, Device):
            self._found = tuple(t.to("cpu", torch.int8) for t in on_device)
            return
        self._found = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in on_device)
        with device.stream(join=False) as stream:
            for to, t in zip(self._found, on_device, strict=True):
                to.copy_(t, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(stream)

    def wait(self) -> tuple[Tensor, ...]:
        """int8 classes x and e, and not_finite, on the CPU."""
        if self._batch is not None and self._event is not None:
            self._event.synchronize()
            device = self._batch.launcher
            assert isinstance(device, Device)
            # giving pinned memory back records an event on the stream, which ends the process during a capture
            with device.capturing:
                self._found = tuple(t.to(torch.int8) for t in self._found)
                self._batch = None
        self._batch = None
        return self._found
