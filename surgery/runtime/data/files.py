"""Rows of a file (`.jsonl`, `.csv`, also `.gz`, `.parquet`): a dictionary each, every fault with its row number."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.compiler.diagnostics import Note, SurgError, fail
from surgery.compiler.plan import Place
from surgery.runtime.extras import needed
from surgery.runtime.places import place_notes, span_of

LARGEST_ROW = 64 * 1024 * 1024  # bytes; a longer line is no row of text, and must not fill the memory
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")

Row = dict[str, Any]
Stream = gzip.GzipFile | io.BufferedReader


class Rows(ABC):
    """Rows to read: where they are, and which line of the spec asked for them."""

    def __init__(self, path: str | Path, folder: Path, place: Place | None = None) -> None:
        self.name = str(path)
        self.path = folder / path
        self.folder = folder
        self.place = place

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, Row]]:
        """The rows with their numbers from 1; raises SURG050 where they cannot be read."""

    def fail(
        self, code: str, message: str, row: int | None = None, help: str | None = None, notes: tuple[Note, ...] = ()
    ) -> SurgError:
        """An error about this file, at a row (from 1) of it if one is given, with the spec's line."""
        where = self.name if row is None else f"{self.name}, row {row}"
        span = span_of(self.place, self.folder)
        return fail(code, f"{where}: {message}", span, notes=(*notes, *place_notes(self.place, self.folder)), help=help)


class DataFile(Rows):
    """One data file."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The rows with their numbers from 1; raises SURG050 where the file or a row cannot be read."""
        if not self.name.endswith(SUFFIXES):
            raise self.fail("SURG050", "not a kind of file that is read", help=f"known here: {', '.join(SUFFIXES)}")
        number = 0
        try:
            for number, row in self._read():
                yield number, row
        except IsADirectoryError as error:
            raise self.fail("SURG050", "this is a folder, not a file") from error
        except FileNotFoundError as error:
            relative = "; paths are relative to the spec" if self.folder != Path.cwd() else ""
            raise self.fail("SURG050", "there is no such file", help=f"looked for {self.path}{relative}") from error
        except (OSError, EOFError, zlib.error) as error:
            raise self.fail("SURG050", f"cannot be read: {error}", number + 1 if number else None) from error

    def _read(self) -> Iterator[tuple[int, Row]]:
        if self.name.endswith(".parquet"):
            yield from _parquet_rows(self)
            return
        read = _json_rows if ".jsonl" in self.name[-len(".jsonl.gz") :] else _csv_rows
        with _opened(self.path) as stream:
            yield from read(self, stream)


def _opened(path: Path) -> Stream:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")


def _parquet_rows(file: DataFile) -> Iterator[tuple[int, Row]]:
    parquet = needed("pyarrow.parquet", "data", f"reading {file.name}", span_of(file.place, file.folder))
    from pyarrow import ArrowException

    number = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            rows = (row for part in table.iter_batches(batch_size=1000) for row in part.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, row
    except ArrowException as error:
        said = " ".join(str(error).split())[:200]
        raise file.fail("SURG050", f"not Parquet: {said}", number + 1 if number else None) from error


def _lines(file: DataFile, stream: Stream) -> Iterator[tuple[int, str]]:
    number = 0
    while line := stream.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            raise file.fail("SURG050", f"a line of more than {LARGEST_ROW >> 20} MiB", number)
        try:
            # A byte order mark, which some editors write, belongs to the first line only.
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise file.fail("SURG050", f"not UTF-8: {error}", number) from error


def _json_rows(file: DataFile, stream: Stream) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(file, stream):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise file.fail("SURG050", f"not JSON: {error}", number, "one JSON object per line") from error
        if not isinstance(row, dict):
            raise file.fail("SURG050", "not a JSON object", number, 'a row looks like {"text": "...", "label": "..."}')
        yield number, row


def _csv_rows(file: DataFile, stream: Stream) -> Iterator[tuple[int, Row]]:
    # csv needs the line ends as they are: a quoted field may hold some. The limit is global to the csv module.
    before = csv.field_size_limit(LARGEST_ROW)
    number = 0
    try:
        reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        header = next(reader, [])
        if not header or len(set(header)) != len(header):
            raise file.fail("SURG050", "the first line must name the columns, each once")
        for number, values in enumerate(reader, start=1):
            if not values:
                continue
            if len(values) != len(header):
                raise file.fail("SURG050", f"{len(values)} fields where the header has {len(header)}", number)
            yield number, dict(zip(header, values, strict=True))
    except UnicodeDecodeError as error:
        raise file.fail("SURG050", f"not UTF-8: {error}", number + 1) from error
    except csv.Error as error:
        raise file.fail("SURG050", f"not CSV: {error}", number + 1) from error
    finally:
        csv.field_size_limit(before)
