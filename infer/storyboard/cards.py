"""The board as HTML, pure functions of the view: header, frames, drawings to compare, heading, status line.

What can be clicked carries data-act and data-value, see CLICKS; PLAY shows the frames one after another.
"""

from html import escape

from infer.storyboard.known_words import SENTENCE, WORDS
from infer.storyboard.view import BoardView, Card, Comparison, Variant
from storyanchors.contact_sheet import EVENT_COLOURS

CLICKS = """element.addEventListener('click', (event) => {
  const clicked = event.target.closest('[data-act]');
  if (!clicked || clicked.disabled || clicked.dataset.act === 'play') return;
  const goTo = (id) => document.getElementById(id).scrollIntoView({behavior: 'smooth'});
  if (clicked.dataset.act === 'frames') return goTo('strip');
  trigger('act', {act: clicked.dataset.act, value: Number(clicked.dataset.value)});
  if (['select', 'place'].includes(clicked.dataset.act) && window.innerWidth <= 760) goTo('side');
});"""
PLAY = """let screen, clock;
const end = () => { clearInterval(clock); screen?.remove(); screen = undefined; };
const play = () => {
  const cards = [...document.querySelectorAll('#strip .card[data-number]:has(img)')];
  if (!cards.length) return;
  screen = document.createElement('div');
  screen.id = 'screen';
  screen.innerHTML = '<img alt=""><p></p>';
  screen.addEventListener('click', end);
  document.querySelector('.gradio-container').append(screen);
  let index = 0;
  const show = () => {
    if (index === cards.length) return end();
    const card = cards[index++];
    screen.querySelector('img').src = card.querySelector('img').src;
    screen.querySelector('p').textContent = card.querySelector('.caption').lastChild.textContent;
  };
  show();
  clock = setInterval(show, 1000);
};
element.addEventListener('click', (event) => { if (event.target.closest('[data-act=play]')) play(); });
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Escape') return;
  if (screen) return end();
  if (document.activeElement.matches('textarea, input')) return document.activeElement.blur();
  document.querySelector('[data-act=story]')?.click();
});"""
_CLOSED = '<path d="M5 7V5a3 3 0 0 1 6 0v2M4 7h8v6H4z"/>'
_OPEN = '<path d="M5 7V5a3 3 0 0 1 5.8-1M4 7h8v6H4z"/>'


def header_html(view: BoardView) -> str:
    """Name, version, undo and redo, and what can be taken away."""
    version = "nothing drawn yet"
    if view.version:
        version = f"version {view.version} of {view.num_versions}"
    undo = _button("undo", "Undo", disabled=view.moving or not view.can_undo)
    redo = _button("redo", "Redo", disabled=view.moving or not view.can_redo)
    play = _button("play", "Play") if view.version else ""
    links = (("export/sheet.png", "Sheet"), ("export/film.mp4", "Film"), ("export/project.zip", "Project"))
    exports = "".join(
        f'<a href="{href}" download title="Download the {text.lower()}">{text}</a>' for href, text in links
    )
    return (
        '<header class="board-header"><h1>story<b>anchors</b></h1>'
        f"<p><strong>{escape(view.name)}</strong>"
        f'<span id="version" data-version="{view.version}" title="{escape(view.what)}">{version}</span></p>'
        f"<nav>{undo}{redo}{play}{f'<i></i>{exports}' if view.version else ''}</nav></header>"
    )


def strip_html(view: BoardView) -> str:
    """A card per frame, and one to go on with."""
    cards = "".join(_card(card, view.selected == card.number, view.moving) for card in view.cards)
    after = len(view.cards)
    placed = " is-selected" if view.place == after else ""
    more = (
        f'<article class="card is-more{placed}"><button class="picture" data-act="place" '
        f'data-value="{after}" aria-label="Extend the story"><span>+</span></button>'
        '<p class="caption">go on from here</p></article>'
    )
    return f'<section class="strip" aria-label="Frames">{cards}{more if view.version else ""}</section>'


def _card(card: Card, selected: bool, moving: bool) -> str:
    states = {"is-selected": selected, "is-locked": card.locked, "is-drawing": card.drawing}
    classes = " ".join(["card", *(name for name, holds in states.items() if holds)])
    lock = _CLOSED if card.locked else _OPEN
    verb = "Unlock" if card.locked else "Lock"
    disabled = " disabled" if moving else ""
    return (
        f'<article class="{classes}" data-number="{card.number}">'
        f'<button class="picture" data-act="select" data-value="{card.number}"'
        f' aria-pressed="{str(selected).lower()}" aria-label="Frame {card.number}">'
        f"{_picture(card.picture)}</button>"
        f'<span class="number">{card.number}</span>'
        f'<button class="lock" data-act="lock" data-value="{card.number}"{disabled}'
        f' title="{verb} frame {card.number}"'
        f' aria-label="{verb} frame {card.number}"><svg viewBox="0 0 16 16">{lock}</svg></button>'
        f'<p class="caption"><i style="background:{_colour(card.event)}">{card.numbers}</i>'
        f"{escape(card.text)}</p></article>"
    )


def tray_html(comparison: Comparison | None) -> str:
    """Drawings of one frame side by side; one click chooses."""
    if not comparison:
        return ""
    variants = "".join(
        _variant(variant, index, comparison.ready) for index, variant in enumerate(comparison.variants)
    )
    title = "which one?" if comparison.ready else "four drawings are on their way"
    keep = _button("choose", "Keep what is")
    head = f'<div class="panel-heading"><h2>Frame {comparison.number}: {title}</h2>{keep}</div>'
    return f'<section class="tray">{head}<div class="variants">{variants}</div></section>'


def _variant(variant: Variant, index: int, ready: bool) -> str:
    disabled = "" if ready or not index else " disabled"
    return (
        f'<button data-act="choose" data-value="{index}"{disabled}><span class="picture">'
        f"{_picture(variant.picture)}</span>{escape(variant.label)}</button>"
    )


def status_html(view: BoardView) -> str:
    """One line: what is being drawn, or what happened last."""
    progress = view.progress
    if progress:
        waiting = f" &middot; then {escape('; '.join(progress.waiting))}" if progress.waiting else ""
        note = f'<div class="status is-error" role="alert"><p>{escape(view.message)}</p></div>'
        return (
            f"{note if view.is_error else ''}"
            f'<div class="status is-busy" role="status"><p>{escape(progress.what)}{waiting}</p>'
            f'<div class="bar"><div style="width:{100 * progress.share:.0f}%"></div></div>'
            f"{_button('cancel', 'Cancel')}</div>"
        )
    kind, role = ("is-error", "alert") if view.is_error else ("", "status")
    return f'<div class="status {kind}" role="{role}"><p>{escape(view.message)}</p></div>'


def panel_html(view: BoardView) -> str:
    """The head of the panel at the side: what it is about, and the way back to the story."""
    back = _button("frames", "Frames") + _button("story", "Story")
    if view.selected is not None:
        card = view.cards[view.selected - 1]
        title, note = f"Frame {card.number}", _FRAME_NOTES[card.drawing, card.locked]
        unlock = _button("lock", "Unlock", card.number, disabled=view.moving) if card.locked else ""
        return (
            f'<div class="panel-heading"><h2>{title}</h2>{back}</div>'
            f'<div class="portrait">{_picture(card.picture)}</div>'
            f'<div class="panel-heading"><p>{note}</p>{unlock}</div>'
        )
    if view.place is not None:
        title = f"After frame {view.place}" if view.place < len(view.cards) else "Go on"
        note = "New frames are drawn here; all others stay as they are."
        return f'<div class="panel-heading"><h2>{title}</h2>{back}<p>{note}</p></div>'
    note = _STORY_NOTES[view.version > 0]
    forget = _button("forget", "Discard what is typed") if view.has_draft else ""
    known = _KNOWN if view.story_world else ""
    return f'<div class="panel-heading"><h2>The story</h2>{forget}<p>{note}</p>{known}</div>'


_FRAME_NOTES = {  # (drawing, locked)
    (False, False): "Nothing else changes when this frame is drawn again.",
    (False, True): "Locked: stays as it is, bit by bit, until it is unlocked.",
    (True, False): "It is being drawn.",
    (True, True): "It is being drawn.",
}
_STORY_NOTES = {
    False: "One line per event: the frames it covers, a colon, what happens.",
    True: "Change it and draw: only frames whose text changed are drawn. Locked frames stay.",
}
_KNOWN = (
    f"<details><summary>This model knows the story world's sentences: <b>{SENTENCE}</b></summary><dl>"
    + "".join(f"<dt>{word}</dt><dd>{', '.join(values)}</dd>" for word, values in WORDS.items())
    + "</dl></details>"
)


def _button(act: str, text: str, value: int = 0, *, disabled: bool = False) -> str:
    return f'<button data-act="{act}" data-value="{value}"{" disabled" if disabled else ""}>{text}</button>'


def _picture(url: str) -> str:
    return f'<img src="{escape(url)}" alt="" draggable="false">' if url else '<span class="blank"></span>'


def _colour(event: int) -> str:
    return "rgb({}, {}, {})".format(*EVENT_COLOURS[event % len(EVENT_COLOURS)])
