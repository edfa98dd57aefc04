"""The api engine against a real HTTP server on 127.0.0.1 that misbehaves as servers do."""

import logging
import random
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pytest
from teacher import KEY, Teacher

from capsfusion_ray.config import ApiConfig, DecodeConfig, EngineConfig, GatesConfig, as_dict, to_yaml
from capsfusion_ray.core.columns import FUSED, ROW_ID
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.types import FinishReason, Prompt, WorkUnit
from capsfusion_ray.core.unit_batch import Apart, UnitBatch
from capsfusion_ray.core.unit_steps import ERROR, FINISH, admit
from capsfusion_ray.engines.api import engine as api
from capsfusion_ray.engines.api import openai
from capsfusion_ray.engines.base import build_engine
from capsfusion_ray.errors import ConfigError, CostCapReached, EndpointDown
from capsfusion_ray.storage import Store

GREEDY = DecodeConfig(num_beams=1)


@pytest.fixture
def teacher(monkeypatch):
    monkeypatch.setenv("CAPSFUSION_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(api, "BACKOFF_S", 0.01)
    monkeypatch.setattr(api, "LONGEST_BACKOFF_S", 0.1)
    server = Teacher()
    yield server
    server.close()


def engine_for(teacher, **more):
    config = EngineConfig(kind="api", api=ApiConfig(**({"url": teacher.url, "model": "teacher-1"} | more)))
    return build_engine(config, GREEDY)


def prompts(count, first=0):
    return [Prompt(f"row-{i}", f"Fuse this: row-{i}", "raw", "synthetic") for i in range(first, first + count)]


def run(engine):
    """All generations by id; each one once."""
    finished = {}
    while engine.unfinished:
        for generation in engine.step():
            assert generation.id not in finished
            finished[generation.id] = generation
    return finished


def run_until(engine, row):
    """The generations up to `row`'s, with other rows always in flight beside it."""
    finished, fed = {}, 8
    engine.submit(prompts(fed))
    while row not in finished:
        finished |= {generation.id: generation for generation in engine.step()}
        if engine.unfinished < 4:
            engine.submit(prompts(8, first=fed))
            fed += 8
    return finished | run(engine)


def assert_good(generations, count):
    assert {g.id: (g.text, g.finish, g.prompt_tokens, g.output_tokens) for g in generations.values()} == {
        f"row-{i}": (f"The fused caption of row-{i}.", FinishReason.EOS, 100, 10) for i in range(count)
    }


def test_a_server_that_misbehaves_at_random_loses_no_row_and_mixes_none_up(teacher):
    dice = random.Random(1)
    faults = ["truncated", "reset", 500, 503, (429, [("Retry-After", "0.05")]), b'{"choices": [', {"choices": []}]

    def script(row, number):
        if row in ("row-5", "row-50") and number == 1:
            return "slow"
        return dice.choice(faults) if number <= 2 and dice.random() < 0.5 else "good"

    teacher.script = script
    engine = engine_for(teacher, concurrency=16, timeout_s=10.0)
    engine.submit(prompts(60))
    finished = engine.step()  # continuous feeding: more comes while the first are in flight
    engine.submit(prompts(40, first=60))
    generations = {g.id: g for g in finished} | run(engine)
    assert_good(generations, 100)
    assert teacher.most <= 16
    assert sum(teacher.tries.values()) > 120, "the server did misbehave"


@pytest.mark.parametrize("concurrency", [1, 5])
def test_no_more_requests_are_in_flight_than_asked_for(teacher, concurrency):
    teacher.gather = concurrency  # on a busy machine one request may be answered before the next is sent
    engine = engine_for(teacher, concurrency=concurrency)
    engine.submit(prompts(40))
    assert_good(run(engine), 40)
    assert teacher.most == concurrency


def test_retry_after_holds_back_every_request(teacher):
    teacher.script = lambda row, number: (429, [("Retry-After", "1")]) if row == "row-0" and number == 1 else "good"
    engine = engine_for(teacher, concurrency=2)
    engine.submit(prompts(20))
    assert_good(run(engine), 20)
    gaps = [after - before for before, after in zip(teacher.times, teacher.times[1:], strict=False)]
    assert max(gaps) > 0.9


def test_a_limit_is_never_held_against_a_row(teacher):
    teacher.script = lambda row, number: 429 if row == "row-3" and number <= api.ROW_TRIES + 4 else "good"
    generations = run_until(engine_for(teacher, concurrency=2), "row-3")
    assert_good(generations, len(generations))
    assert teacher.tries["row-3"] == api.ROW_TRIES + 5


@pytest.mark.parametrize(
    ("act", "tries", "says"),
    [
        (400, 1, "status 400"),
        (413, 1, "status 413"),
        (b"<html>hello</html>", 3, "not JSON"),
        (b'{"choices": [{"message"', 3, "not JSON"),
        (b"[" * 100_000, 3, "not JSON"),
        (
            {"choices": [{"message": {"content": ["a part"]}, "finish_reason": "stop"}]},
            3,
            "does not follow the protocol",
        ),
        ({"choices": [{"message": {"content": "\ud83d"}, "finish_reason": "stop"}]}, 3, "does not follow the protocol"),
        ({"choices": [{"message": {"content": None}, "finish_reason": "tool_calls"}]}, 3, "tool_calls"),
        ({"choices": [{"message": {"content": "A cap"}, "finish_reason": {}}]}, 3, "not a caption"),
        ({"choices": [{"message": {"content": "A c"}, "finish_reason": "content_filter"}]}, 1, "content filter"),
        ({"choices": [{"message": {"content": None, "refusal": "I won't"}, "finish_reason": "stop"}]}, 1, "I won't"),
        (500, api.ROW_TRIES, "while other rows were answered"),
        ("reset", api.ROW_TRIES, "while other rows were answered"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_row_that_the_server_will_not_write_fails_alone_and_says_why(teacher, act, tries, says):
    teacher.script = lambda row, number: act if row == "row-7" else "good"
    generations = run_until(engine_for(teacher, concurrency=4), "row-7")
    bad = generations.pop("row-7")
    assert (bad.finish, bad.text) == (FinishReason.ERROR, "")
    assert bad.error.startswith("row-7: ")
    assert says in bad.error
    assert len(bad.error) < 500
    assert KEY not in bad.error
    assert {g.finish for g in generations.values()} == {FinishReason.EOS}
    assert teacher.tries["row-7"] >= tries if tries == api.ROW_TRIES else teacher.tries["row-7"] == tries


@pytest.mark.parametrize("act", [500, "reset"])
def test_rows_that_always_fail_and_are_left_over_at_the_end_fail_alone_too(teacher, act):
    """Nobody is answered beside them any more: a probe tells whether it is they or the server."""
    bad = {"row-7", "row-8"}
    teacher.script = lambda row, number: act if row in bad else "good"
    engine = engine_for(teacher, concurrency=4, gone_s=5)
    engine.submit(prompts(12))
    generations = run(engine)
    assert {row for row, g in generations.items() if g.finish is FinishReason.ERROR} == bad
    assert all("while other rows were answered" in generations[row].error for row in bad)
    assert sum(teacher.tries.values()) < 10 + 2 * 4 * api.ROW_TRIES, "a probe now and then"


def test_a_firewall_that_forbids_one_prompt_fails_that_row_alone(teacher):
    teacher.script = lambda row, number: 403 if row == "row-30" else "good"
    engine = engine_for(teacher, concurrency=1)
    engine.submit(prompts(40))
    generations = run(engine)
    assert [g.id for g in generations.values() if g.finish is FinishReason.ERROR] == ["row-30"]


def test_a_caption_cut_at_the_limit_says_so(teacher):
    teacher.script = lambda row, number: {"choices": [{"message": {"content": "A wh"}, "finish_reason": "length"}]}
    engine = engine_for(teacher)
    engine.submit(prompts(1))
    assert run(engine)["row-0"].finish is FinishReason.LENGTH


def test_a_server_that_is_back_in_time_costs_no_row(teacher):
    """Every row in flight fails more often than ROW_TRIES, all together: that is no row's fault."""
    in_flight = [f"row-{i}" for i in range(4)]
    down = api.ROW_TRIES + 2
    teacher.script = lambda row, number: "good" if all(teacher.tries[row] > down for row in in_flight) else 503
    engine = engine_for(teacher, concurrency=4)
    engine.submit(prompts(12))
    assert_good(run(engine), 12)


def test_a_server_that_is_gone_stops_the_engine_after_the_time_given(teacher):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    engine = engine_for(teacher, url=f"http://127.0.0.1:{port}/v1", gone_s=0.5)
    engine.submit(prompts(5))
    began = time.monotonic()
    with pytest.raises(EndpointDown, match=r"no good answer for engine.api.gone_s=0.5 seconds.*Connect"):
        run(engine)
    assert time.monotonic() - began >= 0.5


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (401, "CAPSFUSION_API_KEY"),
        (403, "CAPSFUSION_API_KEY"),
        (404, "/models"),
        (405, "/models"),
        (402, "add credit"),
        ((429, [], "insufficient_quota"), "add credit"),
        ((307, [("Location", "/elsewhere")]), "up to and including /v1"),
    ],
)
def test_a_wrong_key_url_or_account_stops_the_engine_and_names_the_way_out(teacher, act, says):
    teacher.script = lambda row, number: act
    engine = engine_for(teacher, concurrency=2)
    engine.submit(prompts(10))
    with pytest.raises(ConfigError) as caught:
        run(engine)
    message = str(caught.value)
    assert says in message
    assert teacher.url in message
    assert "teacher-1" in message
    assert KEY not in message
    assert sum(teacher.tries.values()) <= 2, "nothing more is sent"


def test_a_server_that_refuses_row_after_row_is_stopped_and_not_paid_for_all(teacher):
    teacher.script = lambda row, number: 400
    engine = engine_for(teacher, concurrency=4)
    engine.submit(prompts(500))
    with pytest.raises(ConfigError, match="50 rows in succession failed"):
        run(engine)
    assert sum(teacher.tries.values()) <= 50 + 4


def test_the_key_stands_in_no_log_error_repr_or_saved_config(teacher, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    teacher.script = lambda row, number: (503, []) if number == 1 else (400, [])  # both echo the key
    engine = engine_for(teacher)
    engine.submit(prompts(3))
    generations = run(engine)
    monkeypatch.setenv("CAPSFUSION_API_KEY", KEY + "x")  # echoed by the 401
    other = engine_for(teacher)
    other.submit(prompts(1))
    with pytest.raises(ConfigError, match="Incorrect API key provided") as caught:
        run(other)
    config = EngineConfig(kind="api", api=ApiConfig(url=teacher.url, model="m"))
    everything = [
        caplog.text,
        str(caught.value),
        repr(engine),
        repr(generations),
        repr(config),
        to_yaml(config),
        repr(as_dict(config)),
    ]
    assert not [text for text in everything if KEY in text]
    assert all("***" in text for text in [caplog.text, str(caught.value), *(g.error for g in generations.values())])


def test_the_cap_stops_the_engine_and_what_was_paid_for_is_handed_out(teacher):
    # 100 prompt tokens at 10 dollars a million and 10 output tokens at 100: 0.002 a row.
    engine = engine_for(teacher, concurrency=4, prompt_price=10.0, output_price=100.0, max_dollars=0.1)
    engine.submit(prompts(200))
    generations = []

    def drain():
        while engine.unfinished:
            generations.extend(engine.step())

    with pytest.raises(CostCapReached, match=r"max_dollars=0\.1"):
        drain()
    assert 50 <= len(generations) == sum(teacher.tries.values()) <= 50 + 3
    assert engine.dollars == pytest.approx(0.002 * len(generations))


def test_a_cap_is_refused_at_a_server_that_does_not_count(teacher):
    teacher.script = lambda row, number: {"usage": None}
    engine = engine_for(teacher, prompt_price=1.0, output_price=1.0, max_dollars=1.0)
    engine.submit(prompts(3))
    with pytest.raises(ConfigError, match="no usage"):
        run(engine)
    free = engine_for(teacher)
    free.submit(prompts(3))
    assert {(g.finish, g.prompt_tokens) for g in run(free).values()} == {(FinishReason.EOS, 0)}


@pytest.mark.parametrize("chat", [True, False])
def test_a_request_is_the_protocols_with_the_users_fields_over_ours(teacher, chat):
    request = {"top_p": 0.9, "max_tokens": None, "max_completion_tokens": 300}
    engine = engine_for(teacher, chat=chat, temperature=0.7, request=request)
    engine.submit(prompts(1))
    assert_good(run(engine), 1)
    text = "Fuse this: row-0"
    prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    assert teacher.bodies == [
        {"model": "teacher-1", "temperature": 0.7, "top_p": 0.9, "max_completion_tokens": 300} | prompt
    ]


@pytest.mark.parametrize(
    ("config", "decode", "says"),
    [
        ({"url": ""}, {}, "engine.api.url"),
        ({"model": ""}, {}, "engine.api.model"),
        ({"key_env": "NOT_SET_ANYWHERE"}, {}, "NOT_SET_ANYWHERE"),
        ({}, {"num_beams": 3}, "engine.kind=beam"),
        ({}, {"no_repeat_ngram": 5}, "decode.no_repeat_ngram"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(teacher, config, decode, says):
    engine = EngineConfig(kind="api", api=ApiConfig(**({"url": teacher.url, "model": "m"} | config)))
    with pytest.raises(ConfigError, match=says):
        build_engine(engine, DecodeConfig(**({"num_beams": 1} | decode)))
    assert not teacher.tries


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3), ("0.5", 0.5), (None, None), ("soon", None), ("-1", None), ("nan", None), ("inf", None)],
)
def test_retry_after_is_seconds_or_nothing(value, seconds):
    assert openai.retry_after(value) == seconds


def test_retry_after_may_be_a_date():
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 50 < openai.retry_after(in_a_minute) <= 60


def test_the_engine_needs_no_torch():
    code = "import sys, capsfusion_ray.engines.api.engine; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_unit_of_an_actor_comes_back_whole(teacher):
    """Runs the code of the actor in this process: rows, order and errors of a unit."""
    from capsfusion_ray.run.unit_fuser import (
        start_fuser,
    )  # a GPU machine need not have Ray, so run/ is not imported above

    teacher.script = lambda row, number: (
        400 if row == "Sentence:" and '"Poison' in teacher.bodies[-1]["messages"][0]["content"] else "good"
    )
    config = EngineConfig(kind="api", api=ApiConfig(url=teacher.url, model="m"))
    unit = WorkUnit("id", "shard.parquet", 0, 30, "g00000")
    names = [f'"Poison" {i}' if i == 4 else f"Lighthouse {i}" for i in range(30)]
    rows = [
        {
            "image_url": None,
            "laion_2b": name,
            "laion_coco": "A coast.",
            "row_id": f"shard.parquet:{i}",
            "_invalid": None,
        }
        for i, name in enumerate(names)
    ]
    batch = UnitBatch(unit, admit(pa.Table.from_pylist(rows), GatesConfig()), Apart())
    fuser, _ = start_fuser(config, GREEDY, TEMPLATE)
    table = fuser.fuse(batch).table.to_pylist()
    assert [row[ROW_ID] for row in table] == [row["row_id"] for row in rows]
    assert [i for i, row in enumerate(table) if row[FINISH] == "error"] == [4]
    assert "status 400" in table[4][ERROR]
    assert all(row[FUSED] for i, row in enumerate(table) if i != 4)


@pytest.mark.parametrize(("act", "error"), [(401, ConfigError), ("good", CostCapReached)])
def test_a_refused_key_or_a_cap_fails_the_units_and_not_the_process(teacher, tmp_path, act, error):
    from capsfusion_ray.run.actor import ActorTools, FusionActor  # a GPU machine need not have Ray
    from capsfusion_ray.run.poison_rows import AttemptLog

    teacher.script = lambda row, number: act
    config = ApiConfig(url=teacher.url, model="m", prompt_price=1e4, output_price=1.0, max_dollars=2.0)
    rows = [
        {
            "image_url": None,
            "laion_2b": f"Hut {i}",
            "laion_coco": "A hut.",
            "row_id": f"a.parquet:{i}",
            "_invalid": None,
        }
        for i in range(50)
    ]
    table = admit(pa.Table.from_pylist(rows), GatesConfig())
    batch = UnitBatch(WorkUnit("id", "a.parquet", 0, 50, "g00000"), table, Apart()).pack()
    tools = ActorTools(AttemptLog(Store(str(tmp_path)), "run"))
    actor = FusionActor(EngineConfig(kind="api", api=config), GREEDY, TEMPLATE, tools)
    for _ in range(2):  # the second unit comes after the engine has ended
        with pytest.raises(error):
            actor(batch)
