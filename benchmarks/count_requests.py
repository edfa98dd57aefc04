"""Count the requests that plan, fuse and a deep verify make to an S3 store, and compare them with the computed numbers.

    python benchmarks/count_requests.py [--rows 2e6] [--work DIR] [--seed 1] [--json FILE] [fuse settings, key=value]
        [--endpoint http://host:port --key KEY --secret SECRET]

The store is a moto server started here, or the one at --endpoint (Ceph's radosgw, MinIO): a bucket is made there, and emptied
and removed at the end. A synthetic corpus (make_corpus.py) is uploaded to it; the jobs, engine `echo`, reach it through a proxy
that counts (tests/support/proxy.py), by kind and by what lies at the key. `per_unit` says how many requests a work unit
cost: a request a row or a batch of rows would show there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import make_corpus
import pyarrow.parquet as pq
import s3_requests
from processes import end_with_children, said_by, tell

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
import moto_server
from proxy import Answer, FaultProxy, Request

SHARD_ROWS = 100_000  # on average
UNIT = "unit.captions_per_s=90"  # units as for a GPU, as in run_120m.py
TIMEOUT_S = 3600.0
KINDS = {
    "PutObject": "PUT",
    "GetObject": "GET and HEAD",
    "HeadObject": "GET and HEAD",
    "ListObjects": "LIST",
    "DeleteObject": "DELETE",
}
# What lies at a key, by the first beginning that fits.
PLACES = (
    ("corpus", "input"),
    ("output/_units", "parts"),
    ("output/_run/attempts", "notes"),
    ("output/_run/groups", "entries"),
    ("output/_run/lease", "lease"),
    ("output/progress", "progress"),
    ("output/data", "files"),
    ("output/rejected", "files"),
)


class CountingProxy(FaultProxy):
    """Injects nothing; counts every request that the store answered."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.seen: Counter[tuple[str, str]] = Counter()  # (operation, what lies there)
        self.refused: Counter[str] = Counter()  # "404 HeadObject", ...: among those above

    async def _forward(self, request: Request) -> Answer:
        answer = await super()._forward(request)
        path = unquote(urlsplit(request.line.split()[1].decode()).path)
        key = request.query["prefix"][0] if "prefix" in request.query else path.strip("/").partition("/")[2]
        place = next((name for begin, name in PLACES if key.startswith(begin)), "other")
        self.seen[request.operation, place] += 1
        if answer.status >= 400:
            self.refused[f"{answer.status} {request.operation}"] += 1
        return answer


@contextmanager
def store(endpoint: str, work: Path) -> Iterator[str]:
    if endpoint:
        yield endpoint
        return
    with moto_server.moto_server(work / "moto.log", page_keys=s3_requests.LIST_KEYS) as url:
        yield url


def upload(client: Any, bucket: str, corpus: Path) -> None:
    client.create_bucket(Bucket=bucket)
    for shard in sorted(corpus.glob("*.parquet")):
        client.upload_file(str(shard), bucket, f"corpus/{shard.name}")


def remove(client: Any, bucket: str) -> None:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for found in page.get("Contents", ()):
            client.delete_object(Bucket=bucket, Key=found["Key"])
    client.delete_bucket(Bucket=bucket)


def run_jobs(
    storage: dict[str, str], bucket: str, work: Path, settings: list[str], proxy: CountingProxy
) -> dict[str, Any]:
    """Each job's own words, seconds and requests."""
    given = json.dumps(storage)
    where = [f"input.path=s3://{bucket}/corpus", f"output.path=s3://{bucket}/output", f"output.storage={given}"]
    fuse = [
        *where,
        f"input.storage={given}",
        "source.preset=laion_coco",
        "engine.kind=echo",
        "cluster.gpus_per_actor=0",
    ]
    jobs = {
        "plan": [*fuse, UNIT, *settings],
        "fuse": [*fuse, "cluster.max_actors=1", UNIT, *settings],
        "verify": [*where[1:], "deep=true"],
    }
    found: dict[str, Any] = {}
    for name, words in jobs.items():
        began, before = time.monotonic(), Counter(proxy.seen)
        said = said_by([sys.executable, f"jobs/{name}.py", *words], work / f"{name}.log", TIMEOUT_S)
        counted = Counter(proxy.seen)
        counted.subtract(before)
        found[name] = {"said": said, "seconds": round(time.monotonic() - began, 1), "requests": +counted}
    return found


def by_kind(counted: Counter[tuple[str, str]]) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for (operation, _), number in counted.items():
        kinds[KINDS.get(operation, operation)] += number
    return dict(sorted(kinds.items()))


def compare(jobs: dict[str, Any], corpus: Path, groups: int) -> dict[str, Any]:
    row_groups = sum(pq.read_metadata(path).num_row_groups for path in corpus.glob("*.parquet"))
    units, files = jobs["plan"]["said"]["units"], jobs["verify"]["said"]["files"]
    shape = s3_requests.Shape(
        shards=len(list(corpus.glob("*.parquet"))),
        row_groups=row_groups,
        reads=min(units, row_groups),
        units=units,
        files=files,
        groups=groups,
        hours=jobs["fuse"]["seconds"] / 3600,
    )
    counted = jobs["fuse"]["requests"] + jobs["verify"]["requests"]
    places: dict[str, dict[str, int]] = {}
    for (operation, place), number in sorted(counted.items()):
        places.setdefault(place, {})[operation] = number
    return {
        "rows": jobs["fuse"]["said"]["rows"],
        "made": {"units": units, "files": files, "entries": groups, "shards": shape.shards, "row_groups": row_groups},
        "computed": s3_requests.requests(shape),
        "counted": by_kind(counted),
        "places": places,
        "plan": by_kind(jobs["plan"]["requests"]),
        "per_unit": round(sum(counted.values()) / units, 1),
        "rows_per_request": round(jobs["fuse"]["said"]["rows"]["planned"] / sum(counted.values())),
        "usd": {
            "computed": s3_requests.price(s3_requests.requests(shape)),
            "counted": s3_requests.price(by_kind(counted)),
        },
        "seconds": {name: job["seconds"] for name, job in jobs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: int(float(text)), default=2_000_000)
    parser.add_argument(
        "--work", type=Path, help="an empty or new folder for the corpus and logs; default: a temporary one"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--endpoint", default="", help="of a store that runs; default: a moto server started here")
    parser.add_argument("--key", default=moto_server.KEYS["key"])
    parser.add_argument("--secret", default=moto_server.KEYS["secret"])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("settings", nargs="*", help="passed to capsfusion fuse, e.g. unit.rows=2000")
    options = parser.parse_args()
    end_with_children()
    work = (options.work or Path(tempfile.mkdtemp(prefix="count_requests_"))).resolve()
    corpus, bucket = work / "corpus", f"count-{uuid.uuid4().hex[:12]}"
    make_corpus.make(corpus, options.rows, max(options.rows // SHARD_ROWS, 2), options.seed)
    with store(options.endpoint, work) as url, CountingProxy(url) as proxy:
        keys = {"key": options.key, "secret": options.secret}
        client = moto_server.client("s3", url, **keys)
        upload(client, bucket, corpus)
        try:
            storage = {"endpoint_url": proxy.url, "region": "us-east-1", **keys}
            jobs = run_jobs(storage, bucket, work, options.settings, proxy)
            entries = client.list_objects_v2(Bucket=bucket, Prefix="output/_run/groups/")["KeyCount"]
            found = compare(jobs, corpus, entries) | {"refused": dict(proxy.refused)}
        finally:
            remove(client, bucket)
    shutil.rmtree(corpus)
    if not options.work:
        shutil.rmtree(work)
    tell(found | {"store": "an endpoint" if options.endpoint else "moto", "settings": options.settings}, options.json)


if __name__ == "__main__":
    main()
