"""Does the test suite notice bugs? Known ones are planted in a copy of the checkout, and its tests are run there.

    python tests/mutations.py                        all bugs, each with the tests that ought to catch it
    python tests/mutations.py gate-learns --record   one of them, and the row into data/results/mutations.csv
    python tests/mutations.py --all-tests            each with the whole suite: hours

A bug is an exact piece of a file and what stands there instead. One is planted at a time; the checkout stays as it is.
First the same tests run without any bug: where they fail by themselves, a failure says nothing. The exit status is 1 if
a bug survived. Bugs in the paths for int8 units and for numba survive where those are missing: their tests are skipped.
"""

import argparse
import contextlib
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUDY = "mutations"
ABOUT = "bugs planted in a copy of the package, one at a time, and which test noticed each; empty where none did"
LIMIT = 300  # seconds after which one test counts as failed: a bug may make a loop endless


@dataclass(frozen=True)
class Mutation:
    """A bug to be planted.

    Attributes:
        name: short, for the command line and the rows.
        what: what goes wrong, in plain words.
        file: below the checkout.
        old, new: a text that occurs once in the file, and what takes its place.
        tests: the pytest arguments that ought to catch it, separated by spaces.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: str


# One bug in a few lines, easier to read than one argument a line.
# fmt: off
MUTATIONS = (
    # ---- multipliers and their factors
    Mutation("table-row-late", "every array multiplier's table begins one row too late",
             "axmoe_lite/multipliers/families.py",
             "return bits @ kept.int() @ bits.T",
             "return (bits @ kept.int() @ bits.T).roll(1, 0)",
             "tests/test_multipliers.py"),
    Mutation("swapped-circuit", "the bits that a circuit drops of the activation and of the weight are exchanged",
             "axmoe_lite/multipliers/families.py",
             "kept = (i >= drop_a) & (j >= drop_b)",
             "kept = (i >= drop_b) & (j >= drop_a)",
             "tests/test_multipliers.py"),
    Mutation("swapped-operands-of-errors", "error figures weigh the rows by how often the weight has a value",
             "axmoe_lite/multipliers/table.py",
             'weight = _distribution("a", a)[:, None] * _distribution("b", b)[None, :]',
             'weight = _distribution("b", b)[:, None] * _distribution("a", a)[None, :]',
             "tests/test_multipliers.py"),
    Mutation("negated-on-one-side", "a circuit behind changes of sign gets the activation negated, the weight not",
             "axmoe_lite/multipliers/table.py",
             "table=self.table[turned][:, turned])",
             "table=self.table[turned])",
             "tests/test_multipliers.py"),
    Mutation("repeats-one-late", "a mosaic that repeats begins with its second multiplier",
             "axmoe_lite/multipliers/mosaic.py",
             "torch.arange(length) % size",
             "(torch.arange(length) + 1) % size",
             "tests/test_mosaic.py"),
    Mutation("float32-believed-too-long", "sums are left in float32 up to 2^25, where odd numbers are missing",
             "axmoe_lite/factors.py",
             '"float32": 2**24',
             '"float32": 2**25',
             "tests/test_factors.py"),
    Mutation("one-sided-sign", "a factor that reaches +128 changes its sign, its partner does not",
             "axmoe_lite/factors.py",
             "row_u, row_v = -row_u, -row_v",
             "row_u, row_v = -row_u, row_v",
             "tests/test_mosaic.py"),
    Mutation("pieces-begin-anew", "where a fan-in is cut, the channels' multipliers begin anew in every piece",
             "axmoe_lite/factors.py",
             "places=self.places[channels])",
             "places=self.places[: len(self.places[channels])])",
             "tests/test_mosaic.py"),
    # ---- kernels
    Mutation("halves-lose-a-channel", "of channels that are cut in halves, since their sums are too large, one is lost",
             "axmoe_lite/kernels/factored.py",
             "few[len(few) // 2 :]]",
             "few[len(few) // 2 + 1 :]]",
             "tests/test_int8.py"),
    Mutation("border-of-zero-bytes", "an image whose codes are stored with an offset of 128 gets a border of byte 0",
             "axmoe_lite/kernels/int8.py",
             "value=self.offset",
             "value=0",
             "tests/test_int8.py"),
    Mutation("codes-up-to-255", "codes that the int8 units hand out are cut at 255 and not at 127",
             "axmoe_lite/kernels/int8.py",
             "min(127.0 * code_scale, ceiling)",
             "min(255.0 * code_scale, ceiling)",
             "tests/test_int8.py"),
    Mutation("lookup-swaps-operands", "for a short first operand the parts are exchanged, the table is not",
             "axmoe_lite/kernels/lookup.py",
             "return matmul(b.T, a.T, table.T).T.contiguous()",
             "return matmul(b.T, a.T, table).T.contiguous()",
             "tests/test_lookup.py::test_sentinels_prove_which_operand_is_the_row"),
    Mutation("odd-fan-in", "of an odd number of products that are looked up the last is added twice",
             "axmoe_lite/kernels/permute.py",
             "rows[side, a, c] = entries[a] if k + side < fan_in else 0",
             "rows[side, a, c] = entries[a]",
             "tests/test_lookup.py::test_matmul_is_the_law"),
    Mutation("encode-rotated", "tables of bytes are read one code beside the right one",
             "axmoe_lite/kernels/encode.py",
             "np.roll(table.reshape(factors.rank, -1, Q), -128, axis=2)",
             "np.roll(table.reshape(factors.rank, -1, Q), -127, axis=2)",
             "tests/test_encode.py"),
    Mutation("rounding-half-up", "without numba halves are rounded up and not to even",
             "axmoe_lite/kernels/encode.py",
             "scaled = (values * inverse_scale).round_().clamp_(least, LIMIT)",
             "scaled = (values * inverse_scale + 0.5).floor_().clamp_(least, LIMIT)",
             "tests/test_encode.py"),
    Mutation("border-after-factors", "the border is left to the convolution where code 0 has factors other than 0",
             "axmoe_lite/kernels/factored.py",
             "not factors.u[:, 128::Q].any()",
             "factors.u[:, 128::Q].any()",
             "tests/test_kernels.py::test_signed_images_with_random_tables"),
    Mutation("power-of-two-lost", "the power of two that all factors have in common is not put back",
             "axmoe_lite/kernels/factored.py",
             "return sums.mul_(2**factors.shift) if factors.shift else sums",
             "return sums",
             "tests/test_kernels.py::test_matmul_is_the_law"),
    Mutation("double-scaling", "a layer's sums are multiplied by the activation's scale twice",
             "axmoe_lite/kernels/products.py",
             "self.scale = (scale_w * self.scale_x)",
             "self.scale = (scale_w * self.scale_x * self.scale_x)",
             "tests/test_layers.py"),
    # ---- quantisation
    Mutation("clip-at-128", "codes may be 128, which a signed byte reads as -128",
             "axmoe_lite/kernels/encode.py",
             "LIMIT = 127  #",
             "LIMIT = 128  #",
             "tests/test_quant.py"),
    Mutation("rounding-down", "with a scale for each channel codes are rounded down",
             "axmoe_lite/quant.py",
             "nan_to_num_(nan=0.0).round_()",
             "nan_to_num_(nan=0.0).floor_()",
             "tests/test_quant.py"),
    Mutation("nan-for-0", "a weight that is no number counts as 0",
             "axmoe_lite/layers/modules.py",
             "not bool(held.isfinite().all())",
             "False",
             "tests/test_layers.py"),
    Mutation("divided-not-multiplied", "codes come from a division by the scale, which differs in rare bits",
             "axmoe_lite/quant.py",
             "return codes_of(x, float(1.0 / scale))",
             "return (x.float() / scale).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)",
             "tests/test_quant.py"),
    Mutation("scale-of-wrong-axis", "the scale for each channel is taken over the inputs of a layer, not its outputs",
             "axmoe_lite/quant.py",
             "amax = size.flatten(1).amax(1) if per_channel",
             "amax = size.transpose(0, 1).flatten(1).amax(1) if per_channel",
             "tests/test_quant.py"),
    Mutation("gradient-of-the-clipped", "values that were clipped get a gradient too",
             "axmoe_lite/quant.py",
             "return grad * inside, None",
             "return grad, None",
             "tests/test_quant.py"),
    # ---- layers and the frozen pipeline
    Mutation("border-of-code-minus-128", "the law pads an image after codes became rows of the table: with code -128",
             "axmoe_lite/kernels/reference.py",
             "x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0])).long() + 128",
             "x = torch.nn.functional.pad(x.long() + 128, (padding[1], padding[1], padding[0], padding[0]))",
             "tests/test_kernels.py::test_padding_goes_through_the_table"),
    Mutation("exact-layer-left-approximate", "a layer that a new assignment does not name keeps its multiplier",
             "axmoe_lite/layers/network.py",
             "        after[name] = exact\n",
             "        after[name] = layer\n",
             "tests/test_layers.py"),
    Mutation("restore-forgets-linear", "restore() leaves linear layers approximate",
             "axmoe_lite/layers/network.py",
             "{name: exact_of(layer) for name",
             "{name: layer if exact_kind(layer) is nn.Linear else exact_of(layer) for name",
             "tests/test_layers.py"),
    Mutation("stale-weights", "a layer keeps multiplying by the weights it had before they were changed",
             "axmoe_lite/layers/modules.py",
             "if all(a.device == b.device and torch.equal(a, b) for a, b in pairs)",
             "if all(a.device == b.device and a.shape == b.shape for a, b in pairs)",
             "tests/test_products.py::test_no_product_is_older_than_the_weights"),
    Mutation("residual-after-relu", "a residual is added after the ReLU where it should be added before",
             "axmoe_lite/pipeline/steps.py",
             "y = self.units(x) + residual  #",
             "y = self.units(x, ceiling=self.ceiling) + residual  #",
             "tests/test_pipeline.py::test_six_is_the_ceiling_where_no_codes_follow"
             " tests/test_pipeline.py::test_additions_that_broadcast"),
    Mutation("epsilon-lost", "BatchNorm is folded in without its epsilon",
             "axmoe_lite/pipeline/plan.py",
             "gain = (bn.running_var.double() + bn.eps).rsqrt()",
             "gain = bn.running_var.double().rsqrt()",
             "tests/test_pipeline.py::test_batch_norms_epsilon_is_folded_in"),
    # ---- mixtures
    Mutation("combine-order", "the experts' answers are put back in the order in which they were taken",
             "axmoe_lite/moe/routing.py",
             "return _Reorder.apply(torch.cat(full), order.argsort())",
             "return _Reorder.apply(torch.cat(full), order)",
             "tests/test_moe.py"),
    Mutation("probability-missing", "a Hard mixture's answer is not scaled by its probability",
             "axmoe_lite/moe/layers.py",
             "y = y * _beside(weight, y)",
             "y = y * torch.ones_like(_beside(weight, y))",
             "tests/test_moe.py"),
    Mutation("balance-without-e", "the load-balancing loss lacks the number of experts, so that even load is 1 / E",
             "axmoe_lite/moe/routing.py",
             "return E * (counts",
             "return (counts",
             "tests/test_moe_gates.py"),
    Mutation("gate-learns", "gates that are to be frozen keep their gradients",
             "axmoe_lite/moe/networks.py",
             "gate.requires_grad_(False)",
             "gate.requires_grad_(True)",
             "tests/test_moe_networks.py"),
    # ---- data and training
    Mutation("labels-shuffled", "the digits' training labels stand in another order than the images",
             "axmoe_lite/datasets.py",
             'Images("digits", x[train], y[train],',
             'Images("digits", x[train], y[train.sort().values],',
             "tests/test_datasets.py"),
    Mutation("retraining-moves-gates", "retrain() freezes the gates when asked not to, and not when asked to",
             "axmoe_lite/train/retrain.py",
             "with moe.gates_frozen(network) if freeze_gates else",
             "with moe.gates_frozen(network) if not freeze_gates else",
             "tests/test_train.py::test_retraining_heals_and_leaves_frozen_gates_alone"),
    Mutation("norms-from-test-images", "BatchNorm's averages are taken anew on the test images",
             "axmoe_lite/train/retrain.py",
             "for x in images.subset(n_train=n).x_train.split(batch_size):",
             "for x in images.subset(n_test=n).x_test.split(batch_size):",
             "tests/test_norms.py"),
    Mutation("ranges-from-test-images", "activation ranges are read off the test images",
             "axmoe_lite/train/retrain.py",
             "seen = images.normalised(images.subset(n_train=n).x_train)",
             "seen = images.normalised(images.subset(n_test=n).x_test)",
             "tests/test_train.py::test_calibration_sees_training_images_only"),
    Mutation("evaluated-in-training-mode", "accuracy is measured with BatchNorm's averages of each test batch",
             "axmoe_lite/train/measure.py",
             "    with evaluating(model):\n        for x in tqdm(",
             "    with torch.no_grad():\n        for x in tqdm(",
             "tests/test_train.py::test_predict_keeps_the_mode_and_does_not_depend_on_the_batch"),
    Mutation("any-committed-network", "a network in data/checkpoints is taken for one of other settings",
             "axmoe_lite/study/networks.py",
             "for key, value in asked.items() if key",
             "for key, value in () if key",
             "tests/test_study.py::test_a_committed_network_of_the_same_settings_is_taken"),
    # ---- cost
    Mutation("gateway-forgotten", "a cluster's gateway costs nothing",
             "axmoe_lite/cost.py",
             "if isinstance(module, COUNTED) and (",
             'if isinstance(module, COUNTED) and "gateway" not in name and (',
             "tests/test_cost.py"),
    Mutation("gateway-counted-twice", "a cluster's gateway is counted twice",
             "axmoe_lite/cost.py",
             "totals[name] += _macs(module, args, named, output, attention)",
             'totals[name] += _macs(module, args, named, output, attention) * (1 + ("gateway" in name))',
             "tests/test_cost.py"),
    Mutation("static-for-executed", "a mixture is charged for all of its experts, asked or not",
             "axmoe_lite/cost.py",
             "executed[name] / len(inputs), static",
             "static[name] / len(few), static",
             "tests/test_cost.py"),
    # ---- claims
    Mutation("unpaired", "two networks are compared as if they had answered different images",
             "axmoe_lite/claims/cells.py",
             "if all(cell.right is not None for row in grid for cell in row):",
             "if not grid:",
             "tests/test_claims.py"),
    Mutation("sign-of-the-drop", "what multipliers cost is added to a topology's accuracy and not taken off",
             "axmoe_lite/claims/judge.py",
             "terms |= {(topology, name, NOT): -sign / len(used) for name in used}",
             "terms |= {(topology, name, NOT): sign / len(used) for name in used}",
             "tests/test_claims.py"),
    Mutation("seeds-scatter-too-little", "two or three seeds are taken to know their own spread exactly",
             "axmoe_lite/claims/statistics.py",
             "stats.t.ppf((order + 0.5) / resamples, len(per_seed) - 1)",
             "stats.norm.ppf((order + 0.5) / resamples)",
             "tests/test_claims_statistics.py"),
    # ---- search
    Mutation("chosen-on-test-images", "a search scores its networks on the test images",
             "axmoe_lite/search/trial.py",
             "x_test=x[held], y_test=y[held]",
             "x_test=images.x_test, y_test=images.y_test",
             "tests/test_search_experts.py::test_validation_images_are_training_images_apart"
             " tests/test_search_experts.py::test_the_search_never_looks_at_the_test_images"),
    Mutation("knapsack-keeps-the-first", "of sums within one step of cost the worst is kept, not the best",
             "axmoe_lite/search/additive.py",
             "np.diff(floor, append=np.inf)",
             "np.diff(floor, prepend=-np.inf)",
             "tests/test_search_experts.py::test_a_large_front_is_as_good_as_its_bins"),
    Mutation("power-may-rise", "a less accurate operating point may take a dearer multiplier",
             "axmoe_lite/search/qos.py",
             "point[dearer] = before[dearer]",
             "point[dearer] = point[dearer]",
             "tests/test_search_qos.py::test_power_falls_although_the_clusters_say_otherwise"),
    # ---- runs
    Mutation("row-twice", "a row that is recorded again stands there twice",
             "axmoe_lite/runs/evidence.py",
             "writer.writerows(kept.values())",
             "writer.writerows([*old, *texts])",
             "tests/test_runs.py"),
    Mutation("typo-accepted", "a parameter that does not exist is passed over in silence",
             "axmoe_lite/runs/parameters.py",
             "_refuse([_unknown(name, known) for name in given if name not in known] + problems, known)",
             "_refuse(problems, known)",
             "tests/test_parameters.py::test_what_a_parameter_cannot_be"),
    Mutation("half-written-file", "a file is written in place, so that a full disk leaves half of it",
             "axmoe_lite/runs/store.py",
             "        partial.write_bytes(content)\n        os.replace(partial, path)\n",
             "        path.write_bytes(content)\n",
             "tests/test_store.py"),
    # ---- what a reader sees
    Mutation("always-the-first-layer", "the explorer shows the operands of the first layer, whichever is chosen",
             "axmoe_lite/explore.py",
             "layer = layer or next(iter(seen.operands))",
             "layer = next(iter(seen.operands))",
             "tests/test_explore.py"),
    Mutation("stale-number", "an accuracy that comes late is shown beside another multiplier's name",
             "axmoe_lite/widgets.py",
             "if self._shown is setting:",
             "if self._shown is not None:",
             "tests/test_widgets.py::test_a_late_accuracy_never_stands_beside_another_name"),
    Mutation("row-without-evidence", "a number that does not say where it comes from is drawn",
             "axmoe_lite/plots/theme.py",
             "        if missing:\n            raise ValueError(f\"A row",
             "        if len(missing) > len(EVIDENCE):\n            raise ValueError(f\"A row",
             "tests/test_plots.py"),
)
# fmt: on


def mutated(text: str, mutation: Mutation) -> str:
    """The text of the mutation's file with the bug in it.

    Raises:
        ValueError: unless the old text occurs exactly once.
    """
    if (found := text.count(mutation.old)) != 1:
        raise ValueError(
            f"the code has changed: {mutation.file} should have this once, and has it {found} times; correct"
            f" {mutation.name!r} in tests/mutations.py:\n{mutation.old}"
        )
    return text.replace(mutation.old, mutation.new)


def chosen(names: Iterable[str]) -> list[Mutation]:
    """The mutations of these names; all if none is named. Raises ValueError for an unknown name."""
    known, names = {mutation.name: mutation for mutation in MUTATIONS}, list(names)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"No bug is called {name!r}; did you mean {near!r}? There are {', '.join(known)}.")
    return [known[name] for name in names or known]


def copy_checkout(to: Path) -> None:
    """Copy the files that git tracks, as they are now, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")):
        if name and (ROOT / name).is_file():  # not one that was deleted since
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


@contextlib.contextmanager
def planted(copy: Path, mutation: Mutation) -> Iterator[None]:
    """The bug is in the copy for a while; then the copy is as before."""
    file = copy / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(mutated(text, mutation), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")


# An editable install must not win over the copy: what is tested is asked in the process that tests it.
ELSEWHERE = 77
RUNNER = f"""
import pathlib, sys
import axmoe_lite, pytest
if pathlib.Path.cwd().resolve() not in pathlib.Path(axmoe_lite.__file__).resolve().parents:
    print(axmoe_lite.__file__)
    sys.exit({ELSEWHERE})
sys.exit(pytest.main(sys.argv[1:]))
"""


def first_failure(copy: Path, arguments: Iterable[str]) -> str:
    """Run tests in the copy until one fails: its name, or "" if all pass.

    Raises:
        RuntimeError: if another package than the copy's was imported, or pytest came to no verdict.
    """
    options = ["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", f"--timeout={LIMIT}"]
    # The bug's own test fails at every bug: its text is no longer there.
    options += ["--ignore=tests/test_mutations.py", *arguments]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AXMOE_", "PYTEST_"))}
    # No bytecode: it is known by a file's second and size, which a bug may share with the code that it replaces.
    env = {**kept, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUNNER, *options]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == ELSEWHERE:
        raise RuntimeError(f"The tests would import {done.stdout.strip()}, not the copy in {copy}.")
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::[\w.:]+)", done.stdout, flags=re.M)
    if done.returncode != 1 or not failed:  # a file that cannot be imported, or no test of that name
        told = "\n".join([*done.stdout.splitlines()[-15:], *done.stderr.splitlines()[-15:]])
        raise RuntimeError(f"pytest came to no verdict (status {done.returncode}):\n{told}")
    return failed[1]


def record(mutation: Mutation, caught_by: str, seconds: float) -> None:
    """One row of ``data/results/mutations.csv``, with its evidence; no image was looked at."""
    from axmoe_lite import paths, runs  # torch costs seconds, and most runs need none

    if paths.CHECKOUT != ROOT:
        raise RuntimeError(f"axmoe_lite is imported from {paths.CHECKOUT}; its commit is not that of {ROOT}.")
    told = {"name": mutation.name, "what": mutation.what, "file": mutation.file, "caught_by": caught_by}
    row = {**told, **runs.evidence(0, scale="paper", seed=0, epochs=0), "seconds": round(seconds, 1)}
    runs.record(STUDY, [row], key=("name",), about=ABOUT, made_by="python tests/mutations.py --record")


def main(arguments: list[str] | None = None) -> int:
    """Plant the bugs one after another and say what became of them; 1 if one survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of bugs; all if none is named")
    parser.add_argument("--all-tests", action="store_true", help="run the whole suite at each")
    parser.add_argument("--record", action="store_true", help="write a row for each to data/results")
    asked = parser.parse_args(arguments)
    try:
        bugs = chosen(asked.names)
        for bug in bugs:
            mutated((ROOT / bug.file).read_text(encoding="utf-8"), bug)
    except ValueError as problem:
        parser.error(str(problem))
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder).resolve()
        copy_checkout(copy)
        tests = [] if asked.all_tests else sorted({test for bug in bugs for test in bug.tests.split()})
        tests = [test for test in tests if "::" not in test or test.partition("::")[0] not in tests]
        if failed := first_failure(copy, tests):
            sys.exit(f"{failed} fails without any bug, so that nothing can be told; mend it first.")
        for bug in bugs:
            start = time.perf_counter()
            with planted(copy, bug):
                caught_by = first_failure(copy, [] if asked.all_tests else bug.tests.split())
            seconds = time.perf_counter() - start
            verdict = f"caught by {caught_by} in {seconds:.1f} s" if caught_by else f"SURVIVED {bug.tests}"
            print(f"{bug.name} ({bug.what}): {verdict}", flush=True)
            survived += [] if caught_by else [bug.name]
            if asked.record:
                record(bug, caught_by, seconds)
    told = f" SURVIVED: {', '.join(survived)}" if survived else ""
    print(f"{len(bugs) - len(survived)} of {len(bugs)} bugs caught.{told}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
