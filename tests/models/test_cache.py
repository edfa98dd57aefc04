"""A model of a bucket or of the hub is fetched once and completely, and is the one that the driver inspected."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.models import cache as modelcache
from capsfusion_ray.models.cache import FOLDER, SUMS, folder_of
from capsfusion_ray.models.content import content_hash
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model
from capsfusion_ray.models.location import EMBEDDED
from capsfusion_ray.storage import Store

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = bytes(range(256)) * 20_000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "fusion.json": b'{"prompt_template": "Fuse {raw} | {synthetic} ->", "max_prompt_tokens": 99}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
}


@pytest.fixture(autouse=True)
def hf_home(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture
def in_a_bucket(bucket, s3_client, s3_options):
    """The engine of a model in a bucket, as the driver resolves it."""
    for name, data in (FILES | {"README.md": b"a card", "original/model.pth": b"not for us"}).items():
        s3_client.put_object(Bucket=bucket, Key=f"models/mine/{name}", Body=data)
    return resolved(EngineConfig(model=f"s3://{bucket}/models/mine/", storage=s3_options))


def resolved(engine):
    return resolve_with_model(engine, DecodeConfig(), inspect_model(engine))[0]


def held(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def put(s3_client, engine, name, data):
    bucket, _, key = engine.model.removeprefix("s3://").partition("/")
    s3_client.put_object(Bucket=bucket, Key=key + name, Body=data)


# --------------------------------------------------------------------------------------------------------- from a bucket


def test_a_model_of_a_bucket_is_inspected_without_being_fetched(in_a_bucket, hf_home):
    assert in_a_bucket.max_prompt_tokens == 99, "its fusion.json was read"
    assert not hf_home.exists()


def test_a_model_of_a_bucket_is_fetched_once_and_is_the_same_as_on_disk(
    in_a_bucket, s3_client, hf_home, tmp_path, monkeypatch
):
    folder = folder_of(in_a_bucket)
    assert held(folder) == FILES, "neither the card nor other programs' weights"
    assert Path(folder).parent == hf_home / FOLDER
    on_disk = tmp_path / "copy"
    shutil.copytree(folder, on_disk)
    assert inspect_model(EngineConfig(model=str(on_disk))).content == in_a_bucket.revision, (
        "a moved model is the same model"
    )
    monkeypatch.setattr(modelcache, "_fetch", None)  # whoever calls it now fails
    assert folder_of(in_a_bucket) == folder


def test_the_tokenizer_alone_is_fetched_for_a_plan(in_a_bucket):
    assert held(folder_of(in_a_bucket, weights=False)).keys() == FILES.keys() - {"model.safetensors"}


FETCH = """
import json, logging, sys
from capsfusion_ray.config import EngineConfig
from capsfusion_ray.models.cache import folder_of
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
print(folder_of(EngineConfig(**json.loads(sys.argv[1])), weights=json.loads(sys.argv[2])))
"""


def in_a_process(engine, weights=True, **env):
    asked = {"model": engine.model, "revision": engine.revision, "storage": engine.storage}
    command = [sys.executable, "-c", FETCH, json.dumps(asked), json.dumps(weights)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out.strip(), err


def test_actors_that_start_together_on_one_node_fetch_it_once(in_a_bucket, hf_home):
    processes = [in_a_process(in_a_bucket, HF_HOME=str(hf_home)) for _ in range(3)]
    told = [ended(process) for process in processes]
    assert {(code, out) for code, out, _ in told} == {(0, str(hf_home / FOLDER / in_a_bucket.revision))}
    assert sum("fetched s3://" in err for _, _, err in told) == 1
    assert held(told[0][1]) == FILES


def test_files_that_a_killed_process_copied_are_kept(in_a_bucket, hf_home):
    partial = hf_home / FOLDER / f"{in_a_bucket.revision}.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(WEIGHTS)
    os.utime(partial / "model.safetensors", (1, 1))
    (partial / "tokenizer.json.incomplete").write_bytes(b"{")
    folder = folder_of(in_a_bucket)
    assert held(folder) == FILES
    assert (Path(folder) / "model.safetensors").stat().st_mtime == 1, "it was here already"


def test_a_copy_that_is_damaged_or_cut_short_is_never_used(in_a_bucket, hf_home):
    folder = Path(folder_of(in_a_bucket))
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")
    assert held(folder_of(in_a_bucket)) == FILES
    shutil.rmtree(folder)
    partial = folder.with_suffix(".partial")
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")  # of the right size
    with pytest.raises(EngineError, match="damaged"):
        folder_of(in_a_bucket)
    assert held(folder_of(in_a_bucket)) == FILES, "the damaged bytes are gone"


def test_a_model_that_changes_in_the_bucket_during_the_run_is_refused(in_a_bucket, s3_client):
    put(s3_client, in_a_bucket, "model.safetensors", WEIGHTS + b"more")
    with pytest.raises(ConfigError, match=f"this run is of {in_a_bucket.revision}"):
        folder_of(in_a_bucket)
    with pytest.raises(ConfigError, match=r"engine\.revision="):
        inspect_model(in_a_bucket)


def test_whole_files_are_checked_against_the_list_of_checksums_of_the_model(in_a_bucket, s3_client):
    right = hashlib.sha256(WEIGHTS).hexdigest()
    put(s3_client, in_a_bucket, SUMS, f"{'0' * 64}  model.safetensors\n".encode())
    with pytest.raises(EngineError, match=rf"model\.safetensors.*{right}"):
        folder_of(in_a_bucket)
    put(s3_client, in_a_bucket, SUMS, f"{right} *./model.safetensors\n".encode())
    assert held(folder_of(in_a_bucket)) == FILES


def test_a_disk_that_is_too_small_is_named_before_anything_is_fetched(in_a_bucket, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(ConfigError, match="HF_HOME"):
        folder_of(in_a_bucket)


def test_a_folder_that_differs_on_one_node_is_refused(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    engine = resolved(EngineConfig(model=str(tmp_path)))
    assert folder_of(engine) == str(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS[::-1])
    with pytest.raises(ConfigError, match=f"this run is of {engine.revision}"):
        folder_of(engine)


def test_a_bucket_without_a_model_is_refused_by_name(bucket, s3_options):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        inspect_model(EngineConfig(model=f"s3://{bucket}/nothing", storage=s3_options))


# ---------------------------------------------------------------------------------------------------------- from the hub

LOOK = """
import json, sys
from capsfusion_ray.models.inspect import inspect_model
from capsfusion_ray.config import EngineConfig
found = inspect_model(EngineConfig(**json.loads(sys.argv[1])))
print(json.dumps([found.content, found.template, found.revision]))
"""


@pytest.fixture
def hub():
    server = FakeHub("me/fusion")
    yield server
    server.close()


def environment(hub, hf_home, offline=False):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(hf_home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "NO_PROXY": "127.0.0.1",
    }


def look(engine, **env):
    asked = json.dumps({"model": engine.model, "revision": engine.revision})
    done = subprocess.run(
        [sys.executable, "-c", LOOK, asked], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300
    )
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def test_actors_load_the_commit_that_the_driver_inspected_after_main_has_moved(hub, hf_home, tmp_path):
    first = hub.push(
        FILES | {"pytorch_model.bin": b"the same weights again", "original/consolidated.pth": b"and again"}
    )
    content, template, revision = look(EngineConfig(model="me/fusion"), **environment(hub, tmp_path / "driver"))
    assert (content, revision) == (f"hub:{first}", first)
    assert template == "Fuse {raw} | {synthetic} ->", "a hub model's fusion.json counts"
    assert not hub.fetched["model.safetensors"], "the driver needs no weights"
    hub.push(FILES | {"model.safetensors": b"other weights", "fusion.json": b"{}"})
    engine = EngineConfig(model="me/fusion", revision=revision)
    code, folder, err = ended(in_a_process(engine, **environment(hub, hf_home)))
    assert code == 0, err
    assert held(folder) == FILES, "that commit, without weights in other forms"
    asked = hub.requests
    assert ended(in_a_process(engine, **environment(hub, hf_home, offline=True)))[:2] == (0, folder)
    assert hub.requests == asked, "offline mode asks nobody"


def test_a_driver_uses_the_commit_in_its_cache_or_the_one_that_is_given(hub, tmp_path):
    first = hub.push(FILES)
    env = environment(hub, tmp_path / "driver")
    assert look(EngineConfig(model="me/fusion"), **env)[2] == first
    second = hub.push(FILES | {"fusion.json": b"{}"})
    assert look(EngineConfig(model="me/fusion"), **env)[2] == first, "a resumed run finds its own plan"
    assert look(EngineConfig(model="me/fusion", revision=second), **env)[2] == second


def test_a_model_that_a_node_cannot_fetch_is_one_line_with_its_name(hub, hf_home):
    commit = hub.push(FILES)
    nowhere = environment(hub, hf_home, offline=True)
    assert "ConfigError: engine.model=me/fusion: neither a folder" in look(EngineConfig(model="me/fusion"), **nowhere)
    code, _, err = ended(in_a_process(EngineConfig(model="me/fusion", revision=commit), **nowhere))
    assert code == 1
    assert f"ConfigError: engine.model=me/fusion, commit {commit}: not complete in HF_HOME" in err
    cut_off = environment(hub, hf_home) | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # as in a subnet without a way out
    code, _, err = ended(in_a_process(EngineConfig(model="me/fusion", revision=commit), **cut_off))
    assert code == 1
    assert f"ConfigError: engine.model=me/fusion, commit {commit}: not complete in HF_HOME" in err
    absent = look(EngineConfig(model="me/other"), **environment(hub, hf_home))
    assert "engine.model=me/other: neither a folder" in absent


def test_a_model_is_refused_if_the_hub_does_not_say_whether_it_has_a_fusion_file(hub, hf_home):
    """Without its fusion.json a model would get another prompt, and nobody would notice."""
    commit = hub.push(FILES)
    fetched = ended(
        in_a_process(EngineConfig(model="me/fusion", revision=commit), weights=False, **environment(hub, hf_home))
    )[1]
    Path(fetched, "fusion.json").unlink()
    gone = environment(hub, hf_home) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "the hub does not answer whether the model has a fusion.json" in look(
        EngineConfig(model="me/fusion", revision=commit), **gone
    )
    offline = look(EngineConfig(model="me/fusion", revision=commit), **gone | {"HF_HUB_OFFLINE": "1"})
    assert offline[0] == f"hub:{commit}", "who says offline takes what is here"


# ------------------------------------------------------------------------------------------------------------- and loads


def test_a_model_of_a_bucket_is_loaded_without_a_folder_on_the_node(bucket, s3_client, s3_options):
    from capsfusion_ray.engines.loading import load_model

    for path in (ROOT / "models" / EMBEDDED).iterdir():
        s3_client.put_object(Bucket=bucket, Key=f"tiny/{path.name}", Body=path.read_bytes())
    engine = resolved(EngineConfig(model=f"s3://{bucket}/tiny", storage=s3_options, device="cpu"))
    assert engine.revision == content_hash(Store(str(ROOT / "models" / EMBEDDED)))
    assert load_model(engine).encode(["a red car"]) == load_model(dataclasses.replace(engine, model="")).encode(
        ["a red car"]
    )
