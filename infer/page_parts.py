"""What every HTML page of a story has: style, policy, pictures inside it, frames that a click enlarges.

A page is one file that opens from a disk without a network. Stories are texts of strangers: browsers are told
to load nothing and to run nothing but the few lines of SCRIPT.
"""

import base64
import hashlib
import io
from html import escape
from pathlib import Path

from PIL import Image

from infer.frame_folder import read_frame
from storyanchors.contact_sheet import EVENT_COLOURS
from storyanchors.markup import Html, element

MAX_FILE_BYTES = 600_000  # a larger frame goes into the page as a JPEG
JPEG_QUALITY = 92
THUMBNAIL_PX = 96
SMALL_FRAME_PX = 160  # smaller ones are enlarged with hard pixels
SCRIPT = """
addEventListener("keydown", (event) => {
  const link = { ArrowLeft: ".previous", ArrowRight: ".next", Escape: ".close" }[event.key];
  const found = link && document.querySelector(`figure:target ${link}`);
  if (found) { event.preventDefault(); location.hash = found.hash; }
});
"""
STYLE = """
:root { color-scheme: light dark; --paper: light-dark(#fcfbf8, #17171a); --ink: light-dark(#1c1c20, #ecebe6);
  --faint: light-dark(#d9d7d1, #3a3a40); --soft: light-dark(#66655f, #a3a29b);
  --raised: light-dark(#f1efe9, #222226); --given: light-dark(#b8490c, #ff9a5c);
  --locked: light-dark(#2462be, #7fb0ff); --drawn: light-dark(#2c7a3a, #7fd08e); }
:root:has(#other:checked) { color-scheme: dark; }
@media (prefers-color-scheme: dark) { :root:has(#other:checked) { color-scheme: light; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 28px 20px 60px; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, "Liberation Sans", "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
header { position: relative; padding-right: 90px; border-bottom: 3px solid var(--ink); margin-bottom: 18px;
  padding-bottom: 10px; }
h1 { font-size: 32px; line-height: 1.15; margin: 0 0 4px; font-weight: 750; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 34px 0 8px; }
p { margin: 3px 0; } .soft { color: var(--soft); } a { color: inherit; }
.theme { position: absolute; right: 0; top: 2px; cursor: pointer; color: var(--soft); font-size: 13px;
  border: 1px solid var(--faint); border-radius: 14px; padding: 3px 12px; }
.theme input { position: absolute; opacity: 0; } .theme:focus-within { outline: 2px solid var(--locked); }
.sheet { display: grid; gap: 6px 10px; margin: 0 0 22px; overflow-x: auto; padding: 4px; }
figure { margin: 0; } figcaption { font-size: 13px; display: flex; flex-wrap: wrap; gap: 2px 8px;
  align-items: baseline; min-height: 1.6em; }
figcaption b { font-size: 15px; }
.pictures { display: grid; gap: 6px; text-decoration: none; cursor: zoom-in; }
.cell img { width: 100%; display: block; border-radius: 2px; outline: 1px solid var(--faint); }
.small img { image-rendering: pixelated; }
.given img { outline: 4px solid var(--given); } .locked img { outline: 4px solid var(--locked); }
.changed img { outline: 4px solid var(--drawn); } .same img { opacity: 0.45; }
.mark { font-size: 12px; } .mark.given { color: var(--given); } .mark.locked { color: var(--locked); }
.mark.changed { color: var(--drawn); }
.bar { color: #1c1c20; border-radius: 5px; padding: 2px 8px 3px; font-size: 14px; min-width: 0; }
.missing { border: 2px dashed var(--faint); border-radius: 4px; color: var(--soft); display: grid;
  place-items: center; font-size: 13px; aspect-ratio: var(--shape); }
.told { font-size: 14px; margin: 4px 0; }
figure .only-large { display: none; }
figure:target { position: fixed; inset: 0; z-index: 9; background: var(--paper); padding: 14px 64px 18px;
  display: flex; flex-direction: column; gap: 10px; }
figure:target figcaption { order: 2; justify-content: center; font-size: 16px; }
figure:target .only-large { display: inline; }
figure:target .pictures { flex: 1; min-height: 0; display: flex; gap: 16px; cursor: zoom-out; }
figure:target .pictures > * { flex: 1; min-width: 0; }
figure:target img { height: 100%; width: 100%; object-fit: contain; outline: none; opacity: 1; }
figure:target .step { position: fixed; top: 0; bottom: 0; width: 60px; display: grid; place-items: center;
  font-size: 38px; text-decoration: none; color: var(--soft); }
figure:target .previous { left: 0; } figure:target .next { right: 0; }
figure:target .close { position: fixed; top: 8px; right: 20px; font-size: 30px; z-index: 1;
  text-decoration: none; }
table { border-collapse: collapse; width: 100%; } tr.aside { opacity: 0.55; }
th, td { border-bottom: 1px solid var(--faint); padding: 6px 16px 6px 0; text-align: left; }
td { vertical-align: top; }
th { font-size: 13px; color: var(--soft); font-weight: 500; } td:first-child { white-space: nowrap; }
td.settings { font-size: 13px; color: var(--soft); }
.thumbnails { display: flex; flex-wrap: wrap; gap: 4px; } .thumbnails img { width: 56px; display: block; }
pre { white-space: pre-wrap; background: var(--raised); padding: 12px; border-radius: 6px; font-size: 13px; }
summary { cursor: pointer; }
del { color: var(--soft); } ins { text-decoration: none; border-bottom: 2px solid var(--drawn); }
@media print { .theme { display: none; } }
"""


def html_page(title: str, about: list[str], body: list[Html]) -> str:
    """The whole file: a heading, lines about it, and the body."""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_hash(SCRIPT)}'"
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("title", title),
        Html(f"<style>{STYLE}</style>"),
    ]
    switch = element("label", Html('<input type="checkbox" id="other">'), "dark / light", class_="theme")
    lines = [element("p", line, class_="soft", dir="auto") for line in about if line]
    header = element("header", element("h1", title, dir="auto"), *lines, switch)
    page = element(
        "html",
        element("head", *head),
        element("body", header, *body, Html(f"<script>{SCRIPT}</script>")),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def picture(path: Path, alt: str) -> Html:
    """A frame inside the page: its own file, or a JPEG of it where that is large."""
    content = path.read_bytes()
    if len(content) > MAX_FILE_BYTES:
        with io.BytesIO() as file:
            read_frame(path).convert("RGB").save(file, "JPEG", quality=JPEG_QUALITY)
            content = file.getvalue()
    return _image(content, alt)


def thumbnail(path: Path, alt: str) -> Html:
    """A frame of at most THUMBNAIL_PX."""
    frame = read_frame(path).convert("RGB")
    frame.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    with io.BytesIO() as file:
        frame.save(file, "PNG")
        return _image(file.getvalue(), alt)


def _image(content: bytes, alt: str) -> Html:
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Html(f'<img alt="{escape(alt)}" src="{source}">')


def is_small(path: Path) -> bool:
    """Whether a frame is enlarged with hard pixels."""
    return max(read_frame(path).size) <= SMALL_FRAME_PX


def enlargeable(
    place: int, num_places: int, pictures: list[Html], caption: list[Html], told: list[str], kind: str
) -> Html:
    """A figure that fills the window when it is clicked, with links to the ones before and after it.

    caption is always seen, told only when it is large. kind are the classes of its marks.
    """
    close = element("a", "\u00d7", href=f"#cell-{place}", class_="close only-large", title="close (Esc)")
    steps = [
        element("a", sign, href=f"#frame-{to}", class_=f"step {name} only-large", title=name)
        for sign, to, name in (("\u2039", place - 1, "previous"), ("\u203a", place + 1, "next"))
        if 1 <= to <= num_places
    ]
    inside = element("a", *pictures, href=f"#frame-{place}", class_="pictures", title="enlarge")
    text = [element("span", one, class_="only-large", dir="auto") for one in told]
    figure = element(
        "figure",
        element("figcaption", *caption, *text),
        inside,
        *steps,
        close,
        id=f"frame-{place}",
        class_=kind,
    )
    return element("div", figure, class_="cell", id=f"cell-{place}")


def mark(text: str, kind: str = "soft") -> Html:
    """A word about a frame."""
    return element("span", text, class_=f"mark {kind}")


def css_colour(index: int) -> str:
    """Of the event with this index, as on a contact sheet."""
    return f"rgb({', '.join(map(str, EVENT_COLOURS[index % len(EVENT_COLOURS)]))})"
