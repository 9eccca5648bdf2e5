"""A folder of results that appears whole under its final name, or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def output_folder(folder: str | Path, *, made_with: str) -> Iterator[Path]:
    """Yields a temporary folder beside the final one; renames it when the block ends without an error.

    made_with is a file that every result of this kind contains. An earlier folder that has it is replaced;
    any other folder that is not empty is refused, see check_output_folder.
    """
    folder = Path(folder)
    check_output_folder(folder, made_with=made_with)
    temporary, earlier = (_hidden_sibling(folder) for _ in range(2))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rename(earlier)
        temporary.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output_folder(folder: str | Path, *, made_with: str) -> None:
    """Raises what output_folder would raise, so that one can ask before the work that fills the folder."""
    folder = Path(folder)
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / made_with).is_file():
            raise ValueError(
                f"{folder} is not empty and has no {made_with}: only an earlier result is replaced"
            )
    elif folder.exists():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to write")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"cannot write {folder}: {parent} is a file, expected a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {folder}: no permission to write in {parent}")


def _hidden_sibling(folder: Path) -> Path:
    return folder.absolute().with_name(f".{folder.absolute().name}.{uuid.uuid4().hex[:8]}.tmp")
