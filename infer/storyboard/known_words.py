"""What a model that was trained on the story world alone can be told, and stories in its words."""

from storyanchors.caption_encoder import WordEncoder
from storyanchors.generator import StoryGenerator
from storyanchors.story import Story
from storyanchors.story_world import from_story, sample_story, to_story
from storyanchors.story_world.world import ACTIONS, COLOURS, PANS, SCENES, SHAPES, STYLE, ZOOMS

SENTENCE = "in the SCENE, the COLOUR SHAPE ACTION, ZOOM shot from the PAN"
WORDS = {
    "SCENE": list(SCENES),
    "COLOUR": list(COLOURS),
    "SHAPE": list(SHAPES),
    "ACTION": ["holds a ball" if action == "holds" else action for action in ACTIONS],
    "ZOOM": list(ZOOMS),
    "PAN": list(PANS),
}


def knows_story_world_only(generator: StoryGenerator) -> bool:
    """Whether its caption encoder has one vector per word, which is how the story-world models read."""
    return isinstance(generator.caption_encoder, WordEncoder)


def unknown_to_story_world(story: Story) -> str:
    """What of a story the story world has no words for, in a few words; "" for nothing."""
    if story.style != STYLE:
        return f'the style is not "{STYLE}"'
    try:
        from_story(story)
    except ValueError as error:
        return str(error).split(", expected")[0]
    return ""


def surprising_story(seed: int) -> Story:
    """A story of the story world."""
    return to_story(sample_story(seed))
