"""Objects in Ray processes, here or on a cluster, which answer questions and are replaced when they die.

Ray pickles what it sends between its own processes: let only machines you trust into its cluster. On other machines
this repository must be importable, and a checkpoint must lie where it lies here.
"""

import collections
import dataclasses
import os
import pathlib
import socket

import gymnasium as gym
import numpy as np
import torch

from benchmarks.harness.cli import available_cores, fail
from benchmarks.tasks import make_env
from benchmarks.tasks.widowx import RobotError
from benchmarks.vla.checkpoint import TrainedPart

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MOST_DEATHS = 3  # of the workers asked one question


def check_ray(num_workers: int, address: str, robot_node: str = ""):
    """The module `ray`, or the end in one line where it is asked for and Ray or its cluster is not there.

    Ray itself asks for minutes whether an address that nobody answers at has come up.
    """
    if num_workers == 0 and not robot_node:
        where = "--ray is where the cache workers and the robot's loop run: add --num-cache-workers or --robot-node"
        return fail(where) if address else None
    try:
        import ray
    except ImportError:
        fail("--num-cache-workers and --robot-node need Ray: pip install ray")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            fail(f"--ray {address} cannot be reached ({error}); start it there with: ray start --head")
    return ray


def join_ray(num_cores: int, address: str, node: str = ""):
    """Ray, connected to the cluster at `address`, or to a new one of so many cores on this machine, which has the
    resource `node`; once in a process.
    """
    ray = check_ray(num_cores, address, node)
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    options = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(num_cpus=num_cores, include_dashboard=False, resources={node: 1} if node else None, **options)
    except Exception as error:  # of Ray's many kinds
        where = f"--ray {address}" if address else "a Ray cluster on this machine"
        hint = "; if it wants a token: RAY_AUTH_MODE=token" if address else ""
        fail(f"{where} cannot be reached or started ({(str(error).strip().splitlines() or [repr(error)])[0]}){hint}")
    return ray


class Pool:
    """`num` actors, each `make(*args)`, with one question at a time before it."""

    def __init__(self, num: int, address: str, make, args: tuple, gpus: float = 0.0):
        """address: of a Ray cluster, empty: a new one on this machine. gpus: share of a GPU that each worker gets."""
        ray = join_ray(num, address)
        there = ray.cluster_resources()
        if gpus and not there.get("GPU"):
            fail("the trainer is on a GPU and Ray finds none for the cache workers: leave --num-cache-workers out")
        # Ray waits without a word for what is not there: fewer cores or GPUs than workers are shared
        cpu, gpu = (
            int(1000 * min(most, there.get(kind, 0) / num)) / 1000 for kind, most in (("CPU", 1), ("GPU", gpus))
        )
        self.ray, self.actor = ray, ray.remote(num_cpus=cpu, num_gpus=gpu)(make)
        self.args, self.waiting, self.asked, self.wanted, self.round = args, collections.deque(), {}, {}, 0
        self.idle = [self.actor.remote(*args) for _ in range(num)]

    def share(self, value):
        """Put a value where all workers find it, once."""
        return self.ray.put(value)

    def submit(self, questions: dict) -> None:
        """By name: the method and its arguments. What was asked before and is not answered is forgotten."""
        self.waiting, self.deaths = collections.deque(questions.items()), collections.Counter()
        self.wanted = dict(questions)
        self.round += 1
        self._ask()

    def _ask(self) -> None:
        while self.waiting and self.idle:
            name, (method, *args) = self.waiting.popleft()
            actor = self.idle.pop()
            self.asked[getattr(actor, method).remote(*args)] = (name, self.round, actor)

    def busy(self) -> bool:
        return bool(self.wanted)

    def results(self, wait: bool) -> list[tuple]:
        """(name, answer) of what was answered since; with `wait`, of at least a second. The dead are replaced."""
        ready, _ = self.ray.wait(list(self.asked), num_returns=1, timeout=1.0 if wait else 0.01)
        answers = []
        for reference in ready:
            name, asked_in, actor = self.asked.pop(reference)
            current = asked_in == self.round  # else it was asked under the same name of an earlier policy
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:  # whose first line says only where it was raised
                raise error.cause from None
            except self.ray.exceptions.RayActorError as error:
                self.deaths[name] += current
                if current and self.deaths[name] == MOST_DEATHS:
                    raise RuntimeError(f"{MOST_DEATHS} cache workers died over episode {name} ({error})") from error
                actor = self.actor.remote(*self.args)
                if current and name in self.wanted:
                    self.waiting.appendleft((name, self.wanted[name]))
            else:
                if current and self.wanted.pop(name, None) is not None:
                    answers.append((name, answer))
            self.idle.append(actor)
        self._ask()
        return answers

    def close(self) -> None:
        self.ray.shutdown()


class RobotProcess:
    """An environment in a process of its own, on the machine at the robot."""

    def __init__(self, env_id: str, options: dict):
        self.env_id, self.options, self.env = env_id, options, None

    def about(self):
        """Its spaces and its instruction; here and not before it is made, so that what is wrong arrives by itself."""
        self.env = self.env or make_env(self.env_id, **self.options)
        return self.env.observation_space, self.env.action_space, self.env.unwrapped.instruction

    def reset(self, seed, options):
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        return self.env.step(action)

    def render(self):
        return self.env.render()

    def close(self):
        self.env.close()


class RemoteEnv(gym.Env):
    """An environment whose steps run on the node of the cluster args.ray that has the resource args.robot_node.

    So the robot's machine needs no GPU, and the trainer's no robot: an observation and an action cross the network once
    a step, and pacing, waiting and the safety box stay with the robot. Without args.ray it is a process here.
    """

    render_mode = "rgb_array"

    def __init__(self, args, env_id: str, options: dict):
        node = args.robot_node
        self.ray = join_ray(args.num_cache_workers + 1, args.ray, node)
        if not self.ray.cluster_resources().get(node):
            how = f"ray start --address={args.ray} --resources='{{\"{node}\": 1}}'"
            fail(f"--robot-node {node}: no machine of the cluster has this resource; on the robot's: {how}")
        if not self.ray.available_resources().get(node):  # Ray would wait without a word
            fail(f"--robot-node {node}: another run has this robot; stop it first")
        self.actor = self.ray.remote(num_cpus=0, resources={node: 1})(RobotProcess).remote(env_id, options)
        self.observation_space, self.action_space, self.instruction = self._ask("about")

    def _ask(self, name: str, *args):
        """The answer to a method's call; what the robot's process raises is raised here.

        Raises:
            RobotError: that process, its machine or the way there is gone.
        """
        try:
            return self.ray.get(getattr(self.actor, name).remote(*args))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayActorError as error:
            raise RobotError("the robot's process or its machine is gone; put that right and --resume") from error

    def reset(self, *, seed=None, options=None):
        return self._ask("reset", seed, options)

    def step(self, action):
        return self._ask("step", action)

    def render(self):
        return self._ask("render")

    def close(self):
        self._ask("close")


class CacheWorker:
    """Draws candidates in a process of its own, which holds the base model once and is sent adapters only."""

    def __init__(self, args, make_policy, draw, instruction: str):
        self.args, self.draw, self.version = args, draw, None
        self.policy = make_policy(args, instruction)

    def pid(self) -> int:
        return os.getpid()

    def candidates(self, adapter: dict[str, np.ndarray], version: str, images: np.ndarray, seed: int) -> np.ndarray:
        if version != self.version:
            state = {name: torch.tensor(array) for name, array in adapter.items()}
            TrainedPart(self.policy.model).load_state_dict(state)
            self.version = self.policy.version()
            if self.version != version:
                raise ValueError(f"this worker's policy is {self.version}, not {version}: is its checkpoint another?")
        images = torch.as_tensor(images, device=self.policy.device)
        return self.draw(self.policy, images, self.args.num_samples, self.args.cache_batch, seed).cpu().numpy()


class CachePool:
    """args.num_cache_workers of these, on the cluster args.ray or on this machine."""

    elsewhere = True

    def __init__(self, args, policy, make_policy, draw):
        settings = args, make_policy, draw, policy.instruction
        self.pool = Pool(args.num_cache_workers, args.ray, CacheWorker, settings, float(policy.device.type == "cuda"))

    def candidates(self, policy, version: str, images: dict, seeds: dict):
        """A generator of (episode, candidates) as they come; (None, None) whenever there are none at the moment, but
        for the first, which are waited for. images: (N + 1, 3, H, W) uint8 by episode; seeds: by episode.
        """
        adapter = {name: value.cpu().numpy() for name, value in TrainedPart(policy.model).state_dict().items()}
        shared, first = self.pool.share(adapter), True
        self.pool.submit({e: ("candidates", shared, version, images[e].cpu().numpy(), seeds[e]) for e in images})
        while self.pool.busy():
            answers = self.pool.results(wait=first)
            first = first and not answers
            yield from answers or [(None, None)]

    def close(self) -> None:
        self.pool.close()


class NoPool:
    """The same in the trainer's own process, one episode after the other."""

    elsewhere = False

    def __init__(self, args, run, draw):
        self.args, self.run, self.draw = args, run, draw

    def candidates(self, policy, version: str, images: dict, seeds: dict):
        for e in self.run.each("caching", list(images)) if len(images) > 1 else images:
            yield e, self.draw(policy, images[e], self.args.num_samples, self.args.cache_batch, seeds[e]).cpu().numpy()

    def close(self) -> None:
        pass


def make_pool(args, run, policy, make_policy, draw):
    """What draws candidates: workers if args.num_cache_workers says so, else this process.

    make_policy(args, instruction) and draw(policy, images, k, batch, seed) are a script's. Of a tiny model the workers
    read the weights that the run has cloned.
    """
    if args.num_cache_workers == 0 or run.phase == "done":
        return NoPool(args, run, draw)
    if not args.ray:  # processes with all cores each would wait for one another
        args = dataclasses.replace(args, threads=max(1, available_cores() // (args.num_cache_workers + 1)))
    if args.checkpoint == "tiny":
        args = dataclasses.replace(args, checkpoint=str(run.folder / "cloned"))
    return CachePool(args, policy, make_policy, draw)
