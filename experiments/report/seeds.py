"""How many seeds would decide the claims that are not decided, by the spread of the runs there are.

    python -m experiments.report.seeds

For each case the smallest number of seeds, from five to twelve, at which its 95 % interval would decide if
mean and spread stayed as they are: with three runs a guess, made before more of them are looked at, so that
their number is fixed beforehand and does not depend on what they say. Extra `bench`.
"""

import sys
from pathlib import Path

import numpy as np

from experiments.algorithms import ROOT
from experiments.report import claims
from experiments.report.commands import Parser, mistake, needs
from experiments.report.reading import RESULTS

FEWEST, MOST = claims.ENOUGH, 12


def at(groups: list[tuple[float, list[float]]], count: int) -> tuple[float, float]:
    """The interval of Σ w mean(x) if each group had `count` values of its mean and deviation."""
    from experiments.report.stats import welch

    return welch([(weight, np.mean(x), np.var(x, ddof=1), count) for weight, x in groups])[1:]


def needed(results: Path, case: dict) -> int | None:
    """Seeds that decide the case, FEWEST if there are no two runs to judge by, None beyond MOST."""
    from experiments.report.stats import share_interval

    groups = claims.groups_of(results, case)
    if min(len(values) for _, values in groups) < 2:
        return FEWEST
    expect, zero = case.get("expect", "above"), case.get("share", case.get("than", 0.0))
    for count in range(FEWEST, MOST + 1):
        if "share" in case:
            ((_, values),) = groups
            part = sum(value == 1 for value in values) / len(values)
            low, high = share_interval(round(count * part), count)[1:]
        else:
            low, high = at(groups, count)
        if claims.judge(low, high, expect, zero, case.get("margin", 0.0)) != claims.OPEN:
            return count
    return None


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--claims", type=Path, default=ROOT / "docs" / "claims.toml")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: docs/results)")
    args = parser.parse_args(argv)
    lines = ["| | suite | case | seeds | needed |", "|---|---|---|---|---|"]
    try:
        needs("scipy")
        for claim in claims.read_claims(args.claims)[1]:
            for case in claim.get("cases", []):
                finding = claims.decide(args.results, case)
                if finding.verdict in (claims.HOLDS, claims.FAILS):
                    continue
                count = needed(args.results, case)
                text = f"more than {MOST}" if count is None else f"{count}" + "?" * (finding.seeds < 2)
                suite = f"`{claim['suite']}`" if claim.get("suite") else ""
                cells = [claim["id"], suite, case.get("about", claim["statement"]), str(finding.seeds), text]
                lines.append(f"| {' | '.join(cells)} |")
    except (ValueError, OSError) as error:
        return mistake(error)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
