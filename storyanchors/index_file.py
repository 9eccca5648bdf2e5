"""The names of a dataset's index: data_pipeline/index_file.py writes, train/clips/clip_index.py reads it."""

PARQUET_FILE = "index.parquet"  # for everybody
MAPPED_FILE = "index.arrow"  # the same rows, for training to map
PARQUET_BYTES = b"index.parquet bytes"  # in the mapped file: the size of the index.parquet it belongs to
