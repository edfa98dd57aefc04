"""The protocol of OpenAI-compatible servers: from a prompt to a request body, from an answer to a caption. Knows no network."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any

from capsfusion_ray.config import ApiConfig
from capsfusion_ray.core.types import FinishReason, Generation, Prompt

MAX_TOKENS = 2**31 - 1  # the largest number in the columns of a part
# finish_reason of OpenAI, and then of Hugging Face's server.
_ENDS = {
    "stop": FinishReason.EOS,
    "length": FinishReason.LENGTH,
    "eos_token": FinishReason.EOS,
    "stop_sequence": FinishReason.EOS,
}


class Unreadable(Exception):
    """An answer that does not follow the protocol. The message quotes the whole answer; who shows it cuts it."""


def path(api: ApiConfig) -> str:
    """Return the path of requests, after engine.api.url."""
    return "/chat/completions" if api.chat else "/completions"


def request_body(api: ApiConfig, text: str, max_tokens: int) -> dict[str, Any]:
    """Return the request body of one prompt. Fields of engine.api.request replace others; null fields are left out."""
    body: dict[str, Any] = {"model": api.model, "max_tokens": max_tokens, "temperature": api.temperature}
    if api.chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    return {name: value for name, value in (body | api.request).items() if value is not None}


def parse(data: bytes) -> Any:
    """Parse an answer. Raises Unreadable if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the answer is not JSON ({error}): {_quoted(data)}") from None


def usage(answer: Any) -> tuple[int, int] | None:
    """Return the prompt and completion tokens of a parsed answer, or None if the server sent no usable numbers."""
    told = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(told, dict):
        return None
    counts = [told.get("prompt_tokens"), told.get("completion_tokens", 0)]
    tokens = [n for n in counts if isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_TOKENS]
    return (tokens[0], tokens[1]) if len(tokens) == len(counts) else None


def generation(prompt: Prompt, answer: Any, chat: bool) -> Generation:
    """Return the caption of a parsed answer, with finish=ERROR if the model or a content filter refused the row.

    Raises Unreadable for an answer without a caption.
    """
    try:
        choice = answer["choices"][0]
        why, message = choice["finish_reason"], choice["message"] if chat else choice
        text = message["content" if chat else "text"]
        refusal = message.get("refusal") if chat else None
        if text is not None:
            text.encode()  # half of a surrogate pair is valid JSON but no valid text
    except (LookupError, TypeError, AttributeError, UnicodeEncodeError):
        raise Unreadable(f"the answer does not follow the protocol: {_quoted(answer)}") from None
    prompt_tokens, output_tokens = usage(answer) or (0, 0)
    if why == "content_filter" or refusal:
        error = f"{prompt.id}: the server's content filter or model refused this row: {refusal or why}"
        return Generation(prompt.id, "", FinishReason.ERROR, prompt_tokens, output_tokens, error=error)
    finish = _ENDS.get(why) if isinstance(why, str) else None
    # A reasoning model may reach the limit before the first word of its answer.
    if finish is None or (text is None and finish is not FinishReason.LENGTH):
        raise Unreadable(f"the answer is not a caption (finish_reason {why!r}): {_quoted(answer)}")
    return Generation(prompt.id, (text or "").strip(), finish, prompt_tokens, output_tokens)


def error_code(data: bytes) -> str:
    """Return the error code of an answer's body, such as insufficient_quota, or ""."""
    try:
        return str(json.loads(data)["error"]["code"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which is a number of seconds or a date; None for anything else."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if 0 <= seconds < float("inf") else None


def _quoted(answer: Any) -> str:
    return answer.decode("utf-8", "replace") if isinstance(answer, bytes) else json.dumps(answer, ensure_ascii=False)
