"""Bytes under a URL: a local folder, memory, or a bucket.

Guarantees: a `Store` is a value (its URL) and works in any process; readers never see half an object;
`create` has exactly one winner; errors are StorageRefused, StorageUnavailable or FileNotFoundError.
Knows nothing of: campaigns and records. Credentials, endpoint and region are the standard AWS_* variables.
"""

import functools
import os
import random
import re
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bitdgdm.infra import disk
from bitdgdm.infra.errors import CreateOnlyUnsupported, StorageRefused, StorageUnavailable
from bitdgdm.infra.storage_errors import s3_status, translate, typed

_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
_CONFLICT_TRIES = 8
_PARTIAL_AGE_S = 3600.0
_memory_lock = threading.Lock()


@dataclass(frozen=True)
class Store:
    """Objects under `url`, an absolute local path or <protocol>://<place>; make one with `open_store`."""

    url: str

    def path(self, key: str) -> str:
        """Return the full path or URL of `key`, for people and other programs."""
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"storage key {key!r} leaves its store")
        return f"{self.url.rstrip('/')}/{key}" if key else self.url

    def read(self, key: str) -> bytes:
        """Raises: FileNotFoundError if there is no such object."""
        with typed(self.path(key)):
            if self._local:
                return self._file(key).read_bytes()
            if self.url.startswith("s3://"):  # more than one at a time would ask for the size first
                return self._fs.cat_file(self.path(key), max_concurrency=1)
            return self._fs.cat_file(self.path(key))

    def write(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, over what is there."""
        with typed(self.path(key), writing=True):
            if self._local:
                disk.replace(self._file(key), data)
            else:
                self._fs.pipe_file(self.path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Store `data` under `key` unless it exists; False if it does.

        A network client repeats a put whose answer was lost, so False can also mean that this very call made
        the object: who must know puts an own id into `data` and reads it back.
        Raises: StorageUnavailable if the outcome is unknown.
        """
        with typed(self.path(key), writing=True):
            if self._local:
                return disk.create(self._file(key), data)
            if self.url.startswith("memory://"):
                with _memory_lock:  # fsspec looks first and writes then
                    return self._create_remote(key, data)
            return self._create_remote(key, data)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return {key: size} of the objects whose key starts with `prefix`, in key order; one listing."""
        with typed(self.path(prefix)):
            if self._local:
                return dict(sorted(disk.walk(Path(self.url), prefix)))
            try:
                found = self._fs.find(self.url, detail=True, prefix=prefix)
            except FileNotFoundError as error:
                if s3_status(error) is not None:
                    raise  # a missing bucket is not an empty one
                return {}
            root = self._fs._strip_protocol(self.url).rstrip("/") + "/"
            files = {name.removeprefix(root): info for name, info in found.items() if info["type"] == "file"}
            return {key: files[key]["size"] for key in sorted(files) if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        """Remove `key`; a missing object is fine."""
        with typed(self.path(key)):
            try:
                if self._local:
                    self._file(key).unlink(missing_ok=True)
                else:
                    self._fs.rm_file(self.path(key))
            except FileNotFoundError as error:
                if isinstance(translate(self.path(key), error), StorageRefused):
                    raise

    def exists(self, key: str) -> bool:
        return key in self.list(key)  # a HEAD would answer a bare 403 or 404, without the reason

    def open_input(self, key: str) -> BinaryIO:
        """Open `key` for random reads, as pyarrow wants it. Raises: FileNotFoundError."""
        with typed(self.path(key)):
            return self._file(key).open("rb") if self._local else self._fs.open(self.path(key), "rb")

    def remove_partials(self) -> None:
        """Delete what killed writers left behind long ago; only a disk has such files."""
        if self._local:
            with typed(self.url):
                disk.remove_partials(Path(self.url), _PARTIAL_AGE_S)

    def _create_remote(self, key: str, data: bytes) -> bool:
        for retry in range(_CONFLICT_TRIES):
            try:
                self._fs.pipe_file(self.path(key), data, mode="create")
                return True
            except FileExistsError:
                return False
            except OSError as error:
                status = s3_status(error)
                if status == 412:  # s3fs knows AWS's wording of it, not that of every S3 service
                    return False
                if status != 409:
                    raise
                time.sleep(random.uniform(0, 0.05 * 2**retry))  # another put of this key is under way
        raise StorageUnavailable(self.path(key), "another put of this object stays under way (409)")

    @property
    def _local(self) -> bool:
        return self.url.startswith("/")

    def _file(self, key: str) -> Path:
        return Path(self.path(key))

    @property
    def _fs(self) -> Any:
        return _filesystem(self.url.partition("://")[0], _environment())


def open_store(url: str | os.PathLike[str]) -> Store:
    """Return the store at `url`: a local path, file://, memory://, s3://bucket/folder, or any fsspec URL.

    A bucket is asked once, so a wrong name or credential shows here; a folder is made by its first write.
    Raises: StorageRefused, StorageUnavailable.
    """
    text = os.fspath(url)
    protocol, separator, place = text.partition("://")
    nowhere = separator and not place.strip("/") and protocol != "memory"
    if not text or nowhere or re.match(r"[a-z0-9]{2,}:/(?!/)", text):
        raise StorageRefused(text or "''", "this is not a path or URL", "Give a folder or s3://bucket/folder")
    if not separator or protocol == "file":
        local = Path(place if separator else text).expanduser()
        return Store(os.path.abspath(local))
    store = Store(f"{'s3' if protocol == 's3a' else protocol}://{place.strip('/')}")
    with typed(store.url):
        try:
            fs = store._fs
        except (ImportError, ValueError) as error:
            fix = "Install the fsspec package for it, or give a folder or s3://bucket/folder"
            raise StorageRefused(text, f"no file system for {protocol}:// is installed", fix) from error
        if store.url.startswith("s3://"):
            bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
            fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
    return store


def probe_create_only(store: Store) -> None:
    """Create one object twice; the second must fail and change nothing. Leaves no object behind.

    Raises: CreateOnlyUnsupported; StorageRefused or StorageUnavailable if nothing can be written.
    """
    key = f"_probe-{uuid.uuid4().hex}"
    try:
        first, second = store.create(key, b"first"), store.create(key, b"second")
        if not first or second or store.read(key) != b"first":
            raise CreateOnlyUnsupported(store.url)
    except StorageRefused as error:
        if error.__cause__ is not None and s3_status(error.__cause__) == 501:  # "header not implemented"
            raise CreateOnlyUnsupported(store.url) from error
        raise
    finally:
        store.delete(key)


def _environment() -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in _VARIABLES)


@functools.lru_cache(maxsize=8)
def _filesystem(protocol: str, environment: tuple[str | None, ...]) -> Any:
    """Return the fsspec file system for `protocol`; another environment is another file system."""
    import fsspec

    if protocol != "s3":
        return fsspec.filesystem(protocol)
    endpoint = environment[0] or environment[1]
    if endpoint and not re.match(r"https?://[^/]", endpoint):
        raise StorageRefused(
            "s3://", f"AWS_ENDPOINT_URL={endpoint} is not a URL", "Set it like http://127.0.0.1:9000"
        )
    config: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 60}
    if "AWS_MAX_ATTEMPTS" not in os.environ and "AWS_RETRY_MODE" not in os.environ:
        config["retries"] = {"mode": "standard", "total_max_attempts": 4}
    return fsspec.filesystem(
        "s3", endpoint_url=endpoint, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True
    )
