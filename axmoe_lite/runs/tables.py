"""Rows as tables: text from CSV files, compared and typed by the column, a million rows at a time.

As in the files, every value is text until :func:`typed`; an empty cell is null.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import csv
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

NAMES = ("run", "chapter", "study", "dataset", "scale", "device", "commit", "date", "version", "digest")  # stay text
INTEGER = r"^[-+]?(0|[1-9][0-9]*)$"
NUMBER = r"^[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|^[-+]?inf$|^nan$"
BOOLEAN = "^(True|False|true|false)$"
BATCH = 65_536  # rows that are turned into plain text at a time, while a file is written


def read_rows(path: Path) -> list[dict[str, str]]:
    """A CSV file row by row, every value as text.

    Raises:
        ValueError: as :func:`read_text`; names the file and the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # a spreadsheet marks its UTF-8 in front
            lines = csv.reader(file, strict=True)
            names = _check_names(path, next(lines, []))
            rows = []
            for cells in filter(None, lines):
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}, line {lines.line_num}: {len(cells)} cells, and the first line names {len(names)}"
                        " columns; take the file from the repository again, or mend the line."
                    )
                rows.append(dict(zip(names, cells, strict=True)))
            return rows
    except (csv.Error, UnicodeDecodeError) as reason:
        raise ValueError(f"{path} is not readable as CSV in UTF-8 ({reason}); write rows with record().") from reason


def _check_names(path: Path, names: list[str]) -> list[str]:
    if not names or len(set(names)) < len(names) or "" in names:
        raise ValueError(f"{path}: its first line should name the columns, each differently; it has {names}.")
    return names


def read_text(path: Path) -> "pa.Table":
    """A CSV file with every column as text, dictionary-encoded.

    Raises:
        ValueError: if it is empty, a column has no name of its own, or a line has other columns than the first.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            names = _check_names(path, next(csv.reader(file, strict=True), []))
    except (csv.Error, UnicodeDecodeError) as reason:
        raise ValueError(f"{path} is not readable as CSV in UTF-8 ({reason}); write rows with record().") from reason
    text = pa.dictionary(pa.int32(), pa.string())
    options = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, text), null_values=[""], strings_can_be_null=True
    )
    try:
        return arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(use_threads=False),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=True),
            convert_options=options,
        )
    except pa.ArrowInvalid as reason:
        raise ValueError(f"{path} is not readable as CSV ({reason}).") from reason


def unite(tables: Iterable["pa.Table"]) -> "pa.Table":
    """One table of the rows of all; a column that one of them lacks is null there."""
    import pyarrow as pa

    return pa.concat_tables(tables, promote_options="default").unify_dictionaries().combine_chunks()


def codes_of(table: "pa.Table", columns: Iterable[str]) -> np.ndarray:
    """Whole numbers, one a row, equal where all of these columns are; their order means nothing.

    >>> import pyarrow as pa
    >>> table = pa.table({"a": ["x", "x", None, "x"], "b": ["1", "2", "1", "1"]})
    >>> first, second, third, fourth = codes_of(table, ["a", "b"])
    >>> bool(first == fourth), len({first, second, third})
    (True, 3)
    """
    codes = np.zeros(table.num_rows, dtype=np.int64)
    for name in columns:
        column = table[name].combine_chunks()
        if not hasattr(column, "indices"):
            column = column.dictionary_encode()
        absent = len(column.dictionary)
        codes = codes * (absent + 1) + column.indices.fill_null(absent).to_numpy(zero_copy_only=False)
        codes = np.unique(codes, return_inverse=True)[1]  # small again, so that no product overflows
    return codes


def typed(table: "pa.Table") -> "pa.Table":
    """Text as what it says: whole numbers, numbers, truth, else text; a column is of one type.

    Names, such as a commit of digits only, stay text.

    >>> import pyarrow as pa
    >>> rows = pa.table({"seed": ["0", "1"], "top1": ["1", "0.5"], "digest": ["12", "7e1"], "note": ["007", None]})
    >>> [str(column.type) for column in typed(rows).columns]
    ['int64', 'double', 'string', 'string']
    """
    for index, name in enumerate(table.column_names):
        if name not in NAMES and (kind := _kind_of(table[name])):
            table = table.set_column(index, name, _plain(table[name]).cast(kind))
    return table


def _kind_of(column: "pa.ChunkedArray") -> "pa.DataType | None":
    import pyarrow as pa
    import pyarrow.compute as pc

    values = _plain(column.unique()).drop_null()
    if not (pa.types.is_string(values.type) and len(values)):
        return None
    for pattern, kind in ((INTEGER, pa.int64()), (NUMBER, pa.float64()), (BOOLEAN, pa.bool_())):
        if pc.all(pc.match_substring_regex(values, pattern)).as_py():
            try:
                values.cast(kind)
            except pa.ArrowInvalid:  # a whole number of more than 64 bits
                continue
            return kind
    return None


def _plain(column: "pa.Array | pa.ChunkedArray") -> "pa.Array | pa.ChunkedArray":
    import pyarrow as pa

    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column


def decoded(table: "pa.Table") -> "pa.Table":
    """The table with its text as plain text, row by row."""
    return table.cast(_decoded_schema(table))


def _decoded_schema(table: "pa.Table", metadata: dict[str, str] | None = None) -> "pa.Schema":
    import pyarrow as pa

    fields = [pa.field(f.name, pa.string()) if pa.types.is_dictionary(f.type) else f for f in table.schema]
    return pa.schema(fields, metadata=metadata)


def write_table(stem: Path, table: "pa.Table", *, metadata: dict[str, str]) -> list[Path]:
    """Write a table as ``stem.parquet``, with ``metadata`` in its schema, and as ``stem.csv``, each atomically.

    Returns:
        The two files.
    """
    import pyarrow.parquet as pq
    from pyarrow import csv as arrow_csv

    schema = _decoded_schema(table, metadata)

    def write(path: Path, opened: Callable[[Path], object]) -> Path:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with opened(partial) as writer:
                for start in range(0, table.num_rows, BATCH):
                    writer.write_table(table.slice(start, BATCH).cast(schema))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    stem.parent.mkdir(parents=True, exist_ok=True)
    return [
        write(stem.with_name(f"{stem.name}.parquet"), lambda path: pq.ParquetWriter(path, schema)),
        write(stem.with_name(f"{stem.name}.csv"), lambda path: arrow_csv.CSVWriter(path, schema)),
    ]
