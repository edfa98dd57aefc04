"""Settings of the engine: which model writes, on which device, and how it decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from capsfusion_ray.config.check import check
from capsfusion_ray.config.setting import section, setting
from capsfusion_ray.errors import ConfigError


@dataclass(frozen=True)
class ApiConfig:
    """engine.kind=api: a server with OpenAI's protocol. Its key is read from the environment and stored nowhere."""

    url: str = setting("", "up to and including /v1: https://api.openai.com/v1, http://127.0.0.1:8000/v1", common=True)
    model: str = setting("", "the model's name on the server", common=True)
    key_env: str = setting(
        "CAPSFUSION_API_KEY", "environment variable of every worker that holds the key; empty: no key is sent"
    )
    chat: bool = setting(True, "send the prompt to /chat/completions as one user message; false: to /completions")
    prompt: str = setting("", "a template with {raw} and {synthetic}; empty: the prompt of CapsFusion")
    temperature: float = setting(0.0, "0: greedy")
    request: dict[str, Any] = setting(
        {}, "more fields of the request, such as top_p or seed; null removes a field that is sent by default"
    )
    concurrency: int = setting(32, "requests in flight per actor")
    timeout_s: float = setting(120.0, "of one whole request")
    gone_s: float = setting(600.0, "the run ends if the server gives no good answer for this long")
    prompt_price: float = setting(0.0, "USD per million prompt tokens")
    output_price: float = setting(0.0, "USD per million output tokens")
    max_dollars: float | None = setting(
        None,
        "limit of what is spent: by all actors of a run together; in the label job by all runs of the output together",
    )

    def __post_init__(self) -> None:
        ok = not self.url or (self.url.startswith(("http://", "https://")) and not set(self.url) & set("@?#"))
        if not ok:  # the value is not shown, because it may hold a password
            raise ConfigError(
                "engine.api.url: must begin with http:// or https:// and hold no user, password, query or fragment"
            )
        ours = sorted(set(self.request) & {"model", "messages", "prompt", "stream", "n"})
        check(not ours, "engine.api.request", ours, "fields that the engine does not set or read itself")
        check(self.temperature >= 0, "engine.api.temperature", self.temperature, "0 (greedy) or more")
        check(1 <= self.concurrency <= 4096, "engine.api.concurrency", self.concurrency, "1 to 4096")
        check(self.timeout_s > 0, "engine.api.timeout_s", self.timeout_s, "seconds above 0")
        check(self.gone_s > 0, "engine.api.gone_s", self.gone_s, "seconds above 0")
        prices = (self.prompt_price, self.output_price)
        check(min(prices) >= 0, "engine.api.*_price", prices, "0 or more")
        if self.max_dollars is not None:
            check(self.max_dollars > 0, "engine.api.max_dollars", self.max_dollars, "dollars above 0")
            both = "with engine.api.prompt_price and engine.api.output_price beside it"
            check(max(prices) > 0, "engine.api.max_dollars", self.max_dollars, both)

    def dollars(self, prompt_tokens: int, output_tokens: int) -> float:
        """The price of these tokens in USD."""
        return (prompt_tokens * self.prompt_price + output_tokens * self.output_price) / 1e6


@dataclass(frozen=True)
class VllmConfig:
    """engine.kind=vllm: greedy or sampled captions, which differ from those of engine.kind=beam. It needs an environment of its own (docs/guide.md)."""

    tensor_parallel: int = setting(1, "GPUs of one node that hold one model together; an actor takes this many")
    temperature: float = setting(0.0, "0: greedy")
    sampling: dict[str, Any] = setting({}, "more fields of vLLM's SamplingParams, such as top_p or repetition_penalty")
    options: dict[str, Any] = setting(
        {}, "more fields of vLLM's EngineArgs, such as quantization or gpu_memory_utilization"
    )

    def __post_init__(self) -> None:
        gpus = self.tensor_parallel
        check(gpus >= 1, "engine.vllm.tensor_parallel", gpus, "a number of GPUs, at least 1")
        check(self.temperature >= 0, "engine.vllm.temperature", self.temperature, "0 (greedy) or more")
        ours = sorted(
            set(self.sampling) & {"temperature", "max_tokens", "n", "output_kind", "detokenize", "skip_special_tokens"}
        )
        check(not ours, "engine.vllm.sampling", ours, "fields that the engine does not set or read itself")
        ours = sorted(
            set(self.options)
            & {"model", "revision", "tokenizer", "dtype", "max_model_len", "max_num_seqs", "tensor_parallel_size"}
        )
        check(not ours, "engine.vllm.options", ours, "fields that no key of engine.* sets")


@dataclass(frozen=True)
class EngineConfig:
    """Which model writes the captions, and on which device."""

    kind: Literal["beam", "transformers", "echo", "api", "vllm"] = setting(
        "beam",
        "beam: exact beam search at bulk speed; transformers: the reference; vllm, api: greedy or sampled; echo: no model, for trials",
        common=True,
    )
    model: str = setting(
        "",
        "a hub id, a folder, or its URL (s3://bucket/model), which is fetched once per node; empty: the embedded demo model",
        common=True,
    )
    revision: str = setting(
        "", "for a hub id: a commit, tag or branch (empty: main); for a folder: the content hash that the plan names"
    )
    storage: dict[str, str] = setting({}, "fsspec options of a model's URL, e.g. {endpoint_url: http://…}")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on CUDA, float32 on a CPU")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if the actor has a GPU")
    slots: int | None = setting(
        None, "captions decoded at the same time; null: as many as the free memory holds, on a CPU 96 per thread"
    )
    attention: Literal["auto", "torch", "triton", "numba"] = setting(
        "auto", "kernel of engine.kind=beam; auto: triton on CUDA, numba on a CPU"
    )
    batch_size: int = setting(4, "captions per batch of engine.kind=transformers; 4: as in the reference")
    max_prompt_tokens: int = setting(256, "longer captions are cut; 256: text_input_max_length of the reference")
    threads: int | None = setting(
        None, "CPU threads of one actor, for several beam engines on one node; null: its share of the cores"
    )
    stall_s: float = setting(
        900.0, "a decode step (or batch) that takes longer ends the actor; its units are retried on another"
    )
    start_patience_s: float = setting(
        1800.0,
        "an engine that does not start is retried for this long while other engines of the run work; 0: it ends the run",
    )
    allow_demo_model: bool = setting(False, "allow more than 100,000 rows with the embedded demo model")
    trust_remote_code: bool = setting(False, "let transformers or vLLM run Python code of the model's folder")
    api: ApiConfig = section(ApiConfig)
    vllm: VllmConfig = section(VllmConfig)

    def __post_init__(self) -> None:
        if self.kind != "vllm" and self.vllm.tensor_parallel > 1:
            raise ConfigError(
                f"engine.vllm.tensor_parallel={self.vllm.tensor_parallel}: engine.kind={self.kind} holds a model on one GPU; take a "
                "larger GPU for a model that does not fit, or engine.kind=vllm, which writes other captions than beam search"
            )
        check(self.slots is None or self.slots > 0, "engine.slots", self.slots, "a positive number")
        check(self.batch_size > 0, "engine.batch_size", self.batch_size, "a positive number")
        check(self.stall_s > 0, "engine.stall_s", self.stall_s, "seconds above 0")
        check(self.start_patience_s >= 0, "engine.start_patience_s", self.start_patience_s, "seconds, 0 or more")
        check(self.max_prompt_tokens >= 16, "engine.max_prompt_tokens", self.max_prompt_tokens, "at least 16")

    @property
    def loads_model(self) -> bool:
        """Whether each actor holds a model and its tokenizer itself."""
        return self.kind not in ("echo", "api")


@dataclass(frozen=True)
class DecodeConfig:
    """How a caption is searched. null: the setting of the model's fusion.json, else that of the reference (transformers 4.28.1)."""

    num_beams: int = setting(3, "beams of the search; 1: greedy", common=True)
    max_new_tokens: int = setting(80, "longest fused caption, in tokens")
    scoring: Literal["reference", "transformers"] | None = setting(
        None,
        "what a score is divided by; reference: the padded full length, as in 4.28.1; transformers: the generated length, as in 5.x",
    )
    length_penalty: float | None = setting(None, "exponent of that length; the reference has 1.0")
    no_repeat_ngram: int | None = setting(
        None, "no n-gram of this length twice in the generated text; the reference has 0 (off)"
    )

    def __post_init__(self) -> None:
        check(1 <= self.num_beams <= 8, "decode.num_beams", self.num_beams, "1 to 8")
        check(self.max_new_tokens >= 1, "decode.max_new_tokens", self.max_new_tokens, "at least 1")
        ok = self.scoring in (None, "reference", "transformers")
        check(ok, "decode.scoring", self.scoring, "reference or transformers")
        ok = self.no_repeat_ngram is None or self.no_repeat_ngram >= 0
        check(ok, "decode.no_repeat_ngram", self.no_repeat_ngram, "0 (off) or more")

    def resolved(self, of_model: Mapping[str, Any] = MappingProxyType({})) -> ResolvedDecode:
        """Nothing left null: what the config sets, else the model folder's setting in `of_model`, else the reference's."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return ResolvedDecode(**(dict(of_model) | given))

    def refuse_beams(self, kind: str) -> None:
        """Raises ConfigError for settings of beam search, for an engine that only decodes greedily or samples."""
        if self.num_beams > 1 or self.no_repeat_ngram:
            raise ConfigError(
                f"decode.num_beams={self.num_beams}, decode.no_repeat_ngram={self.no_repeat_ngram}: engine.kind={kind} decodes "
                "greedily or by sampling; give decode.num_beams=1 decode.no_repeat_ngram=0, or use engine.kind=beam"
            )


@dataclass(frozen=True)
class ResolvedDecode(DecodeConfig):
    """A DecodeConfig in which nothing is null. The defaults are the reference's."""

    scoring: Literal["reference", "transformers"] = "reference"
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
