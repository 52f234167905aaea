"""Tables and circuits from broken files: refused in a sentence that names the file, or read as what they still are."""

import os
import sys

import numpy as np
import pytest
import torch
from broken import damaged, outcomes, result
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multipliers_files import FORMATS, ROLLED, TABLE, C, grid, header, npy

from axmoe_lite.multipliers import Multiplier, multiplier, pinned, read_table
from axmoe_lite.multipliers.circuit_c import EXAMPLE, MOST_INSTRUCTIONS

pytestmark = pytest.mark.trust("input", "tables and circuits from broken files")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")

QUICK = ("a.npy", "flat.npy", "floats.npy", "short.bin", "grid.csv", "nested.h", "flat.h")
SLOW = ("pandas.csv", "triples.csv", "bits.c")  # more to read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


def check(found: Multiplier | None) -> None:
    """What was read at all is a whole multiplier."""
    if found is not None:
        assert found.table.shape == (256, 256) and found.table.dtype == torch.int32
        assert found(7, 7) == int(found.table[135, 135])


@pytest.mark.parametrize("filename", QUICK)
@settings(max_examples=80, deadline=None)
@given(data=st.data(), trust=st.booleans())
def test_a_damaged_table_is_refused_by_name_or_a_whole_one(filename, folder, data, trust):
    path = folder / filename
    path.write_bytes(data.draw(damaged(FORMATS[filename])))
    check(result(lambda p: read_table(p, trust=trust), path))


@pytest.mark.parametrize("filename", SLOW)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_long_file_too(filename, folder, data):
    path = folder / filename
    path.write_bytes(data.draw(damaged(FORMATS[filename])))
    check(result(lambda p: read_table(p, trust=True), path))


@pytest.mark.parametrize("ending", [".npy", ".csv", ".bin", ".h", ".c"])
@pytest.mark.parametrize("filename", ["a.npy", "short.bin", "short.csv", "example.c", "nested.h"])
def test_a_file_under_another_ending_is_no_other_table(filename, ending, folder):
    contents = FORMATS | {"short.csv": grid(TABLE), "example.c": EXAMPLE.encode()}
    path = folder / f"renamed{ending}"
    path.write_bytes(contents[filename])
    found = result(read_table, path)
    assert (found is None) == (not filename.endswith(ending)), "each format is read under its own ending only"


# ---------------------------------------------------------------------------------- circuits

WORDS = """
    A B x f 0 1 7 255 0x80 0b1 017 1u 1ull 31 32 40 99999999999999999999 ( ) ( ) { } [ ] ; ; , = += <<= & | ^ ~ << >> +
    - * / % ! ? : . -> && if while for return int int8_t uint64_t unsigned const static sizeof goto (int8_t) (uint64_t)
    (float) /* */ // #define #include <x> " ' \\ é ² \0
""".split()  # noqa: SIM905 (a list would fill a page)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join), st.sampled_from(["{}", "int x = A; {} return x;"]))
def test_any_words_in_a_circuit_are_a_table_or_refused(folder, words, frame):
    path = folder / "words.c"
    path.write_text(C.format(frame.replace("{}", words)), encoding="utf-8")
    check(result(lambda p: read_table(p, trust=True), path))


@settings(max_examples=150, deadline=None)
@given(content=damaged(EXAMPLE.encode()))
def test_a_damaged_circuit_is_refused_by_name_or_a_whole_table(folder, content):
    path = folder / "circuit.c"
    path.write_bytes(content)
    check(result(lambda p: read_table(p, trust=True), path))


ENDLESS = {
    "loop": "while (1) A += 1; return A;",
    "recursion": "return f(A, B);",
    "jump": "again: A += 1; goto again; return A;",
    "parentheses": "return " + "(" * 200_000 + "A" + ")" * 200_000 + ";",
    "signs": "return " + "- " * 200_000 + "A;",
    "casts": "return " + "(int8_t)" * 90_000 + "A;",
    "brackets": "return " + "A + (" * 90_000 + "A" + ")" * 90_000 + ";",
    "shift": "return A << 4000000000;",
    "shift left by less than nothing": "return A << -1;",
    "shift by a variable": "return 1 << A;",
    "constant": "return " + "9" * 1_000_000 + ";",
    "array": "int x[2000000000]; return A;",
    "division": "return A / 0;",
    "remainder": "return A % 0;",
    "function": "return printf(A);",
    "no end": "return A; /*",
    "no return": "A = B;",
    "operations": "A = A " + "+ A " * MOST_INSTRUCTIONS + "; return A;",
    "float": "double x = A; return x;",
    "pointer": "int *x = &A; return *x;",
    "system": 'system("touch executed"); return A;',
    "preprocessor": "\n#define A B\nreturn A;",
    "file": '\n#include "/etc/passwd"\n#embed "/etc/passwd"\nreturn A;',
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_circuit_that_would_not_end_or_means_nothing_is_refused(name, folder):
    path = folder / "endless.c"
    path.write_text(C.format(ENDLESS[name]))
    assert result(lambda p: read_table(p, trust=True), path) is None


def test_the_longest_circuit_is_read(folder):
    # Each "x >>= 1" is three operations (load, constant, shift) and a store.
    path = folder / "longest.c"
    path.write_text(C.format("uint64_t x = A; " + "x >>= 1; " * (MOST_INSTRUCTIONS // 4 - 10) + "return x;"))
    assert result(lambda p: read_table(p, trust=True), path).table.eq(0).all()


# ---------------------------------------------------------------------------------- by hand

BROKEN = {
    "names only.csv": (b"a,b,product\n", "no line after its names"),
    "underscores.csv": (grid(TABLE).replace(b"16256", b"16_256"), "'16_256'"),
    "infinite.npy": (npy(np.where(TABLE == 0, np.inf, TABLE).astype(np.float16)), "it holds inf"),
    "braces.h": (b"const int16_t lut[256][256] = {" + b"{}" * 2_000_000 + b"};", "in 2,000,001 braces"),
    "deep.h": (b"const int16_t lut[256][256] = " + b"{" * 2_000_000 + b"};", "braces"),
    "wide.h": (header(np.where(ROLLED == 0, 2**40, ROLLED.astype(np.int64))).encode(), "no plain whole number"),
    "utf16.csv": ("\n".join(["1,2,3"] * 9).encode("utf-16"), "it is no text"),
    "zeros.csv": (b"\0" * 10_000, "entries"),
    "other.npy": (b"\x93NUMPY\x09\0" + npy(TABLE)[8:], "head of this .npy file is damaged"),
    "text.npy": (npy(TABLE.astype("<U6")), "entries of type '<U6'"),
    "record.npy": (npy(np.zeros(65536, [("a", "<i4")])), "entries of type"),
    "shape.npy": (npy(TABLE).replace(b"(256, 256)", b"(-1, 65536)"), "damaged"),
    "largest.npy": (npy(TABLE).replace(b"(256, 256), }", b"(99999999999)"), "head|shape"),
}  # fmt: skip


@pytest.mark.parametrize("filename", BROKEN)
def test_what_was_found_broken_stays_refused(filename, folder):
    content, problem = BROKEN[filename]
    (folder / filename).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as refused:
        read_table(folder / filename)
    assert filename in str(refused.value) and len(str(refused.value)) < 600


def test_half_precision_holds_products_too(folder):
    table = np.where(abs(TABLE) <= 2048, TABLE, 0)  # all that 11 bits hold
    (folder / "half.npy").write_bytes(npy(table.astype(np.float16)))
    assert np.array_equal(read_table(folder / "half.npy", trust=True).table, table)


@pytest.mark.parametrize("name", ["file:~nobody-of-that-name/mine.npy", "swap:file:~nobody-of-that-name/mine.npy"])
def test_a_home_folder_that_is_none_is_refused_by_the_files_name(name):
    for ask in (multiplier, pinned):
        with pytest.raises(ValueError, match=r"~nobody-of-that-name/mine\.npy: there is no such home folder"):
            ask(name)


def test_a_link_that_leads_nowhere_or_to_itself_is_no_file(tmp_path):
    os.symlink("round.npy", tmp_path / "round.npy")
    os.symlink("nowhere.npy", tmp_path / "dangling.npy")
    for name in ("round.npy", "dangling.npy", "no\0thing.npy", "\ud800.npy", "a" * 300 + ".npy"):
        assert result(read_table, tmp_path / name) is None


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "mine.npy").write_bytes(npy(TABLE))
    (tmp_path / "mine.npy").chmod(0)
    assert result(read_table, tmp_path / "mine.npy") is None


@linux
def test_traps_take_no_memory_and_start_no_program(tmp_path, record_property):
    traps = {
        "large.csv": b"",
        "long.h": b"const int lut[] = {" + b"1," * 8_000_000 + b"1};",
        "braces.h": b"const int lut[][256] = {" + b"{}" * 8_000_000 + b"};",
        "words.c": b"A " * 8_000_000,
        "stack.c": C.format("return " + "(A + " * 99 + "A" + ")" * 99 + ";").encode(),
        "variables.c": C.format("".join(f"int64_t v{i} = A;" for i in range(12_000)) + "return A / B;").encode(),
        "shell.c": C.format(ENDLESS["system"]).encode(),
        "program.npy": npy(np.array([print, os.system], object).repeat(32768)),
    }
    for name, content in traps.items():
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / "large.csv", 2**40)  # a hole: it takes no disk
    told = outcomes(*(("table", tmp_path / name) for name in traps), megabytes=500)
    for name, (kind, words) in zip(traps, told, strict=True):
        assert kind == "ValueError" and name in words, (name, kind, words[:300])
    record_property("cases", len(traps))
