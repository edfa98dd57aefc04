"""Runs vLLM in this process: for models that do not fit one GPU, that `beam` refuses, or for sampled captions.

Captions are greedy, or sampled if engine.vllm.temperature is above 0. They are never those of engine.kind=beam, because
vLLM has no beam search that takes new prompts while it runs. The results of its kernels depend on the other rows of a
batch, so greedy captions may differ slightly from run to run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from capsfusion_ray.config import DecodeConfig, EngineConfig
from capsfusion_ray.config.extras import install_hint
from capsfusion_ray.core.types import FinishReason, Generation, Prompt
from capsfusion_ray.engines.base import Occupancy, prompt_fault
from capsfusion_ray.engines.loading import load_tokenizer, one_line
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.models.cache import folder_of

SLOTS = 256  # captions decoded together if engine.slots=null; vLLM's own default depends on its version and the GPU


class VllmEngine:
    """Implements engines.base.Engine with vLLM's LLMEngine: one step of vLLM per step.

    Prompts are submitted between steps, so vLLM refills its batch as captions finish. Raises ConfigError if vllm is
    missing and for settings that vLLM refuses.
    """

    def __init__(self, engine: EngineConfig, decode: DecodeConfig) -> None:
        vllm = _import_vllm()
        folder = folder_of(engine)
        # A tokenizer of its own, because other threads than the one that steps encode prompts.
        self._tokenizer = load_tokenizer(folder, engine.trust_remote_code)
        self._vllm = vllm
        self._max_prompt_tokens = engine.max_prompt_tokens
        self._slots = engine.slots or SLOTS
        self._submitted: dict[str, Prompt] = {}
        self._failed: list[Generation] = []
        refused = f"engine.kind=vllm: vLLM {vllm.__version__} refuses the settings"
        try:
            self._params = vllm.SamplingParams(
                temperature=engine.vllm.temperature,
                max_tokens=decode.max_new_tokens,
                output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
                **engine.vllm.sampling,
            )
            asked = vllm.EngineArgs(**_engine_args(engine, decode, folder))
        except Exception as error:  # an unknown field or a bad value: TypeError, ValueError, or a class of vLLM
            raise ConfigError(f"{refused}: {one_line(error)}") from error
        try:
            self._engine = vllm.LLMEngine.from_engine_args(asked)
        except ValueError as error:  # an architecture, a length or a quantization that vLLM does not know
            raise ConfigError(f"{refused}: {one_line(error)}") from error
        except Exception as error:  # vLLM's engine core is another process, whose failures arrive as RuntimeError
            raise EngineError(
                f"engine.model={folder!r}: vLLM {vllm.__version__} did not start ({one_line(error)}); its log above says more"
            ) from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            list(texts), padding=False, truncation=False, return_attention_mask=False
        )["input_ids"]
        return ids

    @property
    def unfinished(self) -> int:
        return len(self._submitted) + len(self._failed)

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(min(len(self._submitted), self._slots), self._slots)

    def submit(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if error := prompt_fault(prompt, self._max_prompt_tokens):
                self._failed.append(Generation.failed(prompt, error))
                continue
            ids = list(prompt.prefix_ids + prompt.suffix_ids)
            self._engine.add_request(prompt.id, self._vllm.TokensPrompt(prompt_token_ids=ids), self._params)
            self._submitted[prompt.id] = prompt

    def step(self) -> list[Generation]:
        finished, self._failed = self._failed, []
        if not self._submitted:
            return finished
        try:
            outputs = self._engine.step()
        except Exception as error:  # EngineDeadError, or an error of its executor; vLLM answers nothing after either
            raise EngineError(f"vLLM died in a step: {type(error).__name__}: {error}") from error
        return finished + [
            _generation(self._submitted.pop(output.request_id), output) for output in outputs if output.finished
        ]


def _import_vllm() -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
        import vllm.sampling_params
    except ImportError as error:
        raise ConfigError(
            f"engine.kind=vllm: vLLM is not installed in this environment ({error}); it pins other versions of torch, so it needs an "
            "environment of its own: make submit RUNTIME_ENV=deploy/runtime_env_vllm.yaml, or "
            f"{install_hint('vllm')} without constraints.txt"
        ) from error
    return vllm


def _engine_args(engine: EngineConfig, decode: DecodeConfig, folder: str) -> dict[str, Any]:
    args: dict[str, Any] = {
        "model": folder,
        "tokenizer": folder,
        "trust_remote_code": engine.trust_remote_code,
        "dtype": engine.dtype,
        "max_model_len": engine.max_prompt_tokens + decode.max_new_tokens,
        "max_num_seqs": engine.slots or SLOTS,
        "tensor_parallel_size": engine.vllm.tensor_parallel,
        "enable_prefix_caching": True,  # all prompts begin with the same instruction
        "disable_log_stats": True,
    }
    if engine.vllm.tensor_parallel > 1:
        args["distributed_executor_backend"] = "mp"  # processes; on Ray vLLM would request further GPUs
    return args | engine.vllm.options


def _generation(prompt: Prompt, output: Any) -> Generation:
    (written,) = output.outputs
    tokens = len(written.token_ids)
    if written.finish_reason == "stop":
        finish = FinishReason.EOS
        tokens -= not isinstance(written.stop_reason, str)  # the EOS token, unless a stop word ended the caption
    elif written.finish_reason == "length":
        finish = FinishReason.LENGTH
    else:
        return Generation.failed(prompt, f"vLLM ended the caption with finish_reason={written.finish_reason}")
    return Generation(
        id=prompt.id,
        text=written.text.strip(),
        finish=finish,
        prompt_tokens=prompt.tokens,
        output_tokens=tokens,
    )
