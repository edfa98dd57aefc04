"""A stub of vLLM, which needs a GPU: a greedy decoder that takes requests while it runs, with the names of vLLM 0.33.

Signatures and fields are those of vLLM; only the names that the engine uses exist. Put the folder of this package on
sys.path. It decodes on a CPU, without a cache, one token per step and request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import sampling_params
from .sampling_params import SamplingParams

__version__ = "0.33.0.stub"
__all__ = ["EngineArgs", "LLMEngine", "SamplingParams", "TokensPrompt", "sampling_params"]


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class EngineArgs:
    model: str
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    tensor_parallel_size: int = 1
    enable_prefix_caching: bool | None = None
    disable_log_stats: bool = False
    distributed_executor_backend: str | None = None
    gpu_memory_utilization: float = 0.9
    quantization: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class _Request:
    id: str
    prompt: list[int]
    params: SamplingParams
    written: list[int] = field(default_factory=list)


class LLMEngine:
    running_per_step: ClassVar[list[int]] = []  # requests decoded in each step, for tests
    dies_at: int | None = None  # the step that fails

    def __init__(self, args: EngineArgs) -> None:
        if args.quantization == "unheard-of":
            raise ValueError("Unknown quantization method: unheard-of")
        if args.gpu_memory_utilization > 1:
            raise RuntimeError("Engine core initialization failed.")
        self.args = args
        self._model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        self._eos = self._model.generation_config.eos_token_id
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []
        self._steps = 0

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        return cls(engine_args)

    def add_request(self, request_id: str, prompt: TokensPrompt, params: SamplingParams) -> str:
        assert isinstance(request_id, str)
        assert len(prompt["prompt_token_ids"]) <= (self.args.max_model_len or 0)
        self._waiting.append(_Request(request_id, list(prompt["prompt_token_ids"]), params))
        return f"{request_id}-internal"

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        self._steps += 1
        if self._steps == self.dies_at:
            raise RuntimeError("EngineCore encountered an issue.")
        while self._waiting and len(self._running) < (self.args.max_num_seqs or 1):
            self._running.append(self._waiting.pop(0))
        LLMEngine.running_per_step.append(len(self._running))
        finished = []
        for request in self._running:
            scores = self._model(torch.tensor([request.prompt + request.written])).logits[0, -1]
            request.written.append(int(scores.argmax()))
            if (reason := self._reason(request)) is not None:
                finished.append((request, reason))
        self._running = [request for request in self._running if request not in [done for done, _ in finished]]
        return [self._output(request, reason) for request, reason in finished]

    def _reason(self, request: _Request) -> str | None:
        if request.written[-1] == self._eos:
            return "stop"
        if request.params.repetition and len(request.written) == 3:
            return "repetition"
        return "length" if len(request.written) == request.params.max_tokens else None

    def _output(self, request: _Request, reason: str) -> RequestOutput:
        text = self._tokenizer.decode(request.written, skip_special_tokens=True)
        written = CompletionOutput(0, f" {text}", request.written, reason)  # LLaMA's text begins with a space, too
        return RequestOutput(request.id, request.prompt, [written], finished=True)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"{name}: the stub does not have this name; add it as it is in vLLM")
