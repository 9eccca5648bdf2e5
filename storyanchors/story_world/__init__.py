"""The story world: procedural stories whose frames can be judged exactly, without a network."""

from storyanchors.story_world.captions import from_story, to_story
from storyanchors.story_world.renderer import render_frame
from storyanchors.story_world.world import FrameFacts, Subject, WorldEvent, WorldStory, sample_story

__all__ = [
    "FrameFacts",
    "Subject",
    "WorldEvent",
    "WorldStory",
    "from_story",
    "render_frame",
    "sample_story",
    "to_story",
]
