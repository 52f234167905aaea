"""Is everything here that a chapter, a run or the book needs? Findings in words that say what to do.

    for finding in examine(): ...        state "ok", "note" (something is missing that can be done without), "problem"
    print(report(examine()))             what `axmoe doctor` prints

Nothing is changed, downloaded or installed, and what can be tried is tried rather than inferred: products are
multiplied on every path, a file is written where results will go. Takes a few seconds; the first time after an
installation numba compiles, which takes ten more.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from axmoe_lite import __version__, paths

STATES = ("problem", "note", "ok")  # in the order of the report
WIDTH = 110
FEW_GB, TOO_FEW_GB = 2.0, 0.2  # of memory or disk: enough for all chapters at quick scale; not enough for one
LOST = {
    "book": "the chapters cannot be opened, and the book cannot be built",
    "fast": "looking products up and freeze() take several times as long on the CPU",
    "gpu": "tables of high rank take the slow reference on the GPU",
    "sweep": "`axmoe run`, `sweep` and `book` cannot execute anything, or one run at a time; tables are CSV only",
    "test": "the tests cannot be run; only a change to the package needs them",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what, in a word or two.
        state: ``"ok"``, ``"note"`` or ``"problem"``.
        says: what was found.
        advice: what to do about it; empty if nothing.
    """

    topic: str
    state: str
    says: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; never raises, whatever is broken: that is a finding too."""
    findings = []
    for topic, look in LOOKS.items():
        try:
            findings += look()
        except Exception as reason:  # a doctor who faints helps nobody
            ours = "" if isinstance(reason, ValueError) else "Tell us, with this line: it may be our mistake."
            said = f"could not be examined: {type(reason).__name__}: {reason}"
            findings.append(Finding(topic, "problem", said, ours))
    return findings


def healthy(findings: list[Finding]) -> bool:
    """Whether there is no problem; notes are none.

    >>> healthy([Finding("disk", "note", "1.5 GB free")]), healthy([Finding("disk", "problem", "full")])
    (True, False)
    """
    return not any(finding.state == "problem" for finding in findings)


def report(findings: list[Finding]) -> str:
    """The findings as text of at most 110 columns, problems first.

    >>> print(report([Finding("Python", "ok", "3.12.1"), Finding("disk", "problem", "full", "Delete something.")]))
    1 problem, 1 fine
    <BLANKLINE>
    PROBLEM  disk    full
                     -> Delete something.
    <BLANKLINE>
    ok       Python  3.12.1
    """
    counts = Counter(finding.state for finding in findings)
    named = {"problem": "problem", "note": "note", "ok": "fine"}
    parts = [
        f"{n} {named[state]}" + ("s" if n != 1 and state != "ok" else "") for state in STATES if (n := counts[state])
    ]
    topics = max((len(finding.topic) for finding in findings), default=0)
    blocks = [", ".join(parts) or "Nothing was examined."]
    for state in STATES:
        if lines := [line for finding in findings if finding.state == state for line in _lines(finding, topics)]:
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _lines(finding: Finding, topics: int) -> list[str]:
    mark = finding.state.upper() if finding.state == "problem" else finding.state
    start = f"{mark:<9}{finding.topic:<{topics}}  "
    blank = " " * len(start)
    how = {"width": WIDTH, "break_long_words": False, "break_on_hyphens": False}
    said = textwrap.wrap(finding.says, initial_indent=start, subsequent_indent=blank, **how)
    advice = textwrap.wrap(finding.advice, initial_indent=f"{blank}-> ", subsequent_indent=f"{blank}   ", **how)
    return [*said, *advice]


# ---------------------------------------------------------------------------------- software


def _python() -> list[Finding]:
    from importlib import metadata

    says = f"{platform.python_version()} ({sys.executable})"
    try:
        wanted = metadata.metadata("axmoe_lite")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return [Finding("Python", "ok", says)]
    from packaging.specifiers import SpecifierSet

    if wanted and not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return [Finding("Python", "problem", f"{says}; {wanted} is needed", "Make an environment with a newer Python.")]
    return [Finding("Python", "ok", says)]


def _packages() -> list[Finding]:
    """One finding for all that is needed, one for each extra, and one for each package that does not fit."""
    from importlib import metadata

    try:
        texts = metadata.requires("axmoe_lite") or []
    except metadata.PackageNotFoundError:
        says = "axmoe_lite runs from its folder and is not installed, so its requirements are not known"
        return [Finding("packages", "problem", says, pip(""))]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        says = "versions cannot be compared with what is needed: the package 'packaging' is missing"
        return [Finding("packages", "note", says, "pip install packaging")]
    requirements = [Requirement(text) for text in texts]
    provided = metadata.metadata("axmoe_lite").get_all("Provides-Extra") or []
    extras = [extra for extra in provided if extra != "gpu" or _has_gpu()]
    return [finding for extra in ("", *extras) for finding in _examine_extra(extra, requirements)]


def _examine_extra(extra: str, requirements: list) -> Iterator[Finding]:
    from importlib import metadata

    topic = f"[{extra}]" if extra else "packages"
    found, missing = [], []
    for requirement in requirements:
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        here = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if not here or (extra and always):
            continue
        wanted = ",".join(sorted(map(str, requirement.specifier), reverse=True))
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            advice = pip(extra)
            yield Finding(requirement.name, "problem", f"{version} is installed; {wanted} is needed", advice)
    if missing:
        lost = f"; without: {LOST[extra]}" if extra in LOST else "; axmoe_lite does not work without" * (not extra)
        state = "note" if extra else "problem"
        yield Finding(topic, state, f"{', '.join(missing)} missing{lost}", pip(extra))
    else:
        yield Finding(topic, "ok", ", ".join(found) or "nothing is needed")


def pip(extra: str) -> str:
    """The command that brings an extra; in a checkout, the checkout's own.

    >>> pip("book").startswith("pip install ")
    True
    """
    suffix = f"[{extra}]" if extra else ""
    editable = (paths.CHECKOUT / "pyproject.toml").exists()
    return f'pip install -e "{paths.CHECKOUT}{suffix}"' if editable else f'pip install "axmoe_lite{suffix}"'


def _code() -> list[Finding]:
    from axmoe_lite import runs

    commit = runs.commit()
    says = f"axmoe_lite {__version__} in {paths.CHECKOUT / 'axmoe_lite'}"
    if commit == "unknown":
        return [
            Finding(
                "code",
                "note",
                f"{says}, no git repository: rows of results will say commit 'unknown'",
                "For results that others can trace, work in a clone of the repository, with git installed.",
            )
        ]
    changed = ", with changes that are not committed" if commit.endswith("+") else ""
    return [Finding("code", "ok", f"{says}, commit {commit.rstrip('+')}{changed}")]


def _kernel() -> list[Finding]:
    """Whether the kernel that notebooks ask for starts this Python, and not one that knows nothing of the package."""
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError:
        return []  # the packages' finding says so
    add = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
    try:
        found = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        says = "Jupyter knows no kernel called python3, which every chapter asks for"
        return [Finding("kernel", "problem", says, f"pip install ipykernel; then {add}")]
    program = Path(found.argv[0])
    if not program.is_absolute():  # Jupyter starts the Python it runs in
        return [Finding("kernel", "ok", f"python3 starts {sys.executable}")]
    if not program.exists():
        return [Finding("kernel", "problem", f"python3 should start {program}, which does not exist", add)]
    if program.parent.resolve() != Path(sys.executable).parent.resolve():
        says = f"python3 starts {program}, another Python than this one: its axmoe_lite, if any, is what notebooks use"
        return [Finding("kernel", "note", says, add)]
    return [Finding("kernel", "ok", f"python3 starts {program}")]


# ---------------------------------------------------------------------------------- processor and GPU


def _processor() -> list[Finding]:
    import torch

    from axmoe_lite import bench, runs

    name = runs.device_name("cpu").rsplit(",", 1)[0]
    vectors = torch.backends.cpu.get_cpu_capability()
    vectors = "no vectors that torch uses" if vectors in ("DEFAULT", "NO AVX") else vectors
    cores = runs.cores()
    says = f"{name}; {cores} core{'s' * (cores > 1)} usable; {vectors}; byte units: {bench.machine()['units']}"
    return [Finding("processor", "ok", says)]


def _products() -> list[Finding]:
    """Multiply on every path, and compare with the law."""
    import torch

    from axmoe_lite import kernels
    from axmoe_lite.multipliers import EVOAPPROX, multiplier

    with warnings.catch_warnings(record=True) as said:  # the kernels say, once, what they do not trust
        warnings.simplefilter("always")
        findings = [_int8(), _lookup()]
    findings += [Finding("products", "note", str(one.message)) for one in said if issubclass(one.category, UserWarning)]
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-128, 128, shape, generator=draw).to(torch.int8) for shape in ((2, 9, 7, 6), (5, 9, 3, 3)))
    a, b, wrong = x.flatten(2).mT[0], w.flatten(2)[0], []
    ways = ("factored",) if any(finding.state == "problem" for finding in findings) else ("factored", "lookup")
    for name in EVOAPPROX:
        table = multiplier(name)
        law = kernels.matmul(a, b, table, path="reference"), kernels.conv2d(x, w, table, path="reference")
        for path in ways:
            found = kernels.matmul(a, b, table, path=path), kernels.conv2d(x, w, table, path=path)
            wrong += [f"{name} ({path})"] * (not all(map(torch.equal, found, law)))
    if wrong:
        says = f"matmul or conv2d differ from the law for {', '.join(wrong)}: numbers made here would be wrong"
        advice = "Set AXMOE_INT8=0 and AXMOE_LOOKUP=torch, look again, and tell us with this report."
        return [*findings, Finding("products", "problem", says, advice)]
    by = " and ".join(ways)
    says = f"matmul and conv2d, {by}, equal the law in every bit for all {len(EVOAPPROX)} circuits"
    return [*findings, Finding("products", "ok", says)]


def _int8() -> Finding:
    from axmoe_lite.kernels import int8

    what = "tables of few terms, such as EvoApproxLib's, are multiplied"
    if int8.available():
        return Finding("circuits", "ok", f"{what} by the processor's int8 units, the fastest way")
    says = f"{what} in float32: the same bits, slower"
    if os.environ.get(int8.SWITCH) == "0":
        return Finding(
            "circuits", "note", f"{says}; {int8.SWITCH}=0 switches the int8 units off", f"Unset {int8.SWITCH}."
        )
    return Finding("circuits", "note", f"{says} than the int8 units that other processors have")


def _lookup() -> Finding:
    from axmoe_lite.kernels import lookup

    try:
        way = lookup.backend()
    except ValueError as wrong:
        return Finding("lookups", "problem", str(wrong), f"Unset {lookup.SWITCH}.")
    says = {
        "permute": "other tables are looked up by 'permute', 64 products an instruction: the fastest way",
        "loop": "other tables are looked up by 'loop', compiled: the fastest way without AVX-512 VBMI",
        "torch": "other tables are looked up by 'torch': the same bits as the compiled ways, several times slower",
    }[way]
    if os.environ.get(lookup.SWITCH):
        return Finding("lookups", "note", f"{says}; {lookup.SWITCH} says so", f"Unset {lookup.SWITCH} for the best.")
    if way == "torch":
        why = lookup._obstacles()["loop"]
        advice = "Unset NUMBA_DISABLE_JIT." if "JIT" in why else pip("fast")
        return Finding("lookups", "note", f"{says} ({why})", advice)
    return Finding("lookups", "ok", says)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpu() -> list[Finding]:
    import torch

    from axmoe_lite.kernels import cuda, triton

    if not _has_gpu():
        if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
            says = "none that torch can use, though a driver is installed: this torch was built for the CPU"
            return [Finding("GPU", "note", says, "Install the CUDA build of torch (https://pytorch.org), if wanted.")]
        return [Finding("GPU", "ok", "none: everything runs on the CPU")]
    findings = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free, total = (n / 1e9 for n in torch.cuda.mem_get_info(device))
        units = "int8 units right" if cuda.available(device) else "no int8 units that are right, so float64"
        tables = "by Triton" if triton.available(device) else "by the slow reference"
        says = f"{torch.cuda.get_device_name(device)}, {free:.0f} of {total:.0f} GB free; {units}; tables {tables}"
        findings.append(Finding(f"GPU {index}", "ok", says))
    return findings


# ---------------------------------------------------------------------------------- space and files


def _memory() -> list[Finding]:
    free = _free_memory_gb()
    if free is None:
        return []  # this system does not say
    if free < FEW_GB:
        says = f"{free:.1f} GB free; a chapter takes about 1 GB, training on CIFAR up to 3"
        return [Finding("memory", "note", says, "Close something, or sweep with one worker.")]
    return [Finding("memory", "ok", f"{free:.1f} GB free, enough for {max(1, int(free / 1.5))} runs at a time")]


def _free_memory_gb() -> float | None:
    """What the system would give, or a container's limit if that is less; None if neither can be read."""
    known = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        known.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
        known.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(known) / 1e9 if known else None


def _home() -> list[Finding]:
    """Where results go: is it there, can it be written, is there room?"""
    advice = "Set AXMOE_HOME to a folder of yours, as in: export AXMOE_HOME=~/axmoe"
    try:
        home = paths.home()
    except ValueError as reason:
        return [Finding("home", "problem", f"{reason} Results cannot be written.", advice)]
    chosen = "AXMOE_HOME" if os.environ.get("AXMOE_HOME") else "AXMOE_HOME is not set"
    folder = next(p for p in (home / "data", home, *home.parents) if p.exists())
    findings = []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"axmoe")
    except OSError as reason:
        says = f"{home} cannot be written ({reason.strerror or reason}): nothing can be recorded or downloaded"
        findings.append(Finding("home", "problem", says, advice))
    else:
        new = "" if home.exists() else "; it will be made"
        findings.append(Finding("home", "ok", f"{home} can be written ({chosen}{new})"))
    free = shutil.disk_usage(folder).free / 1e9
    state = "problem" if free < TOO_FEW_GB else "note" if free < FEW_GB else "ok"
    advice = "Delete something, or set AXMOE_HOME to a folder on a larger disk. data/cache and data/runs can be made"
    advice = "" if state == "ok" else f"{advice} again."
    return [*findings, Finding("disk", state, f"{free:.1f} GB free at {folder}", advice)]


def _data() -> list[Finding]:
    from axmoe_lite import datasets

    findings = []
    for name in (name for name in datasets.LOADERS if name not in ("digits", "synthetic")):
        path = paths.cache_dir() / f"{name}.npz"
        if path.exists():
            findings.append(Finding(name, "ok", f"{path} ({path.stat().st_size / 1e6:.0f} MB)"))
            continue
        says = "not here yet; only runs at scale 'paper', or that name it, need it"
        fetch = f"python -c \"from axmoe_lite import datasets; datasets.load('{name}')\" downloads it, once"
        findings.append(Finding(name, "note", says, f"{fetch}; or put it at {path}."))
    return [*findings, _committed()]


def _committed() -> Finding:
    studies = len(list(paths.results_dir().glob("*.csv")))
    networks = sorted(paths.checkpoints_dir().glob("*.safetensors"))
    if studies and networks:
        return Finding(
            "committed", "ok", f"{studies} studies in data/results, {len(networks)} trained in data/checkpoints"
        )
    says = f"{studies or 'no'} studies and {len(networks) or 'no'} trained networks in {paths.home() / 'data'}"
    says += ": chapters that show committed numbers will show less, and train what they would have loaded"
    source = paths.CHECKOUT / "data"
    advice = "They come with the repository: git clone it, and work there."
    if (source / "results").is_dir() and paths.home() != paths.CHECKOUT:
        advice = f"cp -r {source}/results {source}/checkpoints {paths.home() / 'data'}/"
    return Finding("committed", "note", says, advice)


def _runs() -> list[Finding]:
    """How the runs of chapters ended, and what to do about those that did not end well."""
    from axmoe_lite.runs import store

    by_state = defaultdict(list)
    for run in store.all_runs():
        by_state[run.state()].append(run)
    if not by_state:
        return [Finding("runs", "ok", "none yet; axmoe run 02_factors makes one")]
    where = paths.runs_dir()
    said = ", ".join(f"{len(by_state[state])} {state}" for state in store.STATES if state in by_state)
    findings = [Finding("runs", "ok", f"{said}, in {where}")]
    if failed := by_state["failed"]:
        run = failed[-1]
        says = f"{len(failed)} failed, such as {run.id}: {store.outcome(run).get('reason') or 'no reason given'}"
        advice = f"{run.folder / 'error.txt'} says more. Mend it, then start the same command with --retry."
        findings.append(Finding("failed runs", "note", says, advice))
    if halted := by_state["interrupted"]:
        says = f"{len(halted)} interrupted, such as {halted[-1].id}"
        advice = "Start the same command again: what has finished is skipped, what was interrupted goes on."
        findings.append(Finding("broken runs", "note", says, advice))
    return findings


LOOKS: dict[str, Callable[[], list[Finding]]] = {
    "Python": _python,
    "packages": _packages,
    "code": _code,
    "kernel": _kernel,
    "processor": _processor,
    "products": _products,
    "GPU": _gpu,
    "memory": _memory,
    "home": _home,
    "data": _data,
    "runs": _runs,
}
