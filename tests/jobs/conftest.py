"""A corpus, and one real Ray cluster that the drivers of all job tests join."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drivers import Driver, ray_head
from lighthouses import captions


@pytest.fixture
def corpus(tmp_path):
    """Four shards of different sizes, two of the same name in different folders: 400 rows."""
    folder = tmp_path / "in"
    for path, count in (("a/part-0", 150), ("b/part-0", 50), ("c", 120), ("d", 80)):
        file = folder / f"{path}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(captions(path.replace("/", "-"), count)), file, row_group_size=64)
    return folder


@pytest.fixture(scope="session")
def ray_address():
    with ray_head() as address:
        yield address


@pytest.fixture
def driver(ray_address):
    return Driver(ray_address)
