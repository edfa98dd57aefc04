"""What the job builds its promise on, asked of a real object store: conditions on single PUTs, whole objects, listings that go on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import ClientError
from moto_server import client, options
from proxy import FaultProxy

from capsfusion_ray.storage import Store

WRITERS = 16
OBJECTS = 1_001  # one more than an answer to a listing holds
LARGE = 20 << 20  # of 5 or 8 MiB on, S3 clients cut an object into parts unless they are told not to


def test_a_single_put_whose_condition_does_not_hold_is_answered_412(ceph: str, bucket: str) -> None:
    s3 = client("s3", ceph)
    first = s3.put_object(Bucket=bucket, Key="k", Body=b"first", IfNoneMatch="*")["ETag"]
    # Even the right etag, because it stands in quotes: radosgw 16 wants it bare, and Store finds out.
    for condition in ({"IfNoneMatch": "*"}, {"IfMatch": "0123456789abcdef0123456789abcdef"}, {"IfMatch": first}):
        with pytest.raises(ClientError) as error:
            s3.put_object(Bucket=bucket, Key="k", Body=b"second", **condition)
        assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"first"
    s3.put_object(Bucket=bucket, Key="k", Body=b"second", IfMatch=first.strip('"'))
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"second"


def test_of_many_writers_at_once_one_wins(store: Store) -> None:
    """Both of a commit and of a compare-and-swap."""
    for number in range(5):
        with ThreadPoolExecutor(WRITERS) as pool:
            won = list(pool.map(lambda i, path=f"unit-{number}": store.put_if_absent(path, b"%d" % i), range(WRITERS)))
        assert won.count(True) == 1
        before, etag = store.get_with_etag(f"unit-{number}") or (b"", "")
        assert before == b"%d" % won.index(True)
        with ThreadPoolExecutor(WRITERS) as pool:
            swapped = list(
                pool.map(
                    lambda i, path=f"unit-{number}", etag=etag: store.put_if_match(path, b"new %d" % i, etag),
                    range(WRITERS),
                )
            )
        winner = [i for i, etag in enumerate(swapped) if etag]
        assert len(winner) == 1
        assert store.get(f"unit-{number}") == b"new %d" % winner[0]


def test_a_large_object_is_one_put_because_of_several_parts_the_condition_is_ignored(
    ceph: str, bucket: str, store: Store
) -> None:
    s3 = client("s3", ceph)
    large = bytes(range(256)) * (LARGE // 256)
    assert store.put_if_absent("large", large)
    assert not store.put_if_absent("large", large[::-1])
    assert store.get("large") == large
    key = f"{store.root.partition(bucket + '/')[2]}/large"
    assert "-" not in s3.head_object(Bucket=bucket, Key=key)["ETag"], "one PUT: its etag counts no parts"
    upload = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"in parts")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s3.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*")
    assert store.get("large") == b"in parts", "the day this fails, Ceph honours it, and storage/s3.py may say so"


def test_a_listing_is_paged(ceph: str, proxy: FaultProxy, store: Store) -> None:
    wanted = [f"many/{number:05d}" for number in range(OBJECTS)]
    uncounted = Store(store.root, options(ceph))
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(lambda path: uncounted.put(path, b""), wanted))
    proxy.done.clear()
    assert [file.path for file in store.list("many")] == wanted
    assert proxy.done == {("pass", "ListObjects"): 2}
