"""Blocks that stand in several scripts are the same text in each: the copies are the point; this keeps them honest."""

import ast
import itertools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SHARED = (
    "DIFFUSION POLICY", "CLONING", "CRITIC", "HL-GAUSS", "ACTION OPTIMIZATION", "CAL-QL", "DATA", "DISTILLATION",
)  # fmt: skip
# and these, each with a file that has it: what baselines share with a script or with each other
BASELINES_SHARE = {
    "IQL": "parl_diffusion_iql.py", "TANH-GAUSSIAN POLICY": "calql_gaussian.py", "SAC": "calql_gaussian.py",
}  # fmt: skip
OWN = {"Args", "critic_update", "main"}  # what each script has in its own words


def all_sources() -> dict[str, str]:
    """The text of every script and baseline by its name."""
    paths = [*ROOT.glob("parl_*.py"), *(ROOT / "benchmarks/baselines").glob("[!_]*.py")]
    return {path.name: path.read_text() for path in paths}


def sections(source: str) -> dict[str, str]:
    """The text under each `# --- NAME ---` line."""
    parts = re.split(r"^# --- (.+) ---$", source, flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2])}


def drifted(sources: dict[str, str]) -> list[tuple[str, str, str]]:
    """(section, one script, another) for every shared section that both have and that differs."""
    blocks = {script: sections(source) for script, source in sources.items()}
    return [
        (name, a, b)
        for a, b in itertools.combinations(sorted(blocks), 2)
        for name in (*SHARED, *BASELINES_SHARE)
        if name in blocks[a] and name in blocks[b] and blocks[a][name] != blocks[b][name]
    ]


def test_shared_blocks_are_the_same_text():
    sources = all_sources()
    assert len(sources) >= 8 and drifted(sources) == []


def definitions(source: str) -> dict[str, str]:
    """Every function and class of the top level by name, with its decorators and comments."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def different(sources: dict[str, str]) -> list[tuple[str, str, str]]:
    """(name, one script, another) for every function or class that both have and that differs, in any section."""
    found = {script: definitions(source) for script, source in sources.items()}
    return [
        (name, a, b)
        for a, b in itertools.combinations(sorted(found), 2)
        for name in sorted(found[a].keys() & found[b].keys() - OWN)
        if found[a][name] != found[b][name]
    ]


def test_functions_of_one_name_are_the_same_text():
    sources = all_sources()
    assert different(sources) == []
    source = sources["parl_diffusion_calql.py"]
    changed = source.replace("def td_target(target_critic, rewards", "def td_target(target_critic, reward_s")
    assert different({"a.py": source, "b.py": changed}) == [("td_target", "a.py", "b.py")]


@pytest.mark.parametrize("name", (*SHARED, *BASELINES_SHARE))
def test_the_scripts_have_the_sections_and_a_drift_is_named(name):
    source = all_sources()[BASELINES_SHARE.get(name, "parl_diffusion_calql.py")]
    block = sections(source)[name]
    assert len(block) > 200
    changed = source.replace(block, block.replace("return ", "return  ", 1))
    assert drifted({"a.py": source, "b.py": changed}) == [(name, "a.py", "b.py")]


@pytest.mark.parametrize("name", BASELINES_SHARE)
def test_what_baselines_share_stands_in_two_files(name):
    assert sum(name in sections(source) for source in all_sources().values()) >= 2
