"""The command line of a script: the flags of every run, which value wins, what is refused, and errors in one line."""

import argparse
import dataclasses
import inspect
import json
import math
import os
import pathlib
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from benchmarks.harness.fast_critic import keep_freed_memory


@dataclass
class RunArgs:
    """The flags of every run; a script's `Args` adds those of its algorithm."""

    env_id: str = "pointmaze-medium-v0"  # task, see benchmarks/tasks
    preset: str = "auto"  # PRESETS of a task family, auto: by the task's name; laptop: the same for two CPU cores
    seed: int = 1  # seed of everything but the dataset
    device: str = "auto"  # auto: the GPU if there is one
    threads: int = 0  # CPU threads, 0: all cores this process may use
    plain: bool = False  # rank and climb with the script's own critic, not harness/fast_critic.py: the same, slower
    runs: str = "runs"  # folder in which the run's folder is made
    resume: str = ""  # folder of a run to continue
    checkpoint_seconds: float = 30.0  # seconds between checkpoints
    log_every: int = 100  # updates between two rows of metrics
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    wandb_project: str = "parl"  # project there
    eval_episodes: int = 32  # episodes of an evaluation
    eval_processes: bool = True  # simulate them in processes, two for each core
    num_offline_evals: int = 10  # evaluations spread over phase 2
    num_online_evals: int = 10  # evaluations spread over phase 3
    capture_video: bool = False  # film three episodes of the final policy (pip install opencv-python-headless)
    reward_bias: float = -1.0  # added to every reward so that the best possible one is 0
    reward_min: float = -1.0  # smallest biased reward, 0: the data's; the smallest value is reward_min / (1 - discount)
    discount: float = 0.99  # gamma
    sparse_reward: bool = True  # a trajectory without success is worth reward_min / (1 - discount) from all its states
    dataset_source: Literal["auto", "download", "local"] = "auto"  # published data or collected here; auto: if need be
    dataset_path: str = ""  # read the offline data from this file instead: .npz, or the task's own format
    dataset_size: int = 0  # transitions to collect where the data is collected locally, 0: the task's default


def fail(message: str):
    """End the program with one line."""
    raise SystemExit(f"error: {message}")


def script_name(args) -> str:
    """The script that an `Args` belongs to."""
    return pathlib.Path(inspect.getfile(type(args))).stem


def task_family(env_id: str, presets) -> str:
    """The preset of a task."""
    family = "ogbench" if "-singletask-" in env_id else env_id.split("-")[0]
    return family if family in presets else "default"


def parse_args(args_class, presets: dict[str, dict], argv: list[str] | None = None):
    """The command line, over the preset, over the defaults; with --resume, over the saved run."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # these three decide the others' defaults
    for flags, default in ((("--env-id", "--env_id"), RunArgs.env_id), (("--preset",), "auto"), (("--resume",), "")):
        first.add_argument(*flags, default=default)
    given = first.parse_known_args(argv)[0]
    if given.resume:
        args = resumed_args(args_class, given.resume, argv)
    else:
        family = task_family(given.env_id, presets)
        preset = family if given.preset == "auto" else given.preset
        if preset not in presets:
            fail(f"unknown --preset {preset!r}; there are {', '.join(presets)}")
        below = presets[family] if preset == "laptop" else {}
        args = tyro.cli(args_class, args=argv, default=args_class(**below | presets[preset]))
        args.preset = preset
    check_args(args)
    return args


# What a resumed run may change: where things lie and how it is watched, not what is learned.
FREE = {"track", "wandb_project", "capture_video", "checkpoint_seconds", "device", "threads"}


def resumed_args(args_class, folder: str, argv: list[str] | None):
    """The arguments of a saved run, with those of FREE as given now."""
    path = pathlib.Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        fail(f"{folder} is not a run's folder: it has no readable config.json")
    script = script_name(args_class())
    if config.pop("script", None) != script:
        fail(f"{folder} was made by another script; resume it with that one, not with {script}.py")
    config.pop("provenance", None)
    config.pop("data", None)
    known = {field.name for field in dataclasses.fields(args_class)}
    if set(config) != known:
        fail(f"{folder} was made by another version of {script}.py (flags differ: {sorted(set(config) ^ known)})")
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    saved = args_class(**config | {"resume": folder})
    args = tyro.cli(args_class, args=argv, default=saved)
    for name in known - FREE:
        if getattr(args, name) != getattr(saved, name):
            flag = "--" + name.replace("_", "-")
            fail(f"{folder} was started with {flag} {getattr(saved, name)}; leave {flag} out, or start a new run")
    return args


def check_args(args) -> None:
    """Refuse values that cannot work, before anything long begins."""
    low = dict.fromkeys(("eval_episodes", "batch_size", "cloning_batch_size", "log_every"), 1)
    low |= {"num_keep": 1, "target_subset": 1, "num_bins": 2, "discount": 0, "mixing_ratio": 0, "cql_actions": 0}
    low |= dict.fromkeys(("num_cloning_steps", "num_offline_steps", "num_online_episodes", "num_gradient_steps"), 0)
    high = {"num_keep": "num_samples", "target_subset": "ensemble_size", "discount": 0.99999, "mixing_ratio": 1}
    high |= {"expectile": 0.999}
    low |= dict.fromkeys(("diffusion_steps", "policy_heads", "distill_every", "num_warmup_episodes"), 1)
    low |= {"policy_bins": 2, "expectile": 0.001, "refresh_every": 0}
    for name, least in low.items():
        if not hasattr(args, name):  # a flag of another script
            continue
        flag, value = "--" + name.replace("_", "-"), getattr(args, name)
        most = high.get(name, math.inf)
        limit = getattr(args, most) if isinstance(most, str) else most
        if not least <= value <= limit:
            most = f"--{most.replace('_', '-')} ({limit})" if isinstance(most, str) else most
            fail(f"{flag} {value} must be at least {least}" + (f" and at most {most}" if limit < math.inf else ""))
    if args.reward_min > 0:
        fail(f"--reward-min {args.reward_min} must not be positive: rewards are biased so that the best one is 0")
    if hasattr(args, "policy_heads") and args.policy_width % args.policy_heads:
        fail(f"--policy-heads {args.policy_heads} must divide --policy-width ({args.policy_width})")


def run_program(main) -> None:
    """A script as a program."""
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped before the run began")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_torch(args) -> torch.device:
    """Threads, seed and memory as the run wants them; returns the device."""
    torch.set_num_threads(args.threads or available_cores())
    keep_freed_memory()
    torch.manual_seed(args.seed)
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
