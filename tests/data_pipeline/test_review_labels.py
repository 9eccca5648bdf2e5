import re
import shutil
from html.parser import HTMLParser

import pytest

from data_pipeline.labeling.partition import labels_folder
from data_pipeline.review_labels import review
from tests.data_pipeline.labeled_world import MARKUP, NUM_CLIPS, RUN, write_labeled_world

VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def articles(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "article"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_labeled_world(tmp_path_factory.mktemp("review"))


@pytest.fixture(scope="module")
def page(world) -> str:
    return review(world[0], RUN, num_random=50, num_worst=50)


def test_what_a_model_writes_is_text_never_markup(page):
    seen = Page(page)
    assert not {"script", "iframe", "object", "link", "base", "form"} & {tag for tag, _ in seen.tags}
    assert any(MARKUP in text for text in seen.texts)
    for tag, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        if tag == "img":
            assert re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", attributes["src"])
        if tag == "a":
            assert attributes["href"].startswith("#")


def test_the_page_loads_nothing(page):
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"https?://|url\(|@import", page.replace(MARKUP, ""))


def test_every_clip_is_shown_once_the_worst_first_and_links_lead_somewhere(page, world):
    seen, keys = Page(page), world[1]
    assert sorted(seen.articles()) == keys and len(keys) == NUM_CLIPS
    assert seen.articles()[:2] == [keys[0], keys[3]]  # the refused one, then the one with a warning
    links = [attributes["href"][1:] for tag, attributes in seen.tags if tag == "a"]
    assert sorted(links) == sorted(seen.articles()[:2])


def test_a_refused_clip_shows_what_the_model_said(page, world):
    article = page[page.index(f'id="{world[1][0]}"') :]
    article = article[: article.index("</article>")]
    assert "events: quarantined" in article and "refusal_text" in article
    assert "/repair: ok" in article and "I&#x27;m sorry" in article


def test_bars_lie_over_their_frames(page, world):
    from data_pipeline.captions import read_captions

    record = next(read_captions(world[0], RUN, "000001")).record
    article = page[page.index(f'id="{record.key}"') :]
    article = article[: article.index("</article>")]
    bars = re.findall(r'class="bar event" style="grid-area: (\d+) / (\d+) / \d+ / (\d+);', article)
    sheets = article.count('class="sheet"')
    covered = sum(int(end) - int(begin) for _, begin, end in bars)
    assert sheets == 1 + (record.story.num_frames > 12)
    assert covered == sum(event.last_frame - event.first_frame + 1 for event in record.story.events)


def test_the_numbers_of_the_run_are_those_of_its_lines_and_its_ledger(page):
    texts = " ".join(Page(page).texts)
    assert "clips settled 12 of 12 12 of 12 12 of 12" in texts
    assert "quarantined 0 (0.0%) 1 (8.3%) 1 (8.3%)" in texts
    assert "good at the first try 11 (91.7%) 11 (91.7%) 11 (91.7%)" in texts
    assert "replies: invalid 1 (7.7%)" in texts  # the answer that was repaired
    assert "1.0 in, 4.0 out USD per million tokens (2026-11-21)" in texts


def test_random_clips_are_the_same_ones_in_every_run_of_the_dataset(world):
    dataset, keys = world
    one, other = (Page(review(dataset, RUN, num_random=5, num_worst=0)).articles() for _ in range(2))
    assert one == other and len(one) == 5 and set(one) <= set(keys)
    three = Page(review(dataset, RUN, num_random=3, num_worst=0)).articles()
    assert three == one[:3]


def test_a_run_in_progress_can_be_looked_at(world, tmp_path):
    dataset = shutil.copytree(world[0], tmp_path / "world")
    labels = labels_folder(dataset, RUN)
    shutil.rmtree(labels / "story")
    (labels / "events" / "000002.jsonl").unlink()
    texts = " ".join(Page(review(dataset, RUN, 50, 50)).texts)
    assert "shards settled 3 of 3 2 of 3" in texts and "Story (second stage)" not in texts


def test_the_command_writes_the_page_or_says_in_one_line_why_not(world, tmp_path, command, refused):
    dataset, out = f"dataset={world[0]}", tmp_path / "page.html"
    status, printed, errors = command("review_labels", dataset, f"run={RUN}", f"out={out}", "num_random=1")
    assert status == 0, errors
    assert "open it in a browser" in printed and out.read_text().startswith("<!DOCTYPE html>")
    assert "no labeling run 'other', found seen" in refused(
        "review_labels", dataset, "run=other", f"out={out}"
    )
    nowhere = refused("review_labels", dataset, f"run={RUN}", f"out={tmp_path / 'no' / 'page.html'}")
    assert "is no folder" in nowhere
    assert "expected 0 or above" in refused(
        "review_labels", dataset, f"run={RUN}", f"out={out}", "num_worst=-1"
    )
