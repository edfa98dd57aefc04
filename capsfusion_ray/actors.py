"""One actor: a GPU (or CPU share), an engine loaded once, units in, rows out. Nothing heavy but the engine runs here."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

import pyarrow as pa

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.engines.base import Engine, build_engine
from capsfusion_ray.errors import RowError
from capsfusion_ray.models import locate
from capsfusion_ray.prompt import PromptBuilder
from capsfusion_ray.rows import FinishReason, Generation, Prompt
from capsfusion_ray.stages import waiting_pairs, with_generations
from capsfusion_ray.units import DEVICE, ENGINE_S, UnitBatch

log = logging.getLogger(__name__)
EXIT_ENGINE_DEAD = 70  # EX_SOFTWARE


@dataclass
class _Request:
    """One unit's prompts on their way through the engine thread."""

    prompts: list[Prompt]
    generations: dict[str, Generation] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


class FusionActor:
    """The callable that Ray Data runs: a one-row batch holding a unit -> the same unit with its generations.

    Several calls run at once (one a unit in flight); a single thread drives the engine and refills its slots from all
    of them, so that slots never drain between units.
    """

    def __init__(self, engine: EngineConfig, decode: DecodeConfig, template: str) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if engine.kind != "echo":
            engine = dataclasses.replace(engine, model=locate(engine.model))
        self._engine: Engine = build_engine(engine, decode)
        self._prompts = PromptBuilder(template, self._engine.encode, engine.max_prompt_tokens)
        self._encode_lock = threading.Lock()  # a fast tokenizer must not be entered by two threads at once
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._device = f"{socket.gethostname()}:{_device_name(engine)}"
        threading.Thread(target=self._drive, name="engine", daemon=True).start()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Fuse one unit. Every row that was waiting has a generation afterwards, or an error of its own."""
        unit = UnitBatch.unpack(batch)
        pairs, places = waiting_pairs(unit.table)
        began = time.monotonic()
        with self._encode_lock:
            built = self._prompts.build(pairs)
        prompts = [prompt for prompt in built if isinstance(prompt, Prompt)]
        request = _Request(prompts)
        if prompts:
            self._requests.put(request)
            request.done.wait()
        generations: dict[int, Generation] = {}
        for pair, prompt in zip(pairs, built, strict=True):
            if isinstance(prompt, RowError):
                generation = Generation(pair.row_id, "", FinishReason.ERROR, error=str(prompt))
            else:
                generation = request.generations[prompt.id]
            generations |= dict.fromkeys(places[pair.raw, pair.synthetic], generation)
        spent = {ENGINE_S: round(time.monotonic() - began, 3), DEVICE: self._device}
        return UnitBatch(unit.unit, with_generations(unit.table, generations), unit.apart, spent).pack()

    def _drive(self) -> None:
        """The engine thread: submit what has come, step, hand out what has finished."""
        owner: dict[str, _Request] = {}
        try:
            while True:
                while not self._engine.unfinished or not self._requests.empty():
                    request = self._requests.get()  # blocks only while the engine has nothing to do
                    owner |= dict.fromkeys((prompt.id for prompt in request.prompts), request)
                    self._engine.submit(request.prompts)
                for generation in self._engine.step():
                    request = owner.pop(generation.id)
                    request.generations[generation.id] = generation
                    if len(request.generations) == len(request.prompts):
                        request.done.set()
        except BaseException:
            # A dead engine must end its process: Ray would send the retry to this same actor for ever. The rows in
            # flight are named, so that the one that kills engines can be found.
            log.exception("the engine died with %d rows in flight: %s", len(owner), sorted(owner)[:20])
            sys.stderr.flush()
            os._exit(EXIT_ENGINE_DEAD)


def _device_name(engine: EngineConfig) -> str:
    if engine.kind == "echo":
        return "none"
    import torch

    if torch.cuda.is_available() and engine.device != "cpu":
        return str(torch.cuda.get_device_name())
    return "cpu"


