"""Command lines and environment variables that nobody should have typed: one clear error, and nothing has started."""

import os
import random
import string
import subprocess
import sys
from concurrent import futures

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axmoe_lite import __version__, book, doctor, paths, runs
from axmoe_lite.__main__ import main
from axmoe_lite.book.status import launchable, repository
from axmoe_lite.kernels import lookup
from axmoe_lite.runs import grid

COMMANDS = pytest.mark.trust("input", "command lines")
VARIABLES = pytest.mark.trust("input", "environment variables")
STUDY = "resilience_resnet20_cifar100"
LONG = "a" * 5000

LINES = """
nonsense
--versions
list x
list --x
run
run 99
run 05_network
run networks_05
run .
run README.md
run ~nobody_at_all/x.ipynb
run no/such.ipynb
run {LONG}
run {LONG}.ipynb
run a\0b.ipynb
run 05_networks seed
run 05_networks =1
run 05_networks seed=
run 05_networks seed=0,
run 05_networks seed=0,1
run 05_networks seed=[0
run 05_networks seed=x
run 05_networks seed=-1
run 05_networks seed=1.5
run 05_networks seed=nan
run 05_networks seed=1e999
run 05_networks seed=9223372036854775808
run 05_networks seed=\u0663
run 05_networks seed=9..0
run 05_networks seed=0..99999999999
run 05_networks seed={NINES}
run 05_networks seed=1 seed=2
run 05_networks sede=1
run 05_networks scale=papr
run 05_networks scale="quick
run 05_networks --threads -1
run 05_networks --threads x
run 05_networks --minutes nan
run 05_networks --minutes inf
run 05_networks --minutes -1
run 05_networks --memory-gb nan
run 05_networks --workers 2
run 05_networks --thread 1
run 08_learning circuits=drum(99)
run 08_learning circuits=[drum(99)]
run 08_learning circuits=[drum(4]
run 08_learning circuits=[filter[drum(4),999999999999 roba()]]
sweep 05_networks --workers 0
sweep 05_networks --workers -1
sweep 05_networks --workers x
sweep 05_networks --workers 2 --scheduler tcp://x
sweep 05_networks seed=0,0
sweep 05_networks seed=0..99999 epochs=0..99999
collect x
collect ..
collect *
collect
collect --to
compare
compare {STUDY}
compare nothing {STUDY}
compare {STUDY} nothing
compare {STUDY}: {STUDY}
compare {STUDY}:multiplier= {STUDY}
compare {STUDY}:x=1 {STUDY}
compare {STUDY} {STUDY} --by x
compare {STUDY} {STUDY} --values multiplier
compare {STUDY} {STUDY} --values x
compare : :
compare :a=b :a=b
compare {LONG} b
compare a\0b b
compare ~nobody_at_all/x b
compare /tmp /tmp
compare /dev/null /dev/null
compare {HERE} {HERE}
verify x
verify --n 0
verify --n -1
verify --n x
verify --seed x
verify {LONG}
book x
book --scale x
book --workers 0
book --workers -1
book --workers x
bench --cases x
bench --cases ,
bench --threads 0
bench --threads ,
bench --threads 9999
bench --threads \u00b2
bench --threads {NINES}
bench --repeats 0
bench --repeats x
doctor x
"""  # one a line
NAMES = {"LONG": LONG, "NINES": "9" * 5000, "STUDY": STUDY, "HERE": __file__}


@pytest.fixture(scope="module", autouse=True)
def nothing_starts():
    """Whatever would begin to work raises an error that no test expects."""

    def started(*_, **__):
        raise AssertionError("something has started")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.sweep.__globals__["execute"], "_watch", started)
        patch.setitem(runs.sweep.__globals__, "perform_all", started)
        patch.setattr(sys.modules["axmoe_lite.book"], "execute", started)
        patch.setattr("axmoe_lite.bench.run", started)
        patch.setattr("axmoe_lite.verify.again", started)
        patch.setattr("axmoe_lite.doctor.examine", started)
        yield


def status(words):
    """The exit status of a command line."""
    try:
        return main(words)
    except SystemExit as left:
        return left.code


@COMMANDS
@pytest.mark.parametrize("line", LINES.strip("\n").split("\n"), ids=lambda line: line[:40].replace("\0", "NUL"))
def test_a_wrong_command_line_is_refused_in_a_few_words(line, capsys, tmp_path, monkeypatch):
    if line.startswith("collect"):
        monkeypatch.setenv("AXMOE_HOME", str(tmp_path))
    words = [word.format(**NAMES) for word in line.split(" ")]
    assert status(words) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    told = err.split("error: ")[-1] if err.startswith("usage: ") else err
    assert told.startswith(f"axmoe {words[0]}: ") or err.startswith("usage: axmoe")
    assert 10 < len(told) < 1500 + max(map(len, words)) * 2 and told.count("\n") <= 4


SHOWN = "0123456789.,=[](){}\"'- abcxyz:/*~\0\n\u0663\u00b2\u20ac"
WORDS = [
    "list",
    "run",
    "sweep",
    "collect",
    "compare",
    "verify",
    "book",
    "bench",
    "doctor",
    "05",
    "05_networks",
    "08_learning",
    "networks",
    "99",
    "seed",
    "scale",
    "-",
    "--",
    "=",
    "seed=0",
    "seed=0..2",
    "seed=x",
    "scale=quick",
    "scale=x",
    "epochs=1",
    "circuits=[roba()]",
    "circuits=[x]",
    "drum(4)",
    "file:x.npy",
    "0",
    "1",
    "2",
    "-1",
    "x",
    "nan",
    "--threads",
    "--minutes",
    "--workers",
    "--scheduler",
    "--retry",
    "--any-source",
    "--to",
    "--n",
    "--by",
    "--values",
    "--cases",
    "--quick",
    "--force",
]
WORDS = st.sampled_from([*WORDS, "", STUDY, f"{STUDY}:multiplier=float32"])


@COMMANDS
@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(WORDS, st.text(SHOWN, max_size=9), st.text(max_size=6)), max_size=6), st.integers(0, 6))
def test_no_words_make_the_command_line_stumble(words, at):
    """One word at least is none that any command knows, so that nothing is done."""
    words.insert(at, "--no-such-option")
    assert status([word for word in words if word not in ("-h", "--help")]) == 2


@COMMANDS
@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["05_networks", "08_learning", "22_your_model"]), st.integers(0, 2**32))
def test_no_parameters_make_the_command_line_stumble(chapter, seed):
    draw = random.Random(seed)
    known = list(runs.parameters(chapter))
    name = draw.choice([*known, "sede", "", "a b"])
    value = "".join(draw.choice(SHOWN + string.printable) for _ in range(draw.randrange(9)))
    assert status(["run", chapter, f"{name}={value}", "no_such_parameter=1"]) == 2


@COMMANDS
@pytest.mark.parametrize("values", [{"a": list(range(1001)), "b": list(range(1000))}, {"a": []}, {"a": 1}, {"a": "xy"}])
def test_a_grid_that_cannot_be_is_refused_before_it_fills_the_memory(values):
    with pytest.raises(ValueError, match="combinations|needs a list"):
        grid(values)
    assert len(grid({"a": list(range(1000)), "b": list(range(1000))})) == 10**6 or values != {"a": 1}


@COMMANDS
@pytest.mark.parametrize("scale", ["", "x", None])
def test_a_book_of_no_scale_or_no_workers_is_refused(scale):
    for options in ({"scale": scale}, {"workers": 0}, {"workers": -1}):
        with pytest.raises(ValueError, match="(scale|workers) is"):
            book.build(**options)


@COMMANDS
def test_more_workers_than_runs_are_not_started(monkeypatch, toy, elsewhere):
    asked, real = [], futures.ThreadPoolExecutor
    monkeypatch.setattr(futures, "ThreadPoolExecutor", lambda n, **more: asked.append(n) or real(n, **more))
    works = runs.plan(toy("n = 1  # {0..}"), [{"n": 1}, {"n": 2}])
    options = {"workers": 10**9, "scheduler": "", "bar": None, "perform": lambda work: {"n": work.run.parameters["n"]}}
    done = list(runs.sweep.__globals__["_outcomes"](works, **options))
    assert asked == [2] and {work.run.parameters["n"]: outcome["n"] for work, outcome in done} == {1: 1, 2: 2}


# ---------------------------------------------------------------------------------- environment


@pytest.fixture
def places(tmp_path):
    """Values of AXMOE_HOME that can be no folder, and what is said of each."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    return {
        str(tmp_path / "file"): "is a file",
        str(tmp_path / "link"): "is a file",
        str(tmp_path / "one"): "loop|leads back to itself|symbolic links",
        "~nobody_at_all": "home directory",
        "~nobody_at_all/x": "home directory",
        str(tmp_path / LONG): "too long",
    }


@VARIABLES
def test_a_home_that_can_be_no_folder_is_refused_by_its_name(places, monkeypatch, capsys, record_property):
    for place, why in places.items():
        monkeypatch.setenv("AXMOE_HOME", place)
        with pytest.raises(ValueError, match=why) as told:
            paths.home()
        assert str(told.value).startswith(f"AXMOE_HOME is {place!r}") and "or unset it" in str(told.value)
        for line in (["run", "05_networks"], ["collect"], ["verify"], ["compare", "a", "b"]):
            assert main(line) == 2
            assert capsys.readouterr().err.startswith(f"axmoe {line[0]}: AXMOE_HOME is ")
    record_property("cases", 5 * len(places))


@VARIABLES
def test_the_doctor_says_what_is_wrong_with_a_home(places, monkeypatch, record_property):
    for place, why in places.items():
        monkeypatch.setenv("AXMOE_HOME", place)
        found = doctor.LOOKS["home"]()
        assert [finding.state for finding in found] == ["problem"] and "AXMOE_HOME is " in found[0].says
        assert found[0].advice.startswith("Set AXMOE_HOME to a folder of yours"), why
    record_property("cases", len(places))


@VARIABLES
@pytest.mark.parametrize(
    "name", ["a b", "a\nb", " ", "-n", "\u00e4\u20ac", "%s{}", "a,b:c", "link to nothing", "deep/er"]
)
def test_a_home_of_any_name_works(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link to nothing").symlink_to(tmp_path / "not yet")
    monkeypatch.setenv("AXMOE_HOME", name)  # relative to where one is
    assert paths.home() == (tmp_path / name).resolve()
    told = runs.evidence(9, scale="paper", seed=0, epochs=0) | {"seconds": 0.0, "n": 1}
    assert runs.record("study", [told], key=("n",)).is_relative_to(tmp_path)
    assert [row["n"] for row in runs.read("study")] == ["1"]


@VARIABLES
def test_an_empty_home_is_none(monkeypatch):
    monkeypatch.setenv("AXMOE_HOME", "")
    assert paths.home() == paths.CHECKOUT


@VARIABLES
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("AXMOE_HOME", str(tmp_path))
    with pytest.raises(PermissionError, match=str(tmp_path)):
        runs.record("study", [runs.evidence(9, scale="paper", seed=0, epochs=0) | {"seconds": 0.0}], key=("seed",))


@VARIABLES
@pytest.mark.parametrize("name", ["x", "PERMUTE", "permute ", "0", "permute,loop"])
def test_a_way_to_look_up_that_does_not_exist_is_refused(monkeypatch, name):
    monkeypatch.setenv("AXMOE_LOOKUP", name)
    with pytest.raises(ValueError, match="AXMOE_LOOKUP is .* it can be 'permute'"):
        lookup.backend()


@VARIABLES
@pytest.mark.parametrize("name", ["x", "a/b/c", "a/b\nc: d", "a/b: c", "a b/c", "{{}}/x", "/", "a/", "../..//"])
def test_a_repository_that_is_no_address_makes_no_buttons(monkeypatch, name):
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/na-me.x")
    assert repository() == "https://github.com/owner/na-me.x"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stdout=""))
    monkeypatch.setenv("GITHUB_REPOSITORY", name)
    assert launchable("title: x\n") == "title: x\n"
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    monkeypatch.setenv("GITHUB_SERVER_URL", name)
    assert launchable("title: x\n") == "title: x\n"


PRODUCTS = """
import torch
from axmoe_lite import kernels, multiplier
a, b = torch.arange(-60, 60).view(8, 15), torch.arange(-75, 75).view(15, 10)
for name in ("mul8s_1L2J", "roba()"):
    law = kernels.matmul(a, b, multiplier(name), path="reference")
    assert all(torch.equal(kernels.matmul(a, b, multiplier(name), path=path), law) for path in ("auto", "lookup"))
"""


@VARIABLES
@pytest.mark.parametrize("wrong", [{"OMP": "abc", "NUMBA": "0"}])
def test_numbers_of_threads_that_cannot_be_change_no_product(wrong):
    variables = {f"{name}_NUM_THREADS": value for name, value in wrong.items()} | {"AXMOE_INT8": "x"}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_says_which_version_it_is(capsys):
    assert status(["--version"]) == 0
    assert capsys.readouterr().out == f"axmoe_lite {__version__}\n"
