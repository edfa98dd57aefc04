"""An S3-compatible bucket as a store, through s3fs: its error codes, time-outs and conditional writes."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

from aiobotocore.session import AioSession
from s3fs import S3FileSystem

from capsfusion_ray.storage.base import FAULTS, StoredFile, StoreRefused, other_error

S3_CONNECT_TIMEOUT_S = (
    5  # a healthy store answers in milliseconds; an address without a server should cost seconds, not minutes
)
S3_READ_TIMEOUT_S = (
    20  # between two packets, not for a whole object: a stalled connection is closed and the request repeated
)
# Attempts of botocore; s3fs repeats these 5 times. So 25 requests in about 40 s: at 30% of 503s, 20 of 20 calls succeeded.
S3_ATTEMPTS = 5
SHORT_ATTEMPTS = 5  # of a GET with fewer bytes than the object has: a proxy cut it and declared it complete
CONFLICT_ATTEMPTS = 6  # of a conditional PUT with answer 409: another writer writes the object now; S3 asks to repeat

S3_OPTIONS = ("endpoint_url", "key", "secret", "token", "region", "anon", "profile")


class S3Backend:
    """A bucket and a prefix, through s3fs. Every write is one PUT: radosgw ignores the conditions of multipart uploads."""

    conditional_put = True
    _bare_etags = False  # True for a store that wants If-Match without quotes

    def __init__(self, root: str, options: Mapping[str, str]) -> None:
        unknown = sorted(options.keys() - set(S3_OPTIONS))
        if unknown:
            raise StoreRefused(f"{root}: unknown storage option {unknown[0]!r}; s3 takes {', '.join(S3_OPTIONS)}")
        self.bucket, _, self.prefix = root.removeprefix("s3://").partition("/")
        given = {k: v for k, v in options.items() if k in ("endpoint_url", "key", "secret", "token") and v}
        self.endpoint = options.get("endpoint_url", "") or "AWS"
        self.fs = S3FileSystem(
            **given,
            session=_session(tuple(sorted(options.items()))),
            anon=options.get("anon", "").lower() in ("true", "1", "yes"),
            client_kwargs={"region_name": options["region"]} if options.get("region") else {},
            config_kwargs={
                "connect_timeout": S3_CONNECT_TIMEOUT_S,
                "read_timeout": S3_READ_TIMEOUT_S,
                "retries": {"mode": "legacy", "max_attempts": S3_ATTEMPTS - 1},  # botocore counts the repeats only
                "request_checksum_calculation": "when_required",  # radosgw answers 411 to the default, which is chunked
                "response_checksum_validation": "when_required",
            },
            use_listings_cache=False,  # other processes write here; a cached listing would hide commits
            # One GET per object. With several, s3fs leaves zeros where a piece is too short, and does not repeat it.
            max_concurrency=1,
        )

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self.prefix, path) if part)

    def list(self, prefix: str) -> Iterator[StoredFile]:
        key = self._key(prefix)
        token: dict[str, str] = {}
        while True:
            page = self.fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=key, **token)
            for item in page.get("Contents", ()):
                under = not key or item["Key"] == key or item["Key"].startswith(key + "/")
                if under and not item["Key"].endswith(
                    "/"
                ):  # consoles mark an empty folder by a name that ends with "/"
                    path = item["Key"][len(self.prefix) + 1 if self.prefix else 0 :]
                    yield StoredFile(path, item["Size"], item["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _head(self, path: str) -> tuple[int, str] | None:
        try:
            head = self.fs.call_s3("head_object", Bucket=self.bucket, Key=self._key(path))
        except OSError as error:
            if _s3_code(error) in ("404", "NoSuchKey", "NotFound"):
                return None
            raise
        return head["ContentLength"], head["ETag"].strip('"')

    def exists(self, path: str) -> bool:
        return self._head(path) is not None

    def get(self, path: str) -> tuple[bytes, str]:
        before, short = self._head(path), 0
        while before is not None:
            data = self.fs.cat_file(f"{self.bucket}/{self._key(path)}")
            after = self._head(path)
            if before == after:  # the object was not replaced meanwhile: the bytes belong to the etag
                if len(data) == before[0]:
                    return data, before[1]
                short += 1
                if short == SHORT_ATTEMPTS:
                    raise OSError(f"only {len(data)} of its {before[0]} bytes arrived, {short} times in a row")
            before = after
        raise FileNotFoundError(path)

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        return bytes(self.fs.cat_file(f"{self.bucket}/{self._key(path)}", start=start, end=stop))

    def put(self, path: str, data: bytes) -> str:
        answer = self.fs.call_s3("put_object", Bucket=self.bucket, Key=self._key(path), Body=data)
        return str(answer["ETag"]).strip('"')

    def put_if_absent(self, path: str, data: bytes) -> str | None:
        return self._put_if(path, data, IfNoneMatch="*")

    def put_if_match(self, path: str, data: bytes, etag: str) -> str | None:
        put = self._put_if(path, data, IfMatch=etag if self._bare_etags else f'"{etag}"')
        if put is None and not self._bare_etags:
            head = self._head(path)
            if head is not None and head[1] == etag:
                # Refused although the etag is this one: radosgw 16 compares it together with the quotes that HTTP needs.
                put = self._put_if(path, data, IfMatch=etag)
                self._bare_etags = put is not None
        return put

    def _put_if(self, path: str, data: bytes, **condition: str) -> str | None:
        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                put = self.fs.call_s3("put_object", Bucket=self.bucket, Key=self._key(path), Body=data, **condition)
                return str(put["ETag"]).strip('"')
            except OSError as error:
                code = _s3_code(error)
                if code in ("ConditionalRequestConflict", "409") and attempt + 1 < CONFLICT_ATTEMPTS:
                    time.sleep(0.1 * 2**attempt)
                elif code in ("PreconditionFailed", "412"):
                    return self._etag_if_ours(path, data)
                elif code in ("NoSuchKey", "404") and "IfMatch" in condition:
                    return None
                else:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _etag_if_ours(self, path: str, data: bytes) -> str | None:
        """The etag if the object holds `data`: a PUT whose answer was lost is repeated by the client, and the repeat is refused."""
        head = self._head(path)
        if head is None or head[0] != len(data):
            return None
        try:
            stored, etag = self.get(path)
        except FileNotFoundError:  # deleted meanwhile; another writer was first all the same
            return None
        return etag if stored == data else None

    def delete(self, path: str) -> None:
        self.fs.call_s3("delete_object", Bucket=self.bucket, Key=self._key(path))

    def open_input(self, path: str, sequential: bool) -> Any:
        # A Parquet reader asks for exact ranges, so a cache would only fetch more. A stream reads ahead: one request per block.
        cache, block = ("readahead", 16 << 20) if sequential else ("none", 5 << 20)
        return self.fs.open(f"{self.bucket}/{self._key(path)}", "rb", cache_type=cache, block_size=block)

    def explain(self, error: Exception, action: str, url: str) -> Exception:
        where = f"{url}: cannot {action} it at {self.endpoint}"
        code = _s3_code(error)
        if code == "NoSuchBucket":
            return StoreRefused(
                f"{where}: bucket {self.bucket!r} does not exist; create it, or correct the path or endpoint_url"
            )
        if code in (
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "ExpiredToken",
            "InvalidToken",
            "AuthorizationHeaderMalformed",
            "400",  # any of these, as the answer to HEAD, which has no body
        ):
            return StoreRefused(
                f"{where}: credentials not accepted ({code}); check storage key and secret, or AWS_* and region"
            )
        if _caused_by(error, "NoCredentialsError", "PartialCredentialsError"):
            return StoreRefused(
                f"{where}: no credentials; give storage key and secret, set AWS_*, or input.storage.anon=true to read"
            )
        if code == "403":  # the answer to HEAD, which has no body: wrong credentials or no permission
            return StoreRefused(f"{where}: access denied (403); check storage key and secret, and their permissions")
        if code in ("AccessDenied", "Forbidden", "AllAccessDisabled"):
            return StoreRefused(f"{where}: access denied ({code}); these credentials need permission to {action} here")
        if code == "NotImplemented":
            return StoreRefused(f"{where}: the store has no conditional writes ({error}); use one that has them")
        return other_error(error, action, url, f" at {self.endpoint}")


@functools.cache
def _session(options: tuple[tuple[str, str], ...]) -> AioSession:
    """One session for all stores of a process with these options: s3fs then shares one client, which costs a second of CPU."""
    session = AioSession(profile=dict(options).get("profile") or None)
    session.register("needs-retry.s3", _note_fault)
    return session


def _note_fault(response: Any = None, caught_exception: Exception | None = None, **_: Any) -> None:
    """botocore asks its listeners after every request whether to repeat it; this one only counts the failed requests."""
    if caught_exception is not None:
        FAULTS.note(type(caught_exception).__name__)
    elif response is not None and (status := response[0].status_code) >= 429:
        FAULTS.note(str(status))


def _s3_code(error: BaseException | None) -> str:
    """The store's error code, or nothing. s3fs raises OSErrors, with botocore's ClientError as their cause."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _caused_by(error: BaseException | None, *names: str) -> bool:
    while error is not None:
        if type(error).__name__ in names:
            return True
        error = error.__cause__ or error.__context__
    return False
