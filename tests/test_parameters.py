"""What a chapter can be asked: read without executing, checked whole, written on a command line and read back."""

import json
import os
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from axmoe_lite import paths, runs
from axmoe_lite.runs.parameters import (
    Parameter,
    chapters,
    check,
    check_parameters,
    find,
    grid,
    listing,
    parameters,
    parse,
    words,
)

CELL = """\
scale = "quick"  # {quick, paper} the dial
seed = 0  # {0..} of the weights
share = 0.5  # {0..1} of the layers
circuit = "mul8s_1L2J"  # {multiplier} the one
circuits = [  # {multiplier} to retrain under
    "mul8s_1KVA",  # # not about the list
    "drum(4)",
]
name = "a # {b} c"
fast: bool = False  # or exact
"""


def notebook(*cells: str, tags: tuple = ("parameters",)) -> dict:
    return {"cells": [{"cell_type": "code", "metadata": {"tags": list(tags)}, "source": cell} for cell in cells]}


KNOWN = parameters(notebook(CELL))


# ---------------------------------------------------------------------------------- reading


def test_the_cell_is_read_by_its_tokens():
    assert list(KNOWN.values()) == [
        Parameter("scale", "quick", "quick, paper", "the dial"),
        Parameter("seed", 0, "0..", "of the weights"),
        Parameter("share", 0.5, "0..1", "of the layers"),
        Parameter("circuit", "mul8s_1L2J", "multiplier", "the one"),
        Parameter("circuits", ["mul8s_1KVA", "drum(4)"], "multiplier", "to retrain under"),
        Parameter("name", "a # {b} c"),
        Parameter("fast", False, "", "or exact"),
    ]
    lines = notebook(*[CELL.splitlines(keepends=True)])
    assert parameters(lines) == KNOWN and parameters(notebook("seed = 0", tags=())) == {}


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("import os\nos.remove('precious')", "line 1 is not of the form name = value"),
        ("seed = 0\nseed += 1", "line 2 is not of the form"),
        ("a, b = 1, 2", "line 1 is not of the form"),
        ("seed = print('executed')", r"line 1 computes seed \(print\('executed'\)\)"),
        ("seed = 2**3", "line 1 computes seed"),
        ("seed = 0\n%matplotlib inline", "line 2 is not Python"),
        ("seed = 0\nseed = 1", "line 2 assigns seed a second time"),
        ("seed = None", "seed is None; a default is a number, text"),
        ("seed = [[1]]", r"seed is \[\[1\]\]; a default is"),
        ("seed = 0  # {-3..-1}", r"seed is 0; it must be within -3..-1"),
        ("seed = 0  # {a..}", r"seed: \{a..\} does not fit 0"),
        ("name = 'a'  # {0..}", r"name: \{0..\} does not fit 'a'; braces hold"),
        ("scale = 'quik'  # {quick, paper}", "scale is 'quik'.*Did you mean 'quick'"),
        ("circuit = 'mul8s_1L2K'  # {multiplier}", "circuit: No multiplier is called 'mul8s_1L2K'"),
        ("seed = 0  # {multiplier}", "seed: .* does not fit 0"),
    ],
)
def test_what_is_no_parameter_is_refused_and_nothing_is_executed(cell, problem, capsys):
    with pytest.raises(ValueError, match=f"The parameters cell of the notebook: {problem}"):
        parameters(notebook(cell))
    assert capsys.readouterr().out == ""


def test_files_that_are_no_notebooks(tmp_path):
    for content, problem in [
        ("scale = 1", "it is not JSON"),
        ("[]", "it has no cells"),
        ('{"worksheets": []}', "no notebook of format 4"),
        (json.dumps(notebook("a = 1", "b = 1")), "2 cells are tagged 'parameters'"),
    ]:
        path = tmp_path / "own.ipynb"
        path.write_text(content)
        with pytest.raises(ValueError, match=f"own.ipynb.*{problem}"):
            parameters(path)
    (tmp_path / "own.ipynb").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="it is not JSON"):
        parameters(path)


# ---------------------------------------------------------------------------------- finding


def test_a_chapter_has_many_names(monkeypatch, tmp_path):
    there = paths.CHECKOUT / "book" / "05_networks.ipynb"
    monkeypatch.chdir(tmp_path)
    for name in ("5", "05", "networks", "05_networks", "05_networks.ipynb", "book/05_networks.ipynb", there):
        assert find(name) == there
    own = tmp_path / "own" / "05_networks.ipynb"
    own.parent.mkdir()
    own.write_text("{}")
    assert find(own) == find("own/05_networks.ipynb") == own
    monkeypatch.chdir(own.parent)
    assert find("05_networks.ipynb") == own and find("05_networks") == there


def test_what_is_no_chapter_is_told_what_there_is(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"'netwroks' is no chapter.*Did you mean '05_networks'\? There are 00_expl"):
        find("netwroks")
    for name in ("99", "", ".", "/", "book", "README.md", "no/such.ipynb"):
        with pytest.raises(ValueError, match=f"'{name}' is no chapter and no notebook"):
            find(name)
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    monkeypatch.setattr(paths, "_shipped", dict)
    monkeypatch.setenv("AXMOE_HOME", str(tmp_path))
    assert chapters() == []
    for call in (lambda: find("5"), listing):
        with pytest.raises(ValueError, match="installed without it.*checkout"):
            call()


# ---------------------------------------------------------------------------------- checking


def test_a_run_has_all_parameters_in_their_own_types():
    given = {"seed": np.int64(3), "share": 1, "circuits": ("roba()",)}
    complete = check(KNOWN, given)
    assert list(complete) == list(KNOWN) and complete["scale"] == "quick"
    assert [complete[n] for n in given] == [3, 1.0, ["roba()"]]
    assert [type(complete[n]) for n in given] == [int, float, list]
    complete["circuits"].append("mine")
    assert check(KNOWN, {})["circuits"] == ["mul8s_1KVA", "drum(4)"], "a default was changed from outside"


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (
            {"sede": 1},
            r"no parameter 'sede'. Did you mean 'seed'\? There are scale \{quick, paper\}, seed \{0",
        ),
        ({"scale": "papr"}, "scale is 'papr'; it must be 'quick' or 'paper'. Did you mean 'paper'"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"seed": True}, "seed is True; it needs a whole number, 0 or more"),
        ({"seed": 1.0}, "seed is 1.0; it needs a whole number"),
        ({"seed": "1"}, "seed is '1'; it needs a whole number"),
        ({"seed": None}, "seed is None; it needs"),
        ({"share": 1.01}, "share is 1.01; it must be within 0..1"),
        ({"share": float("nan")}, "share is nan; it needs a number"),
        ({"share": float("inf")}, "share is inf; it needs a number"),
        ({"share": 10**400}, "share is 10+; it needs a number"),
        ({"circuit": "mul8s_1L2K"}, "circuit: No multiplier is called 'mul8s_1L2K'. Did you mean 'mul8s_1L2N'"),
        ({"circuit": 7}, "circuit is 7; it needs text, the name of a multiplier such as"),
        ({"circuits": ["roba()", "robo()"]}, r"circuits: No multiplier is called 'robo\(\)'"),
        ({"circuits": "roba()"}, r"circuits is 'roba\(\)'; it needs a list, as in circuits=\[mul8s_1KVA,drum\(4\)\]"),
        ({"circuits": [["roba()"]]}, r"circuits is \['roba\(\)'\]; it needs text"),
        ({"fast": 1}, "fast is 1; it needs true or false"),
    ],
)
def test_what_a_parameter_cannot_be(wrong, problem):
    with pytest.raises(ValueError, match=problem):
        check(KNOWN, wrong)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError) as told:
        check(KNOWN, {"typo": 1, "seed": "a", "scale": 1, "share": 1})
    lines = str(told.value).splitlines()
    assert lines[0] == "3 problems:" and lines[-1].startswith("There are scale {quick, paper}, seed {0..}, ")
    assert [line.split()[1] for line in lines[1:-1]] == ["There", "scale", "seed"]
    with pytest.raises(ValueError, match="no parameter 'a'. The notebook has none"):
        check({}, {"a": 1})


# ---------------------------------------------------------------------------------- the command line


def test_words_are_values():
    told = [
        "seed=0..3,9",
        "circuit=broken_array(1,0,3),drum(4)",
        "share= 0.25 ,1",
        "fast=true,False",
        "name=\"\",a,'b'",
    ]
    told += ["circuits=[mul8s_1L2J,mul8s_1KVA],[drum(4)],[]", "scale=paper"]
    assert parse(KNOWN, told) == {
        "seed": [0, 1, 2, 3, 9],
        "circuit": ["broken_array(1,0,3)", "drum(4)"],
        "share": [0.25, 1.0],
        "fast": [True, False],
        "name": ["", "a", "b"],
        "circuits": [["mul8s_1L2J", "mul8s_1KVA"], ["drum(4)"], []],
        "scale": ["paper"],
    }
    assert parse(KNOWN, ["name="]) == {"name": [""]} and parse(KNOWN, []) == {}
    assert parse(KNOWN, ["name=it's, 0..9,x=y,f(a, b),C:\\new,:)"])["name"] == [
        "it's",
        "0..9",
        "x=y",
        "f(a, b)",
        "C:\\new",
        ":)",
    ]


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["seed"], "'seed' gives no value; write seed=value"),
        (["--workers"], "'--workers' gives no value; write name=value"),
        (["=1"], "There is no parameter ''"),
        (["sede=1"], "There is no parameter 'sede'. Did you mean 'seed'"),
        (["seed=1", "seed=2"], "seed is given twice; write its values behind one another, as in seed=a,b"),
        (["seed=0..3,2"], "seed is given 2 twice"),
        (["share=1,1.0"], "share is given 1.0 twice"),
        (["circuits=[roba()],[roba()]"], r"circuits is given \['roba\(\)'\] twice"),
        (["seed="], "seed is ''; it needs a whole number"),
        (["seed=1,,2"], "seed is ''; it needs"),
        (["seed=1.0"], "seed is '1.0'; it needs a whole number"),
        (["seed=3..1"], "seed=3..1: 3..1 is a range of 0 numbers"),
        (["seed=0..1000000000000"], "a range of 1,000,000,000,001 numbers; 1 to 1,000,000 can be"),
        (["seed=-1000..-1"], "seed is -1000; .* And 997 more"),
        (["share=0..1"], "share is '0..1'; it needs a number"),
        (["share=1e999"], "share is inf"),
        (["fast=yes"], "fast is 'yes'; it needs true or false"),
        (["circuit=drum(4"], "circuit=drum[(]4: brackets that do not close"),
        (['name="a'], "quotes that do not close"),
        (["circuits=mul8s_1KVA"], r"circuits is 'mul8s_1KVA'; it needs a list, as in circuits=\[mul8s_1KVA,drum"),
        (["scale=papr,quik"], "'papr'.*'quik'"),
        (
            ["sede=1", "scale=papr"],
            "2 problems:\n- There is no parameter 'sede'.*\n- scale is 'papr'.*\nThere are scale",
        ),
    ],
)
def test_words_that_are_refused(texts, problem):
    with pytest.raises(ValueError, match=problem):
        parse(KNOWN, texts)


SCALARS = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=8) | st.text("\"' ,()[]=\\.0\n", max_size=8),
    bool: st.booleans(),
}
VALUES = st.one_of([*SCALARS.values(), *(st.lists(scalar, max_size=4) for scalar in SCALARS.values())])


@given(st.lists(VALUES, max_size=4))
@example([["5", "true"], "0..9", "it's", ['"', "[", ","], -0.0, "a 'b'", "''"])
def test_any_values_read_back_from_their_words(values):
    given = {f"p{i}": value for i, value in enumerate(values)}
    known = {name: Parameter(name, value) for name, value in given.items()}
    read = parse(known, words(given))
    assert repr(read) == repr({name: [value] for name, value in given.items()})
    assert check(known, grid(read)[0]) == given


@given(st.lists(st.text("\"' ,()[]=\\.a0", max_size=12)))
def test_no_text_makes_the_reader_stumble(texts):
    for text in texts:
        for name in KNOWN:
            try:
                read = parse(KNOWN, [f"{name}={text}"])[name]
            except ValueError:
                continue
            assert (
                parse(KNOWN, [f"{name}=" + ",".join(words({name: v})[0].partition("=")[2] for v in read)])[name] == read
            )


def test_a_list_that_is_empty_by_default_takes_entries_of_any_type():
    known = parameters(notebook("extra = []  # anything"))
    assert parse(known, ['extra=[1,0.5,true,a,"1"],[]']) == {"extra": [[1, 0.5, True, "a", "1"], []]}
    mixed = parameters(notebook("shares = [0, 0.5]  # {0..1}"))
    assert repr(parse(mixed, ["shares=[1,0]"])) == "{'shares': [[1.0, 0.0]]}"


def test_the_grid_is_complete_and_ordered():
    assert grid({}) == [{}]
    made = grid({"b": [1, 2], "a": ["x", "y"]})
    assert [tuple(point.values()) for point in made] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert list(made[0]) == ["b", "a"]
    for empty in ([], "abc"):
        with pytest.raises(ValueError, match="The values of seed are"):
            grid({"scale": ["quick"], "seed": empty})


# ---------------------------------------------------------------------------------- under plain papermill

INJECTED = '# Parameters\nsede = 1\nscale = "papr"\n'
HERE = "import torch\n\nruns.check_parameters()"


@pytest.fixture
def kernel(monkeypatch):
    """kernel(cells): check_parameters() as if these cells had been executed, the last being the one that calls it."""

    def ask(*cells: object) -> None:
        shell = types.SimpleNamespace(user_ns={"In": ["", *cells]})
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
        check_parameters()

    return ask


def test_papermills_typos_are_refused(kernel):
    for before in ([CELL], ["print(1)", CELL], [CELL, "", CELL]):
        with pytest.raises(ValueError, match="2 problems:\n.*'sede'. Did you mean 'seed'?.*\n.*'papr'"):
            kernel(*before, INJECTED, HERE)
    with pytest.raises(ValueError, match=r"it needs a list.*\n\(papermill -p .* -y 'circuits: \[a, b\]' a list"):
        kernel(CELL, "# Parameters\ncircuits = '[roba()]'", HERE)
    with pytest.raises(ValueError, match="share is nan; it needs a number"):
        kernel(CELL, "# Parameters\nshare = float('nan')", HERE)
    kernel(CELL, '# Parameters\nseed = 1\nPAPERMILL_INPUT_PATH = "book/x.ipynb"', HERE)


def test_there_is_no_false_alarm(kernel, monkeypatch):
    for cells in [
        [CELL, HERE],  # nothing was injected
        [HERE],
        [],
        [INJECTED, HERE],  # the notebook has no parameters cell, or nobody ran it
        [INJECTED, CELL, HERE],
        [HERE, INJECTED, HERE],  # injected cell repeated live
        [CELL, INJECTED, HERE, CELL.replace("seed", "sede"), INJECTED, HERE],  # a parameter was renamed live
        [CELL, "n = 3  # a try", INJECTED, HERE],
        ["n = 3", INJECTED, HERE],
        [CELL, INJECTED, "seed = 2", HERE],
        [CELL, INJECTED.replace("# Parameters", "# Parameters of mine"), HERE],
        [CELL, "# Parameters\nsede = f(1)", HERE],
        [CELL + "other = f(1)\n", INJECTED, HERE],
        [CELL, "# Parameters\n%time sede = 1", HERE],
        [None, 3, INJECTED, HERE],
    ]:
        kernel(*cells)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    check_parameters()
    monkeypatch.delitem(sys.modules, "IPython")
    check_parameters()


def test_papermill_itself_stops_at_a_typo(tmp_path):
    command = [sys.executable, "-m", "papermill", str(find("1")), "out.ipynb", "--no-progress-bar"]
    start = time.monotonic()
    done = subprocess.run(
        [*command, "-p", "typo", "1", "-p", "circuit", "mul8s_1L2K"],
        cwd=tmp_path,
        env={**os.environ, "AXMOE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and time.monotonic() - start < 120
    assert "There is no parameter 'typo'" in done.stderr and "Did you mean 'mul8s_1L2N'" in done.stderr
    cells = [c for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert [bool(cell.get("execution_count")) for cell in cells[:5]] == [True, True, True, False, False]


# ---------------------------------------------------------------------------------- the chapters


def test_the_list_of_chapters_names_every_parameter_and_fits_its_width():
    for width in (80, 110):
        text = listing(width=width)
        assert max(map(len, text.splitlines())) <= width
        blocks = text.split("\n\n")
        assert len(blocks) == len(chapters()) + 1
        for path, block in zip(chapters(), blocks, strict=False):
            assert block.startswith(f"{path.stem[:2]}  ") and block.splitlines()[0].endswith("?")
            squeezed = "".join(block.split())
            for p in parameters(path).values():
                braces = f"{{{p.allowed}}}" if p.allowed else ""
                assert "".join(f"{words({p.name: p.default})[0]}{braces}{p.about}".split()) in squeezed


# ----------------------------------------------------------------------------------- files


def test_a_file_is_found_from_anywhere_and_another_run_once_it_has_changed(tmp_path, monkeypatch):
    file, parameter = tmp_path / "net, mine.py", Parameter("model", "", "file")
    file.write_text("a")
    monkeypatch.chdir(tmp_path)
    pinned = parameter.check("net, mine.py")
    assert re.fullmatch(rf"{re.escape(str(file))}@digest=[0-9a-f]{{8}}", pinned) and parameter.check("") == ""
    assert parameter.check(pinned) == pinned and runs.given_file(pinned) == file == runs.given_file(str(file))
    assert runs.given_file("") is None
    assert parse({"model": parameter}, ["model='net, mine.py'"]) == {"model": [pinned]}
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match=r"^model: there is no file 'net, mine.py' in /\.$"):
        parameter.check("net, mine.py")
    with pytest.raises(ValueError, match="there is no file"):
        parameter.check(str(tmp_path))
    file.write_text("b")
    assert parameter.check(str(file)) != pinned
    with pytest.raises(ValueError, match="has changed.*Name it without its digest"):
        parameter.check(pinned)
    with pytest.raises(ValueError, match="does not fit 3"):
        Parameter("model", 3, "file")._check_notation()


def test_a_changed_file_is_executed_anew(elsewhere, toy, tmp_path):
    notebook = toy(
        'model = ""  # {file} to read', "from axmoe_lite import runs\nprint(runs.given_file(model).read_text())"
    )
    file = tmp_path / "given.txt"
    for text in ("one", "two"):
        file.write_text(text)
        (first,) = runs.sweep(notebook, {"model": [str(file)]}, progress=False)
        (again,) = runs.sweep(notebook, {"model": [str(file)]}, progress=False)
        assert first["state"] == again["state"] == "finished" and first["folder"] == again["folder"]
        assert f'"{text}\\n"' in (first["folder"] / "notebook.ipynb").read_text()
    assert len(list(runs.all_runs())) == 2
