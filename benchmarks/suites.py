"""What the tables and figures of the paper compare, as names: which scripts with which flags, on which tasks and seeds.

`python -m benchmarks.run --suite table1 --size laptop` makes the runs, `python -m benchmarks.report tables OUT --suite
table1` the table. A suite is a dict: `what` it shows; `methods`, a label of a table's row -> a script and its flags,
name=value each; `laptop` and `paper`, the two sizes, with `tasks`, `seeds` (1 to that many) and, where they differ from
the suite's, `methods`; `flags` go to all scripts of a size, and `task_flags`, by a method's label and by task, to that
method there. `over` is the horizontal axis of its curves.

The paper's tasks and seeds are those of its section 5.1 and appendix A; where a figure does not print the values of an
ablation, they are our choice. What a suite names and the repository does not have yet is left out with one line.
"""

CALQL, IQL, RLPD = "parl_diffusion_calql.py", "parl_diffusion_iql.py", "parl_diffusion_rlpd.py"
TRANSFORMER, FLOW = "parl_transformer_calql.py", "parl_flow_calql.py"
CALQL_GAUSSIAN, RLPD_GAUSSIAN = "benchmarks/baselines/calql_gaussian.py", "benchmarks/baselines/rlpd_gaussian.py"
GAUSSIAN, CEM = "benchmarks/baselines/parl_gaussian_calql.py", "benchmarks/baselines/cem_calql.py"
IDQL, DQL, DPPO = "benchmarks/baselines/idql.py", "benchmarks/baselines/dql.py", "benchmarks/baselines/dppo.py"
FILTERED = "benchmarks/baselines/filtered_bc.py"

ANTMAZE = tuple(f"antmaze-{name}-v2" for name in ("medium-play", "medium-diverse", "large-play", "large-diverse"))
KITCHEN = tuple(f"kitchen-{name}-v2" for name in ("complete", "partial", "mixed"))
LARGE, CALVIN, CUBE = ("antmaze-large-diverse-v2",), ("calvin",), ("cube-single-play-singletask-v0",)
LAPTOP = dict(tasks=("pointmaze-medium-v0",), seeds=5)

# PA-RL's appendix B.2, "DQL": eta was searched for on each task, so these and not Wang et al.'s are table 1's
DQL_ETA = {
    "antmaze-medium-play-v2": "eta=7", "antmaze-medium-diverse-v2": "eta=9", "antmaze-large-play-v2": "eta=15",
    "antmaze-large-diverse-v2": "eta=11", **dict.fromkeys(KITCHEN, "eta=0.005"), "calvin": "eta=0.01",
}  # fmt: skip
TABLE1 = {"PA-RL + Cal-QL": CALQL, "Cal-QL (Gaussian)": CALQL_GAUSSIAN, "IDQL": IDQL, "DQL": DQL, "DPPO": DPPO}
WITHOUT_GLOBAL = f"{CALQL} num-samples=1 num-keep=1 distill-data-actions=False"  # nothing is left to rank


def steps_of(*counts: int) -> dict[str, str]:
    """Figure 11's rows: T gradient steps."""
    return {f"T = {count}": f"{CALQL} num-gradient-steps={count}" for count in counts}


def samples_of(keep: int, *counts: int) -> dict[str, str]:
    """Figure 12's rows: k samples of the policy, of which as many are kept as the default has, or all."""
    return {f"k = {count}": f"{CALQL} num-samples={count} num-keep={min(keep, count)}" for count in counts}


SUITES: dict[str, dict] = {
    "table1": dict(
        what="offline RL, then 1,000 episodes online: diffusion policies, and Cal-QL's Gaussian", methods=TABLE1,
        task_flags={"DQL": DQL_ETA},
        laptop=LAPTOP, paper=dict(tasks=ANTMAZE + KITCHEN + CALVIN, seeds=5)),
    "figure3": dict(
        what="the learning curves of table 1", methods=TABLE1, task_flags={"DQL": DQL_ETA}, laptop=LAPTOP,
        paper=dict(tasks=ANTMAZE + KITCHEN + CALVIN, seeds=5)),
    "table2": dict(
        what="PA-RL with other critics and another policy", laptop=LAPTOP,
        methods={"PA-RL + RLPD": RLPD, "RLPD (Gaussian)": RLPD_GAUSSIAN, "PA-RL + IQL": IQL, "IDQL": IDQL,
                 "PA-RL + Cal-QL (transformer)": TRANSFORMER, "Cal-QL (Gaussian)": CALQL_GAUSSIAN},
        paper=dict(tasks=KITCHEN + LARGE + CALVIN, seeds=5)),
    "table3": dict(
        what="against iterated filtered cloning (the paper: on two real robot tasks)", laptop=LAPTOP,
        methods={"PA-RL + Cal-QL": CALQL, "iterated filtered BC": FILTERED}, paper=dict(tasks=LARGE, seeds=5)),
    "table4": dict(
        what="without global and without local optimization", laptop=LAPTOP,
        methods={"PA-RL + Cal-QL": CALQL, "without global optimization": WITHOUT_GLOBAL,
                 "without local optimization": f"{CALQL} num-gradient-steps=0"},
        paper=dict(tasks=LARGE + CALVIN, seeds=5)),
    "table5": dict(
        what="distilling the best candidate, or draws of equation 4.3", laptop=LAPTOP,
        methods={"argmax": f"{CALQL} distill-selection=greedy", "samples": f"{CALQL} distill-selection=sample"},
        paper=dict(tasks=ANTMAZE + KITCHEN + CALVIN, seeds=5)),
    "figure5": dict(
        what="against the cross-entropy method from random actions", laptop=LAPTOP,
        methods={"PA-RL + Cal-QL": CALQL, "CEM + Cal-QL": CEM}, paper=dict(tasks=LARGE + KITCHEN, seeds=5)),
    "figure6": dict(
        what="distilling the data's actions instead of the policy's", laptop=LAPTOP,
        methods={"PA-RL + Cal-QL": CALQL, "the data's actions": f"{CALQL} distill-from=data"},
        paper=dict(tasks=LARGE, seeds=5)),
    "figure10": dict(
        what="learning curves of the transformer, and of PA-RL + IQL", laptop=LAPTOP,
        methods={"PA-RL + Cal-QL (transformer)": TRANSFORMER, "PA-RL + IQL": IQL, "IDQL": IDQL},
        paper=dict(tasks=KITCHEN + LARGE + CALVIN, seeds=5)),
    "figure11": dict(
        what="number of gradient steps T",
        laptop=LAPTOP | dict(methods=steps_of(0, 1, 2, 5)),
        paper=dict(tasks=LARGE + CALVIN, seeds=5, methods=steps_of(0, 1, 5, 10, 20))),
    "figure12": dict(
        what="number of samples k",
        laptop=LAPTOP | dict(methods=samples_of(2, 1, 2, 4, 8)),
        paper=dict(tasks=LARGE + CALVIN, seeds=5, methods=samples_of(10, 1, 2, 5, 10, 32))),
    "figure13": dict(
        what="what local optimization does to the candidates' spread: look at its logged metrics", laptop=LAPTOP,
        methods={"PA-RL + Cal-QL": CALQL}, paper=dict(tasks=CALVIN, seeds=5)),
    "figure14": dict(
        what="the critic's over-optimism under the cross-entropy method: look at its logged metrics", laptop=LAPTOP,
        methods={"CEM + Cal-QL": CEM, "CEM + Cal-QL, regression": f"{CEM} critic-loss=mse"},
        paper=dict(tasks=KITCHEN, seeds=5)),
    "figure15": dict(
        what="against the cross-entropy method from the cloned policy's actions", laptop=LAPTOP,
        methods={"PA-RL + Cal-QL": CALQL, "CEM + Cal-QL from the policy": f"{CEM} initial-population=policy"},
        paper=dict(tasks=LARGE + KITCHEN + CALVIN, seeds=5)),
    "figure16": dict(
        what="Bellman targets of the optimized or of the base policy (offline, too; the paper: online only)",
        laptop=LAPTOP,
        methods={"optimized": CALQL, "base policy": f"{CALQL} base-policy-backup=True"},
        paper=dict(tasks=LARGE, seeds=5)),
    "figure17": dict(
        what="a Gaussian policy in PA-RL", laptop=LAPTOP,
        methods={"PA-RL + Cal-QL": CALQL, "PA-RL + Cal-QL (Gaussian)": GAUSSIAN, "Cal-QL (Gaussian)": CALQL_GAUSSIAN},
        paper=dict(tasks=KITCHEN, seeds=5)),
    "figure18": dict(
        what="over wall-clock time", over="seconds", task_flags={"DQL": DQL_ETA}, laptop=LAPTOP,
        methods={"PA-RL + Cal-QL": CALQL, "IDQL": IDQL, "DQL": DQL}, paper=dict(tasks=CALVIN, seeds=5)),
    "critics": dict(
        what="the four scripts on the default task (not of the paper)", laptop=LAPTOP,
        methods={"diffusion, Cal-QL": CALQL, "transformer, Cal-QL": TRANSFORMER, "diffusion, IQL": IQL,
                 "diffusion, RLPD": RLPD},
        paper=dict(tasks=LARGE, seeds=5)),
    "cube-single": dict(
        what="OGBench's cube (not of the paper), at laptop size in chunks of five: PA-RL with each critic, baselines",
        methods={"PA-RL + Cal-QL": CALQL, "PA-RL + Cal-QL (flow)": FLOW, "PA-RL + IQL": IQL, "PA-RL + RLPD": RLPD,
                 "IDQL": IDQL, "Cal-QL (Gaussian)": CALQL_GAUSSIAN, "RLPD (Gaussian)": RLPD_GAUSSIAN,
                 "iterated filtered BC": FILTERED},
        laptop=dict(tasks=CUBE, seeds=3, flags="preset=laptop-chunk dataset-source=local"),
        paper=dict(tasks=CUBE, seeds=5)),
}  # fmt: skip
