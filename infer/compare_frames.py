"""Compares the frames that a model drew with the true ones, number by number: PSNR and a picture.

python infer/compare_frames.py truth=CLIP drawn=FOLDER given=[1] out=COMPARISON.png

PSNR is in dB over RGB levels 0..255, inf for equal frames; mean and least leave the given frames out.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from omegaconf import MISSING
from PIL import Image

from conf.command import run
from infer.frame_folder import find_frames, read_frame
from storyanchors.contact_sheet import draw_comparison

FRAMES_PER_ROW = 6


@dataclass
class CompareFramesConfig:
    truth: str = MISSING
    drawn: str = MISSING
    given: list[int] = field(default_factory=list)
    out: str = MISSING


def main(config: CompareFramesConfig) -> None:
    out = Path(config.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"out={out} must be the name of a .png file")
    truth, drawn = read_frames(Path(config.truth)), read_frames(Path(config.drawn))
    check_pairs(truth, drawn, config)
    levels = {number: psnr(truth[number], drawn[number]) for number in truth}
    for number, level in levels.items():
        print(f"frame {number:3d}  {level:6.2f} dB" + ("  given" if number in config.given else ""))
    judged = {number: level for number, level in levels.items() if number not in config.given}
    least = min(judged, key=judged.get)
    print(f"mean       {np.mean(list(judged.values())):6.2f} dB over {len(judged)} frames")
    print(f"least      {judged[least]:6.2f} dB, frame {least}")
    _save_whole(draw_comparison(comparison_rows(truth, drawn, config.given)), out)
    print(out)


def psnr(truth: Image.Image, drawn: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two RGB images of one size."""
    error = np.asarray(truth, np.float64) - np.asarray(drawn, np.float64)
    with np.errstate(divide="ignore"):  # equal images: inf
        return float(10 * np.log10(255**2 / np.mean(error**2)))


def read_frames(folder: Path) -> dict[int, Image.Image]:
    """The RGB frames of a folder by number, in order."""
    return {number: read_frame(path).convert("RGB") for number, path in sorted(find_frames(folder).items())}


def check_pairs(
    truth: dict[int, Image.Image], drawn: dict[int, Image.Image], config: CompareFramesConfig
) -> None:
    """ValueError unless every frame has its like, of the same size, and one of them was not given."""
    if truth.keys() != drawn.keys():
        raise ValueError(f"{config.truth} has the frames {[*truth]}, {config.drawn} has {[*drawn]}")
    for number in truth:
        expected, found = truth[number].size, drawn[number].size
        if found != expected:
            raise ValueError(
                f"frame {number} of {config.drawn} has {found[0]} x {found[1]} pixels, "
                f"in {config.truth} it has {expected[0]} x {expected[1]}"
            )
    if unknown := sorted(set(config.given) - truth.keys()):
        raise ValueError(f"given names frames {unknown}, but {config.truth} has {[*truth]}")
    if truth.keys() <= set(config.given):
        raise ValueError(f"given names all {len(truth)} frames, there is none to compare")


def comparison_rows(
    truth: dict[int, Image.Image], drawn: dict[int, Image.Image], given: list[int]
) -> list[tuple[str, list[Image.Image]]]:
    """Film above drawn, FRAMES_PER_ROW at a time, labelled with their numbers and the ones given."""
    numbers, rows = list(truth), []
    for start in range(0, len(numbers), FRAMES_PER_ROW):
        shown = numbers[start : start + FRAMES_PER_ROW]
        frames = f"frames {shown[0]} to {shown[-1]}" if len(shown) > 1 else f"frame {shown[0]}"
        held = ", ".join(str(number) for number in shown if number in given)
        rows.append((f"film, {frames}", [truth[number] for number in shown]))
        drawn_label = f"drawn, {held} given" if held else "drawn"
        rows.append((drawn_label, [drawn[number] for number in shown]))
    return rows


def _save_whole(page: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    page.save(temporary, "PNG")
    temporary.replace(path)


if __name__ == "__main__":
    run(main, CompareFramesConfig, "compare_frames")
