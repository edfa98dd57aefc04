"""Load a tokenizer and a causal language model from a folder or the hub, and refuse damaged ones. Knows no decoding."""

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
disable_progress_bar()  # an actor's progress bar would appear as broken lines in the driver's log
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, its tokenizer, and the token ids that end a caption."""

    model: Any  # a transformers.PreTrainedModel, or a class of trusted remote code
    tokenizer: Any  # a transformers.PreTrainedTokenizerBase
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
        """Return the token ids of each text, with the special tokens that the tokenizer adds, without truncation."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, padding=False, truncation=False, return_attention_mask=False)[
            "input_ids"
        ]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without special tokens and surrounding white space."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()


def resolve_device(engine: EngineConfig) -> torch.device:
    """Return the device of engine.device; "auto" is the GPU if there is one. Raises ConfigError for a missing GPU."""
    has_gpu = torch.cuda.is_available()
    if engine.device == "cuda" and not has_gpu:
        raise ConfigError(
            "engine.device='cuda': torch sees no GPU in this process; use engine.device=cpu or give the actor a GPU"
        )
    return torch.device("cuda" if has_gpu and engine.device != "cpu" else "cpu")


def load_model(engine: EngineConfig) -> LoadedModel:
    """Load the model and the tokenizer of `engine.model` at `engine.revision`, in the configured dtype and on its device.

    The weights are read in that dtype, so there is never a float32 copy of a bfloat16 model. Raises ConfigError for a
    model that does not exist or cannot be used as configured, EngineError for damaged weights.
    """
    device = resolve_device(engine)  # before gigabytes are downloaded
    name = folder_of(engine)
    tokenizer, model = _read(name, engine, device)
    _refuse_foreign_tokens(model, tokenizer, name)
    try:
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:  # without accelerate the model was loaded into the host's memory first
        raise EngineError(_no_memory(name, device, error)) from error
    _freeze(model, name)
    _warn_of_empty_rows(model, tokenizer, name)
    return LoadedModel(model, tokenizer, eos_ids_of(model, tokenizer, name), name)


def _read(name: str, engine: EngineConfig, device: torch.device) -> tuple[Any, Any]:
    """Read the tokenizer and the model of a folder. With accelerate the model is on the device already."""
    trust = engine.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except Exception as error:  # the class depends on what is wrong in it
        raise ConfigError(f"engine.model={name!r}: it has no usable config: {one_line(error)}") from error
    tokenizer = load_tokenizer(name, trust)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=_dtype(engine, device),
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
    except Exception as error:  # OSError, SafetensorError, UnpicklingError or RuntimeError, depending on the damage
        raise EngineError(
            f"engine.model={name!r}: its weights cannot be read ({one_line(error)}); download them again"
        ) from error
    _refuse_incomplete(report, name)
    return tokenizer, model


def _dtype(engine: EngineConfig, device: torch.device) -> torch.dtype:
    if engine.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[engine.dtype]


def _refuse_incomplete(report: dict[str, Any], name: str) -> None:
    """Raises EngineError for a checkpoint that lacks weights or has some of another shape."""
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            some = ", ".join(sorted(map(str, report[what]))[:3])
            raise EngineError(
                f"engine.model={name!r}: {len(report[what])} {what.replace('_', ' ')} ({some}, …); the checkpoint is incomplete or "
                "of another model; download it again"
            )


def _freeze(model: Any, name: str) -> None:
    """Switch gradients off. Raises EngineError for a weight that is not finite."""
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if not torch.isfinite(parameter).all():
            raise EngineError(
                f"engine.model={name!r}: {parameter_name} has NaN or infinite values; download the weights again"
            )


def load_tokenizer(folder: str, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a model's folder. Raises ConfigError for one that cannot be used.

    A LLaMA whose folder has `tokenizer.model` but no `tokenizer.json` was trained with BOS before each text, because
    transformers 4 added it. transformers 5 adds BOS only if tokenizer_config.json has `add_bos_token`, so it is added here.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ConfigError(f"engine.model={folder!r}: it has no usable tokenizer: {one_line(error)}") from error
    alone = Path(folder, "tokenizer.model").is_file() and not Path(folder, "tokenizer.json").is_file()
    unsaid = "add_bos_token" not in tokenizer.init_kwargs and tokenizer.bos_token_id is not None
    if (
        alone
        and unsaid
        and AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).model_type in ("llama", "mistral")
    ):
        tokenizer.add_bos_token = True
        log.info(
            "%s: its tokenizer_config.json has no add_bos_token, so prompts begin with %s", folder, tokenizer.bos_token
        )
    return tokenizer


def load_to_train(model: str) -> tuple[Any, Any]:
    """Load the tokenizer, and the model in float32, of a hub id or a folder. It never runs code of the model.

    Raises ConfigError for a model that cannot be used, EngineError for damaged weights.
    """
    folder = folder_of(EngineConfig(model=model))
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    try:
        return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"{folder}: not loadable as a causal language model: {one_line(error)}") from error
    except Exception as error:  # as in load_model
        raise EngineError(f"{folder}: its weights cannot be read ({one_line(error)}); download them again") from error


def one_line(error: Exception) -> str:
    """Return the message of another library's error on one line. It may fill a page."""
    return " ".join(str(error).split()) or type(error).__name__


def _no_memory(name: str, device: torch.device, error: Exception) -> str:
    return (
        f"engine.model={name!r}: {device} has no memory for its weights ({error}); use a larger GPU, or engine.kind=vllm "
        "with engine.vllm.tensor_parallel=2, which splits a model over GPUs and has no beam search"
    )


def _refuse_foreign_tokens(model: Any, tokenizer: Any, name: str) -> None:
    """Raises ConfigError for a tokenizer with ids beyond the model's embedding. On a GPU they would kill the process.

    The pad token may be beyond it, because the attention mask hides it.
    """
    known = model.get_input_embeddings().weight.shape[0]
    foreign = sorted(
        (id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= known and id_ != tokenizer.pad_token_id
    )
    if foreign:
        raise ConfigError(
            f"engine.model={name!r}: its tokenizer has {len(foreign)} tokens beyond the {known} of the model (first {foreign[0][1]!r}, id "
            f"{foreign[0][0]}); use the tokenizer and the weights of the same model"
        )


def _warn_of_empty_rows(model: Any, tokenizer: Any, name: str) -> None:
    """Warn of output rows that are all zeros. Their score is always 0, and most scores of a trained model are lower."""
    head = model.get_output_embeddings()
    empty = [] if head is None else (head.weight == 0).all(dim=1).nonzero()[:, 0].tolist()
    if empty:
        some = ", ".join(f"{id_} {tokenizer.convert_ids_to_tokens(id_)!r}" for id_ in empty[:3])
        log.warning(
            "engine.model=%r: %d rows of its output table are zero (ids %s), so captions may contain these tokens. The vocabulary "
            "was probably enlarged without further training",
            name,
            len(empty),
            some,
        )


def eos_ids_of(model: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    """Return the token ids that end a caption, from the first of generation_config, config and tokenizer that has any.

    This is the order of HF's generate. Raises ConfigError if there is none.
    """
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
    """Return whether accelerate is installed. With it transformers loads the weights to the GPU shard by shard."""
    from importlib.util import find_spec

    return find_spec("accelerate") is not None
