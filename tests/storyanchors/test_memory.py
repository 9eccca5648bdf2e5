"""Which part of a model is on the device when; and a lack of memory says what to lower."""

import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from storyanchors.caption_encoder import WordEncoder
from storyanchors.codec import PcaCodec
from storyanchors.dit import StoryDiT, StoryDiTConfig
from storyanchors.generator import StoryGenerator
from storyanchors.memory import OutOfMemory, at_work, memory_advice, out_of_memory_explained
from storyanchors.story import Event, Story

STORY = Story([Event(1, 3, "a fox runs")])
DEVICE = torch.device("cpu", 0)  # to tell it from "cpu", where parts go that leave


class Journal:
    """A part of a model that writes down where it goes and when it works."""

    def __init__(self, part, name, journal):
        self.part, self.name, self.journal = part, name, journal

    def to(self, device):
        self.journal.append(f"{self.name} {'comes' if device == DEVICE else 'leaves'}")
        return self

    def __getattr__(self, attribute):
        found = getattr(self.part, attribute)
        if attribute in ("encode", "decode"):
            self.journal.append(f"{self.name} {attribute}s")
        return found

    def __call__(self, *args):
        self.journal.append(f"{self.name} works")
        return self.part(*args)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    dit = StoryDiT(StoryDiTConfig(1, 12, 1, 32, WordEncoder.text_dim, latent_channels=4, freq_dim=32)).eval()
    return dit, PcaCodec.fit(torch.rand(8, 3, 16, 16) * 2 - 1, latent_channels=4), WordEncoder()


def journal_of(parts, memory):
    journal = []
    names = ("network", "codec", "encoder")
    watched = [Journal(part, name, journal) for part, name in zip(parts, names, strict=True)]
    generator = StoryGenerator(*watched, frame_size=(16, 16), num_steps=2, device=DEVICE, memory=memory)
    given = {1: generator.generate(STORY, progress=False)[0]}
    journal.clear()
    frames = generator.generate(STORY, given=given, progress=False)
    return journal, np.stack([np.asarray(frame) for frame in frames])


def test_offloaded_parts_are_on_the_device_only_while_they_work(parts):
    journal, frames = journal_of(parts, "offload")
    assert journal == [
        *("encoder comes", "encoder encodes", "encoder leaves"),
        *("codec comes", "codec encodes", "codec leaves"),
        *("network comes", "network works", "network works", "network leaves"),
        *("codec comes", "codec decodes", "codec leaves"),
    ]
    resident, same_frames = journal_of(parts, "resident")
    assert resident == ["encoder encodes", "codec encodes", "network works", "network works", "codec decodes"]
    np.testing.assert_array_equal(frames, same_frames)


def test_a_part_that_does_not_fit_does_not_stay_there_in_half():
    class Large:
        on_device = 0

        def to(self, device):
            self.on_device = 1 if device == DEVICE else 0
            if device == DEVICE:
                raise torch.OutOfMemoryError("out of memory")

    part = Large()
    with pytest.raises(torch.OutOfMemoryError), at_work(part, DEVICE, "offload"):
        pass
    assert part.on_device == 0


def test_a_part_leaves_also_when_its_work_fails(parts):
    journal = []
    network = Journal(parts[0], "network", journal)
    generator = StoryGenerator(
        network, *parts[1:], frame_size=(16, 16), num_steps=2, device=DEVICE, memory="offload"
    )

    def fail(step, latents):
        raise KeyError

    with pytest.raises(KeyError):
        generator.generate(STORY, progress=False, callback=fail)
    assert journal[-1] == "network leaves"


def test_an_unknown_mode_is_refused(parts):
    with pytest.raises(ValueError, match="unknown memory mode 'disk', expected one of resident, offload"):
        StoryGenerator(*parts, frame_size=(16, 16), memory="disk")


@contextmanager
def memory_limited_to_now_and(more_bytes):
    """The process gets no more address space than it has and this much."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_too_large_a_story_says_what_to_lower_and_the_generator_goes_on(parts):
    generator = StoryGenerator(*parts, frame_size=(16, 16), num_steps=2)
    with memory_limited_to_now_and(2**28), pytest.raises(OutOfMemory) as error:
        generator.generate(STORY, num_frames=200, height=2048, width=2048, progress=False)
    message = str(error.value)
    assert message.startswith("out of memory while drawing 200 frames of 2048 x 2048 pixels; what helps: ")
    for advice in ("dtype=bfloat16", "fewer frames at once (window=)", "a smaller height and width"):
        assert advice in message
    assert "offload" not in message and "\n" not in message  # a CPU has nowhere to send its parts to
    assert len(generator.generate(STORY, progress=False)) == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: ..."),
        MemoryError(),
    ],
)
def test_every_lack_of_memory_is_explained(error):
    with pytest.raises(ValueError, match=r"^out of memory while loading MODEL; what helps: memory=offload$"):
        with out_of_memory_explained("loading MODEL", ["memory=offload"]):
            raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with out_of_memory_explained("drawing", []):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_advice_names_nothing_that_is_set_already():
    gpu = torch.device("cuda")
    first = memory_advice(gpu, torch.float32, "resident", num_requests=3)
    assert first[:3] == ["fewer stories in one call", "dtype=bfloat16", "memory=offload"]
    last = memory_advice(gpu, torch.bfloat16, "offload")
    assert last == ["fewer frames at once (window=)", "a smaller height and width"]
    assert memory_advice(gpu, torch.bfloat16, "offload", loading=True) == [
        "a smaller model or a larger machine"
    ]
