"""Reading rows from a local .json, .jsonl, .csv, .parquet or plain text file, or from a data set on the Hub.

Local files are parsed here, so that an error can name the line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from loftq_exp.config import TaskConfig, local_path
from loftq_exp.errors import UserError

Row = dict[str, Any]
Split = Literal["train", "validation", "eval"]
LocatedRow = tuple[str, Any]
"""The place of a row ("line 7", or "row 7" if lines are unknown), and the row, not yet checked."""


@dataclass(frozen=True)
class DataSource:
    """The source of the rows of one split: `file` if it is given, otherwise `dataset` on the Hub."""

    split: Split
    file: str | None
    dataset: str | None
    dataset_config: str | None
    dataset_split: str
    dataset_revision: str | None = None
    text_column: str | None = None
    """The column for the lines of a .txt file; None: the task reads no plain text."""

    @classmethod
    def of(cls, config: TaskConfig, split: Split) -> DataSource:
        """Return the source of `split` in the task's settings."""
        part = "" if split == "validation" else {"train": config.train_split, "eval": config.eval_split}[split]
        return cls(
            split=split,
            file=getattr(config, f"{split}_file"),
            dataset=config.dataset,
            dataset_config=config.dataset_config,
            dataset_split=part or config.validation_split or "",
            dataset_revision=config.dataset_revision,
        )

    @property
    def is_given(self) -> bool:
        """Whether the settings name a file or a split; a validation needs none."""
        return bool(self.file or self.dataset_split)

    def parts(self) -> list[DataSource]:
        """Return the sources joined by `+`, in order. An existing file whose name contains `+` is one source.

        Raises UserError if two of them have the same name or one has none.
        """
        whole = self.file or self.dataset_split
        if "+" not in whole or (self.file and local_path(self.file).exists()):
            return [self]
        pieces = [piece.strip() for piece in whole.split("+")]
        parts = [replace(self, file=piece) if self.file else replace(self, dataset_split=piece) for piece in pieces]
        names = [part.name for part in parts]
        if len(set(names)) < len(names) or "" in names:
            name = self.file_setting if self.file else f"task.{self.split}_split"
            raise UserError(
                f"{name}={whole}: the last words of its parts' names must differ, and are "
                f"{', '.join(names)}; rename the parts, as in x_matched+x_mismatched"
            )
        return parts

    @property
    def name(self) -> str:
        """The source's name among joined sources: the last word of its split or file ("r1" of "test_r1")."""
        return (self.dataset_split if self.file is None else Path(self.file).stem).rpartition("_")[2]

    @property
    def formats(self) -> str:
        """The supported file formats, for error messages."""
        return ".json, .jsonl, .csv, .parquet or .txt" if self.text_column else ".json, .jsonl, .csv or .parquet"

    @property
    def file_setting(self) -> str:
        """The name of the setting that holds `file`."""
        return f"task.{self.split}_file"

    @property
    def label(self) -> str:
        """The source as setting and value, for error messages."""
        if self.file:
            return f"{self.file_setting}={self.file}"
        config = f", task.dataset_config={self.dataset_config}" if self.dataset_config else ""
        return f"task.dataset={self.dataset}{config}, task.{self.split}_split={self.dataset_split}"


def read_rows(source: DataSource, flaw: Callable[[Row], str | None], limit: int | None = None) -> list[Row]:
    """Return the first `limit` rows of `source`, or all. `flaw(row)` returns why a row is unusable, or None.

    Raises UserError for a file that is missing, unreadable, empty or malformed, for a data set that cannot be loaded, and
    for the first row with a flaw. The error is one line that names the setting, its value, the place and what to do.
    """
    rows = []
    for place, row in islice(_file_rows(source) if source.file else _hub_rows(source), limit):
        problem = flaw(row) if isinstance(row, dict) else f"is not an object with named columns but {shown(row)}"
        if problem:
            raise UserError(
                f"{source.label}: {place} {problem}; mend the data or give {source.file_setting}=ANOTHER_FILE"
            )
        rows.append(row)
    if not rows:
        raise UserError(
            f"{source.label}: there are no rows in it; give {source.file_setting}=FILE with one row or more"
        )
    return rows


def data_digest(source: DataSource) -> str:
    """Return `sha256:` with the digest of a local file's bytes, or `fingerprint:` with that of a Hub data set.

    Raises UserError if the data cannot be read.
    """
    if source.file:
        return "sha256:" + hashlib.sha256(_file_bytes(source)).hexdigest()
    return f"fingerprint:{_hub_dataset(source)._fingerprint}"


def shown(value: object) -> str:
    """Return `value` as one short line for messages, however long or deep the value is."""
    return _SHORT.repr(value)[:_SHOWN]


_SHOWN = 40
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 2 * _SHOWN, 2 * _SHOWN, 2 * _SHOWN

_LINE_END = re.compile("\r\n?|\n")
"""Line ends of all systems. Other Unicode separators may occur inside a text."""


def with_line_feeds(text: str) -> str:
    """Return `text` with each line end (CR LF, or CR) as LF, so that it has the same tokens on every system."""
    return _LINE_END.sub("\n", text) if "\r" in text else text


# Local files ----------------------------------------------------------------------------------------------------------


def _file_rows(source: DataSource) -> Iterator[LocatedRow]:
    extension = Path(source.file or "").suffix.lower()
    if extension == ".parquet":
        return _parquet_rows(source)
    if extension not in (".json", ".jsonl", ".csv") and not (extension == ".txt" and source.text_column):
        raise UserError(f"{source.label}: the extension '{extension}' is not known; give a {source.formats} file")
    text = _file_text(source)
    if extension == ".txt":
        return ((f"line {n}", {source.text_column: line}) for n, line in enumerate(_LINE_END.split(text), start=1))
    if extension == ".csv":
        return _csv_rows(source, text)
    # Many .json files hold one object per line, like .jsonl files. Only an array is one document.
    is_array = extension == ".json" and text.lstrip().startswith("[")
    return _json_array_rows(source, text) if is_array else _json_line_rows(source, text)


def _file_bytes(source: DataSource) -> bytes:
    path = local_path(source.file or "")
    if path.is_dir():
        raise UserError(f"{source.label}: this is a folder; give a {source.formats} file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{source.label}: there is no such file (looked for {path.absolute()}); give a file that exists"
        ) from None
    except OSError as error:
        raise UserError(
            f"{source.label}: the file cannot be read ({error.strerror}); check it and its permissions"
        ) from None


def _file_text(source: DataSource) -> str:
    data = _file_bytes(source)
    if not data.strip():
        raise UserError(f"{source.label}: the file is empty; give a file with one row or more")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = _line_of(bytes(error.object[: error.start]).decode())  # without the byte order mark
        raise UserError(f"{source.label}: line {line} is not UTF-8 text; save the file as UTF-8") from None
    if "\0" in text:
        line = _line_of(text[: text.index("\0")])
        raise UserError(
            f"{source.label}: line {line} holds a NUL, as UTF-16 and binary files do; save the file as UTF-8 text"
        )
    return text


def _line_of(before: str) -> int:
    """Return the number of the line that follows the text `before`."""
    return len(_LINE_END.findall(before)) + 1


def _json_line_rows(source: DataSource, text: str) -> Iterator[LocatedRow]:
    is_json = Path(source.file or "").suffix.lower() == ".json"
    expected = f"{'an array of JSON objects or ' if is_json else ''}one JSON object a line"
    # Not splitlines(), which also splits at U+2028 and similar separators that JSON allows inside a string.
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.strip():
            yield f"line {number}", _parsed_json(source, line, number, expected)


def _json_array_rows(source: DataSource, text: str) -> Iterator[LocatedRow]:
    for number, row in enumerate(_parsed_json(source, text, 1, "an array of JSON objects"), start=1):
        yield f"row {number}", row


def _parsed_json(source: DataSource, text: str, first_line: int, expected: str) -> Any:
    """Return the JSON value of `text`, which starts on line `first_line` of the file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, a name twice, thousands of brackets
        line, reason = first_line, str(error)
    raise UserError(f"{source.label}: line {line} is malformed ({reason}); {expected} is needed")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object. Raises ValueError for a duplicate name, which is ambiguous."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{shown(_twice([name for name, _ in pairs]))} stands twice in an object")
    return found


def _twice(names: list[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])


def _csv_rows(source: DataSource, text: str) -> Iterator[LocatedRow]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        while (cells := _next_cells(reader, len(text))) is not None:
            if not header:
                header = cells
                named = [name for name in header if name]  # exports often have unnamed columns
                if len(set(named)) < len(named):
                    raise csv.Error(f"the header has column {shown(_twice(named))} twice")
            elif cells:  # a blank line has no cells
                if len(cells) != len(header):
                    raise csv.Error(f"{len(cells)} cells where the header has {len(header)}")
                yield f"line {line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1  # a quoted cell may span lines; a row is located by its first line
    except csv.Error as error:
        raise UserError(
            f"{source.label}: line {line} is malformed ({error}); give one row a line under a header line"
        ) from None


def _parquet_rows(source: DataSource) -> Iterator[LocatedRow]:
    from pyarrow import ArrowException, BufferReader, parquet  # imported here: it takes a second

    try:
        table = parquet.read_table(BufferReader(_file_bytes(source)))
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source.label}: not a Parquet file ({reason:.100}); give a {source.formats} file") from None
    return ((f"row {number}", row) for number, row in enumerate(table.to_pylist(), start=1))


def _next_cells(reader: Iterator[list[str]], longest: int) -> list[str] | None:
    """Return the next row's cells, each of at most `longest` characters. None at the end."""
    limit = csv.field_size_limit(longest)  # a global of the csv module, 128 KiB by default
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


# The hub --------------------------------------------------------------------------------------------------------------


def _hub_rows(source: DataSource) -> Iterator[LocatedRow]:
    for number, row in enumerate(_hub_dataset(source), start=1):
        yield f"row {number}", row


def _hub_dataset(source: DataSource) -> Any:
    """Return the `datasets.Dataset` of `source`, from the Hub or from the library's cache."""
    remedy = f"give {source.file_setting}=FILE ({source.formats}) with the same columns"
    if not source.dataset:
        raise UserError(
            f"{source.file_setting}=null: there is neither a local file nor a data set to read; "
            f"{remedy}, or task.dataset=HUB_ID"
        )
    import datasets  # imported here: it takes a second and local files do not need it

    try:
        found = datasets.load_dataset(
            source.dataset, source.dataset_config, split=source.dataset_split, revision=source.dataset_revision
        )
    except ConnectionError as error:
        raise UserError(
            f"{source.label}: the hub cannot be reached ({error}); check the network and HF_HUB_OFFLINE, or {remedy}"
        ) from error
    except Exception as error:
        # Other errors of the library (unknown data set, configuration or split; gated; damaged) concern the data.
        settings = "these settings" if source.dataset_config else "these settings and task.dataset_config"
        raise UserError(
            f"{source.label}: the data set cannot be loaded ({error}); check {settings}, or {remedy}"
        ) from error
    _check_revision(source, found)
    return found


def _check_revision(source: DataSource, found: Any) -> None:
    """Raise UserError if the rows are known to be those of another revision.

    If the hub cannot be reached, `datasets` takes the copy that was cached last, whatever its revision.
    """
    from huggingface_hub import constants  # imported here: local files do not need it

    revision = source.dataset_revision
    if not revision or not found.cache_files:
        return
    taken = Path(found.cache_files[0]["filename"]).parent.name  # a copy's folder has the name of its commit
    folder = f"datasets--{(source.dataset or '').replace('/', '--')}"
    named = Path(constants.HF_HUB_CACHE, folder, "refs", revision)
    asked = revision if re.fullmatch("[0-9a-f]{40}", revision) else named.read_text() if named.is_file() else taken
    if re.fullmatch("[0-9a-f]{40}", taken) and taken != asked.strip():
        raise UserError(
            f"{source.label}, task.dataset_revision={revision}: the hub cannot be reached, and the copy in the local cache "
            f"is of another commit ({taken}); connect to the network, or give {source.file_setting}=FILE"
        )
