"""pictures.py: what all pictures promise of colours, bands and legends."""

import numpy as np
import pytest

from experiments.report import summary
from experiments.report.pictures import BESIDE, COLOURS, draw, legend_below, looks_of, pyplot, seeds_of
from experiments.report.reading import Curve

pytest.importorskip("matplotlib")


@pytest.fixture
def panel():
    figure, axes = pyplot().subplots(layout="constrained")
    yield figure, axes
    pyplot().close(figure)


def test_bands_from_three_seeds_on_and_dots_below(panel):
    """Three: a band from the lowest to the highest. Two: every seed a dot. One: a line."""
    _, axes = panel
    draw(axes, [0, 1], [[1, 2, 6], [2, 3, 7]], ("red", "-"), "three")
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_ydata().tolist() == [3, 4]
    assert band.get_paths()[0].get_extents().extents.tolist() == [0, 1, 1, 7]
    draw(axes, [0, 1], [[1, 3], [2, 4]], ("red", "-"), "two")
    assert len(axes.collections) == 1
    assert axes.lines[1].get_ydata().tolist() == [2, 3] and axes.lines[2].get_marker() == "."
    assert sorted(axes.lines[2].get_ydata()) == [1, 2, 3, 4]
    draw(axes, [0, 1], [[1], [2]], ("red", "-"), "one")
    assert len(axes.collections) == 1 and len(axes.lines) == 4


def test_looks_do_not_depend_on_the_order():
    names = ["sac_mve, horizon 10", "sac", "sac_mve, horizon 3"]
    looks = looks_of(names)
    assert looks == looks_of(reversed(names))
    wanted = ["sac", "sac_mve, horizon 3", "sac_mve, horizon 10"]
    assert [looks[name] for name in wanted] == [(colour, "-") for colour in COLOURS[:3]]
    many = looks_of(map(str, range(18)))
    assert len(set(many.values())) == 18 and many["6"] == (COLOURS[0], "--")


@pytest.mark.filterwarnings("ignore:No artists with labels")  # nothing is drawn
def test_a_method_has_one_colour_in_all_tasks_of_a_suite(tmp_path, monkeypatch):
    """Also where another task has more methods."""
    steps, seen = np.array([0.0, 1.0]), []
    values = {"return_mean": np.array([0.0, 1.0])}
    runs = (("a", "ddpg"), ("a", "sac"), ("b", "sac"))
    curves = [Curve("s", task, method, 1, steps, values) for task, method in runs]
    watched = lambda axes, x, y, look, label, *rest: seen.append((label, look))
    monkeypatch.setattr(summary, "draw", watched)
    summary.write_report(curves, tmp_path)
    assert seen == [("ddpg (1 seed)", (COLOURS[0], "-")), *[("sac (1 seed)", (COLOURS[1], "-"))] * 2]


def test_legends_stand_outside_the_panels(panel):
    figure, axes = panel
    axes.plot([0, 1], [0, 1], label="a long name of a method")
    beside = axes.legend(**BESIDE)
    legend_below(figure, 1)
    figure.draw_without_rendering()
    box, (below,) = axes.get_window_extent(), figure.legends
    assert beside.get_window_extent().x0 >= box.x1 and below.get_window_extent().y1 <= box.y0


def test_how_many_seeds():
    assert [seeds_of(n) for n in ([1], [5, 5], [12, 5])] == ["1 seed", "5 seeds", "5–12 seeds"]
