"""The story world: procedural stories whose frames can be judged exactly, without a network."""

from storyanchors.story_world.captions import from_story, to_story
from storyanchors.story_world.identity import consistency_samples, identity_samples, members_seen
from storyanchors.story_world.metrics import score_stories, story_samples
from storyanchors.story_world.parser import ParsedFrame, ParsedSubject, parse_frame
from storyanchors.story_world.renderer import render_frame
from storyanchors.story_world.world import FrameFacts, Subject, WorldEvent, WorldStory, sample_story

__all__ = [
    "FrameFacts",
    "ParsedFrame",
    "ParsedSubject",
    "Subject",
    "WorldEvent",
    "WorldStory",
    "consistency_samples",
    "from_story",
    "identity_samples",
    "members_seen",
    "parse_frame",
    "render_frame",
    "sample_story",
    "score_stories",
    "story_samples",
    "to_story",
]
