import logging

import numpy as np
import pytest
from PIL import Image, ImageFont

from storyanchors.lettering import (
    USUAL_FONTS,
    Lettering,
    check_font,
    runs_from_right,
    warn_of_missing_letters,
)

NOWHERE = "\U000fffff\U000ffffe"  # private letters that no font has
CYRILLIC = "\u041b\u0438\u0441\u0430"


def ink(text, **settings):
    lettering = Lettering(20, [text], **settings)
    page = Image.new("L", (400, lettering.line_height), 255).convert("RGB")
    lettering.draw(page, (0, 0), text, (0, 0, 0))
    return np.asarray(page)[..., 0] < 128


def has_dejavu():
    try:
        return ImageFont.truetype(USUAL_FONTS[0][0], 20)
    except OSError:
        return None


@pytest.mark.parametrize("text", ["the king leaves " * 9, "\u72d0\u72f8" * 40, "W" * 90, "a " * 200])
def test_lines_are_narrow_enough_and_lose_nothing(text):
    lettering = Lettering(14, [text])
    lines = lettering.wrap(text, 150)
    assert all(lettering.width(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_no_line_begins_with_a_closing_mark():
    lettering = Lettering(14)
    text = "\u72d0\u72f8\u3002" * 30
    for width in range(40, 120, 7):
        assert not any(line.startswith("\u3002") for line in lettering.wrap(text, width))


def test_cut_lines_say_so_and_stay_narrow():
    lettering = Lettering(14)
    lines = lettering.wrap("the king leaves his castle " * 9, 150, 3)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(lettering.width(line) <= 150 for line in lines)
    assert lettering.wrap("short", 150, 3) == ["short"] and lettering.wrap("", 150) == []


@pytest.mark.skipif(not has_dejavu(), reason="needs a font with Cyrillic letters")
def test_letters_that_the_first_font_lacks_are_drawn_by_another(caplog):
    different = {ink(letter).tobytes() for letter in CYRILLIC}
    assert len(different) == len(CYRILLIC)  # boxes would be alike
    assert warn_of_missing_letters([CYRILLIC, "fox"]) == "" and not caplog.records
    mixed = Lettering(20, [f"fox {CYRILLIC}"])
    assert len({font.path for font, _ in mixed._runs(f"fox {CYRILLIC}")}) == 1  # one look for one text


def test_letters_that_no_font_has_are_boxes_and_a_warning_names_them(caplog):
    with caplog.at_level(logging.WARNING):
        assert warn_of_missing_letters(["a fox", f"and {NOWHERE}"]) == NOWHERE
    assert "U+FFFFF" in caplog.text and len(caplog.records) == 1
    assert ink(NOWHERE[0]).any()


def test_scripts_from_the_right_end_at_the_right_edge():
    assert runs_from_right("\u05e9\u05d5\u05e2\u05dc") and runs_from_right("1. \u062b\u0639\u0644\u0628")
    assert not runs_from_right("fox") and not runs_from_right("123")
    lettering = Lettering(20)
    page = Image.new("RGB", (300, 2 * lettering.line_height), "white")
    lettering.draw_lines(page, (0, 0), ["\u05e9\u05d5\u05e2\u05dc", "fox"], (0, 0, 0), 300)
    columns = [np.flatnonzero((half[..., 0] < 128).any(0)) for half in np.array_split(np.asarray(page), 2)]
    assert columns[0].min() > 150 > columns[1].max()


def test_a_file_that_is_no_font_is_refused_by_name(tmp_path):
    (tmp_path / "x.ttf").write_text("no font")
    with pytest.raises(ValueError, match="cannot read the font"):
        check_font(tmp_path / "x.ttf")
