"""What lower precision of the matrix products would change, on the networks of finished runs: `--precision-study`.

    python -m benchmarks.precision runs/<folder> runs/<other> --out precision.csv

Emulated, so that it can be known before there is a GPU: the factors of every product are rounded to the bits that the
hardware keeps and multiplied in float32, as tensor cores do; for bfloat16 the product is rounded as well, as autocast
leaves it. What else a GPU does otherwise (the order of sums, other kernels) is not in it.

    float32     nothing is rounded: what two evaluations differ by, 0 here
    tf32        10 bits of mantissa
    bfloat16    7 bits

Of each run of parl_diffusion_calql.py 2,000 states of the buffer with fresh samples, optimized with the run's own
settings and with the paper's (32 samples, 10 kept, 10 steps of 3e-4). Columns:

    ranking: `kept` share of states in which the same m candidates are kept, `best` in which the same one is the best,
        `rank_lost` what its float32 Q is below the best one's, as a share of the spread of Q over the candidates
    climbing, ranked in float32: `gain` the rise of the actions' float32 Q, as a share of the rise in float32, `winner`
        share of states with the same winner
    both in this precision: `optimized_gain`, gain of the best action over the best candidate, as a share of float32's
    caching: `sample_moved` mean difference of a sample drawn from the same noise, as a share of the samples' spread
    cloning, critic: `policy_loss`, `critic_loss` relative error of the loss; `policy_gradient`, `critic_gradient`
        cosine between its gradient and float32's
"""

import csv
import dataclasses
from dataclasses import dataclass

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

import parl_diffusion_calql as script
from benchmarks import climbing, distilling
from benchmarks.harness.cli import fail
from benchmarks.harness.fast_critic import sample_on_all_cores

PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.bmm.default: 0,
            torch.ops.aten.addmm.default: 1, torch.ops.aten.baddbmm.default: 1}  # fmt: skip
SETTINGS = {"the run's": {}, "the paper's": climbing.PAPER}
BITS = {"float32": 23, "tf32": 10, "bfloat16": 7}  # of the mantissa


@dataclass
class Options:
    """What lower precision of the matrix products would change, on the networks of finished runs."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders of finished runs of parl_diffusion_calql.py
    out: str = "precision.csv"  # the table to write
    states: int = 2_000  # states of each run


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 to so many bits of mantissa, to the nearest, ties to even: what tf32 (10) and bfloat16 (7) keep."""
    if bits == 23:
        return x
    drop = 23 - bits
    whole = x.contiguous().view(torch.int32)
    odd = (whole >> drop) & 1
    return ((whole + ((1 << (drop - 1)) - 1) + odd) >> drop << drop).view(torch.float32)


class Precision(TorchDispatchMode):
    """Within it every matrix product takes rounded factors; this thread's only, so the study uses one."""

    def __init__(self, name: str):
        super().__init__()
        self.bits, self.round_product = BITS[name], name == "bfloat16"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = PRODUCTS.get(function)
        if first is None:
            return function(*args, **(kwargs or {}))
        factors = [rounded(x, self.bits) for x in args[first : first + 2]]
        product = function(*args[:first], *factors, *args[first + 2 :], **(kwargs or {}))
        return rounded(product, self.bits) if self.round_product else product


def gradients(loss, network) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def measure(folder: str, num_states: int, settings: str) -> list[dict]:
    """One row for each precision."""
    run_args, _, _, buffer, policy, average, critic, target_critic, _ = distilling.load(
        distilling.Options(run=folder, episodes=1)
    )
    torch.set_num_threads(1)
    torch.manual_seed(run_args.seed)
    index = buffer.starts[torch.randperm(len(buffer.starts))[:num_states]]
    obs, actions = buffer.states[buffer.obs_index[index]], buffer.data_actions(buffer.obs_index[index])
    args = dataclasses.replace(run_args, climb_all=True, climb_first=0, **SETTINGS[settings])
    climb = args.num_gradient_steps, args.gradient_step_size, -1.0, 1.0
    noise = average.draw_noise(obs, args.num_samples)
    samples = sample_on_all_cores(average, obs, args.num_samples)
    exact = critic(obs, samples).mean(0).detach()  # (states, k)
    kept, kept_q = script.global_optimization(critic, obs, samples, args.num_keep)
    step, step_noise = torch.randint(policy.num_steps, (len(obs),)), torch.randn_like(actions)
    batch = slice(args.batch_size)
    returns, random = buffer.mc_returns[index][batch], torch.rand(args.batch_size, args.cql_actions, kept.shape[-1]) * 2
    policy.eval()  # dropout off: the same loss twice
    rows, full = [], {}
    value = lambda a: critic(obs, a).mean(0).detach()  # noqa: E731

    def clone():
        loss = policy.loss(obs, actions, step, step_noise)
        return loss.detach(), gradients(loss, policy)

    def learn():
        best = kept[batch, 0]
        loss, _ = script.calql_loss(critic, obs[batch], actions[batch], returns, returns, best, best, random - 1,
                                    args.cql_alpha)  # fmt: skip
        return loss.detach(), gradients(loss, critic)

    for name in BITS:
        with Precision(name):
            ranked = critic(obs, samples).mean(0).detach()
            climbed, climbed_q = script.local_optimization(critic, obs, kept, *climb)
            best, best_q = script.optimize_actions(critic, obs, samples, args.num_keep, *climb)
            drawn = average.sample(obs, args.num_samples, noise)
            losses = {"policy": clone(), "critic": learn()}
        top = ranked.topk(args.num_keep, 1).indices
        now = {
            "kept": top.sort(1).values, "best": ranked.argmax(1), "gain": (value(climbed) - kept_q).mean(),
            "winner": climbed_q.argmax(1), "drawn": drawn, "losses": losses,
            "optimized": (value(script.select_actions(best, best_q, True)[:, None])[:, 0] - exact.amax(1)).mean(),
        }  # fmt: skip
        full = full or now
        lost = exact.amax(1) - exact.gather(1, now["best"][:, None])[:, 0]
        row = {"task": args.env_id, "seed": args.seed, "settings": settings, "precision": name,
               "kept": (now["kept"] == full["kept"]).all(1).float().mean(),
               "best": (now["best"] == full["best"]).float().mean(), "rank_lost": (lost / exact.std(1)).mean(),
               "gain": now["gain"] / full["gain"], "winner": (now["winner"] == full["winner"]).float().mean(),
               "optimized_gain": now["optimized"] / full["optimized"],
               "sample_moved": (drawn - full["drawn"]).abs().mean() / full["drawn"].std(1).mean()}  # fmt: skip
        for part, (loss, gradient) in losses.items():
            exact_loss, exact_gradient = full["losses"][part]
            row[f"{part}_loss"] = (loss - exact_loss).abs() / exact_loss.abs()
            row[f"{part}_gradient"] = torch.cosine_similarity(gradient, exact_gradient, 0)
        rows.append({key: value.item() if isinstance(value, torch.Tensor) else value for key, value in row.items()})
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    return rows


def main() -> None:
    options = tyro.cli(Options)
    if not options.runs:
        fail("name the folder of a run")
    rows = []
    for folder in options.runs:
        for settings in SETTINGS:
            rows += measure(folder, options.states, settings)
    with open(options.out, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
