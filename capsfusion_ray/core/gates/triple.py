"""A fused caption beside its sources, taken apart once, and a Fault in it. Knows no gate, no verdict."""

from __future__ import annotations

import re
from typing import NamedTuple

from capsfusion_ray.core.types import FinishReason
from capsfusion_ray.core.word_alignment import key_of, source_words

MAX_DETAIL = 200  # characters
MAX_READ = 20_000  # characters of a caption that are judged: no prompt holds more, and an alt text of 1 MB exists
SURROGATE = re.compile("[\ud800-\udfff]")

# They say nothing about what is in the picture.
_FUNCTION_WORDS = """
a an and are as at be been being but by can for from had has have he her his how i if in into is it its just me my
no not of off on one or our out over she so some than that the their them then there these they this to up was we
were what when which while who will with without you your s t de la le el di del der die das und et y con en for
image photo picture photograph showing shown show two three
"""

# Words of alt texts that describe the file or the page and not the picture. Only a caption made of nothing else is
# boilerplate: 'Giraffe-Drinking-Water-Images-540x337' keeps its giraffe.
_FILE_WORDS = """
image img images picture pic pics photo photos foto bild imagen photograph photography thumbnail thumb thumbs icon
logo banner avatar screenshot screen shot capture dsc dscn dscf dscn pict mvc file files upload uploads download
media attachment untitled unnamed default placeholder blank none null undefined nan na alt text title caption
description here click tap to enlarge zoom view full size large medium small larger original scaled crop cropped
resized copy final new edited edit version v px jpg jpeg png gif webp svg bmp tif tiff html htm php asp aspx www
http https com wp content preview hero header footer slide slider gallery main product no available loading loader
lazy image0 the a an of this is for more info and or in it s by x w h unsplash pexels pixabay whatsapp at am pm
"""

STOP_KEYS = frozenset(map(key_of, _FUNCTION_WORDS.split()))
BOILERPLATE_KEYS = frozenset(map(key_of, _FILE_WORDS.split()))


class Fault(NamedTuple):
    """How bad, and on what."""

    size: float
    detail: str


class Triple:
    """A fused caption beside its sources, each taken apart once. finish None: unknown (a caption read from a file)."""

    __slots__ = ("finish", "fused", "raw", "synthetic")

    def __init__(self, raw: str, synthetic: str, fused: str, finish: FinishReason | None) -> None:
        self.raw = source_words(raw[:MAX_READ])
        self.synthetic = source_words(synthetic[:MAX_READ])
        self.fused = source_words(fused[:MAX_READ])  # a model copies entities too
        self.finish = finish


def show(text: str) -> str:
    return f"'{text if len(text) <= 60 else text[:57] + '…'}'"


def clip(detail: str) -> str:
    """On one line and short; lone surrogates replaced, because the detail is stored as UTF-8."""
    detail = SURROGATE.sub("\ufffd", " ".join(detail.split()))
    return detail if len(detail) < MAX_DETAIL else detail[: MAX_DETAIL - 2] + "…"
