"""A verdict for every claim of the papers, from the committed results alone.

    python -m experiments.report.claims           # docs/claims.toml, results/ -> docs/claims.md, README.md
    python -m experiments.report.claims --check   # exit 1 if these two are not what the data say

A claim has cases. A case compares means over seeds: Σ weight · mean, with the 95 % interval of Welch and
Satterthwaite; or it asks for the share of seeds that reach a return before a step, or of a table's replicates
that have a 1, with Wilson's interval. It holds if the interval lies on the claimed side (of zero, `than` or
the share), does not hold if it lies on the other, and is undecided otherwise; a claim of no difference holds
if the interval lies within the margin. Fewer than five seeds decide nothing. A claim holds if all its cases
do, and does not if one does not. `ours = true` says that no paper makes the claim, `looked` what was done to
it when data were there already. Extra `bench`.
"""

import csv
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

from experiments.algorithms import ROOT
from experiments.report.commands import Parser, mistake, needs
from experiments.report.reading import bounds, method_of, number, read_curve

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ENOUGH = 5
HOLDS, FAILS, OPEN, FEW, NONE = "holds", "does not hold", "undecided", "too few seeds", "not measured"
INTRODUCTION = """\
Made by `python -m experiments.report.claims` from [`claims.toml`](claims.toml) and [`results/`](results),
never by hand. A case is decided by the 95 % interval of a difference of means over seeds (Welch), or of a
share of seeds (Wilson), and by no fewer than five seeds; a claim holds if all its cases do. Intervals are not
corrected for their number (below). Unless a case says otherwise its numbers are areas under learning curves:
mean return over the steps."""
SUMMARY = re.compile(r"^\d+ claims: .*$", re.M)
CLAIM = {"id", "paper", "source", "statement", "suite", "note", "figure", "cases", "ours", "looked"}
CASE = {"about", "metric", "terms", "expect", "margin", "share", "level", "before"}
CASE |= {"value", "replicate", "never", "than"}
KINDS = {  # of metrics, and what each needs beside its terms
    "area": set(),
    "final": set(),
    "steps": {"level", "never"},
    "reaches": {"level", "before", "share"},
    "table": {"value", "replicate"},
}
COLUMNS = {"": "return_mean", "return": "return_mean", "success": "success_rate"}
LOOKED = {  # what a claim says of itself if it is not as it was before there were data
    "added": "added after looking at the data",
    "cases": "its cases chosen after a first look at the data",
    "split": "split in two after looking at the data",
}


@dataclasses.dataclass
class Finding:
    """What the data say of one case."""

    about: str
    verdict: str
    seeds: int
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan


def read_claims(path: Path) -> tuple[dict[str, str], list[dict]]:
    """Papers {key: title} and claims. Raises ValueError for what is not known or missing."""
    try:
        page = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of the encoding, too
        raise ValueError(f"{path}: must be valid TOML: {error}") from None
    papers, claims = page.get("papers"), page.get("claims")
    if not isinstance(papers, dict) or not isinstance(claims, list):
        raise ValueError(f"{path}: must have [papers] and [[claims]]")
    for claim in claims:
        name = f"{path}: claim {claim.get('id', '?')}"
        if unknown := set(claim) - CLAIM:
            raise ValueError(f"{name}: {unknown.pop()}: must be one of {', '.join(sorted(CLAIM))}")
        if missing := {"id", "paper", "source", "statement"} - set(claim):
            raise ValueError(f"{name}: {missing.pop()}: must be given")
        if claim["paper"] not in papers:
            raise ValueError(f"{name}: paper {claim['paper']}: must be one of {', '.join(papers)}")
        if (looked := claim.get("looked", "added")) not in list(LOOKED):
            raise ValueError(f"{name}: looked {looked}: must be one of {', '.join(LOOKED)}")
        for case in claim.get("cases", []):
            check_case(case, name)
    return papers, claims


def check_case(case: dict, name: str) -> None:
    """Raises ValueError, which begins with `name`, for what is unknown, missing or contradictory."""
    if unknown := set(case) - CASE:
        raise ValueError(f"{name}: {unknown.pop()}: must be one of {', '.join(sorted(CASE))}")
    metric = case.get("metric", "area")
    kind, _, column = metric.partition(" of ")
    if kind not in KINDS or column not in COLUMNS:
        raise ValueError(f"{name}: metric {metric}: must be one of {', '.join(KINDS)}, alone or of success")
    if missing := KINDS[kind] - set(case):
        raise ValueError(f"{name}: {missing.pop()}: must be given with metric = {kind}")
    length = 3 if kind == "table" else 2
    terms = case.get("terms")
    if not (
        terms and isinstance(terms, list) and all(isinstance(t, list) and len(t) == length for t in terms)
    ):
        raise ValueError(f"{name}: terms: must be given, each of {length} parts with metric = {kind}")
    if (expect := case.get("expect", "above")) not in ("above", "below", "equal"):
        raise ValueError(f"{name}: expect {expect}: must be above, below or equal")
    if (expect == "equal") != ("margin" in case) or ("share" in case and expect == "equal"):
        raise ValueError(f"{name}: margin: must be given with expect = equal, and only then, not of a share")
    if "share" in case and len(terms) != 1:
        raise ValueError(f"{name}: share: must be of one term, not of {len(terms)}")


def curves_of(results: Path, folder: str) -> list:
    """All curves below results/<suite>/<task>/<algorithm>/<settings>."""
    suite, task, algo, settings = folder.split("/")
    paths = sorted((results / folder).glob("*.csv"))
    return [read_curve(path, suite, task, method_of(algo, settings), path.stem) for path in paths]


def column_of(results: Path, term: list, value: str, replicate: str) -> list[float]:
    """Of a table: mean of `value` for each `replicate`, over the rows that match term[2]."""
    path, where = results / term[1], term[2]
    if not path.exists():
        return []
    found: dict[str, list[float]] = {}
    with open(path, newline="") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            try:
                if all(row[name] == str(wanted) for name, wanted in where.items()):
                    found.setdefault(row[replicate], []).append(float(row[value]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {line}: must have numbers in {value}: {error}") from None
    return [sum(values) / len(values) for values in found.values()]


def groups_of(results: Path, case: dict) -> list[tuple[float, list[float]]]:
    """(weight, one number per seed) for every term; curves are compared at equal steps."""
    metric = case.get("metric", "area")
    if metric == "table":
        return [(t[0], column_of(results, t, case["value"], case["replicate"])) for t in case["terms"]]
    curves = [curves_of(results, term[1]) for term in case["terms"]]
    if not all(curves):
        return [(term[0], [0.0] * len(found)) for term, found in zip(case["terms"], curves, strict=True)]
    end = min(curve.steps[-1] for found in curves for curve in found)
    kind, _, column = metric.partition(" of ")
    column = COLUMNS[column]
    for curve in (curve for found in curves for curve in found):
        if column not in curve.values:
            raise ValueError(f"{case['terms'][0][1]}, seed {curve.seed}: must have a column {column}")
    if kind == "steps":  # of the whole runs
        reach = lambda curve: min(curve.reaches(case["level"], column), case["never"])
        return [(t[0], [reach(c) for c in found]) for t, found in zip(case["terms"], curves, strict=True)]
    measure = {
        "area": lambda curve: curve.upto(end).area(column),
        "final": lambda curve: curve.upto(end).final(column),
        "reaches": lambda curve: float(curve.reaches(case["level"], column) < case["before"]),
    }[kind]
    return [
        (term[0], [measure(curve) for curve in found])
        for term, found in zip(case["terms"], curves, strict=True)
    ]


def judge(low: float, high: float, expect: str, zero: float = 0.0, margin: float = 0.0) -> str:
    """What an interval allows to say: above or below `zero`, or within ± margin of it."""
    if math.isnan(low):
        return OPEN
    if expect == "equal":
        if zero - margin <= low and high <= zero + margin:
            return HOLDS
        return FAILS if low > zero + margin or high < zero - margin else OPEN
    if low <= zero <= high:
        return OPEN
    return HOLDS if (low > zero) == (expect == "above") else FAILS


def decide(results: Path, case: dict) -> Finding:
    """The verdict on one case."""
    from experiments.report.stats import contrast, share_interval

    groups, about = groups_of(results, case), case.get("about", "")
    seeds = min(len(values) for _, values in groups)
    if seeds == 0:
        return Finding(about, NONE, 0)
    expect = case.get("expect", "above")
    if "share" in case:
        ((_, values),) = groups
        found = share_interval(sum(value == 1 for value in values), len(values))
        verdict = judge(*found[1:], expect, case["share"])
    else:
        found = contrast(groups)
        verdict = judge(*found[1:], expect, case.get("than", 0.0), case.get("margin", 0.0))
    return Finding(about, verdict if seeds >= ENOUGH else FEW, seeds, *found)


def overall(findings: list[Finding]) -> str:
    """Of a claim: all cases must hold; one that does not is enough against it."""
    verdicts = [finding.verdict for finding in findings] or [NONE]
    for verdict in (FAILS, NONE, FEW, OPEN):
        if verdict in verdicts:
            return verdict
    return HOLDS


def wrote(finding: Finding) -> str:
    """A case as the page says it."""
    if finding.verdict == NONE:
        return f"{finding.about}: {NONE}"
    ends = bounds(finding.low, finding.high) or "no interval"
    return f"{finding.about}: {number(finding.estimate)} {ends}, n = {finding.seeds}: {finding.verdict}"


def source_of(claim: dict) -> str:
    """Where the claim is from, and what was done to it when data were there already."""
    return "; ".join([claim["source"], *(LOOKED[key] for key in [claim.get("looked")] if key)])


def summary(claims: list[dict], verdicts: list[str]) -> str:
    """How many claims hold, and so on, in words; how many the papers make, and judged of them."""
    words = {HOLDS: "hold", FAILS: "do not", OPEN: OPEN, FEW: f"with {FEW}", NONE: NONE}
    parts = [f"{verdicts.count(verdict)} {text}" for verdict, text in words.items()]
    theirs = [verdict for claim, verdict in zip(claims, verdicts, strict=True) if not claim.get("ours")]
    judged = sum(verdict in (HOLDS, FAILS, OPEN) for verdict in theirs)
    text = f"The papers make {len(theirs)} of them; {judged} of these are judged, on five seeds or more."
    return f"{len(verdicts)} claims: {', '.join(parts)}. {text}"


def caution(claims: list[dict], judged: list[list[Finding]]) -> str:
    """How many intervals the verdicts rest on, how many would miss by chance, how many claims are not as they
    were. Two claims may rest on one and the same interval."""
    rested = [
        json.dumps([case.get("metric"), case.get("value"), case["terms"]], sort_keys=True)
        for claim, findings in zip(claims, judged, strict=True)
        if overall(findings) in (HOLDS, FAILS, OPEN)
        for case in claim["cases"]
    ]
    intervals, marked = len(set(rested)), sum("looked" in claim for claim in claims)
    chance = f"of which about {intervals / 20:.0f} are expected to miss the true value by chance"
    looked = "claims were added, split or given their cases after a look at the data; they say so"
    return f"The verdicts rest on {intervals} intervals, {chance}. {marked} {looked}."


def page(papers: dict[str, str], claims: list[dict], results: Path) -> str:
    """docs/claims.md."""
    judged = [(claim, [decide(results, case) for case in claim.get("cases", [])]) for claim in claims]
    verdicts = [overall(findings) for _, findings in judged]
    lines = ["# Every claim, and what our data say", "", INTRODUCTION, "", summary(claims, verdicts), ""]
    lines += [caution(claims, [findings for _, findings in judged]), ""]
    for key, title in papers.items():
        lines += [f"## {title}", "", "| | claim | what we find | verdict | suite |", "|---|---|---|---|---|"]
        for claim, findings in judged:
            if claim["paper"] != key:
                continue
            cells = [claim["id"], f"{claim['statement']} ({source_of(claim)})"]
            text = "; ".join(wrote(finding) for finding in findings)
            figure = f"([figure](figures/{claim['figure']}))" if claim.get("figure") else ""
            text = f"{text} {figure}".strip()
            cells += [". ".join(part for part in (text, claim.get("note", "")) if part)]
            cells += [f"**{overall(findings)}**", f"`{claim['suite']}`" if claim.get("suite") else ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def with_summary(readme: str, text: str) -> str:
    """The README with the page's summary between its two marks. Raises ValueError if they are not there."""
    before, mark, rest = readme.partition("<!-- claims -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (mark and end):
        raise ValueError("--readme: must have a line <!-- claims --> and one <!-- end -->")
    return f"{before}{mark}{SUMMARY.search(text)[0]}\n{end}{after}"


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--claims", type=Path, default=ROOT / "docs" / "claims.toml")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "claims.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="has the summary")
    parser.add_argument("--check", action="store_true", help="compare with both instead of writing them")
    args = parser.parse_args()
    try:
        needs("scipy")
        text = page(*read_claims(args.claims), args.results)
        readme = args.readme.read_text(encoding="utf-8")
        wanted = {args.out: text, args.readme: with_summary(readme, text)}
        for path, content in wanted.items():
            if args.check and not (path.exists() and path.read_text(encoding="utf-8") == content):
                print(f"{path} is not what the data say: python -m experiments.report.claims")
                return 1
            if not args.check:
                path.write_text(content, encoding="utf-8")
    except (ValueError, OSError) as error:
        return mistake(error)
    print(SUMMARY.search(text)[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
