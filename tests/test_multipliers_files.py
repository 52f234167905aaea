"""Tables and circuits from files: each format gives the same table, and what is wrong is refused by the file's name."""

import os
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axmoe_lite.layers import approximate, assignment_of
from axmoe_lite.multipliers import broken_array, multiplier, pinned, read_bytes, read_table
from axmoe_lite.multipliers.circuit_c import products
from axmoe_lite.runs.parameters import Parameter, parse

CIRCUIT = broken_array(1, 0, 3)  # not commutative, so that exchanged operands show
TABLE = CIRCUIT.table.numpy()
ROLLED = np.roll(TABLE, 128, (0, 1))  # row 0 stands for 0, row 255 for -1
VALUES = np.arange(-128, 128)


def npy(table: np.ndarray) -> bytes:
    from io import BytesIO

    file = BytesIO()
    np.save(file, table)
    return file.getvalue()


def grid(table: np.ndarray, mark: str = ",") -> bytes:
    return "\n".join(mark.join(map(str, row)) for row in table.tolist()).encode()


def triples(table: np.ndarray, *, head: str = "", values: np.ndarray = VALUES) -> list[str]:
    lines = [f"{a},{b},{table[i, j]}" for i, a in enumerate(values) for j, b in enumerate(values)]
    return [head, *lines] if head else lines


def header(table: np.ndarray, kind: str = "int16_t") -> str:
    rows = ",\n".join("{" + ", ".join(map(str, row)) + "}" for row in table.tolist())
    return f"#include <stdint.h>\n/* {{made}} by hand */\nconst {kind} lut [256][256] = {{{rows}}};\n"


def straight_line(drops: tuple[int, int, int], kind: str = "uint8_t") -> str:
    """A broken array in C, bit by bit: rows of ANDs added by full adders, the last row subtracted by its complement."""
    drop_a, drop_b, drop_columns = drops
    body, total = [], {}
    for i in range(drop_a, 8):
        added = {}
        for j in range(max(drop_b, drop_columns - i), 8):
            added[i + j] = f"((A >> {i}) & 1) & ((B >> {j}) & 1)"
        if 7 + i in added:  # the weight of bit 7 of b is negative: it goes on to the left
            added |= {column: added[7 + i] for column in range(8 + i, 16)}
        body.append(f"carry = {int(i == 7)};")
        for column in range(16):
            x = total.get(column, "0")
            y = f"({added[column]})" if column in added else "0"
            y = f"(~{y} & 1)" if i == 7 else y
            body += [
                f"s_{i}_{column} = {x} ^ {y} ^ carry;",
                f"carry = ({x} & {y}) | (carry & ({x} ^ {y}));  // to the left",
            ]
            total[column] = f"s_{i}_{column}"
    names = ", ".join(re.findall(r"(s_\w+) =", " ".join(body)))
    result = "\n".join(f"  O |= ({name} & 1) << {column};" for column, name in total.items())
    lines = "\n".join(f"  {line}" for line in body)
    return (
        f"/*** made here\n***/\n// PDK45_PWR = 0.386 mW\n// PDK45_DELAY = 1.41 ns\n#include <stdint.h>\n\n"
        f"uint16_t mine({kind} A, {kind} B)\n{{\n  uint16_t O;\n"
        f"  uint8_t carry, {names};\n{lines}\n  O = 0;\n{result}\n"
        "  return O;\n}\n"
    )


FORMATS = {
    "a.npy": npy(TABLE),
    "flat.npy": npy(TABLE.reshape(-1).astype(">i4")),
    "fortran.npy": npy(np.asfortranarray(TABLE.astype(np.int16))),
    "floats.npy": npy(TABLE.astype(np.float64)),
    "grid.csv": grid(TABLE),
    "grid.CSV": grid(TABLE, " ").replace(b"\n", b"\r\n"),
    "pandas.csv": b"," + ",".join(map(str, range(256))).encode() + b"\n"
    + b"\n".join(f"{i},".encode() + line for i, line in enumerate(grid(TABLE).split(b"\n"))),
    "triples.csv": "\n".join(triples(TABLE, head="a;b;product".replace(";", ","))[::1]).encode(),
    "backwards.csv": "\n".join(triples(TABLE)[::-1]).encode(),
    "index.csv": "\n".join(triples(ROLLED, values=np.arange(256))).encode(),
    "short.bin": TABLE.astype("<i2").tobytes(),
    "long.bin": TABLE.astype("<i4").tobytes(),
    "nested.h": header(ROLLED).encode(),
    "flat.h": b"static int lut[65536] = {" + ",".join(map(str, ROLLED.reshape(-1))).encode() + b",};",
    "hexadecimal.h": re.sub(r"-\d+", lambda found: hex(int(found[0]) & 0xFFFF), header(ROLLED)).encode(),
    "bits.c": straight_line((1, 0, 3)).encode(),
    "signed.c": straight_line((1, 0, 3), "int8_t").encode(),
}  # fmt: skip


@pytest.mark.parametrize("filename", FORMATS)
def test_every_format_holds_the_same_table(filename):
    found = read_bytes(FORMATS[filename], filename=filename)
    assert torch.equal(found.table, CIRCUIT.table) and found.digest == CIRCUIT.digest
    assert found.source.startswith(f"file {filename}, ") and found.source.endswith(f"digest {CIRCUIT.digest}")
    swapped = read_bytes(FORMATS[filename], filename=filename, order="b,a")
    assert torch.equal(swapped.table, CIRCUIT.table.T) and "are weights" in swapped.source


def test_prices_are_those_given_or_those_in_the_comments_of_a_circuit():
    found = read_bytes(FORMATS["bits.c"], filename="bits.c")
    assert (found.power_mw, found.area_um2, found.delay_ns) == (0.386, None, 1.41)
    assert read_bytes(FORMATS["bits.c"], filename="bits.c", power_mw=0.2).power_mw == 0.2
    assert read_bytes(FORMATS["a.npy"], filename="a.npy").power_mw is None


# ---------------------------------------------------------------------------------- readings


@pytest.mark.parametrize(
    ("table", "options", "problem"),
    [
        (ROLLED, {}, r"-128 to 127, its products are off by [\d,]+ .* but by 33 if they count 0 to 127"),
        (TABLE, {"operands": "twos_complement_index"}, "Ask for operands='signed'"),
        (np.outer(np.arange(256), np.arange(256)), {}, "It is an unsigned multiplier"),
        (np.outer(np.arange(256), VALUES), {}, "its rows count from 0 to 255 and its columns count from -128 to 127"),
        (TABLE % 2**16, {}, "-1 is written as 65535"),
        (-TABLE, {}, r"always answers 0 \(4,096\)"),
    ],
)  # fmt: skip
def test_a_table_that_makes_more_sense_read_otherwise_is_refused(table, options, problem):
    content = npy(table)
    with pytest.raises(ValueError, match=problem) as refused:
        read_bytes(content, filename="theirs.npy", **options)
    assert str(refused.value).startswith("theirs.npy: ")
    read_bytes(content, filename="theirs.npy", trust=True, **options)


def test_the_cheapest_and_the_emptiest_multiplier_are_not_taken_for_misread():
    for table in (broken_array(6, 0, 0).table.numpy(), np.zeros((256, 256), np.int32)):
        assert torch.equal(read_bytes(npy(table), filename="rough.npy").table, torch.tensor(table))


def test_an_unsigned_circuit_is_known_by_its_products():
    with pytest.raises(ValueError, match="unsigned.c: called with operands .* It is an unsigned multiplier"):
        read_bytes(b"uint16_t f(uint8_t A, uint8_t B) { return A * B; }", filename="unsigned.c")


# ---------------------------------------------------------------------------------- what is refused


def lines_of(text: bytes, change) -> bytes:
    lines = text.decode().split("\n")
    return "\n".join(change(lines) or lines).encode()


C = "int16_t f(int8_t A, int8_t B) {{ {} }}"
WRONG = {
    "empty.npy": (b"", "it is empty"),
    "text.npy": (b"1,2,3\n" * 50, "does not begin as a .npy"),
    "cut.npy": (npy(TABLE)[:-1], "cut off"),
    "longer.npy": (npy(TABLE) + b"x", "followed by something else"),
    "shape.npy": (npy(TABLE[:255]), r"its shape is \[255, 256\]"),
    "huge.npy": (npy(TABLE).replace(b"(256, 256)", b"(9999, 99)"), r"\[9999, 99\]"),
    "pickle.npy": (npy(TABLE[:2, :2].astype(object)), "Python objects, which could run a program"),
    "bools.npy": (npy(TABLE > 0), "entries of type '.b1'"),
    "half.npy": (npy(TABLE + 0.5), "no whole number"),
    "nan.npy": (npy(np.where(TABLE == 0, np.nan, TABLE)), "it holds nan"),
    "wide.npy": (npy(np.where(TABLE == 0, 2**31, TABLE)), "beyond 32 bits, up to 2147483648"),
    "head.npy": (npy(TABLE).replace(b"'descr'", b"'descR'"), "head of this .npy file is damaged"),
    "size.bin": (TABLE.astype("<i2").tobytes()[:-2], "131,070 bytes"),
    "zip.csv": (b"PK\x03\x04\xff\xfe", "it is no text: byte 4"),
    "short.csv": (lines_of(grid(TABLE), lambda x: x.pop(7) and x), "it has 255 lines"),
    "ragged.csv": (lines_of(grid(TABLE), lambda x: x.__setitem__(4, x[4] + ",1")), "line 5 has another number"),
    "word.csv": (grid(TABLE).replace(b"-16256", b"n/a", 1), r"line \d+ has 'n/a' in place \d+"),
    "long.csv": (b"1" * 30_000, "line 1 has 30,000 characters"),
    "many.csv": (b"1,1,1\n" * 140_000, "140,000 lines"),
    "missing.csv": (lines_of(FORMATS["backwards.csv"], lambda x: x.pop(65235) and x), "b = -84 is missing, the first"),
    "twice.csv": ("\n".join([*triples(TABLE), "3,-5,7"]).encode(), "a = 3, b = -5 is there 2 times"),
    "outside.csv": ("\n".join([*triples(TABLE), "3,128,7"]).encode(), "'3,128,7'.*outside -128..127"),
    "weights.csv": ("\n".join(triples(TABLE, head="b,a,product")).encode(), "weights come first"),
    "dims.h": (header(ROLLED).replace("[256][256]", "[128][512]").encode(), r"its array is lut\[128\]\[512\]"),
    "row.h": (re.sub(r", -?\d+}", "}", header(ROLLED), count=1).encode(), "row 0 of its array has 255 numbers"),
    "rows.h": (re.sub(r"{[^{}]*},\n", "", header(ROLLED).replace("{made}", ""), count=1).encode(), "has 255 rows"),
    "sum.h": (header(ROLLED).replace("-16,", "-(16),", 1).encode(), r"line \d+ of its array has '\(16\),"),
    "octal.h": (header(ROLLED).replace(" 8,", " 010,", 1).encode(), "'010', which is no plain"),
    "open.h": (header(ROLLED)[:5000].encode(), "its end, without };"),
    "none.h": (b"#pragma once\n", "holds no array"),
    "loop.c": (C.format("int s = 0;\n  for (int i = 0; i < 8; i++) s += A;").encode(), r"line 2 \('for .*is beyond"),
    "call.c": (C.format("int16_t x; x = g(A); return x;").encode(), "'g' is not declared"),
    "unset.c": (C.format("int16_t x; return x;").encode(), "'x' has no value yet"),
    "divide.c": (C.format("return A / B;").encode(), "';' is needed where '/' stands"),
    "shift.c": (C.format("return A << 40;").encode(), "line 1 shifts a number of 32 bits by 40"),
    "float.c": (b"float f(float A, float B) { return A * B; }", "'float' has no certain size"),
    "deep.c": (C.format("return " + "(" * 5000 + "A" + ")" * 5000 + ";").encode(), "more than 100 parentheses"),
    "long.c": (C.format("return A" + " + A" * 60_000 + ";").encode(), "more than 40,000 operations"),
    "comments.c": (b"/* " * 500_000, "a function is needed"),
    "comments.h": (b"/* " * 500_000, "holds no array"),
    "words.h": (b"a" * 2_000_000, "holds no array"),
    "spaces.h": (b"a " + b" " * 2_000_000, "holds no array"),
    "spaces.c": (b"\n" * 1_000_000 + b" " * 1_000_000, "a function is needed"),
    "three.c": (b"int16_t f(int8_t A, int8_t B, int8_t C) { return A * B; }", "two parameters, not 3"),
    "two.c": (C.format("return A * B;").encode() + b"\nint g(int a) { return a; }", "line 2 .*something follows"),
    "define.c": (b"#define X 1\n" + C.format("return A * B;").encode(), "line 1 .*a function is needed"),
    "mine.pkl": (b"cos\nsystem\n(S'true'\ntR.", "'.pkl' is none of these"),
}  # fmt: skip


@pytest.mark.trust("input", "tables and circuits from broken files")
@pytest.mark.parametrize("filename", WRONG)
def test_what_is_damaged_is_refused_by_its_name(filename):
    content, problem = WRONG[filename]
    start = time.perf_counter()
    with pytest.raises(ValueError, match=problem) as refused:
        read_bytes(content, filename=filename)
    assert str(refused.value).startswith(f"{filename}: ") and time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"order": "w,x"}, "order is 'w,x'"),
        ({"operands": "twos_complement"}, "Did you mean 'twos_complement_index'"),
        ({"power_mw": -1}, "power_mw is -1"),
        ({"power_mw": float("nan")}, "power_mw is nan"),
        ({"delay_ns": "1"}, "delay_ns is '1'"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_file_is_looked_at(options, problem):
    with pytest.raises(ValueError, match=problem):
        read_table("nowhere/mine.npy", **options)


@pytest.mark.trust("input", "tables and circuits from broken files")
def test_what_is_no_plain_file_is_neither_read_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "mine.npy").write_bytes(npy(TABLE))
    with (tmp_path / "large.csv").open("wb") as file:
        file.truncate(2**34)  # a hole: no disk is used, and none of it may be read
    for name, problem in (("pipe.npy", "no.* plain|plain file"), ("folder.npy", "plain file"), ("large.csv", "16 MB")):
        with pytest.raises(ValueError, match=problem):
            read_table(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="Did you mean 'mine.npy'"):
        read_table(tmp_path / "mien.npy")


SMALL = {name: FORMATS[name] for name in ("a.npy", "short.bin", "nested.h", "bits.c")}


@pytest.mark.trust("input", "tables and circuits from broken files")
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(SMALL)), st.data())
def test_flipped_and_missing_bytes_end_in_a_table_or_a_clear_error(filename, data):
    content = bytearray(SMALL[filename])
    for _ in range(data.draw(st.integers(0, 3))):  # the head is hit as often as all the rest
        place = data.draw(st.integers(0, 300) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    try:
        found = read_bytes(bytes(content), filename=filename)
    except ValueError as refused:
        assert str(refused).startswith(f"{filename}: ") and "\n" not in str(refused)
    else:
        assert found.table.shape == (256, 256)


# ---------------------------------------------------------------------------------- C as C means it


@pytest.mark.parametrize(
    ("body", "law"),
    [
        ("return A + B * 2;", lambda a, b: a + b * 2),
        ("return A - B - 1;", lambda a, b: a - b - 1),
        ("return A | B ^ A & 7;", lambda a, b: a | (b ^ (a & 7))),
        ("return 1 << 3 + 1;", lambda a, b: 16 + 0 * a),
        ("return A >> 1;", lambda a, b: a >> 1),
        ("uint8_t x = A; return x >> 1;", lambda a, b: (a & 255) >> 1),
        ("uint8_t x = ~A; return x;", lambda a, b: ~a & 255),
        ("return (uint8_t)(A + B);", lambda a, b: (a + b) & 255),
        ("int8_t x = A + B; return x;", lambda a, b: ((a + b + 128) & 255) - 128),
        ("unsigned x = A; return x >> 28;", lambda a, b: (a >> 28) & 15),
        ("uint64_t x = A; return x >> 60;", lambda a, b: (a >> 60) & 15),
        ("int x = A; x *= B; x -= 1; x <<= 1; return -x;", lambda a, b: -2 * (a * b - 1)),
        ("A &= 0xF0; return A * (0b11 + 010);", lambda a, b: (((a & 240) + 128) % 256 - 128) * 11),
    ],
)
def test_a_circuit_means_what_a_compiler_would_make_of_it(body, law):
    a, b = np.meshgrid(VALUES, VALUES, indexing="ij")
    assert np.array_equal(products(f"int32_t f(int8_t A, int8_t B) {{ {body} }}"), law(a, b))


# ---------------------------------------------------------------------------------- by name


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.npy").write_bytes(npy(TABLE))
    return tmp_path / "mine.npy"


def test_a_name_stands_for_a_file_in_an_assignment_and_a_mosaic(mine):
    found = multiplier("file:mine.npy@power_mw=0.3")
    assert torch.equal(found.table, CIRCUIT.table) and found.power_mw == 0.3
    assert multiplier("file:mine.npy@power_mw=0.3") is found, "products and factors are kept by multiplier"
    assert torch.equal(multiplier("swap:file:mine.npy").table, CIRCUIT.table.T)
    assert read_table("mine.npy", order="b,a", power_mw=0.3).name == "swap:file:mine.npy@power_mw=0.3"
    assert torch.equal(multiplier(f"file:{mine}").table, CIRCUIT.table)
    mosaic = multiplier("filter[file:mine.npy, 3 mul8s_1L2L]")
    assert [m.name for m in mosaic.multipliers] == ["file:mine.npy", "mul8s_1L2L"]
    layer = approximate(
        torch.nn.Sequential(torch.nn.Linear(4, 2)), {"0": "file:mine.npy"}, calibration=torch.ones(3, 4)
    )
    assert assignment_of(layer) == {"0": "file:mine.npy"}


@pytest.mark.parametrize("power", [0.3 / 7, 5e-5, 1.234567890123e-4, 3e-12, 7, 123_456_789_012, 2.5e20])
def test_a_name_that_was_written_with_a_power_is_read_again(mine, power):
    name = read_table("mine.npy", power_mw=power).name
    assert multiplier(name).power_mw == pytest.approx(power, rel=1e-11) and multiplier(name).name == name


def test_a_file_that_changes_is_another_multiplier_at_once(mine):
    before, inside = multiplier("file:mine.npy"), multiplier("filter[file:mine.npy, drum(4)]")
    times = mine.stat()
    other = broken_array(0, 1, 3).table.numpy()
    mine.write_bytes(npy(other))
    os.utime(mine, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time tell nothing
    assert np.array_equal(multiplier("file:mine.npy").table, other) and before.digest == CIRCUIT.digest
    assert multiplier("filter[file:mine.npy, drum(4)]").digest != inside.digest


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file:mien.npy", "There is no file mien.npy .*Did you mean 'mine.npy'"),
        ("file:", "names no file"),
        ("file:mine.npy@powr_mw=1", "'powr_mw' is no option.*'power_mw'"),
        ("file:mine.npy@power_mw=much", "power_mw is 'much'"),
        ("file:mine.npy@power_mw=1e999", "power_mw is inf"),
        ("file:mine.npy@operands=sign", "operands is 'sign'"),
        ("file:mine.npy@trust=no", "write @trust=yes"),
        ("file:mine.npy@digest=0123456789ab", "has changed"),
        ("file:mine\0.npy", "a character of no file"),
        ("file:" + "a" * 5000 + ".npy", "cannot be read: File name too long"),
        ("swap:file:.", "'no ending' is none of these"),
        ("row[file:a b.npy, 2 drum(4)]", "is no count and name|no file|none of these"),
    ],
)
def test_a_wrong_name_is_refused_as_any_other(mine, name, problem):
    with pytest.raises(ValueError, match=problem):
        multiplier(name)


def test_a_run_is_named_after_the_whole_path_and_the_table(mine, monkeypatch):
    known = {"circuit": Parameter("circuit", "mul8s_1L2J", "multiplier")}
    (found,) = parse(known, ["circuit=file:mine.npy@power_mw=0.3"])["circuit"]
    assert found == f"file:{mine}@power_mw=0.3@digest={CIRCUIT.digest}"
    assert pinned(f"row[file:mine.npy, 2 swap:{found}]") == (
        f"row[file:{mine}@digest={CIRCUIT.digest}, 2 swap:{found}]"
    )
    monkeypatch.chdir("/")
    assert known["circuit"].check(found) == found and multiplier(found).power_mw == 0.3
    mine.write_bytes(npy(TABLE.T))
    with pytest.raises(ValueError, match="circuit: .*has changed"):
        known["circuit"].check(found)
