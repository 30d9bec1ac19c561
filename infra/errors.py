"""Every error that a user can meet, in one hierarchy.

Guarantees: each error carries its data as attributes, an exit code and whether a retry can help; its text
says what happened, the value seen and the command or change that fixes it.
Knows nothing of: how an error is printed; the command line prints `str(error)` and exits with `exit_code`.
"""

from collections.abc import Iterable
from typing import Any


def _rebuild(kind: type["BitDGDMError"], text: str, data: dict[str, Any]) -> "BitDGDMError":
    error = kind.__new__(kind, text)
    error.args = (text,)
    error.__dict__.update(data)
    return error


class BitDGDMError(Exception):
    """Base of the hierarchy. exit_code: 1 failed, 2 bad input, 3 partial, 75 try again."""

    exit_code = 1
    retryable = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception pickles as cls(*args), which no subclass with its own fields survives; Ray pickles errors
        return _rebuild, (type(self), str(self), dict(self.__dict__))


class BadInput(BitDGDMError):
    """The user gave something that can't be used; nothing was changed."""

    exit_code = 2


class Retryable(BitDGDMError):
    """The same command may work later (sysexits EX_TEMPFAIL)."""

    exit_code = 75
    retryable = True


# -- specs and campaigns ------------------------------------------------------------------------------------


class SpecInvalid(BadInput):
    """A spec file or flag doesn't fit the schema; `problems` holds one line each."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where, self.problems = where, tuple(problems)
        super().__init__(
            f"{where} is not a valid campaign spec: {'; '.join(self.problems)}. "
            "See the keys with: bitdgdm generate --help"
        )


class SpecChanged(BadInput):
    """A campaign was started under another spec; resuming would mix two campaigns in one folder."""

    def __init__(self, campaign: str, field: str, stored: object, given: object) -> None:
        self.campaign, self.field, self.stored, self.given = campaign, field, stored, given
        super().__init__(
            f"{campaign} was started with {field}={stored}, now it is {field}={given}. "
            f"Start a new campaign with another --out, or continue the stored one: "
            f"bitdgdm generate --resume {campaign}"
        )


class CampaignNotFound(BadInput):
    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(
            f"no campaign at {url} (there is no campaign.json). "
            f"Start one with: bitdgdm generate --model builtin:digress-qm9 --count 1000 --out {url}"
        )


class CampaignStuck(Retryable):
    """No unit was committed for longer than the watchdog allows."""

    def __init__(self, campaign: str, pending: int, idle_s: float) -> None:
        self.campaign, self.pending, self.idle_s = campaign, pending, idle_s
        super().__init__(
            f"no unit of {campaign} was committed for {idle_s:.0f} s while {pending} are pending. "
            f"Committed work is safe; continue with: bitdgdm generate --resume {campaign}"
        )


# -- storage ------------------------------------------------------------------------------------------------


class StorageUnavailable(Retryable):
    def __init__(
        self, url: str, reason: str, fix: str = "Check the network and AWS_ENDPOINT_URL, then repeat"
    ) -> None:
        self.url, self.reason, self.fix = url, reason, fix
        super().__init__(f"storage at {url} doesn't answer: {reason}. {fix}")


class StorageRefused(BadInput):
    """Credentials, permission or a missing bucket: a retry can't help."""

    def __init__(self, url: str, reason: str, fix: str) -> None:
        self.url, self.reason, self.fix = url, reason, fix
        super().__init__(f"storage at {url} refused the request: {reason}. {fix}")


class CreateOnlyUnsupported(BadInput):
    """The store accepted a second create of one object, so "exactly once" can't be kept there."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(
            f"storage at {url} ignores create-only puts (If-None-Match): two workers could both commit a unit. "
            "Use a store that honours them (AWS S3, MinIO, Ceph, GCS, a local disk) as --out"
        )


class CampaignPartial(BitDGDMError):
    """Some units have no commit record, so there is no manifest yet. `quarantined` are those given up on."""

    exit_code = 3

    def __init__(self, campaign: str, missing: Iterable[int], quarantined: Iterable[int]) -> None:
        self.campaign, self.missing, self.quarantined = campaign, tuple(missing), tuple(quarantined)
        super().__init__(
            f"{campaign} lacks {len(self.missing)} units ({len(self.quarantined)} of them in quarantine). "
            f"Committed work is safe; try the rest again with: bitdgdm generate --resume {campaign}"
        )


class CampaignDamaged(BitDGDMError):
    """The records of a campaign contradict each other or the files they name; nothing was changed."""

    def __init__(self, campaign: str, key: str, reason: str, fix: str) -> None:
        self.campaign, self.key, self.reason, self.fix = campaign, key, reason, fix
        super().__init__(f"{campaign}/{key} can't be trusted: {reason}. {fix}")


# -- models, artifacts, recipes -----------------------------------------------------------------------------


class UnknownRecipe(BadInput):
    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name, self.known = name, tuple(known)
        super().__init__(f"there is no recipe {name!r}. Use one of: {', '.join(self.known)}")


class ModelNotFound(BadInput):
    def __init__(self, uri: str, reason: str) -> None:
        self.uri, self.reason = uri, reason
        super().__init__(f"no model at {uri}: {reason}. See what there is with: bitdgdm models list")


class ModelMismatch(BadInput):
    """Names, shapes or dims of a checkpoint don't fit the network it claims to be."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where, self.problems = where, tuple(problems)
        shown = "; ".join(self.problems[:5]) + ("; ..." if len(self.problems) > 5 else "")
        super().__init__(
            f"{where} doesn't fit the network: {shown}. Give the model's own config.yaml with --config"
        )


class UnsafeCheckpoint(BadInput):
    """A pickled checkpoint holds more than tensors and plain values; nothing of it was executed."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"{path} can't be read safely ({reason}); nothing in it was executed. "
            "Save its state_dict as safetensors where it was made, then: "
            "bitdgdm import FILE.safetensors --config config.yaml"
        )


class ArtifactCorrupt(BadInput):
    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"{path} is not a whole artifact: {reason}. Fetch it again with: bitdgdm models pull NAME@ALIAS"
        )


class CheckpointUnreadable(BadInput):
    """A foreign checkpoint is damaged or of a kind that the importer doesn't know."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"{path} can't be read as a checkpoint: {reason}. "
            "Copy it again, or give a Lightning .ckpt, a state_dict .pt or a .safetensors file"
        )


class ArtifactTooNew(BadInput):
    def __init__(self, path: str, found: int, supported: int) -> None:
        self.path, self.found, self.supported = path, found, supported
        super().__init__(
            f"{path} has format version {found}, this code reads up to {supported}. Upgrade: pip install -U bitdgdm"
        )


class NotFinite(BadInput):
    """A weight or an activation holds NaN or infinity."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"{what} holds NaN or infinity, so it can't be quantized. Check the source checkpoint"
        )


class LogitsNotFinite(BitDGDMError):
    """A network gave NaN or infinity while sampling; nothing of the micro-batch is kept."""

    def __init__(self, engine: str, first_id: int, size: int) -> None:
        self.engine, self.first_id, self.size = engine, first_id, size
        super().__init__(
            f"{engine} gave NaN or infinity for samples {first_id} to {first_id + size - 1}. "
            "Use another recipe or precision: fp32, or check the weights with: bitdgdm models show NAME"
        )


class RegistryRefused(BadInput):
    """The registry answers, but not to this: credentials, a name it can't take, a file that isn't a registry."""

    def __init__(self, uri: str, reason: str, fix: str) -> None:
        self.uri, self.reason, self.fix = uri, reason, fix
        super().__init__(f"the MLflow registry at {uri} refused the request: {reason}. {fix}")


class RegistryUnavailable(Retryable):
    def __init__(self, uri: str, reason: str) -> None:
        self.uri, self.reason = uri, reason
        super().__init__(
            f"the MLflow registry at {uri} doesn't answer: {reason}. Check MLFLOW_TRACKING_URI, then repeat"
        )


class WorkersFailed(Retryable):
    """The pool of workers ended before the work did, for a reason outside a unit."""

    def __init__(self, campaign: str, pending: int, reason: str) -> None:
        self.campaign, self.pending, self.reason = campaign, pending, reason
        super().__init__(
            f"the workers of {campaign} stopped with {pending} units pending: {reason}. "
            f"Committed work is safe; continue with: bitdgdm generate --resume {campaign}"
        )


class LayerFailed(BitDGDMError):
    """One layer couldn't be decomposed."""

    def __init__(self, layer: str, reason: str) -> None:
        self.layer, self.reason = layer, reason
        super().__init__(
            f"layer {layer} couldn't be decomposed: {reason}. Check the source checkpoint's weight {layer}.weight"
        )


class RepairFailed(BitDGDMError):
    """The distillation after the decomposition didn't come to an end."""

    def __init__(self, recipe: str, reason: str) -> None:
        self.recipe, self.reason = recipe, reason
        super().__init__(
            f"the repair that {recipe} asks for failed: {reason}. "
            "Choose a recipe without repair, see: bitdgdm recipes"
        )


# -- kernels ------------------------------------------------------------------------------------------------


class KernelsUnavailable(BitDGDMError):
    """Our CUDA kernels were asked for by name and can't run this model on this machine."""

    def __init__(
        self, reason: str, fix: str = "Use --engine torch, or see what is missing with: bitdgdm doctor"
    ) -> None:
        self.reason, self.fix = reason, fix
        super().__init__(f"our CUDA kernels can't be used: {reason}. {fix}")


class DeviceMemoryFull(BitDGDMError):
    """The GPU has no room for a batch; `fits` graphs at a time are as many as it has room for."""

    def __init__(self, device: str, wanted: int, fits: int) -> None:
        self.device, self.wanted, self.fits = device, wanted, fits
        way_out = (
            f"{fits} fit. Use --micro-batch {fits}, or" if fits else "not even one fits. See nvidia-smi, and"
        )
        super().__init__(
            f"{device} has no memory left for {wanted} molecules at a time; {way_out} free the GPU"
        )


# -- cluster ------------------------------------------------------------------------------------------------


class ClusterUnavailable(Retryable):
    def __init__(self, address: str, reason: str) -> None:
        self.address, self.reason = address, reason
        super().__init__(
            f"the Ray cluster at {address} can't be joined: {reason}. "
            "Check RAY_ADDRESS (unset it to work on this machine alone), then repeat"
        )
