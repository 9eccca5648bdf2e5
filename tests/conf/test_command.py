"""Every command reads its settings in one way and says in one line what does not fit."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING

from conf import command
from conf.command import HardwareFault, Stopped, Unhealthy, read_config, run


@dataclass
class PartConfig:
    path: str = MISSING
    sizes: list[int] = field(default_factory=lambda: [1, 2])


@dataclass
class RuleConfig:
    name: str = "none"
    weight: float = 1.0

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"rule {self.name} weighs {self.weight}, expected 0 or more")


@dataclass
class ToolConfig:
    part: PartConfig = field(default_factory=PartConfig)
    rules: list[RuleConfig] = field(default_factory=list)
    passed_on: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 10  # of the tool
    scale: float | None = None
    fast: bool = False


@pytest.fixture(autouse=True)
def conf(monkeypatch, tmp_path) -> Path:
    """conf/ of a made-up command, with a group."""
    (tmp_path / "rule_set").mkdir()
    (tmp_path / "use_tool.yaml").write_text(
        "defaults: [use_tool_schema, rule_set@_global_: few, _self_]\nnum_steps: 20\n"
    )
    (tmp_path / "rule_set" / "few.yaml").write_text("rules: [{name: a, weight: 2}]\n")
    (tmp_path / "rule_set" / "none.yaml").write_text("rules: []\n")
    monkeypatch.setattr(command, "CONF_DIR", tmp_path)
    return tmp_path


def read(*overrides: str) -> ToolConfig:
    return read_config(ToolConfig, "use_tool", list(overrides))


@pytest.fixture
def use_tool(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """use_tool(main, "part.path=x") -> exit status, stdout, stderr."""

    def call(main: Callable[[ToolConfig], None], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["use_tool.py", *arguments])
        try:
            run(main, ToolConfig, "use_tool")
        except SystemExit as exit:
            return (exit.code, *capsys.readouterr())
        return (0, *capsys.readouterr())

    return call


def test_dataclass_file_and_arguments_give_one_typed_object():
    config = read("part.path='/films/My (first) film, part=1.mp4'", "part.sizes=[3]", "scale=2", "fast=true")
    assert config == ToolConfig(
        part=PartConfig("/films/My (first) film, part=1.mp4", [3]),
        rules=[RuleConfig("a", 2.0)],
        num_steps=20,
        scale=2.0,
        fast=True,
    )
    assert type(config.part) is PartConfig and type(config.rules[0]) is RuleConfig
    assert type(config.part.sizes) is list and type(config.passed_on) is dict


def test_a_group_is_chosen_by_name_and_the_last_word_counts():
    assert read("part.path=x", "rule_set@_global_=none", "num_steps=1", "num_steps=2") == ToolConfig(
        part=PartConfig("x"), num_steps=2
    )


def test_a_flag_is_short_for_true():
    assert read("part.path=x", "--fast").fast and not read("part.path=x").fast
    assert read("part.path=x", "--fast", "fast=false").fast is False


@dataclass
class TextConfig:
    text: str | None = None
    name: str = "a"
    numbers: list[int] | None = None


@pytest.mark.parametrize(
    "text",
    [
        "in the cave, the fox's den",
        'She says "stop, now"',
        '"Stop," she said, "now"',
        "a: b {c} (d)=e, [1-2] f",
        "C:\\folder, ends in \\",
        "plain words",
        "He runs! Where to? 50% of #1; a & b <c> `d` ^ ~ $5",
        "\u00e9t\u00e9, \u4e2d\u6587",
        "two\nlines",
        "1e3",
        "true",
    ],
)
def test_a_text_is_what_was_typed(conf, text):
    (conf / "text.yaml").write_text("defaults: [text_schema, _self_]\n")
    config = read_config(TextConfig, "text", [f"text={text}", f"name={text}"])
    assert (config.text, config.name) == (text, text)


def test_a_text_in_quotes_of_its_own_null_and_one_number_for_a_list(conf):
    (conf / "text.yaml").write_text("defaults: [text_schema, _self_]\n")
    assert read_config(TextConfig, "text", ["text='a, b'"]).text == "a, b"
    assert read_config(TextConfig, "text", ["text=null"]).text is None
    assert read_config(TextConfig, "text", ["numbers=3"]).numbers == [3]
    assert read_config(TextConfig, "text", ["numbers=[3,4]"]).numbers == [3, 4]
    assert read_config(TextConfig, "text", ["numbers=null"]).numbers is None


@pytest.mark.parametrize(
    "typed, numbers",
    [("2-4", [2, 3, 4]), ("[1, 3-4]", [1, 3, 4]), ("1,3", [1, 3]), ("[]", []), ("-1", [-1]), ("7-7", [7])],
)
def test_numbers_may_be_typed_as_ranges(conf, typed, numbers):
    (conf / "text.yaml").write_text("defaults: [text_schema, _self_]\n")
    assert read_config(TextConfig, "text", [f"numbers={typed}"]).numbers == numbers


@pytest.mark.parametrize("typed", ["two", "4-2", "[1,x]", "1.5", "[2", "1-999999999"])
def test_what_is_no_list_of_numbers_is_named(conf, typed):
    (conf / "text.yaml").write_text("defaults: [text_schema, _self_]\n")
    with pytest.raises(ValueError, match=r"numbers: expected whole numbers such as 2, .* found") as refused:
        read_config(TextConfig, "text", [f"numbers={typed}"])
    assert repr(typed) in str(refused.value)


def test_a_plain_mapping_takes_any_key_with_a_plus_sign():
    assert read("part.path=x", "+passed_on.devices=2").passed_on == {"devices": 2}


WRONG = {
    "unknown key 'num_stepz' for use_tool; did you mean 'num_steps'?": "num_stepz=3",
    "unknown key 'pth' for use_tool; did you mean 'part.path'?": "pth=x",
    "unknown key 'part.size' for use_tool; did you mean 'part.sizes'?": "part.size=3",
    "unknown key 'wieght' for use_tool; did you mean 'weight'?": "rules=[{wieght: 3}]",
    "unknown key 'num_stepz' for use_tool; did you mean 'num_steps'? ": "+num_stepz=3",
    "unknown key 'part.pathh' for use_tool; did you mean 'part.path'?": "+part.pathh=x",
    "unknown key 'part.colour' for use_tool; known keys: part.path, part.sizes": "++part.colour=red",
    "unknown key 'qqq' for use_tool; known keys: fast, num_steps, part, part.path": "qqq=1",
    "unknown key 'passed_on.devices' for use_tool; +passed_on.devices=... adds": "passed_on.devices=2",
    "num_steps: Value 'many' of type 'str' could not be converted to Integer": "num_steps=many",
    "num_steps: Value '1.5' of type 'float' could not be converted to Integer": "num_steps=1.5",
    "field 'num_steps' is not Optional": "num_steps=null",
    "part.sizes[1]: Value 'x' of type 'str' could not be converted to Integer": "part.sizes=[1,x]",
    "part.sizes: Invalid value assigned: int is not a ListConfig": "part.sizes=3",
    "rule b weighs -1.0, expected 0 or more": "rules=[{name: b, weight: -1}]",
    "part.path=... is missing and has no default (conf/use_tool.yaml)": "part.path=???",
    "Could not find 'rule_set/many', expected one of few, none": "rule_set@_global_=many",
    "Could not override 'rule_set'. Did you mean to override rule_set@_global_?": "rule_set=none",
    "cannot read the argument 'num_steps', expected key=value": "num_steps",
    "unknown key 'verbose' for use_tool": "--verbose",
    "num_steps: Value 'True' of type 'bool'": "--num-steps",
    "cannot read the argument '--num-steps=3', expected key=value": "--num-steps=3",
    "cannot read the argument 'part.path=a (b).mp4', expected key=value; a value": "part.path=a (b).mp4",
    "cannot read the argument 'part.path=~/film', expected key=value": "part.path=~/film",
    "Ambiguous value for argument 'part.path=a,b'; a list is written key=[a,b]": "part.path=a,b",
    "part.path: Interpolation key 'nowhere' not found": "part.path=${nowhere}",
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named_before_anything_runs(use_tool, message):
    never = lambda config: pytest.fail("the command ran")  # noqa: E731
    status, printed, error = use_tool(never, "part.path=x", WRONG[message])
    assert (status, printed) == (1, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message.strip() in error


def test_what_has_no_default_is_asked_for(use_tool):
    status, _, error = use_tool(lambda config: None)
    assert (status, error) == (1, "error: part.path=... is missing and has no default (conf/use_tool.yaml)\n")


def raises(error: Exception) -> Callable[[ToolConfig], None]:
    def main(config: ToolConfig) -> None:
        raise error

    return main


def test_exit_statuses_tell_done_from_wrong_from_stopped(use_tool):
    done = use_tool(lambda config: print(config.part.path), "part.path=x")
    assert done == (0, "x\n", "")
    wrong = use_tool(raises(ValueError("found 3 frames,\n  expected 4")), "part.path=x")
    assert wrong == (1, "", "error: found 3 frames, expected 4\n")
    missing = use_tool(raises(FileNotFoundError(2, "No such file or directory", "a.mp4")), "part.path=x")
    assert missing == (1, "", "error: [Errno 2] No such file or directory: 'a.mp4'\n")
    stopped = use_tool(raises(Stopped("after step 3")), "part.path=x")
    assert stopped == (75, "", "stopped: after step 3\n")
    broken = use_tool(raises(HardwareFault("rank 3 is gone")), "part.path=x")
    assert broken == (69, "", "hardware: rank 3 is gone\n")
    ill = use_tool(raises(Unhealthy("no finite gradient in 3 batches")), "part.path=x")
    assert ill == (70, "", "unhealthy: no finite gradient in 3 batches\n")


VERDICTS = {
    "1 error: found 3 frames, expected 4\n": ValueError("found 3 frames,\nexpected 4"),
    "1 error: KeyError: 'latents'\n": KeyError("latents"),
    "69 hardware: rank 3 is gone\n": HardwareFault("rank 3 is gone"),
    "70 unhealthy: no finite gradient\n": Unhealthy("no finite gradient"),
    "75 stopped: after step 3\n": Stopped("after step 3"),
}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_rank_leaves_its_verdict_for_the_batch_script(use_tool, monkeypatch, tmp_path, verdict):
    monkeypatch.setenv("STORYANCHORS_VERDICTS", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "12")
    with contextlib.suppress(KeyError):
        use_tool(raises(VERDICTS[verdict]), "part.path=x")
    assert (tmp_path / "rank_00012").read_text() == verdict
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("code", "status"), [("import nothing_like_it", 1), ("open('/nowhere')", 69), ("1", 0)]
)
def test_an_error_among_the_imports_leaves_a_verdict(tmp_path, code, status):
    code = f"from conf.verdict import report_crashes; report_crashes(); {code}"
    environ = os.environ | {"STORYANCHORS_VERDICTS": str(tmp_path), "SLURM_PROCID": "3"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environ, capture_output=True, text=True)
    assert ("Traceback" in done.stderr) == bool(status) == bool(done.returncode)
    assert [path.read_text().split()[0] for path in tmp_path.glob("rank_00003")] == [str(status)] * bool(
        status
    )


def test_a_verdict_that_cannot_be_written_does_not_change_the_status(use_tool, monkeypatch, tmp_path):
    monkeypatch.setenv("STORYANCHORS_VERDICTS", str(tmp_path / "nowhere"))
    status, _, error = use_tool(raises(HardwareFault("rank 3 is gone")), "part.path=x")
    assert status == 69 and "cannot write the verdict" in error


def test_our_own_faults_keep_their_traceback(use_tool, monkeypatch):
    with pytest.raises(KeyError):
        use_tool(raises(KeyError("latents")), "part.path=x")
    monkeypatch.setenv("STORYANCHORS_TRACEBACK", "1")
    with pytest.raises(ValueError):
        use_tool(raises(ValueError("mine")), "part.path=x")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_scripts_docstring_and_every_key(use_tool, flag):
    status, printed, _ = use_tool(raises(ValueError("not run")), flag)
    assert status == 0 and printed.startswith(__doc__)
    for key in ("part.path", "part.sizes", "rules", "num_steps", "scale", "fast"):
        assert re.search(rf"^  {re.escape(key)}=", printed, re.MULTILINE)


def test_help_shows_defaults_meanings_and_groups(use_tool):
    lines = [line.split() for line in use_tool(raises(ValueError("not run")), "--help")[1].splitlines()]
    assert ["rule_set@_global_=few", "few", "|", "none"] in lines
    assert ["num_steps=20", "#", "of", "the", "tool"] in lines  # the file's default, not the dataclass's
    assert ["part.path=???"] in lines and ["part.sizes=[1,", "2]"] in lines and ["scale=null"] in lines


def test_of_many_keys_only_the_number_is_said(use_tool, monkeypatch):
    monkeypatch.setattr(command, "MANY_KEYS", 3)
    error = use_tool(lambda config: None, "part.path=x", "qqq=1")[2]
    assert error == "error: unknown key 'qqq' for use_tool; --help lists its 8 keys\n"


def test_reading_settings_writes_nothing(monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    read("part.path=x")
    assert list(elsewhere.iterdir()) == []
