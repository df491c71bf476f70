"""benchmarks/METRICS.md has a line for every metric that is logged."""

import ast
import csv
import pathlib
import re

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
