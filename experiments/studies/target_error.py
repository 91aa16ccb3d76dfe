"""When to trust your model: how wrong are the targets it makes, and why?

    python -m experiments.studies.target_error runs/<run> --horizon 10 --csv error.csv --figure error.png

reads runs of sac_mve.py, sac_svg_h.py or sac_ove.py. For each checkpoint in their folders, fresh transitions
(s, a, r, s') of that checkpoint's policy are expanded for h = 0 .. H steps by the learned model and, with the
same action noise, by the true simulator; and by soft Monte-Carlo returns, which follow the simulator until
γ^k < 0.01 before the critic has a say. Per run, checkpoint and h, in units of the return:

    model - simulator     what the model's error does to the target: bias, variance, mean square
    model - returns       the whole error of the target a learned model gives, the critic's share included
    simulator - returns   the same with a perfect model: the critic's share, and the noise of the actions
    state error           root mean square after h steps, in deviations of the visited observations
    cosine                between the gradients that the two targets of the first column give the critic
    action gradient       of y_0, what h steps and the critic behind them promise, by the first action: its
                          root mean square norm, and the cosine between the model's and the simulator's

The last is what an actor learns from that looks ahead with a gradient (sac_svg_h.py; sac_ove.py
--actor-horizon), one vector over all starts; later actions answer to the states they meet. The simulator's
is by differences of its steps, the model's by backpropagation.

Against the returns, variance and mean square have the sampling noise of the returns taken out, but not that
of the target's own h actions, which grows with h (more particles would average it out). Where they fall with
h, looking further ahead pays; where the model's rise and the simulator's do not, the model is to blame.
Without a learned model (sac_ove.py, --horizon 0) only the third line is there; at h = 0 it is how far a
run's critic is from the returns of its own policy. --figure draws one run. Figures: the extra `bench`.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.algorithms import load
from experiments.report.commands import Parser, at_least, check_output, mistake
from experiments.report.pictures import COLOURS, clean, legend_below, pyplot, save
from experiments.report.reading import name_of
from experiments.report.tables import write_table

RUN = ["env_id", "algo", "settings", "seed"]
FIELDS = RUN + "step,h,error_of,bias,bias_se,variance,mse,rms".split(",")
FIELDS += "state_error,cosine,action_cosine,action_norm".split(",")
WIDTHS = dict.fromkeys(FIELDS[1:], 11) | {"algo": 9, "settings": 10, "seed": 4, "h": 3, "error_of": 19}


class Starts(NamedTuple):
    """N transitions of the policy, and the simulator's state after each."""

    obs: Tensor  # [N, n]
    action: Tensor  # [N, m]
    reward: Tensor  # [N]
    next_obs: Tensor  # [N, n]
    terminated: Tensor  # [N]
    rows: np.ndarray  # [N, width]
    episode: Tensor  # [N] the number of the episode each is from


class LearnedEnsemble:
    """The model of sac_mve.py: step(action [B, m]) -> next obs [B, n], reward [B], termination [B]."""

    def __init__(self, agent):
        self.agent = agent

    def start(self, obs: Tensor, rows: np.ndarray, ended: Tensor) -> None:
        self.obs = obs

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        obs = self.obs
        self.obs, reward = self.agent.model.step(obs, action)
        done = self.agent.predict_termination(obs, action, self.obs) > 0
        return self.obs, reward, done.to(reward.dtype)


class LearnedRecurrence:
    """The dynamics of sac_svg_h.py in the same role; terminations are probabilities.

    The targets are those that sac_mve.py's critics would take from it, not the actor's own V: entropy ends
    with survival, and the slow critics stand at the end. Beyond the run's own H the memory extrapolates.
    """

    def __init__(self, agent):
        self.agent = agent

    def start(self, obs: Tensor, rows: np.ndarray, ended: Tensor) -> None:
        self.obs, self.memory = obs, None

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reward, logit = self.agent.outcome(self.obs, action)
        self.obs, self.memory = self.agent.model.step(self.obs, action, self.memory)
        return self.obs, reward, logit.sigmoid()


class TrueSimulator:
    """The simulator in the same role; rows that have ended stand still."""

    def __init__(self, simulator):
        self.simulator = simulator

    def start(self, obs: Tensor, rows: np.ndarray, ended: Tensor) -> None:
        self.obs, self.rows, self.done = obs.numpy().copy(), rows.copy(), ended.numpy() > 0

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reward, living = np.zeros(len(self.rows)), np.flatnonzero(~self.done)
        if len(living):
            results = self.simulator.step(self.rows[living], action.numpy()[living])
            for array, result in zip((self.rows, self.obs, reward, self.done), results, strict=True):
                array[living] = result
        return tuple(torch.tensor(x, dtype=torch.float32) for x in (self.obs, reward, self.done))


class SimulatorWithGradient(TrueSimulator):
    """The simulator whose steps know their derivatives."""

    def start(self, obs: Tensor, rows: np.ndarray, ended: Tensor) -> None:
        super().start(obs, rows, ended)
        self.simulated = sys.modules[type(self.simulator).__module__].Simulated
        self.size = self.simulator.model.nq + self.simulator.model.nv
        self.state = torch.tensor(rows[:, 1 : 1 + self.size])

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        action, living = action.double(), np.flatnonzero(~self.done)
        values = np.zeros((len(action), self.size + self.obs.shape[1] + 1))
        jacobian = np.zeros((*values.shape, self.size + action.shape[1]))
        if len(living):
            results = self.simulator.differentiate(self.rows[living], action.detach().numpy()[living])
            for array, result in zip((self.rows, self.done, values, jacobian), results, strict=True):
                array[living] = result
        values = self.simulated.apply(self.state, action, *map(torch.from_numpy, (values, jacobian)))
        self.state, obs, reward = values.split([self.size, self.obs.shape[1], 1], 1)
        return obs.float(), reward.squeeze(1).float(), torch.tensor(self.done, dtype=torch.float32)


MODELS = {
    "sac_mve": LearnedEnsemble,
    "sac_svg_h": LearnedRecurrence,
    "sac_ove": None,
}  # the files this script can read


def load_run(run_dir: Path):
    """(module, Args, {step: agent state} of every checkpoint). Raises ValueError with one line."""
    try:
        record = json.loads((run_dir / "args.json").read_text())
        algo, saved = record["algo"], record["args"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{run_dir}: must be a run folder with a readable args.json") from None
    if algo not in MODELS:
        raise ValueError(f"{run_dir}: must be a run of {', '.join(MODELS)}, not {algo}")
    module, states = load(algo), {}
    for path in sorted(run_dir.glob("*.pt")):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # damaged files raise many types
            raise ValueError(f"{path}: must be a readable checkpoint") from None
        if not (isinstance(state, dict) and {"step", "agent"} <= state.keys()):
            raise ValueError(f"{path}: must be a checkpoint of this project")
        states[state["step"]] = state["agent"]
    if not states:
        raise ValueError(f"{run_dir}: must hold at least one checkpoint")
    try:
        args = module.Args(**saved | {"device": "cpu"})
    except (TypeError, ValueError):
        raise ValueError(f"{run_dir}: must be a run of this version of {algo}.py") from None
    return module, args, dict(sorted(states.items()))


def collect(agent, args, simulator, env, number: int, rng: np.random.Generator) -> Starts:
    """`number` transitions of the stochastic policy, from at least 20 whole episodes and 2 x number steps."""
    log, episode, obs = [], 0, env.reset(seed=args.seed + 1000)[0]
    while episode < 20 or len(log) < 2 * number:
        action = agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        log.append((obs, action, reward, next_obs, terminated, simulator.row(env.unwrapped), episode))
        obs = next_obs
        if terminated or truncated:
            episode, obs = episode + 1, env.reset()[0]
    chosen = rng.choice(len(log), number, replace=False)
    *columns, rows, episodes = (np.array([log[i][c] for i in chosen]) for c in range(7))
    columns = (torch.tensor(column, dtype=torch.float32) for column in columns)
    return Starts(*columns, rows, torch.tensor(episodes))


def sample(module, agent, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's action [B, m] for given standard noise [B, m], and its log π [B]."""
    mean, log_std = agent.actor(obs)
    u = mean + log_std.exp() * noise
    return u.tanh(), module.squashed_log_prob(noise, log_std, u)


def roll_out(module, agent, model, starts: Starts, noise: Tensor, first: Tensor | None = None):
    """len(noise) − 1 steps of policy and model from the states after `starts`, as the family's Rollout.

    `first` [N, m] stands for the first action, if one wants to differentiate with respect to it.
    """
    model.start(starts.next_obs, starts.rows, starts.terminated)
    action, log_prob = sample(module, agent, starts.next_obs, noise[0])
    action = action if first is None else first
    rollout = module.Rollout([starts.next_obs], [action], [log_prob], [], [])
    for eps in noise[1:]:
        obs, reward, done = model.step(action)
        action, log_prob = sample(module, agent, obs, eps)
        for values, value in zip(rollout, (obs, action, log_prob, reward, done), strict=True):
            values.append(value)
    return rollout


def targets(agent, starts: Starts, rollout, gamma: float) -> Tensor:
    """Targets of every horizon 0 .. H from one rollout, [H + 1, N], by the functions of sac_mve.py."""
    alpha, found, family = agent.log_alpha.exp(), [], sys.modules.get("sac_mve") or load("sac_mve")
    for h, (obs, action) in enumerate(zip(rollout.obs, rollout.action, strict=True)):
        values = family.expand(rollout, h, agent.critic_target(obs, action).amin(0), alpha, gamma)
        step = (starts.reward, starts.terminated, values[0], rollout.log_prob[0])
        found.append(family.soft_target(*step, alpha, gamma))
    return torch.stack(found)


def soft_returns(module, agent, simulator, starts: Starts, repeats: int, gamma: float) -> Tensor:
    """Monte-Carlo targets [repeats, N]: policy and simulator until γ^k < 0.01, and there the critic."""
    length = 0 if gamma == 0 else math.ceil(math.log(0.01) / math.log(min(gamma, 0.9999)))
    tensors = (x.repeat(repeats, *[1] * (x.dim() - 1)) for x in starts[:5])
    rows = np.tile(starts.rows, (repeats, 1))
    many, alpha = Starts(*tensors, rows, starts.episode.repeat(repeats)), agent.log_alpha.exp()
    model, obs = TrueSimulator(simulator), many.next_obs
    model.start(obs, many.rows, many.terminated)
    total, weight = many.reward.clone(), gamma * (1 - many.terminated)
    for _ in range(length):
        action, log_prob = sample(module, agent, obs, torch.randn_like(many.action))
        obs, reward, done = model.step(action)
        total += weight * (reward - alpha * log_prob)
        weight = gamma * weight * (1 - done)
    action, log_prob = sample(module, agent, obs, torch.randn_like(many.action))
    total += weight * (agent.critic_target(obs, action).amin(0) - alpha * log_prob)
    return total.view(repeats, -1)


def critic_gradient(module, agent, starts: Starts, target: Tensor) -> Tensor:
    """Gradient of the critics' loss on these targets, as one vector."""
    with torch.enable_grad():
        loss = module.twin_loss(agent.critic(starts.obs, starts.action), target)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.critic.parameters()))])


@torch.enable_grad()
def action_gradients(module, agent, model, starts: Starts, noise: Tensor, gamma: float) -> Tensor:
    """Of y_0 of every h = 0 .. H by the first action: [H + 1, N, m]; 0 where the start has ended."""
    alpha, found, family = agent.log_alpha.exp(), [], sys.modules.get("sac_mve") or load("sac_mve")
    first = sample(module, agent, starts.next_obs, noise[0])[0].detach().requires_grad_()
    rollout = roll_out(module, agent, model, starts, noise, first)
    for h, (obs, action) in enumerate(zip(rollout.obs, rollout.action, strict=True)):
        value = family.expand(rollout, h, agent.critic_target(obs, action).amin(0), alpha, gamma)[0]
        total = ((1 - starts.terminated) * value).sum()
        found.append(torch.autograd.grad(total, first, retain_graph=h < len(noise) - 1)[0])
    return torch.stack(found)


def statistics(error: Tensor, episode: Tensor, noise: float = 0.0) -> dict[str, float]:
    """Bias, its standard error, variance and mean square of errors [N]; `noise` is variance to take out.

    The standard error is that of whole episodes [N], whose steps are not independent of one another.
    """
    bias, square, groups = error.mean(), error.square().mean().item(), int(episode.max()) + 1
    sums = torch.zeros(groups).index_add_(0, episode, error - bias)
    seen = len(episode.unique())
    se = math.sqrt(sums.square().sum().item() * seen / max(seen - 1, 1)) / len(error)
    bias = {"bias": bias.item(), "bias_se": se}
    rms = math.sqrt(max(square - noise, 0.0))
    return bias | {"variance": error.var().item() - noise, "mse": square - noise, "rms": rms}


def compare(module, agent, learned, simulator, starts: Starts, horizon: int, repeats: int, gamma: float):
    """One row of the table per h and kind of error, without the step."""
    noise = torch.randn(horizon + 1, *starts.action.shape)
    true = roll_out(module, agent, TrueSimulator(simulator), starts, noise)
    true_targets = targets(agent, starts, true, gamma)
    returns = soft_returns(module, agent, simulator, starts, repeats, gamma)
    reference, left = returns.mean(0), (returns.var(0).mean() / repeats).item()
    if learned is not None:
        model = roll_out(module, agent, learned, starts, noise)
        model_targets = targets(agent, starts, model, gamma)
        scale = starts.obs.std(0).clamp_min(1e-6)
    rows, alive, slope = [], 1 - starts.terminated, {}
    known = {"model": learned, "simulator": SimulatorWithGradient(simulator)}
    if (
        simulator.model.nq > simulator.model.nv
    ):  # bodies that turn freely: positions have no plain differences
        known.pop("simulator")
    for name, one in known.items():
        if one is not None:
            slope[name] = action_gradients(module, agent, one, starts, noise, gamma)
    norm = {
        name: (x.square().sum((1, 2)) / alive.sum().clamp_min(1)).sqrt().tolist() for name, x in slope.items()
    }
    for h in range(horizon + 1):
        if learned is not None:
            gap = ((model.obs[h] - true.obs[h]) / scale).square().mean(1)[alive > 0.5]
            gradients = (critic_gradient(module, agent, starts, t[h]) for t in (model_targets, true_targets))
            extra = {"cosine": torch.cosine_similarity(*gradients, dim=0).item()}
            if len(gap):  # some rows probably live in both
                extra["state_error"] = gap.mean().sqrt().item()
            if "simulator" in slope:
                both = (slope[name][h].flatten() for name in ("model", "simulator"))
                extra["action_cosine"] = torch.cosine_similarity(*both, dim=0).item()
            extra["action_norm"] = norm["model"][h]
            error = statistics(model_targets[h] - true_targets[h], starts.episode)
            rows.append({"h": h, "error_of": "model - simulator"} | error | extra)
            error = statistics(model_targets[h] - reference, starts.episode, left)
            rows.append({"h": h, "error_of": "model - returns"} | error)
        error = statistics(true_targets[h] - reference, starts.episode, left)
        extra = {"action_norm": norm["simulator"][h]} if "simulator" in slope else {}
        rows.append({"h": h, "error_of": "simulator - returns"} | error | extra)
        if h < horizon:
            alive = alive * (1 - true.done[h]) * ((1 - model.done[h]) if learned is not None else 1)
    return rows


class Run(NamedTuple):
    """A run whose checkpoints can be measured."""

    name: dict  # its first columns
    module: object
    args: object
    states: dict  # of the agent, by step
    env: object
    simulator: object


def open_run(folder: Path, threads: int) -> Run:
    """Raises ValueError with one line for what cannot be measured."""
    module, args, states = load_run(folder)
    oracle = load("sac_ove")
    try:
        env = oracle.make_env(args.env_id, args.env_kwargs)
        simulator = oracle.Simulator(args.env_id, env, threads, args.env_kwargs)
    except oracle.BadInput as error:
        raise ValueError(str(error).replace(" (--horizon 0 needs none)", "")) from error
    name = {"env_id": args.env_id, "algo": module.ALGO, "seed": args.seed}
    name |= {"settings": name_of(module.ALGO, dataclasses.asdict(args))}
    run = Run(name, module, args, states, env, simulator)
    try:
        agent_of(run, next(iter(states.values())))
    except (KeyError, RuntimeError, TypeError):
        raise ValueError(f"{folder}: must be a run of this version of {module.ALGO}.py") from None
    return run


def agent_of(run: Run, state: dict):
    """The agent of a checkpoint."""
    sizes = run.env.observation_space.shape[0], run.env.action_space.shape[0]
    agent = run.module.Agent(run.args, *sizes, torch.device("cpu"))
    agent.load_state_dict(state)
    return agent


@torch.no_grad()
def measure(run: Run, horizon: int, number: int, repeats: int) -> list[dict]:
    """The whole table of a run: every checkpoint, every h."""
    module, args, table = run.module, run.args, []
    for step, state in run.states.items():
        torch.manual_seed(args.seed)
        agent = agent_of(run, state)
        has_model = MODELS[module.ALGO] is not None and args.horizon > 0
        learned = MODELS[module.ALGO](agent) if has_model else None
        starts = collect(agent, args, run.simulator, run.env, number, np.random.default_rng(args.seed))
        rows = compare(module, agent, learned, run.simulator, starts, horizon, repeats, args.gamma)
        table += [run.name | {"step": step} | row for row in rows]
        print(" ".join(map(str, [*run.name.values(), "step", step])), file=sys.stderr)
    return table


def show(table: list[dict]) -> str:
    """The table in columns."""
    lines = [" ".join(f"{name:>{width}}" for name, width in WIDTHS.items())]
    for row in table:
        cells = ((row.get(name, ""), width) for name, width in WIDTHS.items())
        cells = (f"{x:>{width}.4g}" if isinstance(x, float) else f"{x:>{width}}" for x, width in cells)
        lines.append(" ".join(cells))
    return "\n".join(lines)


def plot(table: list[dict], title: str, out: Path) -> None:
    """The last checkpoint: bias and root mean square error of the targets, norms of their gradients, and how
    far a learned model's states and gradients are from the simulator's, over h. A column without numbers has
    no panel."""
    last = max(row["step"] for row in table)
    kinds = list(dict.fromkeys(row["error_of"] for row in table))
    has = lambda name: any(math.isfinite(row.get(name, math.nan)) for row in table)
    names = {"bias": "bias of the target", "mse": "r.m.s. error of the target"}
    names |= {"action_norm": "norm of the action gradient", "state_error": "state error (deviations)"}
    names |= {"cosine": "cosine: critic's gradients", "action_cosine": "cosine: action gradients"}
    names = {name: text for name, text in names.items() if has(name)}
    columns = 3 if "action_norm" in names else 2
    shape = -(-len(names) // columns), columns
    size = {"figsize": (3.3 * columns, 0.3 + 2.7 * shape[0]), "layout": "constrained", "squeeze": False}
    figure, panels = pyplot().subplots(*shape, **size)
    of_model = ("state_error", "cosine", "action_cosine")  # beside the simulator
    for (name, text), axes in zip(names.items(), panels.flat, strict=False):
        for kind, colour in zip(kinds, COLOURS, strict=False):
            rows = [row for row in table if row["step"] == last and row["error_of"] == kind]
            h, values = (np.array([row.get(column, math.nan) for row in rows]) for column in ("h", name))
            if name == "mse":
                values = np.sqrt(np.maximum(values, 0))
            if (name in of_model and kind != "model - simulator") or (
                name == "action_norm" and kind == "model - returns"
            ):
                continue
            axes.plot(h, values, color=colour, label=kind.replace("-", "−"))
            if name == "bias":
                spread = 1.96 * np.array([row["bias_se"] for row in rows])
                axes.fill_between(h, values - spread, values + spread, color=colour, alpha=0.2, lw=0)
        axes.set(xlabel="imagined steps h", title=text)
        clean(axes)
        if name == "bias":
            axes.axhline(0, color="black", lw=0.8)
        elif name == "action_norm":
            axes.set_yscale("log")
        elif "cosine" in name:
            axes.set_ylim(-1.05, 1.05)
    for axes in panels.flat[len(names) :]:
        axes.remove()
    legend_below(figure, 3)
    figure.suptitle(f"{title}, checkpoint of step {last}", fontsize=11)
    save(figure, out)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of sac_mve.py, sac_svg_h.py, sac_ove.py")
    count, more = at_least(1), at_least(2)
    parser.add_argument("--horizon", type=at_least(0), default=10, help="largest h (default: 10)")
    parser.add_argument("--starts", type=more, default=512, help="transitions per checkpoint (default: 512)")
    parser.add_argument("--returns", type=more, default=4, help="Monte-Carlo returns for each (default: 4)")
    parser.add_argument("--threads", type=count, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--csv", type=Path, help="file for the table")
    parser.add_argument("--figure", type=Path, help="picture of the last checkpoint of one run")
    args = parser.parse_args()
    try:
        if args.figure and len(args.runs) > 1:
            raise ValueError(f"--figure {args.figure}: must be of one run, not of {len(args.runs)}")
        check_output(args.csv, "--csv")
        check_output(args.figure, "--figure")
        torch.set_num_threads(args.threads)
        runs, table = [open_run(folder, args.threads) for folder in args.runs], []
        for number, run in enumerate(runs):
            if run.name in [other.name for other in runs[:number]]:
                raise ValueError(f"{args.runs[number]}: must not be there twice, nor another run like it")
    except ValueError as error:
        return mistake(error)
    try:
        for run in runs:
            table += measure(run, args.horizon, args.starts, args.returns)
            if args.csv:
                write_table(args.csv, FIELDS, table)
        print(show(table))
        if args.figure:
            plot(table, table[0]["env_id"], args.figure)
    except OSError as error:  # a disk that is full by now
        return mistake(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
