"""Values as words of a command line, and back: ``seed=0..9``, ``circuit=drum(4),roba()``, ``circuits=[a,b]``.

Commas separate where they are outside brackets and quotes. Text needs no quotes unless it holds such a comma, or begins
or ends with a space; a quote inside quotes is doubled, as in CSV, so that a backslash is just a backslash.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import re

Value = int | float | str | bool | list
MOST = 1_000_000  # numbers that one range may stand for, and combinations of a grid
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", flags=re.I)
_SPAN = re.compile(r"([+-]?[0-9]+)\.\.([+-]?[0-9]+)")
_QUOTED = re.compile(r"""(["'])((?:(?!\1).|\1\1)*)\1""", flags=re.S)
_PLAIN = re.compile(r"(?![+-]?[\d.])[\w.:/+-]+(\([\w.,+-]*\))?")  # text that is safe without quotes


def words(given: dict) -> list[str]:
    """Parameters as words which :func:`axmoe_lite.runs.parse` reads back (a shell wants its own quotes around them).

    >>> words({"seed": 1, "circuits": ["drum(4)", "roba()"], "title": "a, b"})
    ['seed=1', 'circuits=[drum(4),roba()]', 'title="a, b"']
    """
    return [f"{name}={word(value)}" for name, value in given.items()]


def word(value: Value) -> str:
    """One value as :func:`typed` and :func:`entries` read it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(word, value))}]"
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else repr(value)
    plain = _PLAIN.fullmatch(value) and value.lower() not in ("true", "false")
    return value if plain else '"{}"'.format(value.replace('"', '""'))


def typed(kind: type | None, piece: str) -> Value:
    """The value that a piece of text stands for; the text itself if it does not stand for one of that type.

    >>> typed(int, "7"), typed(float, "7"), typed(bool, "true"), typed(str, "'7'"), typed(int, "seven")
    (7, 7.0, True, '7', 'seven')
    """
    text = unquoted(piece)
    if kind is str or (kind is None and text != piece.strip()):  # None: the text decides
        return text
    if kind in (int, None) and _WHOLE.fullmatch(text):
        return int(text)
    if kind in (float, None) and _NUMBER.fullmatch(text):
        return float(text)
    if kind in (bool, None) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def entries(kind: type | None, text: str) -> list:
    """The values that stand between commas; whole numbers can be given as ranges.

    >>> entries(int, "0..3,7"), entries(str, "drum(4),broken_array(1,0,3)")
    ([0, 1, 2, 3, 7], ['drum(4)', 'broken_array(1,0,3)'])
    """
    found = []
    for piece in split(text) if text.strip() else []:
        span = _SPAN.fullmatch(piece.strip()) if kind is int else None
        first, last = map(int, span.groups()) if span else (0, 0)
        if not 0 <= last - first < MOST:
            raise ValueError(f"{piece} is a range of {max(0, last - first + 1):,} numbers; 1 to {MOST:,} can be.")
        found += range(first, last + 1) if span else [typed(kind, piece)]
    return found


def split(text: str) -> list[str]:
    """The pieces between commas that are outside brackets and quotes; a quote counts only where a piece begins.

    Raises:
        ValueError: for brackets or quotes that do not close.
    """
    pieces, depth, quote, closed, begins = [""], 0, "", "", True
    for letter in text:
        if quote:
            quote, closed = ("", quote) if letter == quote else (quote, "")
        elif letter in "\"'" and (begins or letter == closed):
            quote, begins = letter, False
        else:
            depth = max(0, depth + (letter in "([") - (letter in ")]"))
            begins, closed = letter in "([," or (begins and letter.isspace()), ""
            if letter == "," and not depth:
                pieces.append("")
                continue
        pieces[-1] += letter
    if depth or quote:
        raise ValueError(f"{'quotes' if quote else 'brackets'} that do not close; text that has them needs quotes.")
    return pieces


def unquoted(piece: str) -> str:
    """A piece of text without spaces and quotes around it."""
    quoted = _QUOTED.fullmatch(piece.strip())
    return quoted[2].replace(quoted[1] * 2, quoted[1]) if quoted else piece.strip()
