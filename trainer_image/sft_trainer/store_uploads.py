"""Multipart uploads that were begun on s3:// and never ended. obstore can neither list nor abort them.

What a killed writer had uploaded of an object is in no listing and is paid for, until somebody aborts it. Two plain
requests, signed with the keys of the environment (AWS Signature Version 4).
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

REQUEST_SECONDS = 30.0
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Upload:
    """An upload that is under way, or was left behind. `begun` is the store's clock, cut to the second."""

    key: str
    id: str
    begun: datetime


@dataclass(frozen=True)
class Bucket:
    """A bucket and the keys to it. `url`: with the bucket's name as its path, as obstore has it by default."""

    url: str
    region: str
    access_key: str
    secret_key: str
    token: str

    @classmethod
    def of(cls, name: str, environment: Mapping[str, str]) -> Bucket | None:
        """The bucket as the environment shows it to obstore; None where the keys are not in the environment."""

        def first(*variables: str) -> str:
            return next((environment[variable] for variable in variables if environment.get(variable)), "")

        access_key, secret_key = first("AWS_ACCESS_KEY_ID"), first("AWS_SECRET_ACCESS_KEY")
        if not access_key or not secret_key:
            return None
        region = first("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
        endpoint = first("AWS_ENDPOINT_URL", "AWS_ENDPOINT") or f"https://s3.{region}.amazonaws.com"
        token = first("AWS_SESSION_TOKEN", "AWS_TOKEN")
        return cls(f"{endpoint.rstrip('/')}/{name}", region, access_key, secret_key, token)

    def end_uploads(self, prefix: str, begun_before: datetime, page_size: int = 1000) -> int:
        """Abort the uploads to keys that begin with `prefix`, if they began earlier; their number.

        A second is as fine as stores tell when an upload began. OSError with the store's words where it refuses.
        """
        ended: set[str] = set()
        while stale := [
            upload
            for upload in self.uploads(prefix, page_size)
            if upload.begun < begun_before.replace(microsecond=0) and upload.id not in ended
        ]:
            for upload in stale:
                self._abort(upload)
                ended.add(upload.id)
        return len(ended)

    def uploads(self, prefix: str, most: int = 1000) -> list[Upload]:
        """The first so many uploads to keys that begin with `prefix`. OSError with the store's words."""
        answer = self._request("GET", "", {"uploads": "", "prefix": prefix, "max-uploads": str(most)})
        try:
            return [_upload(found) for found in ElementTree.fromstring(answer).iterfind("{*}Upload")]
        except (ElementTree.ParseError, ValueError) as error:
            raise OSError(f"this is no list of uploads ({error}): {answer[:200]!r}") from error

    def _abort(self, upload: Upload) -> None:
        try:
            self._request("DELETE", upload.key, {"uploadId": upload.id})
        except OSError as error:
            if "NoSuchUpload" not in str(error):  # it has ended since
                raise

    def _request(self, method: str, key: str, query: Mapping[str, str]) -> bytes:
        url = f"{self.url}/{quote(key)}".rstrip("/")
        parameters = urlencode(sorted(query.items()), quote_via=quote, safe="")
        headers = self._sign(method, url, parameters, datetime.now(UTC))
        request = urllib.request.Request(f"{url}?{parameters}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                words = error.read().decode(errors="replace")
            raise OSError(f"Server returned non-2xx status code: {error.code} {error.reason}: {words}") from error
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def _sign(self, method: str, url: str, parameters: str, now: datetime) -> dict[str, str]:
        """The headers of a request without a body."""
        parts = urlsplit(url)
        headers = {
            "host": parts.netloc,
            "x-amz-content-sha256": _EMPTY_SHA256,
            "x-amz-date": f"{now:%Y%m%dT%H%M%SZ}",
            **({"x-amz-security-token": self.token} if self.token else {}),
        }
        names = ";".join(headers)  # in alphabetical order already
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        request = "\n".join([method, parts.path, parameters, lines, names, _EMPTY_SHA256])
        scope = f"{now:%Y%m%d}/{self.region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        key = f"AWS4{self.secret_key}".encode()
        for step in [*scope.split("/"), f"AWS4-HMAC-SHA256\n{headers['x-amz-date']}\n{scope}\n{digest}"]:
            key = hmac.digest(key, step.encode(), "sha256")
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
        )
        return headers


def _upload(element: ElementTree.Element) -> Upload:
    begun = datetime.fromisoformat(_text(element, "Initiated")).replace(microsecond=0)
    return Upload(_text(element, "Key"), _text(element, "UploadId"), begun)


def _text(element: ElementTree.Element, name: str) -> str:
    return element.findtext(f"{{*}}{name}") or ""
