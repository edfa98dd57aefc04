"""How fast each way of decoding is, on the same prompts in the same order: no Ray, CPU or GPU, one script.

    python benchmarks/bench_engine.py --model models/capsfusion-tiny --rows 96 --threads 2
    python benchmarks/bench_engine.py --model llama-512x8-random --tokenizer models/capsfusion-tiny --rows 32
    python benchmarks/bench_engine.py --model llama2-13b-random --rows 1200          # on a GPU

(a) the reference's settings through HF generate (batch 4, padded to 256, beams), (b) HF generate tuned: sorted by length,
prefix KV reused, best batch of the sweep, (c) transformers' continuous batching, greedy, (d) this engine, beams and greedy,
(e) vLLM where it is installed. Prints a table and, as the last line, JSON. Random models never write an EOS: lengths are drawn
from the published captions' distribution and forced.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.loading import LoadedModel, eos_ids_of, load_model
from capsfusion_ray.prompt import TEMPLATE, PromptBuilder
from capsfusion_ray.rows import CaptionPair, Generation, Prompt

SHAPES = {  # hidden, layers, heads, intermediate
    "llama2-13b-random": (5120, 40, 40, 13824),
    "llama-256x6-random": (256, 6, 8, 704),
    "llama-512x8-random": (512, 8, 8, 1408),
}
# Generated tokens of the published captions under the LLaMA-2 tokenizer (../shared/SPEC.md): mean 36, p50 33, p99 80, cap 80.
LENGTH_P50, LENGTH_SPREAD, LENGTH_CAP = 33, 0.42, 80
# 790 TFLOP/s and 4.3 TB/s, measured on an H200 with bfloat16 GEMMs and copies.
H200_FLOPS = 790e12


def random_model(name: str, vocabulary: int, device: torch.device, dtype: torch.dtype) -> Any:
    hidden, layers, heads, intermediate = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=intermediate, max_position_embeddings=4096,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


class ForcedLengths(BeamEngine):
    """The beam engine on a model that never ends: each caption stops at the length drawn for it."""

    targets: dict[str, int]

    def _harvest(self) -> list[Generation]:
        over = [
            i for i, prompt in enumerate(self._rows) if prompt is not None and self._steps[i] >= self.targets[prompt.id]
        ]
        self._state.done_B[over] = True
        return super()._harvest()


def read_pairs(path: str, rows: int) -> list[CaptionPair]:
    """Pairs of a JSON array or of JSON lines, in file order."""
    text = Path(path).read_text(encoding="utf-8")
    records = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    )
    keys = ("laion_2b", "laion_coco") if "laion_2b" in records[0] else ("raw", "synthetic")
    pairs = [
        CaptionPair(str(i), r[keys[0]], r[keys[1]]) for i, r in enumerate(records) if r.get(keys[0]) and r.get(keys[1])
    ]
    if len(pairs) < rows:
        pairs = [CaptionPair(str(i), pairs[i % len(pairs)].raw, pairs[i % len(pairs)].synthetic) for i in range(rows)]
    return pairs[:rows]


def hf_generate(
    loaded: LoadedModel, prompts: list[Prompt], lengths: dict[str, int], *, batch: int, pad_to: int | None, beams: int, sort: bool, reuse_prefix: bool, penalty: float
) -> dict[str, list[int]]:  # fmt: skip
    """Generated ids of each prompt, without the EOS, from HF's generate in static batches."""
    model, eos = loaded.model, list(loaded.eos_ids)
    pad = loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else eos[0]
    order = sorted(prompts, key=lambda p: len(p.suffix_ids)) if sort else prompts
    prefix = prompts[0].prefix_ids
    cache = None
    if reuse_prefix:
        cache = model(torch.tensor([prefix], device=loaded.device), use_cache=True).past_key_values
    written: dict[str, list[int]] = {}
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        width = max(len(p.suffix_ids) for p in group)
        if pad_to is not None:
            width = max(width, pad_to - len(prefix))
        ids, mask = [], []
        for p in group:
            gap = width - len(p.suffix_ids)
            if cache is None:  # padding on the left of everything
                ids.append([pad] * gap + list(p.prefix_ids + p.suffix_ids))
                mask.append([0] * gap + [1] * (len(prefix) + len(p.suffix_ids)))
            else:  # padding between the cached prefix and the suffix; positions follow the mask
                ids.append(list(p.prefix_ids) + [pad] * gap + list(p.suffix_ids))
                mask.append([1] * len(prefix) + [0] * gap + [1] * len(p.suffix_ids))
        more: dict[str, Any] = {"max_new_tokens": max(lengths[p.id] for p in group)}
        if lengths[group[0].id] != LENGTH_CAP or loaded.name in SHAPES:
            more["min_new_tokens"] = more["max_new_tokens"]
        if cache is not None:
            copied: DynamicCache = copy.deepcopy(cache)
            copied.batch_repeat_interleave(len(group) * beams)
            more["past_key_values"] = copied
        tokens = torch.tensor(ids, device=loaded.device)
        out = model.generate(
            tokens, attention_mask=torch.tensor(mask, device=loaded.device), num_beams=beams, do_sample=False,
            length_penalty=penalty, pad_token_id=pad, eos_token_id=eos, **more,
        )[:, tokens.shape[1] :].tolist()  # fmt: skip
        for p, row in zip(group, out, strict=True):
            end = next((i for i, token in enumerate(row) if token in eos), len(row))
            written[p.id] = row[: min(end, lengths[p.id])]
    return written


def continuous_batching(loaded: LoadedModel, prompts: list[Prompt], lengths: dict[str, int]) -> dict[str, list[int]]:
    """transformers' own continuous batching. It has no beams: greedy."""
    config = GenerationConfig(max_new_tokens=LENGTH_CAP, do_sample=False, eos_token_id=list(loaded.eos_ids))
    config.pad_token_id = loaded.eos_ids[0]
    outputs = loaded.model.generate_batch(
        [list(p.prefix_ids + p.suffix_ids) for p in prompts], generation_config=config
    )
    tokens = [list(output.generated_tokens) for output in outputs.values()]
    return {p.id: ids[: lengths[p.id]] for p, ids in zip(prompts, tokens, strict=True)}


def vllm_greedy(model: str, prompts: list[Prompt], lengths: dict[str, int]) -> dict[str, list[int]]:
    from vllm import LLM, SamplingParams  # only where installed

    engine = LLM(model=model, enable_prefix_caching=True)
    inputs = [{"prompt_token_ids": list(p.prefix_ids + p.suffix_ids)} for p in prompts]
    params = [SamplingParams(temperature=0.0, max_tokens=lengths[p.id]) for p in prompts]
    return {p.id: list(o.outputs[0].token_ids) for p, o in zip(prompts, engine.generate(inputs, params), strict=True)}


def own_engine(
    loaded: LoadedModel, prompts: list[Prompt], lengths: dict[str, int], engine: EngineConfig, decode: DecodeConfig
) -> Callable[[], dict[str, Any]]:
    """Ready to run: the model is copied and taken over outside the timed part."""
    kind = ForcedLengths if loaded.name in SHAPES else BeamEngine
    model = loaded.model if loaded.device.type == "cuda" else copy.deepcopy(loaded.model)
    built = kind.from_loaded(LoadedModel(model, loaded.tokenizer, loaded.eos_ids, loaded.name), engine, decode)
    if isinstance(built, ForcedLengths):
        built.targets = lengths

    def run() -> dict[str, Any]:
        built.submit(prompts)
        finished: dict[str, Any] = {}
        while built.unfinished:
            finished |= {g.id: g for g in built.step()}
        return finished

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder, a hub id, or one of: " + ", ".join(SHAPES))
    parser.add_argument("--tokenizer", default="", help="for a random model; default: the embedded model's")
    parser.add_argument("--pairs", default="examples/captions_source.jsonl")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--batches", default="8,16,32,64", help="the sweep of (b)")
    parser.add_argument("--skip", default="", help="letters to leave out, e.g. ce")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded, prompts, lengths, engine = prepare(args)
    seconds: dict[str, float] = {}
    results: dict[str, dict[str, Any]] = {}

    def timed(name: str, run: Callable[[], dict[str, Any]]) -> None:
        if loaded.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with torch.inference_mode():
            results[name] = run()
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - began
        print(
            f"{name:<28} {len(prompts) / seconds[name]:8.2f} captions/s  {seconds[name]:7.1f} s  {peak_gb(loaded):6.2f} GB",
            flush=True,
        )

    common = {"beams": args.beams, "penalty": 1.0}
    if "a" not in args.skip:
        timed(
            "a reference settings",
            lambda: hf_generate(
                loaded, prompts, lengths, batch=4, pad_to=256, sort=False, reuse_prefix=False, **common
            ),
        )
    if "b" not in args.skip:
        for batch in map(int, args.batches.split(",")):
            timed(
                f"b tuned HF, batch {batch}",
                lambda batch=batch: hf_generate(
                    loaded, prompts, lengths, batch=batch, pad_to=None, sort=True, reuse_prefix=True, **common
                ),
            )
    if "c" not in args.skip:
        timed("c continuous batching greedy", lambda: continuous_batching(loaded, prompts, lengths))
    if "e" not in args.skip and importlib.util.find_spec("vllm") and loaded.name not in SHAPES:
        timed("e vllm greedy", lambda: vllm_greedy(loaded.name, prompts, lengths))
    for scoring, beams in (("transformers", args.beams), ("reference", args.beams), ("transformers", 1)):
        decode = DecodeConfig(num_beams=beams, max_new_tokens=LENGTH_CAP, scoring=scoring)
        run = own_engine(loaded, prompts, lengths, engine, decode)
        timed(f"d beam engine, {beams} x {scoring}", run)
        if loaded.device.type == "cuda":
            break  # the model is taken over: one engine a process
    report(args, loaded, prompts, seconds, results)


def prepare(args: argparse.Namespace) -> tuple[LoadedModel, list[Prompt], dict[str, int], EngineConfig]:
    engine = EngineConfig(model=args.model, slots=args.slots, dtype=args.dtype)
    if args.model in SHAPES:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        use_bfloat16 = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or "models/capsfusion-tiny")
        torch.manual_seed(0)
        vocabulary = 32000 if "13b" in args.model else len(tokenizer)
        model = random_model(args.model, vocabulary, device, torch.bfloat16 if use_bfloat16 else torch.float32)
        loaded = LoadedModel(model, tokenizer, (vocabulary - 1,), args.model)
    else:
        loaded = load_model(engine)
        eos_ids_of(loaded.model, loaded.tokenizer, loaded.name)
    builder = PromptBuilder(TEMPLATE, lambda texts: loaded.encode(list(texts)), engine.max_prompt_tokens)
    prompts = [p for p in builder.build(read_pairs(args.pairs, args.rows)) if isinstance(p, Prompt)]
    rng = random.Random(0)
    forced = args.model in SHAPES
    lengths = {
        p.id: min(LENGTH_CAP, max(6, round(rng.lognormvariate(0, LENGTH_SPREAD) * LENGTH_P50)))
        if forced
        else LENGTH_CAP
        for p in prompts
    }
    return loaded, prompts, lengths, engine


def peak_gb(loaded: LoadedModel) -> float:
    if loaded.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(
    args: argparse.Namespace,
    loaded: LoadedModel,
    prompts: list[Prompt],
    seconds: dict[str, float],
    results: dict[str, dict[str, Any]],
) -> None:
    rate = {name: len(prompts) / s for name, s in seconds.items()}
    tuned = {name: r for name, r in rate.items() if name.startswith("b ")}
    best = max(tuned, key=lambda name: tuned[name]) if tuned else None
    reference = "a reference settings" if "a reference settings" in rate else None
    hf = results.get(reference or "", {})
    rows = []
    for name, result in results.items():
        tokens = sum(v.output_tokens if isinstance(v, Generation) else len(v) for v in result.values())
        row: dict[str, Any] = {
            "name": name,
            "captions_per_s": round(rate[name], 3),
            "tokens_per_s": round(tokens / seconds[name], 1),
        }
        if hf and loaded.name not in SHAPES:
            texts = {k: v.text if isinstance(v, Generation) else loaded.decode(v) for k, v in result.items()}
            row["same_caption_as_a"] = round(sum(texts[k] == loaded.decode(hf[k]) for k in hf) / len(hf), 4)
        if reference:
            row["ratio_to_a"] = round(rate[name] / rate[reference], 2)
        if best:
            row["ratio_to_b"] = round(rate[name] / rate[best], 2)
        if loaded.device.type == "cuda":
            parameters = 13.0e9 if "13b" in loaded.name else sum(p.numel() for p in loaded.model.parameters())
            beams = 1 if "greedy" in name or " 1 x" in name else args.beams
            row["share_of_gemm_limit"] = round(2 * parameters * tokens * beams / seconds[name] / H200_FLOPS, 3)
        rows.append(row)
        print("  ".join(f"{k}={v}" for k, v in row.items()))
    device = torch.cuda.get_device_name() if loaded.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(
        json.dumps(
            {
                "model": args.model,
                "device": device,
                "rows": len(prompts),
                "beams": args.beams,
                "best_of_b": best,
                "results": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
