"""The doctor: what is broken is found, named and given a remedy; this machine is well; nothing is touched."""

import collections
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time

import pytest

from axmoe_lite import doctor, paths
from axmoe_lite.doctor import Finding, examine, healthy, report


def found(topic: str) -> Finding:
    (finding,) = [finding for finding in examine() if finding.topic == topic]
    return finding


def test_this_machine_is_healthy_in_seconds():
    examine()  # numba may compile
    start = time.process_time()  # of ours: other work on the machine is not the doctor's
    findings = examine()
    assert time.process_time() - start < 5
    assert healthy(findings), report(findings)
    topics = [finding.topic for finding in findings]
    assert len(topics) == len(set(topics))
    wanted = {"Python", "packages", "[book]", "code", "kernel", "processor", "circuits", "lookups", "products", "home"}
    assert wanted | {"memory", "disk", "cifar10", "cifar100", "committed", "runs"} <= set(topics)
    assert not [f for f in findings if f.state == "problem" and not f.advice]


def test_the_report_is_aligned_narrow_and_has_problems_first(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(10**8))
    lines = report(examine()).splitlines()
    assert lines[0].startswith("1 problem, ") and lines[2].startswith("PROBLEM  disk ")
    assert max(map(len, lines)) <= 110
    starts = [line for line in lines[1:] if line and not line.startswith(" ")]
    marks = [line.split()[0] for line in starts]
    assert marks == sorted(marks, key=["PROBLEM", "note", "ok"].index)
    column = starts[0].index("0.1 GB free")
    assert all(line[column] != " " and line[column - 2 : column] == "  " for line in starts)
    assert all(line[:column].strip() == "" for line in lines[1:] if line not in starts)


def test_a_missing_package_is_named_with_what_is_lost_and_the_command_that_brings_it(monkeypatch):
    version = importlib.metadata.version

    def without(*names):
        def look(name):
            if name in names:
                raise importlib.metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(importlib.metadata, "version", look)

    without("papermill", "numba")
    book = found("[book]")
    assert book.state == "note" and book.says.startswith("papermill missing") and "cannot be built" in book.says
    assert book.advice == f'pip install -e "{paths.CHECKOUT}[book]"'
    assert found("[fast]").advice.endswith('[fast]"') and healthy(examine())
    without("safetensors")
    core = found("packages")
    assert core.state == "problem" and core.says.startswith("safetensors missing") and not healthy(examine())


@pytest.mark.parametrize(
    ("name", "version", "wanted"),
    [
        ("jupyter-book", "2.0.1", "2.0.1 is installed; >=1.0.4.post1,<2 is needed"),
        ("torch", "2.5.1+cu121", "2.5.1+cu121 is installed; >=2.6,<2.14 is needed"),
    ],
)
def test_a_version_outside_the_range_is_a_problem(monkeypatch, name, version, wanted):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda asked: version if asked == name else real(asked))
    finding = found(name)
    assert (finding.state, finding.says) == ("problem", wanted) and "pip install" in finding.advice


def test_a_package_that_is_not_installed_says_so(monkeypatch):
    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for function in ("requires", "metadata"):
        monkeypatch.setattr(importlib.metadata, function, unknown)
    assert "is not installed" in found("packages").says


@pytest.mark.parametrize(("free", "state"), [(10**8, "problem"), (15 * 10**8, "note"), (3 * 10**9, "ok")])
def test_a_full_disk(monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: collections.namedtuple("Usage", "free")(free))
    disk = found("disk")
    assert disk.state == state and f"{free / 1e9:.1f} GB free" in disk.says and bool(disk.advice) == (state != "ok")


def test_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()  # permissions would not stop a root; that a file is no folder does
    monkeypatch.setenv("AXMOE_HOME", str(tmp_path / "file"))
    home = found("home")
    assert home.state == "problem" and "cannot be written" in home.says and "AXMOE_HOME" in home.advice


def test_a_home_that_does_not_exist_yet_is_not_made(monkeypatch, tmp_path):
    monkeypatch.setenv("AXMOE_HOME", str(tmp_path / "new" / "home"))
    findings = {finding.topic: finding for finding in examine()}
    assert findings["home"].state == "ok" and "it will be made" in findings["home"].says
    assert findings["committed"].state == "note" and findings["committed"].advice.startswith("cp -r ")
    assert findings["cifar100"].state == "note" and "downloads it" in findings["cifar100"].advice
    assert list(tmp_path.iterdir()) == []


def test_switches_that_slow_everything_down_are_noticed(monkeypatch):
    from axmoe_lite.kernels import lookup

    monkeypatch.setenv("AXMOE_INT8", "0")
    monkeypatch.setenv("AXMOE_LOOKUP", "torch")
    assert (found("circuits").state, found("circuits").advice) == ("note", "Unset AXMOE_INT8.")
    assert found("lookups").state == "note" and found("products").state == "ok"
    monkeypatch.setenv("AXMOE_LOOKUP", "lop")
    assert found("lookups").state == "problem" and "'lop'" in found("lookups").says
    lookup._choose.cache_clear()


def test_wrong_products_are_a_problem(monkeypatch):
    from axmoe_lite.kernels import int8

    product = int8.matmul
    monkeypatch.setattr(int8, "matmul", lambda a, b: product(a, b).clamp(-(2**15), 2**15 - 1))  # a unit that saturates
    monkeypatch.setattr(int8, "available", lambda: True)
    finding = found("products")
    assert finding.state == "problem" and "mul8s_1KV6 (factored)" in finding.says and "(lookup)" not in finding.says


def test_a_kernel_of_another_python(monkeypatch, tmp_path):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for program, state in ((tmp_path / "gone" / "python", "problem"), ("/bin/sh", "note"), (sys.executable, "ok")):
        spec = {"argv": [str(program), "-m", "ipykernel_launcher"], "display_name": "Python 3", "language": "python"}
        (folder / "kernel.json").write_text(json.dumps(spec))
        finding = found("kernel")
        assert finding.state == state and str(program) in finding.says
        assert (state == "ok") != ("ipykernel install" in finding.advice)


def test_runs_that_failed_or_were_interrupted(elsewhere):
    from axmoe_lite.runs import store

    for seed, ended in ((0, "finished"), (1, "failed"), (2, "")):
        run = store.Run("05_networks", {"seed": seed}, "77ab12cd")
        store.begin(run, notebook="{}")
        if ended:
            store.write_json(run.folder / "outcome.json", {"state": ended, "reason": "cell 3: ValueError: no"})
    assert found("runs").says.startswith("1 interrupted, 1 failed, 1 finished")
    failed, broken = found("failed runs"), found("broken runs")
    assert "cell 3: ValueError: no" in failed.says and "error.txt" in failed.advice and "--retry" in failed.advice
    assert "again" in broken.advice and healthy([failed, broken])


def test_what_cannot_be_examined_is_a_finding_too(monkeypatch):
    def faint():
        raise RuntimeError("no pulse")

    monkeypatch.setitem(doctor.LOOKS, "GPU", faint)
    gpu = found("GPU")
    assert gpu.state == "problem" and "RuntimeError: no pulse" in gpu.says


def test_importing_the_doctor_is_light():
    code = "import sys, axmoe_lite.doctor; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"altair", "pandas", "papermill", "jupyter_client", "packaging"} & set(done.stdout.split())
