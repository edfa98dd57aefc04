"""Check that the beam engine writes the same tokens as HF's generate: real pairs, a trained model, several beams. Resumable.

    python benchmarks/check_exactness.py --pairs ../shared/data/capsfusion_pairs_8000.json --rows 1000 --out out/exactness

In float32: HF's plain `generate` (left padding, its own KV cache, batches of 8, 24 and 32 by turns) against this engine,
scoring `transformers`, with other slots and another order of the rows for each number of beams. In bfloat16: how many
captions of HF (batches of 8, and of 32) and of this engine are HF's float32 ones; HF's two say what batching alone does.
Every caption is kept in --out as soon as it is there: the same command goes on where it was stopped. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hf import Ids, build_prompts, generate_batch, read_pairs

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.types import Prompt
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.loading import LoadedModel, load_model
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model

MAX_NEW_TOKENS = 80
Written = Iterator[tuple[str, list[int]]]  # a prompt's id and its generated ids, without the EOS


@dataclass(frozen=True)
class Variant:
    """One way to write all captions."""

    dtype: str
    beams: int
    batches: tuple[int, ...] = ()  # of HF's generate, by turns; empty: the beam engine
    slots: int = 0
    shuffled: bool = False

    @property
    def name(self) -> str:
        how = f"hf-batch-{'-'.join(map(str, self.batches))}" if self.batches else f"beam-slots-{self.slots}"
        return f"{self.dtype}-{self.beams}-{how}{'-shuffled' if self.shuffled else ''}"


ORACLE_BATCHES = (8, 24, 32)
OWN = {  # by the number of beams
    1: (Variant("float32", 1, slots=48),),
    2: (Variant("float32", 2, slots=7, shuffled=True),),
    3: (Variant("float32", 3, slots=32), Variant("float32", 3, slots=5, shuffled=True)),
    5: (Variant("float32", 5, slots=16, shuffled=True),),
}
HALF = (
    Variant("bfloat16", 3, batches=(8,)),
    Variant("bfloat16", 3, batches=(32,)),
    Variant("bfloat16", 3, slots=32),
)


def by_hf(variant: Variant, loaded: LoadedModel, prompts: Sequence[Prompt]) -> Written:
    """Batches of like lengths, so that little is padded; each row padded all the same."""
    left = sorted(prompts, key=lambda prompt: len(prompt.suffix_ids))
    turn = 0
    while left:
        size = variant.batches[turn % len(variant.batches)]
        batch, left, turn = left[:size], left[size:], turn + 1
        with torch.inference_mode():
            out = generate_batch(loaded, batch, beams=variant.beams, max_new_tokens=MAX_NEW_TOKENS)
        yield from ((prompt.id, ids) for prompt, ids in zip(batch, out, strict=True))


def by_beam_engine(variant: Variant, loaded: LoadedModel, engine: EngineConfig, prompts: Sequence[Prompt]) -> Written:
    """All rows through the engine's slots; units of 50 are handed in while others are in work."""
    decode = DecodeConfig(
        num_beams=variant.beams, max_new_tokens=MAX_NEW_TOKENS, scoring="transformers", no_repeat_ngram=0
    )
    own = BeamEngine(
        dataclasses.replace(loaded, tokenizer=Ids()), dataclasses.replace(engine, slots=variant.slots), decode
    )
    waiting = list(prompts)
    if variant.shuffled:
        random.Random(0).shuffle(waiting)
    while waiting or own.unfinished:
        if waiting and own.unfinished < 2 * variant.slots:
            own.submit(waiting[:50])
            waiting = waiting[50:]
        for generation in own.step():
            if generation.error:
                raise SystemExit(f"{variant.name}: {generation.error}")
            yield generation.id, [int(token) for token in generation.text.split()]


def captions(variant: Variant, engine: EngineConfig, prompts: Sequence[Prompt], folder: Path) -> dict[str, list[int]]:
    """Those kept in the folder, and the rest written now."""
    path = folder / f"{variant.name}.jsonl"
    known: dict[str, list[int]] = {}
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        known = dict(json.loads(line) for line in whole)
        path.write_text("".join(whole))  # without a line that was cut by the end of its process
    left = [prompt for prompt in prompts if prompt.id not in known]
    if left:
        engine = dataclasses.replace(engine, dtype=variant.dtype)
        loaded = load_model(engine)
        written = by_hf(variant, loaded, left) if variant.batches else by_beam_engine(variant, loaded, engine, left)
        with path.open("a", buffering=1) as file:
            for row, ids in written:
                file.write(json.dumps([row, ids]) + "\n")
                known[row] = ids
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or hub id; default: the embedded model")
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--beams", default="3,1,2,5")
    parser.add_argument("--out", required=True, help="a folder for the captions")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--skip-bfloat16", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    engine = EngineConfig(model=args.model, dtype="float32")
    info = inspect_model(engine)
    engine, _ = resolve_with_model(engine, DecodeConfig(), info)
    prompts = build_prompts(
        load_model(engine), read_pairs(args.pairs, args.rows), info.template, engine.max_prompt_tokens
    )
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    of = {"model": info.content, "pairs": Path(args.pairs).name, "max_new_tokens": MAX_NEW_TOKENS}
    kept = folder / "of.json"
    if kept.exists() and json.loads(kept.read_text()) != of:
        raise SystemExit(
            f"--out {folder} holds captions of {kept.read_text()}, not of {json.dumps(of)}; give another folder"
        )
    kept.write_text(json.dumps(of))

    results: dict[str, str] = {}
    wrong: list[str] = []
    for beams in map(int, args.beams.split(",")):
        oracle = captions(Variant("float32", beams, batches=ORACLE_BATCHES), engine, prompts, folder)
        for variant in (
            *OWN.get(beams, (Variant("float32", beams, slots=32),)),
            *(HALF if beams == 3 and not args.skip_bfloat16 else ()),
        ):
            mine = captions(variant, engine, prompts, folder)
            other = [prompt.id for prompt in prompts if mine[prompt.id] != oracle[prompt.id]]
            results[variant.name] = f"{len(prompts) - len(other)} of {len(prompts)}"
            print(f"{variant.name:<44} {results[variant.name]} as HF in float32", flush=True)
            if variant.dtype == "float32":
                wrong += [f"{variant.name}, row {row}" for row in other]
    for line in wrong:
        print("differs:", line)
    print(json.dumps({**of, "rows": len(prompts), "same_as_hf_float32": results, "float32_differs": len(wrong)}))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
