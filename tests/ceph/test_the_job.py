"""The whole job on a real object store: input, model and output in its bucket; killed, resumed, verified, refused."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from boto3.s3.transfer import TransferConfig
from drivers import Driver
from moto_server import client, options
from proxy import FaultProxy

from capsfusion_ray.storage import Store

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS, MODEL = ROOT / "examples/captions", ROOT / "models/capsfusion-tiny"
WRONG = "Wr0ng-s3cret-of-somebody"
PARTS = TransferConfig(multipart_threshold=1, multipart_chunksize=5 << 20)


@pytest.fixture
def uploaded(ceph: str, bucket: str) -> str:
    """The demo's captions and model, every file uploaded in parts, as tools do with large ones."""
    s3 = client("s3", ceph)
    for folder, prefix in ((CAPTIONS, "in"), (MODEL, "model")):
        for file in folder.iterdir():
            s3.upload_file(str(file), bucket, f"{prefix}/{file.name}", Config=PARTS)
    assert s3.head_object(Bucket=bucket, Key="model/model.safetensors")["ETag"].strip('"').endswith("-3")
    return bucket


def keys(section: str, proxy: FaultProxy, **other: str) -> list[str]:
    return [f"{section}.storage.{key}={value}" for key, value in {**options(proxy.url), **other}.items()]


def files(store: Store) -> dict[str, bytes]:
    """Every file of the dataset, byte for byte."""
    return {file.path: store.get(file.path) for top in ("data", "rejected") for file in store.list(top)}


@pytest.mark.timeout(3600)
def test_killed_drivers_lose_nothing_and_double_nothing(
    proxy: FaultProxy, uploaded: str, driver: Driver, pytestconfig: pytest.Config
) -> None:
    args = [
        f"input.path=s3://{uploaded}/in",
        *keys("input", proxy),
        f"engine.model=s3://{uploaded}/model",
        *keys("engine", proxy),
        "engine.dtype=float32",
        "engine.threads=1",
        "cluster.gpus_per_actor=0",
        "cluster.max_actors=1",
        "source.passthrough=[WIDTH,punsafe]",
        "input.limit=120",
        "unit.rows=12",
        "output.target_file_rows=40",
        *keys("output", proxy),
    ]
    undisturbed, output = (Store(f"s3://{uploaded}/{name}", options(proxy.url)) for name in ("undisturbed", "out"))
    proxy.done.clear()
    calm = driver.run("fuse", *args, f"output.path={undisturbed.root}")
    asked = {operation: times for (_, operation), times in proxy.done.items()}
    print("requests of the undisturbed run", asked, "for", calm["units"], "units of", calm["rows"])
    assert asked.keys() == {"ListObjects", "HeadObject", "GetObject", "PutObject", "DeleteObject"}, (
        "no upload of the job's in parts"
    )

    found = driver.kill_fuse(
        output, pytestconfig.getoption("--kills"), calm["units"], *args, f"output.path={output.root}"
    )
    last = driver.run("fuse", *args, f"output.path={output.root}")
    assert all(0 < units < calm["units"] for units in found)
    assert 0 < last["resumed_units"] < last["units"]
    verified = driver.run("verify", f"output.path={output.root}", *keys("output", proxy), "deep=true")
    assert verified["rows"] == last["rows"] == calm["rows"]
    assert files(output) == files(undisturbed)
    ids = [
        row
        for file, data in files(output).items()
        for row in pq.ParquetFile(io.BytesIO(data)).read(["row_id"])["row_id"].to_pylist()
    ]
    counts = calm["rows"]
    assert len(ids) == len(set(ids)) == counts["fused"] + counts["kept"] + counts["rejected"]
    assert counts["fused"] > counts["planned"] / 2
    assert not output.list("_units"), "parts go once they are compacted"


def test_a_wrong_secret_stops_the_job_at_its_start(proxy: FaultProxy, uploaded: str, driver: Driver) -> None:
    """moto takes any; here each of the three sections is refused by itself, and the secret is in no message."""
    right = {section: keys(section, proxy) for section in ("input", "engine", "output")}
    for section in right:
        wrong = {**right, section: keys(section, proxy, secret=WRONG)}
        places = {
            "input": f"input.path=s3://{uploaded}/in",
            "engine": f"engine.model=s3://{uploaded}/model",
            "output": f"output.path=s3://{uploaded}/out",
        }
        said = driver.run("fuse", *places.values(), *(word for words in wrong.values() for word in words), code=2)
        last = said.splitlines()[-1]
        assert places[section].partition("=")[2] in last
        # Where the first request is a HEAD, its answer has no body that could say more.
        assert re.search(
            r"(credentials not accepted \(SignatureDoesNotMatch\)|access denied \(403\)); check storage key and secret",
            last,
        )
        assert WRONG not in said
        assert "Traceback" not in said
    assert not Store(f"s3://{uploaded}/out", options(proxy.url)).list()
