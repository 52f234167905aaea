"""The formats of tables, each from bytes or text to 65,536 integers: nothing is executed, and sizes are checked first.

Errors are plain sentences; :func:`~axmoe_lite.multipliers.files.read_bytes` puts the file's name before them.

Chapter: 21, "What does my multiplier do?"
"""

import re

import numpy as np

N = 256 * 256
LONGEST_LINE = 20_000

_NPY = re.compile(
    r"\s*\{\s*'descr'\s*:\s*(?P<descr>'[^']{1,9}'|\[.*\])\s*,\s*'fortran_order'\s*:\s*(?P<fortran>True|False)\s*,"
    r"\s*'shape'\s*:\s*\((?P<shape>[\d, ]{0,60})\)\s*,?\s*\}\s*"
)


# Lengths are bounded, so that no text of 16 MB can make a search quadratic.
_ARRAY = re.compile(r"\b(\w{1,60})\s{1,60}(\w{1,99})\s{0,60}((?:\[\s{0,60}\w{0,60}\s{0,60}\]\s{0,60}){1,4})=\s{0,60}\{")


def read_npy(content: bytes) -> np.ndarray:
    """An array as numpy.save writes it: int64 [256, 256]. Its head is read by a pattern, never evaluated.

    Raises:
        ValueError: for anything but 256 x 256 or 65,536 whole numbers, and for pickled objects.
    """
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        raise ValueError("it does not begin as a .npy file does. numpy.save writes one (.npz holds several).")
    wide = 2 if content[6] == 1 else 4
    start = 8 + wide + int.from_bytes(content[8 : 8 + wide], "little")
    head = _NPY.fullmatch(content[8 + wide : min(start, 8 + wide + 4096)].decode("latin-1"))
    if content[6] not in (1, 2, 3) or head is None:
        raise ValueError("the head of this .npy file is damaged; save it again.")
    descr = head["descr"].strip("'")
    kind = re.fullmatch(r"([<>|=]?)([iuf])([1248])", descr)
    if kind is None or (kind[2], kind[3]) == ("f", "1"):
        what = (
            "Python objects, which could run a program when read" if "O" in descr else f"entries of type {descr[:40]!r}"
        )
        raise ValueError(f"it holds {what}; products are whole numbers: table.astype('int32').")
    shape = [int(n) for n in head["shape"].replace(" ", "").split(",") if n]
    if shape not in ([256, 256], [N]):
        raise ValueError(f"its shape is {shape}; a signed 8-bit multiplier has [256, 256] products, or [65536].")
    wanted = start + N * int(kind[3])
    if len(content) != wanted:
        state = "cut off" if len(content) < wanted else "followed by something else"
        raise ValueError(f"it has {len(content):,} bytes where its head promises {wanted:,}: it is {state}.")
    values = np.frombuffer(content, np.dtype(descr), N, start)
    values = values.astype(np.float64) if kind[2] == "f" else values  # half precision knows no 2**53
    grid = values.reshape(256, 256, order="F" if head["fortran"] == "True" else "C")
    return _whole(grid)


def read_bin(content: bytes) -> np.ndarray:
    """Raw integers of 16 or 32 bits, which the size tells, lowest byte first, row by row: int64 [256, 256].

    Raises:
        ValueError: for any other size.
    """
    kinds = {2 * N: "<i2", 4 * N: "<i4"}
    if len(content) not in kinds:
        raise ValueError(
            f"it has {len(content):,} bytes; 256 x 256 integers have {2 * N:,} (16 bits each) or {4 * N:,} (32 bits)."
        )
    return np.frombuffer(content, kinds[len(content)]).astype(np.int64).reshape(256, 256)


def read_csv(text: str) -> tuple[np.ndarray, str]:
    """256 lines of 256 numbers, or 65,536 lines of a, b, product in any order: int64 [256, 256], and a reading.

    A first line of names, and in a grid a first column of names, are left out. Commas, semicolons, tabs or spaces
    separate.

    Returns:
        The products; and ``"signed"`` or ``"twos_complement_index"`` as the operands of triples say, ``""`` of a grid.

    Raises:
        ValueError: for lines of unequal length, what is no whole number, pairs that are missing or there twice; says
            which is the first.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.count("\n") > 2 * N:
        raise ValueError(
            f"it has {text.count(chr(10)):,} lines; 256 lines of 256 numbers or 65,536 of a, b, product do."
        )
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError("it has no lines.")
    number, longest = max(lines, key=lambda line: len(line[1]))
    if len(longest) > LONGEST_LINE:
        raise ValueError(
            f"line {number} has {len(longest):,} characters; 256 numbers need fewer than {LONGEST_LINE:,}."
        )
    last = lines[-1][1]
    mark = next((mark for mark in (",", ";", "\t") if mark in last), None)
    widths = last.count(mark) + 1 if mark else len(last.split())
    if widths not in (3, 256, 257):
        raise ValueError(f"its last line has {widths} entries; a line has 256 products, or a, b and product.")
    if widths == 3:
        return _triples(lines, mark)
    headed = len(lines) == 257
    if not headed and len(lines) != 256:
        raise ValueError(f"it has {len(lines):,} lines of {widths} numbers; 256 are needed, one for each activation.")
    rows = [_numbers(number, line, mark, widths)[widths - 256 :] for number, line in lines[headed:]]
    return _whole(np.array(rows)), ""


def _numbers(number: int, line: str, mark: str | None, width: int) -> list[float]:
    """The numbers of a line; the first of 257 is a name."""
    if (line.count(mark) + 1 if mark else len(line.split())) != width:
        raise ValueError(f"line {number} has another number of entries than the last line, which has {width}.")
    found = []
    for place, piece in enumerate(line.split(mark)):
        try:
            found.append(0.0 if (place == 0 and width == 257) else float(piece.replace("_", "x")))  # 1_0 is Python's
        except ValueError:
            raise ValueError(
                f"line {number} has {piece.strip()[:30]!r} in place {place + 1}, which is no number."
            ) from None
    return found


def _triples(lines: list[tuple[int, str]], mark: str | None) -> tuple[np.ndarray, str]:
    names = [piece.strip().strip("\"'").lower() for piece in lines[0][1].split(mark)]
    if len(names) == 3 and not any(re.fullmatch(r"[-+]?\d.*", piece) for piece in names):
        if (names[0], names[1]) in (("b", "a"), ("w", "x"), ("weight", "activation"), ("weights", "activations")):
            raise ValueError(
                f"its first line says {names[0]}, {names[1]}: weights come first. Exchange the columns; lines are a, b,"
                " product."
            )
        lines = lines[1:]
    if not lines:
        raise ValueError("it has no line after its names; lines are a, b, product.")
    values = np.array([_numbers(number, line, mark, 3) for number, line in lines])
    whole = _whole(values)
    low, high = int(whole[:, :2].min()), int(whole[:, :2].max())
    reading = "signed" if low < 0 or high < 128 else "twos_complement_index"
    first = {"signed": -128, "twos_complement_index": 0}[reading]
    beyond = ((whole[:, :2] < first) | (whole[:, :2] > first + 255)).any(1)
    if beyond.any():
        number, line = lines[int(beyond.argmax())]
        raise ValueError(f"line {number} ({line.strip()[:40]!r}) has an operand outside {first}..{first + 255}.")
    places = (whole[:, 0] - first) * 256 + whole[:, 1] - first
    counts = np.bincount(places, minlength=N)
    if (counts > 1).any():
        a, b = divmod(int((counts > 1).argmax()), 256)
        raise ValueError(
            f"the pair a = {a + first}, b = {b + first} is there {counts.max()} times; each is needed once."
        )
    if (counts == 0).any():
        a, b = divmod(int((counts == 0).argmax()), 256)
        raise ValueError(
            f"the pair a = {a + first}, b = {b + first} is missing, the first of {int((counts == 0).sum()):,}; all"
            " 65,536 are needed."
        )
    table = np.empty(N, np.int64)
    table[places] = whole[:, 2]
    return table.reshape(256, 256), reading


def read_header(text: str) -> np.ndarray:
    """The numbers of a C array ``int16_t name[256][256] = {{...}, ...};`` or ``name[65536]``: int64 [256, 256].

    Raises:
        ValueError: for another shape, rows that are too short (C would fill them with zeros), or anything in the array
            that is no plain number.
    """
    blank = re.sub(r"/\*.*?(?:\*/|\Z)|//[^\n]*", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.S)
    head = _ARRAY.search(blank)
    if head is None:
        raise ValueError("it holds no array such as const int16_t lut[256][256] = {{...}}.")
    kind, name, shape = head[1], head[2], re.sub(r"\s", "", head[3])
    if shape not in ("[256][256]", "[][256]", "[65536]", "[]"):
        raise ValueError(f"its array is {name}{shape}; a signed 8-bit multiplier has [256][256] products, or [65536].")
    end = blank.find(";", head.end())
    body = blank[head.end() - 1 : end if end >= 0 else len(blank)]
    line = blank.count("\n", 0, head.end()) + 1
    if body.count(",") > N + 256 or body.count("{") > 257:
        entries, braces = f"{body.count(',') + 1:,}", f"{body.count('{'):,}"
        raise ValueError(f"its array has {entries} entries in {braces} braces; {N:,} in at most 257 are needed.")
    wrong = re.search(r"[^\s\d{},+\-xXa-fA-FuUlL]", body)
    if end < 0 or wrong:
        at = wrong.start() if wrong else len(body)
        what = f"{body[at : at + 20].split()[0]!r}, which is no number" if wrong else "its end, without };"
        raise ValueError(f"line {line + body.count(chr(10), 0, at)} of its array has {what}. Only numbers are read.")
    rows = _rows(body, flat=shape in ("[65536]", "[]"))
    table = np.array([[_integer(piece) for piece in row] for row in rows], np.int64).reshape(256, 256)
    if kind in ("int16_t", "short"):  # as the compiler would: 0xFFFF is -1
        table = np.where((table >= 2**15) & (table < 2**16), table - 2**16, table)
    return table


def _rows(body: str, *, flat: bool) -> list[list[str]]:
    """The entries of an array row by row, as text."""
    inner = body.strip()[1:].rstrip()
    if not inner.endswith("}"):
        raise ValueError("the braces of its array do not close.")
    inner = inner[:-1]
    pieces = [inner] if flat and "{" not in inner else re.findall(r"\{([^{}]*)\}", inner)
    left = re.sub(r"[\s,]", "", re.sub(r"\{[^{}]*\}", "", inner)) if pieces != [inner] else ""
    if left:
        raise ValueError(f"its array has {left[:20]!r} outside the braces of its rows.")
    rows = [[entry.strip() for entry in piece.rstrip().removesuffix(",").split(",")] for piece in pieces]
    width, n = (N, 1) if pieces == [inner] else (256, 256)
    if len(rows) != n:
        raise ValueError(f"its array has {len(rows)} rows; 256 are needed.")
    for number, row in enumerate(rows):
        if len(row) != width:
            raise ValueError(f"row {number} of its array has {len(row):,} numbers; {width:,} are needed.")
    return rows


def _integer(text: str) -> int:
    found = re.fullmatch(r"([-+]?)\s*(0[xX][0-9a-fA-F]{1,8}|0|[1-9]\d{0,9})[uUlL]{0,3}", text)
    if not found:
        raise ValueError(f"its array has {text[:20]!r}, which is no plain whole number.")
    return int(found[2], 0) * (-1 if found[1] == "-" else 1)


def _whole(values: np.ndarray) -> np.ndarray:
    """int64, if all values are whole numbers of at most 53 bits."""
    if values.dtype.kind == "f":
        odd = ~np.isfinite(values) | (np.abs(np.nan_to_num(values)) >= 2.0**53)
        odd |= ~odd & (values != np.floor(np.where(odd, 0, values)))
    else:
        odd = (values >= 2**53) if values.dtype.kind == "u" else (values >= 2**53) | (values <= -(2**53))
    if odd.any():
        raise ValueError(f"it holds {values[odd].flat[0]}, which is no whole number of 32 bits; products are.")
    return values.astype(np.int64)
