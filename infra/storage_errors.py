"""From the errors of disks, s3fs and botocore to two kinds: it can't work (StorageRefused), or not now.

Guarantees: inside `typed(url)` only StorageRefused, StorageUnavailable and FileNotFoundError (no such object)
leave a storage call; each is one line. S3 speaks by HTTP status and error code, never by message text.
Knows nothing of: what was being read or written.
"""

import contextlib
import errno
from collections.abc import Iterator

from bitdgdm.infra.errors import BitDGDMError, StorageRefused, StorageUnavailable

_CREDENTIALS = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE"
_REGION = "Set AWS_REGION to the region of the bucket"
_FOLDER = "Give a folder that you may write to"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.ENOTSUP, errno.EMLINK, errno.EXDEV)
_BUSY_STATUS = (408, 429, 500, 502, 503, 504)
_WRONG_REGION = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")


@contextlib.contextmanager
def typed(url: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what a file system raises into the project's errors. writing: no object needs to be there."""
    try:
        yield
    except BitDGDMError:
        raise
    except _faults() as error:
        translated = translate(url, error)
        if writing and isinstance(translated, FileNotFoundError):
            translated = StorageRefused(url, "nothing can be written there", _FOLDER)
        raise translated from error


def translate(url: str, error: BaseException) -> BaseException:
    """Return the typed error for `error`; FileNotFoundError of an object stays what it is."""
    if s3_status(error) is not None:
        return _from_s3(url, error)
    name, reason = type(error).__name__, _one_line(error)
    if isinstance(error, NotImplementedError):
        return StorageRefused(url, "this kind of store can't do that", "Give a folder or s3://bucket/folder")
    if isinstance(error, FileNotFoundError | IsADirectoryError):
        return FileNotFoundError(errno.ENOENT, "no such object", url)
    if name in _CREDENTIAL_FAULTS:
        return StorageRefused(url, reason, _CREDENTIALS)
    if name == "ParamValidationError":
        return StorageRefused(url, reason, "Give a bucket and a path: s3://bucket/folder")
    if isinstance(error, OSError) and error.errno in _FULL:
        return StorageUnavailable(url, reason, "Free some space there, then repeat")
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return StorageRefused(url, reason, _FOLDER)
    if isinstance(error, OSError) and error.errno in _NO_LINKS:
        return StorageRefused(url, f"{reason} (no hard links)", "Use a local disk, NFS or s3:// instead")
    if url.startswith("s3://"):
        return StorageUnavailable(url, reason or name)
    return StorageUnavailable(url, reason or name, "Check the disk or mount, then repeat")


def s3_status(error: BaseException) -> int | None:
    """Return the HTTP status of an S3 answer, or None when `error` isn't one."""
    response = _response(error)
    return None if response is None else int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _from_s3(url: str, error: BaseException) -> BaseException:
    answer, status = (_response(error) or {}).get("Error", {}), s3_status(error)
    code = str(answer.get("Code", ""))
    reason = f"{code or status} ({_one_line(answer.get('Message') or error)})"
    bucket = url.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket":
        return StorageRefused(
            url, f"there is no bucket {bucket!r}", f"Correct the name, or create it: aws s3 mb s3://{bucket}"
        )
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "no such object", url)
    if code in _WRONG_REGION or status == 301:
        return StorageRefused(url, reason, _REGION)
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
        return StorageRefused(url, reason, _CREDENTIALS)
    if status in _BUSY_STATUS or status == 409 or code in ("RequestTimeout", "SlowDown"):
        return StorageUnavailable(url, reason)
    return StorageRefused(url, reason, "Check that AWS_ENDPOINT_URL is an S3 service")


def _response(error: BaseException) -> dict | None:
    for candidate in (error, error.__cause__):  # s3fs raises a Python error from the ClientError
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return None


def _one_line(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300].rstrip(".")


_CREDENTIAL_FAULTS = frozenset(
    (
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "ProfileNotFound",
        "SSOTokenLoadError",
        "UnauthorizedSSOTokenError",
        "TokenRetrievalError",
        "NoAuthTokenError",
        "InvalidConfigError",
    )
)


def _faults() -> tuple[type[BaseException], ...]:
    """The exceptions of storage; botocore and aiohttp are asked only once something went wrong."""
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    return OSError, NotImplementedError, BotoCoreError, ClientError, aiohttp.ClientError
