"""The house rules: import order, a light and silent import, clean notebooks, files that agree with each other."""

import ast
import doctest
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from axmoe_lite import runs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "axmoe_lite"
STAIRCASE = (  # noqa: SIM905
    "paths multipliers factors kernels quant layers pipeline moe models datasets train cost study runs claims search"
    " explore verify bench plots widgets doctor book __main__"
).split()
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, as their first name below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("axmoe_lite"):
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names if not alias.name.startswith("__")}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("axmoe_lite.")}
    return found


def test_a_module_imports_only_modules_to_its_left():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in STAIRCASE, f"{own} has no place in the staircase"
        wrong = [m for m in imports_of(path) - {own} if STAIRCASE.index(m) >= STAIRCASE.index(own)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong} from its right"


def test_experts_and_approximation_meet_in_names_only():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "moe":
            assert imports_of(path) <= {"moe"}, f"{path.name} knows of more than experts"
        if own in ("multipliers", "factors", "kernels", "quant", "layers", "pipeline"):
            assert "moe" not in imports_of(path), f"{own}/{path.name} knows of experts"


def test_the_staircase_is_what_the_package_says():
    text = (PACKAGE / "__init__.py").read_text()
    assert " ".join(STAIRCASE) in " ".join(text.split())
    readme = (ROOT / "README.md").read_text()
    places = [readme.index(f"  {name.replace('__main__', '__main__.py')}") for name in STAIRCASE]
    assert places == sorted(places)


def test_import_is_silent_and_light():
    code = "import sys; before = set(sys.modules); import axmoe_lite; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    loaded = {name.split(".")[0] for name in ast.literal_eval(done.stdout)}
    heavy = {"torchvision", "sklearn", "pandas", "altair", "papermill", "jupyter_book", "vl_convert", "ipywidgets"}
    assert not loaded & heavy


def test_import_starts_no_thread():
    code = "import threading, axmoe_lite; print(threading.active_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "1"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_clean(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "outputs are not committed"
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1, "exactly one cell is tagged 'parameters'"
    lines = "".join(tagged[0]["source"]).splitlines()
    assert all(re.match(r"\w+ = .+  # .+", line) for line in lines), "each parameter has its comment"
    assert lines[0].startswith('scale = "quick"  # {quick, paper} '), "the first parameter is the dial"
    assert all(p.about for p in runs.parameters(path).values()), "braces say what a parameter can be, not what it is"
    assert "\nruns.check_parameters()  #" in "".join(code[1]["source"]), "typos are refused before any work"
    assert notebook["metadata"]["language_info"]["name"] == "python", "papermill needs the language"
    assert sum(len("".join(cell["source"]).splitlines()) for cell in code) <= 80, "the package holds the code"
    assert "You will see" in json.dumps(notebook["cells"][0])
    assert "assert" in "".join(code[-1]["source"]), "the last cell checks the claims"


def test_every_chapter_is_in_the_book():
    parts = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())["parts"]
    pages = {chapter["file"] for part in parts for chapter in part["chapters"]}
    assert pages == {path.stem for path in (ROOT / "book").iterdir() if path.suffix in (".ipynb", ".md")} - {"intro"}


def test_environment_matches_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in ("book", "search", "fast", "sweep", "test") for d in project["optional-dependencies"][extra]),
    ]
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert listed[-1]["pip"] == [*dict.fromkeys(wanted), "-e ."]  # two extras may want one package
    assert f"python{project['requires-python']}" in listed


def test_public_functions_are_documented_with_types():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.name} does not say what it is for"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_files_are_of_readable_length():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 470}
    assert not long


def test_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) <= 12
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    example = parser.get_doctest(blocks[0], {}, "README.md", "README.md", 0)
    assert len(example.examples) >= 5
    assert runner.run(example).failed == 0


def test_a_broken_readme_example_would_be_noticed():
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "broken", "broken", 0)
    assert doctest.DocTestRunner(verbose=False).run(example, out=lambda text: None).failed == 1
