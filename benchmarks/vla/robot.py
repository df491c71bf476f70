"""The robot as a policy and a critic see it: actions normalised, one vector for an observation; and its episodes.

Everywhere else an action is what OpenVLA calls normalised: six motions of which -1 and 1 are a robot's 1st and 99th
percentile, and the gripper from 0 (closed) to 1 (open). Only here is it turned into metres and radians and back.
"""

import pathlib
import zipfile
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

from benchmarks.harness.cli import RunArgs, fail, flag
from benchmarks.harness.pictures import finish
from benchmarks.harness.rollouts import check_optional_parts, check_rewards, make_vector_env, succeeded
from benchmarks.harness.runs import write_atomically
from benchmarks.tasks import make_env
from benchmarks.tasks.dataset import Dataset
from benchmarks.tasks.widowx import collect_demonstrations
from benchmarks.vla.workers import RemoteEnv


@dataclass
class RobotArgs(RunArgs):
    """The flags of every run, and of the robot, the REST server and the workers."""

    # robot
    camera_size: int = 256  # pixels of the camera's image
    max_steps: int = 60  # actions of an episode before it is cut (release: 200, its rollout_timesteps)
    robot_host: str = "localhost"  # where the real robot's server is
    robot_port: int = 5556  # and its port
    reward: str = "keyboard"  # on the real robot: the operator says, or a program `module:function`
    scene: str = "keyboard"  # there: the operator puts the objects in new places, or a program `module:function`
    hz: float = 0.0  # actions a second; 0: 3 on the real robot (the paper's), in simulation as fast as it goes
    distractors: Literal["task", "always", "never", "online"] = "task"  # in simulation; task: as the paper
    robot_node: str = ""  # Ray resource of the machine at the robot, whose loop runs there; empty: here
    # server
    serve: int = 0  # with --resume: do not train, answer OpenVLA's REST protocol on this port
    serve_host: str = "127.0.0.1"  # address to listen at; 0.0.0.0: anybody's requests
    # candidate cache
    num_cache_workers: int = 0  # processes that draw candidates (the paper: 12); 0: the trainer does
    ray: str = ""  # address of the Ray cluster they run on; empty: this machine
    cache_batch: int = 16  # states at a time


def check_flags(args) -> None:
    """Refuse, before anything is downloaded or collected, what the bounds of all scripts' flags do not cover."""
    if not args.env_id.startswith("widowx-"):
        fail(f"--env-id {args.env_id}: a VLA needs a camera; it is widowx-real or widowx-sim-{{vegetable,cup,pot}}-v0")
    if args.env_id == "widowx-real" and not args.instruction.strip():
        fail('--env-id widowx-real needs an instruction, e.g. --instruction "put the vegetable on the plate"')
    if args.env_id == "widowx-real" and args.checkpoint == "tiny":
        fail("--checkpoint tiny is cloned on a simulated robot; for widowx-real name a folder or a hub id of weights")
    if args.env_id == "widowx-real" and args.capture_video:
        fail("--capture-video would move the real robot for a film; filmstrip.png shows its episodes")
    if args.env_id == "widowx-real" and args.robot_node and "keyboard" in (args.reward, args.scene):
        fail("--robot-node: no terminal belongs to the robot's process there; let --reward and --scene name programs")
    if not 0 <= args.hz < np.inf:
        fail("--hz must not be negative; 0 is the task's own")
    if not args.plain:
        fail("--no-plain is for critics of vectors")
    if args.compile == "yes":
        fail("--compile yes: a VLA's updates are not compiled; leave it out")
    if args.dataset_path or args.dataset_size or args.dataset_source != "auto":
        fail("a VLA learns from the run's own episodes: leave --dataset-path, --dataset-size and --dataset-source out")
    cloned = ("num_demonstrations",) if args.checkpoint == "tiny" and args.num_cloning_steps else ()
    sizes = "camera_size", "critic_image", "encoder_width", "encoder_blocks", "lora_rank", "distill_batch_size"
    for name in ("num_zero_shot", "max_steps", "cache_batch", "distill_episodes", *sizes, *cloned):
        if np.min(getattr(args, name), initial=1) < 1:
            fail(f"{flag(name)} must be at least 1")
    if args.encoder_width % 4:
        fail(
            f"--encoder-width {args.encoder_width} must be a multiple of 4: its channels are normalised in four groups"
        )
    if args.num_cache_workers < 0 or not 0 <= args.serve < 2**16:
        fail("--num-cache-workers must not be negative, and --serve is a port, 1 to 65535")


def unnormalize(actions, statistics):
    """Normalised actions (..., 7) -> what the robot takes; where no mask is set (the gripper) that is the same."""
    q01, q99, mask = (statistics[name] for name in ("q01", "q99", "mask"))
    return np.where(mask, 0.5 * (np.asarray(actions) + 1) * (q99 - q01) + q01, actions)


def normalize(actions, statistics):
    """The inverse of `unnormalize`."""
    q01, q99, mask = (statistics[name] for name in ("q01", "q99", "mask"))
    return np.where(mask, 2 * (np.asarray(actions) - q01) / np.where(q99 > q01, q99 - q01, 1) - 1, actions)


def resize(image, size: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (size, size, 3) by PIL's bicubic filter, which OpenVLA was trained with; torch's differs."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


class RobotEnv(gym.Wrapper):
    """A robot (observations `image` (H, W, 3) uint8 and `proprio` (7,), actions in its own units) for a VLA.

    An observation is one uint8 vector, so that all of the harness can carry it: the image at the policy's size, then at
    the critic's, then the bytes of proprio; `unpack` takes it apart. Actions are normalised; info["executed"] says what
    the robot made of one, normalised as well, and not clipped.
    """

    def __init__(self, env, statistics, policy_size: int, critic_size: int):
        super().__init__(env)
        self.statistics, self.sizes = statistics, (policy_size, critic_size)
        length = sum(3 * size**2 for size in self.sizes) + 28
        self.observation_space = gym.spaces.Box(0, 255, (length,), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)

    def pack(self, obs) -> np.ndarray:
        images = [resize(obs["image"], size).transpose(2, 0, 1).ravel() for size in self.sizes]
        return np.concatenate([*images, np.asarray(obs["proprio"], np.float32).view(np.uint8)])

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.pack(obs), info

    def step(self, action):
        asked = unnormalize(action, self.statistics).astype(np.float32)
        obs, reward, terminated, truncated, info = self.env.step(asked)
        executed = normalize(info.get("executed", asked), self.statistics).astype(np.float32)
        return self.pack(obs), reward, terminated, truncated, info | {"executed": executed}


def unpack(obs, policy_size: int, critic_size: int):
    """Packed observations (B, O), of any type -> images for the policy and for the critic, uint8 (B, 3, H, W), and
    proprio float32 (B, 7).
    """
    large, small, proprio = obs.to(torch.uint8).split([3 * policy_size**2, 3 * critic_size**2, 28], 1)
    shape = (-1, 3, policy_size, policy_size), (-1, 3, critic_size, critic_size)
    return (
        large.reshape(shape[0]),
        small.reshape(shape[1]),
        proprio.clone(memory_format=torch.contiguous_format).view(torch.float32),
    )


def collect(env, act, seed: int, run, options=None) -> tuple[dict[str, np.ndarray], bool]:
    """One episode of `act` (obs (1, O) -> normalised (1, 7)) of N steps, and whether it reached the goal.

    Returns `obs` (N + 1, O) uint8, packed, each image once; `actions` (N, 7), as executed; `rewards` (N,); `terminals`
    (N,) bool.
    """
    obs, info = env.reset(seed=seed % 2**32, options=options)
    rows, done, success = {"obs": [obs], "actions": [], "rewards": [], "terminals": []}, False, False
    while not done:
        run.check_stop()
        action = act(torch.as_tensor(obs, device=run.device)[None])[0].cpu().numpy()
        obs, reward, terminated, truncated, info = env.step(action)
        for name, value in zip(rows, (obs, info["executed"], reward, terminated)):
            rows[name].append(value)
        success = success or bool(succeeded(info))
        done = terminated or truncated
    check_rewards(min(rows["rewards"]), max(rows["rewards"]), run.args, "an episode")
    kinds = {"obs": np.uint8, "actions": np.float32, "rewards": np.float32, "terminals": bool}
    return {name: np.array(rows[name], kind) for name, kind in kinds.items()}, success


def robot_options(args) -> dict:
    """What the task is told of a run's flags."""
    options = dict(image_size=args.camera_size, max_steps=args.max_steps) | ({"hz": args.hz} if args.hz else {})
    if args.env_id == "widowx-real":
        options |= dict(instruction=args.instruction, host=args.robot_host, port=args.robot_port, reward=args.reward)
        return options | dict(scene=args.scene)
    return options | dict(distractors={"task": None, "never": False}.get(distractors(args), True))


def distractors(args) -> str:
    """When there are some: the paper's pot has none in its demonstrations, and some in online fine-tuning (5.2)."""
    return "online" if args.distractors == "task" and "-pot-" in args.env_id else args.distractors


def set_up_robot(args, statistics, policy_size: int):
    """The robot, several for evaluation (None: it is the real one), and the function that makes one."""

    def make_robot(env_id, **more):
        env = make_env(env_id, **robot_options(args), **more)
        return RobotEnv(env, statistics, policy_size, args.critic_image)

    real = args.env_id == "widowx-real"
    try:
        env = None if args.robot_node else make_robot(args.env_id)
        check_optional_parts(args, make_robot)
        envs = None if real else make_vector_env(args, make_robot)
        if args.robot_node:
            there = RemoteEnv(args, args.env_id, robot_options(args))
            env = RobotEnv(there, statistics, policy_size, args.critic_image)
    except ValueError as error:
        fail(str(error))
    return env, envs, make_robot


def demonstrations(args, env: RobotEnv, image_sizes, device):
    """Images uint8 (N, 3, H, W) at the policy's size and normalised actions (N, 7) of scripted episodes."""
    options = robot_options(args) | ({"distractors": False} if distractors(args) == "online" else {}) | {"hz": None}
    found = collect_demonstrations(args.env_id, args.num_demonstrations, args.seed, **options)
    episodes = [as_episode(demonstration, env) for demonstration in found]
    states = torch.as_tensor(np.concatenate([e["obs"][:-1] for e in episodes]), device=device)
    actions = torch.as_tensor(np.concatenate([e["actions"] for e in episodes]), device=device)
    return unpack(states, *image_sizes)[0], actions


def as_episode(demonstration: dict, env: RobotEnv) -> dict[str, np.ndarray]:
    """What `collect` returns, of a demonstration with `image`, `proprio`, and `actions` in the robot's units."""
    frames = [dict(image=i, proprio=p) for i, p in zip(demonstration["image"], demonstration["proprio"])]
    rest = {name: demonstration[name] for name in ("rewards", "terminals")}
    actions = normalize(demonstration["actions"], env.statistics).astype(np.float32)
    return {"obs": np.array([env.pack(frame) for frame in frames]), "actions": actions} | rest


def no_data(source: str) -> Dataset:
    """The dataset of a run that begins without one."""
    none, flags = np.zeros((0, 7), np.float32), np.zeros(0, bool)
    return Dataset(none, none, none[:, 0], none, flags, flags, source=source)


def write_arrays(path: pathlib.Path, **arrays) -> None:
    """A compressed .npz, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def read_arrays(path: pathlib.Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or those that are named; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        fail(f"{path} is damaged ({str(error).splitlines()[0]}); remove it and --resume, and it will be made anew")


def episode_file(run, number: int) -> pathlib.Path:
    return run.folder / "episodes" / f"{number:05}.npz"


def read_episode(run, number: int) -> dict[str, np.ndarray]:
    """Episode `number` of a run, whoever acted in it."""
    return read_arrays(episode_file(run, number))


def read_candidates(run, episode: int, version: str) -> np.ndarray | None:
    """The cached candidates (N + 1, k, 7) of an episode, if that version of the policy drew them, else None."""
    path = run.folder / "cache" / f"{episode:05}.npz"
    saved = read_arrays(path) if path.is_file() else {"version": ""}
    return saved["candidates"] if str(saved["version"]) == version else None


def tell_stale_cache(run, version: str) -> None:
    """A line about a resumed run's entries that another version of the policy drew; none of them is ever used."""
    numbers = [int(path.stem) for path in (run.folder / "cache").glob("*.npz")]
    stale = sum(read_candidates(run, number, version) is None for number in numbers)
    if stale:
        print(f"cache: {stale} of {len(numbers)} episodes' candidates are of another policy and will be drawn anew")


def write_candidates(run, episode: int, version: str, candidates: np.ndarray) -> None:
    write_arrays(run.folder / "cache" / f"{episode:05}.npz", version=version, candidates=candidates)


def get_episode(env, act, number: int, version: str, run) -> tuple[dict[str, np.ndarray], bool]:
    """Episode `number` of a run, as `collect` returns it: from its file, if this version of the policy acted in it (the
    run was stopped after it, and a robot's time is dear), else collected and written there.
    """
    path = episode_file(run, number)
    if path.is_file():
        saved = read_arrays(path)
        if str(saved.pop("version")) == version:
            return saved, bool(saved.pop("success"))
    early = distractors(run.args) == "online" and number < run.args.num_zero_shot
    with torch.random.fork_rng():  # so that a resumed run draws the same later
        torch.manual_seed(run.args.seed * 100_003 + number)
        seed, options = run.args.seed * 100_003 + number, {"distractors": False} if early else None
        episode, success = collect(env, act, seed, run, options)
    write_arrays(path, **episode, version=version, success=success)
    return episode, success


def tell_zero_shot(run) -> None:
    """The zero-shot episodes' success: a line, and a metric before the first update of phase 2."""
    number = run.args.num_zero_shot
    rate = float(np.mean([read_arrays(episode_file(run, i), "success")["success"] for i in range(number)]))
    print(f"zero-shot: success {rate:.0%} in {number} episodes")
    if "zero_shot_success" not in run.progress:  # a run that is resumed within phase 2 has the row
        run.progress["zero_shot_success"] = rate
        run.log({"zero_shot_success": rate})


def finish_run(run, env, make_robot, act, policy, critic) -> None:
    """What the harness leaves of every run, and `filmstrip.png`: the first zero-shot and the last online episodes."""
    finish(run, env, make_robot, act, policy, critic)
    zero_shot, total = run.args.num_zero_shot, run.args.num_zero_shot + run.args.num_online_episodes
    numbers = {n: "zero-shot" for n in range(min(3, zero_shot))} | {n: "online" for n in range(total)[zero_shot:][-3:]}
    strips = [(f"{kind}, episode {n + 1}", read_episode(run, n)) for n, kind in numbers.items()]
    draw_filmstrip(run.folder / "filmstrip.png", policy.instruction, strips, run.args.critic_image)


def draw_filmstrip(path: pathlib.Path, instruction: str, strips: list[tuple[str, dict]], critic_size: int) -> None:
    """A row for each titled episode, as `read_episode` gives them: nine of its images, from the first to the last."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = round(((strips[0][1]["obs"].shape[1] - 28) / 3 - critic_size**2) ** 0.5)
    height = 1.4 * len(strips) + 0.2  # inches
    figure, axes = plt.subplots(len(strips), 9, figsize=(1.2 * 9, height), squeeze=False)
    figure.suptitle(f"“{instruction}”", x=0.005, y=1 - 0.03 / height, ha="left", va="top", fontsize=9)
    for row, (title, episode) in zip(axes, strips):
        steps = np.linspace(0, len(episode["obs"]) - 1, len(row)).round().astype(int)
        images = unpack(torch.as_tensor(episode["obs"][steps]), size, critic_size)[0]
        for ax, image in zip(row, images):
            ax.imshow(image.permute(1, 2, 0))
            ax.set_axis_off()
        how = "success" if episode["success"] else "failure"
        row[0].set_title(f"{title}: {how} after {steps[-1]} steps", fontsize=8, loc="left", pad=2)
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.4 / height, 0.03, 0.2)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)
