"""The answers that a vision-language model is asked for, as they travel.

Flat, without defaults and without forbidden extras, which some servers refuse. Every number, text and list is
bounded: a model that repeats itself ends there. What an answer means is checked in findings.py.
"""

from pydantic import BaseModel, Field

from storyanchors.clip import MAX_FRAMES

MAX_EVENTS_OF_SUBSET = 24
MAX_EVENTS_OF_STORY = 64
MAX_SUBJECTS = 16


class GlobalCaptionAnswer(BaseModel):
    caption: str = Field(min_length=1, max_length=4000)


class EventAnswer(BaseModel):
    """An event of one subset; its frames are numbered as in the clip."""

    first_frame: int = Field(ge=1, le=MAX_FRAMES)
    last_frame: int = Field(ge=1, le=MAX_FRAMES)
    description: str = Field(min_length=1, max_length=800)


class EventsAnswer(BaseModel):
    events: list[EventAnswer] = Field(min_length=1, max_length=MAX_EVENTS_OF_SUBSET)


class SubjectAnswer(BaseModel):
    """Who or what the story is about: the name that descriptions use, and how it looks ("" for nothing)."""

    name: str = Field(min_length=1, max_length=120)
    appearance: str = Field(max_length=400)


class StoryEventAnswer(BaseModel):
    """A numbered description of the final caption and the annotations (e01, e02, ...) that it unifies."""

    first_frame: int = Field(ge=1, le=MAX_FRAMES)
    last_frame: int = Field(ge=1, le=MAX_FRAMES)
    event_ids: list[str] = Field(max_length=MAX_EVENTS_OF_STORY)
    description: str = Field(min_length=1, max_length=800)


class StoryAnswer(BaseModel):
    """Subjects come first: they are named before a description speaks of them."""

    subjects: list[SubjectAnswer] = Field(max_length=MAX_SUBJECTS)
    style: str = Field(max_length=400)
    events: list[StoryEventAnswer] = Field(min_length=1, max_length=MAX_EVENTS_OF_STORY)
