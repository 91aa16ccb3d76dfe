"""What all pictures share: colours, bands, legends beside the curves. Extra `bench`."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.report.reading import in_order

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9".split()  # Okabe and Ito: safe for all eyes
BAND_SEEDS = 3  # seeds from which a band says anything; below, every seed is a dot
BESIDE = {"frameon": False, "fontsize": 7, "loc": "center left", "bbox_to_anchor": (1, 0.5)}  # of a legend


def pyplot():
    """Matplotlib's, which opens no window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def looks_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, line) of each name: solid lines in all colours, then dashed, dotted, and again."""
    looks = itertools.cycle((colour, line) for line in ("-", "--", ":") for colour in COLOURS)
    return dict(zip(in_order(names), looks, strict=False))


def extremes(values) -> tuple[float, float, float]:
    """Mean, lowest and highest."""
    return float(np.mean(values)), min(values), max(values)


def seeds_of(counts: Iterable[int]) -> str:
    """How many, in words: 5 seeds, 3–5 seeds."""
    few, many = min(counts := list(counts)), max(counts)
    return f"{few}{f'–{many}' * (many > few)} seed{'s' * (many > 1)}"


def draw(axes, steps, values, look: tuple[str, str], label: str, ends=extremes, **line) -> None:
    """The mean over seeds of values [steps][seeds], and how far they reach: a band by ends(values) -> mean,
    low, high; of fewer than BAND_SEEDS seeds every one as a dot."""
    colour, dashes = look
    axes.plot(steps, [np.mean(v) for v in values], dashes, color=colour, label=label, **line)
    if min(map(len, values)) >= BAND_SEEDS:
        low, high = np.array([ends(v)[1:] for v in values]).T
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    elif max(map(len, values)) > 1:
        points = [(step, x) for step, v in zip(steps, values, strict=True) for x in v]
        axes.plot(*np.array(points).T, ".", color=colour, ms=3, alpha=0.7)


def clean(axes) -> None:
    """A grid, and no lines above and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def entries_of(figure) -> dict[str, object]:
    """{label: line} of all panels, for one legend."""
    return {label: line for axes in figure.axes
            for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip


def legend_below(figure, columns: int) -> None:
    """One legend for all panels, under them."""
    shown = entries_of(figure)
    place = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
    figure.legend(shown.values(), shown, ncols=columns, **place)


def save(figure, out: Path) -> None:
    """Write the picture and forget it. Raises OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    pyplot().close(figure)
