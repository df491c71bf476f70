"""A finished run's policy again: on more episodes, on other starts, on another task, in another way, or on film.

    python -m benchmarks.evaluate runs/<folder>                                # 100 episodes of the optimized policy
    python -m benchmarks.evaluate runs/<folder> --policy cloned --eval-seed 7  # the policy alone, from other starts
    python -m benchmarks.evaluate runs/<folder> --task antmaze-large-play-v2 --video
    python -m benchmarks.evaluate runs/<folder> --flags num_samples=4 greedy_rollouts=False  # acting in another way

The networks are built, and the actions chosen, by the run's own script: its `main` is called with a harness that reads
the weights from checkpoint.pt and trains nothing. So this file knows no policy and no critic, and serves every script
that calls `set_up`, `Run` and `finish`, or of a simulated robot `robot.set_up_robot`, `Run` and `robot.finish_run`.
Nothing in the run's folder changes but evaluation.json, which gets one entry more, and videos/.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import tyro
from scipy.stats import binomtest

from benchmarks.harness import cli, rollouts
from benchmarks.harness.runs import SCORES, provenance, write_atomically
from benchmarks.tasks.dataset import Dataset

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLACES = (".", "benchmarks/baselines")  # where a script may lie, from the repository's root


@dataclass
class Options:
    """Evaluate the policy of a run's checkpoint; print its success rate and add an entry to RUN/evaluation.json."""

    run: tyro.conf.Positional[pathlib.Path]  # the run's folder, as its first lines name it
    episodes: int = 100  # how many
    # What acts online, pi^opt; or one sample of the policy alone, as after cloning. The weights are the checkpoint's:
    # of a run that has distilled, the distilled policy's, for a run keeps no copy of what cloning left
    policy: Literal["optimized", "cloned"] = "optimized"
    video: bool = False  # film three episodes into RUN/videos (pip install moviepy)
    task: str = ""  # another task with the same spaces; empty: the run's
    flags: tuple[str, ...] = ()  # of the script, over those of the run: --flags num_samples=4 greedy_rollouts=False
    eval_seed: int = -1  # seed of the first episode's start, one more for each; -1: the run's
    device: str = "auto"  # auto: the GPU if there is one
    threads: int = 0  # CPU threads, 0: all cores this process may use


def script_of(folder: pathlib.Path):
    """The module of the script that made a run's folder, and the run's config. One line where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
        name = str(config["script"])
    except (OSError, ValueError, KeyError, TypeError):
        cli.fail(f"{folder} is not a run's folder: it has no readable config.json")
    if not (folder / "checkpoint.pt").is_file():
        cli.fail(f"{folder} holds no checkpoint.pt: results that were kept without one cannot be evaluated again")
    places = [pathlib.Path(place, f"{name}.py") for place in PLACES if name.isidentifier()]
    path = next((path for path in places if (ROOT / path).is_file()), None)
    if path is None:
        cli.fail(f"{folder} was made by {name}.py, which is not in {ROOT} nor in its benchmarks/baselines")
    if str(ROOT) not in sys.path:  # scripts import `benchmarks`
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(".".join(path.with_suffix("").parts)), config


def load_checkpoint(folder: pathlib.Path) -> dict:
    """The run's checkpoint as its `Run.save` wrote it: tensors, numbers and texts, nothing that could be a program."""
    try:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("modules", "progress")}
    except Exception as error:  # a damaged file can raise almost anything
        cli.fail(f"{folder / 'checkpoint.pt'} cannot be read ({(str(error).splitlines() or ['empty'])[0]})")


def set_flags(args, flags) -> None:
    """Put name=value texts into a run's arguments: numbers, True, False, words of a few. One line if it cannot be."""
    read = {bool: {"True": True, "False": False}.__getitem__, int: int, float: float}
    words = {field.name: get_args(field.type) for field in dataclasses.fields(args)}
    for text in flags:
        name, _, value = text.partition("=")
        name = name.replace("-", "_")
        try:
            setattr(args, name, value if value in words[name] else read[type(getattr(args, name))](value))
        except (AttributeError, KeyError, ValueError):
            cli.fail(f"--flags {text}: write one as utd=4: a number, True or False, or one of the flag's words")


# --- A HARNESS THAT TRAINS NOTHING: what a script's main asks for, under the names that it imported ---
def use(options: Options, args) -> None:
    """Put into a run's arguments what is asked for now."""
    set_flags(args, options.flags)
    args.env_id, args.eval_episodes, args.capture_video = options.task or args.env_id, options.episodes, options.video
    args.eval_seed = args.eval_seed if options.eval_seed < 0 else options.eval_seed
    args.track, args.compile = False, "no"


def set_up_simulated_robot(set_up_robot, check_flags, args, *sizes, options: Options):
    """As `set_up_robot` of benchmarks/vla: the robot, several of them, and the function that makes one."""
    use(options, args)
    if args.env_id == "widowx-real":
        cli.fail("a real robot is not evaluated again by itself: --resume RUN --serve PORT acts with what it learned")
    check_flags(args)
    cli.check_args(args)
    torch.manual_seed(args.eval_seed)  # the same call draws the same
    return set_up_robot(args, *sizes)


def set_up_without_data(args, make_env, load_dataset, options: Options):
    """As `datasets.set_up`: device, environment, a vector of them, and a made-up trajectory instead of the dataset."""
    env_id = options.task or args.env_id
    try:
        trained_on, env = (rollouts.rescaled(make_env(name)) for name in (args.env_id, env_id))
    except ValueError as error:  # an unknown id, or one whose package is not installed
        cli.fail(str(error))
    was, now = ((e.observation_space.shape, e.env.action_space) for e in (trained_on, env))
    if was != now:
        cli.fail(f"--task {env_id} observes {now[0]} and acts in {now[1]}, but the run's task {args.env_id} observes "
                 f"{was[0]} and acts in {was[1]}: its policy does not fit")  # fmt: skip
    at_once = args.eval_episodes  # in the run; more environments in one process may not fit into its memory
    use(options, args)
    cli.check_args(args)
    rollouts.check_optional_parts(args, make_env)
    as_many = dataclasses.replace(args, eval_episodes=min(at_once, args.eval_episodes))
    device, envs = cli.start_torch(args), rollouts.make_vector_env(as_many, make_env)
    torch.manual_seed(args.eval_seed)  # the same call draws the same
    rows = getattr(args, "chunk", 1)  # a window of one decision
    obs, acted = (np.zeros((rows, *space.shape), np.float32) for space in (env.observation_space, env.action_space))
    last = np.arange(rows) == rows - 1
    data = Dataset(obs, acted, np.zeros(rows, np.float32), obs, last, np.zeros(rows, bool), source="none")
    return device, env, envs, data


class LoadedRun(contextlib.nullcontext):
    """As `runs.Run` of a run that is over: its weights are loaded, and there is nothing left to do."""

    phase = "done"

    def __init__(self, state: dict, args, dataset, buffer, **modules):
        super().__init__(self)
        self.args, self.device, self.folder = args, buffer.states.device, pathlib.Path(args.resume)
        self.progress, self.acts, self.envs = state["progress"], {}, None
        for name, module in modules.items():
            if not isinstance(module, torch.optim.Optimizer):
                try:
                    module.load_state_dict(state["modules"][name])
                except (KeyError, RuntimeError) as error:
                    cli.fail(f"{self.folder}/checkpoint.pt does not fit its script ({str(error).splitlines()[0]})")

    def steps(self, phase, total, envs=None, act=None, evals=1, unit="update"):
        """None are left; what would have acted in them is noted."""
        self.acts[phase], self.envs = act, envs or self.envs
        return iter(())

    def starts(self, phase):
        return False

    def check_stop(self):
        """Nothing to save: Ctrl-C ends the program where it is."""


def evaluate(options: Options) -> dict:
    """Evaluate as the options say. Returns the entry that evaluation.json got: what was measured, and how."""
    module, config = script_of(options.run)
    state, path = load_checkpoint(options.run), options.run / "evaluation.json"
    reached, entries, result = state["progress"]["phase"], [], {}
    if path.exists():
        try:
            entries = list(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            cli.fail(f"{path} is no list of evaluations: move it away")
    robot, here = getattr(module, "robot", None), []  # of a VLA
    if robot and reached == "cloning" and config["checkpoint"] == "tiny":
        cli.fail(f"{options.run} has not cloned its policy yet: --resume it first")
    if reached != "done":
        print(f"{options.run} is not finished: its checkpoint is of phase {reached}, step {state['progress']['step']}")

    def measure(run, env, make_env, act_optimized, policy, critic):  # in place of `pictures.finish`
        act = run.acts["cloning"] if options.policy == "cloned" else act_optimized
        if act is None:
            cli.fail(f"--policy cloned: {config['script']}.py clones no policy, or this run did not")
        try:
            result.update(rollouts.evaluate(run.envs, act, run), args=run.args, device=str(run.device))
        finally:
            rollouts.close(run.envs)
        if options.video:
            rollouts.film(run, make_env, act)

    ours = [(module, "Run", functools.partial(LoadedRun, state))]
    if robot:
        again = functools.partial(set_up_simulated_robot, robot.set_up_robot, robot.check_flags, options=options)
        ours += [(robot, "set_up_robot", again), (robot, "finish_run", measure)]
        ours += [(robot, "tell_stale_cache", lambda run, version: None)]  # no candidates of the cache are used
        here = ["--num-cache-workers", "0", "--ray", "", "--robot-node", ""]
    else:
        ours += [(module, "set_up", functools.partial(set_up_without_data, options=options))]
        ours += [(module, "finish", measure)]
    theirs = [(place, name, getattr(place, name)) for place, name, _ in ours]
    try:
        for place, name, function in ours:
            setattr(place, name, function)
        how = ["--device", options.device, "--threads", str(options.threads)]
        module.main(["--resume", str(options.run), *how, *here])
    finally:
        for place, name, function in theirs:
            setattr(place, name, function)
    args, successes = result["args"], round(result["success_rate"] * options.episodes)
    low, high = binomtest(successes, options.episodes).proportion_ci(0.95, "wilson")
    entry = {
        "task": args.env_id, "policy": options.policy, "phase": reached, "episodes": options.episodes,
        "eval_seed": args.eval_seed, "seed": args.seed, "trained_on": config["env_id"], "flags": list(options.flags),
        "trained_at_commit": config["provenance"]["commit"],
    }  # fmt: skip
    entry |= {name: round(result[name], 6) for name in SCORES} | {"low": round(low, 4), "high": round(high, 4)}
    entry |= provenance() | {"device": result["device"], "date": time.strftime("%Y-%m-%d")}
    text = json.dumps([*entries, entry], indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    if not result["tells_success"]:
        print("this task reports neither info['success'] nor info['is_success']: look at the return")
    return entry


def main(argv: list[str] | None = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    e = evaluate(options)
    print(f"{e['task']}, {e['policy']} policy, {e['episodes']} episodes from seed {e['eval_seed']}: success "
          f"{e['success_rate']:.1%}, 95 % interval {e['low']:.1%} to {e['high']:.1%} (Wilson); score {e['score']:.1f}, "
          f"return {e['return']:.2f}, length {e['length']:.1f}; all in {options.run}/evaluation.json")  # fmt: skip
    if options.video:
        print(f"three of its episodes: {options.run}/videos")


if __name__ == "__main__":
    cli.run_program(main)
