import fcntl
import json
import os
import random
import shutil
import signal
import threading
import time

import pytest
from tqdm import tqdm

from conf.command import Stopped
from data_pipeline.sample_frames import SampleFramesConfig, find_videos, main, sample_frames
from data_pipeline.shard_reader import finished_shards, read_clips, read_marker


def config(videos, out, **changes) -> SampleFramesConfig:
    return SampleFramesConfig(
        str(videos), str(out), **dict(frame_interval=6, max_frames=8, videos_per_shard=5) | changes
    )


def sample(videos, out, **changes):
    return sample_frames(find_videos(videos), out, config(videos, out, **changes))


@pytest.fixture(scope="module")
def dataset(short_videos, tmp_path_factory):
    """What an undisturbed run writes."""
    out = tmp_path_factory.mktemp("dataset") / "ds"
    sample(short_videos, out, workers=2)
    return out


def test_every_video_is_a_clip_a_short_rest_or_a_rejection(dataset):
    record = json.loads((dataset / "dataset.json").read_bytes())
    # videos of 30, 39, ... 111 frames have 5, 6, 7 | 8+1, 8+2, 8+3 | 8+4, 8+6, 8+7, 8+8 story frames
    assert record["finished"]
    assert record["counts"] == {
        "videos": 12,
        "shards": 3,
        "clips": 3 + 3 + 2 * 4,
        "frames": 5 + 6 + 7 + 3 * 8 + 12 + 14 + 15 + 16,
        "rejected": 2,
        "short_rests": 3,
        "short_rest_frames": 1 + 2 + 3,
        "source_frames": sum(range(30, 112, 9)),
        "source_seconds": pytest.approx(sum(range(30, 112, 9)) / 24),
    }
    lines = [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
    assert {line["video"]: line["reason"] for line in lines} == {
        "empty.mp4": "an empty file: 0 bytes",
        "text.mp4": "not readable as a video: Invalid data found when processing input (moov atom not found)",
    }


def test_keys_rise_through_all_shards_and_are_unique(dataset):
    frames = dataset / "frames"
    names = finished_shards(frames)
    keys = [key for name in names for key, _ in read_clips(frames, read_marker(frames, name))]
    assert keys == sorted(set(keys)) and len(names) == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(dataset, short_videos, tmp_path, tree, workers):
    sample(short_videos, tmp_path / "ds", workers=workers)
    assert tree(tmp_path / "ds") == tree(dataset)


def test_the_place_of_the_videos_changes_no_byte(dataset, short_videos, tmp_path, tree):
    shutil.copytree(short_videos, tmp_path / "elsewhere")
    sample(tmp_path / "elsewhere", tmp_path / "ds")
    assert tree(tmp_path / "ds") == tree(dataset)


def killed_after(seconds: float, videos, out) -> bool:
    """Runs the job in a process of its own and kills it; False where it was done before."""
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # else it may die with a lock that this process shares
        sample(videos, out, workers=2)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_at_any_moment_it_finishes_and_loses_or_doubles_nothing(dataset, short_videos, tmp_path, tree):
    moments = random.Random(0)
    num_kills = 0
    for trial in range(3):
        out = tmp_path / str(trial)
        while num_kills < 60 and killed_after(moments.uniform(0.01, 0.25), short_videos, out):
            num_kills += 1
            if out.exists():
                for name in finished_shards(out / "frames"):  # what exists is whole
                    assert (
                        tree(dataset)[f"frames/{name}.tar"] == (out / "frames" / f"{name}.tar").read_bytes()
                    )
        sample(short_videos, out, workers=2)
        assert tree(out) == tree(dataset)
    assert num_kills >= 3


def test_a_finished_dataset_is_left_as_it_is(dataset, short_videos, tmp_path, tree):
    shutil.copytree(dataset, tmp_path / "ds")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ds" / "frames").iterdir()}
    _, num_new_clips = sample(short_videos, tmp_path / "ds")
    assert num_new_clips == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "ds" / "frames").iterdir()}


def test_a_lost_shard_is_written_again(dataset, short_videos, tmp_path, tree):
    shutil.copytree(dataset, tmp_path / "ds")
    for path in (tmp_path / "ds" / "frames").glob("000001.*"):
        path.unlink()
    sample(short_videos, tmp_path / "ds")
    assert tree(tmp_path / "ds") == tree(dataset)


def test_another_config_or_other_videos_are_refused(dataset, short_videos, tmp_path):
    with pytest.raises(ValueError, match="was begun with frame_interval=6, now frame_interval=7"):
        sample(short_videos, dataset, frame_interval=7)
    videos = tmp_path / "videos"
    shutil.copytree(short_videos, videos)
    (videos / "empty.mp4").rename(videos / "bare.mp4")
    (videos / "text.mp4").write_text("shorter")
    message = r"1 new \(bare.mp4.*1 gone \(empty.mp4.*1 of another size \(text.mp4"
    with pytest.raises(ValueError, match=message):
        sample(videos, dataset)


def test_two_jobs_never_write_into_one_dataset(dataset, short_videos, monkeypatch):
    monkeypatch.setattr("data_pipeline.dataset.LOCK_PATIENCE_S", 0.2)
    folder = os.open(dataset, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is writing"):
        sample(short_videos, dataset)
    os.close(folder)


def test_a_video_that_takes_too_long_is_rejected(film, tmp_path):
    long = film.write(tmp_path / "long.mp4", 1500, preset="ultrafast")
    counts, _ = sample(long, tmp_path / "ds", frame_interval=0, timeout_s=0.1)
    assert (counts["rejected"], counts["clips"]) == (1, 0)
    assert "not done after 0.1 s" in (tmp_path / "ds" / "rejected.jsonl").read_text()


def test_a_list_names_videos_relative_to_itself(short_videos, tmp_path):
    listed = short_videos / "list.txt"
    listed.write_text("# two films\nmore/Video 1.mp4\n\nnowhere.mp4\n")
    try:
        assert [video.id for video in find_videos(listed)] == ["nowhere.mp4", "more/Video 1.mp4"]
        counts, _ = sample(listed, tmp_path / "ds")
        assert (counts["videos"], counts["rejected"], counts["clips"]) == (2, 1, 1)
        assert json.loads((tmp_path / "ds" / "rejected.jsonl").read_text())["reason"] == "no such file"
    finally:
        listed.unlink()


def test_the_command_says_what_it_did(command, short_videos, tmp_path):
    out = tmp_path / "ds"
    status, printed, _ = command("sample_frames", f"videos={short_videos}", f"out={out}", "frame_interval=6")
    assert status == 0
    for part in (
        "videos         12",
        "rejected       2",
        str(out / "rejected.jsonl"),
        "short rests",
        "clips/s",
    ):
        assert part in printed
    assert f"build_index.py dataset={out}" in printed


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_says_so_and_continues(dataset, short_videos, tmp_path, tree, stop):
    out = tmp_path / "ds"
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())
        try:
            main(config(short_videos, out, workers=1))
        except Stopped:
            os._exit(75)
        os._exit(0)
    while not (out / "parts").exists():
        time.sleep(0.01)
    os.kill(child, stop)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    sample(short_videos, out)
    assert tree(out) == tree(dataset)
