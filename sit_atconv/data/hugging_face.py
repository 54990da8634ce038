"""Images of a Hugging Face data set, through the library `datasets` (extra `data`)."""

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sit_atconv.data.file_store import FileStore, NameTable
from sit_atconv.data.image_rules import ALL_RULES, MOST_CLASSES, RULES
from sit_atconv.runtime.names import show_some

if TYPE_CHECKING:
    from datasets import Dataset

OPTIONS = ("image", "label", "config")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")  # preferred to other columns of class labels
KINDS = {".parquet": "parquet", ".arrow": "arrow"}  # suffix of a file -> its builder
FORM = "NAME_OR_PATH[:SPLIT[:image=COLUMN,label=COLUMN,config=NAME]]"


class HuggingFaceImages(FileStore):
    """The images of one split.

    Images are named by their files if the data set kept the names: `n01440764_36.JPEG`, or `class/name` if it has more
    than one class and names without folders; otherwise by their row.

    Args:
        name: hf:NAME_OR_PATH[:SPLIT[:image=COLUMN,label=COLUMN,config=NAME]]: a name on the hub, a folder with parquet
            files or saved by `save_to_disk`, or one parquet or arrow file. By default the split is train, the image
            is in the only column of images, and the label in the column called so, or the only one of class labels.

    Raises:
        ValueError: `datasets` is not installed, nothing can be opened, or there is no such split or column.
    """

    only_images = True

    def __init__(self, name: str):
        self.place = name
        source, split, chosen = _parse(name)
        rows = _load(name, source, split, chosen.get("config"))
        self.column = _image_column(name, rows, chosen.get("image"))
        label_column = _label_column(name, rows, chosen.get("label"))
        self.class_names: tuple[str, ...] = ("images",)
        self.row_labels = np.zeros(len(rows), np.int64)
        if label_column:
            self.class_names, self.row_labels = _labels(name, rows, label_column)
        from datasets import Image

        self.rows = rows.select_columns([self.column]).cast_column(self.column, Image(decode=False))
        self.table = NameTable(_names(self.rows, self.column, self.class_names, self.row_labels))

    def names(self, is_ignored: Callable[[str], bool]) -> Iterator[str]:
        return iter(self.table)

    def folders(self) -> Iterable[str]:
        return ()

    def open(self, name: str) -> Path | io.BytesIO:
        (place,) = self.table.find([name]).tolist()
        image = None if place < 0 else self.rows[place][self.column]
        if image is None:
            raise ValueError("cannot be read as an image: there is none in its row")
        return Path(image["path"]) if image["bytes"] is None else io.BytesIO(image["bytes"])

    def read(self, name: str) -> bytes | None:
        if self.table.find([name]) < 0:
            return None
        image = self.open(name)
        return image.read_bytes() if isinstance(image, Path) else image.getvalue()

    def labels(self, names: Sequence[str]) -> tuple[tuple[str, ...], list[int]] | None:
        return self.class_names, self.row_labels[self.table.find(names)].tolist()


def _parse(name: str) -> tuple[str, str | None, dict[str, str]]:
    source, _, rest = name.removeprefix("hf:").partition(":")
    split, _, options = rest.partition(":")
    chosen = dict(option.partition("=")[::2] for option in options.split(",") if option)
    if not source or not all(key in OPTIONS and value for key, value in chosen.items()):
        raise ValueError(f"{name} is not hf:{FORM}")
    return source, split or None, chosen


def _load(name: str, source: str, split: str | None, config: str | None) -> "Dataset":
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name} needs the library datasets: pip install 'sit-atconv[data]'") from error
    path = Path(source)
    if path.is_file() and path.suffix not in KINDS:
        raise ValueError(f"{name} is a file of another kind: give a .parquet or .arrow file, or a folder")
    with _opening(name):
        if path.is_file():
            found: Any = datasets.load_dataset(KINDS[path.suffix], data_files=str(path))
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(source)
        else:
            found = datasets.get_dataset_split_names(source, config)
    if isinstance(found, list):  # only the chosen split is downloaded and prepared
        chosen = _choose_split(name, split, found)
        with _opening(name):
            return datasets.load_dataset(source, config, split=chosen)
    if isinstance(found, datasets.DatasetDict):
        return found[_choose_split(name, split, list(found))]
    if split is not None and split != str(found.split):
        raise ValueError(f"{name} has no split {split}: it is one split, {found.split or 'without a name'}")
    return found


@contextlib.contextmanager
def _opening(name: str) -> Iterator[None]:
    """Turns the library's errors, which are of many types, into a ValueError with one line."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} cannot be opened ({reason}): give hf:{FORM}") from error


def _choose_split(name: str, split: str | None, splits: Sequence[str]) -> str:
    """Returns the split that was asked for, or train, or the only one. ValueError: there is none such."""
    wanted = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if wanted not in splits:
        raise ValueError(f"{name} has no split {wanted}: its splits are {show_some(list(splits))}")
    return wanted


def _image_column(name: str, rows: "Dataset", wanted: str | None) -> str:
    import datasets

    columns = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if wanted is None and len(columns) == 1:
        return columns[0]
    if wanted is not None:
        if wanted in columns:
            return wanted
        what = f"no column {wanted} of images"
    else:
        what = f"{len(columns)} columns of images" if columns else "no column of images"
    among = columns or list(rows.features)
    raise ValueError(f"{name} has {what}: name one of {show_some(among)}, hf:{FORM}")


def _label_column(name: str, rows: "Dataset", wanted: str | None) -> str | None:
    import datasets

    if wanted is not None and wanted not in rows.features:
        raise ValueError(f"{name} has no column {wanted}: its columns are {show_some(list(rows.features))}")
    classes = [column for column, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    if wanted is not None and not _may_be_label(rows.features[wanted]):
        raise ValueError(f"{name} has no labels in the column {wanted}: labels are classes, whole numbers or names")
    usual = [column for column in LABEL_COLUMNS if column in rows.features and _may_be_label(rows.features[column])]
    if not wanted and not usual and len(classes) > 1:
        raise ValueError(f"{name} has several columns of labels: name one of {show_some(classes)}, hf:{FORM}")
    return wanted or next(iter([*usual, *classes]), None)


def _may_be_label(kind: object) -> bool:
    import datasets

    return isinstance(kind, datasets.ClassLabel) or str(getattr(kind, "dtype", "")).startswith(
        ("int", "uint", "string")
    )


def _labels(name: str, rows: "Dataset", column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Returns class names, and the label of each row. ValueError: a row has none, or one that is no class."""
    found, kind = np.array(rows.select_columns([column])[:][column], dtype=object), rows.features[column]
    if lacking := np.flatnonzero(found == None).tolist():  # noqa: E711  # of each element
        raise ValueError(f"{name} has no {column} in {len(lacking)} rows, the first is row {lacking[0]}")
    if all(type(value) is str for value in found):
        class_names = sorted(set(found), key=ALL_RULES[RULES].class_order)
        of_name = {class_name: label for label, class_name in enumerate(class_names)}
        return tuple(class_names), np.array([of_name[value] for value in found], np.int64)
    named = getattr(kind, "names", None)
    most = len(named) if named else MOST_CLASSES
    if wrong := [value for value in found if type(value) is not int or not 0 <= value < most]:
        classes = f"the {len(named)} classes" if named else "whole numbers from 0"
        raise ValueError(f"{name} has the label {wrong[0]!r} in the column {column}: labels are {classes}")
    return tuple(named or map(str, range(max(found) + 1))), found.astype(np.int64)


def _names(rows: "Dataset", column: str, class_names: Sequence[str], labels: np.ndarray) -> list[str]:
    import pyarrow

    if rows._indices is not None:  # only the rows in this order
        rows = rows.flatten_indices()
    chunks = rows.data.column(column).chunks
    paths = pyarrow.chunked_array([chunk.field("path") for chunk in chunks], type=pyarrow.string()).to_pylist()
    numbers = [f"{row:08d}" for row in range(len(paths))]
    if None in paths:
        return numbers
    if all(map(os.path.isabs, paths)):
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
        paths = [os.path.relpath(path, shared) for path in paths]
    elif len(class_names) > 1 and not any("/" in path for path in paths):
        paths = [f"{class_names[label]}/{path}" for label, path in zip(labels, paths, strict=True)]
    return paths if len(set(paths)) == len(paths) else numbers
