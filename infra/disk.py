"""Files on a local or mounted disk that are whole or absent.

Guarantees: a reader never sees half a file; `create` has exactly one winner, also between hosts on NFS; what
returned is on the disk (file and folder are fsynced), so a commit record never outlives the shard it names.
Knows nothing of: campaigns, URLs, object stores.
"""

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".partial"


def replace(path: Path, data: bytes) -> None:
    """Write `data` to `path`, over whatever is there."""
    with _written_beside(path, data) as temp:
        os.replace(temp, path)
    _sync_folder(path.parent)


def create(path: Path, data: bytes) -> bool:
    """Write `data` to `path` unless it exists. Returns whether this call made the file.

    Raises: OSError with errno EPERM or ENOTSUP on a file system without hard links.
    """
    with _written_beside(path, data) as temp:
        try:
            os.link(temp, path)  # unlike rename, link fails when the name is taken
            created = True
        except FileExistsError:
            # NFS repeats a request whose answer was lost and then reports the link it made itself as taken
            created = temp.stat().st_nlink == 2
    if created:
        _sync_folder(path.parent)
    return created


def walk(root: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield (key, size) of the files whose path below `root` starts with `prefix`; unfinished ones don't."""
    folder = root / prefix.rpartition("/")[0]
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            key = path.relative_to(root).as_posix()
            if not key.startswith(prefix) or name.endswith(_SUFFIX):
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                yield key, path.stat().st_size


def remove_partials(root: Path, older_than_s: float) -> int:
    """Delete what killed writers left below `root`; a younger file may have a living one. Returns how many."""
    removed, oldest = 0, time.time() - older_than_s
    for parent, _, names in os.walk(root):
        for path in (Path(parent, name) for name in names if name.endswith(_SUFFIX)):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    removed += 1
    return removed


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """Hold `data`, synced, in a hidden file beside `path`: one file system, so link and rename are atomic."""
    _make_folder(path.parent)
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_SUFFIX}")
    try:
        with temp.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temp
    finally:
        temp.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)  # or a power cut takes the folder, but not the record of a file in it


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts can't sync a folder
            raise
    finally:
        os.close(descriptor)
