"""The cost in the manifest: estimate and actual. Engine time that several units share is counted once."""

import threading
import time

import pyarrow as pa
import pytest

from capsfusion_ray.config import DecodeConfig, EngineConfig, GatesConfig, PlanConfig, parse_config
from capsfusion_ray.core.accounting import UnitSummary
from capsfusion_ray.core.plan import Plan
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.types import FinishReason, Generation, WorkUnit
from capsfusion_ray.core.unit_batch import BUSY_S, ENGINE_S, Apart, UnitBatch
from capsfusion_ray.core.unit_steps import admit
from capsfusion_ray.engines.base import Occupancy
from capsfusion_ray.models.inspect import ModelInfo, resolve_with_model
from capsfusion_ray.run.cost import cost
from capsfusion_ray.run.pool import Pool
from capsfusion_ray.run.survey import base_of, speed
from capsfusion_ray.run.unit_fuser import start_fuser

STEP_S = 0.02


class OnePerStep:
    """Writes one caption per step, in the order of submission."""

    def __init__(self, *_):
        self.queue, self.steps = [], 0

    def encode(self, texts):
        return [[] for _ in texts]

    def submit(self, prompts):
        self.queue += prompts

    @property
    def unfinished(self):
        return len(self.queue)

    @property
    def occupancy(self):
        return Occupancy(len(self.queue), 1)

    def step(self):
        time.sleep(STEP_S)
        self.steps += 1
        return [Generation(self.queue.pop(0).id, "a caption", FinishReason.EOS)]


def test_units_in_flight_share_the_engines_time_and_it_is_counted_once():
    engine = OnePerStep()
    fuser, _ = start_fuser(EngineConfig(kind="echo"), DecodeConfig(), TEMPLATE, lambda *_: engine)
    spent = {}

    def fuse(name, rows):
        pairs = [
            {
                "row_id": f"{name}:{i}",
                "image_url": None,
                "laion_2b": f"raw {name} {i}",
                "laion_coco": f"Synthetic {name} {i}.",
            }
            for i in range(rows)
        ]
        unit = WorkUnit(name, "p", 0, rows, "g")
        batch = UnitBatch(unit, admit(with_invalid(pa.Table.from_pylist(pairs)), GatesConfig()), Apart())
        spent[name] = fuser.fuse(batch).spent

    units = [threading.Thread(target=fuse, args=(name, rows)) for name, rows in (("a", 10), ("b", 20))]
    for thread in units:
        thread.start()
    for thread in units:
        thread.join()
    worked = sum(unit[BUSY_S] for unit in spent.values())
    assert engine.steps == 30
    assert 30 * STEP_S <= worked < 30 * STEP_S * 1.5
    assert sum(unit[ENGINE_S] for unit in spent.values()) > worked, "wall times of units in flight overlap"


def with_invalid(table):
    from capsfusion_ray.core.columns import INVALID, PAIR_FIELDS

    table = table.select([field.name for field in PAIR_FIELDS]).cast(pa.schema(PAIR_FIELDS))
    return table.append_column(INVALID, pa.nulls(table.num_rows, pa.string()))


def figures(gpus):
    cfg = parse_config(PlanConfig, ["unit.captions_per_s=50", "cluster.price_per_gpu_hour=3"], complete=False)
    units = tuple(WorkUnit(name, "p", start, start + 900, "g") for name, start in (("a", 0), ("b", 900)))
    plan = Plan(1, {}, 900, (), units, ())
    done = [
        UnitSummary(u.id, u.path, u.start, u.stop, fused=890, rejected=10, busy_s=20.0, engine_s=39.0) for u in units
    ]
    return cost(cfg, Pool(1, 4, 1.0, gpus, 2), plan, done)


def test_the_cost_holds_the_estimate_and_the_actual_figures():
    assert figures(1.0) == {
        "gpus_per_actor": 1.0,
        "usd_per_gpu_hour": 3,
        "estimate": {"gpu_s": 36.0, "usd": 0.03, "captions_per_gpu_hour": 180_000},
        "actual": {"gpu_s": 40.0, "usd": 0.0333, "captions_per_gpu_hour": 162_000},
    }
    assert figures(0.5)["actual"] == {"gpu_s": 20.0, "usd": 0.0167, "captions_per_gpu_hour": 324_000}
    assert figures(0.0)["actual"] == {"gpu_s": 0.0, "usd": 0.0, "captions_per_gpu_hour": None}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_vllm_can_be_planned_and_its_sampling_is_part_of_what_decides_the_output(device):
    model = ModelInfo("{raw}{synthetic}", "0", False, None, {})

    def base(*words):
        cfg = parse_config(PlanConfig, ["engine.kind=vllm", "decode.num_beams=1", *words], complete=False)
        resolve_with_model(cfg.engine, cfg.decode, model)
        assert speed(cfg, device) > 0
        return base_of(cfg, model)

    assert base() == base("engine.vllm.tensor_parallel=2")
    for decides in (
        "engine.vllm.temperature=0.5",
        "engine.vllm.sampling.top_p=0.9",
        "engine.vllm.options.quantization=fp8",
    ):
        assert base() != base(decides)
