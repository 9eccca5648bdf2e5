import math

import numpy as np
import pytest
from PIL import Image

from conf.command import read_config
from infer.compare_frames import CompareFramesConfig, main, psnr


def picture(level: int, size=(24, 16)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def write_frames(folder, levels, size=(24, 16)):
    folder.mkdir()
    for number, level in enumerate(levels, start=1):
        picture(level, size).save(folder / f"{number:03d}.png")
    return folder


def compare(truth, drawn, out, *overrides):
    arguments = [f"truth={truth}", f"drawn={drawn}", f"out={out}", *overrides]
    main(read_config(CompareFramesConfig, "compare_frames", arguments))


def test_psnr_counts_levels_over_all_three_colours():
    assert psnr(picture(0), picture(255)) == 0
    assert psnr(picture(100), picture(110)) == pytest.approx(20 * math.log10(25.5))
    one_colour = Image.new("RGB", (24, 16), (110, 100, 100))
    assert psnr(picture(100), one_colour) == pytest.approx(20 * math.log10(25.5) + 10 * math.log10(3))
    assert psnr(picture(7), picture(7)) == math.inf


def test_given_frames_are_shown_but_not_counted(tmp_path, capsys):
    truth = write_frames(tmp_path / "truth", [100, 100, 100])
    drawn = write_frames(tmp_path / "drawn", [100, 110, 101])
    compare(truth, drawn, tmp_path / "new" / "out.png", "given=[1]")
    levels = [20 * math.log10(255 / error) for error in (10, 1)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["frame", "1", "inf", "dB", "given"]
    assert lines[1].split() == ["frame", "2", f"{levels[0]:.2f}", "dB"]
    assert lines[3].split()[:2] == ["mean", f"{np.mean(levels):.2f}"]
    assert lines[4].split() == ["least", f"{levels[0]:.2f}", "dB,", "frame", "2"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.png"]


def test_the_picture_shows_every_frame_of_a_long_story(tmp_path):
    levels = range(10, 230, 20)
    truth = write_frames(tmp_path / "truth", levels)
    drawn = write_frames(tmp_path / "drawn", [level + 5 for level in levels])
    compare(truth, drawn, tmp_path / "out.png")
    colours = {colour for _, colour in Image.open(tmp_path / "out.png").getcolors(2**20)}
    assert {(level, level, level) for level in levels} <= colours
    assert {(level + 5, level + 5, level + 5) for level in levels} <= colours


@pytest.mark.parametrize(
    "levels, size, overrides, found",
    [
        ([1, 2], (24, 16), [], r"truth has the frames \[1, 2, 3\], .*drawn has \[1, 2\]"),
        ([1, 2, 3], (16, 16), [], "frame 1 of .*drawn has 16 x 16 pixels, .* 24 x 16"),
        ([1, 2, 3], (24, 16), ["given=[4]"], r"given names frames \[4\]"),
        ([1, 2, 3], (24, 16), ["given=[1,2,3]"], "none to compare"),
        ([1, 2, 3], (24, 16), ["truth={folder}"], "no numbered frames"),
        ([1, 2, 3], (24, 16), ["out={folder}/out.gif"], ".png"),
    ],
)
def test_what_cannot_be_compared_is_named_and_nothing_is_written(tmp_path, levels, size, overrides, found):
    truth = write_frames(tmp_path / "truth", [1, 2, 3])
    drawn = write_frames(tmp_path / "drawn", levels, size)
    with pytest.raises(ValueError, match=found):
        compare(truth, drawn, tmp_path / "out.png", *(text.format(folder=tmp_path) for text in overrides))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "truth"]
