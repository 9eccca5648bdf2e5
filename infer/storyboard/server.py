"""The page on this machine's network: Gradio's part, the pictures, and what can be taken away."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response

from infer.project.history import SHA256
from infer.project.pictures import picture_path
from infer.storyboard.board import Board
from infer.storyboard.exports import draw_sheet, make_film, pack_project
from infer.storyboard.page import build_page, theme
from infer.storyboard.port import check_port

STYLE_SHEET = Path(__file__).with_name("board.css")
CLOSING_S = 1
FOREVER = {"Cache-Control": "public, max-age=31536000, immutable"}  # pictures are named by their content


def build_app(board: Board) -> FastAPI:
    """The whole application; a server of one's own may mount it."""
    app = FastAPI(title="storyanchors", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/picture/{name}")
    def picture(name: str) -> Response:
        path = picture_path(board.desk.folder, Path(name).stem)
        if not SHA256.fullmatch(path.stem) or path.name != name or not path.is_file():
            return PlainTextResponse(f"no picture {name}", status_code=404)
        return FileResponse(path, headers=FOREVER)

    def export(name: str, make: Callable[[Board], bytes], kind: str) -> None:
        @app.get(f"/export/{name}")
        def download() -> Response:
            try:
                content = make(board)
            except (ValueError, OSError) as error:
                board.say(f"{name}: {error}", is_error=True)
                return PlainTextResponse(str(error), status_code=400)
            headers = {"Content-Disposition": _attachment(f"{board.desk.folder.name}-{name}")}
            return Response(content, media_type=kind, headers=headers)

    export("sheet.png", draw_sheet, "image/png")
    export("film.mp4", make_film, "video/mp4")
    export("project.zip", pack_project, "application/zip")
    return gr.mount_gradio_app(
        app,
        build_page(board),
        path="/",
        theme=theme(),
        css_paths=STYLE_SHEET,
        footer_links=[],
        show_error=False,
    )


def _attachment(name: str) -> str:
    """Content-Disposition of a download; a header has only Latin letters, so others go percent-encoded."""
    encoded = quote(name)
    return f'attachment; filename="{name}"' if encoded == name else f"attachment; filename*=UTF-8''{encoded}"


def start_server(app: FastAPI, host: str, port: int) -> uvicorn.Server:
    """A server whose run() serves the app until Ctrl-C; OSError where the port is taken."""
    check_port(host, port)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=CLOSING_S,  # an open page keeps a connection for news
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_closed_page)
    return uvicorn.Server(config)


def _is_no_closed_page(record: logging.LogRecord) -> bool:
    """Connections of open pages are cut when the server ends: no error, and no traceback for each of them."""
    cut = record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and "graceful shutdown exceeded" not in record.getMessage()
