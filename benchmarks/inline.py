"""A script with its harness pasted in: one file to carry away.

    python -m benchmarks.inline parl_diffusion_calql.py > my_idea.py

What comes out is the script's docstring, all imports, `Dataset`, each module of `benchmarks/harness/` that the script
needs (and `benchmarks/cost.py`, which the harness needs) under a line with its name, and the script itself, unchanged
but for its imports. It runs anywhere and needs nothing from this repository but two functions, imported in one line
that says so (a script that needs more of the repository, as OpenVLA's does, is refused): put your own in their place,

    make_env(env_id, **kwargs) -> a gymnasium.Env with vector observations and box actions
    load_dataset(env_id, path, size, source=...) -> a Dataset, as defined in that file

Pasting is done on the source text, so comments stay; `ast` only says where imports and definitions are. A name that
two modules define differently would change what one of them does, and is refused.
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HARNESS, DATASET, TASKS = "benchmarks.harness", "benchmarks.tasks.dataset", "benchmarks.tasks"
PASTED = (HARNESS, "benchmarks.cost")
REPLACE = (
    "# Replace this line by two functions of your own (see make_env and load_dataset in benchmarks/tasks/__init__.py)"
)


def fail(message: str):
    """End the program with one line."""
    raise SystemExit(f"error: {message}")


def read(path: pathlib.Path) -> tuple[str, ast.Module]:
    """A Python file's text and syntax tree."""
    try:
        source = path.read_text()
        return source, ast.parse(source)
    except OSError as error:
        fail(f"cannot read {path} ({error.strerror})")
    except (SyntaxError, ValueError) as error:
        fail(f"{path} is not Python ({error})")


def read_script(name: str) -> tuple[pathlib.Path, str, ast.Module]:
    """The script of that path, which must be one."""
    path = pathlib.Path(name)
    if not path.is_file():
        fail(f"there is no file {name}")
    source, tree = read(path)
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if not {"Args", "main"} <= names or not imported(tree, HARNESS):
        fail(f"{name} is no script: it needs Args, main and an import of {HARNESS}")
    for node in imported(tree, "benchmarks"):
        if not any(belongs(node.module, package) for package in (*PASTED, TASKS)):
            fail(f"{name} needs {node.module}, which is not pasted: carry the folder benchmarks/ with it")
    return path, source, tree


def file_of(module: str) -> pathlib.Path:
    return ROOT / (module.replace(".", "/") + ".py")


def belongs(module: str | None, package: str) -> bool:
    return module == package or (module or "").startswith(package + ".")


def imported(tree, package: str) -> list[ast.ImportFrom]:
    """The `from package... import ...` of a module, those inside functions included."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and belongs(node.module, package)]


def pasted(tree) -> list[ast.ImportFrom]:
    """The imports of modules whose text is pasted."""
    return [node for package in PASTED for node in imported(tree, package)]


def harness_modules(tree) -> list[str]:
    """The pasted modules that a module needs, those first that others need."""
    order = []

    def visit(tree):
        for node in pasted(tree):
            names = [f"{HARNESS}.{alias.name}" for alias in node.names] if node.module == HARNESS else [node.module]
            for name in names:
                if name not in order:
                    visit(read(file_of(name))[1])
                    order.extend([name] * (name not in order))

    visit(tree)
    return order


def is_import(node) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def body(source: str, tree, where: str) -> str:
    """A module's text without its docstring, its imports, and what it imports from this repository inside functions."""
    dropped = [node for node in tree.body if is_import(node)]
    dropped += pasted(tree) + imported(tree, DATASET)
    if ast.get_docstring(tree) is not None:
        dropped.append(tree.body[0])
    lines, gone = source.splitlines(), {i for node in dropped for i in range(node.lineno, node.end_lineno + 1)}
    text = "\n".join(line for i, line in enumerate(lines, 1) if i not in gone).strip()
    for node in ast.walk(ast.parse(text)):
        inside = node.module if isinstance(node, ast.ImportFrom) else None
        if belongs(inside, "benchmarks"):
            fail(f"{where} imports {inside} inside a function; only its top may")
    return text


def bindings(tree, where: str) -> dict[str, str]:
    """What a module's imports bind: each name, and the line that binds it. This repository's are left out."""
    bound = {}
    for node in filter(is_import, tree.body):
        for alias in node.names:
            module = node.module if isinstance(node, ast.ImportFrom) else alias.name
            ours = isinstance(node, ast.ImportFrom) and any(belongs(module, package) for package in (*PASTED, TASKS))
            if module == "__future__" or alias.name == "*" or getattr(node, "level", 0):
                fail(f"{where} has an import that cannot be pasted elsewhere: {ast.unparse(node)}")
            if belongs(module, "benchmarks") and (not ours or node.module == HARNESS or alias.asname):
                fail(f"{where} must import names from {HARNESS}.MODULE as they are, not by {ast.unparse(node)}")
            if not ours:
                renamed = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                start = f"from {module} import " if isinstance(node, ast.ImportFrom) else "import "
                bound[alias.asname or alias.name] = start + renamed
    return bound


def definitions(tree) -> dict[str, ast.stmt]:
    """The functions, classes and values that a module defines at its top level."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            found |= {n.id: node for n in ast.walk(target) if isinstance(n, ast.Name)} if target else {}
    return found


def part_of_dataset(names: set[str]) -> tuple[str, dict[str, str]]:
    """These definitions of benchmarks/tasks/dataset.py and what they need of it: their text, and imports."""
    source, tree = read(file_of(DATASET))
    defined, bound, needed = definitions(tree), bindings(tree, DATASET), set()
    for name in names - defined.keys():
        fail(f"{DATASET} does not define {name}")
    while names:
        name = names.pop()
        needed.add(name)
        used = {node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)} if name in defined else set()
        names |= used & (defined.keys() | bound.keys()) - needed
    lines, texts = source.splitlines(), []
    for node in tree.body:
        if any(defined[name] is node for name in needed & defined.keys()):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            texts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n\n\n".join(texts), {name: line for name, line in bound.items() if name in needed}


def merge(into: dict[str, tuple[str, str]], new: dict[str, str], where: str) -> None:
    """Add a module's names; refuse one that stands for something else already."""
    for name, what in new.items():
        if into.setdefault(name, (what, where))[0] != what:
            fail(f"{into[name][1]} and {where} mean different things by {name}; rename one of them")


def sorted_imports(lines: set[str]) -> str:
    """Import lines as one block of the standard library and one of the rest, names of one module together."""
    plain, of = [line for line in lines if line.startswith("import ")], {}
    for line in lines.difference(plain):
        module, name = line.removeprefix("from ").split(" import ")
        of.setdefault(module, []).append(name)
    merged = [f"from {module} import {', '.join(sorted(names, key=str.lower))}" for module, names in sorted(of.items())]
    blocks = [[], []]
    for line in sorted(plain) + merged:
        blocks[line.split()[1].split(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(block) for block in blocks if block)


def inline(name: str) -> str:
    """The script of that path as one file."""
    path, source, tree = read_script(name)
    modules = harness_modules(tree)
    parts = [(f"{m.replace('.', '/')}.py", *read(file_of(m))) for m in modules] + [(path.name, source, tree)]
    nodes = [node for _, _, t in parts for node in imported(t, DATASET)]
    tasks = sorted({alias.name for node in imported(tree, TASKS) if node.module == TASKS for alias in node.names})
    for where, _, t in parts[:-1]:
        if any(node.module != DATASET for node in imported(t, TASKS)):
            fail(f"{where} imports from {TASKS}; only a script may")
    dataset, bound = part_of_dataset({alias.name for node in nodes for alias in node.names})
    known = {}
    merge(known, bound, DATASET)
    merge(known, {name: ast.dump(node) for name, node in definitions(ast.parse(dataset)).items()}, DATASET)
    for where, _, t in parts:
        merge(known, bindings(t, where), where)
        merge(known, {name: ast.dump(node) for name, node in definitions(t).items()}, where)
    imports = {line for line, _ in known.values() if line.startswith(("import ", "from "))}
    bodies = [("benchmarks/tasks/dataset.py, in part", dataset)] if dataset else []
    bodies += [(where, body(text, t, where)) for where, text, t in parts]
    docstring = ast.get_source_segment(source, tree.body[0]) if ast.get_docstring(tree) else '"""A script."""'
    made = f"# Made by `python -m benchmarks.inline {path.name}`; the algorithm begins at the last `# ===` line."
    own = f"\n\n{REPLACE}\nfrom {TASKS} import {', '.join(tasks)}" if tasks else ""
    head = f"{docstring}\n\n{made}\n\n{sorted_imports(imports)}{own}"
    return head + "".join(f"\n\n\n# === {where} ===\n{text}" for where, text in bodies) + "\n"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0].startswith("-"):
        fail("usage: python -m benchmarks.inline SCRIPT.py > NEW.py")
    sys.stdout.write(inline(argv[0]))


if __name__ == "__main__":
    main()
