"""benchmarks/METRICS.md has a line for every metric that is logged."""

import ast
import csv
import pathlib
import re
import statistics

import pytest

from benchmarks.harness.runs import EPISODE, PROGRESS, SCORES

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [*ROOT.glob("parl_*.py"), *ROOT.glob("benchmarks/baselines/*.py"), ROOT / "benchmarks/harness/runs.py"]


def keys_of(node) -> set[str]:
    """Keys of the dicts that are written out in a piece of source, as {...} or dict(...)."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            found |= {key.value for key in part.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "dict":
            found |= {keyword.arg for keyword in part.keywords if keyword.arg}
    return found


def logged_by(source: str) -> set[str]:
    """Names that a source logs: what it passes to `run.log`, and what it puts into `info` or `metrics`."""

    def is_metrics(node):
        return isinstance(node, ast.Name) and node.id in ("info", "metrics")

    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "log":
            found |= set().union(*map(keys_of, node.args))
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if is_metrics(target):
                    found |= keys_of(node.value)
                elif isinstance(target, ast.Subscript) and is_metrics(target.value):
                    found.add(target.slice.value)
    return found


def explained() -> list[str]:
    """Names that begin a line of one of the page's tables."""
    lines = (ROOT / "benchmarks/METRICS.md").read_text().splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([a-z_0-9]+)`", cell)]


def test_names_are_found_in_a_source():
    lines = ["info = dict(a=1)", "info['b'] = 2", "metrics = {'c': 3}", "metrics |= more | {'d': 4}",
             "run.log({'e': 5}, every=2)", "x = {'f': 6}"]  # fmt: skip
    assert logged_by("\n".join(lines)) == set("abcde")


def test_every_metric_is_explained_once():
    logged = set(PROGRESS + SCORES + EPISODE).union(*(logged_by(path.read_text()) for path in SOURCES))
    assert {"policy_loss", "cql_loss", "v_data", "token_error", "q_std", "updates_per_second"} <= logged
    kept = set()
    for path in ROOT.glob("benchmarks/results/**/metrics.csv"):
        with open(path, newline="") as file:
            kept |= set(next(csv.reader(file)))
    names = explained()
    assert not (logged | kept) - set(names), "give each a line in benchmarks/METRICS.md"
    assert len(names) == len(set(names))


def test_every_metric_says_how_a_healthy_one_looks():
    """In a third column, but for those that say where a run is."""
    text = (ROOT / "benchmarks/METRICS.md").read_text()
    assert text.count("| metric | what it is |\n") == 1 and text.count("| metric | what it is | healthy |\n") == 4
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[2:]:
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert not line.startswith("| `") or len(cells) == 3 and all(cells), line


def ends_of(script: str, metric: str, phase: str) -> list[str]:
    """Means over the first and the last tenth of a phase's rows, of the lowest to the highest seed, in two digits."""
    ends = []
    for path in sorted(ROOT.glob(f"benchmarks/results/baselines/{script}/seed*/metrics.csv")):
        with open(path, newline="") as file:
            values = [float(r[metric]) for r in csv.DictReader(file) if r["phase"] == phase and r[metric]]
        tenth = max(1, len(values) // 10)
        ends.append((statistics.mean(values[:tenth]), statistics.mean(values[-tenth:])))
    assert len(ends) == 5
    texts = [[f"{number:.2g}" for number in (min(column), max(column))] for column in zip(*ends)]
    return [low if low == high else f"{low} to {high}" for low, high in texts]


@pytest.mark.parametrize(
    ("script", "metric", "phase", "which"),
    [
        ("calql_gaussian", "actor_loss", "offline", (0,)), ("calql_gaussian", "actor_loss", "online", (1,)),
        ("rlpd_gaussian", "actor_loss", "online", (0, 1)), ("calql_gaussian", "entropy", "offline", (0, 1)),
        ("calql_gaussian", "entropy", "online", (1,)), ("calql_gaussian", "temperature", "offline", (0, 1)),
        ("calql_gaussian", "temperature", "online", (1,)), ("rlpd_gaussian", "entropy", "online", (0, 1)),
        ("rlpd_gaussian", "temperature", "online", (0, 1)), ("cem_calql", "over_optimism", "online", (0, 1)),
        ("dql", "denoising_loss", "offline", (1,)), ("dql", "denoising_loss", "online", (1,)),
        ("dql", "q_loss", "offline", (0, 1)), ("dppo", "kl", "online", (0, 1)), ("dppo", "clip_rate", "online", (0, 1)),
    ],
)  # fmt: skip
def test_the_baselines_numbers_are_their_kept_runs(script, metric, phase, which):
    lines = (ROOT / "benchmarks/METRICS.md").read_text().split("## Baselines")[1].splitlines()
    (line,) = (line for line in lines if line.startswith("| `") and f"`{metric}`" in line.split("|")[1])
    ends = ends_of(script, metric, phase)
    for i in which:
        assert re.search(rf"(?<![\d.]){re.escape(ends[i])}(?![\d])", line.split("|")[3]), (metric, ends)
