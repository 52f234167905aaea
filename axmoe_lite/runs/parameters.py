"""What a chapter can be asked: its parameters, read from its own cell, and every request checked against them.

A parameter is a line of the cell tagged ``parameters``, and its comment says what it can be, in braces, and what it is:

    scale = "quick"  # {quick, paper} quick: digits, under a minute; paper: CIFAR-100, hours
    seed = 0  # {0..} of the weights
    circuits = ["mul8s_1KVA", "mul8s_1L2L"]  # {multiplier} to retrain under
    layer = "layer2.0.conv2"  # the layer to look at

Braces hold choices, a range with both ends included or without an upper one, or one of the words ``multiplier`` and
``file``; of a list they hold for each entry. The type is always that of the default.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import ast
import difflib
import io
import itertools
import json
import math
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from axmoe_lite.multipliers import multiplier, pinned
from axmoe_lite.runs.files import pinned_file
from axmoe_lite.runs.notebooks import chapters, find, load, no_book
from axmoe_lite.runs.words import MOST, Value, entries, split, typed, unquoted, word, words

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
WORDS = {
    "multiplier": "the name of a multiplier such as 'mul8s_1L2J' or 'drum(4)'",
    "file": "the path of a file, or nothing",
}
_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})?")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook.

    Args:
        name: as the cell assigns it.
        default: a number, text, true or false, or a list of such.
        allowed: what stands in the comment's braces, ``""`` if there are none.
        about: the rest of the comment.

    >>> Parameter("experts", 4, "1..64").check(8)
    8
    >>> Parameter("experts", 4, "1..64").check(65)
    Traceback (most recent call last):
        ...
    ValueError: experts is 65; it must be within 1..64.
    """

    name: str
    default: Value
    allowed: str = ""
    about: str = ""

    @property
    def kind(self) -> type | None:
        """The type of a value, or of a list's entries; None for a list that is empty by default."""
        if not isinstance(self.default, list):
            return type(self.default)
        kinds = {type(entry) for entry in self.default}
        return float if kinds == {int, float} else type(self.default[0]) if self.default else None

    def check(self, value: Value) -> Value:
        """The value in the parameter's own type, if it can be that.

        A file, and a multiplier from one (``file:mine.npy``), gets its whole path and a digest, so that a run in
        another folder finds it, and a changed file is another run.

        Raises:
            ValueError: for another type, or a value that the braces do not allow; names the nearest that they do.
        """
        if not isinstance(self.default, list):
            return self._one(value)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{self.name} is {value!r}; it needs a list, as in {words({self.name: self.default})[0]}.")
        return [self._one(entry) for entry in value]

    def __str__(self) -> str:
        return f"{self.name} {{{self.allowed}}}" if self.allowed else self.name

    def _one(self, value: Value) -> Value:
        value, given = value.item() if isinstance(value, np.generic) else value, value
        if self.kind is float and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if (
            type(value) not in ((self.kind,) if self.kind else KINDS)
            or value != value
            or value in (math.inf, -math.inf)
        ):
            limits, needed = self._limits(), KINDS.get(self.kind, "a number, text, true or false")
            raise ValueError(f"{self.name} is {given!r}; it needs {needed}{limits and ', '}{limits}.")
        if type(value) is int and not -(2**63) <= value < 2**63:  # which torch's generators, for one, do not take
            raise ValueError(f"{self.name} is a number of {value.bit_length()} bits; 63 at most are taken.")
        if self.allowed in WORDS:
            try:
                value = pinned_file(value) if self.allowed == "file" else pinned(value)
                if self.allowed == "multiplier":
                    multiplier(value)
            except ValueError as unknown:
                raise ValueError(f"{self.name}: {unknown}") from None
        elif span := _RANGE.fullmatch(self.allowed):
            if not float(span[1]) <= value <= float(span[2] or "inf"):
                raise ValueError(f"{self.name} is {given!r}; it must be {self._limits()}.")
        elif self.allowed and value not in self._choices():
            texts = [str(choice) for choice in self._choices()]
            near = _nearest(str(value), texts)
            raise ValueError(f"{self.name} is {given!r}; it must be {self._limits()}.{near}")
        return value

    def _choices(self) -> list:
        return [typed(self.kind, text) for text in split(self.allowed)]

    def _limits(self) -> str:
        """What the braces say, in words."""
        if not self.allowed:
            return ""
        if self.allowed in WORDS:
            return WORDS[self.allowed]
        if span := _RANGE.fullmatch(self.allowed):
            return f"within {self.allowed}" if span[2] else f"{span[1]} or more"
        *others, last = map(repr, self._choices())
        return f"{', '.join(others)} or {last}" if others else last

    def _check_notation(self) -> None:
        """The default and the braces must make sense, or the notebook's author made a mistake."""
        entries = self.default if isinstance(self.default, list) else [self.default]
        if not all(type(entry) in KINDS for entry in entries):
            raise ValueError(f"{self.name} is {self.default!r}; a default is a number, text, True, False or a list.")
        if self.allowed in WORDS:
            fits = self.kind in (str, None)
        elif _RANGE.fullmatch(self.allowed):
            fits = self.kind in (int, float)
        else:
            fits = not self.allowed or all(type(choice) is self.kind for choice in self._choices())
        if not fits:
            raise ValueError(
                f"{self.name}: {{{self.allowed}}} does not fit {self.default!r}; braces hold choices {{a, b}} of the"
                " default's type, a range {0..9} or {0..} of numbers, or the word {multiplier} or {file}."
            )
        self.check(self.default)


def parameters(notebook: str | Path | dict) -> dict[str, Parameter]:
    """The parameters of a notebook, by name, in their order; none if no cell is tagged. Nothing is executed.

    Args:
        notebook: a chapter or file, as :func:`find` knows it, or a notebook's content.

    Raises:
        ValueError: for a file that is no notebook, two tagged cells, or a cell that holds anything but
            ``name = literal  # {allowed} about``; says which line.

    >>> parameters("networks")["epochs"].allowed
    '0..'
    """
    content, name = (notebook, "the notebook") if isinstance(notebook, dict) else (load(find(notebook)), str(notebook))
    tagged = [cell for cell in content["cells"] if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) > 1:
        raise ValueError(f"In {name}, {len(tagged)} cells are tagged 'parameters'; tag the one that papermill reads.")
    try:
        return _of_cell("".join(tagged[0]["source"])) if tagged else {}
    except ValueError as problem:
        raise ValueError(f"The parameters cell of {name}: {problem}") from None


def _of_cell(source: str) -> dict[str, Parameter]:
    found, tokens = {}, tokenize.generate_tokens(io.StringIO(source).readline)
    assigned = _assignments(source)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    for name, default, first, last in assigned:
        if name in found:
            raise ValueError(f"line {first} assigns {name} a second time; one of the two is never seen.")
        comment = comments.get(last) or comments.get(first, "")
        braces = re.match(r"#*\s*(?:\{([^{}]*)\})?\s*(.*)", comment)
        found[name] = Parameter(name, default, (braces[1] or "").strip(), braces[2].strip())
        found[name]._check_notation()
    return found


def _assignments(source: str) -> list[tuple[str, Value, int, int]]:
    """Name, value, first and last line of each assignment of a cell that holds nothing else."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as problem:
        raise ValueError(f"line {problem.lineno} is not Python ({problem.msg}).") from None
    except (RecursionError, MemoryError):
        raise ValueError(
            "it is nested too deep to be read; a value is a number, text, True, False or a list."
        ) from None
    found = []
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        plain = isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None
        if not plain or len(targets) > 1 or not isinstance(targets[0], ast.Name):
            raise ValueError(f"line {statement.lineno} is not of the form name = value  # comment.")
        try:
            value = _literal(statement.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise ValueError(
                f"line {statement.lineno} computes {targets[0].id} ({ast.unparse(statement.value)}); write the value"
                " itself, and compute in a later cell."
            ) from None
        found.append((targets[0].id, value, statement.lineno, statement.end_lineno))
    return found


def _literal(node: ast.expr) -> Value:
    written = re.fullmatch(r"float\('(nan|inf|-inf)'\)", ast.unparse(node))  # so papermill writes what is no number
    return float(written[1]) if written else ast.literal_eval(node)


def check(known: dict[str, Parameter], given: dict) -> dict:
    """All parameters of a run, given some.

    Args:
        known: from :func:`parameters`.
        given: values by name; the others keep their defaults.

    Returns:
        A value for each name in ``known``, in that order and of its own type.

    Raises:
        ValueError: for unknown names, wrong types and values that are not allowed, all in one message.

    >>> check({"seed": Parameter("seed", 0, "0.."), "lr": Parameter("lr", 0.1)}, {"lr": 1})
    {'seed': 0, 'lr': 1.0}
    """
    problems, complete = [], {}
    for name, parameter in known.items():
        try:
            complete[name] = parameter.check(given.get(name, parameter.default))
        except ValueError as problem:
            problems.append(str(problem))
    _refuse([_unknown(name, known) for name in given if name not in known] + problems, known)
    return complete


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"There is no parameter {name!r}.{_nearest(str(name), known)}"


def _nearest(asked: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(asked, list(names), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _refuse(problems: list[str], known: dict[str, Parameter]) -> None:
    if not problems:
        return
    several = len(problems) > 1
    told = "\n- ".join([f"{len(problems)} problems:", *problems]) if several else problems[0]
    if any(problem.startswith("There is no parameter") for problem in problems):
        names = f"There are {', '.join(map(str, known.values()))}." if known else "The notebook has none."
        told += f"\n{names}" if several else f" {names}"
    raise ValueError(told)


def parse(known: dict[str, Parameter], texts: list[str]) -> dict[str, list]:
    """Words of a command line as values: ``seed=0,1`` is two seeds, ``seed=0..9`` ten.

    Args:
        known: from :func:`parameters`.
        texts: each ``name=value`` or ``name=a,b,c``. Commas inside brackets or quotes do not separate; text needs no
            quotes unless it holds such a comma, or begins or ends with a space (a quote inside quotes is doubled).

    Returns:
        At least one value for each name given.

    Raises:
        ValueError: for all that :func:`check` refuses, a word without ``=``, and a name or value given twice.

    >>> known = {"seed": Parameter("seed", 0, "0.."), "circuit": Parameter("circuit", "mul8s_1L2J", "multiplier")}
    >>> parse(known, ["seed=0..2,7", "circuit=broken_array(1,0,3),drum(4)"])
    {'seed': [0, 1, 2, 7], 'circuit': ['broken_array(1,0,3)', 'drum(4)']}
    """
    values: dict[str, list] = {}
    problems = []
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            problems.append(f"{text!r} gives no value; write {name if name in known else 'name'}=value.")
        elif name not in known:
            problems.append(_unknown(name, known))
        elif name in values:
            problems.append(f"{name} is given twice; write its values behind one another, as in {name}=a,b.")
        else:
            values[name] = []
            try:
                values[name] = _several(known[name], value)
            except ValueError as problem:
                problems.append(str(problem))
    _refuse(problems, known)
    return values


def _several(parameter: Parameter, text: str) -> list:
    """The checked values that a text stands for, each once."""
    try:
        if isinstance(parameter.default, list):
            pieces = [p.strip() for p in split(text)]
            read = [entries(parameter.kind, p[1:-1]) if p[:1] + p[-1:] == "[]" else unquoted(p) for p in pieces]
        else:
            read = entries(parameter.kind, text) or [typed(parameter.kind, "")]
    except ValueError as problem:
        raise ValueError(f"{parameter.name}={text}: {problem}") from None
    values, wrong = {}, {}
    for value in read:
        try:
            checked = parameter.check(value)
        except ValueError as problem:
            wrong[str(problem)] = None
        else:
            if (key := json.dumps(checked)) in values:
                wrong[f"{parameter.name} is given {checked!r} twice; the same run would be made twice."] = None
            values[key] = checked
    if wrong:  # a range can be wrong a thousand times
        raise ValueError(" ".join([*list(wrong)[:3], f"And {len(wrong) - 3} more." if len(wrong) > 3 else ""]).strip())
    return list(values.values())


def grid(values: dict[str, list]) -> list[dict]:
    """All combinations of the values, the last name changing fastest.

    Raises:
        ValueError: for a name without values, or whose values are no list, and for more combinations than a million.

    >>> grid({"circuit": ["drum(4)", "roba()"], "seed": [0, 1]})[:3]
    [{'circuit': 'drum(4)', 'seed': 0}, {'circuit': 'drum(4)', 'seed': 1}, {'circuit': 'roba()', 'seed': 0}]
    """
    for name, several in values.items():
        if not isinstance(several, list) or not several:
            raise ValueError(f"The values of {name} are {several!r}; a grid needs a list of at least one.")
    if (n := math.prod(map(len, values.values()))) > MOST:  # before the memory is full of them
        each = ", ".join(f"{len(several):,} of {name}" for name, several in values.items())
        raise ValueError(f"The values ({each}) make {n:,} combinations; 1 to {MOST:,} can be: give fewer values.")
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def check_parameters() -> None:
    """Refuse what ``papermill notebook.ipynb out.ipynb -p name value`` got wrong: papermill itself lets typos pass.

    To be called in the first cell after the parameters. It compares the two cells that ran before it, the notebook's
    own parameters and those that papermill injected, and stays silent wherever it finds anything else.

    Raises:
        ValueError: see :func:`check`.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    history = shell.user_ns.get("In") if shell else None
    if not isinstance(history, list):
        return
    known, given = _told_by_papermill([str(cell) for cell in history if str(cell).strip()])
    try:
        check(known, {name: value for name, value in given.items() if not name.startswith("PAPERMILL_")})
    except ValueError as problem:
        wrong = [n for n, v in given.items() if n in known and isinstance(v, str) != isinstance(known[n].default, str)]
        told = str(problem)
        if wrong:
            told += f"\n(papermill -p guesses types; -r {wrong[0]} … gives text, -y '{wrong[0]}: [a, b]' a list.)"
        raise ValueError(told) from None


def _told_by_papermill(history: list[str]) -> tuple[dict[str, Parameter], dict]:
    """The parameters of a notebook and the values given, if these were its last two cells before this one."""
    *before, injected, _ = ["", "", "", *history]
    if injected.partition("\n")[0].strip() != "# Parameters":
        return {}, {}
    cells = {}
    for cell in before:
        try:
            cells[cell] = _of_cell(cell)
        except ValueError:  # computes something
            continue
    known = cells.get(before[-1], {})
    try:
        given = {name: value for name, value, _, _ in _assignments(injected)}
    except ValueError:
        return {}, {}
    # Of several cells that only assign, any may be the one, and a cell without comments may be somebody's try.
    sure = [c for c, found in cells.items() if found] == [before[-1]]
    sure = sure and (set(known) & set(given) or any(p.about or p.allowed for p in known.values()))
    return (known, given) if sure else ({}, {})


def listing(*, width: int = 110) -> str:
    """Every chapter with its question and its parameters, for reading in a terminal.

    Args:
        width: in characters, at least 60.

    Raises:
        ValueError: where there is no book.
    """
    if not chapters():
        raise ValueError(f"{no_book()} Work in a checkout of the repository.")
    blocks = [_block(path, width) for path in chapters()]
    blocks += ["{multiplier}: any name axmoe_lite.multiplier() knows: drum(4), file:mine.npy\n{file}: a path, or empty"]
    return "\n\n".join(blocks)


def _block(path: Path, width: int) -> str:
    content = load(path)
    known = parameters(content).values()
    first = "".join(next((cell["source"] for cell in content["cells"] if cell["cell_type"] == "markdown"), ""))
    title = next((line[2:] for line in first.splitlines() if line.startswith("# ")), path.stem)
    longest = max((len(p.name) for p in known), default=0)
    heads = {p.name: f"{p.name:{longest}} = {word(p.default)}" for p in known}
    left = max((len(head) for head in heads.values() if len(head) <= 32), default=0)
    lines = [f"{path.stem[:2]}  {title}"]
    for p in known:
        head, about = f"    {heads[p.name]:{left}}  ", f"{{{p.allowed}}}  {p.about}" if p.allowed else p.about
        if len(heads[p.name]) > left:
            lines, head = [*lines, head.rstrip()], " " * (left + 6)
        lines.append(textwrap.fill(about, max(width, 60), initial_indent=head, subsequent_indent=" " * (left + 6)))
    return "\n".join(lines)
