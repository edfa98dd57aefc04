"""Keys: which URLs are equal, which keys are empty, and one bucket per key everywhere."""

import zlib
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfusion_ray.pairing.keys import buckets_of, keys_of, normalised_urls


def text_array(values):
    return pa.array(values, pa.string())


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://Example.COM/A.jpg", "example.com/A.jpg"),
        ("https://example.com:443/A.jpg#top", "example.com/A.jpg"),
        (" HTTPS://example.com:80/A.jpg\n", "example.com/A.jpg"),
        ("//example.com/A.jpg", "example.com/A.jpg"),
        ("http://example.com:8080/a", "example.com:8080/a"),
        ("http://example.com", "example.com/"),
        ("http://example.com?a=1&amp;b=2", "example.com/?a=1&b=2"),
        ("http://example.com/a/?b=HTTP://X.Y/#Z", "example.com/a/?b=HTTP://X.Y/"),
        ("http://example.com/a%2fb/", "example.com/a%2fb/"),
        ("http://www.example.com/", "www.example.com/"),
        ("data:image/png;base64,AA#x", "data:image/png;base64,AA#x"),
        ("Not A URL ", "Not A URL"),
        ("ftp://Example.com/", "ftp://Example.com/"),
        ("", ""),
        (None, None),
    ],
)
def test_urls_that_lead_to_the_same_place_are_one_key(url, key):
    assert normalised_urls(text_array([url])).to_pylist() == [key]


PARTS = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["http://", "https://", "HTTP://", "//"]),
    st.sampled_from(["a.example", "A.Example", "ÄÖ.example", "u:P@A.b"]),
    st.sampled_from(["", ":80", ":443", ":81"]),
    st.sampled_from(["", "/", "/A b", "/a//", "/a:80"]),
    st.sampled_from(["", "?", "?Q=1#f", "#F", "?a#b#c"]),
)


@given(url=PARTS)
def test_normalising_agrees_with_the_standard_library_and_is_done_once(url):
    def by_urllib(url):
        parts = urlsplit(url)
        host = "".join(c.lower() if c.isascii() else c for c in parts.netloc).removesuffix(":80").removesuffix(":443")
        query = url.partition("#")[0].partition("?")
        return host + (parts.path or "/") + query[1] + query[2]

    (key,) = normalised_urls(text_array([url])).to_pylist()
    assert key == by_urllib(url)
    assert normalised_urls(text_array(["//" + key])).to_pylist() == [key]


def test_keys_are_text_or_whole_numbers_and_empty_ones_are_none():
    assert keys_of(pa.array([2**63 - 1, -5, None]), "none").to_pylist() == ["9223372036854775807", "-5", None]
    assert keys_of(pa.array([2**64 - 1], pa.uint64()), "none").to_pylist() == ["18446744073709551615"]
    assert keys_of(text_array(["", " ", "A"]), "none").to_pylist() == [None, " ", "A"]
    assert keys_of(text_array(["", " ", "http://A"]), "url").to_pylist() == [None, None, "a/"]


@given(keys=st.lists(st.text(max_size=6), max_size=20), partitions=st.integers(1, 50))
def test_a_key_has_one_bucket_on_every_machine(keys, partitions):
    keys = [key for key in keys if not any("\ud800" <= c <= "\udfff" for c in key)]
    assert buckets_of(text_array(keys), partitions).to_pylist() == [
        zlib.crc32(key.encode()) % partitions for key in keys
    ]
