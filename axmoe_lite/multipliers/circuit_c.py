"""A circuit written in C as its table of products, without a compiler: parsed, checked, and run on all operand pairs.

EvoApproxLib publishes its circuits as straight-line C: declarations, assignments, a final return.

    uint16_t mine(uint8_t A, uint8_t B) {
      uint8_t n1 = ((A >> 0) & 1) & ((B >> 0) & 1);
      return n1;
    }

The parser knows that and nothing else: one function of two integers; the operators & | ^ ~ << >> + - *, parentheses,
casts and constants. What it reads becomes a list of instructions for a stack, which numpy works off for many pairs at
once. Integers behave as in C on the usual machines: narrow ones are widened to int before each operation, values are
cut to a variable's type when they are stored, signed ones wrap around and shift with their sign.

Chapter: 21, "What does my multiplier do?"
"""

import re
from dataclasses import dataclass, field

import numpy as np

EXAMPLE = """\
#include <stdint.h>

/* Three of the eight rows of an array are merged by OR instead of being added: cheaper, and wrong
   wherever two of them have a bit in the same place. */
int16_t mine(int8_t A, int8_t B)
{
  int16_t r0, r1, r2, high;
  r0 = -(A & 1) & B;
  r1 = (-((A >> 1) & 1) & B) << 1;
  r2 = (-((A >> 2) & 1) & B) << 2;
  high = ((A >> 3) * B) << 3;
  return high + (r0 | r1 | r2);
}
"""
"""A circuit such as :func:`products` reads, for chapter 21 and for trying things out."""

MOST_TOKENS = 400_000
MOST_INSTRUCTIONS = 40_000  # ten times the longest 8-bit circuit of EvoApproxLib; about two seconds
DEEPEST = 100  # parentheses inside one another
PIECE = 4096  # operand pairs at a time: what a variable needs stays small

Kind = tuple[int, bool]  # bits, signed
INT: Kind = (32, True)
KINDS: dict[str, Kind] = {
    **{f"{sign}int{bits}_t": (bits, not sign) for bits in (8, 16, 32, 64) for sign in ("", "u")},
    "signed char": (8, True),
    "unsigned char": (8, False),
    "short": (16, True),
    "unsigned short": (16, False),
    "int": INT,
    "signed": INT,
    "signed int": INT,
    "unsigned": (32, False),
    "unsigned int": (32, False),
    "long long": (64, True),
    "unsigned long long": (64, False),
}
_WORDS = {word for kind in KINDS for word in kind.split()} | {"char", "long", "float", "double", "void", "_Bool"}
_QUALIFIERS = ("const", "static", "inline", "register", "extern")
_BINDING = {"|": 1, "^": 2, "&": 3, "<<": 4, ">>": 4, "+": 5, "-": 5, "*": 6}
_TOKEN = re.compile(r"[A-Za-z_]\w*|\d\w*|<<=|>>=|<<|>>|[-+*&|^]=|[-+*&|^~()={},;]|\S")
_CONSTANT = re.compile(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|0[0-7]*|[1-9]\d*)([uU]?[lL]{0,2}|[lL]{1,2}[uU])")
_NOISE = re.compile(r"/\*.*?(?:\*/|\Z)|//[^\n]*", flags=re.S)  # to the end if it has none: else quadratic
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(?:include|pragma)\b[^\n]*", flags=re.M)


def products(text: str) -> np.ndarray:
    """All products of a circuit: int64 [256, 256], row a + 128 for its first parameter, column b + 128 for its second.

    A signed parameter gets -128..127, an unsigned one the same eight bits as 0..255. Of an unsigned result the lowest
    16 bits count, as a signed number; a signed result is taken as it is.

    Args:
        text: the C source.

    Raises:
        ValueError: for all that is not straight-line C of this kind; says which line, and what it holds.

    >>> exact = products("int16_t f(int8_t a, int8_t b) { return a * b; }")
    >>> int(exact[128 - 7, 128 + 7])
    -49
    """
    circuit = _Parser(text).function()
    a, b = (operand.ravel() for operand in np.meshgrid(*[np.arange(-128, 128)] * 2, indexing="ij"))
    found = []
    for start in range(0, a.size, PIECE):
        some = slice(start, start + PIECE)
        found.append(np.broadcast_to(circuit.run(a[some], b[some]), a[some].shape))
    table = np.concatenate(found)
    return (table if circuit.kind[1] else _cut(table, (16, True))).reshape(256, 256)


def _cut(x: np.ndarray, kind: Kind) -> np.ndarray:
    """int64 values as that many bits hold them; 64 bits without a sign are kept as the signed ones of equal bits."""
    bits, signed = kind
    if bits == 64:
        return x
    low = x & ((1 << bits) - 1)
    return low - ((low >> (bits - 1)) << bits) if signed else low


@dataclass
class _Circuit:
    """A parsed function: its instructions, and what goes in and out."""

    kind: Kind
    inputs: tuple[tuple[str, Kind], ...]
    code: list[tuple] = field(default_factory=list)

    def run(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Its answers for these operands, int64."""
        values = {name: _cut(x, (8, kind[1])) for (name, kind), x in zip(self.inputs, (a, b), strict=True)}
        stack: list[np.ndarray] = []
        for what, detail, kind, line in self.code:
            if what == "constant":
                stack.append(np.array([detail]))
            elif what == "load":
                stack.append(values[detail])
            elif what == "store":
                values[detail] = _cut(stack.pop(), kind)
            elif what == "cut":
                stack.append(_cut(stack.pop(), kind))
            elif what == "~":
                stack.append(_cut(~stack.pop(), kind))
            elif what == "negate":
                stack.append(_cut(-stack.pop(), kind))
            else:
                right, left = stack.pop(), stack.pop()
                stack.append(_operate(what, left, right, kind, line))
        return stack.pop()


def _operate(what: str, left: np.ndarray, right: np.ndarray, kind: Kind, line: int) -> np.ndarray:
    """One binary operation on operands of its kind."""
    if what in ("<<", ">>"):
        if int(right.min()) < 0 or int(right.max()) >= kind[0]:
            wrong = int(right.min()) if int(right.min()) < 0 else int(right.max())
            raise ValueError(f"line {line} shifts a number of {kind[0]} bits by {wrong}, which C leaves undefined.")
        if what == "<<":
            return _cut(left << right, kind)
        return (
            (left.view(np.uint64) >> right.astype(np.uint64)).view(np.int64) if kind == (64, False) else left >> right
        )
    if kind == (32, False):  # what was negative is large now
        left, right = _cut(left, kind), _cut(right, kind)
    if what == "&":
        return left & right
    if what == "|":
        return left | right
    if what == "^":
        return left ^ right
    return _cut(left + right if what == "+" else left - right if what == "-" else left * right, kind)


class _Parser:
    """From text to :class:`_Circuit`, one token ahead."""

    def __init__(self, text: str) -> None:
        blank = _NOISE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
        blank = _DIRECTIVE.sub("", blank)
        self.lines = text.split("\n")
        self.tokens: list[tuple[str, int]] = []
        for number, line in enumerate(blank.split("\n"), 1):
            for token in _TOKEN.finditer(line):
                self.tokens.append((token[0], number))
                if len(self.tokens) > MOST_TOKENS:
                    raise ValueError(f"it has more than {MOST_TOKENS:,} words and signs; an 8-bit circuit has fewer.")
        self.at = self.depth = 0
        self.variables: dict[str, Kind] = {}
        self.known: set[str] = set()  # variables that have a value

    # ------------------------------------------------------------------ tokens

    @property
    def next(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    @property
    def line(self) -> int:
        return self.tokens[min(self.at, len(self.tokens) - 1)][1] if self.tokens else 1

    def take(self, wanted: str = "") -> str:
        token = self.next
        if wanted and token != wanted:
            self.refuse(f"{wanted!r} is needed where {token or 'the end of the file'!r} stands")
        self.at += 1
        return token

    def name(self) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*", self.next) or self.next in _WORDS | {"return", *_QUALIFIERS}:
            self.refuse(f"a name is needed where {self.next or 'the end of the file'!r} stands")
        return self.take()

    def refuse(self, why: str) -> None:
        shown = self.lines[self.line - 1].strip()[:80] if self.lines else ""
        raise ValueError(
            f"line {self.line} ({shown!r}): {why}. Only straight-line circuits are read, as EvoApproxLib writes them:"
            " one function of two integers, assignments with & | ^ ~ << >> + - *, a final return. Nothing is compiled;"
            " for any other program write its table to a .npy file."
        )

    def kind(self) -> Kind | None:
        """A type, if one stands here."""
        start = self.at
        while self.next in _QUALIFIERS:
            self.take()
        words = []
        while self.next in _WORDS:
            words.append(self.take())
            while self.next == "const":
                self.take()
        if not words:
            self.at = start
            return None
        for written in (" ".join(words), " ".join(words).removesuffix(" int")):
            if written in KINDS:
                return KINDS[written]
        self.at = start
        self.refuse(f"{' '.join(words)!r} has no certain size or is no integer; write int8_t, uint8_t, int16_t")

    # ------------------------------------------------------------------ the function

    def function(self) -> _Circuit:
        kind = self.kind() if self.tokens else None
        if kind is None:
            self.refuse("a function is needed, such as int16_t f(int8_t A, int8_t B) { ... }")
        self.name()
        self.take("(")
        inputs = []
        while True:
            one = self.kind()
            if one is None:
                self.refuse("each parameter needs its type")
            inputs.append((self.name(), one))
            if self.next != ",":
                break
            self.take()
        self.take(")")
        if len(dict(inputs)) != 2 or len(inputs) != 2:
            self.refuse(f"a multiplier has two parameters, not {len(inputs)}")
        self.variables, self.known = dict(inputs), set(dict(inputs))
        self.circuit = _Circuit(kind, tuple(inputs))
        self.take("{")
        while self.next != "return":
            self.statement()
        self.take()
        self.expression(0)
        self.emit("cut", None, kind)
        self.take(";")
        self.take("}")
        while self.next == ";":
            self.take()
        if self.next:
            self.refuse("something follows the function")
        return self.circuit

    def statement(self) -> None:
        if self.next == ";":
            self.take()
            return
        kind = self.kind()
        if kind is None:
            self.assignment()
        else:
            self.declaration(kind)
        self.take(";")

    def declaration(self, kind: Kind) -> None:
        while True:
            name = self.name()
            if name in self.variables:
                self.refuse(f"{name!r} is declared twice")
            self.variables[name] = kind
            if self.next == "=":
                self.take()
                self.expression(0)
                self.store(name)
            if self.next != ",":
                return
            self.take()

    def assignment(self) -> None:
        if self.next in ("if", "for", "while", "do", "switch", "goto", "break", "struct", "union", "typedef", "else"):
            self.refuse(f"{self.next!r} is beyond what is read")
        name = self.name()
        if name not in self.variables:
            self.refuse(f"{name!r} is not declared" if self.next != "(" else f"{name!r} is a call")
        operator = self.take()
        if operator == "=":
            self.expression(0)
        elif operator.endswith("=") and operator[:-1] in _BINDING:
            left = self.load(name)
            self.binary(operator[:-1], left, self.expression(0))
        else:
            self.at -= 1
            self.refuse(f"an assignment is needed where {operator!r} stands")
        self.store(name)

    # ------------------------------------------------------------------ expressions, each leaving one value

    def expression(self, binding: int) -> Kind:
        """All that binds tighter than ``binding``; returns its type."""
        self.depth += 1
        if self.depth > DEEPEST:
            self.refuse(f"more than {DEEPEST} parentheses or signs stand inside one another")
        left = self.unary()
        while _BINDING.get(self.next, 0) > binding:
            operator = self.take()
            left = self.binary(operator, left, self.expression(_BINDING[operator]))
        self.depth -= 1
        return left

    def unary(self) -> Kind:
        token = self.next
        if token in ("~", "-", "+"):
            self.take()
            kind = _widened(self.expression(max(_BINDING.values())))
            if token != "+":
                self.emit("negate" if token == "-" else "~", None, kind)
            return kind
        if token == "(":
            self.take()
            cast = self.kind()
            if cast is None:
                kind = self.expression(0)
                self.take(")")
                return kind
            self.take(")")
            self.expression(max(_BINDING.values()))
            self.emit("cut", None, cast)
            return cast
        if token[:1].isdigit():
            return self.constant()
        return self.load(self.name())

    def constant(self) -> Kind:
        found = _CONSTANT.fullmatch(self.next)
        if not found:
            self.refuse(f"{self.next!r} is no whole number")
        digits, suffix = found[1], found[2].lower()
        base = {"x": 16, "b": 2}.get(digits[1:2].lower(), 8 if digits[0] == "0" else 10)
        value = int(digits[2:] if base in (2, 16) else digits, base) if len(digits) < 80 else 1 << 64
        kinds = [(32, True), (32, False), (64, True), (64, False)]
        if "u" in suffix:
            kinds = [kind for kind in kinds if not kind[1]]
        elif base == 10:
            kinds = [kind for kind in kinds if kind[1]]
        kinds = [kind for kind in kinds if kind[0] == 64 or "l" not in suffix]
        kind = next((kind for kind in kinds if value < 1 << (kind[0] - kind[1])), None)
        if kind is None:
            self.refuse(f"{self.next[:30]} does not fit 64 bits")
        self.take()
        self.emit("constant", value - (1 << 64) if value >= 1 << 63 else value, kind)
        return kind

    def load(self, name: str) -> Kind:
        if name not in self.known:
            self.at -= 1
            self.refuse(f"{name!r} has no value yet" if name in self.variables else f"{name!r} is not declared")
        self.emit("load", name, self.variables[name])
        return self.variables[name]

    def store(self, name: str) -> None:
        self.known.add(name)
        self.emit("store", name, self.variables[name])

    def binary(self, operator: str, left: Kind, right: Kind) -> Kind:
        left, right = _widened(left), _widened(right)
        kind = left if operator in ("<<", ">>") else max(left, right, key=lambda kind: (kind[0], not kind[1]))
        self.emit(operator, None, kind)
        return kind

    def emit(self, what: str, detail: object, kind: Kind) -> None:
        self.circuit.code.append((what, detail, kind, self.line))
        if len(self.circuit.code) > MOST_INSTRUCTIONS:
            self.refuse(f"more than {MOST_INSTRUCTIONS:,} operations stand before this")


def _widened(kind: Kind) -> Kind:
    """C's integer promotion."""
    return kind if kind[0] >= 32 else INT
