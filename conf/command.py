"""One habit for every command: `key=value` over conf/<name>.yaml, typed by a dataclass, errors in one line.

Exit status: 0 done, 1 the user's error (one line on stderr), 75 stopped on purpose and resumable, 69 a
machine or its network failed, 70 training went wrong, ask a person. `--some-key` is short for some_key=true.
Past `run` there are typed objects, no DictConfig, and nothing is ever instantiated from a name in a file.
"""

import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from conf.verdict import HARDWARE, STOPPED, UNHEALTHY, write_verdict

CONF_DIR = Path(__file__).parent
MANY_KEYS = 12  # too many for one line
MANY_NUMBERS = 10_000  # of a range: more was not meant
Config = TypeVar("Config")
_IS_QUOTED = re.compile(r"""(['"])(?:(?!\1)[^\\]|\\.)*\1""")


class Stopped(Exception):
    """The command stopped on purpose (a signal, a request) and continues when it is started again."""


class HardwareFault(Exception):
    """A machine, its network or another process of the command failed; it may work again later."""


class Unhealthy(Exception):
    """Training itself goes wrong (no finite gradients), and would go wrong again."""


def run(main: Callable[[Config], None], schema: type[Config], name: str) -> None:
    """Calls main with the config that sys.argv describes, and leaves the process with its exit status."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(_help(main, schema, name))
        sys.exit(0)
    try:
        main(read_config(schema, name, arguments))
    except Stopped as stopped:
        _leave(STOPPED, f"stopped: {stopped}")
    except KeyboardInterrupt:
        _leave(STOPPED, "stopped: Ctrl-C")
    except HardwareFault as error:
        _leave(HARDWARE, f"hardware: {error}")
    except Unhealthy as error:
        _leave(UNHEALTHY, f"unhealthy: {error}")
    except (ValueError, OSError) as error:  # what a user can mend; our own faults keep their traceback
        if os.environ.get("STORYANCHORS_TRACEBACK"):
            write_verdict(1, f"error: {error}")
            raise
        _leave(1, f"error: {error}")
    except Exception as error:
        write_verdict(1, f"error: {type(error).__name__}: {error}")
        raise


def _leave(status: int, reason: str) -> NoReturn:
    reason = " ".join(reason.split())
    print(reason, file=sys.stderr, flush=True)
    write_verdict(status, reason)
    sys.exit(status)


def leave_at_once(status: int, reason: str) -> NoReturn:
    """Ends the process from any thread, also while the main one hangs in a collective."""
    print(reason, file=sys.stderr, flush=True)
    write_verdict(status, reason)
    os._exit(status)


def read_config(schema: type[Config], name: str, overrides: list[str]) -> Config:
    """conf/<name>.yaml with overrides, as an object of the dataclass; ValueError for what does not fit it.

    schema.WHERE_MISSING, where there is one, has values for keys that the files leave to the user (???).
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    GlobalHydra.instance().clear()
    overrides = [re.sub(r"^--([a-z][a-z0-9_.-]*)$", _flag, argument) for argument in overrides]
    overrides = [_as_its_field(argument, schema) for argument in overrides]
    with initialize_config_dir(version_base=None, config_dir=str(CONF_DIR)):
        try:
            composed = compose(config_name=name, overrides=overrides)
            for key, value in getattr(schema, "WHERE_MISSING", {}).items():
                if OmegaConf.is_missing(*_place(composed, key)):
                    OmegaConf.update(composed, key, value)
            config = OmegaConf.to_object(composed)
        except MissingMandatoryValue as error:
            key = getattr(error, "full_key", None) or str(error)
            raise ValueError(f"{key}=... is missing and has no default (conf/{name}.yaml)") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(error, name)) from error
    _check_added(config, name)
    return config


def _place(config: DictConfig, key: str) -> tuple[DictConfig, str]:
    section, _, name = key.rpartition(".")
    return OmegaConf.select(config, section), name


def _flag(match: re.Match[str]) -> str:
    """--some-key -> some_key=true."""
    return match[1].replace("-", "_") + "=true"


def _as_its_field(argument: str, schema: type) -> str:
    """A text as it was typed, whatever is in it; numbers as a list: 2, 2-4 and [1,3-5] where one is expected.

    ValueError where a list of numbers is expected, and something else found.
    """
    key, _, value = argument.partition("=")
    kind = {field.name: field.type for field in dataclasses.fields(schema)}.get(key)
    if kind in (str, str | None) and value not in ("", "null") and not _IS_QUOTED.fullmatch(value):
        escaped = re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), value)
        return f"{key}='{escaped}'"
    if kind in (list[int], list[int] | None) and value != "null":
        return f"{key}=[{','.join(map(str, _numbers(key, value)))}]"
    return argument


def _numbers(key: str, text: str) -> list[int]:
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    numbers = []
    for part in inner.split(",") if inner.strip() else []:
        range_ = re.fullmatch(r"\s*(-?\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        first, last = (int(range_[1]), int(range_[2] or range_[1])) if range_ else (1, 0)
        if not first <= last < first + MANY_NUMBERS:
            raise ValueError(f"{key}: expected whole numbers such as 2, [2,3] or 2-4, found {text!r}")
        numbers += range(first, last + 1)
    return numbers


def _check_added(config: Config, name: str, prefix: str = "") -> None:
    """ValueError for a key added with a plus sign: it would become an attribute that nobody reads."""
    fields = {field.name for field in dataclasses.fields(config)}
    for key, value in vars(config).items():
        if key not in fields:
            raise ValueError(_unknown(prefix + key, type(config), name))
        if dataclasses.is_dataclass(value):
            _check_added(value, name, f"{prefix}{key}.")


def _explain(error: Exception, name: str) -> str:
    """Hydra's own words, without its advice, and what would have been right."""
    cause, in_file = error.__cause__, re.match(r"In '(.+?)': ", str(error))
    if in_file:  # what stands in a file, not in an argument
        cause, name = error.__context__, f"conf/{in_file[1]}.yaml"
    cause = cause if isinstance(cause, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines()]
    text = " ".join(lines[:1] + [line for line in lines[1:] if line.startswith("Did you mean")])
    full_key = getattr(cause, "full_key", None)
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the argument {error.override!r}, expected key=value; a value of more than letters, "
            "digits and -_./ needs quotes inside the shell's: \"key='value'\""
        )
    if text.startswith("Ambiguous value for argument"):
        return f"{text}; a list is written key=[a,b], a text with a comma \"key='a,b'\""
    if isinstance(error, MissingConfigException) and error.options:
        return f"{text}, expected one of {', '.join(error.options)}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown(full_key, cause.object_type, name)
    return f"{full_key}: {text}" if full_key and full_key not in text else text


def _unknown(full_key: str, owner: type, name: str) -> str:
    """The key's dataclass is its owner; a plain mapping takes any key, but only with a plus sign."""
    section, dot, key = full_key.rpartition(".")
    if not dataclasses.is_dataclass(owner):
        return f"unknown key {full_key!r} for {name}; +{full_key}=... adds a key to {section}"
    keys = {known.rpartition(".")[2]: section + dot + known for known in reversed(_keys(owner))}
    near = difflib.get_close_matches(key, keys, n=1)
    if near:
        hint = f"did you mean {keys[near[0]]!r}?"
    elif len(keys) > MANY_KEYS:
        hint = f"--help lists its {len(keys)} keys"
    else:
        hint = f"known keys: {', '.join(sorted(keys.values()))}"
    return f"unknown key {full_key!r} for {name}; {hint}"


def _keys(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(schema):
        keys.append(prefix + field.name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            keys += _keys(field.type, f"{prefix}{field.name}.")
    return keys


def _help(main: Callable, schema: type, name: str) -> str:
    """The script's docstring, the groups of files in conf/, and every key with its default and meaning."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with initialize_config_dir(version_base=None, config_dir=str(CONF_DIR)):
        defaults = compose(config_name=name)
    in_file = _meanings((CONF_DIR / f"{name}.yaml").read_text(), indent=2)
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), ""]
    if groups := _groups(name):
        lines += ["Groups of keys, files in conf/:", *(f"  {line}" for line in groups), ""]
    lines += [
        f"Keys with their defaults (conf/{name}.yaml; ??? has none):",
        *_described(defaults, schema, in_file),
    ]
    return "\n".join(lines)


def _groups(name: str, at: str = "") -> list[str]:
    """GROUP=DEFAULT   one | of | these, also of the groups that a default's file names in its turn."""
    lines = []
    for entry in OmegaConf.load(CONF_DIR / f"{name}.yaml").get("defaults", []):
        for group, default in entry.items() if OmegaConf.is_dict(entry) else ():
            folder = group.removeprefix("override ").lstrip("/").partition("@")[0]
            options = " | ".join(sorted(path.stem for path in (CONF_DIR / folder).glob("*.yaml")))
            key = group.lstrip("/").replace("@_here_", f"@{at}")
            lines.append(f"{f'{key}={_written(default)}':38}  {options}")
            lines += _groups(f"{folder}/{default}", folder) if default else []
    return lines


def _described(defaults: DictConfig, schema: type, in_file: dict[str, str], prefix: str = "") -> list[str]:
    """KEY=DEFAULT   # MEANING: the comment of its field; of a plain mapping's keys the file's."""
    lines, owners = [], schema.__mro__[-2::-1]
    meanings = _meanings("\n".join(map(inspect.getsource, owners)), indent=4)
    for field in dataclasses.fields(schema):
        value = defaults._get_node(field.name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            lines += _described(value, field.type, in_file, f"{prefix}{field.name}.")
            continue
        keys = [(f"{field.name}.{key}", value[key], in_file.get(key)) for key in _keys_inside(value)]
        for key, default, meaning in keys or [(field.name, value, meanings.get(field.name))]:
            lines.append(f"  {f'{prefix}{key}={_written(default)}':38}  {meaning or ''}".rstrip())
    return lines


def _keys_inside(value: Any) -> list[str]:
    return list(value) if OmegaConf.is_dict(value) else []


def _written(value: Any) -> str:
    """As an argument would say it."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else getattr(value, "_val", value)
    text = plain if isinstance(plain, str) else json.dumps(plain)
    return text.replace('"', "")


def _meanings(text: str, *, indent: int) -> dict[str, str]:
    """The comment in the line of each key that is indented so far."""
    return dict(re.findall(rf"^ {{{indent}}}(\w+): [^#\n]*(# .*)$", text, re.MULTILINE))
