"""Small records as JSON objects: what is written is read back, and what is no record is refused."""

from dataclasses import dataclass

import pytest

from capsfusion_ray.storage import Store, decode_note, encode_note, read_note, write_note


@dataclass(frozen=True)
class Inner:
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Record:
    name: str
    inner: Inner


def test_a_record_is_read_back_as_it_was_written(store: Store) -> None:
    write_note(store, "notes/a.json", Record("ü", Inner((1, 2))))
    assert read_note(store, "notes/a.json") == {"name": "ü", "inner": {"numbers": [1, 2]}}
    write_note(store, "notes/a.json", {"name": None})
    assert read_note(store, "notes/a.json") == {"name": None}


def test_a_record_that_does_not_exist_is_none(store: Store) -> None:
    assert read_note(store, "notes/none.json") is None


def test_the_bytes_are_those_of_earlier_versions() -> None:
    assert encode_note(Record("ü", Inner((1,)))) == b'{"name": "\\u00fc", "inner": {"numbers": [1]}}'


@pytest.mark.parametrize("data", [b"", b"[1]", b"1", b'{"a": ', b"\xff"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (raised by json, or by decode_note)
        decode_note(data)
