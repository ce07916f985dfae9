"""The Criteo format: values, splits among ranks, and one clear message for each kind of bad input."""

from __future__ import annotations

import gzip
import math
import random
import re
from pathlib import Path

import criteo
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from criteo import Criteo
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

calm = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def line(number: int, *, rng: random.Random) -> str:
    integers = [str(number)] + [str(rng.randint(-2, 5000)) if rng.random() > 0.2 else "" for _ in range(12)]
    strings = [f"{rng.randint(0, 50) * 7919:08x}" if rng.random() > 0.1 else "" for _ in range(26)]
    return "\t".join([str(rng.randint(0, 1)), *integers, *strings])


@pytest.fixture
def lines() -> list[str]:
    rng = random.Random(3)
    return [line(number, rng=rng) for number in range(1000)]  # I1 is the row's number: it tells rows apart


@pytest.fixture
def tsv(tmp_path: Path, lines: list[str]) -> Path:
    path = tmp_path / "train.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def row_numbers(batches: list[criteo.Batch]) -> list[int]:
    return [round(math.expm1(value)) for batch in batches for value in batch.dense[:, 0].tolist()]


def test_values_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "two.txt"
    rows = [["1", "0", "-1", "", *["5"] * 10, "68fd1e64", "", *["80e26c9b"] * 24], ["0", *[""] * 39]]
    path.write_text("\n".join("\t".join(row) for row in rows))  # no newline at the end
    (batch,) = Criteo.open(path, path, num_buckets=100).test_batches(10)
    assert batch.labels.tolist() == [1, 0]
    assert batch.dense[0].tolist() == pytest.approx([0, 0, 0] + [math.log(6)] * 10)
    assert not batch.dense[1].any() and not batch.ids[1].any()
    assert batch.ids[0, 1] == 0 and 1 <= batch.ids[0].max() < 100
    assert batch.ids[0, 2] == batch.ids[0, 25] != batch.ids[0, 0]
    assert (batch.dense.dtype, batch.ids.dtype, batch.labels.dtype) == (torch.float32, torch.int64, torch.float32)


def test_buckets_are_the_same_in_every_process_and_spread() -> None:
    ids = criteo.bucket(pa.chunked_array([["68fd1e64", "80e26c9b", None]]), 10_000).tolist()
    assert ids == [2596, 6205, 0]
    many = criteo.bucket(pa.chunked_array([[f"{number:08x}" for number in range(10_000)]]), 100)
    assert many.min() == 1 and many.max() == 99 and len(set(many.tolist())) == 99


def test_the_last_tenth_is_held_out(tsv: Path) -> None:
    data = Criteo.open(tsv)
    assert row_numbers(list(data.train_batches(100))) == list(range(900))
    assert row_numbers(list(data.test_batches(64))) == list(range(900, 1000))


def test_ranks_take_every_third_batch_and_equally_many(tsv: Path) -> None:
    ranks = [list(Criteo.open(tsv).train_batches(70, rank=rank, size=3)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [4, 4, 4]  # 900 rows hold 4 chunks of 210
    in_time = [rank[step] for step in range(4) for rank in ranks]
    assert row_numbers(in_time) == list(range(840))


def test_rows_do_not_depend_on_how_much_is_read_at_once(tsv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(Criteo.open(tsv).train_batches(256))
    monkeypatch.setattr(criteo, "READ_BYTES", 3000)
    for batch, other in zip(whole, Criteo.open(tsv).train_batches(256), strict=True):
        assert all(torch.equal(left, right) for left, right in zip(batch, other, strict=True))


@pytest.mark.parametrize("kind", ["gz", "parquet", "folder"])
def test_other_forms_give_the_same_rows(tmp_path: Path, tsv: Path, lines: list[str], kind: str) -> None:
    other = tmp_path / f"other.{kind}"
    if kind == "gz":
        other.write_bytes(gzip.compress(tsv.read_bytes()))
    else:
        columns = [
            [field or None for field in column] for column in zip(*(row.split("\t") for row in lines), strict=True)
        ]
        typed = [pa.array(column).cast(pa.int32()) if i < 14 else pa.array(column) for i, column in enumerate(columns)]
        table = pa.table(typed, names=criteo.COLUMNS)
        if kind == "parquet":
            pq.write_table(table, other, row_group_size=123)
        else:
            other.mkdir()
            pq.write_table(table.slice(0, 300), other / "day_2.parquet")
            (other / "day_10.tsv").write_text("\n".join(lines[300:]) + "\n")
    for batch, same in zip(Criteo.open(tsv).train_batches(128), Criteo.open(other).train_batches(128), strict=True):
        assert all(torch.equal(left, right) for left, right in zip(batch, same, strict=True))
    assert row_numbers(list(Criteo.open(other).test_batches(128))) == list(range(900, 1000))


BAD_ROWS = {
    "truncated": (lambda row: row[:60], r"\d+ fields where 40 were expected"),
    "too long": (lambda row: row + "\tff", "41 fields where 40 were expected"),
    "empty": (lambda row: "", "column label: nothing where 0 or 1 was expected"),
    "label": (lambda row: "7" + row[1:], "column label: '7' where 0 or 1 was expected"),
    "no label": (lambda row: row[1:], "column label: nothing where 0 or 1 was expected"),
    "integer": (lambda row: row[:2] + "x" + row[2:], "column I1: 'x.*' where an integer was expected"),
    "huge label": (lambda row: "9" * 30 + row[1:], "column label: '9+[.]{3}9+' where an integer was expected"),
    "huge integer": (lambda row: row[:2] + "9" * 20 + row[5:], "column I1: '9+' where an integer was expected"),
    "0x label": (lambda row: "0x1" + row[1:], "column label: '0x1' where an integer was expected"),
    "0x integer": (lambda row: row[:2] + "0x1F" + row[5:], "column I1: '0x1F' where an integer was expected"),
    "not UTF-8": (lambda row: row[:2] + "\udcff" + row[2:], r"column I1: '\\\\xff.*' where an integer was expected"),
    "string": (lambda row: row.rsplit("\t", 1)[0] + "\tnot hex", "column C26: 'not hex' where a hexadecimal"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("read_bytes", [3000, 4 << 20])
def test_bad_row_is_named_with_file_line_and_remedy(
    tmp_path: Path, lines: list[str], kind: str, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criteo, "READ_BYTES", read_bytes)
    spoil, message = BAD_ROWS[kind]
    path = tmp_path / "bad.txt"
    path.write_text("\n".join([*lines[:500], spoil(lines[500]), *lines[501:]]) + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"bad\.txt, line 501\b.*{message}") as caught:
        list(Criteo.open(path).train_batches(10))
    assert criteo.REMEDY in str(caught.value) and "\n" not in str(caught.value)


def test_files_cut_off_are_named(tmp_path: Path, tsv: Path, lines: list[str]) -> None:
    short = tmp_path / "short.txt.gz"
    whole = gzip.compress(tsv.read_bytes())
    short.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"short\.txt\.gz.*fetch the file again"):
        list(Criteo.open(short, tsv).train_batches(10))
    with pytest.raises(ValueError, match=r"short\.txt\.gz.*fetch the file again"):
        Criteo.open(short)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"cut\.parquet.*fetch the file again"):
        Criteo.open(cut)
    few = tmp_path / "few.parquet"
    pq.write_table(pa.table({"label": [0, 1], "I1": [1, 2]}), few)
    with pytest.raises(ValueError, match=r"few\.parquet: 2 columns .* where 40 were expected"):
        list(Criteo.open(tsv, few).test_batches(10))


def test_missing_files_and_wrong_arguments(tmp_path: Path, tsv: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Name a Criteo file"):
        Criteo.open(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Name a Criteo file"):
        Criteo.open(tsv, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no file"):
        Criteo.open(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"test_fraction=1.5 must"):
        Criteo.open(tsv, test_fraction=1.5)
    with pytest.raises(ValueError, match="num_buckets=1 must"):
        Criteo.open(tsv, num_buckets=1)
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(ValueError, match="has 0 rows, too few"):
        Criteo.open(tmp_path / "none.txt")


# --- whatever a file holds --------------------------------------------------------------------------------------------


def all_batches(path: Path) -> list[criteo.Batch]:
    return list(Criteo.open(path, path, num_buckets=50).test_batches(3))


def is_documented(column: str, text: str) -> bool:
    """Tell whether a field may be read, by what the format says."""
    if column in criteo.STRINGS:
        return re.fullmatch("[0-9a-fA-F-]*", text) is not None
    number = int(text) if re.fullmatch("-?[0-9]+", text) else None
    if column == "label":
        return number in (0, 1) and len(text) < 20
    return text == "" or (number is not None and -(2**63) <= number < 2**63 and len(text.lstrip("-")) < 20)


FIELDS = st.one_of(
    st.integers(-(1 << 66), 1 << 66).map(str),
    st.integers(-3, 70).map(str),
    st.text(st.characters(blacklist_characters="\t\r\n", blacklist_categories=["Cs"]), max_size=12),
    st.text("0123456789abcdefABCDEF+-. xe", max_size=24),
)


@calm
@given(column=st.sampled_from(criteo.COLUMNS), text=FIELDS, end=st.sampled_from(["\n", "\r\n", "\r"]))
@example(column="label", text="9" * 30, end="\n")
@example(column="I1", text="9" * 20, end="\n")
@example(column="I13", text="0x10", end="\n")
def test_any_field_has_the_documented_value_or_is_named(column: str, text: str, end: str, tmp_path: Path) -> None:
    rng = random.Random(5)
    rows = [line(number, rng=rng).split("\t") for number in range(5)]
    place = criteo.COLUMNS.index(column)
    rows[2][place] = text
    path = tmp_path / "any.txt"
    path.write_bytes(end.join("\t".join(row) for row in rows).encode() + end.encode())
    if not is_documented(column, text):
        with pytest.raises(ValueError, match=rf"any\.txt, line 3, column {column}: .* was expected") as caught:
            all_batches(path)
        assert criteo.REMEDY in str(caught.value)
        return
    batches = all_batches(path)
    assert [len(batch.labels) for batch in batches] == [3, 2]
    if column == "label":
        assert batches[0].labels[2] == int(text)
    elif column in criteo.INTEGERS:
        expected = math.log1p(max(int(text or 0), 0))
        assert float(batches[0].dense[2, place - 1]) == pytest.approx(expected, rel=1e-6)
    else:
        assert (int(batches[0].ids[2, place - 14]) == 0) == (text == "")


@calm
@given(data=st.data(), name=st.sampled_from(["any.txt", "any.txt.gz", "any.parquet"]))
def test_any_bytes_are_rows_or_a_message(data: st.DataObject, name: str, tsv: Path, tmp_path: Path) -> None:
    whole = tsv.read_bytes()[:4000]
    if name.endswith("gz"):
        whole = gzip.compress(whole, mtime=0)
    elif name.endswith("parquet"):
        columns = [pa.array([0, 1])] * 14 + [pa.array(["ab", None])] * 26
        pq.write_table(pa.table(columns, names=criteo.COLUMNS), tmp_path / "p")
        whole = (tmp_path / "p").read_bytes()
    place, junk = data.draw(st.integers(0, len(whole))), data.draw(st.binary(max_size=30))
    path = tmp_path / name
    path.write_bytes(
        data.draw(st.sampled_from([junk, whole[:place], whole[:place] + junk + whole[place + len(junk) :]]))
    )
    try:
        batches = all_batches(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert all(torch.isfinite(batch.dense).all() and set(batch.labels.tolist()) <= {0, 1} for batch in batches)


def test_a_gz_file_that_is_cut_anywhere_is_named(lines: list[str], tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(lines[:40]).encode())
    path = tmp_path / "cut.txt.gz"
    for length in [*range(1, 24), *range(24, len(whole), 97), *range(len(whole) - 12, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.txt\.gz.*fetch the file again"):
            all_batches(path)


def test_rows_are_counted_as_they_are_read(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a line, and wherever a block ends."""
    monkeypatch.setattr(criteo, "READ_BYTES", 4096)
    path = tmp_path / "ends.txt"
    for end in ("\n", "\r\n", "\r"):
        for last in ("", end):
            path.write_bytes((end.join(lines[:60]) + last).encode())
            assert criteo.count_rows(path) == 60
            assert sum(len(batch.labels) for batch in all_batches(path)) == 60


def test_columns_of_a_type_that_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "lists.parquet"
    columns = [pa.array([0, 1])] * 5 + [pa.array([[1], [2]])] + [pa.array([0, 1])] * 34
    pq.write_table(pa.table(columns, names=criteo.COLUMNS), path)
    with pytest.raises(
        ValueError, match=r"lists\.parquet, column I5: values are of type list<.*>; expected is a label"
    ):
        all_batches(path)
