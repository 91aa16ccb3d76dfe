"""How far should one look ahead? The study of Palenicek et al.: expansion by a learned model, by the true
simulator, and along recorded steps, over horizons; and the actor's own objective through the true simulator.

    python -m experiments.studies.horizon_study run --env-id InvertedPendulum-v5 -- --total-timesteps 6000
    python -m experiments.bench.export mine --results results
    python -m experiments.studies.horizon_study plot results/mine/InvertedPendulum-v5 --out study.png

`run` starts whatever is not finished yet and resumes what was cut off (as benchmark.sh does); flags after --
go to every file that has them. H = 0 is sac.py for all of them and runs once per seed. `plot` prints the area
under each learning curve (the mean return over the steps) with a 95 % interval over seeds (Student's t) and
the differences that the claims R1 to R5 speak of, at every horizon (verdicts are docs/claims.md's), and draws
one panel per method, one line per horizon: mean and standard deviation over seeds. Extra `bench`.
"""

import os
import re
import sys
from pathlib import Path

import numpy as np

from experiments.algorithms import has_flag, load, split_flags
from experiments.bench.jobs import plan
from experiments.bench.launch import carry_out
from experiments.report.commands import Parser, mistake
from experiments.report.pictures import (
    clean,
    draw,
    entries_of,
    legend_below,
    looks_of,
    pyplot,
    save,
    seeds_of,
)
from experiments.report.reading import at_common_steps, read_folder

METHODS = {
    "sac_mve": "MVE: learned model",
    "sac_ove": "OVE: true simulator",
    "sac_retrace": "Retrace: no model",
    "actor": "Actor: gradient through the true simulator",  # sac_ove.py, whose critics do not look ahead
}
HORIZONS = [0, 1, 3, 5, 10, 20, 30]
MARGIN = 0.05  # of the largest area: differences smaller than that are called none


def jobs_of(
    methods: list[str], horizons: list[int], env_id: str, seeds: list[str], runs_dir: str, extra: list[str]
):
    """All runs, short horizons first so that one can compare early. Raises ValueError on bad input."""
    jobs, sac, ove = [], load("sac"), load("sac_ove")
    own = lambda module: [w for group in split_flags(extra) if has_flag(module, group[0]) for w in group]
    for horizon in sorted(horizons):
        ahead = [method for method in methods if method != "actor"]
        parts = [(ahead, [*extra, "--horizon", str(horizon)])] if ahead else []
        if "actor" in methods:
            words = ["--horizon", "0", "--actor-horizon", str(horizon)]
            parts.append((["sac_ove"], [*own(ove), *words]))  # a model's flags mean nothing to it
        if horizon == 0:
            parts = [(["sac"], own(sac))]
        for algos, flags in parts:
            jobs += plan(algos, [env_id], seeds, runs_dir, 1, flags)
    return jobs


def read_areas(folder: Path, settings: str = "") -> tuple[dict, dict]:
    """Curves and areas: {(method, horizon): {seed: Curve}} and {.. {seed: mean return over the steps, up to
    the last that all have}}, the area of claims and reports.

    `settings` are those beside the horizon, as in "gamma 0.95"; sac.py's runs need the same. Raises
    ValueError if there are no such runs, or one without an evaluation after step 0.
    """
    curves, others = {}, set()
    for name, found in read_folder(folder).items():
        runs = {curve.seed: curve for curve in found}
        method, _, rest = name.partition(", ")
        if acts := re.fullmatch(r"horizon 0, (?:(.*), )?actor_horizon (\d+)(.*)", rest):
            method, rest = "actor", f"horizon {acts[2]}{f', {acts[1]}' * bool(acts[1])}{acts[3]}"
        found = re.fullmatch(r"horizon (\d+)(?:, (.*))?", rest)
        horizon, rest = (int(found[1]), found[2] or "") if found else (0, rest)
        if method not in METHODS and method != "sac":
            continue
        if rest != settings:
            others.add(rest)
        elif horizon == 0:  # the same run to the bit, whichever file made it
            curves |= {(m, 0): curves.get((m, 0), {}) | runs for m in METHODS}
        else:
            curves[method, horizon] = runs
    present = {method for method, horizon in curves if horizon}
    curves = {key: runs for key, runs in sorted(curves.items()) if key[0] in present}
    if not curves:
        hint = f" for --settings {settings!r}; there are {sorted(others)}" if others or settings else ""
        raise ValueError(f"{folder}: must hold <algorithm>/horizon-<H>/<seed>.csv{hint}")
    if (end := min(curve.steps[-1] for runs in curves.values() for curve in runs.values())) <= 0:
        raise ValueError(f"{folder}: every run must have an evaluation after step 0")
    area = lambda curve: curve.upto(end).area()
    return curves, {key: {seed: area(c) for seed, c in runs.items()} for key, runs in curves.items()}


def read_several(folders: list[Path], settings: str = "") -> tuple[dict, dict]:
    """Those of several folders, each method beside its own folder's H = 0. ValueError for doubles."""
    curves, areas = {}, {}
    for folder in folders:
        found = read_areas(folder, settings)
        if twice := sorted({method for method, _ in curves} & {method for method, _ in found[0]}):
            raise ValueError(f"{folder}: must have other methods than the folders before: {twice[0]}")
        curves, areas = curves | found[0], areas | found[1]
    return curves, areas


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval by Student's t; NaN for one value."""
    from experiments.report.stats import mean_interval

    mean, _, high = mean_interval(values)
    return mean, high - mean


def paired(areas: dict, terms: list[tuple[float, tuple[str, int]]]) -> list[float]:
    """Per seed, the weighted sum of areas; seeds that all terms have."""
    if not all(key in areas for _, key in terms):
        return []
    seeds = set.intersection(*(set(areas[key]) for _, key in terms))
    return [sum(weight * areas[key][seed] for weight, key in terms) for seed in sorted(seeds)]


def report(areas: dict) -> str:
    """Areas and the claims' differences as Markdown."""
    horizons = sorted({horizon for _, horizon in areas})
    lines = [
        "| method | " + " | ".join(f"H = {h}" for h in horizons) + " |",
        "|---" * (len(horizons) + 1) + "|",
    ]
    for method in [m for m in METHODS if any(key[0] == m for key in areas)]:
        cells = [
            interval(list(areas[method, h].values())) if (method, h) in areas else None for h in horizons
        ]
        cells = ["" if cell is None else f"{cell[0]:.0f} ± {cell[1]:.0f}" for cell in cells]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    margin = MARGIN * max(abs(interval(list(runs.values()))[0]) for runs in areas.values())
    lines += [
        "",
        f"ε = {margin:.0f}, {MARGIN:.0%} of the largest area. Intervals are not corrected for their number.",
        "",
    ]
    lines += ["| claim | difference of areas | mean and 95 % interval | verdict |", "|---|---|---|---|"]
    for claim, terms in questions():
        values = paired(areas, terms)
        if len(values) < 2:
            continue
        mean, half = interval(values)
        text = " ".join(
            f"{'−' if w < 0 else '+'} {m.removeprefix('sac_').upper()}({h})" for w, (m, h) in terms
        )
        cells = (claim, text.removeprefix("+ "), f"{mean:.0f} ± {half:.0f}", verdict(mean, half, margin))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(mean: float, half: float, margin: float) -> str:
    """What an interval mean ± half allows to say: a sign, no difference beyond the margin, or nothing."""
    if abs(mean) > half:
        return "above zero" if mean > 0 else "below zero"
    return "no difference beyond ε" if abs(mean) + half <= margin else "undecided"


def questions() -> list[tuple[str, list[tuple[float, tuple[str, int]]]]]:
    """What the claims in docs/when_to_trust_your_model.md compare: (claim, weighted sum of areas)."""
    ove, mve, retrace = (lambda h, m=m: (m, h) for m in ("sac_ove", "sac_mve", "sac_retrace"))
    found = [("R1: a perfect model helps", [(1, ove(h)), (-1, ove(0))]) for h in HORIZONS[1:]]
    shrinking = [(1, ove(5)), (-1, ove(1)), (-1, ove(30)), (1, ove(20))]
    found.append(("R1: the gain shrinks", shrinking))
    found += [("R3: short H, model error costs nothing", [(1, ove(h)), (-1, mve(h))]) for h in (1, 3, 5)]
    found += [("R2: long H, model error costs", [(1, ove(h)), (-1, mve(h))]) for h in (10, 20, 30)]
    found += [("R4: Retrace is on par with MVE", [(1, retrace(h)), (-1, mve(h))]) for h in HORIZONS[1:]]
    actor = lambda h: ("actor", h)
    found += [("R5: short H helps the actor", [(1, actor(h)), (-1, actor(0))]) for h in (1, 3, 5)]
    found += [("R5: long H harms it", [(1, actor(h)), (-1, actor(3))]) for h in (10, 20)]
    return found


def plot(curves: dict, title: str, out: Path) -> None:
    """One panel per method, one line per horizon: mean over seeds, and from three on the deviation."""
    methods = [method for method in METHODS if any(key[0] == method for key in curves)]
    horizons = sorted({horizon for _, horizon in curves})
    plt, shades = pyplot(), np.linspace(0, 0.92, len(horizons))
    colours = dict(zip(horizons, plt.get_cmap("viridis")(shades), strict=True))
    size = {"figsize": (6.4, 2.6 * len(methods)), "layout": "constrained", "squeeze": False}
    figure, panels = plt.subplots(len(methods), 1, sharex=True, sharey=True, **size)
    deviation = lambda found: tuple(np.mean(found) + side * np.std(found, ddof=1) for side in (0, -1, 1))
    for method, axes in zip(methods, panels[:, 0], strict=True):
        for horizon in horizons:
            if runs := curves.get((method, horizon)):
                steps, values = at_common_steps(list(runs.values()))
                draw(axes, steps, values, (colours[horizon], "-"), f"H = {horizon}", deviation)
        axes.set(title=METHODS[method], ylabel="return")
        clean(axes)
    panels[-1, 0].set(xlabel="environment steps")
    seeds = seeds_of(len(runs) for runs in curves.values())
    figure.suptitle(f"{title}, mean and standard deviation over {seeds}", fontsize=11)
    lines, shown = entries_of(figure), [f"H = {horizon}" for horizon in horizons]
    figure.legend([lines[label] for label in shown], shown, loc="outside right center", frameon=False)
    save(figure, out)


def plot_areas(areas: dict, title: str, out: Path) -> None:
    """How far each method should look ahead: area over H, mean and 95 % interval (Student's t), on an axis
    that shows the areas there are."""
    from experiments.report.stats import mean_interval

    methods = [method for method in METHODS if any(key[0] == method for key in areas)]
    figure, axes = pyplot().subplots(figsize=(6.4, 3.8), layout="constrained")
    looks, at = looks_of(METHODS), {h: k for k, h in enumerate(sorted({h for _, h in areas}))}
    for method in methods:
        horizons = [h for h in at if (method, h) in areas]
        values, places = [list(areas[method, h].values()) for h in horizons], [at[h] for h in horizons]
        label = f"{METHODS[method]} ({seeds_of(map(len, values))})"
        draw(axes, places, values, looks[method], label, mean_interval, marker="o")
    axes.set_xticks(list(at.values()), list(map(str, at)))
    seen = [area for seeds in areas.values() for area in seeds.values()]
    axes.set(title=title, xlabel="horizon H", ylabel="mean return while learning")
    axes.set_ylim(min(seen) - 0.05 * np.ptp(seen), max(seen) + 0.05 * np.ptp(seen))
    clean(axes)
    legend_below(figure, 2)
    save(figure, out)


def main() -> int:
    parser = Parser(__doc__)
    split = lambda text: list(dict.fromkeys(part for part in text.split(",") if part))
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--env-id", default="InvertedPendulum-v5")
    runner.add_argument("--methods", type=split, default=list(METHODS), help=f"of {','.join(METHODS)}")
    runner.add_argument("--horizons", type=split, default=[str(h) for h in HORIZONS])
    runner.add_argument("--seeds", type=split, default=["1", "2", "3"])
    runner.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    runner.add_argument("--runs-dir", default="runs")
    runner.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    runner.add_argument("extra", nargs="*", metavar="-- FLAGS", help="for every file")
    drawer = commands.add_parser("plot")
    drawer.add_argument("folders", type=Path, nargs="+", help="<folder of exported runs>/<task>, or several")
    drawer.add_argument("--settings", default="", help='beside the horizon, as in "gamma 0.95"')
    drawer.add_argument("--out", type=Path, help="picture of the curves")
    drawer.add_argument(
        "--areas", type=Path, help="picture of the areas over H; without either, tables alone"
    )
    drawer.add_argument("--title", help="of the pictures (default: the folder's name)")
    args = parser.parse_args()
    try:
        if args.command == "plot":
            curves, areas = read_several(args.folders, args.settings)
        else:
            if unknown := set(args.methods) - set(METHODS):
                raise ValueError(f"--methods {unknown.pop()}: must be of {', '.join(METHODS)}")
            if bad := [h for h in args.horizons if not h.isdecimal()]:
                raise ValueError(f"--horizons {bad[0]}: must be natural numbers, comma-separated")
            for name in ("methods", "horizons", "seeds"):
                if not getattr(args, name):
                    raise ValueError(f"--{name}: must not be empty")
            if args.workers < 1:
                raise ValueError(f"--workers {args.workers}: must be at least 1")
            runs_dir, horizons = str(Path(args.runs_dir).resolve()), [int(h) for h in args.horizons]
            jobs = jobs_of(args.methods, horizons, args.env_id, args.seeds, runs_dir, args.extra)
        if args.command == "run":
            return carry_out(jobs, runs_dir, args.workers, args.dry_run)
        print(report(areas))
        title = args.title or args.folders[0].name
        if args.out:
            plot(curves, title, args.out)
        if args.areas:
            plot_areas(areas, title, args.areas)
    except (ValueError, OSError, ImportError) as error:
        return mistake(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
