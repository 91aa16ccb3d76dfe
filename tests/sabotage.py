"""Break the code on purpose and see a test fail: python tests/sabotage.py

Each sabotage is one small textual change of a copy of the repository, made in every file that has the text, followed
by the tests that should notice. Prints a table; exit code 1 if any sabotage went unnoticed. Not part of the test
command (about ten minutes); run it when you change an update rule or its tests.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORACLE, RETRACE = "test_oracle", "test_retrace"
MATH, RUNS, FAILURES, RESUME, FAMILY = (
    "test_math",
    "test_runs",
    "test_failure_modes",
    "test_resume",
    "test_family",
)
SABOTAGES = [  # name, old text, new text, test modules
    ("sign of the entropy in the target", "next_q - alpha * next_log_prob", "next_q + alpha * next_log_prob", MATH),
    ("no entropy in the target", "next_q - alpha * next_log_prob", "next_q", MATH),
    ("no bootstrap mask", "gamma * (1 - done) * (next_q", "gamma * (next_q", MATH),
    ("mean over target critics", ".amin(0)\n            target", ".mean(0)\n            target", MATH),
    ("mean over target critics (MVE)", "rollout.action[-1]).amin(0)", "rollout.action[-1]).mean(0)", MATH),
    ("maximum in the actor loss", "log_prob - q.amin(0)", "log_prob - q.amax(0)", MATH),
    ("target not detached", "with torch.no_grad():\n            next_action", "if True:\n            next_action", MATH),
    ("target not detached (MVE)", "with torch.no_grad():\n            rollout", "if True:\n            rollout", MATH),
    ("online critic in the target", "next_q = self.critic_target(", "next_q = self.critic(", MATH),
    ("critic learns from the actor loss", "action, frozen=True)", "action)", MATH),
    ("sign of the actor's entropy", "(alpha * log_prob - q", "(-alpha * log_prob - q", MATH),
    ("sign of the temperature loss", "return -log_alpha * (log", "return log_alpha * (log", MATH),
    ("temperature linear in alpha", "return -log_alpha * (log", "return -log_alpha.exp() * (log", MATH),
    ("squash correction left out", "(gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u)))", "gaussian", MATH),
    ("squash through 1 - a^2 + 1e-6", "2 * (math.log(2) - u - F.softplus(-2 * u))", "(1 - u.tanh() ** 2 + 1e-6).log()", MATH),
    ("Polyak the wrong way round", "list(source.parameters()), tau)", "list(source.parameters()), 1 - tau)", MATH),
    ("model predicts s' itself", "return obs + delta[:, :-1]", "return delta[:, :-1]", MATH),
    ("model trained on s'", "torch.cat([batch.next_obs - batch.obs,", "torch.cat([batch.next_obs,", MATH),
    ("rows of members not restored", "order % len(obs), order.argsort()[: len(obs)]", "order % len(obs), order[: len(obs)]", MATH),
    ("variance for deviation", "(0.5 * log_var).exp() * torch.randn", "log_var.exp() * torch.randn", MATH),
    ("sign of the log-variance in the loss", "* (-log_var).exp() + log_var)", "* (-log_var).exp() - log_var)", MATH),
    ("horizon off by one", "for _ in range(self.args.horizon):", "for _ in range(self.args.horizon + 1):", MATH),
    ("log pi of the wrong step", "rollout.log_prob[t + 1]", "rollout.log_prob[t]", MATH),
    ("imagined terminations ignored", "reward, done, values[-1]", "reward, 0 * done, values[-1]", MATH),
    ("survival off by one (TD-k)", "[1 - ended, *(1 - done for done in rollout.done[:-1])]", "[1 - done for done in rollout.done]", MATH),
    ("TD-k divided by H + 1", "/ max(len(target), 1)", "/ (len(target) + 1)", MATH),
    ("particles summed", "target.view(particles, -1).mean(0)", "target.view(particles, -1).sum(0)", MATH),
    ("holdout leaks into training", "return episode % 10 == 1", "return episode % 10 == 11", MATH),
    ("windows cross episodes", "found = first[whole & held_out", "found = first[held_out", MATH),
    ("diagnosis moves the generator", "with torch.random.fork_rng(", "with contextlib.nullcontext(", MATH),
    ("truncation stored as termination", "next_obs, terminated, episode)", "next_obs, terminated or truncated, episode)", FAILURES),
    ("reset stored as successor", "buffer.add(obs, action, reward, next_obs,", "buffer.add(obs, action, reward, env.reset()[0] if terminated or truncated else next_obs,", FAILURES),
    ("environment seed ignored", "env.reset(seed=args.seed)", "env.reset()", RUNS),
    ("evaluation explores", "agent.act(obs, deterministic=True)", "agent.act(obs, deterministic=False)", RUNS),
    ("target entropy halved", "-float(action_dim) if", "-float(action_dim) / 2 if", FAILURES),
    ("actions not rescaled", "return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))", "return env", FAILURES),
    ("actions not clipped to the box", "np.clip(action, flat.low, flat.high)", "action", RUNS),
    ("loss divided by H", "critic_loss = twin_loss(q, target)  # (2)\n        if", "critic_loss = twin_loss(q, target) / max(horizon, 1)\n        if", MATH),
    ("optimiser not saved", "isinstance(v, Tensor | nn.Module | optim.Optimizer)", "isinstance(v, Tensor | nn.Module)", RESUME),
    ("torch generator not restored", 'torch.set_rng_state(saved["torch_rng"])', "pass", RESUME),
    ("task generator not restored", 'task_rng.state = json.loads(saved["task_rng"])', "pass", RESUME),
    ("replay order lost", 'self.added = state["added"]', 'self.added = len(state["rows"])', RESUME),
    ("TensorBoard not purged", "purge_step=step + 1", "purge_step=None", RESUME),
    ("model drawn at horizon 0", "if args.horizon == 0:  #", "if args.horizon < 0:  #", FAMILY),
    ("oracle: ended rows move on", "living = np.flatnonzero(~done)", "living = np.arange(len(done))", ORACLE),
    ("oracle: an end pays on", "reward[:] = 0\n            if", "if", ORACLE),
    ("oracle: warm start lost", "initial_warmstart=warm", "initial_warmstart=np.zeros_like(warm)", ORACLE),
    ("oracle: state of another transition", "buffer.states[at.cpu()]", "buffer.states[at.cpu() - 1]", ORACLE),
    ("oracle: one substep too few", "control, nstep=skip,", "control[:, 1:], nstep=skip - 1,", ORACLE),
    ("oracle: dt of the default task", "step.before[:, 0]) / task.dt", "step.before[:, 0]) / 0.05", ORACLE),
    ("oracle: velocity from where it is now", "step.field[\"centre\"][:, 0] - step", "step.qpos[:, 0] - step", ORACLE),
    ("oracle: actions not scaled", "np.clip(self.copy.func(action), bounds", "np.clip(action, bounds", ORACLE),
    ("oracle: lagged places not put back", "array[...] = row[at", "_ = row[at", ORACLE),
    ("oracle: states not restored", 'self.states[: self.size] = state["states"]', "pass", RESUME),
    ("retrace: beyond the episode", ".view_as(trace) * linked[1:]", ".view_as(trace)", RETRACE),
    ("retrace: across the ring's seam", "(age + k < buffer.size) & ", "", RETRACE),
    ("retrace: ratio not capped", "ratio.clamp_max(1)", "ratio", RETRACE),
    ("retrace: no correction", "trace[k] * (target - q[k])", "trace[k] * target", RETRACE),
    ("retrace: warm-up not uniform", "self.added < self.agent.args.learning_starts", "False", RETRACE),
    ("retrace: entropy twice", "corrected = next_q[k]", "corrected = next_q[k] - alpha * next_log_prob[k]", RETRACE),
    ("retrace: densities not restored", 'self.log_mu[: self.size] = state["log_mu"]', "pass", RESUME),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="sabotages whose name contains this")
    args = parser.parse_args()
    unnoticed = []
    for name, old, new, tests in SABOTAGES:
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__"))
            files = [path for path in (copy / "algos").glob("*.py") if old in path.read_text()]
            assert files, f"{name}: the text to break is gone: {old}"
            for path in files:
                path.write_text(path.read_text().replace(old, new))
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "--tb=no",
                "-p",
                "no:cacheprovider",
                f"tests/{tests}.py",
            ]
            environment = {**os.environ, "FARSIGHT_KILLS": "1", "PYTHONPATH": str(copy)}
            out = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        failed = [
            line.split("::")[1].split(" ")[0] for line in out.stdout.splitlines() if line.startswith("FAILED")
        ]
        print(f"{name:<40} {failed[0] if failed else 'NOT NOTICED'}", flush=True)
        if not failed:
            unnoticed.append(name)
    print(f"{len(unnoticed)} unnoticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
