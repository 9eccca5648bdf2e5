"""The page: its parts, and which action of the board each of them calls. The look is in board.css."""

import logging
import random
from collections.abc import Callable

import gradio as gr

from infer.storyboard.board import Board
from infer.storyboard.cards import (
    CLICKS,
    PLAY,
    header_html,
    panel_html,
    status_html,
    strip_html,
    tray_html,
)
from infer.storyboard.focus import Focus
from infer.storyboard.look import look

log = logging.getLogger(__name__)

TICK_S = 0.4  # how often the page asks for news while something is drawn
MAX_SEED = 2**31
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def build_page(board: Board) -> gr.Blocks:
    """The whole page of one board; every event handler answers with what has changed."""
    with gr.Blocks(title="storyanchors", analytics_enabled=False, fill_width=True) as page:
        seen = gr.State(None)  # what the forms of this page were last filled with
        focus = gr.State(
            Focus()
        )  # and what this page looks at: changed in place, so no answer comes too late
        header = _html("header", CLICKS + PLAY)
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=5, min_width=320, elem_id="stage"):
                tray = _html("tray")
                strip = _html("strip")
            with gr.Column(scale=3, min_width=320, elem_id="side"):
                heading = _html("heading")
                with gr.Column(elem_id="story-panel", elem_classes="panel") as story_panel:
                    events = gr.Textbox(label="Events, one per line", lines=8, max_lines=24, elem_id="events")
                    subjects = gr.Textbox(label="Subjects, most important first; between semicolons")
                    style = gr.Textbox(label="Style")
                    story = [events, subjects, style]
                    with gr.Row():
                        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                        draw_anew = gr.Button("Draw all anew", elem_id="draw-anew", min_width=100)
                    surprise = gr.Button(
                        "Surprise me", elem_id="surprise", visible=board.knows_story_world_only
                    )
                with gr.Column(elem_id="frame-panel", elem_classes="panel", visible=False) as frame_panel:
                    text = gr.Textbox(label="What happens here", lines=3, elem_id="frame-text")
                    edit = gr.Button("Draw with this text", variant="primary", elem_id="edit")
                    with gr.Row():
                        reroll = gr.Button("Re-roll", elem_id="reroll", min_width=100)
                        compare = gr.Button("Compare four", elem_id="compare", min_width=100)
                    with gr.Row():
                        insert = gr.Button("Insert after", elem_id="insert", min_width=100)
                        delete = gr.Button("Delete", elem_id="delete", min_width=100)
                with gr.Column(elem_id="place-panel", elem_classes="panel", visible=False) as place_panel:
                    new_text = gr.Textbox(label="What happens there", lines=3, elem_id="new-text")
                    count = gr.Number(1, label="How many frames", precision=0, elem_id="count")
                    add = gr.Button("Draw it", variant="primary", elem_id="add")
        status = _html("status")
        timer = gr.Timer(TICK_S, active=False)

        panels = [story_panel, frame_panel, place_panel]
        moving, of_frame = [draw, draw_anew, add], [edit, reroll, compare, delete]
        looks = [header, tray, strip, heading, status, timer, seen]
        shown = [*looks, *panels, *moving, *of_frame, *story, text, new_text]

        def show(seen_values: list | None, focus: Focus) -> list:
            view, values = look(board, focus)
            looks = [
                header_html(view),
                tray_html(view.comparison),
                strip_html(view),
                panel_html(view),
                status_html(view),
                gr.Timer(active=view.progress is not None),
                values,
            ]
            panels = [
                gr.Column(visible=view.selected is None and view.place is None),
                gr.Column(visible=view.selected is not None),
                gr.Column(visible=view.place is not None),
            ]
            locked = view.selected is not None and view.cards[view.selected - 1].locked
            buttons = [gr.Button(interactive=not view.moving)] * len(moving)
            buttons += [gr.Button(interactive=not view.moving and not locked)] * len(of_frame)
            known = seen_values or [None] * len(values)
            fields = [text if (what, text) != old else gr.skip() for (what, text), old in zip(values, known)]
            return [*looks, *panels, *buttons, *fields]

        def answer(action: Callable) -> Callable:
            """The handler of an action: its error becomes the page's one line."""

            def handler(seen_values, focus, *values):
                try:
                    action(*values)
                except (ValueError, OSError) as error:
                    board.say(str(error), is_error=True)
                except Exception as error:  # a fault of ours: the person gets a line, the log the rest
                    log.exception("the storyboard")
                    board.say(f"a fault of the storyboard: {type(error).__name__}: {error}", is_error=True)
                return show(seen_values, focus)

            return handler

        def on(trigger: Callable, action: Callable, inputs: list) -> None:
            trigger(answer(action), [seen, focus, *inputs], shown, **QUIET)

        def clicked(seen_values, focus, event: gr.EventData):
            return answer(board.act)(seen_values, focus, event.act, event.value, focus)

        for part in (header, tray, strip, heading, status):
            part.act(clicked, [seen, focus], shown, **QUIET)
        on(draw.click, board.draw_story, [focus, *story])
        on(draw_anew.click, board.draw_all_anew, [focus, *story])
        on(surprise.click, lambda: board.surprise(random.randrange(MAX_SEED)), [])
        for field in story:
            on(field.blur, board.keep_draft, story)
        on(edit.click, board.edit, [focus, text])
        on(reroll.click, board.reroll, [focus])
        on(compare.click, board.compare, [focus])
        on(insert.click, board.place_after_selected, [focus])
        on(delete.click, board.delete, [focus])
        on(add.click, board.add_frames, [focus, new_text, count])
        on(timer.tick, lambda: None, [])
        page.load(lambda focus: answer(board.desk.look_again)(None, focus), [focus], shown, **QUIET)
    return page


def _html(name: str, script: str = CLICKS) -> gr.HTML:
    """A part of the page that is written by us and can be clicked."""
    return gr.HTML(js_on_load=script, apply_default_css=False, elem_id=name)


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine, ink on paper."""
    fonts = ["Inter", "Segoe UI", "Helvetica Neue", "Helvetica", "Arial", "sans-serif"]
    return gr.themes.Base(
        primary_hue="stone", neutral_hue="stone", font=fonts, font_mono=["Menlo", "monospace"]
    )
