"""Write a synthetic corpus of any size with the shape of LAION-COCO: parquet shards, the preset's columns and types.

    python benchmarks/make_corpus.py --rows 1e6 --shards 50 --output DIR --seed 1 [--damaged 2] [--processes 2] [--only 0:10]

Lengths follow the published examples: raw captions of 9 words in the median and 27 at the 95th percentile, synthetic ones of 9
and 13; one pair in three shares no content word. As in the wild, shard sizes are skewed, some shards are one huge row group,
WIDTH changes its type between shards, and there are null, empty, boilerplate and doubled rows. Of the damaged shards every
second one lacks its tail (no footer: unreadable), the others have a broken page in the middle (one row group is lost).

The same arguments give the same bytes (with the same numpy and pyarrow). A shard's rows follow from `seed`, its number and
its row count alone, and shards are made one by one: in any order, in several processes, or only some of them (`--only`).
Memory: one row group, at most 250 MB a process. The words are ours; no caption is copied. The last line is JSON.
"""

# ruff: noqa: SIM905 - word lists are read and edited as text
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

GROUP_ROWS = 65_536  # an ordinary row group, and the rows made at a time
HUGE_GROUP_ROWS = 8 * GROUP_ROWS
HUGE_EVERY = 7  # shards 3, 10, 17, ... have huge row groups
WIDTH_TYPES = (pa.int32(), pa.int64(), pa.float64())  # they drift between the derivatives of LAION-COCO
SIZE_SIGMA = 0.8  # of the log of a shard's size: the largest of 100 has 20 times the rows of the smallest

SHARED_SHARE = 0.65  # pairs with a content word in common, as in the published examples
NULL_SHARE, EMPTY_SHARE, BOILERPLATE_SHARE, DOUBLED_SHARE = 0.0005, 0.0005, 0.007, 0.003
FULL_STOP_SHARE = 0.9  # of the synthetic captions
OTHER_CAPTIONS = 2  # of all_captions, beside the top one

NOUNS = (
    "dog cat horse bird woman man boy girl child couple kitchen bedroom bathroom sofa table chair lamp bed desk shelf car truck bus "
    "train bicycle motorcycle boat plane bridge tower castle church house building street beach mountain lake river forest garden "
    "flower tree cake pizza salad bowl plate cup bottle knife phone laptop camera watch ring necklace dress shirt jacket shoe boot "
    "hat bag wallet belt poster painting drawing logo map book magazine card sign clock toy doll puzzle guitar piano drum ball "
    "racket helmet tent backpack rug curtain pillow blanket towel mirror frame window door fence stadium market museum station "
    "airport harbour field road sunset sky snowman candle gift ribbon wedding concert football tractor windmill lighthouse"
).split()
ADJECTIVES = (
    "red blue green black white yellow brown pink grey orange old new small large tall little wooden metal glass leather golden "
    "silver modern vintage colourful bright dark round square striped empty busy young happy beautiful plain soft heavy"
).split() + [""] * 24
RELATIONS = (
    "with|sitting on|standing next to|standing in front of|lying on|on top of|next to|in front of|holding|looking at|behind|and|"
    "riding past|leaning against|surrounded by|walking past|on display beside|parked near|is shown with|that is placed near"
).split("|")
SETTINGS = (
    "||||||||| in a room| on a white background| at night| in the rain| in the background| on a sunny day| at the beach| in a field|"
    " in black and white| with a blue sky| on the floor| in a large city| hanging on a wall| in the middle of a crowded street"
).split("|")
PLACES = (
    "London|Paris|New York|Berlin|Lisbon|Tokyo|Seattle|Cape Town|Sydney|Krakow|Malaga|Zürich|Lake District|Nova Scotia|Bali|Oslo|"
    "San Diego|Mexico City|Mumbai|Istanbul|Reykjavik|Santorini|Buenos Aires|Texas|Ohio|Bavaria|Tuscany|Yorkshire"
).split("|")
FIRST_NAMES = (
    "Anna Peter Maria James Linda Omar Priya Kenji Sofia Lucas Grace Ivan Chloe Diego Amara Tom Helen Nadia".split()
)
TRADE = (
    "Women's|Men's|Kids|Free Shipping|for Sale|Set of|Stock Photo|Vector Illustration|Wallpaper|High Resolution|Front View|"
    "Review|How to Make|Best|Top|Recipe|Poster Print|Canvas Art|Size|Official|Limited Edition|Pack of|Replacement|by|with|and|of|"
    "the|in|for|from|on|a|to|at|Home Decor|Interior|Photography|Pre-Owned|Made in|Cover|Case for"
).split("|")
MARKS = ("-", "|", "&", "...", ":", ",", "/", "+", "!!", "- eBay")
OTHER_LANGUAGES = (
    "für Damen|Größe|Schöne Grüße aus|Küche|mit Rückenlehne|pour la maison|à vendre|décoration d'été|vêtements|corazón|niños|"
    "para el jardín|São Paulo|promoção|купить|фото|зимний лес|картина на холсте|写真素材|東京タワー|无线耳机|قهوة|Ελλάδα|świąteczny"
).split("|")
SYLLABLES = "ka lo mi ra ven tor sel ban dri qua fen zor pel ma nu tis gar bel ico ram".split()
FILE_NAMES = ("IMG_", "DSC", "DSC_", "image", "Screenshot ", "P10", "photo-")


@dataclass(frozen=True)
class Bank:
    """Phrases as Arrow arrays; a caption is a list of indices into them."""

    fragments: pa.Array  # of raw captions, of one to four words; at NOUNS' places 0, 1, 2, ... the nouns themselves
    subjects: pa.Array  # "a red dog", at noun * len(ADJECTIVES) + adjective
    relations: pa.Array
    settings: pa.Array
    others: pa.Array  # whole synthetic captions
    hosts: pa.Array  # the start of a URL
    boilerplate: pa.Array


@cache
def bank() -> Bank:
    """The same for every corpus: made once a process, in a fraction of a second."""
    rng = np.random.default_rng(20_231_020)

    def pick(words: Sequence[str], n: int) -> list[str]:
        return [words[i] for i in rng.integers(len(words), size=n)]

    def invented(n: int, syllables: int) -> list[str]:
        parts = [pick(SYLLABLES, n) for _ in range(syllables)]
        return ["".join(letters).capitalize() for letters in zip(*parts, strict=True)]

    brands = invented(500, 2) + invented(500, 3)
    numbers = [str(n) for n in (*rng.integers(1, 999, 150), *rng.integers(1950, 2024, 100))]
    numbers += [
        f"{n}{unit}"
        for n in (2, 5, 12, 16, 32, 64, 100, 250, 500)
        for unit in ("cm", "ml", "GB", "mm", "kg", '"', "W", "-piece")
    ]
    numbers += [f"#{n}" for n in rng.integers(1, 500, 40)] + [f"${n}.99" for n in rng.integers(3, 300, 40)]
    codes = [f"{a[:2].upper()}{n}" for a, n in zip(pick(brands, 300), rng.integers(100, 9999, 300), strict=True)]
    fragments = [
        *NOUNS,
        *pick(NOUNS, 900),
        *(
            f"{a.capitalize()} {n.capitalize()}".strip()
            for a, n in zip(pick(ADJECTIVES, 2000), pick(NOUNS, 2000), strict=True)
        ),
        *pick(TRADE, 1700),
        *pick(brands, 1100),
        *(f"{b} {c}" for b, c in zip(pick(brands, 280), pick(codes, 280), strict=True)),
        *pick(PLACES, 500),
        *(f"{f} {s}" for f, s in zip(pick(FIRST_NAMES, 700), pick(brands, 700), strict=True)),
        *pick(numbers, 300),
        *pick(MARKS, 600),
        *pick(OTHER_LANGUAGES, 24),
    ]
    subjects = [
        f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
        for n in NOUNS
        for a in ADJECTIVES
        for thing in [f"{a} {n}".strip()]
    ]
    others = [
        f"{s} {r} {o}."
        for s, r, o in zip(pick(subjects, 4096), pick(RELATIONS, 4096), pick(subjects, 4096), strict=True)
    ]
    folders = (
        "uploads",
        "images",
        "media/catalog/product",
        "wp-content/uploads/2019/07",
        "photos/large",
        "i",
        "cdn/shop/files",
    )
    hosts = [
        f"https://{p}.{b.lower()}.example/{f}/"
        for p, b, f in zip(
            pick(("www", "cdn", "i0", "static"), 6000), pick(brands, 6000), pick(folders, 6000), strict=True
        )
    ]
    files = [
        f"{name}{n}{end}"
        for name, n, end in zip(
            pick(FILE_NAMES, 900), rng.integers(1, 9999, 900), pick((".jpg", ".JPG", ".png", ""), 900), strict=True
        )
    ]
    boilerplate = [*files, *("thumbnail image logo null untitled product photo".split() * 20)]
    return Bank(
        *(
            pa.array(values, pa.string())
            for values in (fragments, subjects, RELATIONS, SETTINGS, others, hosts, boilerplate)
        )
    )


def captions(rng: np.random.Generator, n: int) -> tuple[pa.Array, pa.Array]:
    """Raw and synthetic captions of `n` rows; some raw ones null, empty or a file's name, some pairs as the row before."""
    words = bank()
    doubled = np.flatnonzero(rng.random(n) < DOUBLED_SHARE)
    doubled = doubled[doubled > 0]
    # A fragment has 1.4 words on average: 6 of them make a caption of 9 words, with the tail of the published ones.
    lengths = np.clip(rng.lognormal(np.log(6.4), 0.66, n), 1, 80).round().astype(np.int32)
    topic, adjective = (
        rng.integers(len(NOUNS), size=n, dtype=np.int32),
        rng.integers(len(ADJECTIVES), size=n, dtype=np.int32),
    )
    relation = rng.integers(len(words.relations), size=n, dtype=np.int32)
    other = rng.integers(len(words.subjects), size=n, dtype=np.int32)
    setting = rng.integers(len(words.settings), size=n, dtype=np.int32)
    stop = (rng.random(n) < FULL_STOP_SHARE).astype(np.int32)
    for i in doubled:  # one by one: a row may be doubled twice
        for draw in (lengths, topic, adjective, relation, other, setting, stop):
            draw[i] = draw[i - 1]
    offsets = np.zeros(n + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    chosen = rng.integers(len(words.fragments), size=offsets[-1], dtype=np.int32)
    about = np.flatnonzero(rng.random(n) < SHARED_SHARE)
    chosen[offsets[about] + (rng.random(len(about)) * lengths[about]).astype(np.int32)] = topic[about]
    for i in doubled:
        chosen[offsets[i] : offsets[i + 1]] = chosen[offsets[i - 1] : offsets[i]]
    raw = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), words.fragments.take(pa.array(chosen))), " ")

    odd = rng.random(n)
    edges = np.cumsum([NULL_SHARE, EMPTY_SHARE, BOILERPLATE_SHARE])
    boilerplate = words.boilerplate.take(
        pa.array(rng.integers(len(words.boilerplate), size=n, dtype=np.int32)[odd < edges[2]])
    )
    raw = pc.replace_with_mask(raw, pa.array(odd < edges[2]), boilerplate)
    raw = pc.if_else(pa.array((odd >= edges[0]) & (odd < edges[1])), "", raw)
    raw = pc.if_else(pa.array(odd < edges[0]), pa.scalar(None, pa.string()), raw)

    scene = pc.binary_join_element_wise(
        words.subjects.take(pa.array(topic * len(ADJECTIVES) + adjective)),
        words.relations.take(pa.array(relation)),
        words.subjects.take(pa.array(other)),
        " ",
    )
    ends = pa.array([setting + mark for mark in ("", ".") for setting in SETTINGS])
    return raw, pc.binary_join_element_wise(scene, ends.take(pa.array(stop * len(SETTINGS) + setting)), "")


def block(seed: int, shard: int, number: int, rows: int) -> pa.Table:
    """Rows `number` * GROUP_ROWS and on of a shard."""
    rng = np.random.default_rng((seed, shard, number))
    raw, synthetic = captions(rng, rows)
    words = bank()
    hash = rng.integers(-(2**63), 2**63 - 1, size=rows, dtype=np.int64)
    # A URL says where its row lies, so that no two are the same.
    stem = pa.array((np.int64(shard) << 32) + number * GROUP_ROWS + np.arange(rows, dtype=np.int64)).cast(pa.string())
    hosts = words.hosts.take(pa.array(rng.integers(len(words.hosts), size=rows, dtype=np.int32)))
    per_row = 1 + OTHER_CAPTIONS
    drawn = rng.integers(len(words.others), size=(rows, per_row), dtype=np.int32)
    drawn[:, 0] = len(words.others) + np.arange(rows)
    list_offsets = pa.array(np.arange(0, rows * per_row + 1, per_row, dtype=np.int32))
    similarities = np.sort(rng.normal(0.30, 0.03, (rows, per_row)))[:, ::-1].ravel()
    width = np.clip(rng.lognormal(6.4, 0.5, rows), 64, 8000).astype(np.int32)
    columns = {
        "URL": pc.binary_join_element_wise(hosts, stem, ".jpg", ""),
        "TEXT": raw,
        "top_caption": synthetic,
        "all_captions": pa.ListArray.from_arrays(
            list_offsets, pa.concat_arrays([words.others, synthetic]).take(pa.array(drawn.ravel()))
        ),
        "all_similarities": pa.ListArray.from_arrays(list_offsets, pa.array(similarities)),
        "WIDTH": pa.array(width).cast(WIDTH_TYPES[shard % len(WIDTH_TYPES)]),
        "HEIGHT": pa.array((width * rng.uniform(0.5, 1.6, rows)).astype(np.int32)),
        "similarity": pa.array(rng.normal(0.31, 0.035, rows)),
        "hash": pa.array(hash),
        "pwatermark": pa.array(rng.random(rows) ** 3),  # 7% at 0.8 and above
        "punsafe": pa.array(rng.random(rows) ** 24),  # 3% at 0.5 and above
    }
    return pa.table(columns)


def shard_rows(rows: int, shards: int, seed: int) -> list[int]:
    """Skewed sizes that sum to `rows`, each at least 1."""
    weights = np.random.default_rng((seed, 2**32 - 1)).lognormal(0.0, SIZE_SIGMA, shards)
    borders = np.floor(np.cumsum(weights) / weights.sum() * (rows - shards) + 0.5).astype(np.int64)
    borders[-1] = rows - shards
    return (np.diff(borders, prepend=0) + 1).tolist()


def damaged_shards(shards: int, damaged: int, seed: int) -> list[int]:
    return sorted(np.random.default_rng((seed, 2**32 - 2)).permutation(shards)[:damaged].tolist())


def damage_of(shards: int, damaged: int, seed: int) -> dict[int, str]:
    """The damaged shards' numbers, and how: "cut" or "page"."""
    return {number: ("cut", "page")[i % 2] for i, number in enumerate(damaged_shards(shards, damaged, seed))}


def shard_name(number: int) -> str:
    return f"laion-coco-{number:05d}.parquet"


def write_shard(folder: Path, number: int, rows: int, seed: int, compression: str = "snappy", damage: str = "") -> int:
    """Write a shard under a hidden name, damage it where asked ("cut" or "page"), rename it; its size in bytes."""
    path = folder / shard_name(number)
    temporary = path.with_name(f".{path.name}.tmp")
    group_rows = HUGE_GROUP_ROWS if number % HUGE_EVERY == 3 else GROUP_ROWS
    writer = None
    for group in row_groups(seed, number, rows, group_rows):
        # No dictionaries: nearly every string is another. Checksums: without them a broken page may read as other numbers.
        writer = writer or pq.ParquetWriter(
            temporary,
            group.schema,
            compression=compression,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        writer.write_table(group, row_group_size=group_rows)
    assert writer, "a shard has at least one row"
    writer.close()
    if damage:
        damage_file(temporary, damage)
    os.replace(temporary, path)
    return path.stat().st_size


def row_groups(seed: int, number: int, rows: int, group_rows: int) -> Iterator[pa.Table]:
    for start in range(0, rows, group_rows):
        starts = range(start, min(start + group_rows, rows), GROUP_ROWS)
        yield pa.concat_tables([block(seed, number, at // GROUP_ROWS, min(GROUP_ROWS, rows - at)) for at in starts])


def damage_file(path: Path, damage: str) -> None:
    footer = pq.read_metadata(path)
    with path.open("r+b") as file:
        if damage == "cut":
            file.truncate(path.stat().st_size // 2)
            return
        group = footer.row_group(footer.num_row_groups // 2)
        captions = next(group.column(c) for c in range(group.num_columns) if group.column(c).path_in_schema == "TEXT")
        middle = captions.data_page_offset + captions.total_compressed_size // 2
        file.seek(middle)
        broken = bytes(byte ^ 0xFF for byte in file.read(16))
        file.seek(middle)
        file.write(broken)


def make(
    folder: Path,
    rows: int,
    shards: int,
    seed: int,
    damaged: int = 0,
    compression: str = "snappy",
    processes: int = 1,
    only: Collection[int] | None = None,
) -> dict[str, object]:
    """Write the shards (or those of `only`); what was written. Raises ValueError for sizes that do not go together."""
    if not 1 <= shards <= rows:
        raise ValueError(f"--shards={shards}: must be 1 to --rows={rows}")
    if not 0 <= damaged <= shards:
        raise ValueError(f"--damaged={damaged}: must be 0 to --shards={shards}")
    sizes = shard_rows(rows, shards, seed)
    harm = damage_of(shards, damaged, seed)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [n for n in range(shards) if only is None or n in only]
    tasks = [(folder, number, sizes[number], seed, compression, harm.get(number, "")) for number in wanted]
    began, cpu = time.monotonic(), time.process_time()
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            written = sum(pool.map(write_shard, *zip(*tasks, strict=True)))
        cpu_s = None
    else:
        written = sum(write_shard(*task) for task in tasks)
        cpu_s = time.process_time() - cpu
    made, seconds = sum(sizes[n] for n in wanted), time.monotonic() - began
    return {
        "rows": made,
        "shards": len(wanted),
        "largest_shard": max(sizes),
        "smallest_shard": min(sizes),
        "damaged": {shard_name(n): how for n, how in harm.items() if n in wanted},
        "megabytes": round(written / 1e6, 1),
        "bytes_per_row": round(written / max(made, 1), 1),
        "seconds": round(seconds, 2),
        "rows_per_s": round(made / seconds),
        "rows_per_cpu_s": round(made / cpu_s)
        if cpu_s
        else None,  # on a shared machine the clock measures the neighbours
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: int(float(text)), required=True, help="in all, e.g. 1e6")
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a local folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--damaged", type=int, default=0, help="how many of the shards are damaged")
    parser.add_argument("--compression", default="snappy", choices=("snappy", "zstd", "none"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", type=lambda text: range(*map(int, text.split(":"))), help="shard numbers, e.g. 0:10")
    options = vars(parser.parse_args())
    try:
        print(json.dumps(make(options.pop("output"), **options)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
