"""Fuser: lists and batches of captions, without Ray and without files."""

import pickle
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest

import capsfusion_ray as cf

RAW = ["Eiffel Tower Paris 1889", None, "", "IMG_1234.jpg", "Eiffel Tower Paris 1889"]
SYNTHETIC = ["A tall tower in a city.", "a dog", "a dog", "A cat on a sofa.", "A tall tower in a city."]


@pytest.fixture(scope="module")
def fuser():
    return cf.Fuser(engine="echo", columns=("capsfusion", "outcome", "reason", "flags"))


def test_lists_give_one_result_per_pair_in_order_and_a_missing_caption_is_a_reject(fuser):
    fused = fuser(RAW, SYNTHETIC)
    assert [row.outcome for row in fused] == ["fused", "rejected", "rejected", "fused", "fused"]
    assert [row.reason for row in fused] == [None, "null_caption", "empty_caption", None, None]
    assert fused[0].capsfusion == "This tall tower in a city: Eiffel Tower Paris 1889."
    assert fused[0] == fused[4]
    assert fused[0].finish == "eos"
    assert fused[0].output_tokens == len(fused[0].capsfusion.split())
    assert fused[1].capsfusion is fused[1].written is None
    assert fuser([], []) == []


def test_gates_keep_reject_and_flag_as_in_a_run():
    fuser = cf.Fuser(engine="echo", gates=True, config={"gates.copy_of_one": {"action": "reject", "threshold": 0.5}})
    kept, fused = fuser(["IMG_1234.jpg", "Cape Nord 1889 lighthouse"], ["A cat on a sofa.", "A tall tower by the sea."])
    assert (kept.outcome, kept.capsfusion, kept.flags) == ("kept", "A cat on a sofa.", ("kept", "boilerplate"))
    assert fused.outcome == "fused"
    cut = cf.Fuser(
        engine="echo",
        gates=True,
        config={"decode.max_new_tokens": 3, "gates.cut_off": {"action": "reject", "threshold": 1, "flag_from": None}},
    )
    (row,) = cut(["Cape Nord 1889 lighthouse"], ["A tall tower by the sea."])
    assert (row.outcome, row.reason, row.capsfusion, row.finish) == ("rejected", "cut_off", None, "length")
    assert len(row.written.split()) == 3


@pytest.mark.parametrize("kind", ["table", "record batch", "lists", "arrays"])
def test_a_batch_comes_back_in_its_own_form_with_the_columns_asked_for(fuser, kind):
    columns = {"raw": RAW, "synthetic": SYNTHETIC, "width": [1, 2, 3, 4, 5]}
    batch = {
        "table": lambda: pa.table(columns),
        "record batch": lambda: pa.RecordBatch.from_pydict(columns),
        "lists": lambda: columns,
        "arrays": lambda: {name: np.array(values, dtype=object) for name, values in columns.items()},
    }[kind]()
    fused = fuser(batch)
    assert type(fused) is type(batch)
    read = pa.table(fused) if isinstance(fused, dict) else fused
    assert read.schema.names == ["raw", "synthetic", "width", "capsfusion", "outcome", "reason", "flags"]
    assert read.to_pydict() == columns | {
        "capsfusion": [row.capsfusion for row in fuser(RAW, SYNTHETIC)],
        "outcome": ["fused", "rejected", "rejected", "fused", "fused"],
        "reason": [None, "null_caption", "empty_caption", None, None],
        "flags": [[]] * 5,
    }


def test_a_batch_without_rows_has_typed_columns_and_a_column_of_that_name_is_replaced(fuser):
    schema = pa.schema([("raw", pa.string()), ("synthetic", pa.string()), ("capsfusion", pa.int64())])
    fused = fuser(schema.empty_table())
    assert fused.schema.names == ["raw", "synthetic", "capsfusion", "outcome", "reason", "flags"]
    assert fused.schema.field("capsfusion").type == pa.string()
    assert fused.schema.field("flags").type == pa.list_(pa.string())


def test_columns_of_other_names_are_named():
    fuser = cf.Fuser(engine="echo", raw="left", synthetic="right")
    assert fuser({"left": ["a b"], "right": ["c d"]})["capsfusion"] == ["This d: a b."]


def test_what_is_no_caption_is_one_error_or_one_reject(fuser):
    assert fuser([float("nan"), "a\ud800b"], ["x y", "x y"])[0].reason == "null_caption"
    assert fuser([float("nan"), "a\ud800b"], ["x y", "x y"])[1].reason == "invalid_utf8"
    for batch, words in (
        ((["a"], ["b", "c"]), "1 raw and 2 synthetic"),
        (([7], ["b"]), "type int"),
        (("a", "b"), "a list"),
        ((["a"],), "batch_format"),
        (({"raw": ["a"], "text2": ["b"]},), "no column laion_coco or synthetic"),
    ):
        with pytest.raises(cf.SourceError, match=words):
            fuser(*batch)
    for arguments, words in (
        ({"columns": ("caption",)}, "not among"),
        ({"engine": "eco"}, "engine.kind"),
        ({"config": {"input.path": "x"}}, "unknown key input"),
    ):
        with pytest.raises(cf.ConfigError, match=words):
            cf.Fuser(**arguments)


def test_a_call_that_was_interrupted_leaves_nothing_to_the_next_one(fuser, monkeypatch):
    step, calls = fuser._engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(fuser._engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fuser(["Cape Nord"], ["a lighthouse"])
    assert fuser(["Cape South"], ["a harbour"])[0].capsfusion == "This harbour: Cape South."


def test_threads_get_their_own_captions(fuser):
    got = {}

    def call(i):
        got[i] = [row.capsfusion for row in fuser([f"Cape {i} No. {n}" for n in range(50)], ["a lighthouse"] * 50)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    threaded = dict(got)
    for i in range(4):
        call(i)
    assert got == threaded


def test_the_embedded_model_writes_what_a_run_with_it_writes():
    """The oracle is the engine itself, driven as training/evaluate.py drives it."""
    from capsfusion_ray.config import DecodeConfig, EngineConfig
    from capsfusion_ray.core.types import CaptionPair
    from capsfusion_ray.training.evaluate import generate

    raw, synthetic = (
        ["Cape Nord lighthouse 1889", "Lebkuchen-Schmidt stand"],
        ["A tall tower by the sea.", "A food stall."],
    )
    want = generate(
        EngineConfig(),
        DecodeConfig(),
        [CaptionPair(str(i), *pair) for i, pair in enumerate(zip(raw, synthetic, strict=True))],
    )
    assert [row.capsfusion for row in cf.Fuser()(raw, synthetic)] == [want["0"], want["1"]]


def test_ray_data_can_construct_it_in_its_own_processes_and_no_ray_is_loaded_here():
    assert pickle.loads(pickle.dumps(cf.Fuser)) is cf.Fuser
    assert pickle.loads(pickle.dumps(cf.FusedCaption("x"))) == cf.FusedCaption("x")
    look = "import capsfusion_ray as cf, sys; cf.Fuser(engine='echo')(['a b'], ['c d']); sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
