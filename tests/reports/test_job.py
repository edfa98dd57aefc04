"""The page on an output: its numbers close, its sample is stratified, and nothing in a caption is markup."""

import dataclasses
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_runs import HOSTILE, PER_REASON, run_of, unit

from capsfusion_ray.config import OutputConfig
from capsfusion_ray.core.accounting import Counts
from capsfusion_ray.core.types import WorkUnit
from capsfusion_ray.dataset.layout import COMPARISON, MANIFEST, REPORT
from capsfusion_ray.dataset.manifest import read_manifest
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.reports import sample
from capsfusion_ray.reports.job import ReportConfig, report
from capsfusion_ray.reports.sample import ORDINARY_SHARE
from capsfusion_ray.storage import Store
from capsfusion_ray.training.evaluate import EvaluateConfig, EvaluateOutputConfig, ReferenceConfig, evaluate


def data_of(path):
    page = (path / REPORT).read_text("utf-8")
    return page, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("compacted", [0, 1, 3])
def test_a_page_on_a_finished_or_a_running_output(tmp_path, compacted):
    done = report(run_of(tmp_path, [unit(i, 40) for i in range(3)], compacted))
    assert done["finished"]
    assert done["rows"] == {
        "planned": 120,
        "fused": 108,
        "kept": 0,
        "rejected": 12,
        "filtered": 0,
        "removed": 0,
        "unreadable": 0,
    }
    _, data = data_of(tmp_path)
    assert data["figures"]["reasons"] == {"repetition": 12}
    by_reason = [row["reason"] or (row["flags"] or ["ordinary"])[0] for row in data["rows"]]
    assert {name: by_reason.count(name) for name in by_reason} == {
        "repetition": PER_REASON,
        "lost_entity": PER_REASON,
        "ordinary": PER_REASON * ORDINARY_SHARE,
    }
    assert len({row["id"] for row in data["rows"]}) == len(data["rows"])


def test_captions_are_data_and_nothing_else(tmp_path):
    report(run_of(tmp_path, [unit(0, 40)], 1))
    page, data = data_of(tmp_path)
    assert data["rows"][0]["raw"] == HOSTILE, "it comes through whole …"
    assert page.count("<script") == 2, "… and none of it is markup"
    assert "<img" not in page
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page), "no request"
    assert "default-src 'none'" in page


def test_the_figures_say_what_the_rows_say(tmp_path):
    report(run_of(tmp_path, [unit(0, 40)], 1))
    figures = data_of(tmp_path)[1]["figures"]
    assert figures["knowledge"]["fused"] == 1.0, "Nürnberg and 2019 stand in every fused caption"
    assert figures["knowledge"]["synthetic"] == 0.0
    assert sum(figures["origins"].values()) == pytest.approx(1, abs=0.001)
    assert sum(figures["lengths"]["fused"]["bars"]) == figures["measured"] == 36, (
        "all that was read, not the rows picked to be shown"
    )


def test_an_output_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no plan"):
        report(ReportConfig(OutputConfig(str(tmp_path))))


def test_what_was_measured_against_references_is_a_section(tmp_path):
    pytest.importorskip("sacrebleu")
    run, figures = run_of(tmp_path / "out", [unit(0, 40)], 1), tmp_path / "figures"
    output = run.output.path
    evaluate(
        EvaluateConfig(
            ReferenceConfig(output, reference="capsfusion", rows=10), output, output=EvaluateOutputConfig(str(figures))
        )
    )
    report(dataclasses.replace(run, evaluation=str(figures)))
    shown = data_of(tmp_path / "out")[1]["figures"]["evaluation"]
    assert (shown["rows"], shown["measured"], shown["system"]) == (10, output, "output")
    assert shown["figures"]["output"]["rouge_l"] == pytest.approx(1), "an output against its own captions"
    assert 0 < shown["figures"]["extractive oracle"]["rouge_l"] < 1


@pytest.mark.parametrize("written", [None, "", "[]", '{"rows": 3}'])
def test_a_folder_without_figures_is_refused_before_anything_is_read(tmp_path, written):
    if written is not None:
        (tmp_path / "figures.json").write_text(written)
    with pytest.raises(
        ConfigError, match=f"evaluation={tmp_path}: it holds no readable figures.json of `capsfusion evaluate`"
    ):
        report(ReportConfig(OutputConfig(str(tmp_path / "out")), evaluation=str(tmp_path)))


def test_two_outputs_of_the_same_rows_stand_beside_each_other(tmp_path):
    one, other = (
        run_of(tmp_path / "one", [unit(i, 20) for i in range(3)], 3),
        run_of(tmp_path / "other", [unit(i, 20) for i in range(2)], 1),
    )
    of_one, of_other = (Store(cfg.output.path) for cfg in (one, other))
    file = next(entry.path for entry in of_other.list("data"))
    table = pq.read_table(io.BytesIO(of_other.get(file)), partitioning=None)
    captions = ["Two stalls at night.", *table["capsfusion"].to_pylist()[1:]]
    at = table.column_names.index("capsfusion")
    sink = io.BytesIO()
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(captions, pa.string())), sink)
    of_other.put(file, sink.getvalue())

    done = report(ReportConfig(one.output, beside=other.output, rows_per_reason=PER_REASON))
    assert done["report"].endswith(COMPARISON)
    assert not of_one.exists(REPORT), "the page on one output alone is another file"
    page = of_one.get(COMPARISON).decode()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["figures"]["counts"]["planned"] == 60
    assert data["figures"]["beside"]["counts"]["planned"] == 40
    assert {row["id"].partition(":")[0] for row in data["rows"]} == {"s0.parquet", "s1.parquet"}, "rows of both only"
    [changed] = [row for row in data["rows"] if "different" in row["strata"]]
    assert text_of(changed["other"]["fused"]) == "Two stalls at night."
    assert text_of(changed["other"]["fused"], marked=True) == "Two stalls ."
    assert text_of(changed["fused"]) == f"A stall at night in Nürnberg in 2019, {HOSTILE}"
    assert text_of(changed["fused"], marked=True).startswith("A stall in Nürnberg in 2019, </script>"), (
        "what the other has not, here too"
    )
    assert ["stalls", "synthetic", 1] in changed["other"]["fused"], "and where a word comes from, in both"
    assert not any(
        text_of(side["fused"], marked=True)
        for row in data["rows"]
        if row is not changed
        for side in (row, row["other"])
    )
    assert data["figures"]["beside"]["compared"] == 40
    assert data["figures"]["beside"]["different"] == 1


def comparison_of(path):
    """The figures of its page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', (path / COMPARISON).read_text("utf-8"), re.DOTALL)[1])[
        "figures"
    ]


def text_of(pieces, marked=False):
    """A caption's text on the page, or of it what is marked as different."""
    text = "".join(text if mark or not marked else " " for text, _, mark in pieces)
    return " ".join(text.split()) if marked else text


def test_a_small_output_is_compared_whole_whatever_became_of_a_row(tmp_path):
    """Rejected here and fused there, beyond the first rows of a file: what two settings differ in."""
    one, other = (run_of(tmp_path / name, [unit(0, 5_000)], 1) for name in ("one", "other"))
    report(ReportConfig(one.output, beside=other.output))
    figures = comparison_of(tmp_path / "one")
    assert figures["beside"]["compared"] == 5_000


def test_rows_of_another_output_are_found_wherever_they_lie_and_a_bounded_number_is_read(tmp_path, monkeypatch):
    """Cut into other units and files, half of it not compacted yet: samples by position would have few rows in common."""
    monkeypatch.setattr(sample, "ROWS_READ", 60)
    monkeypatch.setattr(sample, "FILES_READ", 5)
    one = run_of(tmp_path / "one", [unit(i, 40) for i in range(30)], 30)
    pieces = [
        WorkUnit(f"v{i}-{start}", f"s{i}.parquet", start, start + 8, f"g{i * 5 + start // 8:05d}")
        for i in range(30)
        for start in range(0, 40, 8)
    ]
    other = run_of(tmp_path / "other", pieces, 75)
    report(ReportConfig(one.output, beside=other.output))
    figures = comparison_of(tmp_path / "one")
    assert figures["beside"]["compared"] == 60 + 20, (
        "all that were drawn: whole files of twelve rows, and their rejects"
    )

    monkeypatch.setattr(sample, "ROWS_FOUND", 16)
    report(ReportConfig(one.output, beside=other.output))
    figures = comparison_of(tmp_path / "one")
    assert figures["beside"]["compared"] == 24, "three units"


def test_what_is_read_is_bounded_and_spread_over_the_output(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "ROWS_READ", 60)
    monkeypatch.setattr(sample, "FILES_READ", 5)
    cfg = run_of(tmp_path, [unit(i, 40) for i in range(30)], 30)
    store, opened = Store(cfg.output.path), []
    state = sample.state_of(store)
    monkeypatch.setattr(
        Store, "open_input", lambda self, path, *more, of=Store.open_input: opened.append(path) or of(self, path, *more)
    )
    rows = list(sample.drawn_rows(store, state))
    assert len(opened) == 2 * 5, "of data/ and of rejected/"
    assert len({int(path.split("=g")[1][:5]) // 6 for path in opened}) == 5, "from one end to the other"
    assert len([row for row in rows if not row.reason]) == 60
    assert len({row.id.partition(":")[0] for row in rows}) == 5


def test_a_large_file_is_read_at_several_places(tmp_path):
    table = pa.table({"row_id": [f"s:{i}" for i in range(100)]})
    pq.write_table(table, tmp_path / "f.parquet", row_group_size=10)
    file = pq.ParquetFile(tmp_path / "f.parquet")

    def numbers(most):
        return [int(i.split(":")[1]) for batch in sample._batches(file, most) for i in batch["row_id"].to_pylist()]

    assert numbers(30) == [*range(10, 20), *range(50, 60), *range(80, 90)]
    assert numbers(4) == [50, 51, 52, 53]
    assert numbers(1_000) == list(range(100))


def test_the_time_left_is_shown_as_it_was_foreseen(tmp_path):
    cfg = run_of(tmp_path, [unit(i, 40) for i in range(3)], 1)
    history = [[10.0, 0, 0.0], [20.0, 40, 4.0], [30.0, 100, 2.0]]
    Store(cfg.output.path).put(
        "progress.json", json.dumps({"history": history, "captions_per_s": 2.0, "actors": 1}).encode()
    )
    report(cfg)
    assert data_of(tmp_path)[1]["figures"]["speed"]["eta_history"] == [[20.0, 20.0], [30.0, 10.0]], (
        "120 rows are planned"
    )


def test_a_finished_outputs_speed_and_price_are_those_of_all_its_units(tmp_path):
    """progress.json tells of the last process' last minutes: twenty rows of an extension say nothing of the run."""
    cfg = run_of(tmp_path, [unit(i, 40) for i in range(3)], 3)
    store = Store(cfg.output.path)
    store.put(
        "progress.json", json.dumps({"history": [[150.0, 120, 0.1]], "captions_per_s": 0.1, "actors": 1}).encode()
    )
    manifest = read_manifest(store)
    units = tuple(dataclasses.replace(each, busy_s=10.0, device="beam:NVIDIA H200") for each in manifest.units)
    revisions = (
        {"revision": 1, "kind": "base", "cost": {"gpus_per_actor": 0.5, "usd_per_gpu_hour": 3.0}},
        {"revision": 2, "kind": "takedown"},
    )
    store.put(MANIFEST, dataclasses.replace(manifest, units=units, revisions=revisions).to_bytes())
    report(cfg)
    speed = data_of(tmp_path)[1]["figures"]["speed"]
    assert (speed["captions_per_s"], speed["unit"]) == (4.0, "captions/s per actor")
    assert speed["usd_per_million"] == pytest.approx(1e6 / 4 / 3600 * 0.5 * 3)


@pytest.mark.parametrize(
    ("config", "base", "dollars"),
    [
        ("cluster: {gpus_per_actor: null, price_per_gpu_hour: 2.5}", {}, 2.5),
        ("cluster: {gpus_per_actor: 0.5, price_per_gpu_hour: 4.0}", {}, 2.0),
        (
            "{cluster: {gpus_per_actor: null, price_per_gpu_hour: 2.5}, engine: {kind: vllm, vllm: {tensor_parallel: 4}}}",
            {},
            10.0,
        ),
        ("cluster: {gpus_per_actor: null, price_per_gpu_hour: 2.5}", {"engine.kind": "api"}, None),
        (None, {}, 2.5),
    ],
)
def test_a_running_outputs_price_is_of_what_its_engines_did_and_not_of_what_was_asked_for(
    tmp_path, monkeypatch, config, base, dollars
):
    """Of sixteen spot actors three may be there: `actors` of progress.json is what the pool may grow to."""
    cfg = run_of(tmp_path, [unit(i, 40) for i in range(3)], 1)
    store = Store(cfg.output.path)
    store.put("progress.json", json.dumps({"history": [], "captions_per_s": 2.0, "actors": 16}).encode())
    if config:
        store.put("_run/config-r001.yaml", config.encode())
    state = sample.state_of(store)
    state = dataclasses.replace(
        state, finished=False, devices={"host:NVIDIA H100": 1}, busy_s=30.0, base=state.base | base
    )
    monkeypatch.setattr("capsfusion_ray.reports.job.state_of", lambda store: state)
    report(cfg)
    speed = data_of(tmp_path)[1]["figures"]["speed"]
    assert (speed["captions_per_s"], speed["unit"]) == (2.0, "captions/s"), "of the last minutes"
    assert speed["usd_per_million"] == (dollars and pytest.approx(1e6 / 4 / 3600 * dollars)), "120 rows in 30 s"


def test_what_a_takedown_removed_was_paid_for_too(tmp_path):
    cfg = run_of(tmp_path, [unit(i, 40) for i in range(3)], 3)
    store = Store(cfg.output.path)
    manifest = read_manifest(store)
    fewer = [dataclasses.replace(u, fused=u.fused - 20, removed=20, busy_s=10.0) for u in manifest.units]
    store.put(MANIFEST, dataclasses.replace(manifest, units=tuple(fewer), counts=Counts.of(fewer, 120)).to_bytes())
    report(cfg)
    assert data_of(tmp_path)[1]["figures"]["speed"]["captions_per_s"] == 4.0


def test_outputs_without_a_common_row_cannot_be_compared(tmp_path):
    one, other = run_of(tmp_path / "one", [unit(0, 10)], 1), run_of(tmp_path / "other", [unit(7, 10)], 1)
    with pytest.raises(ConfigError, match="two outputs of the same input"):
        report(ReportConfig(one.output, beside=other.output))
