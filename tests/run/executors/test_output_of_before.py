"""Outputs that version 0.1 left are resumed and retried. The local executor runs here; tests/jobs does the same on Ray."""

from old_outputs import FIXTURE, copy_of
from outputs import snapshot

from capsfusion_ray.config import FuseConfig, VerifyConfig, parse_config
from capsfusion_ray.dataset.verify import verify
from capsfusion_ray.run.driver import fuse

LOCAL = "cluster.kind=local"
MILD = ("retry=rejected", "gates.cut_off={action: flag, threshold: 1, flag_from: null}")


def run(words, *more):
    return fuse(parse_config(FuseConfig, [*words, LOCAL, *more]))


def check(folder):
    return verify(parse_config(VerifyConfig, [f"output.path={folder}", "deep=true"]))["rows"]


def test_a_begun_output_is_resumed_to_the_very_files_of_the_finished_one(tmp_path):
    done = run(copy_of("begun", tmp_path))
    assert (done["units"], done["resumed_units"]) == (8, 2)
    assert snapshot(tmp_path / "begun") == snapshot(FIXTURE / "finished")
    assert check(tmp_path / "begun")["planned"] == 80


def test_its_input_may_be_named_relative_to_the_working_folder(tmp_path, monkeypatch):
    words = copy_of("begun", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(["input.path=captions", "output.path=begun", *words[2:]])["resumed_units"] == 2
    assert snapshot(tmp_path / "begun") == snapshot(FIXTURE / "finished")


def test_a_finished_output_is_finished(tmp_path):
    done = run(copy_of("finished", tmp_path))
    assert done["resumed_units"] == done["units"] == 8
    assert snapshot(tmp_path / "finished") == snapshot(FIXTURE / "finished")


def test_a_finished_output_is_retried(tmp_path):
    words = copy_of("finished", tmp_path)
    before = check(tmp_path / "finished")
    done = run(words, *MILD)
    assert done["rows"] == before | {"fused": before["fused"] + 17, "rejected": before["rejected"] - 17}
    assert check(tmp_path / "finished") == done["rows"]
    old = {name: data for name, data in snapshot(FIXTURE / "finished").items() if name.startswith("data/")}
    assert old.items() <= snapshot(tmp_path / "finished").items(), "captions that were fused before are not touched"
