"""Small pools, parquet files, and a separate cache for each test."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedloom.data import from_arrays


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDLOOM_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def pool():
    """Return 600 training and 200 test images of 1 x 2 x 2 pixels in 10 classes, with a writer column of 8 values of unequal frequency."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 800)
    x = rng.integers(0, 256, (800, 1, 2, 2)).astype(np.uint8)
    writers = np.array([f"w{v}" for v in np.minimum(rng.geometric(0.3, 800), 8)])
    return from_arrays(x[:600], y[:600], x[600:], y[600:], name="pool", columns={"writer": writers})


def encoded(pixels, kind):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def write_parquet():
    """Write images (arrays or bytes) and labels in the hub's layout, optionally with class names in the metadata."""

    def write(file, pictures, labels, *, label="label", image="image", names=None, plain=False, kind="PNG", **columns):
        cells = [p if isinstance(p, bytes) else encoded(p, kind) for p in pictures]
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pictures = pa.array(cells) if plain else pa.array([{"bytes": c, "path": None} for c in cells], struct)
        labels = pa.array(labels, None if labels else pa.int64())
        table = pa.table({image: pictures, label: labels, **columns})
        if names:
            features = {c: {"names": n, "_type": "ClassLabel"} for c, n in names.items()}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)
        return file

    return write


@pytest.fixture
def grey():
    """Return a function `grey(n, size)` that returns n random grey images."""
    rng = np.random.default_rng(1)
    return lambda n, size=8: [rng.integers(0, 256, (size, size)).astype(np.uint8) for _ in range(n)]
