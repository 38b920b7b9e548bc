"""What the users of a table were encoded from, as a digest each, beside every part: `inputs-00007.parquet`.

It tells `userrep embed --since` which vectors it can keep. Needs pyarrow only (no numpy, no torch).
"""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from userrep.manifest import FileEntry, Manifest, contained_path, describe_file
from userrep.publishing.verify import PART_NAME

INPUTS_NAME = re.compile(r"inputs-\d{5,}\.parquet")
INPUTS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False, metadata={"doc": "id, as in the part of the same number"}),
        pa.field(
            "digest",
            pa.uint64(),
            nullable=False,
            metadata={"doc": "of what the encoder reads of the user, and no more"},
        ),
    ]
)


def write_inputs(directory: Path, bucket: int, inputs: pa.Table) -> FileEntry:
    """Writes the digests of a part's users, sorted by id.

    Args:
        directory: of the table.
        bucket: number of the part.
        inputs: columns of `INPUTS`, any row order.
    """
    rows = inputs.combine_chunks().sort_by("user_id").cast(INPUTS)
    path = Path(directory) / f"inputs-{bucket:05d}.parquet"
    pq.write_table(rows, path, compression="zstd", use_dictionary=False)
    return describe_file(Path(directory), path, rows=rows.num_rows)


def read_inputs(directory: Path, bucket: int) -> pa.Table:
    """Digests of the users of a part, sorted by id."""
    return pq.read_table(Path(directory) / f"inputs-{bucket:05d}.parquet", schema=INPUTS).combine_chunks()


def inputs_entries(manifest: Manifest) -> tuple[FileEntry, ...]:
    """The files of digests among a table's files."""
    return tuple(entry for entry in manifest.files if INPUTS_NAME.fullmatch(entry.path))


def has_inputs(manifest: Manifest) -> bool:
    """Whether there are digests for every part."""
    parts = {entry.path for entry in manifest.files if PART_NAME.fullmatch(entry.path)}
    return {entry.path.replace("inputs-", "part-") for entry in inputs_entries(manifest)} == parts


def ids_of(directory: Path, entry: FileEntry) -> pa.ChunkedArray:
    """Ids in a file of digests."""
    return pq.read_table(contained_path(Path(directory), entry.path), columns=["user_id"])["user_id"]
