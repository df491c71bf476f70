"""The command line of a script: the flags of every run, which value wins, what is refused, and errors in one line."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import pathlib
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from benchmarks.harness.fast_critic import keep_freed_memory


@dataclass
class RunArgs:
    """The flags of every run; a script's `Args` adds those of its algorithm."""

    env_id: str = "pointmaze-medium-v0"  # task, see benchmarks/tasks
    preset: str = "auto"  # PRESETS of a task family, auto: by the task's name; laptop, laptop-chunk: for two CPU cores
    seed: int = 1  # seed of everything but the dataset
    device: str = "auto"  # auto: the GPU if there is one
    threads: int = 0  # CPU threads, 0: all cores this process may use
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # as torch names it; less: ranking alone (T = 0)
    compile: Literal["auto", "yes", "no"] = "auto"  # compile the updates, which takes a minute or two; auto: on a GPU
    plain: bool = False  # rank and climb with the script's own critic, not harness/fast_critic.py: the same, slower
    runs: str = "runs"  # folder in which the run's folder is made
    resume: str = ""  # folder of a run to continue
    checkpoint_seconds: float = 30.0  # seconds between checkpoints
    log_every: int = 100  # updates between two rows of metrics
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    wandb_project: str = "parl"  # project there
    eval_episodes: int = 32  # episodes of an evaluation
    eval_seed: int = 1_000_000_000  # seed of the first one's start, one more for each: another one to tune on
    eval_processes: bool = True  # simulate them in processes, two for each core
    num_offline_evals: int = 10  # evaluations spread over phase 2
    num_online_evals: int = 10  # evaluations spread over phase 3
    capture_video: bool = False  # film three episodes of the final policy (pip install moviepy)
    reward_bias: float = -1.0  # added to every reward so that the best possible one is 0
    reward_min: float = -1.0  # smallest biased reward, 0: the data's; the smallest value is reward_min / (1 - discount)
    discount: float = 0.99  # gamma
    sparse_reward: bool = True  # a trajectory without success is worth the smallest reward / (1 - discount) throughout
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
    for flags, default in ((("--env-id", "--env_id"), args_class.env_id), (("--preset",), "auto"), (("--resume",), "")):
        first.add_argument(*flags, default=default)
    given = first.parse_known_args(argv)[0]
    if given.resume:
        args = resumed_args(args_class, given.resume, argv)
    else:
        family = task_family(given.env_id, presets)
        preset = family if given.preset == "auto" else given.preset
        if preset not in presets:
            fail(f"unknown --preset {preset!r}; there are {', '.join(presets)}")
        below = presets[family] | presets["laptop"] if preset.startswith("laptop") else {}
        args = tyro.cli(args_class, args=argv, default=args_class(**below | presets[preset]))
        args.preset = preset
    for name in ("runs", "resume", "dataset_path", "policy_checkpoint"):  # config.json is read from other folders, too
        if getattr(args, name, ""):
            setattr(args, name, os.path.abspath(os.path.expanduser(getattr(args, name))))
    check_args(args)
    if path := getattr(args, "policy_checkpoint", ""):
        args.num_cloning_steps = 0  # somebody else took them
        if not args.resume and not os.path.isfile(path):
            fail(f"--policy-checkpoint {path}: there is no such file (a run's is the checkpoint.pt in its folder)")
        load_policy(None, args)
    return args


# What a resumed run may change: where things lie and how it is watched, not what is learned.
FREE = {"track", "wandb_project", "capture_video", "checkpoint_seconds", "device", "threads", "eval_processes", "runs",
        "dataset_path", "dataset_source", "compile", "serve", "serve_host", "ray", "num_cache_workers",
        "robot_host", "robot_port", "robot_node"}  # fmt: skip


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
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k not in ("provenance", "data")}
    known = {field.name for field in dataclasses.fields(args_class)}
    if set(config) != known:
        fail(f"{folder} was made by another version of {script}.py (flags differ: {sorted(set(config) ^ known)})")
    saved = args_class(**config | {"resume": folder})
    args = tyro.cli(args_class, args=argv, default=saved)
    for name in sorted(known - FREE):
        if getattr(args, name) != (was := getattr(saved, name)):
            fail(f"{folder} was started with {flag(name)} {was}; leave {flag(name)} out, or start a new run")
    return args


def load_policy(policy, args) -> None:
    """--policy-checkpoint: weights in place of cloning, a state dict's or a run's; no policy: can they be read?"""
    if (path := args.policy_checkpoint) and not args.resume:  # a resumed run has its own
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            getattr(policy, "load_state_dict", dict)(state["modules"]["ema_policy"] if "modules" in state else state)
        except Exception as error:  # a damaged file can raise almost anything
            found = textwrap.shorten(str(error), 500) if "state_dict" in str(error) else "no weights that can be read"
            fail(f"--policy-checkpoint {path} does not fit this policy: {found}")


STEPS, RATE, SHARE = (0, 10**9), (0.0, 1e38), (0.0, 1.0)
# The least and the most of every number on a command line; the most may be another flag's value. NaN is never between.
BOUNDS: dict[str, tuple] = {
    **dict.fromkeys(("seed", "eval_seed"), (0, 2**32 - 1)), "threads": (0, 1024), "checkpoint_seconds": RATE,
    **dict.fromkeys(("num_cloning_steps", "num_offline_steps", "num_online_episodes", "policy_warmup"), STEPS),
    **dict.fromkeys(("dataset_size", "num_offline_evals", "num_online_evals", "refresh_every"), STEPS),
    **dict.fromkeys(("log_every", "eval_episodes", "batch_size", "cloning_batch_size", "num_samples"), (1, 10**9)),
    **dict.fromkeys(("distill_every", "num_warmup_episodes"), (1, 10**9)), "target_subset": (1, "ensemble_size"),
    **dict.fromkeys(("policy_hidden", "policy_width", "policy_heads", "critic_hidden"), (1, 10**6)),
    **dict.fromkeys(("policy_blocks", "policy_layers", "diffusion_steps", "flow_steps", "ensemble_size"), (1, 10**4)),
    **dict.fromkeys(("policy_bins", "num_bins"), (2, 10**6)), "num_keep": (1, "num_samples"), "chunk": (1, 10**4),
    **dict.fromkeys(("policy_lr", "distill_lr", "critic_lr", "gradient_step_size", "cql_alpha"), RATE),
    **dict.fromkeys(("policy_ema", "target_tau", "mixing_ratio", "distill_after"), SHARE),
    **dict.fromkeys(("utd", "distill_ratio"), (0.0, 1e6)), "greedy_below_std": RATE, "expectile": (0.001, 0.999),
    **dict.fromkeys(("num_gradient_steps", "cql_actions", "climb_first"), (0, 10**6)),
    "policy_dropout": (0.0, 0.999), "discount": (0.0, 0.99999), "reward_bias": (-1e9, 1e9), "reward_min": (-1e9, 0.0),
}  # fmt: skip


def check_args(args) -> None:
    """Refuse values that cannot work, before anything long begins."""
    for name, value in vars(args).items():
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(value, bool) or not all(isinstance(v, (int, float)) for v in values):
            continue
        least, most = BOUNDS.get(name, (-1e38, 1e38))  # of a fork's own flag: a finite number
        limit = getattr(args, most) if isinstance(most, str) else most
        if not values or not all(least <= v <= limit for v in values):
            most = f"{flag(most)} ({limit})" if isinstance(most, str) else most
            why = ": rewards are biased so that the best one is 0" if name == "reward_min" else ""
            fail(f"{flag(name)} {' '.join(map(str, values))} must be at least {least} and at most {most}{why}")
    if hasattr(args, "policy_heads") and args.policy_width % args.policy_heads:
        fail(f"--policy-heads {args.policy_heads} must divide --policy-width ({args.policy_width})")
    if args.matmul_precision != "highest" and getattr(args, "num_gradient_steps", 0):  # it compares nearly equal Q
        fail(f"--matmul-precision {args.matmul_precision} is too coarse to climb: highest, or --num-gradient-steps 0")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Forgiving:
    """A stream whose reader may go away (`| head`, a closed terminal): what is written then is lost, and no more."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        own = getattr(self.stream, name)
        return (lambda *text: self._try(own, *text)) if name in ("write", "flush") else own

    def _try(self, function, *arguments):
        try:
            return function(*arguments)
        except (OSError, ValueError):  # ValueError: closed
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_program(main) -> None:
    """A script as a program: output that nobody reads ends nothing, and whatever is raised ends in one line."""
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped before the run began")
    except Exception as error:
        fail(in_one_line(error, pathlib.Path(tempfile.gettempdir()) / f"parl-error-{os.getpid()}.log"))


def in_one_line(error: Exception, path: pathlib.Path) -> str:
    """What was raised, and where the full report is, which is written there."""
    message = (str(error).strip().splitlines() or ["no message"])[0]
    with contextlib.suppress(OSError):
        path.write_text("".join(traceback.format_exception(error)))
        message += f" (full report: {path})"
    return f"{type(error).__name__}: {message}"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_torch(args) -> torch.device:
    """Threads, seed and memory as the run wants them; returns the device."""
    torch.set_num_threads(args.threads or available_cores())
    torch.set_float32_matmul_precision(args.matmul_precision)
    keep_freed_memory()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch without CUDA asserts
        fail(f"--device {args.device} is not to be had here ({str(error).splitlines()[0]})")
    torch.manual_seed(args.seed)
    return torch.device(name)
