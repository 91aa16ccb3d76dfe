"""Where a model fitted to the value wins, and where it does not: worlds small enough to be solved exactly.

    python -m experiments.studies.iter_vaml --csv worlds.csv --figure worlds.png

A model P̂ = softmax(φ Θ), too small for the world P*, is fitted by one of these and then planned with. V_k =
max_a Q_k, weights ν of the pairs (s, a), all expectations exact; 20 states, γ = 0.9, K = 40 iterations:

    MLE        max Σ ν P* log P̂                                                                         (1)
    VAML       min Σ ν ‖(P* − P̂) Φ‖²; times B² the worst V = Φ w, ‖w‖ ≤ B (Farahmand et al. 2017)       (2)
    IterVAML   min Σ ν ((P* − P̂) V_k)² for every k anew, Q_{k+1} = r + γ P̂ V_k (Farahmand 2018)         (3)
    n samples  its expectation with the mean of V_k over n draws from P̂: (3) + Σ ν Var_P̂[V_k] / n       (4)
    GAMPS      (1), weights (I − γ M')⁻¹ diag ‖∇ log π‖ (I − γ M')⁻¹ (μ π) (D'Oro et al. 2020)           (5)
    PAML       min ‖∇J − ∇̂J‖², ∇̂J = Σ d(s) ∇π(a|s) Q^{π,P̂}(s, a), d of P* or, "full", of P̂ (Abachi
               et al. 2020)                                                                             (6)
    Theorem 1  ‖Q* − Q^{π_K}‖_{1,ρ} ≤ 2γ/(1−γ)² (C̄ max_k (‖ε_k‖ + γ ‖e_k‖) + 2 γ^K R_max), norms of
               L2(ν), e_k = (P* − P̂) V_k, ε_k the residual of regressing Q_{k+1}, C̄ = (1−γ)² Σ m
               γ^{m−1} c(m), c(m) the largest ‖d(ρ P^{π_1} .. P^{π_m}) / dν‖_{2,ν} (Farahmand 2018)       (7)
               with suprema in place of norms and of C̄                                                  (7')

Panels of the table: `planning` on Garnet worlds with random φ; `data` with P* counted from N transitions of
each pair; `structured` on a windy grid, φ polynomials or tiles of the cell, or random, or a Gaussian model of
the next cell; `tiny` with one parameter, three states; `gradient` and `areas` (π frozen in the first of two
halves) for (5) and (6); `bound` (7) over K; `theorem` (7) on random worlds. A world's number is its seed.
Kind `restarted` starts each fit of (4) from MLE, not from the last model. Two to three minutes on one core.
Extra `bench`.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.report.commands import Parser, at_least, check_output, mistake, numbers
from experiments.report.pictures import COLOURS, clean, legend_below, pyplot, save
from experiments.report.tables import write_table
from experiments.studies import small_worlds as exact
from experiments.studies.small_worlds import INF, Softmax, World, garnet, random_features

FIELDS = "panel,features,world,p,kind,n,N,K,loss,value_error,gradient_error,cosine,full_error,full_cosine"
FIELDS = [*FIELDS.split(","), "gain", "bound", "bound_sup", "holds"]  # gain over MLE in the same world
NEXT = np.eye(20)  # ψ that leaves each successor a column of Θ


def plans(world: World, family, truth: np.ndarray, steps: int, samples=(INF,), restarted=()):
    """Rows of a random policy, MLE, (3) and (4): loss of the greedy policy, max_k ‖e_k‖ in the true world."""
    likely = exact.fit(family, partial(exact.likelihood_loss, truth, world.weights), family.first)
    learners = [("mle", "", lambda value: family.model(likely))]
    for kind, ns, again in (("itervaml", samples, False), ("restarted", restarted, True)):
        learners += [(kind, n, exact.refitted(family, truth, world.weights, likely, n, again)) for n in ns]
    best, first = exact.optimal_q(world), None
    any_policy = np.full_like(world.table(best), 1 / world.table(best).shape[1])
    yield {"kind": "uniform", "loss": np.abs(best - exact.q_of(world, any_policy)).mean()}
    for kind, n, model_of in learners:
        q, errors, _ = exact.iterate(world, model_of, steps)
        loss = np.abs(best - exact.q_of(world, exact.greedy(world, q))).mean()
        first = loss if first is None else first
        error = np.sqrt((errors**2 @ world.weights).max())
        yield {"kind": kind, "n": n, "loss": loss, "gain": first - loss, "value_error": error}


def gradients(world: World, policy: exact.Policy, family):
    """Rows of MLE, GAMPS, VAML and PAML: error and cosine of ∇̂J with d of the world, and "full"."""
    wanted, visits, _, value, _ = exact.policy_gradient(world, policy, world.probs)
    often, scored = visits @ exact.spread(policy), exact.gamps_weights(world, policy)
    often, scored = often / often.sum(), scored / scored.sum()
    likely = exact.fit(family, partial(exact.likelihood_loss, world.probs, often), family.first)
    losses = {
        "gamps": partial(exact.likelihood_loss, world.probs, scored),
        "vaml": partial(exact.value_loss, world.probs, often, value, INF),
        "paml": partial(exact.gradient_loss, wanted, world, policy, visits),
        "paml-full": partial(exact.gradient_loss, wanted, world, policy, None),
    }
    found, first = {"mle": likely} | {k: exact.fit(family, x, likely) for k, x in losses.items()}, None
    for kind, theta in found.items():
        row = {"kind": kind}
        for error, cosine, d in (("gradient_error", "cosine", visits), ("full_error", "full_cosine", None)):
            gradient = exact.policy_gradient(world, policy, family.model(theta), d)[0]
            row[error] = np.linalg.norm(gradient - wanted) / np.linalg.norm(wanted)
            row[cosine] = gradient @ wanted / np.linalg.norm(gradient) / np.linalg.norm(wanted)
        first = row["gradient_error"] if first is None else first
        yield row | {"gain": first - row["gradient_error"]}


def bounded(world: World, family, rho: np.ndarray, steps: int, regress=lambda q: q):
    """Rows of MLE, IterVAML and the true model: ‖Q* − Q^{π_K}‖_{1,ρ} beside (7) and (7')."""
    likely = exact.fit(family, partial(exact.likelihood_loss, world.probs, world.weights), family.first)
    learners = {"mle": lambda value: family.model(likely), "truth": lambda value: world.probs}
    learners["itervaml"] = exact.refitted(family, world.probs, world.weights, likely, INF)
    best, (spreading, _) = exact.optimal_q(world), exact.concentrability(world, rho)
    for kind, model_of in learners.items():
        q, errors, residuals = exact.iterate(world, model_of, steps, regress)
        gap = best - exact.q_of(world, exact.greedy(world, q))
        bound, sup = exact.bounds(world, spreading, errors, residuals)
        holds = int(rho @ gap <= bound and gap.max() <= sup)
        yield {"kind": kind, "K": steps, "loss": rho @ gap, "bound": bound, "bound_sup": sup, "holds": holds}


def random_check(number: int):
    """Rows of `bounded` on a random world of 3 states, 2 actions: γ = 0.8, ν, ρ and rewards random, too."""
    rng = np.random.default_rng(number)
    draw = lambda *shape: rng.dirichlet(np.ones(shape[-1]), shape[:-1] or None)
    world = World(draw(6, 3), rng.random(6), 0.8, draw(6))
    family = Softmax(random_features(rng, 6, 1 + number % 3), np.eye(3))
    basis = random_features(rng, 6, 4)
    onto = basis @ np.linalg.solve(basis.T * world.weights @ basis, basis.T * world.weights)
    return bounded(world, family, draw(6), 1 + number % 29, lambda q: onto @ q)


def measure(args: argparse.Namespace):
    """All rows, panel by panel."""
    for number in tqdm(range(1, args.worlds + 1), desc="worlds"):
        for p in args.sizes:
            rng = np.random.default_rng(number)
            world, policy = garnet(rng), exact.softmax_policy(rng.standard_normal((20, 3)), np.full(20, 0.05))
            family = Softmax(random_features(rng, 60, p), NEXT)
            at = {"panel": "planning", "features": "random", "world": number, "p": p, "K": args.steps}
            samples = (1, 4, 16, INF) if p in (4, 8, 16) else (1, INF)
            yield from (at | row for row in plans(world, family, world.probs, args.steps, samples, (1,)))
            for count in (1, 3, 10, 100) if p in (8, 16) else ():
                counted = rng.multinomial(count, world.probs) / count
                rows = plans(world, family, counted, args.steps)
                yield from (at | {"panel": "data", "N": count} | row for row in rows)
            if 1 < p < 60:
                rows, at = gradients(world, policy, family), at | {"K": ""}
                yield from (at | {"panel": "gradient"} | row for row in rows)
                halves = exact.areas(np.random.default_rng(number))
                yield from (at | {"panel": "areas"} | row for row in gradients(*halves, family))
        rng = np.random.default_rng(number)
        world, places = exact.grid(rng)
        kinds = [("random", random_features(rng, 80, p), NEXT) for p in (4, 12, 24, 40)]
        for name, pairs, successors in [*exact.structured(places), *kinds]:
            at = {"panel": "structured", "features": name, "world": number, "K": args.steps}
            at["p"] = pairs.shape[1]
            rows = plans(world, Softmax(pairs, successors), world.probs, args.steps, (1, INF), (1,))
            yield from (at | row for row in rows)
    for steps in (1, 2, 3, 5, 10, 20, 30, 50, 70, 100):
        rows = bounded(exact.three_states(), exact.stay_or_move(), np.full(6, 1 / 6), steps)
        yield from ({"panel": "bound", "world": 0, "p": 1} | row for row in rows)
    for number in tqdm(range(1, args.checks + 1), desc="checks"):
        yield from ({"panel": "theorem", "world": number} | row for row in random_check(number))
        rng = np.random.default_rng(number)
        world = World(rng.dirichlet(np.ones(3), 6), rng.random(6), 0.9, np.full(6, 1 / 6))
        family = exact.stay_or_move()
        at = {"panel": "tiny", "world": number, "p": 1, "K": args.steps}
        yield from (at | row for row in plans(world, family, world.probs, args.steps))


def chosen(table: list[dict], name: str, **where) -> np.ndarray:
    """[rows] of a column, where the columns of `where` have these values."""
    rows = [row for row in table if all(str(row.get(k, "")) == str(v) for k, v in where.items())]
    return np.round([float(row[name]) for row in rows], 12)


def cell(found: np.ndarray) -> str:
    """Mean ± s.e. over worlds."""
    if len(found) < 2:
        return f"{found.mean():.3g}" if len(found) else ""
    return f"{found.mean():.3g} ± {found.std(ddof=1) / len(found) ** 0.5:.2g}"


def report(table: list[dict]) -> str:
    """Each panel as Markdown, mean ± s.e. over worlds: losses, or errors of the gradient, by p, N or K."""
    lines = []
    for panel, column, name in (("planning", "p", "loss"), ("data", "N", "loss"), ("structured", "p", "loss"),
                                ("gradient", "p", "gradient_error"), ("gradient", "p", "full_error"),
                                ("areas", "p", "gradient_error"), ("tiny", "p", "loss"),
                                ("bound", "K", "bound")):  # fmt: skip
        rows = [row for row in table if row["panel"] == panel]
        across = sorted({row[column] for row in rows})
        lines += ["", f"**{panel}: {name}** over {column}", "", f"| | | {' | '.join(map(str, across))} |"]
        lines.append("|---" * (len(across) + 2) + "|")
        other = "p" if column == "N" else "features"
        for group in dict.fromkeys(str(row.get(other, "")) for row in rows):
            for kind, n in dict.fromkeys((row["kind"], row.get("n", "")) for row in rows):
                where = {"panel": panel, other: group, "kind": kind, "n": n}
                cells = [cell(chosen(table, name, **where, **{column: x})) for x in across]
                lines.append(f"| {group} | {kind} {n} | {' | '.join(cells)} |")
    mine = [row for row in table if row["panel"] == "theorem"]
    if mine:
        ratio = max(row["loss"] / row["bound"] for row in mine)
        fine = sum(row["holds"] for row in mine)
        lines += ["", f"theorem: holds in {fine} of {len(mine)} rows; largest loss / bound {ratio:.3f}"]
    return "\n".join(lines)


FLOOR = 1e-4  # what is below is drawn there
GREY, BLACK = "#555555", "black"


def looks() -> dict[tuple, dict]:
    """Colour, marker and name of every kind of fit, (kind, n)."""
    blue, red, green, pink, amber, sky = COLOURS
    kinds = [("mle", ""), ("itervaml", INF), ("itervaml", 1), ("restarted", 1)]
    kinds += [("gamps", ""), ("vaml", ""), ("paml", "")]
    names = "MLE;IterVAML, exact;IterVAML, n = 1;n = 1 from MLE;GAMPS;VAML;PAML".split(";")
    looked = zip(kinds, [GREY, blue, red, amber, pink, sky, green], "so^vDPX", names, strict=True)
    return {kind: {"color": colour, "marker": m, "label": name} for kind, colour, m, name in looked}


def draw_means(axes, x, found: list[np.ndarray], **style) -> None:
    """Means over worlds with their standard errors."""
    mean = np.maximum([f.mean() for f in found], FLOOR)
    error = np.array([f.std(ddof=min(1, len(f) - 1)) / len(f) ** 0.5 for f in found])
    axes.errorbar(x, mean, [np.minimum(error, mean - 0.9 * FLOOR), error], ms=5, capsize=2, **style)


def draw_panel(axes, table: list[dict], title: str, panel: str, column: str, name: str, **where) -> None:
    """Every kind of fit over a size, `column`."""
    rows = [row for row in table if row["panel"] == panel and all(row[k] == v for k, v in where.items())]
    across = sorted({row[column] for row in rows})
    for (kind, n), look in looks().items():
        found = [chosen(rows, name, kind=kind, n=n, **{column: x}) for x in across]
        if rows and all(len(x) for x in found):
            draw_means(axes, range(len(across)), found, **look, lw=1.3)
    if name == "loss" and rows:
        luck = chosen(rows, "loss", kind="uniform").mean()
        axes.axhline(luck, color=BLACK, lw=0.8, ls=":", label="random policy")
    axes.set(title=title, xlabel={"p": "features p", "N": "transitions N of each pair"}[column])
    axes.set_xticks(range(len(across)), [str(x) for x in across])


def draw_samples(axes, table: list[dict]) -> None:
    """The loss of IterVAML over the samples in its own loss, beside likelihood's."""
    blue, red = COLOURS[:2]
    for p, marker in ((4, "o"), (8, "s"), (16, "^")):
        rows = [row for row in table if row["panel"] == "planning" and row["p"] == p]
        found = [chosen(rows, "loss", kind="itervaml", n=n) for n in (1, 4, 16, INF)]
        if rows:
            draw_means(axes, range(1, 5), found, color=blue, marker=marker, lw=1.3)
            draw_means(axes, [1], found[:1], color=red, marker=marker, lw=0, elinewidth=1.3)
            draw_means(axes, [0], [chosen(rows, "loss", kind="mle")], color=GREY, marker=marker)
            axes.annotate(f"p = {p}", (4.2, max(found[-1].mean(), FLOOR)), va="center", fontsize=8)
    axes.set(title="(b) the same over samples n", xlabel="n", xlim=(-0.4, 5.2))
    axes.set_xticks(range(5), ["MLE", "1", "4", "16", "∞"])


def draw_bounds(axes, table: list[dict]) -> None:
    """Losses over the iterations, and what bounds them."""
    for kind, colour in (("mle", GREY), ("truth", BLACK), ("itervaml", COLOURS[0])):
        rows = [row for row in table if row["panel"] == "bound" and row["kind"] == kind]
        for name, style in (("loss", "-"), ("bound", "--"), ("bound_sup", ":")):
            values = np.maximum([row[name] for row in rows], FLOOR)
            label = "true model" if (kind, name) == ("truth", "loss") else None
            axes.plot([row["K"] for row in rows], values, style, color=colour, label=label)
    axes.set(title="(c) Theorem 1, three states", xlabel="iterations K", xscale="log")
    for text, height in (("loss", 1.5), ("bounds (7) - - and (7') ···", 500)):
        axes.annotate(text, (3.5, height), fontsize=8)


def plot(table: list[dict], out: Path) -> None:
    """Means over worlds with their standard errors, a panel for each question."""
    figure, panels = pyplot().subplots(2, 4, figsize=(13, 6.4), layout="constrained")
    grid = ("structured", "p", "loss")
    draw_panel(panels[0, 0], table, "(a) Garnet worlds, random φ", "planning", "p", "loss")
    draw_samples(panels[0, 1], table)
    draw_bounds(panels[0, 2], table)
    draw_panel(panels[0, 3], table, "(d) policy gradient, Garnet", "gradient", "p", "gradient_error")
    draw_panel(panels[1, 0], table, "(e) grid, polynomials", *grid, features="polynomials")
    draw_panel(panels[1, 1], table, "(f) grid, Gaussian model", *grid, features="gaussian")
    draw_panel(panels[1, 2], table, "(g) grid, tiles: MLE = IterVAML", *grid, features="tiles")
    draw_panel(panels[1, 3], table, "(h) Garnet, p = 8, from data", "data", "N", "loss", p=8)
    for axes in panels.flat:
        axes.set(yscale="log", ylim=(0.7 * FLOOR, 2e3 if axes is panels[0, 2] else 6))
        clean(axes)
    for at, text in (((0, 0), "loss"), ((1, 0), "loss"), ((0, 3), "relative error of ∇J")):
        panels[at].set_ylabel(text.replace("loss", "loss of the greedy policy"))
    legend_below(figure, 9)
    save(figure, out)


def main() -> int:
    parser, count = Parser(__doc__), at_least(1)
    parser.add_argument("--worlds", type=count, default=10, help="of each kind (default: 10)")
    parser.add_argument("--checks", type=count, default=300, help="worlds of theorem and tiny (default: 300)")
    parser.add_argument("--steps", type=count, default=40, help="iterations K (default: 40)")
    parser.add_argument(
        "--sizes", type=numbers, default="1,2,4,8,16,32,60", help="p on Garnet worlds (default: %(default)s)"
    )
    parser.add_argument("--csv", type=Path, required=True, help="file for the table")
    parser.add_argument("--figure", type=Path, help="picture")
    args = parser.parse_args()
    try:
        if not args.sizes or min(args.sizes) < 1 or max(args.sizes) > 60:
            raise ValueError("--sizes: must be numbers from 1 to 60")
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
    except ValueError as error:
        return mistake(error)
    table = list(measure(args))
    short = lambda x: f"{round(x, 12):.8g}" if isinstance(x, float) else x
    write_table(args.csv, FIELDS, ({k: short(x) for k, x in row.items()} for row in table))
    print(report(table))
    if args.figure:
        plot(table, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
