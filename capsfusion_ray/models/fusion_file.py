"""fusion.json: the prompt and the decoding settings that a model folder may carry.

    {"prompt_template": "… {raw} … {synthetic} …", "max_prompt_tokens": 256,
     "decode": {"scoring": "transformers", "length_penalty": 1.5, "no_repeat_ngram": 5}}

Every key is optional. A model without the file gets the prompt of CapsFusion, character by character.
"""

from __future__ import annotations

import math
from typing import Any

from capsfusion_ray.config import DecodeConfig
from capsfusion_ray.core.prompt import TEMPLATE, Template
from capsfusion_ray.errors import ConfigError
from capsfusion_ray.models.json_object import parse_json_object
from capsfusion_ray.storage import Store

FUSION_FILE = "fusion.json"
# The keys of "decode" and the types of their values.
DECODE_KEYS: dict[str, tuple[type, ...]] = {
    "scoring": (str,),
    "length_penalty": (int, float),
    "no_repeat_ngram": (int,),
}


def read_fusion_file(folder: Store) -> dict[str, Any]:
    """The settings in the folder's fusion.json, {} if it has none. Raises ConfigError for an unknown key or a bad value."""
    found = folder.get_with_etag(FUSION_FILE)
    return parse_fusion_file(folder.url(FUSION_FILE), found[0]) if found else {}


def parse_fusion_file(path: str, data: bytes) -> dict[str, Any]:
    """The settings in `data`; `path` names the file in errors. Raises ConfigError for an unknown key or a bad value."""
    settings = parse_json_object(path, data)
    decode = settings.get("decode", {})
    template, longest = settings.get("prompt_template", TEMPLATE), settings.get("max_prompt_tokens", 1)
    for name, value, fits, form in (
        ("prompt_template", template, isinstance(template, str), "a text"),
        ("max_prompt_tokens", longest, type(longest) is int and longest > 0, "a whole number above 0"),
        ("decode", decode, isinstance(decode, dict), "an object"),
    ):
        if not fits:
            raise ConfigError(f"{path}: {name}={value!r:.80}: must be {form}; mend or remove it")
    unknown = set(settings) - {"prompt_template", "max_prompt_tokens", "decode"}
    unknown |= {f"decode.{name}" for name in decode if name not in DECODE_KEYS}
    if unknown:
        raise ConfigError(
            f"{path}: unknown keys {sorted(unknown)}; it may hold prompt_template, max_prompt_tokens, decode ({', '.join(DECODE_KEYS)})"
        )
    for name, value in decode.items():
        if type(value) not in DECODE_KEYS[name] or (type(value) is float and not math.isfinite(value)):
            kinds = " or ".join(kind.__name__ for kind in DECODE_KEYS[name])
            raise ConfigError(f"{path}: decode.{name}={value!r:.80}: must be {kinds}")
    try:
        Template.parse(template)
        DecodeConfig().resolved(decode)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return settings
