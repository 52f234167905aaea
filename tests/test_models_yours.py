"""A user's network from a user's file: built, with its weights, or refused in one line that names the file."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from axmoe_lite.models.yours import EXAMPLE, build_network

SMALL = (
    "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))\n"
)


@pytest.fixture
def file(tmp_path):
    """file(text, name=): a file of that text."""

    def write(text: str, name: str = "my_network.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_the_example_is_a_network_and_the_same_one_each_time(file):
    path = file(EXAMPLE)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    network = build_network(path).eval()  # BatchNorm is not to learn from the zeros
    assert torch.equal(torch.rand(3), expected), "torch's own random numbers go on as before"
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert same(network, build_network(path)) and not same(network, build_network(path, seed=1))


def test_weights_are_loaded_by_name(file, tmp_path):
    path = file(SMALL)
    trained = build_network(path, seed=5)
    save_file(trained.state_dict(), tmp_path / "mine.safetensors")
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "mine.pth")
    for name in ("mine.safetensors", "mine.pth"):
        assert same(build_network(path, weights=tmp_path / name), trained)


def test_what_lies_beside_the_file_can_be_imported_and_nothing_is_written_there(file, tmp_path):
    file("WIDTH = 5\n", "sizes_of_mine.py")
    path = file("from torch import nn\nfrom sizes_of_mine import WIDTH\n\nbuild = lambda: nn.Linear(WIDTH, 2)\n")
    before = list(sys.path)
    try:
        assert build_network(path).in_features == 5
    finally:
        sys.modules.pop("sizes_of_mine", None)
    assert sys.path == before and not list(tmp_path.glob("__pycache__/my_network*"))


@pytest.mark.trust("input", "checkpoints and networks from broken files")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def build(:\n", r"my_network.py, line 1: this is not Python \(invalid syntax\)"),
        ("a = '\0'\n", "my_network.py.*: this is not Python"),
        ("import torch\n\nx = torch.zeros(2) @ torch.zeros(3)\n", "line 3: running it ends in RuntimeError: "),
        ("import nowhere_at_all\n", "line 1: running it ends in ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raise SystemExit(3)\n", "running it ends in SystemExit: 3"),
        ("def biuld():\n    pass\n", r"has no function build\(\); it defines biuld"),
        ("from torch import nn\nbuild = 3\n", r"has no function build\(\); it defines no function"),
        ("def build(classes, width=2):\n    pass\n", r"build\(\) wants classes; "),
        ("def build():\n    return [1]\n", r"build\(\) returned a list"),
        ("def build():\n    x = 1\n    return y\n", r"line 3: its build\(\) ends in NameError: name 'y'"),
    ],
)
def test_a_file_that_does_not_work_is_told_in_one_line(file, text, problem):
    with pytest.raises(ValueError, match=problem) as refused:
        build_network(file(text))
    assert "\n" not in str(refused.value)


def test_files_are_looked_for_before_anything_is_executed(file, tmp_path):
    mark = tmp_path / "executed"
    path = file(f"import pathlib\n\npathlib.Path({str(mark)!r}).touch()\n{SMALL}")
    with pytest.raises(FileNotFoundError, match=r"mine.safetensors is not there"):
        build_network(path, weights=tmp_path / "mine.safetensors")
    (tmp_path / "mine.pkl").touch()
    with pytest.raises(ValueError, match=r"called '.pkl'"):
        build_network(path, weights=tmp_path / "mine.pkl")
    with pytest.raises(FileNotFoundError, match="Did you mean 'my_network.py'"):
        build_network(tmp_path / "my_netwrok.py")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        build_network(tmp_path)
    with pytest.raises(ValueError, match=r"called '.txt'"):
        build_network(file(SMALL, "my_network.txt"))
    assert not mark.exists()
    build_network(path)
    assert mark.exists()


@pytest.mark.trust("input", "checkpoints and networks from broken files")
def test_weights_that_do_not_fit_or_could_run_a_program_are_refused(file, tmp_path):
    path = file(SMALL)
    save_file({"0.weight": torch.zeros(3, 4)}, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match=r"few.safetensors does not fit this Sequential: it lacks 0.bias"):
        build_network(path, weights=tmp_path / "few.safetensors")
    torch.save(build_network(path), tmp_path / "whole.pth")  # a pickled network
    with pytest.raises(ValueError, match=r"whole.pth cannot be read as weights"):
        build_network(path, weights=tmp_path / "whole.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "few.safetensors").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read as weights"):
        build_network(path, weights=tmp_path / "cut.safetensors")
