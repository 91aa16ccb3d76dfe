"""Do value-aware models win where the model is too small? Lovatto et al. 2020, section 5.1.

    python -m experiments.studies.vaml_artificial --csv artificial.csv --figure artificial.png

A world is a random network of the model's own kind (two hidden layers, 4 states, 2 actions, moderate noise),
its value function another random network. A model with as many layers (realizable) or one fewer is fitted to
50 000 transitions of a random policy with c of (9) 1, 0.001 and 0, and tested on 1 000 others. What the paper
does not print is ours: episodes of 5 steps from N(0, I) (some random worlds explode: after 50 steps
states of 1e10 were seen, where values are flat and likelihoods overflow), n = 8 samples, patience 5, at most
200 epochs.

All worlds and losses of a width are trained at once, as stacked networks, from the same first weights on the
same minibatches; whoever has stopped leaves the stack. Per row of the table: value-aware error on the test
set with 32 samples and with one, each also as a multiple of the error of the world's own mean, negative
log-likelihood, mean σ; for c = truth those of the world itself, c = mean those of its mean. With one sample
the truth looks twice as bad as its mean: an error of about 2 v against v, v the variance of the value. Rows
are written cell by cell; stopped, the same command goes on. About ten minutes on two cores. Extra `bench`
for the figure.
"""

import argparse
import copy
import functools
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn, optim
from tqdm import tqdm

from experiments.algorithms import load
from experiments.report.commands import Parser, at_least, check_output, mistake, numbers
from experiments.report.pictures import COLOURS, clean, legend_below, pyplot, save
from experiments.report.tables import read_table, write_table

SETTINGS = "transitions,epochs,samples,worlds".split(",")  # one table, one set of these
FIELDS = [*SETTINGS, *"width,realizable,c,seed,value_error,value_error_1,relative,relative_1".split(",")]
FIELDS += ["nll", "std", "stopped"]
SHARES = {"1": 1.0, "0.001": 0.001, "0": 0.0}
LABELS = {"1": "likelihood (c = 1)", "0.001": "regularised (c = 0.001)", "0": "value-aware (c = 0)"}
LABELS |= {"truth": "the world itself"}
STATES, ACTIONS, LENGTH, BATCH, PATIENCE, TEST = 4, 2, 5, 256, 5, 1_000


class Values(nn.Module):
    """One random value function per member: [.., E, B, n] -> [.., E, B]."""

    def __init__(self, module, members: int):
        super().__init__()
        self.layers = nn.ModuleList(module.StackedLinear(members, *s) for s in pairwise([STATES, 64, 1]))
        xavier(self)

    def forward(self, obs: Tensor) -> Tensor:
        lead = obs.shape[:-3]
        flat = obs.flatten(0, -4).transpose(0, 1).flatten(1, 2) if lead else obs
        value = self.layers[1](self.layers[0](flat).tanh())[..., 0]
        return (
            value.view(len(value), -1, obs.shape[-2]).transpose(0, 1).view(*lead, len(value), -1)
            if lead
            else value
        )


def xavier(network: nn.Module) -> None:
    """U(±√(6 / (inputs + outputs))) for all matrices, no biases."""
    for part in network.modules():
        if hasattr(part, "weight") and part.weight.ndim == 3:
            bound = math.sqrt(6 / sum(part.weight.shape[1:]))
            nn.init.uniform_(part.weight, -bound, bound)
            nn.init.zeros_(part.bias)


@torch.no_grad()
def live(world, transitions: int) -> tuple[Tensor, Tensor, Tensor]:
    """obs, action, next obs [E, transitions, ..] of random actions, episodes of LENGTH steps side by side."""
    members, episodes = world.members, -(-transitions // LENGTH)
    obs, found = torch.randn(members, episodes, STATES), []
    for _ in range(LENGTH):
        action = 2 * torch.rand(members, episodes, ACTIONS) - 1
        next_obs = world.draw(obs, action, 1)[0]
        found.append((obs, action, next_obs))
        obs = next_obs
    return tuple(torch.stack(x, 2).flatten(1, 2)[:, :transitions] for x in zip(*found, strict=True))


def chosen(network: nn.Module, members: Tensor) -> nn.Module:
    """A copy of a stacked network that has these members, in this order, each as often as it is named."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for name, part in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(part.detach()[members], part.requires_grad))
    if hasattr(network, "members"):
        network.members = len(members)
    return network


def reduced(optimizer: optim.Adam, network: nn.Module, going: Tensor) -> optim.Adam:
    """The optimiser of the members that go on, in `network`, its moments kept."""
    result = optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for part, state in zip(network.parameters(), list(optimizer.state.values()), strict=True):
        result.state[part] = {name: x if name == "step" else x[going] for name, x in state.items()}
    return result


def losses(module, model, judges: Values | None, batch, shares: Tensor, samples: int) -> Tensor:
    """(9) of every member, c of the likelihood in falling order: [E]. batch: obs, action, next obs, value of
    next obs [E, B, ..]. Neither loss is evaluated where it would weigh 0; judges are those of c < 1."""
    obs, action, next_obs, value = batch
    mean, log_std = model(obs, action)
    likely, aware = int((shares > 0).sum()), int((shares == 1).sum())  # members [:likely] and [aware:]
    total = torch.zeros(len(shares))
    if likely:
        moments, delta = (mean[:likely], log_std[:likely]), (next_obs - obs)[:likely]
        share = shares[:likely]
        total = torch.cat([share * module.likelihood_loss(delta, *moments, model.varying), total[likely:]])
    if aware < len(shares):
        noise = torch.randn(samples, *mean[aware:].shape)
        drawn = (obs + mean)[aware:] + log_std[aware:].exp() * noise
        error = (1 - shares[aware:]) * module.value_aware_loss(value[aware:], judges(drawn))
        total = total + torch.cat([torch.zeros(aware), error])
    return total


def fit(module, model, values, data, owner: Tensor, shares: Tensor, args, name: str) -> list[int]:
    """Train all members until each has stopped; every member ends with its best weights.

    data [worlds, N, ..]; member i learns the world owner[i] with share shares[i], in falling order.
    """
    count, members = data[0].shape[1], len(shares)
    data = [*data, values(data[2])]
    held, train = torch.randperm(count).split([count // 5, count - count // 5])
    learner = copy.deepcopy(model)
    optimizer = optim.Adam(learner.parameters(), lr=1e-3, fused=True)
    best, bad, stopped = torch.full((members,), math.inf), torch.zeros(members), [0] * members
    kept = [p.detach().clone() for p in model.parameters()]
    alive, judges = torch.arange(members), chosen(values, owner[shares < 1])
    bar = tqdm(range(1, args.epochs + 1), desc=name, leave=False)
    for epoch in bar:
        world, share = owner[alive][:, None], shares[alive]
        for at in train[torch.randperm(len(train))].split(BATCH):
            batch = [x[world, at] for x in data]
            loss = losses(module, learner, judges, batch, share, args.samples)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        with torch.no_grad():
            parts = []
            for at in held.split(2_000):
                batch = [x[world, at] for x in data]
                parts.append(len(at) * losses(module, learner, judges, batch, share, args.samples))
        score = torch.stack(parts).sum(0) / len(held)
        better = score < best[alive]
        best[alive] = torch.where(better, score, best[alive])
        bad[alive] = torch.where(better, 0, bad[alive] + 1)
        for old, new in zip(kept, learner.parameters(), strict=True):
            old[alive[better]] = new.detach()[better]
        for member in alive.tolist():
            stopped[member] = epoch
        going = bad[alive] < PATIENCE
        alive = alive[going]
        bar.set_postfix_str(f"{len(alive)} of {members} still learn")
        if not len(alive):
            break
        if not going.all():  # who has stopped leaves the stack
            learner = chosen(learner, going.nonzero()[:, 0])
            optimizer = reduced(optimizer, learner, going)
            judges = chosen(values, owner[alive[shares[alive] < 1]])
    for old, part in zip(kept, model.parameters(), strict=True):
        part.data = old
    return stopped


@torch.no_grad()
def tested(module, model, values, data, deterministic: bool = False) -> list[dict]:
    """Errors of every member on the test set."""
    obs, action, next_obs = data
    mean, log_std = model(obs, action)
    spread = 0.0 if deterministic else log_std.exp()
    drawn = values(obs + mean + spread * torch.randn(32, *mean.shape))
    real = values(next_obs)
    found = {"value_error": module.value_aware_loss(real, drawn)}
    found["value_error_1"] = torch.stack([module.value_aware_loss(real, d[None]) for d in drawn]).mean(0)
    nll = module.likelihood_loss(next_obs - obs, mean, log_std, model.varying)
    found["nll"] = nll * math.nan if deterministic else nll
    found["std"] = log_std.exp().mean((1, 2)) * (not deterministic)
    return [
        dict(zip(found, row, strict=True)) for row in zip(*(x.tolist() for x in found.values()), strict=True)
    ]


def make_worlds(module, width: int, seeds: list[int], transitions: int):
    """Worlds of this width, stacked as members, their values, and the transitions lived in each.

    A world depends on its seed and width alone.
    """
    frozen = lambda part: part.requires_grad_(False)
    build = lambda number: frozen(
        module.DeltaGaussian(number, STATES, ACTIONS, 2, width, low=-3.0, high=-1.0)
    )
    worlds, values, pieces = build(len(seeds)), frozen(Values(module, len(seeds))), []
    for member, seed in enumerate(seeds):
        torch.manual_seed(1000 * width + seed)
        world, value = build(1), frozen(Values(module, 1))
        xavier(world)
        for stack, one in ((worlds, world), (values, value)):
            for many, single in zip(stack.parameters(), one.parameters(), strict=True):
                many[member] = single[0]
        pieces.append(live(world, transitions))
    return worlds, values, [torch.cat(x) for x in zip(*pieces, strict=True)]


def measure_cell(args: argparse.Namespace, module, width: int, realizable: str) -> list[dict]:
    """One cell of the table: every loss in every world of this width, the losses trained side by side."""
    seeds, times = len(args.seeds), len(SHARES)
    worlds, values, data = make_worlds(module, width, args.seeds, args.transitions + TEST)
    train, test = ([x[:, at] for x in data] for at in (slice(TEST, None), slice(TEST)))
    truths = {name: tested(module, worlds, values, test, name == "mean") for name in ("truth", "mean")}
    torch.manual_seed(width)
    model = module.DeltaGaussian(seeds, STATES, ACTIONS, 2 if realizable == "yes" else 1, width)
    owner = torch.arange(seeds).repeat(times)
    model = chosen(model, owner)  # the losses of a world begin with the same weights
    shares = torch.tensor([c for c in SHARES.values() for _ in range(seeds)])
    name = f"width {width}, realizable: {realizable}"
    stopped = fit(module, model, values, train, owner, shares, args, name)
    found = tested(module, model, chosen(values, owner), [x[owner] for x in test])
    rows = []
    for i, c in enumerate([*SHARES, *truths]):
        mine = truths[c] if c in truths else found[i * seeds : (i + 1) * seeds]
        epochs = [0] * seeds if c in truths else stopped[i * seeds : (i + 1) * seeds]
        for seed, row, mean, epoch in zip(args.seeds, mine, truths["mean"], epochs, strict=True):
            errors = ("value_error", "value_error_1")
            relative = {name.replace("value_error", "relative"): row[name] / mean[name] for name in errors}
            rows.append({"c": c, "seed": seed, "stopped": epoch} | row | relative)
    return rows


def measure(args: argparse.Namespace, done: list[dict], write) -> list[dict]:
    """The table, cell by cell (a width, realizable or not); cells in `done` are kept."""
    module = load("sac_vaml")
    args.worlds = " ".join(map(str, args.seeds))
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    if any({name: row[name] for name in SETTINGS} != settings for row in done):
        raise ValueError(f"--csv {args.csv}: must be of these settings, or not exist")
    table, have = list(done), {(int(row["width"]), row["realizable"]) for row in done}
    cells = [(width, realizable) for width in args.widths for realizable in ("yes", "no")]
    for width, realizable in tqdm(cells, desc="cells"):
        if (width, realizable) not in have:
            cell = settings | {"width": width, "realizable": realizable}
            table += [cell | row for row in measure_cell(args, module, width, realizable)]
            write(table)
    return table


def column(table: list[dict], realizable: str, width: int, c: str, name: str) -> np.ndarray:
    """[seeds]"""
    return np.array([float(r[name]) for r in table
                     if (r["realizable"], int(r["width"]), r["c"]) == (realizable, width, c)])  # fmt: skip


def deviation(values: np.ndarray) -> float:
    """Over seeds, of which one has none."""
    return values.std(ddof=1) if len(values) > 1 else 0.0


def report(table: list[dict]) -> str:
    """Means over seeds as Markdown: value-aware error as a multiple of that of the world's mean, with the
    deviation; the other columns are means over widths."""
    widths = sorted({int(row["width"]) for row in table})
    kinds = [*SHARES, "truth", "mean"]
    lines = ["| realizable | c | " + " | ".join(f"width {w}" for w in widths) + " | σ | NLL | n = 1 |"]
    lines.append("|---" * (len(widths) + 5) + "|")
    for realizable in ("yes", "no"):
        for c in kinds:
            found = [column(table, realizable, w, c, "relative") for w in widths]
            if not all(len(x) for x in found):
                continue
            cells = " | ".join(f"{x.mean():.3f} ± {deviation(x):.3f}" for x in found)
            rest = (np.concatenate([column(table, realizable, w, c, n) for w in widths]).mean()
                    for n in ("std", "nll", "relative_1"))  # fmt: skip
            lines.append(f"| {realizable} | {c} | {cells} | " + " | ".join(f"{x:.3g}" for x in rest) + " |")
    return "\n".join(lines)


def plot(table: list[dict], out: Path) -> None:
    """Value-aware error, as a multiple of that of the world's mean, against width: mean and deviation over
    seeds; and the mean σ learned."""
    plt = pyplot()
    widths = sorted({int(row["width"]) for row in table})
    seeds = len({int(row["seed"]) for row in table})
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained")
    titles = ("realizable", "unrealizable: one layer fewer", "mean σ, realizable")
    cells = (("yes", "relative"), ("no", "relative"), ("yes", "std"))
    for axes, title, (realizable, name) in zip(panels, titles, cells, strict=True):
        for i, c in enumerate([*SHARES, "truth"]):
            found = [column(table, realizable, w, c, name) for w in widths]
            x = np.arange(len(widths)) + 0.08 * (i - 1.5)
            style = {"color": "black" if c == "truth" else COLOURS[i], "marker": "o", "ms": 4, "lw": 1}
            mean, spread = [f.mean() for f in found], [deviation(f) for f in found]
            axes.errorbar(x, mean, spread, capsize=2, label=LABELS[c], **style)
        axes.set(title=title, xlabel="hidden units")
        axes.set_xticks(range(len(widths)), [str(w) for w in widths])
        if name == "std":
            axes.set_ylim(bottom=0)
        else:
            axes.axhline(1, color="grey", lw=0.8, ls=":")
        clean(axes)
    panels[0].set_ylabel(f"error / error of the world's mean, {seeds} worlds")
    legend_below(figure, 4)
    save(figure, out)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--widths", type=numbers, default="16,32,64,128,256", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=numbers, default="1,2,3,4,5", help="worlds (default: %(default)s)")
    parser.add_argument("--transitions", type=int, default=50_000, help="for training (default: 50000)")
    parser.add_argument("--epochs", type=at_least(1), default=200, help="at most (default: 200)")
    parser.add_argument("--samples", type=at_least(1), default=8, help="n of the loss (default: 8)")
    parser.add_argument("--threads", type=at_least(1), default=2, help="CPU threads (default: 2)")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table; continued if it exists")
    parser.add_argument("--figure", type=Path, help="picture")
    args = parser.parse_args()

    write = functools.partial(write_table, args.csv, FIELDS)
    try:
        if args.transitions < 5:
            raise ValueError(f"--transitions {args.transitions}: must be at least 5, a fifth is held out")
        for name in ("widths", "seeds"):
            if not getattr(args, name) or min(getattr(args, name)) < 1:
                raise ValueError(f"--{name}: must be numbers of at least 1")
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
        done = read_table(args.csv, FIELDS)
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)
        table = measure(args, done, write)
    except ValueError as error:
        return mistake(error)
    print(report(table))
    if args.figure:
        plot(table, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
