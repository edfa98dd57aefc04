"""`jobs/pair.py` as a user runs it: a real Ray cluster, a SIGKILL in each pass, then jobs/fuse.py on the pairs."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SHARDS, ROWS = 6, 50  # of each table
KEYS = SHARDS * ROWS  # keys of the raw table; the synthetic table has as many, from key LONELY on
LONELY = 60
ECHO = ("engine.kind=echo", "cluster.gpus_per_actor=0", "cluster.max_actors=1")


def write(folder, rows):
    """Write shards that take every SHARDS-th row: no key is at the same place in both tables."""
    folder.mkdir()
    for shard in range(SHARDS):
        pq.write_table(pa.Table.from_pylist(rows[shard::SHARDS]), folder / f"{shard}.parquet", row_group_size=16)


@pytest.fixture
def tables(tmp_path):
    """The last raw row repeats the key of row 102, which comes first in the same shard; the first synthetic one has no key."""
    raw = [{"URL": f"http://Host.example/{i}.jpg", "TEXT": f"Cape No. {i}", "WIDTH": i} for i in range(KEYS)]
    synthetic = [
        {"url": f"https://host.example/{i}.jpg", "top_caption": f"A lighthouse stands at number {i}."}
        for i in reversed(range(LONELY, LONELY + KEYS))
    ]
    write(tmp_path / "raw", [*raw, raw[102] | {"TEXT": "another cape"}])
    write(tmp_path / "synthetic", [{"url": None, "top_caption": "A lighthouse."}, *synthetic])
    return (
        f"raw.path={tmp_path}/raw",
        "raw.passthrough=[WIDTH]",
        f"synthetic.path={tmp_path}/synthetic",
        "normalise=url",
        "partitions=12",
    )


@pytest.mark.timeout(3600)
def test_a_pairing_killed_in_either_pass_is_finished_by_the_same_command_and_fused(tables, tmp_path, driver):
    output = tmp_path / "pairs"
    args = (*tables, f"output.path={output}")
    patterns = ("_pair/exchange/*.arrow", "_pair/buckets/*.json")
    found = [driver.kill_at(lambda p=pattern: len(list(output.glob(p))), 2, "pair", *args) for pattern in patterns]
    print("objects written and buckets joined at the kills", found)

    done = driver.run("pair", *args)
    names = ("rows", "matched", "unmatched", "duplicates", "conflicting", "without_key")
    assert [done["raw"][name] for name in names] == [KEYS + 1, KEYS - LONELY, LONELY, 1, 1, 0]
    assert [done["synthetic"][name] for name in names] == [KEYS + 1, KEYS - LONELY, LONELY, 0, 0, 1]
    assert json.loads((output / "_pair/audit.json").read_text())["pairs"] == done["pairs"] == KEYS - LONELY
    assert not [*output.glob("_pair/exchange/*"), *output.glob("_pair/buckets/*")]

    fused = driver.run(
        "fuse", f"input.path={output}", f"output.path={tmp_path}/out", "source.passthrough=[WIDTH]", *ECHO
    )
    assert fused["rows"]["planned"] == KEYS - LONELY
    driver.run("verify", f"output.path={tmp_path}/out", "deep=true")
    rows = [
        row for file in (tmp_path / "out").rglob("part-*.parquet") for row in pq.ParquetFile(file).read().to_pylist()
    ]
    assert sorted(row["WIDTH"] for row in rows) == list(range(LONELY, KEYS))
    for row in rows:
        i = row["WIDTH"]
        captions = (f"Cape No. {i}", f"A lighthouse stands at number {i}.")
        assert (row["laion_2b"], row["laion_coco"], row["image_url"]) == (*captions, f"http://Host.example/{i}.jpg")


@pytest.mark.timeout(3600)
def test_an_error_of_the_settings_is_one_line(tables, tmp_path, driver):
    output = f"output.path={tmp_path}/pairs"
    said = driver.run("pair", *tables, output, "duplicates=refuse", code=2)
    assert "duplicates=refuse: rows whose key an earlier row has: raw: 1 rows (1 with another caption)" in said
    assert "Traceback" not in said
    assert "normalise was 'url', now 'none'" in driver.run("pair", *tables, "normalise=none", output, code=2)
