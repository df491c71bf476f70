"""What a run of a script will take on this machine, for scripts whose arithmetic benchmarks/cost.py does not know.

As in benchmarks/evaluate.py the script's own `main` is called, with a harness of the same names: here the data and the
episodes are noise of the task's sizes, and a phase ends after about a second. So this file knows no policy and no
critic, and every baseline builds its networks and makes its updates itself. Nothing is written.
"""

import contextlib
import time
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

from benchmarks import speed
from benchmarks.harness.runs import PHASES
from benchmarks.tasks.dataset import Dataset

FEW = 10  # steps of an online episode here, or fewer where an update takes long; the rest is like them
SECONDS = 1.0  # of a phase, but at least one step of it


class Rehearsal(contextlib.nullcontext):
    """As `runs.Run`, of a run that makes a few steps of each phase; it counts what all of them will take.

    rows: states of the data; episode: steps of an online one, which at most it has.
    """

    def __init__(self, rows: int, episode: int, args, dataset, buffer, **modules):
        super().__init__(self)
        self.rows, self.episode, self.args, self.buffer = rows, episode, args, buffer
        self.device, self.progress, self.phase = buffer.states.device, {"step": 0}, PHASES[0]
        self.few, self.seconds = max(FEW, 2 * getattr(args, "chunk", 1)), {}
        self.weights = sum(p.numel() for m in modules.values() if isinstance(m, nn.Module) for p in m.parameters())

    def steps(self, phase, total, envs=None, act=None, evals=1, unit="update"):
        """About a second of a phase. The first step sets things up and does not count, but where it takes longer."""
        done, began = 0, self._now()
        for step in range(total):
            yield step
            done, now = done + 1, self._now()
            if now - began > SECONDS:
                break
            if step == 0 and total > 1:
                done, began = 0, now
        if total:
            each = (now - began) / done
            self.seconds[phase] = each * total * (1 if unit == "update" else self.episode / self.few)
            if unit == "update":  # a step online has about one such update: no more than two seconds of them
                self.few = max(2 * getattr(self.args, "chunk", 1), min(self.few, round(2 / max(each, 1e-6))))
        self.phase = PHASES[PHASES.index(phase) + 1]

    def each(self, description, parts):
        """One part of what is done once for all states."""
        parts, began = list(parts), self._now()
        yield parts[0]
        self.seconds[description] = (self._now() - began) * self.rows / max(1, len(parts[0]))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def starts(self, phase):
        return self.phase == phase

    def log(self, metrics, every=1):
        pass

    def count(self, **done):
        pass

    def check_stop(self):
        pass


def rehearse(module, argv: list[str], sizes: tuple[int, int], rows: int, episode: int) -> tuple[dict, float]:
    """Seconds of each phase of a run of this script with this command line, its evaluations not counted, and its bytes.

    Online episodes are taken to last as long as they may, and, where only those count, to succeed.

    sizes: of an observation and of an action; rows: of the data; episode: the most steps of one.
    """
    made = []

    def set_up(args, make_env, load_dataset):
        args.compile, args.reward_min = "no", args.reward_min or -1.0  # 0 is the data's smallest
        torch.set_num_threads(args.threads or 1)
        name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        spaces = [SimpleNamespace(shape=(size,)) for size in sizes]
        env = SimpleNamespace(observation_space=spaces[0], action_space=spaces[1])
        return torch.device(name), env, None, speed.random_dataset(*sizes)

    def run(args, dataset, buffer, **modules):
        made.append(Rehearsal(rows, episode, args, dataset, buffer, **modules))
        return made[0]

    def collect_episode(env, act, seed, run):
        n, rng = run.few, np.random.default_rng(seed)
        states = rng.standard_normal((n + 1, sizes[0]), dtype=np.float32)
        for obs in states[: n : getattr(run.args, "chunk", 1)]:
            act(torch.as_tensor(obs[None], device=run.device))
        actions, rewards = rng.uniform(-1, 1, (n, sizes[1])).astype(np.float32), np.zeros(n, np.float32)
        terminals, timeouts = np.zeros(n, bool), np.arange(n) == n - 1
        return Dataset(states[:-1], actions, rewards, states[1:], terminals, timeouts, "noise"), True

    ours = {"set_up": set_up, "Run": run, "collect_episode": collect_episode, "finish": lambda *_: None}
    theirs = {name: getattr(module, name) for name in ours}
    try:
        for name, function in ours.items():
            setattr(module, name, function)
        with torch.random.fork_rng():
            module.main(argv)
    finally:
        for name, function in theirs.items():
            setattr(module, name, function)
    # weights and two moments, and the episodes, if they are kept, twice while a checkpoint replaces another
    kept = made[0].args.num_online_episodes * (len(made[0].buffer.data) > 1)
    episodes = 4.0 * kept * episode * (2 * sizes[0] + sizes[1] + 3)
    return made[0].seconds, 2 * (12.0 * made[0].weights + episodes) + 20e6
