"""Every figure of the pages, drawn again from the data in docs/results/.

    python -m experiments.figures                                # all of docs/figures/, a minute
    python -m experiments.figures td3_HalfCheetah-v5.png steve_toy.png

What is drawn from a run itself, and not from a table, is made where its page says: BY_HAND. Extra `bench`.
"""

import csv
import functools
import math
import sys
from pathlib import Path

import numpy as np

from experiments.algorithms import ROOT
from experiments.report import curves, pictures, summary
from experiments.report.commands import Parser, mistake
from experiments.report.pictures import looks_of
from experiments.report.reading import RESULTS, at_common_steps, grouped, read_all
from experiments.studies import (
    gps_local_models,
    horizon_study,
    iter_vaml,
    model_error,
    steve_toy,
    target_error,
    vaml_artificial,
    vaml_frozen,
)

FIGURES = ROOT / "docs" / "figures"
BY_HAND = "cheetah.gif compounding_error.png pilco_predictions.png".split()
CURVES = {  # picture: (title, folders of docs/results/)
    "HalfCheetah-v5": ("HalfCheetah-v5", "foundation/HalfCheetah-v5"),
    "Hopper-v5": ("Hopper-v5", "foundation/Hopper-v5"),
    "InvertedPendulum-v5": ("InvertedPendulum-v5", "foundation/InvertedPendulum-v5"),
    "Swimmer-v5": ("Swimmer-v5", "foundation/Swimmer-v5"),
    "ddpg_mve_cheetah": ("mve/HalfCheetah-v0", "ddpg-mve/experiments.tasks-mve-HalfCheetah-v0"),
    "ddpg_mve_walker": ("mve/Walker2d-v0", "ddpg-mve/experiments.tasks-mve-Walker2d-v0"),
    "dreamer_masked": (
        "InvertedPendulum without velocities",
        "dreamer/experiments.tasks-masked-InvertedPendulum-v0",
    ),
    "fetch_push": ("FetchPush-v4", "mve-min-fetch/FetchPush-v4"),
    "gradients_InvertedPendulum-v5": (
        "InvertedPendulum-v5",
        "actor-oracle/InvertedPendulum-v5/sac/default gradients/InvertedPendulum-v5"
        " svg-paths/InvertedPendulum-v5/svg/horizon-1"
        " maac/InvertedPendulum-v5/maac/horizon-0__updates_per_step-4"
        " maac/InvertedPendulum-v5/maac/horizon-3__updates_per_step-4"
        " dreamer/InvertedPendulum-v5/dreamer/horizon-10",
    ),
    "maac_InvertedPendulum-v5": (
        "InvertedPendulum-v5",
        "maac/InvertedPendulum-v5/maac/horizon-0__updates_per_step-4"
        " maac/InvertedPendulum-v5/maac/horizon-3__updates_per_step-4",
    ),
    "mage_Pusher-v5": ("Pusher-v5", "mage/Pusher-v5"),
    "mbpo_Hopper-v5": ("Hopper-v5", "mbpo/Hopper-v5"),
    "mbpo_InvertedPendulum-v5": ("InvertedPendulum-v5", "mbpo/InvertedPendulum-v5"),
    "me_trpo_InvertedPendulum-v5": ("InvertedPendulum-v5", "me-trpo/InvertedPendulum-v5"),
    "me_trpo_Pendulum-v1": ("Pendulum-v1", "me-trpo/Pendulum-v1"),
    "pets_CartPole": ("pets/CartPole-v0", "pets/experiments.tasks-pets-CartPole-v0"),
    "pilco_CartPole": ("pilco/CartPole-v0", "pilco/experiments.tasks-pilco-CartPole-v0"),
    "pilco_InvertedPendulum-v5": ("InvertedPendulum-v5", "pilco/InvertedPendulum-v5"),
    "planners_InvertedPendulum-v5": (
        "InvertedPendulum-v5",
        "pets/InvertedPendulum-v5 poplin/InvertedPendulum-v5"
        " me-trpo/InvertedPendulum-v5/me_trpo/horizon-200__collect_steps-200",
    ),
    "poplin_CartPole": ("pets/CartPole-v0", "poplin/experiments.tasks-pets-CartPole-v0"),
    "svg_InvertedPendulum-v5": ("InvertedPendulum-v5", "svg-paths/InvertedPendulum-v5"),
    "td3_HalfCheetah-v5": ("HalfCheetah-v5", "td3/HalfCheetah-v5"),
    "vaml_InvertedPendulum-v5": ("InvertedPendulum-v5", "vaml/InvertedPendulum-v5"),
    "vaml_Pusher-v5": ("Pusher-v5", "vaml/Pusher-v5"),
    "vaml_samples": ("InvertedPendulum-v5", "vaml-samples/InvertedPendulum-v5"),
}


def texts_of(name: str) -> list[dict]:
    """A table of docs/results/ as it stands there."""
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(name: str) -> list[dict]:
    """The same, its numbers as numbers."""
    return [{key: value_of(text) for key, text in row.items()} for row in texts_of(name)]


def value_of(text: str) -> float | int | str:
    """A number where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def draw_curves(name: str, out: Path) -> None:
    """Curves of one or several folders."""
    title, folders = CURVES[name]
    curves.plot(curves.read([RESULTS / folder for folder in folders.split()]), title, out)


def draw_suite(suite: str, task: str, out: Path) -> None:
    """As the report of a suite has it."""
    methods = grouped(read_all(None, RESULTS, [suite]))[suite, task]
    summary.plot_curves(task, methods, looks_of(methods), out)


def draw_suite_horizons(suite: str, task: str, out: Path) -> None:
    """Area over H, as the report of a suite has it."""
    methods = grouped(read_all(None, RESULTS, [suite]))[suite, task]
    summary.plot_horizons(task, summary.horizons(methods), out)


def draw_horizon_study(out: Path) -> None:
    """Learning curves at every H, a panel for each way to look ahead."""
    found, _ = horizon_study.read_areas(RESULTS / "horizon" / "InvertedPendulum-v5")
    horizon_study.plot(found, "InvertedPendulum-v5", out)


def draw_areas(out: Path) -> None:
    """Four ways to look ahead, side by side."""
    folders = [RESULTS / suite / "InvertedPendulum-v5" for suite in ("horizon", "actor-oracle")]
    _, areas = horizon_study.read_several(folders)
    horizon_study.plot_areas(areas, "InvertedPendulum-v5, 6 000 steps: how far to look ahead?", out)


def draw_chain(table: str, out: Path) -> None:
    """Errors on the chain, [trials, steps] of each method."""
    rows = rows_of(table)
    steps = sorted({row["step"] for row in rows})
    errors: dict[str, list] = {}
    for row in rows:
        errors.setdefault(row["method"], []).append(row["error"])
    found = {method: np.reshape(values, (-1, len(steps))) for method, values in errors.items()}
    steve_toy.plot(found, steps[1] - steps[0], out)


def draw_errors(folder: str, task: str, out: Path) -> None:
    """target_error.py's; an empty cell is no number."""
    rows = [{k: math.nan if x == "" else x for k, x in row.items()}
            for row in rows_of(f"{folder}/{task}__sac_mve__1.csv")]  # fmt: skip
    target_error.plot(rows, task, out)


def draw_model_error(out: Path) -> None:
    """Error of two models over the size of the replay."""
    rows = rows_of("model_error/HalfCheetah-v5.csv")
    model_error.plot(rows, f"HalfCheetah-v5: {rows[0]['horizon']}-step prediction", out)


def draw_standard(out: Path) -> None:
    """SAC and TD3 on three standard tasks, with what TD3's authors published of the tasks' first version."""
    figure, panels = pictures.pyplot().subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    looks = pictures.looks_of(("sac", "td3", paper := "td3, the paper's settings"))
    authors = rows_of("gpu-td3/authors.csv")
    for axes, task in zip(panels, ("HalfCheetah", "Hopper", "Walker2d"), strict=True):
        folders = [RESULTS / suite / f"{task}-v5" for suite in ("gpu-sac", "gpu-td3")]
        for method, runs in curves.read(folders).items():
            name = method if method in looks else paper
            label = f"{name} ({pictures.seeds_of([len(runs)])})"
            pictures.draw(axes, *at_common_steps(runs), looks[name], label)
        theirs = [row for row in authors if row["task"] == f"{task}-v1"]
        steps, means, spread = ([row[key] for row in theirs] for key in ("step", "return_mean", "return_std"))
        label = "TD3's authors, paper's settings, v1 (mean ± deviation of 10 seeds)"
        axes.errorbar(steps, means, spread, fmt="k.", lw=1, capsize=2, label=label)
        axes.set(title=f"{task}-v5", xlabel="environment steps")
        axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:.0f}k")
        pictures.clean(axes)
    panels[0].set_ylabel("return (deterministic policy)")
    pictures.legend_below(figure, 3)
    pictures.save(figure, out)


def draw_scalars(out: Path) -> None:
    """What VAML's models were like while they learned."""
    rows = rows_of("vaml/online.csv")
    curves.plot_scalars(rows, [name for name in rows[0] if "/" in name], out)


PICTURES = {f"{name}.png": functools.partial(draw_curves, name) for name in CURVES} | {
    "areas_InvertedPendulum-v5.png": draw_areas,
    "dyna.png": functools.partial(draw_chain, "dyna/chain.csv"),
    "fetch_reach.png": functools.partial(draw_suite, "fetch-reach", "FetchReach-v4"),
    "horizon_InvertedPendulum-v5.png": draw_horizon_study,
    "iter_vaml.png": lambda out: iter_vaml.plot(rows_of("iter_vaml/worlds.csv"), out),
    "local_models.png": lambda out: gps_local_models.plot(rows_of("local_models/pendulum.csv"), out),
    "model_error_HalfCheetah-v5.png": draw_model_error,
    "mve_min_ball.png": functools.partial(draw_suite, "mve-min-ball", "TorqueBall-v0"),
    "mve_min_ball_horizons.png": functools.partial(draw_suite_horizons, "mve-min-ball", "TorqueBall-v0"),
    "quick_InvertedPendulum-v5.png": functools.partial(draw_suite, "quick", "InvertedPendulum-v5"),
    "standard.png": draw_standard,
    "steve_toy.png": functools.partial(draw_chain, "steve_toy/chain.csv"),
    "vaml_artificial.png": lambda out: vaml_artificial.plot(texts_of("vaml/artificial.csv"), out),
    "vaml_frozen_Hopper-v5.png": lambda out: vaml_frozen.plot(texts_of("vaml/frozen.csv"), out),
    "vaml_online.png": draw_scalars,
}
for kind in ("target", "gradient"):
    for task in ("InvertedPendulum-v5", "HalfCheetah-v5"):
        drawing = functools.partial(draw_errors, f"{kind}_error", task)
        PICTURES[f"{kind}_error_{task}.png"] = drawing


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", help="of pictures (default: all)")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder (default: docs/figures)")
    args = parser.parse_args(argv)
    try:
        if unknown := [name for name in args.names if name not in PICTURES]:
            raise ValueError(f"{unknown[0]}: must be one of {', '.join(sorted(PICTURES))}")
        for name in args.names or PICTURES:
            PICTURES[name](args.out / name)
            print(args.out / name, flush=True)
    except (ValueError, OSError, ImportError) as error:
        return mistake(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
