"""The page: its parts, and which action of the board each of them calls. The look is in board.css."""

import logging
from collections.abc import Callable

import gradio as gr

from infer.storyboard.board import Board
from infer.storyboard.cards import CLICKS, header_html, panel_html, status_html, strip_html, tray_html
from infer.storyboard.look import look

log = logging.getLogger(__name__)

TICK_S = 0.4  # how often the page asks for news while something is drawn
MAX_NEW_FRAMES = 16
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def build_page(board: Board) -> gr.Blocks:
    """The whole page of one board; every event handler answers with what has changed."""
    with gr.Blocks(title="storyanchors", analytics_enabled=False, fill_width=True) as page:
        seen = gr.State(None)  # what the forms of this page were last filled with
        header = _html("header")
        with gr.Row(elem_id="desk"):
            with gr.Column(scale=5, min_width=320, elem_id="stage"):
                tray = _html("tray")
                strip = _html("strip")
            with gr.Column(scale=3, min_width=320, elem_id="side"):
                heading = _html("heading")
                with gr.Column(elem_id="story-panel", elem_classes="panel") as story_panel:
                    events = gr.Textbox(
                        label="Events, one per line", lines=12, max_lines=24, elem_id="events"
                    )
                    subjects = gr.Textbox(label="Subjects, most important first; between semicolons")
                    style = gr.Textbox(label="Style")
                    story = [events, subjects, style]
                    with gr.Row():
                        draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                        draw_anew = gr.Button("Draw all anew", elem_id="draw-anew", min_width=100)
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
                    count = gr.Number(
                        1,
                        label="How many frames",
                        precision=0,
                        minimum=1,
                        maximum=MAX_NEW_FRAMES,
                        elem_id="count",
                    )
                    add = gr.Button("Draw it", variant="primary", elem_id="add")
        status = _html("status")
        timer = gr.Timer(TICK_S, active=False)

        panels = [story_panel, frame_panel, place_panel]
        shown = [header, tray, strip, heading, status, timer, seen, *panels, *story, text, new_text]

        def show(seen_values: list | None) -> list:
            view, values = look(board)
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
            known = seen_values or [None] * len(values)
            fields = [text if (what, text) != old else gr.skip() for (what, text), old in zip(values, known)]
            return [*looks, *panels, *fields]

        def answer(action: Callable, *, of_focus: bool = False) -> Callable:
            """The handler of an action: its error becomes the page's one line.

            of_focus: it means the frame or the place that this page shows, not one that another page chose.
            """

            def handler(seen_values, *values):
                try:
                    if of_focus and seen_values:  # None: the server began anew, nothing is chosen
                        board.check_focus(*(what for what, _ in seen_values[-2:]))
                    action(*values)
                except (ValueError, OSError) as error:
                    board.say(str(error), is_error=True)
                except Exception as error:  # a fault of ours: the person gets a line, the log the rest
                    log.exception("the storyboard")
                    board.say(f"a fault of the storyboard: {type(error).__name__}: {error}", is_error=True)
                return show(seen_values)

            return handler

        def on(trigger: Callable, action: Callable, inputs: list, *, of_focus: bool = False) -> None:
            trigger(answer(action, of_focus=of_focus), [seen, *inputs], shown, **QUIET)

        def clicked(seen_values, event: gr.EventData):
            return answer(board.act)(seen_values, event.act, event.value)

        for part in (header, tray, strip, heading, status):
            part.act(clicked, [seen], shown, **QUIET)
        on(draw.click, board.draw_story, story)
        on(draw_anew.click, board.draw_all_anew, story)
        for field in story:
            on(field.blur, board.keep_draft, story)
        on(edit.click, board.edit, [text], of_focus=True)
        on(reroll.click, board.reroll, [], of_focus=True)
        on(compare.click, board.compare, [], of_focus=True)
        on(insert.click, board.place_after_selected, [], of_focus=True)
        on(delete.click, board.delete, [], of_focus=True)
        on(add.click, board.add_frames, [new_text, count], of_focus=True)
        on(timer.tick, lambda: None, [])
        page.load(lambda: answer(board.desk.look_again)(None), None, shown, **QUIET)
    return page


def _html(name: str) -> gr.HTML:
    """A part of the page that is written by us and can be clicked."""
    return gr.HTML(js_on_load=CLICKS, apply_default_css=False, elem_id=name)


def theme() -> gr.themes.Base:
    """Fonts of the reader's own machine, ink on paper."""
    fonts = ["Inter", "Segoe UI", "Helvetica Neue", "Helvetica", "Arial", "sans-serif"]
    return gr.themes.Base(
        primary_hue="stone", neutral_hue="stone", font=fonts, font_mono=["Menlo", "monospace"]
    )
