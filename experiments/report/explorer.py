"""The results explorer: every exported run and every claim in one page that needs no network.

    python -m experiments.report.explorer                    # docs/results/ -> site/results.html
    python -m experiments.report.explorer --results results --out mine.html    # your own runs, once exported

Whatever is a number is computed here, by the functions that make report.md and claims.md; the page
(docs/_static/explorer.js) chooses and draws. Final returns and areas compare the methods of one suite and
task at equal steps, the last that all of them have; curves and steps to a level are those of whole runs.
Means and intervals are shown from three seeds on, below that single seeds alone. Extra `bench` or `docs`.
"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

from experiments.algorithms import ROOT
from experiments.report import claims, reading
from experiments.report.claims import ENOUGH, FAILS, FEW, HOLDS, OPEN, curves_of, judge
from experiments.report.commands import Parser, mistake, needs
from experiments.report.pictures import BAND_SEEDS, COLOURS
from experiments.report.reading import RESULTS, at_common_steps, bounds, method_of, number
from experiments.report.stats import contrast, mean_interval
from experiments.report.summary import horizons, panels_of

DOCS = ROOT / "docs"
CLAIMS, STATIC = DOCS / "claims.toml", DOCS / "_static"
MEASURES = {"return_mean": "return", "success_rate": "share of goals reached"}
SAME_AT_ZERO = ("sac sac_mve sac_ove sac_retrace".split(), "ddpg ddpg_mve".split())  # one learner, in bits
AGAINST = {HOLDS: "better than H = 0", FAILS: "worse than H = 0", OPEN: "undecided", FEW: FEW}
PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Farsight: results</title>
<style>{style}</style>
<body class="alone"><main><h1>Results</h1><div id="explorer"></div></main>
<script>{plot}</script>
<script>{data}</script>
<script>{script}</script>
"""


def short(value: float) -> int | float | None:
    """Five digits, enough for a screen; None for what is not finite."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded == int(rounded) else rounded


def shorts(values) -> list:
    return [short(float(value)) for value in values]


def of_measure(curves: list, column: str) -> list:
    """The curves as if `column` were their return, so that every function of report/ serves for it."""
    return [dataclasses.replace(c, values={"return_mean": c.values[column]}) for c in curves]


def levels_of(task: str, column: str, curves: list) -> list[tuple[str, float]]:
    """(text, level) to ask the steps for: shares of the published return where there is one, and about ten
    round numbers between the lowest and the highest evaluation."""
    scale = reading.normalisers().get(task) if column == "return_mean" else None
    found = []
    for share in reading.LEVELS if scale else ():
        level = scale["random"] + share * (scale["reference"] - scale["random"])
        found.append((f"{number(level)}, {share:.0%} of the published return", level))
    low = min(curve.values["return_mean"].min() for curve in curves)
    high = max(curve.values["return_mean"].max() for curve in curves)
    if high > low:
        power = 10 ** math.floor(math.log10((high - low) / 10))
        step = next(k * power for k in (1, 2, 5, 10) if k * power * 10 >= high - low)
        levels = [k * step for k in range(math.floor(low / step) + 1, math.floor(high / step) + 1)]
        found += [(number(level), level) for level in levels]
    return found


def summary(values: list[float]) -> dict:
    """Of one number per seed: the numbers, and from three on their mean with its 95 % interval."""
    found = {"values": shorts(values), "text": reading.spread(values)}
    if len(values) >= BAND_SEEDS:
        mean, low, high = mean_interval(values)
        found |= {"mean": short(mean), "low": short(low), "high": short(high), "bounds": bounds(low, high)}
    return found


def measured(curves: list, equal: list, levels: list[tuple[str, float]]) -> dict:
    """What the page shows of a method: curves of the whole runs, numbers of those cut to equal steps."""
    steps, values = at_common_steps(curves)
    found = {
        "steps": shorts(steps),
        "seeds": [curve.seed for curve in curves],
        "end": short(equal[0].steps[-1]),
    }
    found["runs"] = [shorts(curve.values["return_mean"]) for curve in curves]
    if any(len(curve.steps) > len(steps) for curve in curves):
        found["run_steps"] = [shorts(curve.steps) for curve in curves]
    if len(curves) >= BAND_SEEDS:
        names = ("mean", "low", "high")
        found |= dict(zip(names, map(shorts, zip(*map(mean_interval, values), strict=True)), strict=True))
    found["final"] = summary([curve.final() for curve in equal])
    found["area"] = summary([curve.area() for curve in equal])
    reach = lambda level: shorts(curve.reaches(level) for curve in curves)
    found["reach"] = [
        {"text": reading.steps_to(curves, level), "values": reach(level)} for _, level in levels
    ]
    return found


def with_names(methods: dict[str, list]) -> dict[str, list]:
    """Runs under every name they have: a file's horizon 0 is its parent, which a study runs once; model_steps
    as many as the horizon are the default, and without a horizon there is no model."""
    found = dict(methods)
    for family in SAME_AT_ZERO:
        names = [family[0], *(f"{algo}, horizon 0" for algo in family[1:])]
        for zero in (methods[name] for name in names if name in methods):
            for name in names[1:]:
                found.setdefault(name, zero)
    for name in methods:
        if match := re.fullmatch(r"(\w+), horizon \d+(, model_steps (\d+).*)", name):
            algo, rest, steps = match.groups()
            for h in (0, steps):
                if plain := methods.get(f"{algo}, horizon {h}{rest.removeprefix(f', model_steps {steps}')}"):
                    found.setdefault(f"{algo}, horizon {h}{rest}", plain)
    return found


def horizon_study(areas: dict[int, list[float]]) -> dict:
    """Which H, and how sure: every H against none, and the best mean against all others."""
    order = sorted(areas)
    best = max(order, key=lambda h: sum(areas[h]) / len(areas[h]))
    rows = []
    for h in order:
        row = {"horizon": h, "seeds": len(areas[h])} | summary(areas[h])
        if h and 0 in areas:
            difference, low, high = contrast([(1, areas[h]), (-1, areas[0])])
            enough = min(len(areas[h]), len(areas[0])) >= ENOUGH
            verdict = judge(low, high, "above") if enough else FEW
            row |= {
                "difference": f"{number(difference)} {bounds(low, high)}".strip(),
                "verdict": AGAINST[verdict],
            }
        rows.append(row)
    fewest = min(map(len, areas.values()))
    tied = [h for h in order if h != best and beats(areas[best], areas[h]) != HOLDS]
    others = ", ".join(map(str, tied))
    sure = (
        f"95 % intervals do not tell it from H = {others}" if tied else "better than every other H measured"
    )
    if fewest < ENOUGH:
        sure = f"{FEW} to be sure ({fewest}; {ENOUGH} decide)" + (f"; {sure}" if tied else "")
    return {"rows": rows, "best": best, "answer": f"Highest mean area at H = {best}: {sure}."}


def beats(first: list[float], second: list[float]) -> str:
    return judge(*contrast([(1, first), (-1, second)])[1:], "above")


def asked(case: dict) -> str:
    """What a case's numbers are, in words."""
    kind, _, column = case.get("metric", "area").partition(" of ")
    column = {"": "return", "success": MEASURES["success_rate"]}.get(column, column)
    if kind == "table":
        return f"{case['value']}, mean of each {case['replicate']}"
    if kind == "steps":
        return f"steps until the {column} is {case['level']}"
    if kind == "reaches":
        return f"1 where the {column} is {case['level']} before step {case['before']}"
    return {"area": f"area under the curve of the {column}", "final": f"final {column}"}[kind]


def behind(results: Path, case: dict) -> dict:
    """A case with its verdict and the numbers it rests on, one per seed."""
    finding = claims.decide(results, case)
    found = {"about": finding.about, "verdict": finding.verdict, "asked": asked(case), "seeds": finding.seeds}
    found |= {"expect": case.get("expect", "above"), "terms": []}
    if finding.seeds:
        found |= {"estimate": short(finding.estimate), "low": short(finding.low), "high": short(finding.high)}
        ends = bounds(finding.low, finding.high) or "no interval"
        found |= {"text": f"{number(finding.estimate)} {ends}", "margin": case.get("margin", 0)}
        found["zero"] = case.get("share", case.get("than", 0))
    for term, (weight, values) in zip(case["terms"], claims.groups_of(results, case), strict=True):
        entry = {"weight": weight, "values": shorts(values) if finding.seeds else []}
        if case.get("metric") == "table":
            where = ", ".join(f"{name} {value}" for name, value in term[2].items())
            entry |= {"name": where, "file": term[1]}
        else:
            _, task, algo, settings = term[1].split("/")
            entry |= {"name": method_of(algo, settings), "task": task}
            if curves := curves_of(results, term[1]):
                entry |= {"method": term[1], "seeds": [curve.seed for curve in curves]}
        found["terms"].append(entry)
    return found


def judged(results: Path, path: Path) -> dict:
    """The claims by paper, with their cases."""
    papers, every = claims.read_claims(path)
    found, names = [], ("id", "paper", "statement", "note", "figure", "suite")
    for claim in every:
        cases = claim.get("cases", [])
        verdict = claims.overall([claims.decide(results, case) for case in cases])
        entry = {"source": claims.source_of(claim), "verdict": verdict}
        entry |= {"cases": [behind(results, case) for case in cases]}
        found.append({name: claim[name] for name in names if name in claim} | entry)
    return {"papers": papers, "claims": found}


def numbers_of(task: str, whole: dict, cut: dict) -> tuple[dict, dict]:
    """Of a task: {measure: texts of the levels} and {(suite, method): {measure: what is shown}}; `whole` and
    `cut` have the curves of each (suite, method)."""
    texts, shown = {}, {key: {} for key in whole}
    for column in MEASURES:
        having = [key for key, curves in whole.items() if all(column in curve.values for curve in curves)]
        if not having:
            continue
        full = {key: of_measure(whole[key], column) for key in having}
        levels = levels_of(task, column, [curve for curves in full.values() for curve in curves])
        texts[column] = [text for text, _ in levels]
        for key in having:
            shown[key][column] = measured(full[key], of_measure(cut[key], column), levels)
    return texts, shown


def explored(results: Path, claimed: Path | None) -> dict:
    """All that the page shows. Raises ValueError for damaged files, and where there is no run."""
    groups = reading.grouped(reading.read_all(None, results))
    if not groups:
        raise ValueError(f"{results}: must hold <suite>/<task>/<algorithm>/<settings>/<seed>.csv")
    folders: dict[str, dict] = {}  # of each task, by suite and method
    for path in sorted({path.parent for path in results.glob("*/*/*/*/*.csv")}):
        suite, task, algo, settings = path.relative_to(results).parts
        key = suite, method_of(algo, settings)
        folders.setdefault(task, {})[key] = "/".join((suite, task, algo, settings))
    methods, tasks = {}, {}
    for task, own in sorted(folders.items()):
        whole = {key: curves_of(results, folder) for key, folder in own.items()}
        cut = {(suite, name): groups[suite, task][name] for suite, name in own}
        levels, shown = numbers_of(task, whole, cut)
        tasks[task] = {"levels": levels, "suites": {}, "horizons": {}}
        runs = lambda suite, whole=whole: sum(len(curves) for key, curves in whole.items() if key[0] == suite)
        for suite in sorted({suite for suite, _ in own}, key=runs, reverse=True):
            equal = groups[suite, task]
            order = [name for panel in panels_of(equal) for name in panel]
            tasks[task]["suites"][suite] = [own[suite, name] for name in order]
            for name in order:
                entry = {"name": name, "suite": suite, "task": task, "measures": shown[suite, name]}
                methods[own[suite, name]] = entry
            if studies := horizons(with_names(equal)):
                end = max(curve.steps[-1] for curves in equal.values() for curve in curves)
                found = {name: horizon_study(areas) for name, areas in studies.items()}
                tasks[task]["horizons"][suite] = {"end": short(end), "studies": found}
    found = {"measures": MEASURES, "colours": COLOURS, "shown": BAND_SEEDS}
    found |= {"tasks": tasks, "methods": methods}
    return found | (judged(results, claimed) if claimed else {"papers": {}, "claims": []})


def script(found: dict) -> str:
    """The data as a script: a page opened from a disk may load one, but no JSON."""
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return "window.FARSIGHT = " + text.replace("</", "<\\/") + ";\n"


def page(found: dict) -> str:
    """All in one file."""
    read = lambda name: (STATIC / name).read_text(encoding="utf-8")
    parts = {
        "style": read("uplot/uPlot.min.css") + read("explorer.css"),
        "plot": read("uplot/uPlot.iife.min.js"),
    }
    return PAGE.format(data=script(found), script=read("explorer.js"), **parts)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="exported runs (default: docs/results)")
    parser.add_argument("--claims", type=Path, help="(default: docs/claims.toml for docs/results, else none)")
    parser.add_argument("--out", type=Path, default=Path("site/results.html"), help="page to write")
    args = parser.parse_args()
    try:
        needs("scipy")
        claimed = args.claims or (CLAIMS if args.results.resolve() == RESULTS else None)
        text = page(explored(args.results, claimed))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        return mistake(error)
    print(f"{args.out}: {len(text.encode()) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
