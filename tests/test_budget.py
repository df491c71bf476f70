"""What keeps the scripts readable end to end: their length, their lines, and a table of contents that is true."""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("parl_*.py"))
# Lines of a script, of any other 720: 70 more than before `--chunk` (windows of the buffer, their presets) and before
# the paper's ablations were flags of the scripts and not copies (self-imitation, base policy's targets, figure 13)
LONGEST = {"parl_transformer_calql.py": 740, "parl_openvla_real.py": 900}
WIDEST = 120
scripts = pytest.mark.parametrize("name", SCRIPTS)


def num_lines(path) -> int:
    return len(path.read_text().splitlines())


@scripts
def test_a_script_is_read_in_one_sitting(name):
    assert num_lines(ROOT / name) <= LONGEST.get(name, 720)


def test_the_harness_stays_small():
    """All of it together, so that what leaves a script is written shorter there, not only elsewhere."""
    assert sum(map(num_lines, (ROOT / "benchmarks/harness").glob("**/*.py"))) <= 1_200


def test_a_baseline_is_short():
    assert not [path.name for path in (ROOT / "benchmarks/baselines").glob("*.py") if num_lines(path) > 400]


def test_no_line_is_wide():
    """Of any Python file under version control (where there is none, any that is not hidden)."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [p.relative_to(ROOT) for p in ROOT.rglob("*.py") if "/." not in str(p)]
    paths = [ROOT / name for name in names if (ROOT / name).is_file()]
    wide = [
        f"{path.relative_to(ROOT)}:{number} has {len(line)}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDEST
    ]
    assert len(paths) > 10 and not wide, "\n".join(wide)


def rows_of_table(docstring: str) -> list[list[str]]:
    """The names of each row's right column; of "main: phases 1 / 2 / 3" just `main`."""
    table = re.search(r"^paper +\| here\n-+\|-+\n((?:.+\|.+\n)+)", docstring, re.MULTILINE)
    assert table, "the docstring has no table `paper | here`"
    cells = [line.split("|")[1].strip() for line in table[1].splitlines()]
    return [[name.strip() for name in cell.split(":")[0].split(",")] for cell in cells]


def defined(tree) -> dict[str, int]:
    """The line of each function, class, method (`Class.method`) and field of Args of a module's top level."""
    lines = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                lines[f"{node.name}.{inner.name}"] = inner.lineno
            elif isinstance(inner, ast.AnnAssign):
                lines[f"{node.name}.{inner.target.id}"] = inner.lineno
    return lines


def faults(source: str) -> list[str]:
    """What is wrong with a table: names that do not exist, rows out of the file's order, an end without main."""
    tree = ast.parse(source)
    rows, lines = rows_of_table(ast.get_docstring(tree)), defined(tree)
    found = [f"{name} does not exist" for row in rows for name in row if name not in lines]
    firsts = [row[0] for row in rows if row[0] in lines]
    found += [f"{b} stands before {a}" for a, b in zip(firsts, firsts[1:]) if lines[b] < lines[a]]
    return found + ([] if rows[-1] == ["main"] else ["the last row is not main"])


@scripts
def test_the_docstrings_table_is_true(name):
    """Every name is there, and the rows come in the order of the file, `main` last."""
    assert faults((ROOT / name).read_text()) == []


@scripts
def test_the_docstring_says_what_to_read_first(name):
    """And what it names exists."""
    tree = ast.parse((ROOT / name).read_text())
    order = re.search(r"first ten minutes:(.+?)\.\s", ast.get_docstring(tree), re.DOTALL)
    assert order
    names = re.findall(r"`(\w+(?:\.\w+)?)`", order[1])
    assert len(names) >= 3 and set(names) <= defined(tree).keys()


def test_a_wrong_table_is_told():
    """The checks above can fail."""
    source = (ROOT / "parl_diffusion_calql.py").read_text()
    assert faults(source.replace("| td_target, calql_loss,", "| td_targets, calql_loss,")) == [
        "td_targets does not exist"
    ]
    swapped = source.replace("| global_optimization\n", "| X\n", 1).replace("| local_optimization\n", "| Y\n", 1)
    swapped = swapped.replace("| X\n", "| local_optimization\n").replace("| Y\n", "| global_optimization\n")
    assert faults(swapped) == ["global_optimization stands before local_optimization"]
    assert faults(re.sub(r"\| main: .*\n", "| distill\n", source, count=1))[-1] == "the last row is not main"
