"""A retry fuses rejects again under other settings and touches nothing else, wherever it is killed. The local executor runs it."""

import json
from contextlib import closing

import pytest
from echo_run import LEASE, LOCAL, POOL, STRICT, config, finished, killed_at_every_write, local, rows_of
from outputs import flip_a_bit

from capsfusion_ray.config import VerifyConfig
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.dataset.edit_record import refuse_unfinished_edit
from capsfusion_ray.dataset.manifest import read_manifest
from capsfusion_ray.dataset.plan_files import read_plans
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.errors import AccountingError, ConfigError, EngineError
from capsfusion_ray.run.edits import base as edit_module
from capsfusion_ray.run.edits.base import run_edit
from capsfusion_ray.run.edits.retry_rejected import open_retry, reasons_of
from capsfusion_ray.run.executors.local import LocalExecutor
from capsfusion_ray.run.stages import Job
from capsfusion_ray.storage import Store


def retry_of(path, store, *more, reasons="rejected", partition_by="shard", executor=None):
    """One `retry=…` command; None where nothing is left to do."""
    cfg = config(path, *more, f"output.partition_by={partition_by}")
    settings = {"gates": json.loads(json.dumps(more))}
    retry = open_retry(store, reasons, settings, read_plans(store), cfg.output)
    if retry is None:
        return None
    job = Job(None, cfg.gates, cfg.engine, cfg.decode, TEMPLATE, retry.plans[0].fields, store, "run")
    with closing(executor or local()) as executor:
        return run_edit(retry, job, executor, POOL, LEASE)


class ThenDamages(LocalExecutor):
    """Fuses all, and damages a rejected file of the output at `path` before the edit continues."""

    def __init__(self, path):
        super().__init__(LOCAL)
        self._path = path

    def fuse(self, *args):
        yield from super().fuse(*args)
        flip_a_bit(self._path / "out" / "rejected")


class FailsAfterOne(LocalExecutor):
    """Its engine fails after the first unit."""

    def fuse(self, *args):
        yield next(iter(super().fuse(*args)))
        raise EngineError("the model's captions are NaN")


@pytest.mark.parametrize("partition_by", ["shard", "lang"])
def test_rows_that_pass_now_move_to_data_and_nothing_else_changes(tmp_path, partition_by):
    before = finished(tmp_path, partition_by)
    rejected = before.counts.reasons["cut_off"]
    assert rejected > 4
    assert before.counts.reasons["null_caption"] == 2
    data = {p: p.read_bytes() for p in (tmp_path / "out" / "data").rglob("*.parquet")}
    fused_before = rows_of(tmp_path, "data")

    counts = retry_of(tmp_path, Store(str(tmp_path / "out")), partition_by=partition_by)
    assert counts.fused == before.counts.fused + rejected
    assert counts.reasons["null_caption"] == 2, "no setting brings a missing caption back"
    assert all(p.read_bytes() == bytes_ for p, bytes_ in data.items()), "files that were there are not touched"
    now = rows_of(tmp_path, "data")
    assert fused_before.items() <= now.items()
    assert len(now) == counts.fused
    assert {row["reason"] for row in rows_of(tmp_path, "rejected").values()} == {"null_caption"}
    assert not [p for p in (tmp_path / "out" / "_retry").rglob("*") if p.is_file()]
    totals = verify(VerifyConfig(config(tmp_path).output, deep=True))
    assert totals["rows"]["planned"] == 24

    assert retry_of(tmp_path, Store(str(tmp_path / "out")), partition_by=partition_by) is None, "nothing is left to do"


def test_a_retry_that_changes_nothing_keeps_every_reject(tmp_path):
    before = finished(tmp_path)
    counts = retry_of(tmp_path, Store(str(tmp_path / "out")), *STRICT, reasons="cut_off")
    assert counts.reasons == before.counts.reasons
    assert counts.fused == before.counts.fused
    verify(VerifyConfig(config(tmp_path).output, deep=True))


def test_a_retry_killed_at_any_write_and_repeated_ends_the_same(tmp_path):
    finished(tmp_path / "calm")
    retry_of(tmp_path / "calm", Store(str(tmp_path / "calm" / "out")))
    killed_at_every_write(tmp_path, retry_of, rows_of(tmp_path / "calm", "data"))


def test_a_retry_refuses_damaged_rejects(tmp_path):
    manifest = finished(tmp_path)
    store = Store(str(tmp_path / "out"))
    bad = flip_a_bit(tmp_path / "out" / "rejected")
    with pytest.raises(AccountingError, match=rf"1 files are damaged \(first .*{bad.name}: checksum .*repair=true"):
        retry_of(tmp_path, store)
    refuse_unfinished_edit(store, manifest)  # a repair may begin
    flip_a_bit(tmp_path / "out" / "rejected")
    assert retry_of(tmp_path, store).fused > manifest.counts.fused


def test_a_file_that_is_damaged_while_a_retry_fuses_ends_it_before_the_merge(tmp_path):
    finished(tmp_path)
    with pytest.raises(AccountingError, match="damaged"):
        retry_of(tmp_path, Store(str(tmp_path / "out")), executor=ThenDamages(tmp_path))


def test_other_edits_are_refused_until_a_killed_retry_is_finished(tmp_path, monkeypatch):
    manifest = finished(tmp_path)
    store = Store(str(tmp_path / "out"))
    monkeypatch.setattr(edit_module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        retry_of(tmp_path, store)
    with pytest.raises(ConfigError, match="a retry was begun and not finished"):
        retry_of(tmp_path, store, *STRICT)
    with pytest.raises(ConfigError, match="a retry was begun and not finished"):
        refuse_unfinished_edit(store, manifest)


def test_a_retry_whose_engine_failed_may_be_replaced_by_one_with_other_settings(tmp_path):
    """What the first one had fused is deleted. The partition is that of the output, whatever the command says."""
    finished(tmp_path / "calm", "lang")
    want = retry_of(tmp_path / "calm", Store(str(tmp_path / "calm" / "out")), partition_by="lang")
    finished(tmp_path, "lang")
    store = Store(str(tmp_path / "out"))
    with pytest.raises(EngineError):
        retry_of(tmp_path, store, *STRICT, partition_by="lang", executor=FailsAfterOne(LOCAL))
    assert store.list("_retry")
    with pytest.raises(ConfigError, match="a retry was begun and not finished"):
        refuse_unfinished_edit(store, read_manifest(store))
    assert retry_of(tmp_path, store).fused == want.fused, "its own partition_by would be shard"
    assert rows_of(tmp_path, "data") == rows_of(tmp_path / "calm", "data")
    verify(VerifyConfig(config(tmp_path).output, deep=True))


@pytest.mark.parametrize("wrong", ["", "invalid_utf8", "repetitions", "repetition;cut_off"])
def test_reasons_that_do_not_exist_or_that_no_setting_changes_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be 'rejected', or some of"):
        reasons_of(wrong)


def test_an_unfinished_output_cannot_be_retried(tmp_path):
    with pytest.raises(ConfigError, match="needs a finished output"):
        open_retry(Store(str(tmp_path)), "rejected", {}, [], config(tmp_path).output)
