"""jobs/evaluate.py: a system is measured on the last rows, beside the baselines."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capsfusion_ray.config import parse_config
from capsfusion_ray.core.columns import FUSED, RAW, ROW_ID, SYNTHETIC
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.training.evaluate import EvaluateConfig, evaluate, extractive_oracle

pytest.importorskip("sacrebleu")


@pytest.fixture
def output(rows, tmp_path):
    """A finished output that holds the references of all measured rows but one, in another order."""
    folder = tmp_path / "out" / "data" / "shard=g00000"
    folder.mkdir(parents=True)
    held = list(reversed(rows[-20:-1]))
    table = pa.table(
        {
            RAW: [r["laion_2b"] for r in held],
            SYNTHETIC: [r["laion_coco"] for r in held],
            FUSED: [r["capsfuion_official"] for r in held],
            ROW_ID: [str(i) for i in range(len(held))],
        }
    )
    pq.write_table(table, folder / "part-00000.parquet")
    return tmp_path / "out"


def test_a_finished_output_is_matched_by_its_sources_and_a_missing_caption_counts_as_the_raw_one(
    triples_file, output, tmp_path, rows
):
    cfg = parse_config(
        EvaluateConfig,
        [f"data.path={triples_file}", "data.rows=20", f"fused={output}", f"output.path={tmp_path / 'figures'}"],
    )
    figures = evaluate(cfg)["figures"]
    assert set(figures) == {"raw", "synthetic", "raw. synthetic", "extractive oracle", "output", "reference"}
    assert figures["reference"]["cider"] == pytest.approx(10)
    assert figures["raw"]["rouge_l"] < figures["output"]["rouge_l"] < 1
    lines = [json.loads(line) for line in (tmp_path / "figures" / "captions.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1][FUSED] == rows[-1]["laion_2b"]
    assert lines[0][FUSED] == rows[-20]["capsfuion_official"]
    assert "| reference |" in (tmp_path / "figures" / "figures.md").read_text("utf-8")


def test_sources_with_white_space_around_them_are_the_same_and_a_null_is_no_caption(
    triples_file, output, tmp_path, rows, caplog
):
    [file] = (output / "data").rglob("*.parquet")
    table = pq.ParquetFile(file).read()
    for name in (RAW, SYNTHETIC):
        table = table.set_column(
            table.schema.get_field_index(name), name, pa.array([f" {text}\n" for text in table[name].to_pylist()])
        )
    pq.write_table(table, file)
    given = [*rows[-20:-1], rows[-1] | {"capsfuion_official": None}]
    (tmp_path / "references.json").write_text(json.dumps(given), "utf-8")
    done = evaluate(
        parse_config(EvaluateConfig, [f"data.path={tmp_path}/references.json", "data.rows=20", f"fused={output}"])
    )
    assert done["rows"] == 19
    assert "1 of 20 rows have a null caption" in caplog.text
    assert done["figures"]["output"]["rouge_l"] == pytest.approx(1)


def test_an_engine_writes_the_captions_where_no_output_is_given(triples_file):
    cfg = parse_config(EvaluateConfig, [f"data.path={triples_file}", "data.rows=10", "engine.kind=echo"])
    result = evaluate(cfg)
    assert result["rows"] == 10
    assert result["figures"]["model"]["words"] > 0


def test_the_extractive_oracle_leaves_out_what_the_reference_lacks_and_reorders_nothing():
    sources = "Red Kettle, 2-litre - SALE. A kettle on a stove."
    assert (
        extractive_oracle(sources, "On the stove stands a red kettle of 2 litre")
        == "Red Kettle, 2-litre A kettle on a stove."
    )
    assert extractive_oracle(sources, "") == ""


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        evaluate(parse_config(EvaluateConfig, [f"data.path={tmp_path / 'absent.json'}"]))


def test_the_output_of_a_job_serves_as_references_too(output):
    cfg = parse_config(
        EvaluateConfig, [f"data.path={output}", "data.reference=capsfusion", "data.rows=10", f"fused={output}"]
    )
    result = evaluate(cfg)
    assert result["rows"] == 10
    assert result["figures"]["output"]["rouge_l"] == pytest.approx(1)
