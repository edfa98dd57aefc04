"""Every configuration dataclass of fusing and verifying, one schema a job: typed, frozen, checked when made.

Units stand in the names: `_s` seconds, `_mb` 1e6 bytes, `_tokens`, `_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from capsfusion_ray.errors import ConfigError

# ------------------------------------------------------------------------------------------------ the parts of a config


@dataclass(frozen=True)
class InputConfig:
    """Where the caption shards are."""

    path: Any = ""  # a file, a glob, a folder, any fsspec URL, or a list of them
    limit: int | None = None  # rows; a deterministic sample spread over all shards, which the full run reuses
    storage: dict[str, str] = field(default_factory=dict)  # fsspec options, e.g. {endpoint_url: http://…}

    def __post_init__(self) -> None:
        _check(self.limit is None or self.limit > 0, "input.limit", self.limit, "a positive number of rows")
        ok = isinstance(self.path, str) or (
            isinstance(self.path, list) and bool(self.path) and all(isinstance(p, str) for p in self.path)
        )
        _check(ok, "input.path", self.path, "a path or a list of paths")

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)


@dataclass(frozen=True)
class ColumnsConfig:
    """An explicit column map; an empty name falls back to the preset's."""

    raw: str = ""
    synthetic: str = ""
    url: str = ""
    reference: str = ""


@dataclass(frozen=True)
class SourceConfig:
    """How to read the shards as caption pairs."""

    preset: Literal["generic", "example_json", "capsfusion_120m", "laion_coco"] = "generic"
    format: Literal["auto", "parquet", "json", "jsonl", "csv", "tsv"] = "auto"  # auto: by file name
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    passthrough: list[str] | None = None  # columns carried along; null: the preset's choice


@dataclass(frozen=True)
class FilterConfig:
    """Rows left out by a column's value before anything is spent on them: counted by reason, not stored. null: off."""

    max_punsafe: float | None = None  # LAION's usual 0.5
    max_pwatermark: float | None = None  # LAION's usual 0.8
    min_similarity: float | None = None
    min_words: int | None = None  # of the raw caption
    min_characters: int | None = None  # of the raw caption


@dataclass(frozen=True)
class UnitConfig:
    """How large one unit of work, retry and commit is."""

    rows: int | None = None  # null: target_s times the speed expected of one actor, at most 50,000
    target_s: float = 90.0
    captions_per_s: float | None = None  # of one actor; null: a guess by engine and device (see plan.py)

    def __post_init__(self) -> None:
        _check(self.rows is None or self.rows > 0, "unit.rows", self.rows, "a positive number of rows")
        _check(self.target_s > 0, "unit.target_s", self.target_s, "seconds above 0")


@dataclass(frozen=True)
class ApiConfig:
    """The OpenAI-compatible server of engine.kind=api. Its key stands in the environment and nowhere else."""

    url: str = ""  # up to and with /v1: https://api.openai.com/v1, http://127.0.0.1:8000/v1
    model: str = ""  # the name that the server knows it by
    key_env: str = "CAPSFUSION_API_KEY"  # the variable that holds the key, in the environment of every worker; empty: no key is sent
    chat: bool = True  # /chat/completions, the prompt as one user message; false: /completions
    prompt: str = ""  # a template with {raw} and {synthetic}; empty: CapsFusion's own
    temperature: float = 0.0  # 0: greedy
    request: dict[str, Any] = field(
        default_factory=dict
    )  # more fields of the request, such as top_p or seed; null takes one of ours out
    concurrency: int = 32  # requests in flight, an actor
    timeout_s: float = 120.0  # a whole request
    gone_s: float = 600.0  # so long without one good answer, and the engine gives up
    prompt_price: float = 0.0  # USD for a million prompt tokens
    output_price: float = 0.0  # USD for a million output tokens
    max_dollars: float | None = (
        None  # an actor's, from its start, all actors' together in a run; of jobs/label.py: the whole output's, over all its runs
    )

    def __post_init__(self) -> None:
        ok = not self.url or (self.url.startswith(("http://", "https://")) and not set(self.url) & set("@?#"))
        if not ok:  # its value is not shown: it may hold a password
            raise ConfigError(
                "engine.api.url: must begin with http:// or https:// and hold no user, password, query or fragment"
            )
        ours = sorted(set(self.request) & {"model", "messages", "prompt", "stream", "n"})
        _check(not ours, "engine.api.request", ours, "fields that the engine does not set or read itself")
        _check(self.temperature >= 0, "engine.api.temperature", self.temperature, "0 (greedy) or more")
        _check(1 <= self.concurrency <= 4096, "engine.api.concurrency", self.concurrency, "1 to 4096")
        _check(self.timeout_s > 0, "engine.api.timeout_s", self.timeout_s, "seconds above 0")
        _check(self.gone_s > 0, "engine.api.gone_s", self.gone_s, "seconds above 0")
        _check(
            min(self.prompt_price, self.output_price) >= 0,
            "engine.api.*_price",
            (self.prompt_price, self.output_price),
            "0 or more",
        )
        if self.max_dollars is not None:
            _check(self.max_dollars > 0, "engine.api.max_dollars", self.max_dollars, "dollars above 0")
            priced = self.prompt_price > 0 or self.output_price > 0
            _check(
                priced,
                "engine.api.max_dollars",
                self.max_dollars,
                "with engine.api.prompt_price and engine.api.output_price beside it",
            )

    def dollars(self, prompt_tokens: int, output_tokens: int) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.prompt_price + output_tokens * self.output_price) / 1e6


@dataclass(frozen=True)
class VllmConfig:
    """engine.kind=vllm: greedy or sampled captions, never those of engine.kind=beam. It wants an environment of its own (docs/guide.md)."""

    tensor_parallel: int = 1  # GPUs that hold one model together, of one node; an actor asks for as many
    temperature: float = 0.0  # 0: greedy
    sampling: dict[str, Any] = field(
        default_factory=dict
    )  # more fields of vLLM's SamplingParams, such as top_p or repetition_penalty
    options: dict[str, Any] = field(
        default_factory=dict
    )  # more fields of vLLM's EngineArgs, such as quantization or gpu_memory_utilization

    def __post_init__(self) -> None:
        _check(
            self.tensor_parallel >= 1,
            "engine.vllm.tensor_parallel",
            self.tensor_parallel,
            "a number of GPUs, at least 1",
        )
        _check(self.temperature >= 0, "engine.vllm.temperature", self.temperature, "0 (greedy) or more")
        ours = sorted(
            set(self.sampling) & {"temperature", "max_tokens", "n", "output_kind", "detokenize", "skip_special_tokens"}
        )
        _check(not ours, "engine.vllm.sampling", ours, "fields that the engine does not set or read itself")
        ours = sorted(
            set(self.options)
            & {"model", "revision", "tokenizer", "dtype", "max_model_len", "max_num_seqs", "tensor_parallel_size"}
        )
        _check(not ours, "engine.vllm.options", ours, "fields that no key of engine.* stands for")


@dataclass(frozen=True)
class EngineConfig:
    """Which model writes, and on what."""

    kind: Literal["beam", "transformers", "echo", "api", "vllm"] = "beam"
    model: str = ""  # a hub id, a folder, or the URL of one (s3://bucket/model): fetched once a node; empty: the embedded demo model
    revision: str = ""  # a hub id's commit, tag or branch (empty: main); a folder's content, as the plan names it
    storage: dict[str, str] = field(
        default_factory=dict
    )  # fsspec options of a model's URL, e.g. {endpoint_url: http://…}
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, float32 on a CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    slots: int | None = None  # captions decoded together; null: sized from free memory, on a CPU 96 a thread
    attention: Literal["auto", "torch", "triton", "numba"] = (
        "auto"  # of engine.kind=beam; auto: triton on CUDA, numba on a CPU
    )
    batch_size: int = 4  # captions a batch of engine.kind=transformers (4: the reference's)
    max_prompt_tokens: int = 256  # text_input_max_length in the reference config.yaml
    threads: int | None = (
        None  # CPU threads of one actor, for `beam` engines side by side; null: its share of the cores
    )
    stall_s: float = 900.0  # a decode step (or batch) that takes longer ends the actor, and its units are tried again
    start_patience_s: float = 1800.0  # an engine that does not start, where others of the run did, is tried again while the run moves; 0: it ends the run
    allow_demo_model: bool = False  # more than 100,000 rows with the embedded model
    trust_remote_code: bool = False
    api: ApiConfig = field(default_factory=ApiConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def __post_init__(self) -> None:
        if self.kind != "vllm" and self.vllm.tensor_parallel > 1:
            raise ConfigError(
                f"engine.vllm.tensor_parallel={self.vllm.tensor_parallel}: engine.kind={self.kind} holds a model on one GPU; one that does "
                "not fit there needs a larger GPU, or engine.kind=vllm, whose captions are not beam search's"
            )
        _check(self.slots is None or self.slots > 0, "engine.slots", self.slots, "a positive number")
        _check(self.batch_size > 0, "engine.batch_size", self.batch_size, "a positive number")
        _check(self.stall_s > 0, "engine.stall_s", self.stall_s, "seconds above 0")
        _check(self.start_patience_s >= 0, "engine.start_patience_s", self.start_patience_s, "seconds, 0 or more")
        _check(self.max_prompt_tokens >= 16, "engine.max_prompt_tokens", self.max_prompt_tokens, "at least 16")

    @property
    def loads_model(self) -> bool:
        """Whether an actor holds a model and its tokenizer itself."""
        return self.kind not in ("echo", "api")


@dataclass(frozen=True)
class DecodeConfig:
    """How a caption is searched for. What is null is the model folder's wish, else the reference's (transformers 4.28.1)."""

    num_beams: int = 3
    max_new_tokens: int = 80
    scoring: Literal["reference", "transformers"] | None = (
        None  # 4.28.1's padded full length, or 5.x's generated length
    )
    length_penalty: float | None = None  # null: the model folder's wish, else 1.0
    no_repeat_ngram: int | None = (
        None  # blocked in the generated text only; null: the model folder's wish, else 0 (off)
    )

    def __post_init__(self) -> None:
        _check(1 <= self.num_beams <= 8, "decode.num_beams", self.num_beams, "1 to 8")
        _check(self.max_new_tokens >= 1, "decode.max_new_tokens", self.max_new_tokens, "at least 1")
        _check(
            self.scoring in (None, "reference", "transformers"),
            "decode.scoring",
            self.scoring,
            "reference or transformers",
        )
        _check(
            self.no_repeat_ngram is None or self.no_repeat_ngram >= 0,
            "decode.no_repeat_ngram",
            self.no_repeat_ngram,
            "0 (off) or more",
        )

    def resolved(self, of_model: Mapping[str, Any] = MappingProxyType({})) -> ResolvedDecode:
        """Nothing left null: what the config sets, else the model folder's setting in `of_model`, else the reference's."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return ResolvedDecode(**(dict(of_model) | given))

    def refuse_beams(self, kind: str) -> None:
        """For an engine that only decodes greedily or samples. Raises ConfigError."""
        if self.num_beams > 1 or self.no_repeat_ngram:
            raise ConfigError(
                f"decode.num_beams={self.num_beams}, decode.no_repeat_ngram={self.no_repeat_ngram}: engine.kind={kind} decodes "
                "greedily or by sampling; give decode.num_beams=1 decode.no_repeat_ngram=0, or use engine.kind=beam"
            )


@dataclass(frozen=True)
class ResolvedDecode(DecodeConfig):
    """A DecodeConfig that engines can follow. The defaults are the reference's."""

    scoring: Literal["reference", "transformers"] = "reference"
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0


@dataclass(frozen=True)
class OutputConfig:
    """Where the dataset goes, and how it is cut into files."""

    path: str = ""
    target_file_mb: float = 256.0
    target_file_rows: int | None = None  # beside target_file_mb; whichever is reached first
    partition_by: str = "shard"  # groups of input shards; or the name of a passthrough column
    max_shard_groups: int = 256
    storage: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.target_file_mb > 0, "output.target_file_mb", self.target_file_mb, "megabytes above 0")
        _check(
            self.target_file_rows is None or self.target_file_rows > 0,
            "output.target_file_rows",
            self.target_file_rows,
            "a positive number of rows",
        )
        _check(1 <= self.max_shard_groups <= 1000, "output.max_shard_groups", self.max_shard_groups, "1 to 1000")


@dataclass(frozen=True)
class ClusterConfig:
    """What runs the job: how many actors, and what each may take."""

    min_actors: int = 1
    max_actors: int | None = None  # null: as many as the cluster's GPUs (or CPUs) hold
    gpus_per_actor: float | None = None  # null: 1 where the cluster has a GPU, else 0
    cpus_per_actor: float = 1.0
    units_in_flight: int = 2  # per actor, so that its slots never drain between units
    price_per_gpu_hour: float = 2.5  # USD; for the plan's estimate only
    kind: Literal["ray", "local"] = (
        "ray"  # local: one engine in this process, without Ray; a row that kills its process ends the run there
    )
    address: str = "auto"  # auto: the cluster of `ray job submit`, else a local one started here; or ray://…

    def __post_init__(self) -> None:
        _check(self.min_actors >= 1, "cluster.min_actors", self.min_actors, "at least 1")
        ok = self.max_actors is None or self.max_actors >= self.min_actors
        _check(ok, "cluster.max_actors", self.max_actors, f"at least cluster.min_actors ({self.min_actors})")
        ok = self.gpus_per_actor is None or self.gpus_per_actor >= 0
        _check(ok, "cluster.gpus_per_actor", self.gpus_per_actor, "0 or more")
        _check(self.cpus_per_actor > 0, "cluster.cpus_per_actor", self.cpus_per_actor, "above 0")
        _check(self.units_in_flight >= 1, "cluster.units_in_flight", self.units_in_flight, "at least 1")


@dataclass(frozen=True)
class GateConfig:
    """One gate: from `threshold` on it acts, from `flag_from` on (where set) it flags. Every measure grows with the fault.

    "ignore", not "off": YAML reads a bare off as false.
    """

    action: Literal["reject", "flag", "ignore"] = "flag"
    threshold: float = 1.0
    flag_from: float | None = None

    def check(self, key: str) -> None:
        """Raises ConfigError; `key` is where the gate stands."""
        _check(self.threshold > 0, f"{key}.threshold", self.threshold, "above 0")
        ok = self.flag_from is None or 0 < self.flag_from < self.threshold
        _check(ok, f"{key}.flag_from", self.flag_from, f"null, or above 0 and below {key}.threshold={self.threshold:g}")


PairPolicy = Literal["fuse", "flag", "keep_raw", "keep_synthetic", "reject"]
MissingPolicy = Literal["keep_raw", "keep_synthetic", "reject"]


def _gate(action: Literal["reject", "flag", "ignore"], threshold: float = 1.0, flag_from: float | None = None) -> Any:
    return field(default_factory=lambda: GateConfig(action, threshold, flag_from))


@dataclass(frozen=True)
class GatesConfig:
    """What is done about each fault; a field is named as its Reason. docs/gates.md has the measured rates."""

    # before the engine: what becomes of the pair. A policy that would keep the missing caption rejects.
    null_caption: MissingPolicy = "reject"
    empty_caption: MissingPolicy = "reject"
    boilerplate: PairPolicy = "keep_synthetic"  # raw is 'IMG_1234.jpg', 'thumbnail', a bare number or hash
    mismatched_pair: PairPolicy = "fuse"  # raw and synthetic share no content word: 35% of real pairs
    # after the engine, in the order in which the first rejecting one names the reason
    empty_output: GateConfig = _gate("reject")  # 1 where no word came out
    instruction_echo: GateConfig = _gate("reject", 2, 1)  # points: 2 talks about the task, 1 borrows a phrase of it
    repetition: GateConfig = _gate("reject", 0.3, 0.1)  # share of 4-grams seen before and not repeated by a source
    wrong_script: GateConfig = _gate("reject", 0.3)  # share of letters, or 1 where the language is neither source's
    concatenation: GateConfig = _gate("flag", 0.9)  # share of the words that are both sources pasted verbatim
    copy_of_one: GateConfig = _gate("flag", 0.9)  # share of the words that are one source verbatim, the other unused
    unsupported_number: GateConfig = _gate("reject", 1)  # numbers in neither source
    unsupported_name: GateConfig = _gate("flag", 1)  # capitalised words in neither source
    cut_off: GateConfig = _gate("reject", 2, 1)  # 2: begins inside a sentence, 1: stopped at max_new_tokens
    lost_entity: GateConfig = _gate("flag", 0.5)  # share of raw's names and numbers that are gone
    too_short: GateConfig = _gate("reject", 10, 3)  # words of the longer source per fused word
    too_long: GateConfig = _gate("reject", 8, 3)  # fused words per word of both sources
    # over the whole run, once all of it is compacted
    repeated_caption: GateConfig = _gate(
        "flag", 0.001
    )  # share of the run's pairs that got this caption, 20 pairs at least

    def __post_init__(self) -> None:
        for name, gate in vars(self).items():
            if isinstance(gate, GateConfig):
                gate.check(f"gates.{name}")


# ------------------------------------------------------------------------------------------------ one schema a job


@dataclass(frozen=True)
class FuseConfig:
    """jobs/fuse.py."""

    input: InputConfig = field(default_factory=InputConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    unit: UnitConfig = field(default_factory=UnitConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    retry: str = ""  # fuse rejected rows again with these settings: `rejected`, or reasons separated by commas
    repair: bool = False  # recompute the units of damaged or missing files of a finished output
    takeover: bool = False  # stop a driver that is at work on the same output, and go on in its place
    lease_wait_s: float = (
        0.0  # wait so long for such a driver to end, instead of refusing at once: attempts may overlap
    )

    def __post_init__(self) -> None:
        _check(not (self.retry and self.repair), "repair", self.repair, "false beside retry: give one, then the other")


@dataclass(frozen=True)
class PlanConfig(FuseConfig):
    """jobs/plan.py: the fuse run's own settings; it computes the same plan and writes nothing."""

    calibrate: bool = False  # measure one actor on a few hundred rows of the input, instead of guessing its speed
    preempted_every_h: float | None = None  # spot: mean hours that an actor lives; null: all live to the end
    restart_s: float = (
        300.0  # spot: from an actor's death to the first caption of its successor: a node, the model, the engine
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.preempted_every_h is None or self.preempted_every_h > 0
        _check(ok, "preempted_every_h", self.preempted_every_h, "null, or above 0")
        _check(self.restart_s >= 0, "restart_s", self.restart_s, "0 or more")


@dataclass(frozen=True)
class VerifyConfig:
    """jobs/verify.py."""

    output: OutputConfig = field(default_factory=OutputConfig)
    deep: bool = False  # also read every row id back: each in its unit, in order, once


def _check(ok: bool, key: str, value: object, want: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r}: must be {want}")
