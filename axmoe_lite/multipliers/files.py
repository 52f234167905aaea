"""Your own multiplier from a file: a table of products, or a circuit in C.

    read_table("mine.npy")                  256 x 256 integers, or 65,536 in a row
    read_table("mine.csv")                  256 lines of 256 numbers, or lines of a, b, product
    read_table("mine.bin")                  raw integers of 16 or 32 bits, lowest byte first
    read_table("mine.h")                    const int16_t lut[256][256] = {{...}}, as AdaPT and TransAxx have it
    read_table("mine.c")                    a circuit as EvoApproxLib writes it, see :mod:`.circuit_c`
    multiplier("file:mine.npy")             the same by name: in assignments, CSV cells, on a command line
    multiplier("file:mine.npy@power_mw=0.3@operands=twos_complement_index@trust=yes")

Which operand value a row stands for is in no file, and a wrong guess is silent, so it is checked: a table that lies
nearer to a b under another reading than under the one asked for is refused, and the error names the one that fits.
Which operand is the activation cannot be checked so, since a b = b a: where rows are weights say ``order="b,a"``, or by
name ``swap:file:...``.

Nothing in a file is executed, unpickled or compiled, and no more than :data:`MOST_BYTES` are read.

Chapter: 21, "What does my multiplier do?"
"""

import difflib
import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from axmoe_lite import paths
from axmoe_lite.multipliers import circuit_c
from axmoe_lite.multipliers.formats import read_bin, read_csv, read_header, read_npy
from axmoe_lite.multipliers.table import Multiplier

MOST_BYTES = 16 * 2**20

READERS = {".npy": read_npy, ".csv": read_csv, ".bin": read_bin, ".h": read_header, ".c": circuit_c.products}

_INDEX = np.arange(256)
READINGS = {
    "signed": _INDEX - 128,
    "twos_complement_index": np.where(_INDEX < 128, _INDEX, _INDEX - 256),
}
"""What the rows and columns of a table stand for: its index 0..255 as an operand."""

_LIKE = {
    "signed": "count from -128 to 127",
    "twos_complement_index": "count 0 to 127, then -128 to -1",
    "unsigned": "count from 0 to 255",
}
_ZERO = 4096.0  # mean |a b| over all pairs: the error of a multiplier that always answers 0


def read_table(
    path: Path | str,
    *,
    name: str | None = None,
    order: str = "a,b",
    operands: str | None = None,
    power_mw: float | None = None,
    area_um2: float | None = None,
    delay_ns: float | None = None,
    trust: bool = False,
) -> Multiplier:
    """A multiplier from a file; what it is told by its ending.

    Args:
        path: ``.npy``, ``.csv``, ``.bin``, ``.h`` or ``.c``, at most 16 MB; products are whole numbers of 32 bits.
        name: what assignments call it; None: the name under which :func:`~axmoe_lite.multiplier` reads it again.
        order: ``"a,b"``: rows (of a circuit: its first parameter) are activations; ``"b,a"``: they are weights.
        operands: what rows and columns stand for: ``"signed"`` (-128..127) or ``"twos_complement_index"`` (0..127, then
            -128..-1). None: the second for a ``.h``, what its operands say for a CSV of a, b, product, else the first.
            A circuit is asked with operands, so it has no such choice.
        power_mw, area_um2, delay_ns: None if unknown; of a circuit, what EvoApproxLib's comments in it say. Without a
            power everything works but prices, which say so.
        trust: take the table though it errs more than a multiplier that always answers 0, or looks misread.

    Raises:
        FileNotFoundError: if there is no such file; names one that is called nearly so.
        ValueError: for a file or an option that cannot be; names the file, and what to do.
    """
    path, options = Path(path), {"order": order, "operands": operands, "trust": trust}
    _check_options(str(path), order, operands, power_mw=power_mw, area_um2=area_um2, delay_ns=delay_ns)
    content = _content(path)
    prices = {"power_mw": power_mw, "area_um2": area_um2, "delay_ns": delay_ns}
    found = read_bytes(content, filename=str(path), **options, **prices)
    if name is None:
        written = f"file:{path}" + (f"@power_mw={power_mw:.12g}" if power_mw is not None else "")
        written += (f"@operands={operands}" if operands else "") + ("@trust=yes" if trust else "")
        name = f"swap:{written}" if order == "b,a" else written
    return replace(found, name=name)


def read_bytes(
    content: bytes,
    *,
    filename: str,
    name: str | None = None,
    order: str = "a,b",
    operands: str | None = None,
    power_mw: float | None = None,
    area_um2: float | None = None,
    delay_ns: float | None = None,
    trust: bool = False,
) -> Multiplier:
    """A multiplier from what a file holds, such as an upload; see :func:`read_table`.

    Args:
        content: all of its bytes.
        filename: its name: the ending says how it is read, and errors name it. None of that name need exist.
        name: None: the file's name without folders and ending.

    Raises:
        ValueError: see :func:`read_table`.

    >>> import numpy as np
    >>> rows = np.arange(-128, 128)
    >>> table = np.outer(rows & ~1, rows)  # the lowest bit of the activation is not looked at
    >>> m = read_bytes(table.astype("<i2").tobytes(), filename="mine.bin")
    >>> m, m(7, 7)
    (Multiplier('mine', unknown power, file mine.bin, rows count from -128 to 127, digest dbf53da466c3), 42)
    >>> read_bytes(np.roll(table, 128, (0, 1)).astype("<i2").tobytes(), filename="mine.bin")
    Traceback (most recent call last):
        ...
    ValueError: mine.bin: read so that its rows and columns count from -128 to 127, its products are off ...
    """
    prices = {"power_mw": power_mw, "area_um2": area_um2, "delay_ns": delay_ns}
    _check_options(filename, order, operands, **prices)
    short, ending = Path(filename).name, Path(filename).suffix.lower()
    try:
        raw, reading, told = _read(content, ending, operands)
        if abs(raw).max() >= 2**31:
            raise ValueError(f"it has products beyond 32 bits, up to {abs(raw).max()}.")
        if not trust:
            _check_reading(raw, reading, option=ending != ".c")
    except ValueError as problem:
        raise ValueError(f"{filename}: {problem}") from None
    table = raw if reading == "signed" else np.roll(raw, 128, (0, 1))
    table = table.T if order == "b,a" else table
    found = Multiplier(name or Path(filename).stem, np.ascontiguousarray(table), source="file")
    how = "called with signed operands" if ending == ".c" else f"rows {_LIKE[reading]}"
    how += " and are weights" if order == "b,a" else ""
    source = f"file {short}, {how}, digest {found.digest}"
    return replace(found, source=source, **{key: told.get(key) if v is None else v for key, v in prices.items()})


def _check_options(filename: str, order: str, operands: str | None, **prices: float | None) -> None:
    ending = Path(filename).suffix.lower()
    if ending not in READERS:
        raise ValueError(
            f"{filename}: tables are read from {', '.join(READERS)} files, and {ending or 'no ending'!r} is none of"
            " these. numpy.save writes a .npy."
        )
    if order not in ("a,b", "b,a"):
        raise ValueError(f"{filename}: order is {order!r}; it is 'a,b' (rows are activations) or 'b,a' (weights).")
    if operands is not None and operands not in READINGS:
        near = difflib.get_close_matches(str(operands), READINGS, n=1, cutoff=0)[0]
        raise ValueError(
            f"{filename}: operands is {operands!r}; there are {', '.join(READINGS)}. Did you mean {near!r}?"
        )
    if operands is not None and ending == ".c":
        raise ValueError(
            f"{filename}: a circuit is asked with operands and has no rows; leave operands={operands!r} out."
        )
    for key, value in prices.items():
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if value is not None and not good:
            raise ValueError(f"{filename}: {key} is {value!r}; it is a positive number, or None if unknown.")


def _content(path: Path) -> bytes:
    """The file's bytes; no pipe or device is waited for, and no more is read than may be."""
    try:
        if not path.exists():
            raise FileNotFoundError(_missing(path))
        if not path.is_file():
            raise ValueError(f"{path} is a folder or a device; a table or a circuit is read from a plain file.")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise ValueError(f"{path} cannot be read: {problem.strerror}.") from None
    if len(content) > MOST_BYTES:
        raise ValueError(
            f"{path} has more than {MOST_BYTES // 2**20} MB; a table of 65,536 products needs less than 1."
        )
    return content


def _missing(path: Path) -> str:
    there = [p.name for p in path.parent.glob("*") if p.suffix.lower() in READERS] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no file {path} (in {Path.cwd()}).{hint} Give a path from there, or a whole one."


def _read(content: bytes, ending: str, operands: str | None) -> tuple[np.ndarray, str, dict]:
    """Products int64 [256, 256] as the file orders them, how its rows are to be read, and its prices if it has any."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 2**20} MB; a table of 65,536 products needs less than 1.")
    if not content:
        raise ValueError("it is empty.")
    if ending == ".npy":
        return read_npy(content), operands or "signed", {}
    if ending == ".bin":
        return read_bin(content), operands or "signed", {}
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ValueError(f"it is no text: byte {problem.start} is none of UTF-8. Is it what its ending says?") from None
    if ending == ".h":
        return read_header(text), operands or "twos_complement_index", {}
    if ending == ".c":
        return circuit_c.products(text), "signed", _prices(text)
    raw, said = read_csv(text)
    if operands and said and operands != said:
        raise ValueError(f"its operands {_LIKE[said]}; leave operands={operands!r} out.")
    return raw, said or operands or "signed", {}


def _prices(text: str) -> dict[str, float]:
    """What EvoApproxLib's comments in a circuit say of it."""
    found = {}
    for key, pattern in (
        ("power_mw", r"PWR = (\S{1,20}) mW"),
        ("area_um2", r"AREA = (\S{1,20}) um2"),
        ("delay_ns", r"DELAY = (\S{1,20}) ns"),
    ):
        said = re.search(r"// {0,9}PDK45_" + pattern, text)
        if said and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", said[1]) and float(said[1]) > 0:
            found[key] = float(said[1])
    return found


def _check_reading(raw: np.ndarray, reading: str, *, option: bool) -> None:
    """Refuse products that make more sense under another reading, or none under any."""
    if option:
        rows = {**READINGS, "unsigned": _INDEX}
    else:  # a circuit: its operands are bits, read with a sign or without
        rows = {"signed": READINGS["signed"], "unsigned": READINGS["signed"] & 255}

    def off(products: np.ndarray, a: str, b: str) -> float:
        if a == b == "unsigned":  # of 16 bits, which may have been kept as signed ones
            products = np.where(products < 0, products + 2**16, products)
        return float(np.abs(products - rows[a][:, None] * rows[b][None, :]).mean())

    asked = off(raw, reading, reading)
    others = {(a, b): off(raw, a, b) for a in rows for b in rows if (a, b) != (reading, reading)}
    (a, b), least = min(others.items(), key=lambda item: item[1])
    said = (
        f"read so that its rows and columns {_LIKE[reading]}, its products are off by {asked:,.0f} on average"
        if option
        else f"called with operands of -128 to 127, it is off by {asked:,.0f} on average"
    )
    wrapped = (raw + 2**15) % 2**16 - 2**15
    if (folded := off(wrapped, reading, reading)) < 0.9 * min(asked, least):
        raise ValueError(
            f"{said}, but by {folded:,.0f} if they are 16 bits of a signed number: -1 is written as 65535. Save them as"
            " signed integers (numpy: table.astype('int16'); C: return an int16_t)."
        )
    if least < 0.9 * min(asked, _ZERO):
        if a == b == "unsigned":
            do = (
                "It is an unsigned multiplier, and layers here multiply signed bytes. Make a table of what your"
                " hardware does with signs, such as sign(a) sign(b) U[|a|, |b|], and read that."
            )
        elif a == b:
            do = f"Ask for operands={a!r} (in a name: @operands={a})."
        else:
            do = "Layers here multiply two signed bytes, and rows and columns are counted alike: reorder one of them."
        how = f"they {_LIKE[a]}" if a == b else f"its rows {_LIKE[a]} and its columns {_LIKE[b]}"
        raise ValueError(
            f"{said}, but by {least:,.0f} if {how}. {do} (trust=True, in a name @trust=yes, takes it as it is.)"
        )
    if asked > _ZERO:
        raise ValueError(
            f"{said}, more than those of a multiplier that always answers 0 ({_ZERO:,.0f}). If that is what you mean,"
            " say trust=True (in a name: @trust=yes); else look at the order of its entries."
        )


# ------------------------------------------------------------------ names

OPTIONS = ("power_mw", "operands", "trust", "digest")
_SAID = re.compile(r"@(\w+)=([^@/]*)$")
_kept: dict[tuple[str, str], Multiplier] = {}  # by name and content, so that what is computed from it is kept too
MOST_KEPT = 64


def named(name: str) -> Multiplier:
    """The multiplier that a name such as ``file:mine.npy@power_mw=0.3`` stands for; read anew if the file has changed.

    Raises:
        ValueError: for all that :func:`read_table` raises, an unknown option, or a digest that is not the table's.
    """
    path, said = _parts(name)
    options: dict = {"operands": said.get("operands"), "trust": "trust" in said}
    if "power_mw" in said:
        if not re.fullmatch(r"\d{1,12}(\.\d{1,20})?(e[+-]?\d{1,3})?", said["power_mw"]):
            raise ValueError(f"{name!r}: power_mw is {said['power_mw']!r}; it is a number of milliwatts such as 0.3.")
        options["power_mw"] = float(said["power_mw"])
    if said.get("trust", "yes") != "yes":
        raise ValueError(f"{name!r}: trust is {said['trust']!r}; write @trust=yes, or leave it out.")
    _check_options(path, "a,b", said.get("operands"), power_mw=options.get("power_mw"))
    try:
        content = _content(paths.expanded(path))
    except FileNotFoundError as missing:
        raise ValueError(str(missing)) from None
    key = (name, hashlib.sha256(content).hexdigest())
    if key not in _kept:
        found = read_bytes(content, filename=path, name=name, **options)
        while len(_kept) >= MOST_KEPT:
            _kept.pop(next(iter(_kept)))
        _kept[key] = found
    found = _kept[key]
    if said.get("digest", found.digest) != found.digest:
        raise ValueError(
            f"{path} has changed: the name {name!r} stands for the table of digest {said['digest']}, the file now holds"
            f" {found.digest}. Name it anew, or bring the old file back."
        )
    return found


def pinned(name: str) -> str:
    """A name under which the file is found from any folder, and only as long as it holds the same table.

    Args:
        name: any multiplier's name; those of files in it, also after ``swap:`` and inside a mosaic, become whole paths
            with the digest of their table. Other names are given back as they are.

    Raises:
        ValueError: see :func:`named`; and where the whole path has spaces or commas, which cannot stand in a mosaic.
    """
    for one in sorted(files_in(name), key=len, reverse=True):  # a name may begin with another
        path, said = _parts(one)
        whole = str(paths.expanded(path).absolute())
        if _MOSAIC.match(name) and re.search(r"[,\]\s]", whole):
            raise ValueError(f"{name!r} is a mosaic, and {whole} has spaces or commas; move the file elsewhere.")
        digest = "" if "digest" in said else f"@digest={named(one).digest}"
        name = re.sub(rf"{re.escape(one)}(?=[,\]]|$)", lambda _, to=one, w=whole, d=digest: _whole_name(to, w, d), name)
    return name


def _whole_name(one: str, whole: str, digest: str) -> str:
    return f"file:{whole}{one.removeprefix('file:').removeprefix(_parts(one)[0])}{digest}"


_MOSAIC = re.compile(r"[a-z+*\d]+\[")


def files_in(name: str) -> list[str]:
    """The names of files that a multiplier's name holds.

    >>> files_in("swap:file:a.npy"), files_in("filter[file:a.npy, 2 drum(4)]"), files_in("drum(4)")
    (['file:a.npy'], ['file:a.npy'], [])
    """
    if _MOSAIC.match(name):
        return list(dict.fromkeys(re.findall(r"file:[^,\]\s]+", name)))
    return [name[name.index("file:") :]] if re.match(r"(\w+:)*file:", name) else []


def _parts(name: str) -> tuple[str, dict[str, str]]:
    """The path in a name, and its options."""
    path, said = name.removeprefix("file:"), {}
    while (found := _SAID.search(path)) and found[1] in OPTIONS:
        said.setdefault(found[1], found[2])
        path = path[: found.start()]
    if found and Path(path[: found.start()]).suffix.lower() in READERS:
        near = difflib.get_close_matches(found[1], OPTIONS, n=1, cutoff=0)[0]
        raise ValueError(f"{name!r}: {found[1]!r} is no option; there are {', '.join(OPTIONS)}. Did you mean {near!r}?")
    if not path:
        raise ValueError(f"{name!r} names no file; write file: and its path, such as file:mine.npy.")
    return path, said
