"""Rows in the format of Criteo's click logs, streamed from TSV (also .gz) or Parquet in bounded memory.

A row has a label (0 or 1), 13 integers and 26 hexadecimal strings, separated by tabs, empty where missing. Rows are in
order of time. The integers become log(1 + max(x, 0)), the strings are hashed into a fixed number of buckets per table;
bucket 0 stands for "missing". Every rank reads the whole stream and encodes its own batches only: of each `size`
batches in a row rank r takes the r-th. What is left over at the end (fewer than `size` batches) is left out, so that
all ranks take equally many steps.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
import torch
from dlrm import Batch

NUM_DENSE, NUM_TABLES = 13, 26
INTEGERS = [f"I{i}" for i in range(1, NUM_DENSE + 1)]
STRINGS = [f"C{i}" for i in range(1, NUM_TABLES + 1)]
COLUMNS = ["label", *INTEGERS, *STRINGS]
FORMAT = "a label (0 or 1), 13 integers and 26 hexadecimal strings, separated by tabs, empty where missing"
REMEDY = "Repair or remove that row, or fetch the file again if it was cut off."
READ_BYTES = 4 << 20
PARQUET_ROWS = 16384


@dataclass(frozen=True)
class Criteo:
    """A training stream and a test stream, both in order of time.

    Args:
        path: a file, or a folder of files that are read in the order of their names (day_2 before day_10).
        test_path: the same for the test; None holds out the last ``test_fraction`` of the rows of ``path``, for which
            the rows of a TSV are counted once at the start.
        test_fraction: share of rows held out where there is no ``test_path``.
        num_buckets: rows of each of the 26 embedding tables.
    """

    path: Path
    test_path: Path | None = None
    test_fraction: float = 0.1
    num_buckets: int = 10_000
    num_train_rows: int | None = None  # None: the whole of path

    num_dense = NUM_DENSE

    @classmethod
    def open(
        cls, path: Path, test_path: Path | None = None, *, test_fraction: float = 0.1, num_buckets: int = 10_000
    ) -> Criteo:
        """Looks at the files; counts rows where the last of them are to be held out.

        Raises:
            FileNotFoundError: no such file, or an empty folder.
            ValueError: an argument out of range.
        """
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction} must lie between 0 and 1, for instance 0.1")
        if num_buckets < 2:
            raise ValueError(f"num_buckets={num_buckets} must be at least 2: bucket 0 stands for missing values")
        rows = None if test_path and data_files(test_path) else sum(map(count_rows, data_files(path)))
        train_rows = None if rows is None else rows - round(rows * test_fraction)
        if train_rows is not None and rows is not None and not 0 < train_rows < rows:
            raise ValueError(f"{path} has {rows} rows, too few to hold out {test_fraction:.0%} of them for the test")
        data_files(path)
        return cls(path, test_path, test_fraction, num_buckets, train_rows)

    @property
    def table_sizes(self) -> list[int]:
        return [self.num_buckets] * NUM_TABLES

    def train_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """One pass over this rank's training batches, in order of time."""
        for table in exact_tables(read_rows(self.path, stop=self.num_train_rows), batch_size * size):
            if table.num_rows == batch_size * size:
                yield encode(table.slice(rank * batch_size, batch_size), self.num_buckets)

    def test_batches(self, batch_size: int) -> Iterator[Batch]:
        """All test rows, in order of time; the last batch may be smaller."""
        rows = read_rows(self.test_path) if self.test_path else read_rows(self.path, start=self.num_train_rows or 0)
        for table in exact_tables(rows, batch_size):
            yield encode(table, self.num_buckets)


def data_files(path: Path) -> list[Path]:
    """The file itself, or the files of a folder by name with numbers in them in numerical order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist. Name a Criteo file (TSV, TSV.gz, Parquet) or a folder of them."
        )
    files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_"))]
    if not files:
        raise FileNotFoundError(f"{path} holds no file. Name a Criteo file (TSV, TSV.gz, Parquet) or a folder of them.")
    return sorted(
        files, key=lambda file: [(not part.isdigit(), part.zfill(20)) for part in re.split(r"(\d+)", file.name)]
    )


def is_parquet(file: Path) -> bool:
    return file.suffix.lower() in (".parquet", ".pq")


def count_rows(file: Path) -> int:
    """Rows of a file: Parquet says it, the lines of a TSV are counted."""
    try:
        if is_parquet(file):
            return int(pq.read_metadata(file).num_rows)
        lines, last = 0, b"\n"
        with pa.input_stream(str(file), compression="detect") as stream:
            while block := stream.read(READ_BYTES):
                lines += sum(block.count(end) for end in (b"\n", b"\r")) - block.count(b"\r\n")
                lines, last = lines - (last + block[:1] == b"\r\n"), block[-1:]
        return lines + (last not in (b"\n", b"\r"))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read ({one_line(error)}). {REMEDY}") from None


def read_rows(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[pa.Table]:
    """Checked rows [start, stop) of all files under path, as tables of whatever size they were read in."""
    first = 0  # index of the table's first row
    for file in data_files(path):
        for table in read_parquet(file) if is_parquet(file) else read_tsv(file):
            wanted = table.slice(max(start - first, 0), None if stop is None else max(stop - max(start, first), 0))
            if wanted.num_rows:
                yield wanted
            first += table.num_rows
            if stop is not None and first >= stop:
                return


def read_tsv(file: Path) -> Iterator[pa.Table]:
    """Checked tables of one TSV, some megabytes at a time."""
    line = 1
    try:
        with pa.input_stream(str(file), compression="detect") as stream:
            for block in csv.open_csv(
                stream,
                csv.ReadOptions(column_names=COLUMNS, block_size=READ_BYTES, use_threads=False),
                csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
                csv.ConvertOptions(
                    column_types=dict.fromkeys(COLUMNS, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                    check_utf8=False,  # what is wrong is named by `checked`, with its line
                ),
            ):
                yield checked(pa.table(block), file, first_row=line, row_name="line")
                line += block.num_rows
    except (pa.ArrowException, OSError) as error:
        if found := re.search(r"(?:Row #(\d+): )?Expected \d+ columns, got (\d+)", str(error)):
            raise ValueError(
                f"{file}, line {found[1] or f'{line} or later'}: {found[2]} fields where {len(COLUMNS)} were expected: "
                f"{FORMAT}. {REMEDY}"
            ) from None
        raise ValueError(
            f"{file}, after line {line - 1}: {one_line(error)}; expected on each line: {FORMAT}. {REMEDY}"
        ) from None


def read_parquet(file: Path) -> Iterator[pa.Table]:
    """Checked tables of one Parquet file; its 40 columns count by position, whatever their names."""
    row = 1
    try:
        with pq.ParquetFile(file) as reader:
            names = reader.schema_arrow.names
            if len(names) != len(COLUMNS):
                raise ValueError(
                    f"{file}: {len(names)} columns ({', '.join(names[:4])}, ...) where {len(COLUMNS)} were expected: "
                    f"{', '.join(COLUMNS[:3])}, ..., {COLUMNS[-1]}. Write these columns, in this order."
                )
            for block in reader.iter_batches(PARQUET_ROWS, use_threads=False):
                yield checked(pa.table(block).rename_columns(COLUMNS), file, first_row=row, row_name="row")
                row += block.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file}, after row {row - 1}: {one_line(error)}; expected a whole Parquet file. {REMEDY}"
        ) from None


def checked(table: pa.Table, file: Path, *, first_row: int, row_name: str) -> pa.Table:
    """The same rows with an integer label and integers; strings where they are strings."""

    def typed(name: str) -> pa.ChunkedArray:
        column = table.column(name)
        try:
            if name in STRINGS:
                wrong = pc.invert(pc.match_substring_regex(column.cast(pa.string()), "^[0-9a-fA-F-]+$"))
                expected, column = "a hexadecimal string", column.cast(pa.string())
            else:
                wrong = pa.scalar(False)
                if pa.types.is_string(column.type):
                    wrong = pc.match_substring_regex(column, "[xX]")  # 0x10, which the cast would take
                column, expected = column.cast(pa.int64()), "an integer"
                if name == "label" and not pc.any(wrong).as_py():
                    wrong, expected = pc.invert(pc.is_in(column, pa.array([0, 1]))), "0 or 1"
        except pa.ArrowInvalid:
            texts = column.cast(pa.string()).cast(pa.binary()).to_pylist()
            wrong, expected = pa.array([text is not None and not is_int64(text) for text in texts]), "an integer"
        except pa.ArrowNotImplementedError:
            raise ValueError(f"{file}, column {name}: values are of type {column.type}; expected is {FORMAT}") from None
        if pc.any(wrong).as_py():
            row = pc.index(wrong, True).as_py()
            raise ValueError(
                f"{file}, {row_name} {first_row + row}, column {name}: {shown(table.column(name)[row])} "
                f"where {expected} was expected. A row is {FORMAT}. {REMEDY}"
            )
        return column

    return pa.table({name: typed(name) for name in COLUMNS})


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def is_int64(text: bytes) -> bool:
    return re.fullmatch(rb"-?[0-9]{1,19}", text) is not None and -(1 << 63) <= int(text) < 1 << 63


def shown(value: pa.Scalar) -> str:
    """A value in a message: short, and printable whatever bytes are in it."""
    if not value.is_valid:
        return "nothing"
    if pa.types.is_string(value.type):  # which need not be UTF-8 in a TSV
        return reprlib.repr(value.cast(pa.binary()).as_py().decode(errors="backslashreplace"))
    return reprlib.repr(value.as_py())


def exact_tables(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly so many rows, the last one excepted."""
    held: list[pa.Table] = []
    num_held = 0
    for table in tables:
        held.append(table)
        num_held += table.num_rows
        if num_held >= rows:
            whole = pa.concat_tables(held)
            for start in range(0, num_held - rows + 1, rows):
                yield whole.slice(start, rows)
            held, num_held = [whole.slice(num_held - num_held % rows)], num_held % rows
    if num_held:
        yield pa.concat_tables(held)


def bucket(column: pa.ChunkedArray, num_buckets: int) -> np.ndarray:
    """Ids in [1, num_buckets) by a hash that is the same in every process; 0 where the value is missing."""
    coded = column.combine_chunks().dictionary_encode()
    hashes = pd.util.hash_array(coded.dictionary.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    ids = np.append((hashes % np.uint64(num_buckets - 1)).astype(np.int64) + 1, 0)  # the last one for missing values
    return ids[coded.indices.fill_null(len(ids) - 1).to_numpy(zero_copy_only=False)]


def encode(table: pa.Table, num_buckets: int) -> Batch:
    """Checked rows as tensors."""
    integers = [table.column(name).fill_null(0).to_numpy() for name in INTEGERS]
    dense = np.log1p(np.maximum(np.stack(integers, axis=1), 0)).astype(np.float32)  # [rows, 13]
    ids = np.stack([bucket(table.column(name), num_buckets) for name in STRINGS], axis=1)  # [rows, 26]
    labels = table.column("label").to_numpy().astype(np.float32)  # [rows]
    return Batch(torch.from_numpy(dense), torch.from_numpy(ids), torch.from_numpy(labels))
