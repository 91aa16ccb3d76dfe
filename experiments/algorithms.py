"""The files of algos/ as modules, and what their command lines know."""

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))


@functools.cache
def load(algo: str):
    """algos/<algo>.py as a module, loaded once, by whomever."""
    path = ROOT / "algos" / f"{algo}.py"
    if getattr(sys.modules.get(algo), "__file__", None) == str(path):
        return sys.modules[algo]
    spec = importlib.util.spec_from_file_location(algo, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[algo] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def parsed(algo: str, flags: tuple[str, ...]):
    """The file's Args for these flags, all but the seed: parsing takes its time."""
    return load(algo).parse(list(flags))


def whole(text: str) -> int:
    """A whole number as the algorithms read it: 1_000 and 1e3 are one. Raises ValueError."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise ValueError(f"{text}: must be a whole number")


def split_flags(extra: list[str]) -> list[list[str]]:
    """["--a", "1", "--b"] -> [["--a", "1"], ["--b"]]. Raises ValueError where a value comes first."""
    groups: list[list[str]] = []
    for word in extra:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(f"{word}: must be a flag, after --")
    return groups


def option_of(word: str) -> str:
    """--env_id=value -> --env-id: the algorithms take both spellings."""
    return word.split("=")[0].replace("_", "-")


def has_flag(module, flag: str) -> bool:
    """Whether the file's Args know --flag, --flag=value or --no-flag."""
    name = option_of(flag).removeprefix("--").replace("-", "_")
    fields = {field.name for field in dataclasses.fields(module.Args)}
    return name in fields or name.removeprefix("no_") in fields


def task_of(env_id: str) -> str:
    """The task's name today: runs of earlier versions have experiments.suites:.. for experiments.tasks:.."""
    return env_id.replace("experiments.suites:", "experiments.tasks:", 1)
