"""How many tokens of a text encoder captions have, and what those that are too long would lose."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from data_pipeline.captions import read_captions
from data_pipeline.worker_pool import map_in_order, num_workers
from storyanchors.caption_encoder import TokenCounter, fit_caption, load_token_counter
from storyanchors.clip import CaptionRecord

MAX_LISTED = 10  # clips with a caption that is too long, in the report


@dataclass(frozen=True)
class CaptionTokens:
    """One caption of a clip."""

    key: str
    kind: str  # global caption or story
    num_tokens: int
    losses: Counter[str] | None  # what fit_caption drops, by kind; None where it cannot be made to fit

    def __str__(self) -> str:
        if self.losses is None:
            loss = "cannot be cut to fit: its first event or sentence alone is too long"
        else:
            loss = "loses " + ", ".join(_counted(kind, count) for kind, count in self.losses.items())
        return f"{self.key}: {self.kind} of {self.num_tokens} tokens {loss}"


@lru_cache(maxsize=1)
def token_counter(encoder: str) -> TokenCounter:
    """Loaded once; the processes that count inherit it."""
    return load_token_counter(encoder)


def count_tokens(
    dataset: Path, run: str, shards: list[str], encoder: str, *, workers: int | None
) -> list[CaptionTokens]:
    """Every caption of a run, in the tokens of a caption encoder (folder, Hub id or "words")."""
    counted = map_in_order(partial(_count_shard, dataset, run, encoder), shards, workers=num_workers(workers))
    return [caption for of_shard in counted for caption in of_shard]


def describe_tokens(captions: list[CaptionTokens], encoder: str) -> list[str]:
    """Lines for a person: the budget, how much of it the captions use, and which are over it."""
    budget = token_counter(encoder).max_tokens
    lines = [f"tokens of {encoder}: {'no limit' if budget is None else f'at most {budget} per caption'}"]
    for kind in ("global caption", "story"):
        if counts := [caption.num_tokens for caption in captions if caption.kind == kind]:
            p50, p95 = np.percentile(counts, [50, 95], method="inverted_cdf")
            long = sum(
                bool(caption.losses is None or caption.losses) for caption in captions if caption.kind == kind
            )
            lines.append(
                f"  {kind}: p50 {p50}, p95 {p95}, max {max(counts)}; {long} of {len(counts)} too long"
            )
    long = [caption for caption in captions if caption.losses is None or caption.losses]
    lines += [f"  {caption}" for caption in long[:MAX_LISTED]]
    if len(long) > MAX_LISTED:
        total = sum((caption.losses for caption in long if caption.losses), Counter())
        lost = ", ".join(_counted(kind, count) for kind, count in total.items())
        lines.append(f"  and {len(long) - MAX_LISTED} more; all of them together lose {lost}")
    return lines


def _count_shard(dataset: Path, run: str, encoder: str, shard: str) -> list[CaptionTokens]:
    counter = token_counter(encoder)
    return [
        caption
        for line in read_captions(dataset, run, shard)
        for caption in _count_record(line.record, counter)
    ]


def _count_record(record: CaptionRecord, counter: TokenCounter) -> list[CaptionTokens]:
    texts = {"global caption": record.global_caption, "story": record.story.prompt() if record.story else ""}
    return [_count(record.key, kind, text, counter) for kind, text in texts.items() if text]


def _count(key: str, kind: str, text: str, counter: TokenCounter) -> CaptionTokens:
    try:
        num_tokens = counter.count_tokens(text)
    except ValueError as error:  # of embeddings that were made elsewhere, one is not there
        raise ValueError(f"{kind} of clip {key}: {error}") from error
    try:
        losses = Counter(part.kind for part in fit_caption(text, counter).dropped)
    except ValueError:
        losses = None
    return CaptionTokens(key, kind, num_tokens, losses)


def _counted(kind: str, count: int) -> str:
    return "its style" if (kind, count) == ("style", 1) else f"{count} {kind}{'s' if count > 1 else ''}"
