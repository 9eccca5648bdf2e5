"""Writes a dataset's index: index.parquet for everybody, and the same rows for training to map.

index.arrow is read page by page as rows are asked for, so that an index of millions of clips with the byte
ranges of all their frames costs a process next to no memory. It knows the size of the index.parquet that it
was written with: an index.parquet that somebody has changed since is noticed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dataset import rename_durably
from storyanchors.index_file import MAPPED_FILE, PARQUET_BYTES, PARQUET_FILE

ROWS_PER_BATCH = 65_536


def write_index(dataset: Path, table: pa.Table) -> None:
    """Writes both files, each whole or not at all; the same table gives the same bytes."""
    parquet = dataset / PARQUET_FILE
    with _whole_file(parquet) as temporary:
        pq.write_table(table, temporary)
    mapped = table.replace_schema_metadata({PARQUET_BYTES: str(parquet.stat().st_size)})
    with _whole_file(dataset / MAPPED_FILE) as temporary, pa.ipc.new_file(temporary, mapped.schema) as file:
        file.write_table(mapped, max_chunksize=ROWS_PER_BATCH)


@contextmanager
def _whole_file(path: Path) -> Iterator[str]:
    """What is written to the name that it gives is at path afterwards; with an error, nothing is."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield str(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
