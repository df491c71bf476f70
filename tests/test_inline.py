"""`benchmarks/inline.py`: what it prints runs elsewhere, without this repository; what cannot be pasted is refused."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from benchmarks import inline as inlining
from benchmarks.inline import inline

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("parl_*.py") if "benchmarks.vla" not in path.read_text())
LINE = f"{inlining.REPLACE}\nfrom benchmarks.tasks import load_dataset, make_env\n"
# Two functions of one's own: a point that is to come near the origin, and random trajectories of it.
OWN = """
class Point(gym.Env):
    observation_space, action_space = gym.spaces.Box(-2, 2, (2,)), gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.steps = self.np_random.uniform(-1, 1, 2).astype(np.float32), 0
        return self.x, {}

    def step(self, action):
        self.x, self.steps = np.clip(self.x + 0.3 * action, -2, 2).astype(np.float32), self.steps + 1
        success = bool(np.linalg.norm(self.x) < 0.3)
        return self.x, float(success), success, self.steps == 8, {"success": success}


def make_env(env_id, **kwargs):
    return Point()


def load_dataset(env_id, path=None, size=None, seed=0, source="auto", **kwargs):
    env, rng, rows = Point(), np.random.default_rng(seed), []
    for episode in range(20):
        obs, done = env.reset(seed=episode)[0], False
        while not done:
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            next_obs, reward, terminal, timeout, _ = env.step(action)
            rows.append((obs, action, reward, next_obs, terminal, timeout and not terminal))
            obs, done = next_obs, terminal or timeout
    return Dataset(*(np.array(column) for column in zip(*rows)), source="made up")
"""
TOY = (
    "--env-id point --threads 1 --eval-episodes 2 --no-eval-processes --num-cloning-steps 5 --num-offline-steps 5 "
    "--num-offline-evals 1 --num-online-episodes 2 --num-online-evals 1 --policy-hidden 8 --policy-blocks 1 "
    "--cloning-batch-size 8 --critic-hidden 8 --batch-size 4 --num-bins 8 --num-samples 3 --num-keep 2 "
    "--num-gradient-steps 1 --discount 0.9"
).split()


def imports_of(source: str) -> list[str]:
    """All modules that a source imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom)]


def test_it_runs_in_another_folder_without_the_repository(tmp_path):
    """To its end, with the one line replaced by an environment and a dataset of one's own."""
    source = inline(str(ROOT / "parl_diffusion_calql.py"))
    assert source.count(LINE) == 1
    source = source.replace(LINE, OWN)
    assert not [module for module in imports_of(source) if module.startswith("benchmarks")]
    (tmp_path / "my_idea.py").write_text(source)
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "my_idea.py"), *TOY]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    for name in ("config.json", "metrics.csv", "checkpoint.pt", "summary.png"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "config.json").read_text())["script"] == "my_idea"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_carried_away(name):
    """It compiles, begins with the docstring, imports no harness, and keeps the script's text but for its imports."""
    made, source = inline(str(ROOT / name)), (ROOT / name).read_text()
    compile(made, name, "exec")
    assert ast.get_docstring(ast.parse(made)) == ast.get_docstring(ast.parse(source))
    ours = {module for module in imports_of(made) if module.startswith("benchmarks")}
    assert ours == {"benchmarks.tasks"} and LINE in made
    assert made.endswith(source[source.index("# --- ARGUMENTS ---") :])
    for title in ("benchmarks/harness/runs.py", "benchmarks/harness/cli.py", name):
        assert made.count(f"# === {title} ===\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_result_has_no_unused_or_undefined_name(name):
    ruff = shutil.which("ruff") or shutil.which("ruff", path=str(pathlib.Path(sys.executable).parent))
    if not ruff:
        pytest.skip("ruff is not installed")
    command = [
        ruff,
        "check",
        "--isolated",
        "--select",
        "F,E9",
        "--ignore",
        "F402",
        "-",
    ]  # F402: a loop of one module, an import of another
    done = subprocess.run(command, input=inline(str(ROOT / name)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_program_prints_it():
    command = [sys.executable, "-m", "benchmarks.inline", "parl_diffusion_iql.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == inline(str(ROOT / "parl_diffusion_iql.py"))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small repository in which files can be changed: write(path, text)."""
    monkeypatch.setattr(inlining, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("benchmarks/tasks/dataset.py", "import os\n\nHOME = os.sep\nARRAYS = (HOME,)\nOTHER = 1\n")
    write("benchmarks/harness/a.py", '"""A."""\n\nimport os\n\n\ndef one():\n    return os.sep\n')
    write("benchmarks/harness/b.py", "from benchmarks.harness.a import one\n\nTWO = one()\n")
    script = "from benchmarks.harness.b import TWO\n\n\nclass Args:\n    two = TWO\n\n\ndef main():\n    pass\n"
    write("s.py", script)
    return write


def test_modules_come_in_the_order_of_their_need(repository):
    """And what a module needs of the dataset's, with what that needs in turn, but no more."""
    made = inline("s.py")
    places = [
        made.index(f"# === {name} ===") for name in ("benchmarks/harness/a.py", "benchmarks/harness/b.py", "s.py")
    ]
    assert places == sorted(places) and made.count("import os\n") == 1 and "dataset" not in made
    repository(
        "benchmarks/harness/a.py", "from benchmarks.tasks.dataset import ARRAYS\n\n\ndef one():\n    return ARRAYS\n"
    )
    made, space = inline("s.py"), {"__name__": "s"}
    exec(made, space)
    assert space["TWO"] == (os.sep,) and "OTHER" not in made


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("benchmarks/harness/b.py", "TWO = 2\n\n\ndef main():\n    1\n", ("benchmarks/harness/b.py", "s.py", "main")),
        ("benchmarks/harness/b.py", "import time as os\nfrom benchmarks.harness.a import one\n\nTWO = one\n", ("os",)),
        ("benchmarks/harness/b.py", "from benchmarks.harness.a import one as uno\n\nTWO = uno()\n", ("as uno",)),
        ("benchmarks/harness/b.py", "import benchmarks.harness.a\n\nTWO = 2\n", ("import benchmarks.harness.a",)),
        ("benchmarks/harness/b.py", "from benchmarks.tasks import make_env\n\nTWO = 2\n", ("b.py", "only a script")),
        ("benchmarks/harness/b.py", "from benchmarks.harness.gone import one\n\nTWO = one\n", ("gone.py",)),
        ("benchmarks/harness/b.py", "from benchmarks.tasks.dataset import GONE\n\nTWO = GONE\n", ("GONE",)),
        ("s.py", "def main(:\n", ("s.py", "not Python")),
        ("s.py", "def main():\n    pass\n", ("s.py", "no script")),
        ("s.py", "from benchmarks.harness.a import one\nfrom benchmarks.vla import robot\n\n\n"
                 "class Args:\n    one = one\n\n\ndef main():\n    pass\n", ("s.py", "benchmarks.vla", "carry")),
    ],
)  # fmt: skip
def test_what_cannot_be_pasted_ends_in_one_line(repository, file, text, words):
    repository(file, text)
    with pytest.raises(SystemExit) as stopped:
        inline("s.py")
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["nowhere.py"], "nowhere.py"),
        (["benchmarks"], "benchmarks"),
        (["benchmarks/report.py"], "no script"),
        (["README.md"], "not Python"),
        ([], "usage"),
        (["a.py", "b.py"], "usage"),
    ],
)
def test_a_path_that_is_no_script_is_refused(argv, word, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=f"error: .*{word}") as stopped:
        inlining.main(argv)
    assert "\n" not in str(stopped.value) and not capsys.readouterr().out
