"""Letters on pictures: the fonts of this machine, one for another where letters are missing, and lines.

The font that PIL brings along comes first and knows Latin letters only; whatever it lacks is looked for in
the machine's fonts. Letters that no font has are drawn as boxes, and a warning names them.
"""

import logging
import os
import re
import sys
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

log = logging.getLogger(__name__)

# Tried before all other fonts of the machine; PIL finds them by name
USUAL_FONTS = (
    ["DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "segoeui.ttf"],
    [
        "DejaVuSansCondensed-Bold.ttf",
        "DejaVuSans-Bold.ttf",
        "NotoSans-Bold.ttf",
        "Arial Bold.ttf",
        "arialbd.ttf",
    ],
)
TESTED_SIZE_PX = 24
NO_LETTER = "\U0010ffff"  # a code point that is no letter: fonts draw their box for it
# Scripts without spaces break after any letter, but no line begins with a closing mark
_WIDE = "\u2e80-\u2fff\u3040-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CLOSING = "\u3001\u3002\u3009\u300b\u300d\u300f\u3011\uff01\uff09\uff0c\uff1a\uff1b\uff1f\u30fc"
_UNIT = re.compile(rf"[{_WIDE}][{_CLOSING}]*|[^\s{_WIDE}]+|\s+")


class Lettering:
    """Letters of one size in pixels, for these texts: a font that has all of their letters is taken for all.

    font is a file that is asked before all others.
    """

    def __init__(
        self, size_px: int, texts: Iterable[str] = (), *, bold: bool = False, font: str | Path | None = None
    ):
        self.size_px = size_px
        files = _preferred_fonts(bold, str(font) if font else None)
        letters = set("".join(texts))
        whole = [file for file in files if all(_is_joined(one) or _has_letter(file, one) for one in letters)]
        self.files = tuple(dict.fromkeys((*whole[:1], *files)))
        self.ascent, descent = _load_font(self.files[0], size_px).getmetrics()
        self.line_height = self.ascent + descent + 2

    def width(self, text: str) -> float:
        """Pixels from the left edge of the first letter to where a next one would begin."""
        return sum(font.getlength(run) for font, run in self._runs(text))

    def wrap(self, text: str, width: int, max_lines: int | None = None) -> list[str]:
        """Greedy lines of at most width pixels; too long a word is broken, what is cut ends in ..."""
        lines, line = [], ""
        for unit in _UNIT.findall(" ".join(text.split())):
            if self.width(line + unit.rstrip()) <= width:
                line += unit
                continue
            lines += [line.rstrip()] if line.strip() else []
            line = ""
            if max_lines is not None and len(lines) > max_lines:
                break
            while len(unit) > 1 and self.width(unit) > width:
                end = bisect_right(range(2, len(unit)), width, key=lambda end: self.width(unit[:end])) + 1
                lines.append(unit[:end])
                unit = unit[end:]
            line = unit.lstrip()
        lines += [line.rstrip()] if line.strip() else []
        if max_lines is None or len(lines) <= max_lines:
            return lines
        last = lines[max_lines - 1]
        while last and self.width(f"{last}...") > width:
            last = last[:-1]
        return [*lines[: max_lines - 1], f"{last.rstrip()}..."]

    def draw(
        self, page: Image.Image, corner: tuple[int, int], text: str, colour: tuple[int, int, int]
    ) -> None:
        """One line of text with its upper left corner here; letters of several fonts share the base line."""
        draw, (x, y) = ImageDraw.Draw(page), corner
        for font, run in self._runs(text):
            draw.text((x, y + self.ascent), run, colour, font, anchor="ls")
            x += font.getlength(run)

    def draw_lines(
        self,
        page: Image.Image,
        corner: tuple[int, int],
        lines: list[str],
        colour: tuple[int, int, int],
        width: int,
    ) -> None:
        """Lines under one another; those of a script that runs from the right end at the right edge."""
        x, y = corner
        for index, line in enumerate(lines):
            shift = width - round(self.width(line)) if runs_from_right(line) else 0
            self.draw(page, (x + shift, y + index * self.line_height), line, colour)

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """Parts of a text and their fonts: the first font that has every letter, else as few as may be."""
        letters = set(text)
        for file in self.files:
            if all(_has_letter(file, letter) for letter in letters):
                return [(_load_font(file, self.size_px), text)]
        runs: list[tuple[str | None, str]] = []
        for letter in text:
            stays = runs and (_is_joined(letter) or _has_letter(runs[-1][0], letter))
            file = runs[-1][0] if stays else _file_with(letter, self.files)
            if runs and runs[-1][0] == file:
                runs[-1] = (file, runs[-1][1] + letter)
            else:
                runs.append((file, letter))
        return [(_load_font(file, self.size_px), run) for file, run in runs]


def warn_of_missing_letters(texts: Iterable[str], font: str | Path | None = None) -> str:
    """Logs a warning that names the letters of these texts that no font here has; returns those letters."""
    files = _preferred_fonts(False, str(font) if font else None)
    letters = [letter for letter in dict.fromkeys("".join(texts)) if not _is_joined(letter)]
    missing = [letter for letter in letters if not _has_letter(_file_with(letter, files), letter)]
    if missing:
        some = ", ".join(f"U+{ord(letter):04X}" for letter in missing[:5])
        log.warning(
            "no font of this machine has %d of the letters (%s%s): they are drawn as boxes; install a font "
            "that has them, such as Noto Sans (CJK), or name its file",
            *(len(missing), some, ", ..." if len(missing) > 5 else ""),
        )
    return "".join(missing)


def runs_from_right(text: str) -> bool:
    """Whether the first letter that has a direction belongs to a script that is written from the right."""
    directions = (unicodedata.bidirectional(letter) for letter in text)
    return next((one for one in directions if one in ("L", "R", "AL")), "L") != "L"


def check_font(font: str | Path) -> None:
    """ValueError for a file that is no font."""
    try:
        ImageFont.truetype(str(font), TESTED_SIZE_PX)
    except OSError as error:
        raise ValueError(f"cannot read the font {font}: {error}") from error


def _is_joined(letter: str) -> bool:
    """Spaces, and marks that are part of the letter before them."""
    return (
        letter.isspace() or unicodedata.combining(letter) > 0 or unicodedata.category(letter) in ("Cf", "Mn")
    )


@cache
def _preferred_fonts(bold: bool, font: str | None) -> tuple[str | None, ...]:
    """Files by preference; None stands for the font that PIL brings along, which has no bold."""
    usual = [file for name in USUAL_FONTS[bold] if (file := _found(name))]
    first = [font] if font else []
    return (*first, *usual, None) if bold else (*first, None, *usual)


def _found(name: str) -> str | None:
    try:
        return str(ImageFont.truetype(name, TESTED_SIZE_PX).path)
    except OSError:
        return None


@cache
def _file_with(letter: str, preferred: tuple[str | None, ...]) -> str | None:
    """The first font file that has the letter, the most preferred one where none has."""
    return next((file for file in (*preferred, *_all_fonts()) if _has_letter(file, letter)), preferred[0])


@cache
def _all_fonts() -> tuple[str, ...]:
    """Every scalable font file of the machine, plain ones first."""
    home = Path.home()
    match sys.platform:
        case "darwin":
            folders = [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
        case "win32":
            folders = [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
        case _:
            shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
            folders = [home / ".local/share/fonts", home / ".fonts"]
            folders += [Path(folder) / "fonts" for folder in shared.split(":")]
    files = [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    ]
    other = re.compile("Bold|Italic|Oblique|Light|Thin|Mono")
    return tuple(
        str(path)
        for path in sorted(files, key=lambda path: ("Sans" not in path.name, bool(other.search(path.name))))
    )


@cache
def _load_font(file: str | None, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size_px) if file else ImageFont.load_default(size_px)


@cache
def _has_letter(file: str | None, letter: str) -> bool:
    """Whether a font draws anything else than its box for it; False for fonts without scalable letters."""
    if letter.isspace():
        return True
    try:
        drawn, box = _picture(file, letter), _picture(file, NO_LETTER)
    except OSError:
        return False
    return drawn != box and any(drawn[1])


def _picture(file: str | None, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = _load_font(file, TESTED_SIZE_PX).getmask(letter)
    return mask.size, bytes(mask)
