"""The walls of the house: who may import whom, what is never read, and what a file is called.

Imports are read from the source, also those inside functions; nothing is run.
"""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY, APPS, SETTINGS = "storyanchors", ("data_pipeline", "train", "infer"), "conf"
TRAINING_ONLY = {"lightning", "pytorch_lightning", "deepspeed", "webdataset", "wandb", "av", "pyarrow"}
CONFIG_ONLY = {"hydra", "omegaconf"}
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in (LIBRARY, *APPS, SETTINGS, "tests", "benchmarks", "slurm")
    for path in (ROOT / folder).rglob("*.py")
)
CODE = [path for path in SOURCES if path.parts[0] != "tests"]
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path)) for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, e.g. {"google.genai", "torch"}."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    return found


def of(folder: str) -> list[Path]:
    return [path for path in CODE if path.parts[0] == folder]


def check_never_imported(paths: list[Path], forbidden: set[str]) -> None:
    assert paths
    for path in paths:
        for name in imports(path):
            assert name.split(".")[0] not in forbidden, f"{path} imports {name}"


def test_the_library_imports_no_app_and_nothing_that_only_an_app_needs():
    check_never_imported(of(LIBRARY), {*APPS, SETTINGS, "tests", *TRAINING_ONLY, *CONFIG_ONLY})


def test_inference_needs_nothing_that_only_training_needs():
    films = [path for path in of("infer") if path.parts[1] == "film"]
    check_never_imported([path for path in of("infer") if path not in films], TRAINING_ONLY)
    check_never_imported(films, TRAINING_ONLY - {"av"})


def test_only_the_storyboard_knows_gradio():
    users = [path for path in CODE for name in imports(path) if name.split(".")[0].startswith("gradio")]
    assert all(path.parts[0] == "infer" and path.parts[1].startswith("storyboard") for path in users)


@pytest.mark.parametrize("app", APPS)
def test_apps_never_import_each_other(app):
    check_never_imported(of(app), {*APPS, "tests"} - {app})


def test_settings_import_no_app():
    check_never_imported(of(SETTINGS), {LIBRARY, *APPS})


def test_only_vlm_knows_gemini():
    users = {str(path) for path in CODE for name in imports(path) if name.startswith("google.genai")}
    assert users <= {"storyanchors/vlm/gemini.py"}
    assert not any(name.startswith("google.generativeai") for path in SOURCES for name in imports(path))


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", CODE, ids=str)
def test_nothing_that_is_read_can_run_code(path):
    assert not {name.split(".")[0] for name in imports(path)} & {
        "pickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
    }
    for name, call in calls(path):
        where = f"{path}:{call.lineno}: {ast.unparse(call)}"
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"), where
        assert name != "torch.load" or arguments.get("weights_only") == "True", where
        assert name != "np.load" or arguments.get("allow_pickle", "False") == "False", where
        assert arguments.get("shell", "False") == "False" and "trust_remote_code" not in arguments, where
        assert name not in ("instantiate", "hydra.utils.instantiate"), where


def test_no_setting_names_a_class():
    for path in (ROOT / SETTINGS).rglob("*.yaml"):
        assert "_target_" not in path.read_text(encoding="utf-8"), path


def test_no_script_hides_a_library():
    """A script's folder comes first in sys.path: train/train.py or train/logging.py would break imports."""
    taken = sys.stdlib_module_names | set(packages_distributions()) | {LIBRARY, *APPS, SETTINGS}
    for path in CODE:
        if path.parent.parts[0] != LIBRARY and path.name != "__init__.py":
            assert path.stem not in taken, f"{path} is named like a module"


def test_sources_are_ascii_and_say_what_they_are_for():
    for path in SOURCES:
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1):
            assert line.isascii(), f"{path}:{number}: {line}"
        assert path.parts[0] == "tests" or ast.get_docstring(TREES[path]), f"{path} has no docstring"


def test_scripts_show_the_command_to_run():
    scripts = [
        path for app in APPS for path in of(app) if 'if __name__ == "__main__"' in (ROOT / path).read_text()
    ]
    assert len(scripts) >= 8
    for path in scripts:
        assert f"python {path.as_posix()} " in ast.get_docstring(TREES[path]), path
        for settings in [ast.literal_eval(call.args[2]) for name, call in calls(path) if name == "run"]:
            assert (ROOT / SETTINGS / f"{settings}.yaml").is_file(), f"{path} has no {settings}.yaml"
