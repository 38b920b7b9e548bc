"""Tables from matrices, for what compares two of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.publishing.conftest import FACTS
from userrep.manifest import Manifest
from userrep.publishing.quality import quality_rows
from userrep.publishing.table import bucket_of, finish_table, write_part
from userrep.publishing.vectors import rows_dtype
from userrep.schema import user_embeddings


def unit_matrix(rows: int, dim: int, seed: int) -> np.ndarray:
    return normalised(np.random.default_rng(seed).standard_normal((rows, dim)))


def normalised(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def rotation(dim: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


def rotated(vectors: np.ndarray, seed: int, noise: float = 0.0) -> np.ndarray:
    """The same users in axes of their own, each vector with noise of this length."""
    dim = vectors.shape[1]
    noises = np.random.default_rng(seed + 1).standard_normal(vectors.shape) * noise / np.sqrt(dim)
    return normalised(vectors @ rotation(dim, seed) + noises)


def write_matrix(
    directory: Path,
    vectors: np.ndarray,
    ids: Sequence[str] | None = None,
    *,
    buckets: int = 3,
    dtype: str = "float32",
    tasks: Mapping[str, np.ndarray] | None = None,
    quality: np.ndarray | None = None,
    **facts: object,
) -> Manifest:
    """A committed table of users; `quality` is `test/recall_at_10` of each of them."""
    directory.mkdir(parents=True)
    ids, tasks = list(ids or (f"user-{number:06d}" for number in range(len(vectors)))), tasks or {}
    schema = user_embeddings(vectors.shape[1], rows_dtype(dtype), tuple(tasks))
    places, parts = np.array([bucket_of(one, buckets) for one in ids]), []
    for bucket in range(buckets):
        (chosen,) = np.nonzero(places == bucket)
        columns = [
            pa.array([ids[place] for place in chosen], pa.string()),
            column(vectors[chosen], schema.field("embedding").type),
            pa.array(np.ones(len(chosen)), pa.int32()),
            pa.nulls(len(chosen), pa.int64()),
            *(column(values[chosen], schema.field("embedding").type) for values in tasks.values()),
        ]
        parts.append(write_part(directory, bucket, pa.Table.from_arrays(columns, schema=schema), dtype=dtype))
    return finish_table(
        directory,
        parts=parts,
        dim=vectors.shape[1],
        dtype=dtype,
        tasks=tuple(tasks),
        facts={**FACTS, **facts},
        config={},
        inputs={},
        quality_rows=None if quality is None else quality_rows(ids, {"test/recall_at_10": quality.tolist()}),
    )


def column(vectors: np.ndarray, type_: pa.FixedSizeListType) -> pa.Array:
    flat = pa.array(vectors.astype(type_.value_type.to_pandas_dtype()).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, type=type_)
