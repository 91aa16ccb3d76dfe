"""What an update of mbpo.py costs: beside sac.py's, and beside the matrix products it cannot do without.

    python -m experiments.speed.mbpo_update --threads 1 2 -- --preset released

Two tables, medians of alternating rounds in milliseconds. SAC: one update of sac.py on a batch from its
replay, and one of mbpo.py on a batch that mixes real and imagined transitions. Ensemble: one minibatch step
of the seven members with loss, gradients and Adam, and the floor under it: the batched matrix products of its
forward and backward passes alone, on tensors of the same shapes. On a task without a known rule of
termination the step is that of its classifier too.
"""

import statistics
import sys
import time
from itertools import pairwise

import torch

from experiments.algorithms import load
from experiments.report.commands import Parser, mistake


def filled(module, args, steps: int):
    """Agent and replay of one of our files, after `steps` random steps."""
    env = module.make_env(args.env_id, args.env_kwargs)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    agent = module.Agent(args, *dims, torch.device("cpu"))
    buffer = agent.make_buffer(steps, env)
    obs, _ = env.reset(seed=1)
    for _ in range(steps):
        action = 2 * torch.rand(dims[1]).numpy() - 1
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, 0)
        obs = env.reset()[0] if terminated or truncated else next_obs
    return agent, buffer


def products(agent, batch: int) -> list[tuple[torch.Tensor, ...]]:
    """Operands (x, w, y) of y = x w, of shapes [E, B, i], [E, i, o], [E, B, o], one triple for each layer."""
    sizes = [layer.weight.shape for layer in agent.model.layers]
    assert all(a[2] == b[1] for a, b in pairwise(sizes))
    members = agent.model.members
    return [(torch.randn(members, batch, i), torch.randn(members, i, o), torch.randn(members, batch, o))
            for _, i, o in sizes]  # fmt: skip


def multiply(operands: list[tuple[torch.Tensor, ...]]) -> None:
    """The products of a forward and a backward pass; the first layer's inputs need no gradient."""
    for place, (x, w, y) in enumerate(operands):
        torch.bmm(x, w)
        torch.bmm(x.transpose(1, 2), y)
        if place > 0:
            torch.bmm(y, w.transpose(1, 2))


def measure(env_id: str, threads: int, rounds: int, repeats: int, extra: list[str]) -> list[float]:
    """Median milliseconds of: sac.py's update, mbpo.py's, a minibatch step of the ensemble, its floor."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    sac, mbpo = load("sac"), load("mbpo")
    flags = ["--env-id", env_id, "--device", "cpu"]
    base, base_buffer = filled(sac, sac.parse(flags), 2_000)
    args = mbpo.parse([*flags, *extra])
    agent, buffer = filled(mbpo, args, 2_000)
    with torch.no_grad():
        agent.choose_elites(torch.arange(args.elites))
        agent.branch(buffer, 0)
    rows = torch.randint(2_000, (args.members * args.batch_size,))
    operands, real = products(agent, args.batch_size), int(args.real_ratio * args.batch_size)

    def mixed_update() -> None:
        pairs = zip(buffer[buffer.sample(real)], agent.imagined.draw(args.batch_size - real), strict=True)
        agent.learn(mbpo.Batch(*(torch.cat(both) for both in pairs)))

    def ensemble_step() -> None:
        agent.fit_minibatch(buffer[rows])

    calls = (lambda: base.update(base_buffer, 1), mixed_update, ensemble_step, lambda: multiply(operands))
    found: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):  # the first warms up
        for times, call in zip(found, calls, strict=True):
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            if number:
                times.append(1e3 * (time.perf_counter() - started) / repeats)
    return [statistics.median(times) for times in found]


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--env-id", default="Hopper-v5", help="(default: Hopper-v5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    parser.add_argument("--repeats", type=int, default=20, help="calls in a row of each (default: 20)")
    parser.add_argument("extra", nargs="*", help="after --: arguments for mbpo.py")
    args = parser.parse_args()
    for name, value in (("rounds", args.rounds), ("repeats", args.repeats), ("threads", min(args.threads))):
        if value < 1:
            return mistake(f"--{name} {value}: must be at least 1")
    columns = ("sac.py", "mbpo.py", "ratio", "ensemble", "products", "share")
    print(f"{'threads':>8}" + "".join(f"{name:>10}" for name in columns))
    for threads in args.threads:
        try:
            base, ours, fit, floor = measure(args.env_id, threads, args.rounds, args.repeats, args.extra)
        except ValueError as error:  # BadInput is one
            return mistake(error)
        values = (base, ours, ours / base, fit, floor, floor / fit)
        print(f"{threads:>8}" + "".join(f"{value:>10.2f}" for value in values), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
