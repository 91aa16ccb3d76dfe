"""What a gradient step of sac_vaml.py's model costs with each of its losses.

    python -m experiments.speed.vaml_losses --threads 1 2 --samples 1 8

Medians of alternating rounds in milliseconds: loss, gradients and Adam on a minibatch of a random replay.
What is found once per fit (slopes for vagram, V(s') for value-aware losses) is not counted. `ratio` is the
cost in multiples of likelihood's.
"""

import statistics
import sys
import time

import torch

from experiments.algorithms import load
from experiments.report.commands import Parser, mistake
from experiments.speed.mbpo_update import filled

SHARES = {"mle": 1.0, "vaml": 0.0, "reg-vaml": 0.001, "vagram": 0.0}


def measure(env_id: str, threads: int, samples: int, rounds: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step with each loss."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    vaml, calls = load("sac_vaml"), {}
    for name, share in SHARES.items():
        flags = ["--env-id", env_id, "--device", "cpu", "--model-loss", name, "--samples", str(samples)]
        agent, buffer = filled(vaml, vaml.parse(flags), 1_000)
        fixed = agent.once_per_fit(buffer[torch.arange(1_000)].next_obs, share, 1e9)
        weights = vaml.loss_weights(share, agent.device)

        def step(agent=agent, buffer=buffer, weights=weights, fixed=fixed) -> None:
            at = torch.randint(1_000, (agent.args.model_batch,))
            agent.fit(buffer[at], weights, fixed[at], False)

        calls[name] = step
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            if number:
                found[name].append(1e3 * (time.perf_counter() - started) / repeats)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--env-id", default="Pusher-v5", help="(default: Pusher-v5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--samples", type=int, nargs="+", default=[1], help="n of (8a) (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: 15)")
    parser.add_argument("--repeats", type=int, default=20, help="steps in a row of each (default: 20)")
    args = parser.parse_args()
    numbers = {"rounds": args.rounds, "repeats": args.repeats}
    numbers |= {"threads": min(args.threads), "samples": min(args.samples)}
    for name, value in numbers.items():
        if value < 1:
            return mistake(f"--{name} {value}: must be at least 1")
    names = list(SHARES)
    heads = [names[0], *(part for name in names[1:] for part in (name, "ratio"))]
    print(f"{'threads':>8}{'samples':>8}" + "".join(f"{head:>10}" for head in heads))
    for threads in args.threads:
        for samples in args.samples:
            try:
                found = measure(args.env_id, threads, samples, args.rounds, args.repeats)
            except ValueError as error:  # BadInput is one
                return mistake(error)
            base = found[names[0]]
            values = [base, *(x for name in names[1:] for x in (found[name], found[name] / base))]
            print(f"{threads:>8}{samples:>8}" + "".join(f"{x:>10.2f}" for x in values), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
