"""Windows of a long story that are drawn already, for the same command to go on with when it was stopped."""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image

from infer.frame_folder import as_png, decode_frame
from infer.project.whole_files import sha256, write_whole

UNFINISHED = "unfinished"
INDEX_FILE = "windows.json"  # written last
KEY = re.compile("[0-9a-f]{16}")


def forget_unfinished(project: Path) -> None:
    """Takes away all of a project's unfinished windows, and nothing that a person put beside them."""
    for folder in (project / UNFINISHED).glob("*"):
        if KEY.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # there is none, or something else is in it
        (project / UNFINISHED).rmdir()


class UnfinishedFrames:
    """unfinished/<key>/ of a project; the key hashes all that decides the frames of one edit."""

    def __init__(self, project: Path, key: str):
        self.folder = project / UNFINISHED / key[:16]

    def keep(self, num_windows: int, frames: Mapping[int, Image.Image]) -> None:
        """Stores what the first num_windows windows drew, by number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        contents = {number: as_png(frame) for number, frame in frames.items()}
        for number, content in contents.items():
            if not self._path(number).exists() or self._path(number).read_bytes() != content:
                write_whole(self._path(number), content)
        hashes = {str(number): sha256(content) for number, content in contents.items()}
        index = json.dumps({"windows": num_windows, "frames": hashes})
        write_whole(self.folder / INDEX_FILE, index.encode())

    def read(self) -> tuple[int, dict[int, Image.Image]]:
        """How many windows are done, and their frames by number; (0, {}) where nothing usable is there."""
        try:
            index = json.loads((self.folder / INDEX_FILE).read_bytes())
            num_windows, hashes = index["windows"], index["frames"]
            contents = {int(number): self._path(int(number)).read_bytes() for number in hashes}
        except FileNotFoundError:
            return 0, {}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(self._is_damaged(self.folder / INDEX_FILE)) from error
        for number, content in contents.items():
            if sha256(content) != hashes[str(number)]:
                raise ValueError(self._is_damaged(self._path(number)))
        frames = {number: decode_frame(content, self._path(number)) for number, content in contents.items()}
        return num_windows, frames

    def _is_damaged(self, path: Path) -> str:
        return f"{path} is damaged: remove {self.folder} to begin again"

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:03d}.png"
