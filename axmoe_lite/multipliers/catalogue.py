"""Names to multipliers. Assignments, CSV cells and command lines hold names; this is where they resolve."""

import difflib
import functools
import inspect
import re

from axmoe_lite.multipliers import families, files
from axmoe_lite.multipliers.mosaic import Mosaic, parse_mosaic, signs
from axmoe_lite.multipliers.published import PUBLISHED
from axmoe_lite.multipliers.table import Multiplier
from axmoe_lite.multipliers.tuning import tuned

EVOAPPROX: tuple[str, ...] = tuple(p.name for p in PUBLISHED)
"""The thirteen EvoApproxLib v2022 circuits, from exact to cheapest."""

PAPER_EIGHT: tuple[str, ...] = tuple(p.name for p in PUBLISHED if p.in_paper)
"""The eight that AxMoE evaluates (1KV8 and 1KVP are deduced, the others named)."""

EXACT: str = "mul8s_1KV6"

FAMILIES = {
    function.__name__: function
    for function in (
        families.broken_array,
        families.truncation,
        families.drum,
        families.mitchell,
        families.roba,
        families.pr,
        families.roup,
        families.within,
        families.outside,
    )
}


PREFIXES = {
    "swap": Multiplier.swapped,
    "negated": Multiplier.negated,
    "signs": signs,
    "tuned": tuned,
    "tuned_relu": functools.partial(tuned, after_relu=True),
}
PREFIXED = f"(?:(?:{'|'.join(PREFIXES)}):)*"
MOST_PREFIXES = 8


def multiplier(name: str) -> Multiplier | Mosaic:
    """The multiplier of that name, or the mosaic of several.

    Args:
        name: an EvoApproxLib v2022 circuit (``"mul8s_1L2J"``), a family with its numbers
            (``"drum(4)"``, ``"broken_array(1,0,3)"``, ``"mitchell()"``), a circuit under its v1.x name
            (``"v1:mul8s_1L2H"``), a table or circuit of yours (``"file:mine.npy"``, see
            :func:`~axmoe_lite.multipliers.read_table`), any of these with operands exchanged
            (``"swap:mul8s_1KVM"``), fed with both signs changed (``"negated:mul8s_1L2J"``) or under weights that were
            tuned to it (``"tuned:mul8s_1L2L"``, see :func:`~axmoe_lite.multipliers.tuned`), or several for one layer
            (``"filter[mul8s_1KV6, 15 mul8s_1L2L]"``, see :func:`~axmoe_lite.multipliers.mosaic_name`), of which
            ``"signs:mul8s_1L2L"`` is one circuit with every other input channel negated.

    Raises:
        ValueError: for a name that does not exist; the message names the nearest that does.

    >>> multiplier("mul8s_1L2J").power_mw
    0.301
    >>> multiplier("v1:mul8s_1L2H").name
    'mul8s_1L2J'
    >>> multiplier("mul8s_1L2K")
    Traceback (most recent call last):
        ...
    ValueError: No multiplier is called 'mul8s_1L2K'. Did you mean 'mul8s_1L2N'? There are mul8s_1KV6, ...
    """
    if not isinstance(name, str):
        raise ValueError(f"A multiplier's name is text such as {EXACT!r}; {name!r} is a {type(name).__name__}.")
    if "\0" in name:
        raise ValueError(f"A multiplier's name is text such as {EXACT!r}; {name!r} has a character of no file.")
    read = tuple(map(files.named, files.files_in(name)))
    if name.startswith("file:"):
        return read[0]
    return (_of_files if read else _of_names)(name, read)


def power_of(name: str) -> float:
    """The power of a multiplier, milliwatts, for whoever makes an order or a price of it.

    Raises:
        ValueError: for a multiplier that does not exist, or whose power is not known.
    """
    found = multiplier(name)
    if found.power_mw is None:
        raise ValueError(
            f"The power of multiplier {found.name!r} is not known, so that it has no price and no place among others;"
            " leave it out, or say it in the name, as in 'file:mine.npy@power_mw=0.3'."
        )
    return found.power_mw


def _made(name: str, read: tuple[Multiplier, ...]) -> Multiplier | Mosaic:
    """``read``: what the files in the name hold at this call, so that a changed file makes another multiplier."""
    if (mosaic := parse_mosaic(name)) is not None:
        known, places, repeats = mosaic
        for one in known:
            if one.startswith("signs:"):
                raise ValueError(f"{name!r} has the mosaic {one!r} inside; name multipliers only.")
        return Mosaic(name, tuple(multiplier(one) for one in known), places, repeats)
    if (n := re.match(PREFIXED, name)[0].count(":")) > MOST_PREFIXES:
        raise ValueError(f"{name[:40]!r}... has {n} prefixes; at most {MOST_PREFIXES} mean something. Leave some out.")
    prefix, _, rest = name.partition(":")
    if prefix in PREFIXES:
        inner = multiplier(rest)
        if isinstance(inner, Mosaic):
            raise ValueError(f"{name!r} asks for {prefix}: of a mosaic; write it before each name inside.")
        return PREFIXES[prefix](inner)
    for published in PUBLISHED:
        if name in (published.name, f"v1:{published.v1_name}"):
            array = families.broken_array(*published.drops)
            return Multiplier(
                published.name,
                array.table,
                published.power_mw,
                published.area_um2,
                published.delay_ns,
                source="EvoApproxLib v2022, PDK45",
            )
    call = re.fullmatch(r"(\w+)\(([-\d, ]*)\)", name, re.ASCII)
    if call and call[1] in FAMILIES:
        return _call_family(name, call[1], call[2])
    raise ValueError(_unknown(name))


_of_names = functools.lru_cache(maxsize=512)(_made)
# Up to megabytes each with what is computed from them, and there is no end of files.
_of_files = functools.lru_cache(maxsize=files.MOST_KEPT)(_made)


def _call_family(name: str, family: str, arguments: str) -> Multiplier:
    function = FAMILIES[family]
    expected = list(inspect.signature(function).parameters)
    numbers = [part.strip() for part in arguments.split(",")] if arguments.strip() else []
    if len(numbers) != len(expected) or not all(re.fullmatch(r"-?\d{1,9}", n) for n in numbers):
        raise ValueError(
            f"{_shown(name)} does not fit its family; write {family}({', '.join(expected)}) with whole numbers."
        )
    return function(*map(int, numbers))


def _shown(name: str) -> str:
    return repr(name) if len(name) < 100 else f"{name[:60]!r}..."


def _unknown(name: str) -> str:
    forms = [f"{family}({','.join(inspect.signature(f).parameters)})" for family, f in FAMILIES.items()]
    old = {p.v1_name: p.name for p in PUBLISHED}
    if name in old:
        return (
            f"{name!r} is a v1.x name; in v2022 that circuit is {old[name]!r}. Ask for that, or for 'v1:{name}'"
            " if v1.x is what you mean."
        )
    word, colon, _ = name.partition(":")
    if colon and word.isidentifier() and len(word) < 30 and word != "v1":
        near = difflib.get_close_matches(word, [*PREFIXES, "v1", "file"], n=1, cutoff=0)[0]
        return (
            f"No multiplier is called {_shown(name)}: nothing begins with {word!r} and a colon. Did you mean"
            f" {near + ':'!r}? There are {', '.join(f'{prefix}:' for prefix in PREFIXES)}, v1: and file:."
        )
    known = [*EVOAPPROX, *FAMILIES, *(f"v1:{old_name}" for old_name in old)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4) if len(name) < 100 else []
    hint = "".join(
        f" Did you mean {next((form for form in forms if form.startswith(f'{one}(')), one)!r}?" for one in near
    )
    return (
        f"No multiplier is called {_shown(name)}.{hint} There are {', '.join(EVOAPPROX)}, the families"
        f" {', '.join(forms)}, v1.x names as 'v1:mul8s_...', files of yours as 'file:mine.npy', and before any of them"
        f" {', '.join(f'{prefix}:' for prefix in PREFIXES)}."
    )
