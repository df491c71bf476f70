"""`widowx-real` and `widowx-sim-{vegetable,cup,pot}-v0`: the paper's tasks on a WidowX 250s (section 5.2).

One environment over the calls of the robot's public client (`WidowXClient` of rail-berkeley/bridge_data_robot). Behind
it stands that client, or `SimClient` of widowx_sim.py, which answers the same calls in MuJoCo.

Observation: `image` (H, W, 3) uint8 of the one camera, `proprio` (7,) float32: x, y, z of the gripper (m, world frame),
roll, pitch, yaw (rad, zero: gripper straight down), opening (0 closed, 1 open). Action: (7,) float32 as the robot's
`step_action` takes it: metres and radians in the world frame, added to the *previous target* and clipped to 0.05 and
0.25, and the gripper's absolute opening. The reward is 1 and the episode ends when the task is done; else it is cut
after `max_steps`.

On the robot's wire the public client unpickles what it receives: use it in trusted networks only. Nothing here does.
"""

import importlib
import select
import sys
import time

import gymnasium as gym
import numpy as np
from PIL import Image

from benchmarks.tasks.dataset import Dataset, TaskError
from benchmarks.tasks.widowx_sim import (
    DOWN,
    HIGH,
    LOW,
    NO_CONNECTION,
    NOT_INITIALIZED,
    OBJECTS,
    SUCCESS,
    TASKS,
    SimClient,
    next_target,
    rotation,
)

ENV_IDS = ("widowx-real", *(f"widowx-sim-{task}-v0" for task in TASKS))
SIM_START, REAL_START = (0.3, 0.0, 0.12, 0, 0, 0, 1), (0.3, -0.09, 0.26, 0, -0.27, 0, 1)  # the latter is OpenVLA's
SIM_WORKSPACE = ((0.2, -0.22, -0.012), (0.38, 0.2, 0.2))  # where the end effector may be sent: low and high x, y, z (m)
REAL_WORKSPACE = ((0.25, -0.15, 0.16), (0.33, 0.11, 0.29))  # of the authors' release: above their toy kitchen
START_SPEED = 0.1  # m/s of the first move, from wherever the arm was left
ARRIVED = 0.03  # m from the start pose at which a reset is believed
RETRY_SECONDS = 0.05  # between two questions to a robot that does not answer
# The script's largest motions lie within OpenVLA's statistics for BridgeData (q01 and q99 of `bridge_orig`), so that
# its actions have tokens.
SCRIPT_LOW = np.array([-0.028, -0.041, -0.026, -0.08, -0.092, -0.2, 0.0])
SCRIPT_HIGH = np.array([0.028, 0.04, 0.04, 0.08, 0.077, 0.2, 1.0])
INSTALL = (
    "the real WidowX needs two packages that are not on PyPI (edgeml there is another one): "
    'pip install "edgeml @ git+https://github.com/youliangtan/edgeml@b4b8495b489e7c973187742d2f2fe9aa016d9aca" and '
    'pip install "widowx_envs @ git+https://github.com/rail-berkeley/bridge_data_robot@'
    'b841131ecd512bafb303075bd8f8b677e0bf9f1f#subdirectory=widowx_envs"'
)


class RobotError(RuntimeError):
    """The robot does not answer, or does not do what it is told, for longer than `patience`: time to save and stop."""


# --- THE ENVIRONMENT ---


class WidowXEnv(gym.Env):
    """Episodes on one arm.

    `info["success"]`: the task is done. `info["executed"]`: the action as the robot took it, (7,) float32: cut to its
    limits and its workspace, and no motion where the command was lost on the way. Train on that one.

    Args:
        client: a `WidowXClient`, or what answers its calls.
        instruction: what the policy is told to do; lower case.
        prepare: called with the seed (or None) once the arm is at its start, to put the objects in their places.
        judge: called with `image`, `proprio` and whether this is the last step, after each step: True if the task is
            done, False to end the episode without, None to go on.
        image_size: H = W of the observed images; what the camera gives is resized to it, as for OpenVLA.
        max_steps: actions before an episode is cut.
        hz: actions per second of wall-clock time; None: as fast as it goes.
        start: pose (7,) at which an episode begins.
        workspace: corners (low, high) of the box that the end effector's target is kept in.
        patience: seconds to wait for a robot that does not answer.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    render_mode = "rgb_array"

    def __init__(self, client, instruction, prepare, judge, *, image_size, max_steps, hz, start, workspace, patience):
        self.client, self.instruction, self.prepare, self.judge = client, instruction.lower(), prepare, judge
        self.image_size, self.max_steps, self.hz, self.patience = image_size, max_steps, hz, patience
        self.start, self.workspace = np.array(start, float), np.array(workspace, float)
        if (self.start[:3] < self.workspace[0]).any() or (self.start[:3] > self.workspace[1]).any():
            raise TaskError(f"the start {start[:3]} lies outside the workspace {workspace}")
        self.action_space = gym.spaces.Box(LOW.astype(np.float32), HIGH.astype(np.float32))
        self.observation_space = gym.spaces.Dict({
            "image": gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
            "proprio": gym.spaces.Box(-np.inf, np.inf, (7,), np.float32),
        })  # fmt: skip
        self.connected, self.steps, self.obs = False, None, None

    def reset(self, *, seed=None, options=None):
        """Objects in place, arm at the start with its gripper open.

        options: {"distractors": False} takes the distractor away, of a simulated task that has one.

        Raises:
            RobotError: it does not get there, or does not answer.
        """
        super().reset(seed=seed)
        if not self.connected:
            self._connect()
        self._until_at_start(lambda _: self.client.reset())
        if isinstance(self.client, SimClient):
            self.client.hidden = not (options or {}).get("distractors", True)
        self.prepare(seed)  # not before: the gripper may hold something, and no hand should be near an arm that moves
        self.obs = self._observe(time.monotonic() + self.patience)
        # From here on we follow the target that the robot keeps to itself; its reset sets it to where the arm is.
        proprio = self.obs["proprio"].astype(float)
        self.target, self.gripper = (proprio[:3], rotation(proprio[3:6]) @ DOWN), 1.0
        self.steps, self.ticked = 0, time.monotonic()
        return dict(self.obs), {"success": False}

    def step(self, action):
        """One action. A command that the robot did not confirm is not sent again: it may have been executed.

        Raises:
            ValueError: the action is not 7 finite numbers.
            RobotError: no observation within `patience`.
        """
        action = np.asarray(action, float)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, not {action}")
        if self.steps is None:
            raise RuntimeError("reset() comes before step()")
        here = self.obs["proprio"][:3].astype(float)
        executed = np.clip(action, LOW, HIGH)
        free, _ = next_target(*self.target, executed, here, -np.inf, np.inf)
        target = next_target(*self.target, executed, here, *self.workspace)
        executed[:3] += target[0] - free  # what the workspace cut off
        status = self.client.step_action(executed.copy(), blocking=False)
        if self.hz is not None:
            time.sleep(max(0.0, self.ticked + 1 / self.hz - time.monotonic()))
        self.ticked = time.monotonic()  # observing and the policy's thinking count towards the next period
        self.obs = self._observe(self.ticked + self.patience)
        if status != SUCCESS and not self._moved(target, executed[6]):
            executed = np.array([0.0] * 6 + [self.gripper])
            target = self.target
        self.target, self.gripper = target, executed[6]
        self.steps += 1
        last = self.steps >= self.max_steps
        verdict = self.judge(self.obs["image"], self.obs["proprio"], last)
        broken = status not in (SUCCESS, NO_CONNECTION)  # the server failed or was restarted: this episode is over
        self.connected = self.connected and status != NOT_INITIALIZED
        info = {"success": verdict is True, "executed": executed.astype(np.float32)}
        truncated = verdict is not True and (verdict is False or last or broken)
        return dict(self.obs), float(verdict is True), verdict is True, truncated, info

    def render(self) -> np.ndarray:
        """The last observation's image."""
        return self.obs["image"]

    def close(self):
        self.client.stop()

    def _moved(self, target, gripper) -> bool:
        """Whether the arm is nearer to the new target than to the old one: what an unconfirmed command came to."""

        def distance(position, opening):
            offset = np.linalg.norm(self.obs["proprio"][:3] - position) / HIGH[0]
            return offset + abs(self.obs["proprio"][6] - opening)

        return distance(target[0], gripper) < distance(self.target[0], self.gripper)

    def _connect(self):
        """Start the robot's side, open the gripper, and go slowly to the start."""
        params = {
            "start_state": [float(value) for value in self.start],
            "override_workspace_boundaries": [[*corner, *turn] for corner, turn in zip(
                self.workspace.tolist(), ([-1.57, 0.0], [1.57, 0.0]))],
            "action_clipping": "xyz", "move_duration": 0.2, "adaptive_wait": True, "move_to_rand_start_freq": 1,
            "fix_zangle": 0.1, "catch_environment_except": False, "skip_move_to_neutral": False,
            "return_full_image": False, "camera_topics": [{"name": "/blue/image_raw"}],
        }  # fmt: skip
        deadline = time.monotonic() + self.patience
        while True:
            status = self.client.init(params, image_size=self.image_size)
            raw = self._answer(deadline)  # a server that starts a robot is silent for ten seconds
            if status in (SUCCESS, NO_CONNECTION) and np.size(raw["state"]) == 7:
                break
            if time.monotonic() > deadline:
                raise RobotError(f"the robot's server does not start ({_name(status)} for {self.patience:g} s)")
            time.sleep(RETRY_SECONDS)
        self.connected = True
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation(self.start[3:6]) @ DOWN, self.start[:3]

        def approach(obs):
            duration = max(1.0, np.linalg.norm(obs["proprio"][:3] - self.start[:3]) / START_SPEED)
            self.client.move_gripper(1.0)
            return self.client.move(pose, duration=duration, blocking=True)

        self._until_at_start(approach)

    def _until_at_start(self, command) -> dict:
        """Repeat a command until the arm is seen at the start; returns the observation.

        A server at work answers nothing, so NO_CONNECTION is what a slow command normally returns. Whether it was
        heard is told by where the arm is once the server answers again.
        """
        deadline = time.monotonic() + self.patience
        obs = self._observe(deadline)
        while True:
            status = command(obs)
            if status == NOT_INITIALIZED:  # restarted
                self._connect()
            obs = self._observe(deadline)
            distance = np.linalg.norm(obs["proprio"][:3] - self.start[:3])
            opened = abs(obs["proprio"][6] - self.start[6]) < 0.5
            if distance < ARRIVED and opened and status in (SUCCESS, NO_CONNECTION):
                return obs
            if time.monotonic() > deadline:
                raise RobotError(
                    f"the arm is {distance:.2f} m from its start after {self.patience:g} s ({_name(status)})"
                )
            time.sleep(RETRY_SECONDS)

    def _answer(self, deadline) -> dict:
        """What the client returns as soon as it returns anything."""
        while (raw := self.client.get_observation()) is None:
            if time.monotonic() > deadline:
                raise RobotError(
                    f"no observation from the robot for {self.patience:g} s: is its server running, the camera on?"
                )
            time.sleep(RETRY_SECONDS)
        return raw

    def _observe(self, deadline) -> dict:
        """The next observation there is. Raises RobotError if the server has lost its robot (an empty state)."""
        while np.size((raw := self._answer(deadline))["state"]) != 7:
            if time.monotonic() > deadline:
                raise RobotError(f"the robot's server has had no robot for {self.patience:g} s")
            time.sleep(RETRY_SECONDS)
        image = np.asarray(raw["full_image"], np.uint8)
        if image.shape != (self.image_size, self.image_size, 3):
            size = (self.image_size, self.image_size)
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        return {"image": image, "proprio": np.asarray(raw["state"], np.float32)}


def _name(status) -> str:
    names = ("NO_CONNECTION", "SUCCESS", "EXECUTION_FAILURE", "NOT_INITIALIZED")
    return names[status] if status in range(4) else repr(status)


def make_env(env_id: str, render_mode: str | None = None, **options) -> WidowXEnv:
    """One arm, simulated or real; `options` are those of `make_sim` or `make_real`."""
    return make_real(**options) if env_id == "widowx-real" else make_sim(env_id, **options)


def make_sim(
    env_id: str, image_size: int = 256, max_steps: int = 40, distractors: bool | None = None, drop_rate: float = 0.0,
    hz: float | None = None, patience: float = 10.0,
) -> WidowXEnv:  # fmt: skip
    """A simulated task. `distractors`, `drop_rate`: see `SimClient`; the others: see `WidowXEnv`."""
    client = SimClient(env_id.split("-")[2], image_size, distractors, drop_rate)
    return WidowXEnv(
        client, client.task.instruction,
        prepare=lambda seed: None if seed is None else client.place(seed),
        judge=lambda image, proprio, last: True if client.success() else None,
        image_size=image_size, max_steps=max_steps, hz=hz, start=SIM_START, workspace=SIM_WORKSPACE, patience=patience,
    )  # fmt: skip


def make_real(
    instruction: str = "", host: str = "localhost", port: int = 5556, reward: str = "keyboard", scene: str = "keyboard",
    image_size: int = 256, max_steps: int = 60, hz: float = 3.0, start=REAL_START, workspace=REAL_WORKSPACE,
    patience: float = 60.0, ask=input,
) -> WidowXEnv:  # fmt: skip
    """The real arm, 3 Hz for a VLA (5 for a small policy).

    Args:
        instruction: the task in words.
        host, port: of the robot's server.
        reward: `keyboard` (Enter ends the episode, then y or n) or `module:function`, a program that is given the image
            (H, W, 3) uint8 and the state (7,) after each step and says whether the task is done.
        scene: who puts the objects in new places, before each episode with the arm at its start: `keyboard`, the
            operator, or `module:function`, a program that is given the seed.
        ask: puts a question to the operator and returns the answer.
        the others: see `WidowXEnv`.
    Raises:
        TaskError: there is no instruction, no such program, or no client installed.
        RobotError: no server answers, or this process has made a client before: the public one works once.
    """
    if not instruction.strip():
        raise TaskError('widowx-real needs an instruction, e.g. "put the vegetable on the plate"')
    judge = keyboard_judge(ask) if reward == "keyboard" else program_judge(reward)
    question = "Put the objects in new places, step back, and press Enter: "
    prepare = (lambda seed: answer(ask, question)) if scene == "keyboard" else program(scene, "--scene")
    try:
        client_class = importlib.import_module("widowx_envs.widowx_env_service").WidowXClient
    except ImportError as error:
        raise TaskError(f"{INSTALL} ({_first_line(error)})") from error
    try:
        client = client_class(host=host, port=port)
    except Exception as error:  # the client raises a bare one
        raise RobotError(
            f"no robot at {host}:{port} ({_first_line(error)}); is `widowx_env_service.py --server` running there?"
        ) from error

    return WidowXEnv(
        client, instruction, prepare, judge, image_size=image_size, max_steps=max_steps, hz=hz, start=start,
        workspace=workspace, patience=patience,
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def answer(ask, question: str) -> str:
    """What the operator says.

    Raises:
        RobotError: nobody can be asked, because there is no terminal.
    """
    try:
        return ask(question).strip().lower()
    except (EOFError, OSError) as error:
        raise RobotError("there is no terminal to ask the operator on; pass `ask`, or `reward` a program") from error


def keyboard_judge(ask, pressed=None):
    """The operator's judgement: asked when Enter is pressed, and at the last step."""

    def enter_pressed():
        waiting = sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], 0)[0])
        if waiting:
            sys.stdin.readline()
        return waiting

    def judge(image, proprio, last):
        if not last and not (pressed or enter_pressed)():
            return None
        return answer(ask, "Is the task done? [y/N] ").startswith("y")

    return judge


def program_judge(reward: str):
    """The judgement of `module:function`; see widowx_colour.py for one."""
    done = program(reward, "--reward")
    return lambda image, proprio, last: True if done(image, proprio) else None


def program(reference: str, flag: str):
    """The function that `module:function` names.

    Raises:
        TaskError: there is none; the message names the flag.
    """
    module, _, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TaskError(
            f"{flag} {reference}: there is no such program ({error}); it is keyboard or module:function"
        ) from error
    if not callable(found):
        raise TaskError(f"{flag} {reference}: that is no function; it is keyboard or module:function")
    return found


# --- DEMONSTRATIONS ---


def scripted_action(client: SimClient, rng: np.random.Generator | None = None, noise: float = 0.0) -> np.ndarray:
    """What a demonstrator who sees the objects' true positions does next, through `step_action` alone.

    It looks at nothing but the present state, so that a policy can be cloned from it; noise therefore asks for no plan
    to be taken up again. `noise`: standard deviation of the motion, as a share of the largest motion. Returns (7,).
    """
    task, state, target = client.task, client.state(), client.position("target")
    here, opening = state[:3], state[6]
    rest, below, _ = OBJECTS[task.target]
    action = np.zeros(7)
    action[3:6] = -state[3:6]  # stay upright
    if len(client.touched_by()) == 2 and opening < 0.95:  # held
        way = np.append(np.array(task.goal[:2]) - target[:2], 0.0)
        far = np.linalg.norm(way)
        release = task.goal_height + rest - below + 0.008
        carry = max(task.goal_height, task.start_height, 0.0) + rest - below + 0.03
        action[:3] = way
        action[2] = release + (carry - release) * np.clip((far - 0.01) / 0.04, 0.0, 1.0) - here[2]
        if here[2] < carry - 0.03 and far > 0.05:
            action[:2] *= 0.3  # up before away
        action[6] = far < 0.015 and abs(action[2]) < 0.015
    else:
        grasp = target - [0.0, 0.0, below]
        grasp[2] = max(grasp[2], task.start_height + 0.018)  # the fingers end 16 mm below the point that is steered
        action[:3] = grasp - here
        aside = np.linalg.norm(action[:2])
        ready = aside < 0.012 and abs(action[2]) < 0.01
        action[2] += np.clip(2.0 * (aside - 0.01), 0.0, 0.07)  # come from above
        action[6] = not ready
    action = np.clip(action, SCRIPT_LOW, SCRIPT_HIGH)
    if noise > 0:
        action[:6] += noise * SCRIPT_HIGH[:6] * rng.normal(size=6)
    return np.clip(action, SCRIPT_LOW, SCRIPT_HIGH).astype(np.float32)


def collect_demonstrations(
    env_id: str, num: int, seed: int = 0, noise: float = 0.1, only_successes: bool = True, **options
) -> list[dict]:
    """Scripted episodes of a simulated task.

    Args:
        env_id: `widowx-sim-*-v0`.
        num: episodes to return.
        seed: the objects lie as in `env.reset(seed=...)` for seeds that are drawn from it.
        noise: of `scripted_action`.
        only_successes: leave out the others.
        options: of `make_sim`.
    Returns:
        a dict for each episode of N steps: `image` (N + 1, H, W, 3) uint8, `proprio` (N + 1, 7), `actions` (N, 7) as
        executed, `rewards` (N,), all float32, and `terminals` (N,) bool.
    """
    env, rng, episodes = make_sim(env_id, **options), np.random.default_rng(seed), []
    for _ in range(20 * num):
        if len(episodes) == num:
            break
        obs, info = env.reset(seed=int(rng.integers(2**31)))
        rows = {"image": [obs["image"]], "proprio": [obs["proprio"]], "actions": [], "rewards": [], "terminals": []}
        terminated = truncated = False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, info = env.step(scripted_action(env.client, rng, noise))
            for key, value in (*obs.items(), ("actions", info["executed"]), ("rewards", reward)):
                rows[key].append(value)
            rows["terminals"].append(terminated)
        if info["success"] or not only_successes:
            types = dict.fromkeys(rows, np.float32) | {"image": np.uint8, "terminals": bool}
            episodes.append({key: np.array(value, types[key]) for key, value in rows.items()})
    env.close()
    if len(episodes) < num:
        raise TaskError(f"the script solved {env_id} in {len(episodes)} of {20 * num} episodes; ask for less noise")
    return episodes


def load_dataset(env_id: str, path=None, size: int | None = None, seed: int = 0, source: str = "auto") -> Dataset:
    """Scripted demonstrations, collected now (seconds); `size`: at least so many transitions, None: 500.

    Raises:
        TaskError: of the real robot, whose data are the run's own; or a file was asked for, and there is none.
    """
    if env_id == "widowx-real" or path is not None or source == "download":
        raise TaskError(
            f"{env_id} has no dataset file: on the robot a run collects its own, and a simulated one is scripted"
        )
    episodes, length = [], 0
    for number in range(size or 500):
        if length >= (size or 500):
            break
        episodes += collect_demonstrations(env_id, 1, seed=seed + number)
        length += len(episodes[-1]["rewards"])
    join = {key: np.concatenate([e[key] for e in episodes]) for key in ("actions", "rewards", "terminals")}
    obs, next_obs = (
        {key: np.concatenate([e[key][part] for e in episodes]) for key in ("image", "proprio")}
        for part in (slice(None, -1), slice(1, None))
    )
    timeouts = np.zeros(length, bool)
    return Dataset(obs, join["actions"], join["rewards"], next_obs, join["terminals"], timeouts, source="scripted")
