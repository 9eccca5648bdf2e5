"""A page in the browser on which a story is written, drawn and steered frame by frame.

python infer/storyboard_app.py weights=examples/story_world_model project=runs/board

Then open http://127.0.0.1:7860. project is a story project, the one to go on with or a new one, which begins
with the example in story=. Nothing is fetched from the internet. Whoever reaches the page can change the
project: host=0.0.0.0 opens it to the network.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from omegaconf import MISSING

from conf.command import run
from infer.project.drawing import DrawSettings
from infer.story_project import check_new_project, is_project
from infer.story_run import ModelConfig, describe_model, load_generator, sampler_settings
from infer.storyboard.artist import Artist
from infer.storyboard.board import Board
from infer.storyboard.port import check_port
from storyanchors.conditioning import ClipConditions
from storyanchors.model_folder import read_story_model
from storyanchors.story import Story


@dataclass
class StoryboardAppConfig(ModelConfig):
    project: str = MISSING
    story: str = MISSING  # what a new project begins with
    seed: int = 0  # of the first drawing; each one after it takes the next
    window: int | None = None  # frames drawn at once; null = what the model was trained for
    overlap: int | None = None  # frames that a window shares with what is there; null = half a window
    host: str = "127.0.0.1"
    port: int = 7860


def main(config: StoryboardAppConfig) -> None:
    if missing := [name for name in ("gradio", "av") if find_spec(name) is None]:
        raise ValueError(f"the storyboard needs {' and '.join(missing)}: pip install -e '.[app]'")
    check_port(config.host, config.port)
    board = open_board(config)
    from infer.storyboard.server import build_app, start_server  # Gradio takes seconds to load, --help none

    server = start_server(build_app(board), config.host, config.port)
    print(f"{config.project} is on http://{config.host}:{config.port}, until Ctrl-C", flush=True)
    server.run()


def open_board(config: StoryboardAppConfig) -> Board:
    """The board of the project, with its model loaded."""
    folder, example = Path(config.project).absolute(), Story.from_file(config.story)
    if not is_project(folder):
        check_new_project(folder)
    read_story_model(config.weights)
    print(f"loading {config.weights} ...", flush=True)
    generator = load_generator(config)
    settings = DrawSettings(
        sampler_settings(config),
        ClipConditions(config.fps, config.frame_interval, config.motion),
        window=config.window,
        overlap=config.overlap,
        model=describe_model(config, generator),
    )
    return Board(folder, example, Artist(generator, settings), config.seed)


if __name__ == "__main__":
    run(main, StoryboardAppConfig, "storyboard_app")
