"""From tars that the webdataset library wrote to trained steps, without a copy of a pixel."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from conf.command import read_config
from data_pipeline import index_webdataset
from train.clips.clip_index import ClipIndex
from train.clips.clip_reader import ClipReader
from train.run_stage import RunStageConfig, main

SIZES = {"jpg": ("JPEG", (64, 48)), "png": ("PNG", (70, 48)), "webp": ("WEBP", (64, 60))}


def picture(number: int, form: str, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """Two tars of three samples with 1 to 3 frames, in three formats and sizes."""
    folder = tmp_path_factory.mktemp("tars")
    for tar_number in range(2):
        with webdataset.TarWriter(str(folder / f"{tar_number}.tar")) as tar:
            for key, (suffix, (form, size)) in enumerate(SIZES.items()):
                frames = {f"{i}.{suffix}": picture(10 * key + i, form, size) for i in range(1, key + 2)}
                tar.write({"__key__": f"Sample {key}", "json": {"caption": f"A fox, {key}."}, **frames})
    return folder


@pytest.fixture(scope="module")
def indexed(tars, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "indexed"
    words = [f"tars={tars}", f"out={out}", "workers=1"]
    schema = index_webdataset.IndexWebdatasetConfig
    index_webdataset.main(read_config(schema, "index_webdataset", words))
    return out


def test_the_reader_gives_the_middle_of_each_image(indexed):
    index = ClipIndex.open(indexed)
    assert len(index) == 6
    for number in range(len(index)):
        row = index.row(number)
        key = int(row.key.split("-")[1])
        form, (width, height) = list(SIZES.values())[key]
        assert row.location.endswith(".tar") and row.conditions.fps is None
        cut = (width // 16 * 16, height // 16 * 16)
        left, top = (width - cut[0]) // 2, (height - cut[1]) // 2
        frames = ClipReader().frames(row)
        assert len(frames) == key + 1
        for i, frame in enumerate(frames, start=1):
            whole = Image.open(io.BytesIO(picture(10 * key + i, form, (width, height)))).convert("RGB")
            expected = whole.crop((left, top, left + cut[0], top + cut[1]))
            assert np.array_equal(np.asarray(frame), np.asarray(expected))


def test_run_stage_trains_on_them(indexed, arguments: Callable[..., list[str]], tmp_path):
    words = arguments(tmp_path / "run", "stage=global_caption", f"data.dataset={indexed}", "data.holdout=0")
    main(read_config(RunStageConfig, "run_stage", [*words, "model.pca_frames=8"]))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "train/loss" in line]
    assert len(steps) >= 3
