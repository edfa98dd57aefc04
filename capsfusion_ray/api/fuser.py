"""Fuse captions in this process: lists in a notebook, batches in a Ray Data pipeline of your own. Knows no Ray and no files."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa

from capsfusion_ray.api.settings import Config, Place, parsed
from capsfusion_ray.config import DecodeConfig, EngineConfig, GatesConfig, section
from capsfusion_ray.core.columns import (
    DETAIL,
    FLAGS,
    FUSED,
    OUTCOME,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    RAW,
    REASON,
    SYNTHETIC,
)
from capsfusion_ray.core.gates import judge_failed, judge_sources, judge_text, kept_text
from capsfusion_ray.core.prompt import PromptBuilder
from capsfusion_ray.core.types import CaptionPair, FinishReason, Generation, Outcome, Reason, Verdict
from capsfusion_ray.core.unit_steps import KEPT
from capsfusion_ray.engines.base import build_engine
from capsfusion_ray.errors import ConfigError, RowError, SourceError
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model
from capsfusion_ray.sources.presets import PRESETS

Columns = Mapping[str, Any]
# The columns that a batch can come back with, and their types.
TYPES = {
    FUSED: pa.string(),
    OUTCOME: pa.string(),
    REASON: pa.string(),
    DETAIL: pa.string(),
    FLAGS: pa.list_(pa.string()),
    "finish": pa.string(),
    PROMPT_TOKENS: pa.int32(),
    OUTPUT_TOKENS: pa.int32(),
    "error": pa.string(),
}
_NO_GATES = GatesConfig(boilerplate="fuse", mismatched_pair="fuse")  # a missing caption is rejected all the same


@dataclass(frozen=True, slots=True)
class FusedCaption:
    """What became of one pair of captions."""

    capsfusion: str | None  # the caption; None: the pair was rejected
    outcome: Outcome = Outcome.FUSED  # fused, kept (one source as it is, by policy) or rejected
    reason: Reason | None = None  # why it was rejected or kept: docs/gates.md
    detail: str = ""  # on what the reason rests
    flags: tuple[str, ...] = ()  # gates that matched and only flag
    written: str | None = None  # what the engine wrote, also for a rejected pair; None: it was not asked
    finish: str | None = None  # how the engine ended: eos, length or error
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""  # why the engine could not write


@dataclass(frozen=True)
class FuserConfig:
    """The keys of docs/configuration.md that a Fuser knows."""

    engine: EngineConfig = section(EngineConfig)
    decode: DecodeConfig = section(DecodeConfig)
    gates: GatesConfig = section(GatesConfig)


class Fuser:
    """A model that is loaded once, and a call that fuses pairs of captions.

    Args:
        model: a model folder, its URL or a hub id (engine.model). Without one the embedded demo model writes.
        engine: beam, transformers, vllm, api or echo (engine.kind).
        num_beams: beams of the search, 1 to 8 (decode.num_beams).
        gates: judge each caption with the gates of docs/gates.md, and reject, keep or flag as they say. The gate
            repeated_caption needs a whole run, and is not applied. Without gates a pair is rejected only if a caption is
            missing or the engine cannot write.
        raw, synthetic: the names of the two columns in a batch. Empty: the usual names, such as laion_2b and laion_coco, or
            raw and synthetic.
        columns: the columns that are added to a batch, of capsfusion, outcome, reason, detail, flags, finish,
            prompt_tokens, output_tokens and error. A column of that name in the batch is replaced.
        config: other keys of engine, decode and gates, such as {"engine.slots": 32}.

    Raises:
        ConfigError: an argument or the model must change.
        EngineError: the model is damaged.

    All arguments can be pickled, so that Ray Data can construct a Fuser in each of its actors:

        ds.map_batches(cf.Fuser, fn_constructor_args=("my-model",), batch_format="pyarrow", concurrency=2, num_gpus=1)

    A Fuser may be called from several threads; the calls run one after another.
    """

    def __init__(
        self,
        model: Place = "",
        *,
        engine: str | None = None,
        num_beams: int | None = None,
        gates: bool = False,
        raw: str = "",
        synthetic: str = "",
        columns: Sequence[str] = (FUSED,),
        config: Config = None,
    ) -> None:
        if unknown := [name for name in columns if name not in TYPES]:
            raise ConfigError(f"columns: {', '.join(unknown)}: not among {', '.join(TYPES)}")
        given = {"engine.model": model, "engine.kind": engine, "decode.num_beams": num_beams}
        cfg = parsed(FuserConfig, config, {key: value for key, value in given.items() if value})
        info = inspect_model(cfg.engine)
        engine_config, decode = resolve_with_model(cfg.engine, cfg.decode, info)
        self._gates, self._judges = (cfg.gates, True) if gates else (_NO_GATES, False)
        self._names = {RAW: raw, SYNTHETIC: synthetic}
        self._columns = tuple(columns)
        self._engine = build_engine(engine_config, decode)
        self._prompts = PromptBuilder(info.template, self._engine.encode, engine_config.max_prompt_tokens)
        self._asked = 0  # pairs so far: the ids of prompts, which an interrupted call must not share with the next one
        self._lock = threading.Lock()

    @overload
    def __call__(self, batch: Sequence[str | None], synthetic: Sequence[str | None]) -> list[FusedCaption]: ...
    @overload
    def __call__(self, batch: pa.Table | pa.RecordBatch | Columns) -> Any: ...
    def __call__(self, batch: Any, synthetic: Sequence[str | None] | None = None) -> Any:
        """Fuse two lists of captions, or the captions of a batch.

        Args:
            batch: raw captions; or, alone, a pyarrow Table or RecordBatch, or a dict of columns (lists or numpy arrays).
            synthetic: as many synthetic captions. None, NaN and empty captions are allowed; their pairs are rejected.

        Returns:
            For lists one FusedCaption per pair, in their order. For a batch the same kind of batch with the added columns;
            `capsfusion` is null in a rejected row.

        Raises:
            SourceError: lists of different lengths, values that are no texts, or a batch without the two columns.
            CapsFusionError: the engine cannot go on; make a new Fuser.
        """
        if synthetic is not None:
            return self._fuse(_texts(batch, "raw"), _texts(synthetic, "synthetic"))
        if not isinstance(batch, pa.Table | pa.RecordBatch | Mapping):
            raise SourceError(
                f"a batch of type {type(batch).__name__}; give a pyarrow Table, a dict of columns, or two lists of captions "
                '(in Ray Data: batch_format="pyarrow")'
            )
        names = list(batch) if isinstance(batch, Mapping) else batch.schema.names
        columns = [_column(role, self._names[role], names) for role in (RAW, SYNTHETIC)]
        fused = self._fuse(*(_texts(batch[name], name) for name in columns))
        return _with_columns(batch, {name: [_value(row, name) for row in fused] for name in self._columns})

    def _fuse(self, raw: list[str | None], synthetic: list[str | None]) -> list[FusedCaption]:
        if len(raw) != len(synthetic):
            raise SourceError(f"{len(raw)} raw and {len(synthetic)} synthetic captions; give as many of each")
        done: list[FusedCaption | None] = [self._without_engine(*pair) for pair in zip(raw, synthetic, strict=True)]
        waiting: dict[tuple[str, str], list[int]] = {}  # equal pairs are fused once
        for i, pair in enumerate(zip(raw, synthetic, strict=True)):
            if done[i] is None:
                waiting.setdefault(pair, []).append(i)  # type: ignore[arg-type]  # neither is missing
        for (raw_text, synthetic_text), generation in zip(waiting, self._write(list(waiting)), strict=True):
            fused = self._judged(raw_text, synthetic_text, generation)
            for i in waiting[raw_text, synthetic_text]:
                done[i] = fused
        return [fused for fused in done if fused]

    def _without_engine(self, raw: str | None, synthetic: str | None) -> FusedCaption | None:
        """The outcome of a pair that the engine need not fuse; None for the others."""
        for name, text in (("raw", raw), ("synthetic", synthetic)):
            if text is not None and not _is_unicode(text):
                return _rejected(
                    Verdict(Outcome.REJECTED, Reason.INVALID_UTF8, f"the {name} caption is not valid Unicode")
                )
        verdict = judge_sources(raw, synthetic, self._gates)
        if verdict is None:
            return None
        if verdict.outcome is not Outcome.KEPT or verdict.reason is None:
            return _rejected(verdict)
        text = kept_text(raw, synthetic, verdict.reason, self._gates)
        return FusedCaption(text, Outcome.KEPT, verdict.reason, verdict.detail, (KEPT, str(verdict.reason)))

    def _write(self, pairs: Sequence[tuple[str, str]]) -> list[Generation]:
        """What the engine makes of each pair, in order."""
        with self._lock:
            first, self._asked = self._asked, self._asked + len(pairs)
            asked = [CaptionPair(str(first + i), *pair) for i, pair in enumerate(pairs)]
            written: dict[str, Generation] = {}
            prompts = []
            for pair, prompt in zip(asked, self._prompts.build(asked) if asked else (), strict=True):
                if isinstance(prompt, RowError):
                    written[pair.row_id] = Generation(pair.row_id, "", FinishReason.ERROR, error=str(prompt))
                else:
                    prompts.append(prompt)
            self._engine.submit(prompts)
            while self._engine.unfinished:
                for generation in self._engine.step():
                    written[generation.id] = generation
            return [written[pair.row_id] for pair in asked]

    def _judged(self, raw: str, synthetic: str, written: Generation) -> FusedCaption:
        verdict = judge_failed(written.finish, written.error)
        if verdict is None and self._judges:
            verdict = judge_text(raw, synthetic, written.text, written.finish, self._gates)
        verdict = verdict or Verdict(Outcome.FUSED)
        return FusedCaption(
            None if verdict.outcome is Outcome.REJECTED else written.text,
            verdict.outcome,
            verdict.reason,
            verdict.detail,
            tuple(str(flag) for flag in verdict.flags),
            written.text,
            str(written.finish),
            written.prompt_tokens,
            written.output_tokens,
            written.error,
        )


def _rejected(verdict: Verdict) -> FusedCaption:
    return FusedCaption(None, verdict.outcome, verdict.reason, verdict.detail)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(values: Any, name: str) -> list[str | None]:
    """A column as a list of texts. Raises SourceError for a value of another type."""
    if isinstance(values, str):
        raise SourceError(f"{name}: one text; give a list of captions")
    if isinstance(values, pa.Array | pa.ChunkedArray):
        values = values.to_pylist()
    texts = [None if isinstance(value, float) and value != value else value for value in values]  # pandas writes NaN
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise SourceError(f"{name}: a value of type {type(text).__name__}, {text!r:.80}; captions must be texts")
    return texts


def _column(role: str, given: str, names: Sequence[str]) -> str:
    """The column of a batch that has the raw or the synthetic captions. Raises SourceError where there is none."""
    argument, usual = ("raw", PRESETS["generic"].raw) if role == RAW else ("synthetic", PRESETS["generic"].synthetic)
    found = next((name for name in ([given] if given else usual) if name in names), "")
    if not found:
        wanted = given or " or ".join(usual)
        raise SourceError(
            f"the batch has no column {wanted}; it has {', '.join(names)}; give Fuser(…, {argument}=<its name>)"
        )
    return found


def _value(row: FusedCaption, column: str) -> Any:
    value = getattr(row, column)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Outcome | Reason) else value


def _with_columns(batch: Any, added: Mapping[str, list[Any]]) -> Any:
    """The batch with the columns, in its own form."""
    if isinstance(batch, Mapping):
        arrays = any(isinstance(column, np.ndarray) for column in batch.values())
        return {**batch, **{name: _array(values) if arrays else values for name, values in added.items()}}
    for name, values in added.items():
        column, at = pa.array(values, TYPES[name]), batch.schema.get_field_index(name)
        batch = batch.append_column(name, column) if at < 0 else batch.set_column(at, name, column)
    return batch


def _array(values: list[Any]) -> np.ndarray[Any, Any]:
    """One element per row: a list of flags must not become a second dimension."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
