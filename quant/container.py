"""One safetensors file whose bytes are a function of its content, and whose every byte is checked when it is
read.

Guarantees: equal content gives equal bytes (the public writer orders metadata at random); a file with any
byte changed, added or missing is refused, the JSON header's own spelling included; nothing of the file is
executed; a crash while writing leaves the old file or none. Any safetensors reader can read what is written
here.
Knows nothing of: what the tensors and the metadata mean.

File: u64 header length, JSON header padded with spaces to a multiple of 8, then the tensors without gaps,
wide types first (so that each is aligned), by name within a type width. `__metadata__` holds strings; its
`digest` is the SHA-256 of the whole file with 64 zeros in its place.
Source: https://huggingface.co/docs/safetensors (format).
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bitdgdm.infra.errors import ArtifactCorrupt, ModelNotFound

_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8",
    "torch.uint16": "U16", "torch.uint8": "U8", "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
_NO_DIGEST = "0" * 64
_LONGEST_HEADER = 100_000_000  # the limit of the public reader


def write_container(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write atomically and return the digest. Raises: ValueError for a type that safetensors doesn't have."""
    data = bytearray()
    header: dict[str, Any] = {}
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        tensor = tensors[name].detach().cpu().contiguous()
        if str(tensor.dtype) not in _DTYPES:
            raise ValueError(f"tensor {name} has type {tensor.dtype}, which safetensors can't hold")
        begin = len(data)
        data += tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        kind, span = _DTYPES[str(tensor.dtype)], [begin, len(data)]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": span}
    header["__metadata__"] = dict(metadata) | {"digest": _NO_DIGEST}
    digest = _digest(_spell(header), data)
    header["__metadata__"]["digest"] = digest
    _write_atomically(path, _spell(header) + bytes(data))
    return digest


def read_metadata(path: Path) -> dict[str, str]:
    """The strings of `__metadata__`, unchecked; reads no tensor. Raises: ModelNotFound, ArtifactCorrupt."""
    with _open(path) as file:
        length = int.from_bytes(file.read(8), "little")
        return _parse(path, file.read(min(length, _LONGEST_HEADER)), length)["__metadata__"]


def read_container(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata, once every byte is checked. Raises: ModelNotFound, ArtifactCorrupt."""
    with _open(path) as file:
        content = file.read()
    length = int.from_bytes(content[:8], "little")
    header = _parse(path, content[8 : 8 + length], length)
    metadata = header["__metadata__"]
    digest = metadata.get("digest")
    blank = dict(header) | {"__metadata__": metadata | {"digest": _NO_DIGEST}}
    try:
        canonical = _spell(header) == content[: 8 + length]
    except (ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise ArtifactCorrupt(str(path), "its header isn't spelled as it was written")
    found = _digest(_spell(blank), content[8 + length :])
    if found != digest:
        raise ArtifactCorrupt(
            str(path), f"its content has digest {found[:12]}, its header says {str(digest)[:12]}"
        )
    try:
        return safetensors.torch.load(content), metadata
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ArtifactCorrupt(str(path), f"its tensors don't fit its header ({error})") from error


def _parse(path: Path, raw: bytes, length: int) -> dict[str, Any]:
    if len(raw) < length or length < 2:
        raise ArtifactCorrupt(str(path), f"it ends inside its header of {length} bytes")
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactCorrupt(str(path), f"its header isn't JSON ({error})") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactCorrupt(str(path), "its header has no metadata")
    return header


def _open(path: Path) -> Any:
    try:
        return open(path, "rb")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ModelNotFound(str(path), "there is no such file") from error


def _spell(header: dict[str, Any]) -> bytes:
    text = json.dumps(
        header, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(head: bytes, data: bytes | bytearray) -> str:
    sha = hashlib.sha256(head)
    sha.update(data)
    return sha.hexdigest()


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
