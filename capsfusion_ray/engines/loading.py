"""Load a tokenizer and a causal language model by folder or hub id, and refuse what is damaged. Knows no decoding."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from capsfusion_ray.config import EngineConfig
from capsfusion_ray.errors import ConfigError, EngineError
from capsfusion_ray.models.cache import folder_of

log = logging.getLogger(__name__)
disable_progress_bar()  # of an actor it would come out as torn lines in the driver's log
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, its tokenizer, and the token ids that end a caption."""

    model: Any  # transformers.PreTrainedModel; a model of trusted remote code need not be one
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    name: str

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, special tokens as the tokenizer adds them; without truncation."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, padding=False, truncation=False, return_attention_mask=False)[
            "input_ids"
        ]
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def resolve_device(engine: EngineConfig) -> torch.device:
    """`auto` is the GPU if there is one. Raises ConfigError for a GPU that is not there."""
    has_gpu = torch.cuda.is_available()
    if engine.device == "cuda" and not has_gpu:
        raise ConfigError(
            "engine.device='cuda': torch sees no GPU in this process; use engine.device=cpu or give the actor a GPU"
        )
    return torch.device("cuda" if has_gpu and engine.device != "cpu" else "cpu")


def load_model(engine: EngineConfig) -> LoadedModel:
    """The model and tokenizer of `engine.model` at `engine.revision`, in the dtype and on the device asked, ready to decode.

    Weights are read in the dtype asked; there is never a float32 copy of a bfloat16 model. Raises ConfigError for a model
    that is not there or not usable as asked, EngineError for damaged weights.
    """
    device = resolve_device(engine)  # before gigabytes are fetched
    name = folder_of(engine)
    dtype = (
        _DTYPES["bfloat16" if device.type == "cuda" else "float32"] if engine.dtype == "auto" else _DTYPES[engine.dtype]
    )
    trust = engine.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except Exception as error:  # any, by what is wrong in it
        raise ConfigError(f"engine.model={name!r}: no usable config there: {one_line(error)}") from error
    tokenizer = load_tokenizer(name, trust)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=trust,
            output_loading_info=True,
            **({"device_map": {"": device}} if device.type == "cuda" and _has_accelerate() else {}),
        )
    except ValueError as error:  # "Unrecognized configuration class": not a causal language model
        raise ConfigError(
            f"engine.model={name!r}: not loadable as a causal language model: {one_line(error)}"
        ) from error
    except torch.OutOfMemoryError as error:
        raise EngineError(_no_memory(name, device, error)) from error
    except Exception as error:  # OSError, SafetensorError, UnpicklingError, RuntimeError: by the form that is damaged
        raise EngineError(
            f"engine.model={name!r}: its weights cannot be read ({one_line(error)}); download them again"
        ) from error
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            some = ", ".join(sorted(map(str, report[what]))[:3])
            raise EngineError(
                f"engine.model={name!r}: {len(report[what])} {what.replace('_', ' ')} ({some}, …); the checkpoint is incomplete or "
                "of another model; download it again"
            )
    _refuse_foreign_tokens(model, tokenizer, name)
    try:
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:  # without accelerate it was loaded into the host's memory first
        raise EngineError(_no_memory(name, device, error)) from error
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if not torch.isfinite(parameter).all():
            raise EngineError(
                f"engine.model={name!r}: {parameter_name} holds NaN or infinite values; download the weights again"
            )
    _name_empty_rows(model, tokenizer, name)
    return LoadedModel(model, tokenizer, eos_ids_of(model, tokenizer, name), name)


def load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """The tokenizer of a model's folder. Raises ConfigError for one that is not usable.

    A LLaMA whose folder holds `tokenizer.model` alone was trained with BOS before its texts, as transformers 4 gave it;
    transformers 5 leaves BOS out unless tokenizer_config.json has `add_bos_token`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # any: the tokenizers library raises Exception itself
        raise ConfigError(f"engine.model={folder!r}: no usable tokenizer there: {one_line(error)}") from error
    alone = Path(folder, "tokenizer.model").is_file() and not Path(folder, "tokenizer.json").is_file()
    unsaid = "add_bos_token" not in tokenizer.init_kwargs and tokenizer.bos_token_id is not None
    if (
        alone
        and unsaid
        and AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).model_type in ("llama", "mistral")
    ):
        tokenizer.add_bos_token = True
        log.info(
            "%s: no add_bos_token in its tokenizer_config.json; prompts begin with %s", folder, tokenizer.bos_token
        )
    return tokenizer


def load_to_train(model: str) -> tuple[Any, Any]:
    """Tokenizer, and model in float32, of a hub id or a folder; runs no code of theirs. Raises ConfigError, EngineError."""
    folder = folder_of(EngineConfig(model=model))
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    try:
        return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"{folder}: not loadable as a causal language model: {one_line(error)}") from error
    except Exception as error:  # as in load_model
        raise EngineError(f"{folder}: its weights cannot be read ({one_line(error)}); download them again") from error


def one_line(error: Exception) -> str:
    """What an error of another library says, which may be a page."""
    return " ".join(str(error).split()) or type(error).__name__


def _no_memory(name: str, device: torch.device, error: Exception) -> str:
    return (
        f"engine.model={name!r}: no memory for its weights on {device} ({error}); use a larger GPU, or engine.kind=vllm "
        "with engine.vllm.tensor_parallel=2, which splits a model and has no beam search"
    )


def _refuse_foreign_tokens(model: Any, tokenizer: Any, name: str) -> None:
    """Raises ConfigError for a tokenizer that writes ids the model has no row for: on a GPU they would kill the process.

    A pad token may be such a one: the mask hides it.
    """
    known = model.get_input_embeddings().weight.shape[0]
    foreign = sorted(
        (id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= known and id_ != tokenizer.pad_token_id
    )
    if foreign:
        raise ConfigError(
            f"engine.model={name!r}: its tokenizer has {len(foreign)} tokens beyond the {known} of the model (first {foreign[0][1]!r}, id "
            f"{foreign[0][0]}); tokenizer and weights are not of one model"
        )


def _name_empty_rows(model: Any, tokenizer: Any, name: str) -> None:
    """An output row without weights scores 0 whatever the text, and most scores of a trained model are lower."""
    head = model.get_output_embeddings()
    empty = [] if head is None else (head.weight == 0).all(dim=1).nonzero()[:, 0].tolist()
    if empty:
        some = ", ".join(f"{id_} {tokenizer.convert_ids_to_tokens(id_)!r}" for id_ in empty[:3])
        log.warning(
            "engine.model=%r: %d rows of its vocabulary are empty (id %s); captions may hold such tokens. It was enlarged and not trained since",
            name,
            len(empty),
            some,
        )


def eos_ids_of(model: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    """The ids that end a generation: HF's order, generation_config before the tokenizer. Raises ConfigError for none."""
    for eos in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if eos is not None:
            ids = (eos,) if isinstance(eos, int) else tuple(eos)
            if ids:
                return ids
    raise ConfigError(
        f"engine.model={name!r}: neither its generation_config, its config nor its tokenizer has an EOS token, so no caption "
        "would ever end; set eos_token_id in generation_config.json"
    )


def _has_accelerate() -> bool:
    """transformers needs accelerate for device_map, which puts shards on the GPU one by one."""
    from importlib.util import find_spec

    return find_spec("accelerate") is not None
