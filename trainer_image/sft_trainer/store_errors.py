"""What an object store's refusal means for the person who runs the job: its own words, and what to do about it.

The stores' clients tell their errors apart only in part (a missing bucket and a missing object share a type, a full
disk and a refused connection too), so the words are read. Nothing here talks to a store.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sft_api.run import ExitCode, RunError

MAX_WORDS = 400
_MISSING_OBJECT = ("NoSuchKey", "BlobNotFound", "NotFound")


@dataclass(frozen=True)
class _Refusal:
    """Words by which a refusal is known, and the advice for it."""

    words: re.Pattern[str]
    advice: str


def _refusal(words: str, advice: str) -> _Refusal:
    return _Refusal(re.compile(words, re.IGNORECASE), advice)


# The first that matches counts. Status codes stand last: they say least.
_REFUSALS = (
    _refusal(
        r"NoSuchBucket|ContainerNotFound|specified bucket does not exist",
        "The bucket does not exist: create it, or correct the URI.",
    ),
    _refusal(
        r"169\.254\.169\.254|metadata\.google\.internal|Account must be specified|no credentials|missing credentials",
        "No credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (S3), "
        "GOOGLE_APPLICATION_CREDENTIALS (GCS) or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (Azure) "
        "in the environment; profiles in ~/.aws are not read.",
    ),
    _refusal(
        r"InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|TokenRefreshRequired|"
        r"AuthenticationFailed|invalid_grant|RequestTimeTooSkewed|UserNotFound",
        "The credentials are wrong or have expired: check the keys in the environment, and this machine's clock.",
    ),
    _refusal(
        r"No space left on device|Disk quota exceeded|os error (28|122)\b|QuotaExceeded|InsufficientStorage",
        "The disk or quota is full: free some space, or keep fewer checkpoints (spec.checkpoints.keep).",
    ),
    _refusal(
        r"Read-only file system|os error 30\b",
        "The file system is read-only: choose a folder that can be written.",
    ),
    _refusal(
        r"Permission denied|Operation not permitted|os error (1|13)\b",
        "This user may not do that there: change the folder's permissions, or choose another.",
    ),
    _refusal(
        r"Not a directory|Is a directory|os error (17|20|21)\b",
        "A file stands where a folder is needed, or a folder where a file is: choose another folder.",
    ),
    _refusal(
        r"AccessDenied|AllAccessDisabled|MethodNotAllowed|AuthorizationFailure|does not have .* access",
        "The store refused: the credentials need to read, write, list and delete under this prefix.",
    ),
    _refusal(
        r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint",
        "The bucket lives in another region or behind another endpoint: set AWS_REGION or AWS_ENDPOINT_URL.",
    ),
    _refusal(
        r"invalid peer certificate|certificate verify|UnknownIssuer",
        "The endpoint's certificate is not trusted on this machine.",
    ),
    _refusal(
        r"status code: (400|401|403|405)",
        "The store refused the request: check credentials, permissions and endpoint.",
    ),
)
_UNREACHABLE = (
    "The store could not be reached, or did not answer, for as long as it was tried: "
    "check the endpoint and the network; the same command goes on from the newest checkpoint."
)


class Outage(RunError):
    """The store could not be reached for as long as a request was tried: it may come back."""

    def __init__(self, message: str, path: str | None = None):
        super().__init__(ExitCode.STORE_UNAVAILABLE, message, path)


def own_words(error: BaseException) -> str:
    """The store's words in one line: what its client wraps around them for debugging is cut, and XML reduced."""
    text = str(error).split("\n\nDebug source")[0]
    code, message = re.search(r"<Code>(.*?)</Code>", text), re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    if code:
        text = text.split("<?xml")[0].split("<Error")[0].rstrip(": ") + f": {code[1]}"
        text += f" ({message[1]})" if message and message[1] else ""
    text = " ".join(text.split())
    return text if len(text) <= MAX_WORDS else text[:MAX_WORDS] + " …"


def is_missing_object(error: FileNotFoundError) -> bool:
    """Whether a "not found" is about the object; stores say it of buckets and of users too."""
    code = re.search(r"<Code>(.*?)</Code>", str(error))
    return code[1] in _MISSING_OBJECT if code else "bucket does not exist" not in str(error)


def as_run_error(error: BaseException, doing: str, path: str | None, *, refused: bool = False) -> RunError:
    """The RunError for a store's error while `doing` ("writing s3://b/k"): refused for good, or unavailable.

    `refused`: the client itself knows it for a refusal. Else the words decide; words not known are taken for an
    outage, which is retried, rather than for a refusal, which is not.
    """
    words = own_words(error)
    for refusal in _REFUSALS:
        if refusal.words.search(str(error)):
            return RunError(ExitCode.STORE_REFUSED, f"{doing}: {words}. {refusal.advice}", path)
    if refused:
        advice = "The store refused: check the URI, credentials and permissions."
        return RunError(ExitCode.STORE_REFUSED, f"{doing}: {words}. {advice}", path)
    return Outage(f"{doing}: {words}. {_UNREACHABLE}", path)
