"""Empty, tiny and broken inputs through the real job: every row is accounted for, or the error says what must change."""

import datetime as dt
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from lighthouses import captions

pytestmark = pytest.mark.timeout(3600)  # each driver starts a dozen processes of Ray

ECHO = ("engine.kind=echo", "cluster.gpus_per_actor=0", "cluster.max_actors=1")


def test_a_messy_input_gives_every_row_an_outcome(corpus, tmp_path, driver):
    """Null, empty, huge, doubled and undecodable captions, a damaged shard and a broken line, in one run."""
    rows = captions("messy", 10)
    rows[0]["laion_2b"] = None
    rows[1]["laion_coco"] = ""
    rows[2]["laion_2b"] = "lighthouse " * 100_000  # 1.1 MB
    rows[4] = dict(rows[3])
    text = pa.array([row["laion_2b"] for row in rows], pa.string())
    # Row 5 gets a byte that no UTF-8 text holds; Arrow does not validate it.
    broken = pa.array([None if v is None else v.encode() for v in text.to_pylist()], pa.binary()).to_pylist()
    broken[5] = b"Caf\xe9 Lighthouse, 1905"
    table = pa.Table.from_pylist(rows)
    table = table.set_column(1, "laion_2b", pa.array(broken, pa.binary()))
    pq.write_table(table, corpus / "messy.parquet")
    (corpus / "damaged.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    lines = [json.dumps(row) for row in captions("lines", 6)]
    lines[2] = lines[2][:30]
    (corpus / "lines.jsonl").write_text("\n".join(lines) + "\n")
    (corpus / "empty.jsonl").write_text("")

    output = tmp_path / "out"
    done = driver.run("fuse", f"input.path={corpus}", f"output.path={output}", *ECHO)
    assert done["rows"]["planned"] == 400 + 10 + 6
    drawn = sum(
        done["rejects"].pop(gate, 0) for gate in ("instruction_echo", "unsupported_number", "cut_off")
    )  # faults that the echo engine makes
    assert drawn < 416 * 0.05
    # The caption of 1.1 MB is cut to the budget of the prompt, so its fused caption is too short: a reject, not a loss.
    assert done["rejects"] == {
        "null_caption": 1,
        "empty_caption": 1,
        "invalid_utf8": 1,
        "unparsable": 1,
        "too_short": 1,
    }
    assert done["rows"]["fused"] == 416 - 5 - drawn
    verified = driver.run("verify", f"output.path={output}", "deep=true")
    assert verified["rows"] == done["rows"]
    assert "damaged.parquet" in json.dumps(json.loads((output / "manifest.json").read_bytes()))

    rejected = {row["row_id"]: row for row in ds.dataset(output / "rejected").to_table().to_pylist()}
    assert rejected["messy.parquet:5"]["laion_2b"] == "Caf\ufffd Lighthouse, 1905", "shown repaired"
    assert rejected["messy.parquet:2"]["laion_2b"] == rows[2]["laion_2b"], "kept whole"
    data = {row["row_id"]: row for row in ds.dataset(output / "data").to_table().to_pylist()}
    assert data["messy.parquet:3"]["capsfusion"] == data["messy.parquet:4"]["capsfusion"]


def test_one_row_and_no_row(tmp_path, driver):
    one, none = tmp_path / "one", tmp_path / "none"
    for folder, count in ((one, 1), (none, 0)):
        folder.mkdir()
        # Columns that are carried along, of types whose Arrow names have parameters.
        seen = {"tags": ["sea", None], "taken": dt.datetime(2019, 7, 1, 12, tzinfo=dt.UTC), "price": Decimal("1.50")}
        schema = pa.Table.from_pylist([row | seen for row in captions("x", 1)]).schema
        pq.write_table(
            pa.Table.from_pylist([row | seen for row in captions("x", count)], schema=schema), folder / "shard.parquet"
        )
        carried = "source.passthrough=[tags,taken,price]"
        done = driver.run("fuse", f"input.path={folder}", f"output.path={tmp_path}/out-{folder.name}", carried, *ECHO)
        assert done["rows"]["planned"] == done["rows"]["fused"] == count
        if count:
            [row] = ds.dataset(tmp_path / "out-one" / "data").to_table().to_pylist()
            assert {name: row[name] for name in seen} == seen
        driver.run("verify", f"output.path={tmp_path}/out-{folder.name}", "deep=true")


def test_errors_of_the_settings_are_raised_before_anything_starts(tmp_path, driver):
    """Exit 2 within seconds, with the thing, the value and the way out."""
    folder, shard = tmp_path / "in", tmp_path / "in" / "shard.parquet"
    assert "input.path" in driver.run(
        "fuse", f"input.path={tmp_path}/absent", f"output.path={tmp_path}/out", *ECHO, code=2
    )
    folder.mkdir()
    pq.write_table(pa.table({"url": ["u"], "caption": ["a lighthouse"]}), shard)
    said = driver.run("fuse", f"input.path={folder}", f"output.path={tmp_path}/out", *ECHO, code=2)
    assert all(part in said for part in ("shard.parquet", "url", "caption"))
    pq.write_table(pa.Table.from_pylist(captions("x", 3)), shard)
    (tmp_path / "file").write_text("")
    said = driver.run("fuse", f"input.path={folder}", f"output.path={tmp_path}/file/out", *ECHO, code=2)
    assert f"{tmp_path}/file/out" in said
    odd = {"shard": "1", "_finish": "eos", "tags": ["sea"]}
    pq.write_table(pa.Table.from_pylist([row | odd for row in captions("x", 3)]), shard)
    for wrong, way_out in (
        (["source.passthrough=[shard]"], "the output's folders are called shard=…"),
        (["source.passthrough=[_finish]"], "'_finish' is a column of the output itself"),
        (["source.passthrough=[tags]", "output.partition_by=tags"], "makes no folder's name"),
    ):
        assert way_out in driver.run(
            "fuse", f"input.path={folder}", f"output.path={tmp_path}/out", *ECHO, *wrong, code=2
        )
    said = driver.run(
        "fuse", f"input.path={folder}", f"output.path={tmp_path}/out", *ECHO, "output.target_file_md=1", code=2
    )
    assert "output.target_file_mb" in said
    assert not (tmp_path / "out").exists()


def test_an_engine_that_cannot_start_says_why(tmp_path, driver):
    """Only the worker can know it: its refusal reaches the user in one line, like one of the driver."""
    pq.write_table(pa.Table.from_pylist(captions("x", 3)), tmp_path / "shard.parquet")
    settings = ("engine.kind=transformers", "decode.scoring=reference", *ECHO[1:])
    said = driver.run("fuse", f"input.path={tmp_path}/shard.parquet", f"output.path={tmp_path}/out", *settings, code=2)
    assert "error: decode.scoring='reference' with decode.num_beams=3: engine.kind=transformers cannot" in said
