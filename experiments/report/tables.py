"""Tables of numbers as CSV files, written whole: a study that is cut off leaves the rows that it has."""

import csv
from collections.abc import Iterable
from pathlib import Path


def read_table(path: Path, fields: list[str], option: str = "--csv") -> list[dict]:
    """The rows, as text, of a table that is to grow; [] if there is none yet. Raises ValueError for one that
    has other columns."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != fields:
        raise ValueError(f"{option} {path}: must be a table of this script, or not exist")
    return rows


def write_table(path: Path, fields: Iterable[str], rows: Iterable[dict]) -> None:
    """All rows, in the place of the file that was there, in a new folder if there is none. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    special = path.exists() and not path.is_file()  # /dev/stdout, which nothing may replace
    place = path if special else path.with_suffix(".tmp")
    with open(place, "w", newline="") as file:
        writer = csv.DictWriter(file, list(fields))
        writer.writeheader()
        writer.writerows(rows)
    if not special:
        place.replace(path)
