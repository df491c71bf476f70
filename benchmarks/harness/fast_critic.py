"""The same Q and action gradients as a script's plain critic, faster; and work on many states spread over the cores.

A script's `q_and_gradient` recognises a `FrozenCritic` and asks it for both at once; `--plain` does without it.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

CACHE_FLOATS = 500_000  # of one activation, per core: the best of 60, 125, 250 and 500 thousand at AntMaze size
EXACT_COUNTS = {"cpu"}  # devices on which any number of candidates climbs; on others a power of two, for few shapes


class FrozenCritic:
    """A critic that does not change for a while: the same Q, and its gradient with respect to the action by hand.

    Action optimization is nearly all of PA-RL's arithmetic, and outside the matmuls it is bound by memory. So here each
    layer keeps two tensors for its backward pass instead of autograd's four, works in place, takes on a CPU as many
    members at a time as its cache holds, and normalises for less: with weights and biases centred over their outputs
    the mean of a pre-activation is 0, so LayerNorm is a division by its root mean square. In the backward pass the
    centred weights subtract the gradient's mean as well. On a CPU the states are shared out among the cores.
    """

    @torch.no_grad()
    def __init__(self, critic):
        self.critic, E = critic, critic.ensemble_size
        centred = (lambda w: w - w.mean(-1, keepdim=True)) if critic.layer_norm else (lambda w: w.detach())
        self.weights, self.biases = [centred(w) for w in critic.weights], [centred(b) for b in critic.biases]
        self.head_weight, self.head_bias = critic.head_weight.expand(E, -1, -1), critic.head_bias.expand(E, -1, -1)

    def __call__(self, obs, actions):
        """As the critic: obs (B, O), actions (B, n, A) -> q (E, B, n)."""
        return over_states(self._q, obs, actions, floats_per_state=actions.shape[1] * self.critic.width, dim=1)

    def mean_and_gradient(self, obs, actions):
        """Mean Q over the ensemble (B, n), and its gradient with respect to each action (B, n, A)."""
        return over_states(self._mean_and_gradient, obs, actions, floats_per_state=actions.shape[1] * self.critic.width)

    @torch.no_grad()
    def _q(self, obs, actions):
        return torch.cat([self._forward(obs, actions, members)[0] for members in self._groups(actions)])

    @torch.no_grad()
    def _mean_and_gradient(self, obs, actions):
        q, gradient = zip(*(self._value_and_gradient(obs, actions, members) for members in self._groups(actions)))
        E = self.critic.ensemble_size
        return sum(q) / E, sum(gradient) / E

    def _groups(self, actions):
        """Members to evaluate together."""
        E, rows = self.critic.ensemble_size, actions.shape[0] * actions.shape[1]
        whole = actions.device.type != "cpu" or torch.compiler.is_compiling()
        size = E if whole else max(1, CACHE_FLOATS // (rows * self.critic.width))
        return [slice(first, min(E, first + size)) for first in range(0, E, size)]

    def _forward(self, obs, actions, members, saved=None):
        """q (E, B, n), and the bins' probabilities (E, B n, bins) or None; fills `saved` for the backward pass."""
        B, n, A = actions.shape
        weights, O, one = [w[members] for w in self.weights], self.critic.obs_dim, actions.new_ones(())  # noqa: E741
        E = len(weights[0])
        obs_part = torch.baddbmm(self.biases[0][members], obs.expand(E, -1, -1), weights[0][:, :O])
        z = torch.bmm(actions.reshape(1, B * n, A).expand(E, -1, -1), weights[0][:, O:])
        z.view(E, B, n, -1).add_(obs_part[:, :, None])
        x = None
        for i in range(len(weights)):
            z = z if i == 0 else torch.bmm(x, weights[i]).add_(self.biases[i][members])
            u, inverse_rms, scale = z, None, one
            if self.critic.layer_norm:
                norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
                inverse_rms = norm.square_().div_(z.shape[-1]).add_(1e-6).rsqrt_()
                scale = self.critic.scales[i][members]
                u = torch.addcmul(self.critic.shifts[i][members], z.mul_(inverse_rms), scale)
            if saved is None:
                x = F.silu(u, inplace=True)
            else:
                sigmoid = torch.sigmoid(u)
                x = u.mul_(sigmoid)
                slope = torch.lerp(x, one, sigmoid).mul_(scale)  # swish' = x + sigmoid (1 - x), times LayerNorm's scale
                saved.append((z, inverse_rms, slope))
        outputs = torch.baddbmm(self.head_bias[members], x, self.head_weight[members])
        if self.critic.num_bins == 1:
            return outputs.view(E, B, n), None
        probs = torch.softmax(outputs, -1)
        return (probs @ self.critic.centers).view(E, B, n), probs

    def _value_and_gradient(self, obs, actions, members):
        """Sums over the members: Q (B, n) and dQ/da (B, n, A)."""
        (B, n, A), saved = actions.shape, []
        q, probs = self._forward(obs, actions, members, saved)
        if probs is None:
            gradient = self.head_weight[members].transpose(1, 2).repeat(1, B * n, 1)
        else:  # dQ/dlogit = p (center - Q)
            gradient = probs.mul_(self.critic.centers - q.view(len(q), B * n, 1))
            gradient = torch.bmm(gradient, self.head_weight[members].transpose(1, 2))
        for i in reversed(range(len(saved))):
            normalised, inverse_rms, slope = saved[i]
            gradient.mul_(slope)
            if self.critic.layer_norm:
                along = torch.linalg.vecdot(gradient, normalised)[..., None] / normalised.shape[-1]
                gradient.addcmul_(normalised, along, value=-1).mul_(inverse_rms)
            weight = self.weights[i][members] if i > 0 else self.weights[0][members, self.critic.obs_dim :]
            gradient = torch.bmm(gradient, weight.transpose(1, 2))
        return q.sum(0), gradient.sum(0).view(B, n, A)


def climb_winners(local_optimization, q_and_gradient, critic, obs, actions, num_climb, num_steps, step_size, *rest):
    """`local_optimization` where only the best action of a state is wanted: those that cannot become it stay.

    Over a path of T steps alpha, Q rises by at most T alpha (2 |g|)^2, g being the gradient where it begins, wherever
    |g| at most doubles on it. So what is below the best Q even then cannot win, and the best one and its Q are the same
    as if all had climbed. Where |g| grows more, that may fail (--climb-all); `benchmarks/climbing.py` counts how often.

    The two functions are the script's, the arguments those of local_optimization; num_climb: of those that can win only
    so many of highest Q climb (all if >= m; fewer is inexact) -> actions (B, m, A), q (B, m).
    """
    q, gradient = q_and_gradient(critic, obs, actions)
    bound = q + num_steps * step_size * (2 * torch.linalg.vector_norm(gradient, dim=-1)).square()
    can_win = bound >= q.amax(1, keepdim=True)
    can_win &= q.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < num_climb
    index = pairs(can_win)  # R of a state and an action, each climbed as a state of its own
    places, start = (obs[index[0]], actions[index][:, None]), (q[index][:, None], gradient[index][:, None])
    climbed, climbed_q = local_optimization(critic, *places, num_steps, step_size, *rest, start)
    return actions.index_put(index, climbed[:, 0]), q.index_put(index, climbed_q[:, 0])


@torch.compiler.disable  # else the count of each batch would be a constant of a function of its own
def pairs(mask):
    """Row and column of every True of mask (B, m): two of (R,), filled up with (0, 0), which may climb without harm."""
    count = int(mask.sum())  # here the host waits for the device
    count = count if mask.device.type in EXACT_COUNTS else 1 << (count - 1).bit_length()
    return torch.nonzero_static(mask, size=count, fill_value=0).unbind(1)


def over_states(function, *tensors, floats_per_state, dim=0):
    """`function(*tensors)`, on a CPU over chunks of states, one core each.

    States are independent, so no core need wait for another after every operation, and a chunk's activations
    (floats_per_state for each state) stay in the caches.

    The function takes tensors with states in the first dimension and returns tensors with states in dimension `dim`; it
    must not draw random numbers, and sets its own grad mode, which other threads do not inherit.
    """
    if tensors[0].device.type != "cpu" or len(tensors[0]) == 1 or torch.compiler.is_compiling():
        return function(*tensors)  # one state has all cores to itself
    threads, states, limit = torch.get_num_threads(), len(tensors[0]), max(1, CACHE_FLOATS // floats_per_state)
    rounds = max(1, math.ceil(states / (threads * limit)))
    chunk = max(1, math.ceil(states / (threads * rounds)))  # the same number of chunks for each thread
    parts = list(zip(*(tensor.split(chunk) for tensor in tensors)))
    spread = map if threads == 1 else single_threaded_workers(threads).map
    results = list(spread(lambda part: function(*part), parts))
    if isinstance(results[0], tuple):
        return tuple(torch.cat(column, dim) for column in zip(*results))
    return torch.cat(results, dim)


def in_parts(function, *tensors, size: int = 4096):
    """`function(*tensors)` on `size` states at a time, for what memory holds; a tensor may be None."""
    if len(tensors[0]) <= size:
        return function(*tensors)
    parts = zip(*(itertools.repeat(None) if tensor is None else tensor.split(size) for tensor in tensors))
    return tuple(torch.cat(column) for column in zip(*(function(*part) for part in parts)))


def sample_on_all_cores(policy, obs, num_samples: int):
    """`policy.sample(obs, num_samples)`: (B, O) -> (B, n, A). Its noise is drawn here, since the cores must not."""
    if not hasattr(policy, "draw_noise"):  # a policy that has only `sample` and `loss`
        return policy.sample(obs, num_samples)
    noise = policy.draw_noise(obs, num_samples)
    floats = num_samples * policy.width
    return over_states(lambda o, z: policy.sample(o, num_samples, z), obs, noise, floats_per_state=floats)


def compiled(args, device, *functions):
    """The functions as `torch.compile` makes them where --compile asks for it, else as they are; the same draws."""
    if args.compile == "no" or (args.compile == "auto" and device.type != "cuda"):
        return functions
    options = {"fallback_random": True, "pattern_matcher": False}  # torch 2.13's matcher fails on randperm(n)[:k]
    return [torch.compile(function, options=options) for function in functions]


@functools.cache
def single_threaded_workers(count: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use one core each (the setting is the thread's own)."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def keep_freed_memory() -> None:
    """Ask glibc not to hand freed memory back: faulting it in again for the next tensor costs more than arithmetic."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: slower, no less right
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
