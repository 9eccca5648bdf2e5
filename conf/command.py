"""One habit for every command: `key=value` overrides over conf/<name>.yaml, typed by a dataclass, errors in one line.

Exit status: 0 done, 1 the user's error (one line on stderr), 75 stopped on purpose and resumable.
Past `run` there are typed objects, no DictConfig, and nothing is ever instantiated from a name in a file.
"""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONF_DIR = Path(__file__).parent
STOPPED = 75  # EX_TEMPFAIL: a scheduler may start the same command again
Config = TypeVar("Config")


class Stopped(Exception):
    """The command stopped on purpose (a signal, a request) and continues when it is started again."""


def run(main: Callable[[Config], None], schema: type[Config], name: str) -> None:
    """Calls main with the config that sys.argv describes, and leaves the process with its exit status."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(_help(main, schema, name))
        sys.exit(0)
    try:
        main(read_config(schema, name, arguments))
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    except (ValueError, OSError) as error:  # what a user can mend; anything else is our fault and keeps its traceback
        if os.environ.get("STORYANCHORS_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def read_config(schema: type[Config], name: str, overrides: list[str]) -> Config:
    """conf/<name>.yaml with overrides, as an object of the dataclass; ValueError for what does not fit it."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base=None, config_dir=str(CONF_DIR)):
        try:
            config = compose(config_name=name, overrides=overrides)
            if added := sorted(set(config) - {field.name for field in dataclasses.fields(schema)}):
                raise ValueError(_unknown(added[0], schema, name))  # "+key=value" would be dropped silently
            return OmegaConf.to_object(config)
        except MissingMandatoryValue as error:
            key = getattr(error, "full_key", None) or str(error)
            raise ValueError(f"{key}=... is missing and has no default (conf/{name}.yaml)") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_explain(error, schema, name)) from error


def _explain(error: Exception, schema: type, name: str) -> str:
    """Hydra's own words, without its advice, and the nearest key that exists."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(cause).split("\n")[0].split())
    match = re.search(r"Key '([^']+)' (?:not|is not) in", text)
    if not match:
        full_key = getattr(cause, "full_key", None)
        return f"{full_key}: {text}" if full_key and full_key not in text else text
    return _unknown(match[1], schema, name)


def _unknown(key: str, schema: type, name: str) -> str:
    keys = {key.rsplit(".", 1)[-1]: key for key in _keys(schema)}
    near = difflib.get_close_matches(key, keys, n=1)
    hint = f"did you mean {keys[near[0]]!r}?" if near else f"known keys: {', '.join(sorted(_keys(schema)))}"
    return f"unknown key {key!r} for {name}; {hint}"


def _keys(schema: type, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(schema):
        keys.append(prefix + field.name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            keys += _keys(field.type, f"{prefix}{field.name}.")
    return keys


def _help(main: Callable, schema: type, name: str) -> str:
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", f"Keys (defaults: conf/{name}.yaml):"]
    for key in _keys(schema):
        lines.append(f"  {key}")
    return "\n".join(lines)
