"""`retry=rejected` as a user runs it: a real Ray cluster, and a SIGKILL while it fuses and another while it merges."""

import pyarrow.dataset as ds
import pytest

SETTINGS = (
    "engine.kind=echo",
    "cluster.gpus_per_actor=0",
    "cluster.max_actors=1",
    "unit.rows=10",
    "output.target_file_rows=32",
    "decode.max_new_tokens=6",
)
STRICT, MILD = (
    ("gates.cut_off={action: reject, threshold: 1, flag_from: null}",),
    ("retry=rejected", "gates.cut_off={action: flag, threshold: 1, flag_from: null}"),
)


@pytest.mark.timeout(3600)
def test_a_retry_killed_while_it_fuses_and_while_it_merges_is_finished_by_the_same_command(corpus, tmp_path, driver):
    output = tmp_path / "out"
    args = (f"input.path={corpus}", f"output.path={output}", *SETTINGS)
    before = driver.run("fuse", *args, *STRICT)
    assert before["rejects"] == {"cut_off": 400}, "no caption of six words ends"

    moments = (("_retry/*/_units/*.parquet", 7), ("_run/groups/*-e002.json", 1))
    found = [
        driver.kill_at(lambda p=pattern: len(list(output.glob(p))), enough, "fuse", *args, *MILD)
        for pattern, enough in moments
    ]
    print("units committed and groups merged at the kills", found)

    after = driver.run("fuse", *args, *MILD)
    assert after["rows"] == before["rows"] | {"fused": 400, "rejected": 0}
    verified = driver.run("verify", f"output.path={output}", "deep=true")
    assert verified["rows"]["planned"] == verified["rows"]["fused"] == 400
    rows = ds.dataset(output / "data").to_table(columns=["row_id", "flags"]).to_pylist()
    assert len({row["row_id"] for row in rows}) == 400
    assert all("cut_off" in row["flags"] for row in rows)
    assert not [path for path in (output / "_retry").rglob("*") if path.is_file()]
    assert (output / "report.html").is_file(), "written at the end of a run"
