"""Stores that interpret S3's conditions differently: some can be used all the same, the others are refused at the start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from proxy import Answer, FaultProxy, Request

from capsfusion_ray.storage import Store, StoreRefused


class Dialect(FaultProxy):
    """A proxy that changes the header `condition` by `translated`; None: it drops the header."""

    condition = b""

    def translated(self, value: bytes) -> bytes | None:
        return None

    async def _forward(self, request: Request) -> Answer:
        headers = []
        for line in request.headers:
            name, _, value = line.partition(b":")
            if name.strip().lower() != self.condition:
                headers.append(line)
            elif (said := self.translated(value.strip())) is not None:
                headers.append(name + b": " + said)
        request.headers = headers
        return await super()._forward(request)


class LiteralEtags(Dialect):
    """As Ceph's radosgw 16, which takes the quotes as a part of the etag."""

    condition = b"if-match"

    def translated(self, value: bytes) -> bytes:
        return b'"quotes are part of it"' if value.startswith(b'"') else b'"%s"' % value


class IgnoresIfMatch(Dialect):
    condition = b"if-match"


class IgnoresIfNoneMatch(Dialect):
    condition = b"if-none-match"


class TakesNoEtag(Dialect):
    condition = b"if-match"

    def translated(self, value: bytes) -> bytes:
        return b'"never"'


@pytest.fixture
def store(request: pytest.FixtureRequest, server: str, bucket: str, options: dict[str, str]) -> Iterator[Store]:
    with request.param(server) as proxy:
        yield Store(f"s3://{bucket}/some/root", {**options, "endpoint_url": proxy.url})


@pytest.mark.parametrize("store", [LiteralEtags], indirect=True)
def test_etags_are_sent_without_quotes_to_a_store_that_wants_them_so(store: Store) -> None:
    store.check_writable("_run")
    assert store.list() == []
    first = store.put_if_match("lease", b"1", None)
    second = store.put_if_match("lease", b"2", first)
    assert second
    assert store.put_if_match("lease", b"3", first) is None, "the etag is not the object's any more"
    assert store.put_if_match("lease", b"3", second)
    assert store.get("lease") == b"3"
    assert store.put_if_match("absent", b"1", second) is None


@pytest.mark.parametrize(
    ("store", "condition"),
    [(IgnoresIfNoneMatch, "If-None-Match"), (IgnoresIfMatch, "If-Match"), (TakesNoEtag, "If-Match")],
    indirect=["store"],
)
def test_a_store_without_conditions_is_refused_and_left_clean(store: Store, condition: str) -> None:
    with pytest.raises(
        StoreRefused, match=f"the store does not follow the condition {condition} of a write; use a store that has"
    ):
        store.check_writable("_run")
    assert store.list() == []
