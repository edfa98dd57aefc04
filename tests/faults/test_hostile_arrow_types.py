"""Parquet files from others whose columns have extension types: no job runs code from them. Each payload would create a folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle as cloudpickle
from drivers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from outputs import run_of, units_of
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

from capsfusion_ray import sources
from capsfusion_ray.config import FilterConfig, InputConfig, OutputConfig, SourceConfig, VerifyConfig
from capsfusion_ray.core.columns import type_of_name
from capsfusion_ray.core.parquet import ForeignType, open_parquet, read_footer, read_ipc_schema, read_schema
from capsfusion_ray.core.types import CaptionPair
from capsfusion_ray.dataset.export import ExportConfig, export
from capsfusion_ray.dataset.layout import MANIFEST
from capsfusion_ray.dataset.manifest import Manifest
from capsfusion_ray.dataset.open_dataset import open_dataset
from capsfusion_ray.dataset.takedown import takedown
from capsfusion_ray.dataset.takedown_criteria import TakedownConfig
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import AccountingError, SourceError, UsageError
from capsfusion_ray.pairing.config import TableConfig
from capsfusion_ray.pairing.survey import survey
from capsfusion_ray.reports.job import ReportConfig, report
from capsfusion_ray.reports.terminal import show
from capsfusion_ray.storage import Store
from capsfusion_ray.training.evaluate import _from_output
from capsfusion_ray.training.triples import read_all

ROWS = 3
GOOD = {"laion_2b": ["a"] * ROWS, "laion_coco": ["b"] * ROWS, "image_url": ["u"] * ROWS}


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.makedirs, (self.path,)


class _Impostor(pa.ExtensionType):
    """Writes any type name and any metadata into a file, without being registered."""

    def __init__(self, storage: pa.DataType, name: str, data: bytes) -> None:
        self._data = data
        super().__init__(storage, name)

    def __arrow_ext_serialize__(self) -> bytes:
        return self._data

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls(storage_type, "none", serialized)


def pickles(path: Path) -> pa.Array:
    """Cells of `ray.data.arrow_pickled_object` that create the folder `path` when a cell is read."""
    return ArrowPythonObjectArray.from_objects([_Payload(path)] * ROWS)


def tensors(path: Path) -> pa.Array:
    """Cells of Ray's tensor type, whose metadata some versions of Ray unpickle as soon as the schema is read."""
    storage = pa.array([[1.0]] * ROWS, pa.list_(pa.float64()))
    data = cloudpickle.dumps(_Payload(path))
    return pa.ExtensionArray.from_storage(_Impostor(storage.type, "ray.data.arrow_tensor", data), storage)


def nested(path: Path) -> pa.Array:
    return pa.StructArray.from_arrays([pickles(path), pa.array([1] * ROWS)], names=["inside", "number"])


KINDS = {"pickles": pickles, "tensors": tensors, "nested": nested}


@pytest.fixture(params=KINDS)
def column(request, tmp_path, monkeypatch) -> tuple[pa.Array, Path]:
    monkeypatch.setenv("RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA", "1")
    monkeypatch.setattr("ray.data._internal.tensor_extensions.arrow._AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA", True)
    pwned = tmp_path / "pwned"
    return KINDS[request.param](pwned), pwned


def written(path: Path, columns: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def read_everything(path: Path, source: SourceConfig, filter: FilterConfig) -> tuple[list[dict], dict[str, str]]:
    """The readable rows of a folder, and the errors of its shards."""
    shards = sources.without_foreign(sources.discover(InputConfig(path=str(path)), source), source, filter)
    spec = sources.ReadSpec(sources.frozen_schema(shards, source, filter), source, filter)
    read = [sources.read_rows(shard, 0, shard.rows, spec) for shard in shards if not shard.error]
    return [row for unit in read for row in unit.table.to_pylist()], {
        shard.path: shard.error for shard in shards if shard.error
    }


PLACES = ["laion_2b", "laion_coco", "image_url", "reference", "lang", "punsafe", "similarity"]


@pytest.mark.parametrize("place", PLACES)
def test_a_shard_with_such_a_column_is_unreadable_and_named_and_the_others_are_read(place, column, tmp_path):
    array, pwned = column
    others = {"lang": ["en"] * ROWS, "punsafe": [0.1] * ROWS, "similarity": [0.9] * ROWS}
    written(tmp_path / "in" / "bad.parquet", GOOD | others | {place: array})
    written(tmp_path / "in" / "good.parquet", GOOD | others)
    source = SourceConfig(passthrough=["lang"])
    rows, errors = read_everything(tmp_path / "in", source, FilterConfig(max_punsafe=0.5, min_similarity=0.1))
    assert len(rows) == ROWS
    assert list(errors) == ["bad.parquet"]
    assert f"column {place!r} has the Arrow extension type 'ray.data." in errors["bad.parquet"]
    assert not pwned.exists()


def test_such_a_column_that_no_job_asks_for_is_ignored(column, tmp_path):
    array, pwned = column
    written(tmp_path / "in" / "a.parquet", GOOD | {"embedding": array})
    rows, errors = read_everything(tmp_path / "in", SourceConfig(), FilterConfig())
    assert len(rows) == ROWS
    assert not errors
    assert not pwned.exists()


def test_a_reader_refuses_it_although_the_plan_did_not(column, tmp_path):
    """As with a plan that an earlier version wrote."""
    array, pwned = column
    path = written(tmp_path / "a.parquet", GOOD | {"lang": array})
    [shard] = sources.discover(InputConfig(path=str(path)), SourceConfig())
    fields = [pa.field(name, pa.string()) for name in ("image_url", "laion_2b", "laion_coco", "row_id", "lang")]
    spec = sources.ReadSpec(pa.schema(fields), SourceConfig(passthrough=["lang"]), FilterConfig())
    read = sources.read_rows(shard, 0, ROWS, spec)
    assert [lost.stop - lost.start for lost in read.unreadable] == [ROWS]
    assert "extension type" in read.unreadable[0].error
    assert not pwned.exists()


@pytest.mark.parametrize("job", ["plan", "fuse"])
def test_the_jobs_run_nothing(job, column, tmp_path):
    array, pwned = column
    written(tmp_path / "in" / "bad.parquet", GOOD | {"laion_2b": array})
    run = subprocess.run(
        [
            sys.executable,
            f"jobs/{job}.py",
            f"input.path={tmp_path / 'in'}",
            f"output.path={tmp_path / 'out'}",
            "engine.kind=echo",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 2
    assert "column 'laion_2b' has the Arrow extension type" in run.stderr
    assert not pwned.exists()


@pytest.mark.parametrize("place", ["laion_2b", "image_url", "key", "lang"])
def test_pairing_runs_nothing(place, column, tmp_path):
    array, pwned = column
    path = written(tmp_path / "a.parquet", {**GOOD, "key": ["k"] * ROWS, "lang": ["en"] * ROWS, place: array})
    table = TableConfig(path=str(path), key="key", passthrough=["lang"])
    with pytest.raises(SourceError, match=f"column '{place}' has the Arrow extension type"):
        survey("raw", table, "none")
    assert not pwned.exists()


def test_training_and_evaluation_run_nothing(column, tmp_path):
    array, pwned = column
    path = written(tmp_path / "out" / "data" / "a.parquet", GOOD | {"capsfusion": array})
    columns = {"data.raw": "laion_2b", "data.synthetic": "laion_coco", "data.fused": "capsfusion"}
    for source in (path, tmp_path / "out"):
        with pytest.raises(UsageError, match="extension type"):
            read_all(str(source), columns)
    with pytest.raises(UsageError, match="extension type"):
        _from_output(str(tmp_path / "out"), [CaptionPair("1", "a", "b")])
    assert not pwned.exists()


@pytest.fixture
def output_of_someone_else(column, tmp_path) -> tuple[Path, Path]:
    """A finished output with one data file replaced, and the checksum of the new file in the manifest."""
    array, pwned = column
    store = Store(str(tmp_path / "out"))
    run_of(store, units_of(2, ROWS, groups=1), ("fused",) * ROWS, OutputConfig(str(tmp_path / "out")))
    manifest = json.loads(store.get(MANIFEST))
    file = next(file for file in manifest["files"] if file["kind"] == "data")
    table = pq.ParquetFile(tmp_path / "out" / file["path"]).read()
    for i in range(table.num_columns):
        name = table.column_names[i]
        if name == "capsfusion":
            table = table.set_column(i, name, pa.concat_arrays([array, array]))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    (tmp_path / "out" / file["path"]).write_bytes(sink.getvalue())
    was, now = file["sha256"], hashlib.sha256(sink.getvalue()).hexdigest()
    for note in (tmp_path / "out" / MANIFEST, *(tmp_path / "out" / "_run" / "groups").iterdir()):
        note.write_text(
            note.read_text().replace(was, now).replace(f'"bytes": {file["bytes"]}', f'"bytes": {len(sink.getvalue())}')
        )
    assert Manifest.from_bytes(store.get(MANIFEST))
    return tmp_path / "out", pwned


def list_of(path: Path) -> str:
    path.write_text("s0.parquet:0\n")
    return str(path)


READERS = {
    "verify": lambda out: verify(VerifyConfig(OutputConfig(str(out)), deep=True)),
    "report": lambda out: report(ReportConfig(OutputConfig(str(out)))),
    "show": lambda out: show(str(out), 8, io.StringIO()),
    "takedown": lambda out: takedown(TakedownConfig(OutputConfig(str(out)), row_ids=list_of(out.parent / "gone.txt"))),
    "open_dataset": lambda out: open_dataset(str(out)),
    "export": lambda out: export(ExportConfig(OutputConfig(str(out)), to=str(out.parent / "export"))),
}


@pytest.mark.parametrize("job", READERS)
def test_reading_an_output_of_someone_else_runs_nothing(job, output_of_someone_else):
    out, pwned = output_of_someone_else
    with pytest.raises(
        (UsageError, AccountingError),
        match=r"part-r001-00000.parquet: column 'capsfusion' has the Arrow extension type",
    ):
        READERS[job](out)
    assert not list((out.parent / "export").rglob("*.parquet"))
    assert not pwned.exists()


def test_a_plan_with_such_a_type_runs_nothing(column):
    array, pwned = column
    name = "arrow:" + base64.b64encode(pa.schema([("", array.type)]).serialize()).decode()
    with pytest.raises(ForeignType, match="extension type"):
        type_of_name(name)
    assert not pwned.exists()


# ---------------------------------------------------------------- harmless types are read as their storage type


def test_known_types_are_read_as_what_they_are_stored_as(tmp_path):
    keys = [uuid.UUID(int=i) for i in range(ROWS)]
    columns = {
        "laion_2b": pa.array(['"a"'] * ROWS, pa.json_()),
        "laion_coco": pa.array(["b"] * ROWS),
        "key": pa.array([k.bytes for k in keys], pa.uuid()),
        "flag": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None], pa.int8())),
    }
    written(tmp_path / "a.parquet", columns)
    rows, errors = read_everything(tmp_path, SourceConfig(passthrough=["key", "flag"]), FilterConfig())
    assert not errors
    assert [row["laion_2b"] for row in rows] == ['"a"'] * ROWS
    assert [row["key"] for row in rows] == [k.bytes for k in keys]
    assert [row["flag"] for row in rows] == [1, 0, None]


def footer_of(data: bytes) -> bytes:
    return data[-8 - int.from_bytes(data[-8:-4], "little") : -8]


def with_footer(data: bytes, footer: bytes) -> bytes:
    body = data[: -8 - int.from_bytes(data[-8:-4], "little")]
    return body + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def test_a_schema_in_an_unusual_form_runs_nothing(tmp_path):
    """Text that is not base64 is read as Parquet's own type; with another Thrift field header the column is refused."""
    pwned = tmp_path / "pwned"
    sink = io.BytesIO()
    pq.write_table(pa.table(GOOD | {"lang": pickles(pwned)}), sink)
    data = sink.getvalue()
    footer = footer_of(data)
    at = footer.index(b"ARROW:schema") + len(b"ARROW:schema")
    assert footer[at : at + 1] == b"\x18"
    encoded = pq.ParquetFile(io.BytesIO(data)).metadata.metadata[b"ARROW:schema"]
    assert base64.b64encode(base64.b64decode(encoded)) == encoded
    not_base64 = footer.replace(encoded, b"!" + encoded[1:])
    cells = open_parquet(io.BytesIO(with_footer(data, not_base64))).read().column("lang").to_pylist()
    assert [type(cell) for cell in cells] == [bytes] * ROWS
    long_header = footer[:at] + b"\x08\x04" + footer[at + 1 :]
    with pytest.raises(ForeignType, match="column 'lang' has the Arrow extension type"):
        open_parquet(io.BytesIO(with_footer(data, long_header)))
    assert not pwned.exists()


@given(st.binary(min_size=0, max_size=200))
def test_bytes_that_are_no_parquet_file_are_refused(data):
    for tail in (b"", b"PAR1", (1 << 31).to_bytes(4, "little") + b"PAR1", b"\xff\xff\xff\xffPAR1"):
        with pytest.raises((ValueError, pa.ArrowException, OSError)):
            read_footer(io.BytesIO(data + tail))


@given(st.sampled_from(["int8", "string", "list", "dictionary", "timestamp", "large", "struct"]), st.integers(0, 5))
def test_files_without_extension_types_are_read_as_pyarrow_reads_them(kind, rows):
    """The oracle is pyarrow's own reader, for types that only `ARROW:schema` can tell apart."""
    types = {
        "int8": pa.int8(),
        "string": pa.string(),
        "list": pa.list_(pa.float32()),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
        "timestamp": pa.timestamp("ms", "Europe/Berlin"),
        "large": pa.large_string(),
        "struct": pa.struct([("a", pa.int16())]),
    }
    table = pa.table({"x": pa.nulls(rows, types[kind])})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    assert open_parquet(io.BytesIO(sink.getvalue())).read().equals(pq.read_table(io.BytesIO(sink.getvalue())))
    assert read_schema(io.BytesIO(sink.getvalue())).equals(table.schema, check_metadata=False)
    assert read_ipc_schema(table.schema.serialize().to_pybytes()) == table.schema
