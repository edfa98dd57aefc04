"""Measure how fast each way of decoding is, on the same prompts in the same order, on a CPU or a GPU. Without Ray.

    python benchmarks/bench_engine.py --model models/capsfusion-tiny --rows 96 --threads 2
    python benchmarks/bench_engine.py --model llama-512x8-random --rows 32 --threads 2
    python benchmarks/bench_engine.py --model llama2-13b-random --rows 1200 --hf-rows 128 --batches 32,64,128 --profile profile.txt

(a) HF generate with the settings of the reference (batch 4, padded to 256, beams); (b) HF generate tuned: sorted by length,
the KV of the prefix reused, several batch sizes; (c) continuous batching of transformers, greedy; (d) this engine: both
scorings, and greedy, with plain torch's attention and with the kernel of the device (Triton on a GPU, numba on a CPU); (e) vLLM,
greedy, if it is installed. A random model never writes an EOS, so the length of each of its captions is drawn from the published
captions and forced.

Prints a table and, as the last line, JSON. `share_of_limit`: the seconds that the generated and prefilled tokens' matrix
products would take at the GEMM rate measured at the start of this run, over the seconds it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hf import build_prompts, generate_batch, prefix_cache, read_pairs
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.core.prompt import TEMPLATE
from capsfusion_ray.core.types import Generation, Prompt
from capsfusion_ray.engines.base import Engine
from capsfusion_ray.engines.beam.cpu_threads import engine_per_thread
from capsfusion_ray.engines.beam.engine import BeamEngine
from capsfusion_ray.engines.beam.weights import Weights, take_weights
from capsfusion_ray.engines.loading import LoadedModel, load_model
from capsfusion_ray.models.inspect import inspect_model, resolve_with_model
from capsfusion_ray.models.location import locate

SHAPES = {  # hidden, layers, heads, intermediate, vocabulary (None: the tokenizer's)
    "llama2-13b-random": (5120, 40, 40, 13824, 32000),
    "llama-256x6-random": (256, 6, 8, 704, None),
    "llama-512x8-random": (512, 8, 8, 1408, None),
}
# Generated tokens of the published captions under the LLaMA-2 tokenizer (../shared/SPEC.md): p50 33, p99 80, cap 80.
LENGTH_P50, LENGTH_SPREAD, LENGTH_CAP = 33, 0.42, 80

Captions = dict[str, Any]  # a Generation, or generated ids without the EOS, by the prompt's id


@dataclasses.dataclass
class Bench:
    """What every way of decoding is given."""

    loaded: LoadedModel
    engine: EngineConfig
    prompts: list[Prompt]
    lengths: dict[str, int]  # the cap of each caption
    forced: bool  # captions end at exactly that length
    beams: int
    threads: int  # of torch, on a CPU


class ForcedLengths(BeamEngine):
    """The beam engine on a model that never ends: each caption stops at the length drawn for it."""

    targets: dict[str, int]

    def _take_finished(self) -> list[Generation]:
        lengths = self._state.length_B.tolist()
        over = [
            i for i, prompt in enumerate(self._rows) if prompt is not None and lengths[i] >= self.targets[prompt.id]
        ]
        self._state.done_B[over] = True
        return super()._take_finished()


def random_model(name: str, vocabulary: int, device: torch.device, dtype: torch.dtype) -> Any:
    hidden, layers, heads, intermediate, own_vocabulary = SHAPES[name]
    config = LlamaConfig(
        vocab_size=own_vocabulary or vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=4096,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def prepare(args: argparse.Namespace) -> Bench:
    engine = EngineConfig(model=args.model, slots=args.slots, dtype=args.dtype)
    forced = args.model in SHAPES
    if forced:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or locate(""))
        torch.manual_seed(0)
        model = random_model(args.model, len(tokenizer), device, torch.bfloat16 if half else torch.float32)
        loaded = LoadedModel(model, tokenizer, (model.config.vocab_size - 1,), args.model)
        template = TEMPLATE
    else:
        info = inspect_model(engine)
        engine, _ = resolve_with_model(engine, DecodeConfig(), info)
        loaded, template = load_model(engine), info.template
    prompts = build_prompts(loaded, read_pairs(args.pairs, args.rows), template, engine.max_prompt_tokens)
    rng = random.Random(0)
    lengths = {
        p.id: min(LENGTH_CAP, max(6, round(rng.lognormvariate(0, LENGTH_SPREAD) * LENGTH_P50)))
        if forced
        else LENGTH_CAP
        for p in prompts
    }
    return Bench(loaded, engine, prompts, lengths, forced, args.beams, torch.get_num_threads())


@torch.inference_mode()
def hf_generate(bench: Bench, prompts: list[Prompt], batch: int, tuned: bool) -> Captions:
    """HF's generate over static batches: as the reference calls it, or tuned."""
    order = sorted(prompts, key=lambda p: len(p.suffix_ids)) if tuned else prompts
    cache = prefix_cache(bench.loaded, prompts[0].prefix_ids) if tuned else None
    written: Captions = {}
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        out = generate_batch(
            bench.loaded,
            group,
            beams=bench.beams,
            max_new_tokens=max(bench.lengths[p.id] for p in group),
            exact_tokens=bench.forced,
            pad_to=0 if tuned else bench.engine.max_prompt_tokens,
            prefix_kv=cache,
        )
        written |= {p.id: ids[: bench.lengths[p.id]] for p, ids in zip(group, out, strict=True)}
    return written


def continuous_batching(bench: Bench, prompts: list[Prompt]) -> Captions:
    """transformers' own continuous batching. It has no beams, and no length of its own for a request."""
    config = GenerationConfig(
        max_new_tokens=LENGTH_CAP,
        do_sample=False,
        eos_token_id=list(bench.loaded.eos_ids),
        pad_token_id=bench.loaded.eos_ids[0],
    )
    outputs = bench.loaded.model.generate_batch(
        [list(p.prefix_ids + p.suffix_ids) for p in prompts], generation_config=config
    )
    tokens = [list(output.generated_tokens) for output in outputs.values()]
    return {p.id: ids[: bench.lengths[p.id]] for p, ids in zip(prompts, tokens, strict=True)}


def vllm_greedy(bench: Bench, prompts: list[Prompt]) -> Captions:
    from vllm import LLM, SamplingParams  # only where installed

    engine = LLM(model=bench.loaded.name, enable_prefix_caching=True)
    inputs = [{"prompt_token_ids": list(p.prefix_ids + p.suffix_ids)} for p in prompts]
    params = [SamplingParams(temperature=0.0, max_tokens=bench.lengths[p.id]) for p in prompts]
    return {p.id: list(o.outputs[0].token_ids) for p, o in zip(prompts, engine.generate(inputs, params), strict=True)}


def own_engine(bench: Bench, weights: Weights, attention: str, decode: DecodeConfig) -> Engine:
    """Build the engine as the job does: on a CPU one engine per thread."""
    ForcedLengths.targets = bench.lengths
    torch.set_num_threads(bench.threads)  # engine_per_thread lowers it to 1
    engine = dataclasses.replace(bench.engine, attention=attention)
    return engine_per_thread(bench.loaded, engine, decode, weights, kind=ForcedLengths if bench.forced else BeamEngine)


def drain(engine: Engine, prompts: list[Prompt]) -> Captions:
    engine.submit(prompts)
    finished: Captions = {}
    while engine.unfinished:
        finished |= {g.id: g for g in engine.step()}
    return finished


def gemm_rate(loaded: LoadedModel) -> float:
    """FLOP/s of the model's own largest product, hidden x intermediate, at 1,024 rows: the best of five."""
    shape = loaded.model.config
    left = torch.randn(1024, shape.hidden_size, device=loaded.device).to(loaded.dtype)
    right = torch.randn(shape.hidden_size, shape.intermediate_size, device=loaded.device).to(loaded.dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(10):
            left @ right
        _wait(loaded)
        best = min(best, time.perf_counter() - began)
    return 10 * 2 * 1024 * right.numel() / best


class Table:
    """Runs each way, times it, and keeps what it wrote."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rows: list[dict[str, Any]] = []
        self.written: dict[str, Captions] = {}
        self.gemm = gemm_rate(bench.loaded)
        embeddings = bench.loaded.model.get_input_embeddings().weight.numel()
        parameters = sum(p.numel() for p in bench.loaded.model.parameters())
        self.flops_per_token = 2 * (
            parameters if bench.loaded.model.config.tie_word_embeddings else parameters - embeddings
        )
        self.loaded = bench.loaded

    def time(self, name: str, run: Callable[[], Captions], beams: int) -> None:
        gc.collect()
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        written = run()
        _wait(self.loaded)
        seconds = time.perf_counter() - began
        tokens = sum(self._tokens(key, caption) for key, caption in written.items())
        suffixes = sum(len(p.suffix_ids) for p in self.bench.prompts if p.id in written)
        row = {
            "name": name,
            "captions_per_s": round(len(written) / seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "seconds": round(seconds, 1),
            "peak_gb": round(_peak_gb(self.loaded), 2),
            "share_of_limit": round((tokens * beams + suffixes) * self.flops_per_token / self.gemm / seconds, 3),
        }
        print(f"{name:<40} {row['captions_per_s']:9.3f} captions/s {seconds:8.1f} s", flush=True)
        self.rows.append(row)
        self.written[name] = written

    def compare(self) -> str | None:
        """Ratios to (a) and to the best of (b), and how many captions are those of (a); the best of (b)."""
        rate = {row["name"]: row["captions_per_s"] for row in self.rows}
        reference = next((name for name in rate if name.startswith("a ")), None)
        best = max((name for name in rate if name.startswith("b ")), key=lambda name: rate[name], default=None)
        for row in self.rows:
            if reference:
                row["ratio_to_a"] = round(row["captions_per_s"] / rate[reference], 2)
            if best:
                row["ratio_to_b"] = round(row["captions_per_s"] / rate[best], 2)
            if reference and not self.bench.forced:
                theirs, mine = self.written[reference], self.written[row["name"]]
                same = [self._text(mine[k]) == self._text(theirs[k]) for k in theirs if k in mine]
                row["same_caption_as_a"] = f"{sum(same)} of {len(same)}"
        return best

    def _tokens(self, key: str, caption: Any) -> int:
        if self.bench.forced:  # an engine that is cut off has no finished hypothesis to count
            return self.bench.lengths[key]
        return caption.output_tokens if isinstance(caption, Generation) else len(caption)

    def _text(self, caption: Any) -> str:
        return caption.text if isinstance(caption, Generation) else self.loaded.decode(caption)


def profile(engine: Engine, prompts: list[Prompt], steps: int, path: Path) -> None:
    """Where a full batch's time goes: the operations of some steps after the batch is full, by their own time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    cuda = torch.cuda.is_available()
    engine.submit(prompts)
    for _ in range(steps):
        engine.step()
    with watch(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        for _ in range(steps):
            engine.step()
    path.write_text(seen.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder, a hub id, or one of: " + ", ".join(SHAPES))
    parser.add_argument("--tokenizer", default="", help="for a random model; default: the embedded model's")
    parser.add_argument("--pairs", default="examples/captions_source.jsonl")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument(
        "--hf-rows", type=int, default=None, help="only the first so many for (a) and (b), which are slow"
    )
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--slots", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--batches", default="8,16,32,64", help="the sweep of (b)")
    parser.add_argument("--skip", default="", help="letters to leave out, e.g. ce")
    parser.add_argument("--profile", default="", help="write a profile of (d) to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = prepare(args)
    prompts, some, beams = bench.prompts, bench.prompts[: args.hf_rows], bench.beams
    table = Table(bench)
    if "a" not in args.skip:
        table.time("a reference settings", lambda: hf_generate(bench, some, 4, tuned=False), beams)
    if "b" not in args.skip:
        for batch in map(int, args.batches.split(",")):
            table.time(
                f"b tuned HF, batch {batch}", lambda batch=batch: hf_generate(bench, some, batch, tuned=True), beams
            )
    if "c" not in args.skip:
        table.time("c continuous batching, greedy", lambda: continuous_batching(bench, prompts), 1)
    if "e" not in args.skip and importlib.util.find_spec("vllm") and not bench.forced:
        table.time("e vLLM, greedy", lambda: vllm_greedy(bench, prompts), 1)
    with torch.inference_mode():
        weights = take_weights(bench.loaded, bench.engine.max_prompt_tokens + LENGTH_CAP)
    own = "triton" if weights.device.type == "cuda" else "numba"
    for attention in ("torch", own) if own == "triton" or weights.dtype == torch.float32 else ("torch",):
        for scoring, k in (("transformers", beams), ("reference", beams), ("transformers", 1)):
            decode = DecodeConfig(num_beams=k, max_new_tokens=LENGTH_CAP, scoring=scoring)
            engine = own_engine(bench, weights, attention, decode)
            table.time(f"d beam engine, {k} x {scoring}, {attention}", lambda engine=engine: drain(engine, prompts), k)
            del engine
    if args.profile:
        decode = DecodeConfig(num_beams=beams, max_new_tokens=LENGTH_CAP, scoring="transformers")
        profile(own_engine(bench, weights, "auto", decode), prompts, 8, Path(args.profile))
    best = table.compare()
    for row in table.rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    cuda = weights.device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"cpu, {bench.threads} threads"
    print(
        json.dumps(
            {
                "command": " ".join(sys.argv),
                "device": device,
                "dtype": str(weights.dtype),
                "rows": len(prompts),
                "hf_rows": len(some),
                "beams": beams,
                "gemm_tflops": round(table.gemm / 1e12, 3),
                "best_of_b": best,
                "results": table.rows,
            }
        )
    )


def _wait(loaded: LoadedModel) -> None:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()


def _peak_gb(loaded: LoadedModel) -> float:
    if loaded.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
