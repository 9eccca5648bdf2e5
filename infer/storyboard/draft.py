"""What is typed but not drawn: kept beside the project, so that no reload and no restart loses it."""

import json
from pathlib import Path

Texts = tuple[str, str, str]  # events, subjects, style


class Draft:
    """A hidden file beside the project's folder, which may not exist before the first frame is drawn."""

    def __init__(self, folder: Path):
        folder = folder.absolute()
        self._file = folder.with_name(f".{folder.name}.draft.json")

    def read(self) -> Texts | None:
        """What was kept; None where there is nothing, or nothing that can be read."""
        try:
            events, subjects, style = json.loads(self._file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return str(events), str(subjects), str(style)

    def keep(self, texts: Texts) -> None:
        """Writes it down."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(texts), encoding="utf-8")

    def forget(self) -> None:
        """It was drawn, or is what the project says anyway."""
        self._file.unlink(missing_ok=True)
