"""Files broken in every way: cut off, changed, mixed up; and what a reader may make of them.

damaged(content)                    hypothesis draws what happens to these bytes
result(read, path)                  what read(path) gives, or None where it refuses as it should
outcomes(("npz", path), ...)        the same in a process of its own, where memory is short and no program may start
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

HEAD = 300  # bytes at the start that are hit as often as all the rest
PIECES = (
    b"\0",
    b"\xff" * 8,
    b"-1",
    b"9" * 30,
    b"nan",
    b"{" * 40,
    b"(",
    b"\n",
    b'"',
    b"'",
    b"\\",
    b"\xed\xa0\x80",
    b"../../x",
)
MOST_SECONDS = 20  # of the processor, for a file of a megabyte at most: a search that is quadratic takes hours


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """These bytes after one to four accidents; or others altogether."""
    place = st.integers(0, min(HEAD, len(content))) | st.integers(0, len(content))
    piece = st.sampled_from(PIECES) | st.binary(min_size=1, max_size=9)
    accidents = st.lists(st.tuples(st.sampled_from(sorted(ACCIDENTS)), place, piece), min_size=1, max_size=4)
    broken = accidents.map(lambda some: _after(content, some))
    return st.one_of(broken, broken, broken, st.binary(max_size=300), st.text(max_size=200).map(_encoded))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _after(content: bytes, accidents: list[tuple[str, int, bytes]]) -> bytes:
    for name, place, piece in accidents:
        content = ACCIDENTS[name](content, place, piece)
    return content


ACCIDENTS: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "cut off": lambda c, at, piece: c[:at],
    "begun late": lambda c, at, piece: c[at:],
    "a bit turned": lambda c, at, piece: c[:at] + bytes(b ^ (1 << piece[0] % 8) for b in c[at : at + 1]) + c[at + 1 :],
    "written over": lambda c, at, piece: c[:at] + piece + c[at + len(piece) :],
    "put in": lambda c, at, piece: c[:at] + piece + c[at:],
    "left out": lambda c, at, piece: c[:at] + c[at + piece[0] :],
    "there twice": lambda c, at, piece: c[: at + piece[0]] + c[at:],
    "exchanged": lambda c, at, piece: c[at:] + c[:at],
}


def result(read: Callable[[Path], Any], path: Path) -> Any:
    """What ``read(path)`` returns; None after a plain error with the file's name, the folder being as before."""
    before, start = _there(path.parent), time.process_time()
    try:
        found = read(path)
    except (ValueError, OSError) as refused:
        plain = type(refused) is ValueError or isinstance(
            refused, OSError
        )  # and no UnicodeDecodeError from deep inside
        assert plain and path.name in str(refused), f"{type(refused).__name__}: {refused}"
        found = None
    assert _there(path.parent) == before, "what is refused or read leaves the folder as it is"
    assert time.process_time() - start < MOST_SECONDS
    return found


def _there(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.lstat().st_size for path in folder.rglob("*")}


CHILD = """
import json, resource, sys, pathlib
from axmoe_lite import datasets, models, train
from axmoe_lite.multipliers import read_table
import PIL.Image  # where it is first needed, its loading would count
network, more = models.resnet8(classes=3), int(sys.argv[1]) * 2**20
READERS = {
    "table": read_table,
    "npz": datasets.read_npz,
    "zip": lambda path: datasets._convert_tiny_imagenet(pathlib.Path(path), pathlib.Path(path).with_suffix(".npz")),
    "load": lambda path: train.load(network, path),
    "weights": lambda path: models.load_weights(network, path),
}
def watch(event, arguments):
    if event in FORBIDDEN:
        raise SystemExit(f"{event} {arguments}")
FORBIDDEN = "subprocess.Popen os.system os.exec os.posix_spawn os.fork pickle.find_class socket.connect".split()
sys.addaudithook(watch)
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
told = []
for kind, path in json.loads(sys.argv[2]):
    try:
        READERS[kind](path)
        told.append(["read", ""])
    except BaseException as refused:
        told.append([type(refused).__name__, str(refused)])
print(json.dumps(told))
"""


def outcomes(*files: tuple[str, Path], megabytes: int) -> list[tuple[str, str]]:
    """Each file's outcome, "read" or the error's type, and its words, where so much memory is left and nothing runs."""
    asked = json.dumps([(kind, str(path)) for kind, path in files])
    command = [sys.executable, "-W", "error", "-c", CHILD, str(megabytes), asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(one) for one in json.loads(done.stdout)]
