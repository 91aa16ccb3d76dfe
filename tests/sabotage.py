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
ORACLE, RETRACE, SVG = "test_oracle", "test_retrace", "test_svg"
DDPG, MIN = "test_ddpg", "test_ddpg_mve_min"
VAML, MAGE, MBPO, STEVE, GRAPHS = "test_vaml", "test_mage", "test_mbpo", "test_steve", "test_graphs"
MATH, RUNS, FAILURES, RESUME, FAMILY, BAD, ACTING = (
    "test_math",
    "test_runs",
    "test_failure_modes",
    "test_resume",
    "test_family",
    "test_bad_input",
    "test_acting",
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
    ("diagnosis moves the generator", "with torch.random.fork_rng([self.device] if self.device.type == \"cuda\" else []):", "with contextlib.nullcontext():", MATH),
    ("truncation stored as termination", "next_obs, terminated, run.episode)", "next_obs, terminated or truncated, run.episode)", FAILURES),
    ("reset stored as successor", "buffer.add(obs, action, reward, next_obs,", "buffer.add(obs, action, reward, env.reset()[0] if terminated or truncated else next_obs,", FAILURES),
    ("environment seed ignored", "env.reset(seed=args.seed)", "env.reset()", RUNS),
    ("evaluation explores", "agent.act(obs, deterministic=True)", "agent.act(obs, deterministic=False)", RUNS),
    ("target entropy halved", "-float(action_dim) if", "-float(action_dim) / 2 if", FAILURES),
    ("actions not rescaled", "env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))", "pass", FAILURES),
    ("actions not clipped to the box", "np.clip(finite(\"the agent's action\", a, RunFailed), low, high)", "finite(\"the agent's action\", a, RunFailed)", RUNS),
    ("loss divided by H", "critic_loss = twin_loss(q, target)  # (2)\n        if", "critic_loss = twin_loss(q, target) / max(horizon, 1)\n        if", MATH),
    ("optimiser not saved", "isinstance(v, Tensor | nn.Module | optim.Optimizer)", "isinstance(v, Tensor | nn.Module)", RESUME),
    ("torch generator not restored", 'torch.set_rng_state(saved["torch_rng"])', "pass", RESUME),
    ("task generator not restored", "self.env.unwrapped.np_random.bit_generator.state = json.loads(saved[\"task_rng\"])", "pass", RESUME),
    ("replay order lost", 'self.added = state["added"]', 'self.added = len(state["rows"])', RESUME),
    ("TensorBoard not purged", "purge_step=self.step + 1 if self.args.resume else None", "purge_step=None", RESUME),
    ("model drawn at horizon 0", "if args.horizon == 0:  #", "if args.horizon < 0:  #", FAMILY),
    ("a longer run is not in its checkpoint", "if longer:  #", "if False:  #", RESUME),
    ("signals unheard", "    if SIGNALS:\n        raise SystemExit", "    if False:\n        raise SystemExit", RESUME),
    ("checkpoints without a rename", "            temporary.replace(path)", "            path.write_bytes(temporary.read_bytes())", RESUME),
    ("ranges unchecked", "require(low <= value <= high and value < math.inf", "require(value < math.inf", BAD),
    ("flags of another file accepted", "require(saved.keys() == values.keys()", "require(True", BAD),
    ("graphs: arguments not copied", "torch._foreach_copy_(tensors(graph.inputs), tensors(args))", "pass", GRAPHS),
    ("graphs: one for every signature", "signature = tuple(x.shape if isinstance(x, Tensor) else x for x in pytree.tree_leaves(args))", "signature = ()", GRAPHS),
    ("graphs: the schedule frozen at capture", "args.batch_size)], entropy, looks)", "args.batch_size)], entropy, False)", SVG),
    ("agents not told of episodes", "getattr(agent, \"begin_episode\", lambda: None)()", "pass", ACTING),
    ("evaluation disturbs what is remembered", "getattr(agent, name).copy_(remembered)", "pass", ACTING),
    ("evaluation draws from training's generator", "with torch.random.fork_rng([agent.device] if agent.device.type == \"cuda\" else []):", "with contextlib.nullcontext():", ACTING),
    ("retrace: one step of the window too many", "windows(buffer, at, horizon + 1)", "windows(buffer, at, horizon + 2)", RETRACE),
    ("oracle: ended rows move on", "living = np.flatnonzero(~done)", "living = np.arange(len(done))", ORACLE),
    ("oracle: samples overwritten by the next call", "(x.clone() for x in self.sample(obs))", "self.sample(obs)", GRAPHS),
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
    ("svg: survival off by one", "    for probability in done:\n", "    for probability in [*done[1:], done[0]]:\n", SVG),
    ("svg: end not counted", "alive[-1] * (1 - probability)", "alive[-1]", SVG),
    ("svg: actor descends the value", "actor_loss = -value.mean()", "actor_loss = value.mean()", SVG),
    ("svg: actor's loss not divided", "-value.mean() / (args.horizon + 1)", "-value.mean()", SVG),
    ("svg: one update of the dynamics", "for _ in range(args.dynamics_updates):", "for _ in range(1):", SVG),
    ("svg: first entropy in the temperature", "temperature_loss(self.log_alpha, log_prob, target_entropy)  # (4)", "temperature_loss(self.log_alpha, log_prob, self.target_entropy)  # (4)", SVG),
    ("svg: rewards not learned", "F.mse_loss(reward, batch.reward)", "F.mse_loss(reward, 0 * batch.reward)", SVG),
    ("svg: ends learned upside down", "termination_loss(logit, batch.terminated,", "termination_loss(logit, 1 - batch.terminated,", SVG),
    ("svg: tdk with online critics", "next_q = self.critic_target(rollout.obs[-1], rollout.action[-1]).amin(0)\n            done", "next_q = self.critic(rollout.obs[-1], rollout.action[-1]).amin(0)\n            done", SVG),
    ("svg: tdk pairs one step late", "torch.cat([batch.obs, *rollout.obs[:-1]])", "torch.cat([batch.obs, *rollout.obs[1:]])", SVG),
    ("svg: tdk pairs unweighted", "(weight * (q - target).square())", "((q - target).square())", SVG),
    ("svg: first entropy twice in (9)", "(1 - batch.terminated) * next_value", "(1 - batch.terminated) * (next_value - alpha * self.actor.sample(batch.next_obs)[1])", SVG),
    ("svg: entropy undiscounted", "value = m * r - alpha * entropy + gamma * value", "value = m * r + gamma * value - alpha * entropy / gamma", SVG),
    ("svg: rollout detached", "self.model.step(obs, action, memory)\n                action", "self.model.step(obs.detach(), action, memory)\n                action", SVG),
    ("svg: actions detached", "obs, memory = self.model.step(obs, action, memory)", "obs, memory = self.model.step(obs, action.detach(), memory)", SVG),
    ("svg: slow critics in the actor's value", "self.look_ahead(rollout, self.critic, alpha)", "self.look_ahead(rollout, self.critic_target, alpha)", SVG),
    ("svg: mean over critics at the end", "frozen=True).amin(0)\n        alive", "frozen=True).mean(0)\n        alive", SVG),
    ("svg: gradient through states in training", "model.step(predicted.detach(), actions, memory)", "model.step(predicted, actions, memory)", SVG),
    ("svg: memory detached in training", "model.step(predicted.detach(), actions, memory)", "model.step(predicted.detach(), actions, memory and [m.detach() for m in memory])", SVG),
    ("svg: teacher forcing in training", "predicted, memory, errors = obs[0], None, []\n    for actions, target in zip(action[:-1], obs[1:], strict=True):\n", "memory, errors = None, []\n    for actions, target, predicted in zip(action[:-1], obs[1:], obs[:-1], strict=True):\n", SVG),
    ("svg: model learns from the actor", "with constant(self.model):", "with contextlib.nullcontext():", SVG),
    ("svg: reset in a sequence", "inside[-1] | (inside[-2] & newest)", "inside[-3] | newest", SVG),
    ("svg: newest end in a sequence", "& (buffer.rows[places[-2], -1] == 0)", "", SVG),
    ("svg: memory not zero at the start", "memory or [None] * len(self.memory)", "memory or [torch.randn(len(obs), part.hidden_size) for part in self.memory]", SVG),
    ("svg: update gate the wrong way round", "torch.lerp(candidate, memory, keep)", "torch.lerp(memory, candidate, keep)", SVG),
    ("svg: residual in the task's units", "obs + self.normalizer.std * self.decoder(x)", "obs + self.decoder(x)", SVG),
    ("svg: no warm-up of the actor", "step > args.expansion_starts", "step > 0", SVG),
    ("svg: entropy schedule ignored", "progress = step / args.total_timesteps", "progress = 0.0", SVG),
    ("svg: imagined log pi in the temperature", "rollout.log_prob[0]  # (3b, 3d)", "rollout.log_prob[1]  # (3b, 3d)", SVG),
    ("svg: gradient not clipped", "clip_grad_norm_(self.model.parameters(), 1.0)", "clip_grad_norm_(self.model.parameters(), 1e9)", SVG),
    ("svg: balanced by the wrong class", "(len(terminated) - ended) / ended", "ended / (len(terminated) - ended)", SVG),
    ("svg: deviation over N", "(self.seen - 1).clamp_min(1)", "self.seen", SVG),
    ("svg: normaliser sees the successor", "self.normalizer.update(obs)\n", "self.normalizer.update(rest[2])\n", SVG),
    ("svg: tdk one index late", "alive = [torch.ones_like(next_q), 1 - batch", "alive = [1 - batch.terminated, 1 - batch", SVG),
    ("retrace: densities not restored", 'self.log_mu[: self.size] = state["log_mu"]', "pass", RESUME),
    ("ddpg: no bootstrap mask", "gamma * (1 - done) * next_q", "gamma * next_q", DDPG),
    ("ddpg: online actor in the target", "self.critic_target(batch.next_obs, self.actor_target(batch.next_obs))", "self.critic_target(batch.next_obs, self.actor(batch.next_obs))", DDPG),
    ("ddpg: online critic in the target", "self.critic_target(batch.next_obs, self.actor_target(batch.next_obs))", "self.critic(batch.next_obs, self.actor_target(batch.next_obs))", DDPG),
    ("ddpg: actor descends the value", "return -q.mean()", "return q.mean()", DDPG),
    ("ddpg: critic learns from the actor", "(self.critic(batch.obs, action, frozen=True)[0])", "(self.critic(batch.obs, action)[0])", DDPG),
    ("td3: critic learns from the actor", "action, frozen=True, members=1)", "action)", DDPG),
    ("min: critic learns from the actor", "(seen, action, frozen=True, members=1)", "(seen, action)", MIN),
    ("td3: the last critic alone", "weight.detach()[: len(x)], bias.detach()[: len(x)]", "weight.detach()[-len(x) :], bias.detach()[-len(x) :]", DDPG),
    ("ddpg: slow actor stands still", "polyak(self.actor_target, self.actor, args.tau)", "pass", DDPG),
    ("ddpg: noise not clipped", "* torch.randn_like(action)).clamp(-1, 1)  # (5)", "* torch.randn_like(action))  # (5)", DDPG),
    ("ddpg: noise of the weights grows when far", "near, self.noise_scale * 1.01, self.noise_scale / 1.01", "near, self.noise_scale / 1.01, self.noise_scale * 1.01", DDPG),
    ("ddpg: noise on gains", 'noise = 0 if name.startswith("norms") else', "noise =", DDPG),
    ("td3: mean over target critics", "self.critic_target(batch.next_obs, next_action).amin(0)", "self.critic_target(batch.next_obs, next_action).mean(0)", DDPG),
    ("td3: smoothing not clipped", "noise.clamp(-clip, clip)", "noise", DDPG),
    ("td3: delay ignored", "number % self.args.policy_delay == 0", "True", DDPG),
    ("ddpg: sum of distances never starts anew", "self.noise_scale / 1.01))  # (6)\n        self.noise_distance.zero_()", "self.noise_scale / 1.01))  # (6)", DDPG),
    ("ddpg: distance of the noise not a mean", "self.noise_distance / 50 < self.args", "self.noise_distance < self.args", DDPG),
    ("ddpg: noise never adapts", "and number % 50 == 0:\n                self.adapt()", "and False:\n                self.adapt()", DDPG),
    ("td3: slow copies every step", "polyak(self.critic_target, self.critic, args.tau)  # (4)\n            polyak(self.actor_target, self.actor, args.tau)  # (4)\n        return", "polyak(self.actor_target, self.actor, args.tau)  # (4)\n        polyak(self.critic_target, self.critic, args.tau)  # (4)\n        return", DDPG),
    ("mve: critic at the imagined pair's successor", "torch.cat(imagined.obs[:-1]), torch.cat(imagined.action[:-1])", "torch.cat(imagined.obs[1:]), torch.cat(imagined.action[1:])", DDPG),
    ("mve: online actor imagines", "self.actor_target(obs), reward, done)", "self.actor(obs), reward, done)", DDPG),
    ("mve: targets one step late (TD-k)", "tdk_loss(critic_loss, q_imagined, values[:-1], alive)", "tdk_loss(critic_loss, q_imagined, values[1:], alive)", DDPG),
    ("mve: the whole horizon everywhere", "values.append(td_target(imagined.reward[t], imagined.done[t], values[-1], gamma))", "values.append(td_target(imagined.reward[t], imagined.done[t], next_q, gamma))", DDPG),
    ("mve: known reward without control cost", "- task._ctrl_cost_weight * control", "", DDPG),
    ("min: reward of the first goal", "reward = self.task.reward(next_obs, goal)", "reward = self.task.reward(next_obs, self.goal[episode])", MIN),
    ("min: reward of s, not of s'", "reward = self.task.reward(next_obs, goal)", "reward = self.task.reward(self.obs[episode, t], goal)", MIN),
    ("min: hindsight from now on", "later = t + 1 + (torch", "later = t + (torch", MIN),
    ("min: all goals relabelled", "self.hindsight / (1 + self.hindsight)", "1.0", MIN),
    ("min: the first goal in the rollout", "goal, size = batch.next_obs[None], batch.goal[None], len", "goal, size = batch.next_obs[None], 0 * batch.goal[None], len", MIN),
    ("min: online actor imagines", "action = self.actor_target(seen)", "action = self.actor(seen)", MIN),
    ("min: online critics judge", "value = self.critic_target(seen, action).amin(0)", "value = self.critic(seen, action).amin(0)", MIN),
    ("min: mean over critics", "value = self.critic_target(seen, action).amin(0)", "value = self.critic_target(seen, action).mean(0)", MIN),
    ("min: horizons discounted alike", "total + gamma ** (h + 1) * values[:, h]", "total + gamma * values[:, h]", MIN),
    ("min: rewards undiscounted", "total + gamma**h * rewards[:, h - 1]", "total + rewards[:, h - 1]", MIN),
    ("min: not within reach", "-1 / (1 - gamma) if bounded else -math.inf, 0)", "-math.inf, math.inf)", MIN),
    ("min: minimum before the mean", "means = targets.mean(0)", "means = targets.amin(0)", MIN),
    ("min: maximum over horizons", '"min": means.amin(0)', '"min": means.amax(0)', MIN),
    ("min: one-step inputs in the loss", "x = self(x, action[:, :, k])", "x = self(obs[:, :, k], action[:, :, k])", MIN),
    ("min: gradient cut between steps", "x = self(x, action[:, :, k])", "x = self(x.detach(), action[:, :, k])", MIN),
    ("min: members see the same windows", "shape, steps = (args.members, args.model_batch)", "shape, steps = (1, args.model_batch)", MIN),
    ("min: holdout leaks into training", "return (~held_out(self.number[: self.size])).nonzero()", "return (held_out(self.number[: self.size]) | True).nonzero()", MIN),
    ("min: slow copies every update", "        polyak(self.critic_target, self.critic, args.tau)  # (5)\n", "            polyak(self.critic_target, self.critic, args.tau)  # (5)\n", MIN),
    ("min: action penalty lost", "actor_loss + args.action_l2 * action.square().mean()", "actor_loss", MIN),
    ("min: angles on a line", "return x - 2 * math.pi * angle", "return x - 0 * math.pi * angle", MIN),
    ("min: expansion before the model is ready", "args.horizon if args.horizon > 0 and self.model_is_ready else 0", "args.horizon if step >= args.learning_starts else 0", MIN),
    ("min: episodes by their order, not number", "np.random.SeedSequence((seed, k))", "np.random.SeedSequence((seed, k - first))", MIN),
    ("min: tasks stepped one by one", "ThreadPoolExecutor(threads)", "ThreadPoolExecutor(1)", MIN),
    ("min: actions for other tasks", "self.envs, actions), strict", "self.envs, actions[::-1]), strict", MIN),
    ("min: evaluation explores", "functools.partial(agent.act_for, deterministic=True)", "agent.act_for", MIN),
    ("min: random actions left out", "torch.where(at_random, 2 * torch.rand_like(action) - 1, noisy)", "noisy", MIN),
    ("min: replay not restored", "getattr(self, name)[: self.size] = state[name]", "pass", MIN),
    ("vaml: likelihood without log sigma", "+ log_std + 0.5 * math.log(2 * math.pi)", "+ 0.5 * math.log(2 * math.pi)", VAML),
    ("vaml: constant dimensions in the likelihood", "return (nll * varying).sum(2).mean(1)", "return nll.sum(2).mean(1)", VAML),
    ("vaml: mean of squares, not square of the mean", "(value - imagined.mean(0)).square().mean(1)", "(value - imagined).square().mean((0, 2))", VAML),
    ("vaml: halves not independent", "first, second = imagined.chunk(2)", "first = second = imagined", VAML),
    ("vaml: slopes not squared", "(gradient * error).square().sum(2)", "(gradient.abs() * error.square()).sum(2)", VAML),
    ("vaml: policy's noise not shared", "imagined = self.soft_value(self.model.scatter(obs, mean, log_std, samples), noise)", "imagined = self.soft_value(self.model.scatter(obs, mean, log_std, samples), torch.randn_like(noise))", VAML),
    ("vaml: action of V detached", "q = self.critic_target(flat, u.tanh()).amin(0)", "q = self.critic_target(flat, u.tanh().detach()).amin(0)", VAML),
    ("vaml: value with online critics", "q = self.critic_target(flat, u.tanh()).amin(0)", "q = self.critic(flat, u.tanh()).amin(0)", VAML),
    ("vaml: no entropy in the value", "value = q - self.log_alpha.detach().exp() * squashed", "value = q - 0 * squashed", VAML),
    ("vaml: actor learns from the model's loss", "with constant(self.actor):\n                imagined", "with contextlib.nullcontext():\n                imagined", VAML),
    ("vaml: real states in the critics' targets", "imagined = self.imagine_next(batch.obs, taken)  # (1a)", "imagined = batch.next_obs  # (1a)", VAML),
    ("vaml: imagined ends ignored", "target = soft_target(reward, done, next_q", "target = soft_target(reward, 0 * done, next_q", VAML),
    ("vaml: share does not decay", "max(0.0, 1 - step / self.args.mle_decay)", "1.0", VAML),
    ("vaml: last weights, not the best", "self.model.load_state_dict(kept)", "pass", VAML),
    ("vaml: patience off by one", "if bad == args.patience or", "if bad > args.patience or", VAML),
    ("vaml: validation with one sample", "max(8, self.args.samples)", "self.args.samples", VAML),
    ("vaml: every held-out size captured", "self.judge_full if count == HELD_OUT else self.judge", "self.judge_full", VAML),
    ("vaml: odd minibatches captured", "self.fit_full if len(at) == args.model_batch else self.fit", "self.fit_full", VAML),
    ("vaml: c of the likelihood for both losses", "for c in (share, 1 - share))", "for c in (share, 1.0))", VAML),
    ("vaml: held out rows are trained on", "held, train = order[:count], order[count:]", "held, train = order[:count], order", VAML),
    ("vaml: reward before the step", "tip, thing, goal = next_obs[:, 14:].split(3, 1)", "tip, thing, goal = obs[:, 14:].split(3, 1)", VAML),
    ("vaml: NaN is alive", "next_obs.isfinite().all(1) & (next_obs[:, 1].abs() <= 0.2)", "~(next_obs[:, 1].abs() > 0.2)", VAML),
    ("mage: sample detached", "next_obs, reward = self.model.step(obs, action)\n        with", "next_obs, reward = self.model.step(obs, action.detach())\n        with", MAGE),
    ("mage: Huber of the elements", "huber((error.square().sum(2) + 1e-12).sqrt())", "huber(error).sum(2)", MAGE),
    ("mage: no gradient of the gradient", "q.sum(), actions, create_graph=True)", "q.sum(), actions, retain_graph=True)", MAGE),
    ("mage: model learns from the critics", "with constant(self.model):\n            next_obs", "with contextlib.nullcontext():\n            next_obs", MAGE),
    ("mage: ends ignored", "return td_target(reward, ended, self.critic_target(seen", "return td_target(reward, 0 * ended, self.critic_target(seen", MAGE),
    ("mage: critics delayed", "        polyak(self.critic_target, self.critic, args.tau)  # (4)\n        return metrics | {", "            polyak(self.critic_target, self.critic, args.tau)  # (4)\n        return metrics | {", MAGE),
    ("mage: actor climbs the mean", "frozen=True).amin(0).mean()  # (3)", "frozen=True).mean(0).mean()  # (3)", MAGE),
    ("mage: norm clipped, not elements", "nn.utils.clip_grad_value_(", "nn.utils.clip_grad_norm_(", MAGE),
    ("mage: weights swapped", "loss = args.grad_weight * action_gradient_loss(error)", "loss = args.td_weight * action_gradient_loss(error)", MAGE),
    ("mage: observations not normalised", "action = self.actor(self.model.normalize(obs))\n        if deterministic", "action = self.actor(obs)\n        if deterministic", MAGE),
    ("mbpo: rollouts go on after their end", "next_obs[done == 0]", "next_obs", MBPO),
    ("mbpo: rollouts stand still", "ends, obs = ends + float(done.sum()), next_obs[done == 0]", "ends, obs = ends + float(done.sum()), obs[done == 0]", MBPO),
    ("mbpo: all members imagine", "errors.argsort()[: args.elites]", "torch.arange(args.elites)", MBPO),
    ("mbpo: one bootstrap for all", "torch.randint(len(train), (members, len(train)), device=self.device)", "torch.randint(len(train), (1, len(train)), device=self.device).expand(members, -1)", MBPO),
    ("mbpo: no bootstrap", "rows = train[torch.randint(len(train), (members, len(train)), device=self.device)]", "rows = train.repeat(members, 1)", MBPO),
    ("mbpo: any gain counts", "new < 0.99 * old", "new < old", MBPO),
    ("mbpo: all weights of the last epoch", "for old, new in zip(kept, weights, strict=True):\n                new.copy_(old)", "pass", MBPO),
    ("mbpo: schedule not rounded down", "return int(first + min", "return round(first + min", MBPO),
    ("mbpo: penalty halved twice", "sum(0.5 * w * layer.weight", "sum(0.25 * w * layer.weight", MBPO),
    ("mbpo: all imagined", "real = int(args.real_ratio * args.batch_size)", "real = 0", MBPO),
    ("mbpo: ring forgets the newest", "kept = self.in_order()[-capacity:]", "kept = self.in_order()[:capacity]", MBPO),
    ("mbpo: imagined replay not restored", 'self.rows[: self.size] = state["rows"]\n\n\ndef known', "pass\n\n\ndef known", RESUME),
    ("steve: weights by deviation", "1 / (targets.var(1, correction=0) + 1e-8)", "1 / (targets.std(1, correction=0) + 1e-8)", STEVE),
    ("steve: rewards of ended trajectories", "gamma**h * (alive[h - 1][:, None] * rewards[h - 1])", "gamma**h * rewards[h - 1]", STEVE),
    ("steve: survival one step late", "gamma ** (h + 1) * (alive[h][:, None, None] * q[h]", "gamma ** (h + 1) * (alive[h - 1][:, None, None] * q[h]", STEVE),
    ("steve: bootstrap discounted too little", "gamma ** (h + 1) * (alive[h]", "gamma**h * (alive[h]", STEVE),
    ("steve: ends are thresholds", "ended = self.termination(step).squeeze(2).sigmoid()", "ended = (self.termination(step).squeeze(2) > 0).float()", STEVE),
    ("steve: online critics judge", "q = self.critic_target(imagined.obs.flatten(0, 2)", "q = self.critic(imagined.obs.flatten(0, 2)", STEVE),
    ("steve: every critic sees every datum", "dealt = deal(args.batch_size, args.critics, self.device)\n        q", "dealt = torch.arange(args.batch_size, device=self.device).repeat(args.critics, 1)\n        q", STEVE),
    ("steve: slow critics every update", "% args.target_interval == 0:", "% 1 == 0:", STEVE),
    ("steve: noise after the tanh", "mean = mean + noisy * torch.randn_like(mean)  # (8)\n        return mean.tanh()", "mean = mean.tanh() + noisy * torch.randn_like(mean)  # (8)\n        return mean", STEVE),
    ("steve: TD-k pairs not weighted", "(alive[j].flatten()[dealt] * error.square())", "error.square()", STEVE),
    ("steve: TD-k targets not conditional", "value = (alive[j] / (alive[j - 1] + 1e-8)) * target", "value = alive[j] * target", STEVE),
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
