"""What the command lines of all tools share: a mistake is one line, and where something is to be written is
looked at before anything is computed."""

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path

from experiments.algorithms import whole

PICTURES = (".png", ".pdf", ".svg")


def mistake(text: object) -> int:
    """Say it in one line; returns the exit code."""
    print("error:", " ".join(str(text).split()), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """One whose mistakes are a line in the words of the algorithms."""

    def __init__(self, about: str | None = None, **options):
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter} | options
        super().__init__(description=about, **options)

    def error(self, message: str):
        name, _, what = message.removeprefix("argument ").partition(": ")
        what = what.replace("expected one argument", "must be followed by a value")
        self.exit(mistake(f"{name} {what}" if ": must be" in what else f"{name}: {what}"))


def at_least(low: float, read=whole):
    """A reader of such numbers for argparse, which puts the option's name before what is wrong."""

    def number(text: str):
        try:
            value = read(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            kind = "whole number" if read is whole else "number"
            raise argparse.ArgumentTypeError(f"{text}: must be a {kind}, at least {low}")
        return value

    return number


def numbers(text: str) -> list[int]:
    """For argparse: whole numbers with commas between, each once, in order; none of an empty text."""
    try:
        return sorted({whole(part) for part in text.split(",") if part})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be whole numbers with commas between") from None


def needs(*modules: str) -> None:
    """Raises ValueError, which names the extra, for a library that is not there."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"{name}: must be installed: pip install -e '.[bench]'")


def check_output(path: Path | None, option: str) -> None:
    """Raises ValueError if a file cannot be written there or, of a --figure, drawn; touches nothing."""
    if path is None:
        return
    if option == "--figure":
        if path.suffix not in PICTURES:
            raise ValueError(f"{option} {path}: must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(f"{option} {path}: must be left out without matplotlib (extra bench)")
    if path.is_dir():
        raise ValueError(f"{option} {path}: must be a file that can be written, not a folder")
    place = path if path.exists() else path.parent
    while not os.path.lexists(place):
        place = place.parent
    usable = place == path or place.is_dir()
    if not (usable and os.access(place, os.W_OK)):
        raise ValueError(f"{option} {path}: must be a file that can be written: {place} is in the way")
