"""Keep secrets of storage options out of logs, saved configs and command lines."""

from __future__ import annotations

from collections.abc import Sequence

_SECRET = ("secret", "key", "token", "password", "credential", "connection_string")


def is_secret(option: str) -> bool:
    """Whether the value of a storage option must not be shown, judged by the option's name."""
    return any(word in option.lower() for word in _SECRET)


def in_storage(key: str) -> bool:
    """Whether a dotted key is an option of a store, such as output.storage.secret or to_storage.secret."""
    return key.rpartition(".")[0].endswith("storage")


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line with *** for the value of each `….storage.secret=…`."""

    def shown(word: str) -> str:
        key, _, value = word.partition("=")
        # {…}: a whole section in one word, such as output={path: …, storage: {secret: …}}
        section = key.endswith("storage") or ("storage" in value and value.lstrip().startswith("{"))
        secret = is_secret(key.rpartition(".")[2]) if in_storage(key) else section and is_secret(value)
        return f"{key}=***" if secret and value else word

    return [shown(word) for word in words]
