import unicodedata

import pytest

from sit_atconv.generation.labels import class_label, read_labels, typed_label

NAMES = ["goldfish", "golden retriever", "7"]
CAFE = unicodedata.normalize("NFD", "café")
NUMBERS = ["1", "10", "2"]  # class folders sorted as text, as in runs before 2026-11-25


def test_in_python_an_int_is_a_label_and_a_string_a_name():
    assert [class_label(given, NAMES) for given in (1, "goldfish", "7")] == [1, 0, 2]
    assert [class_label(given, NUMBERS) for given in (2, "2", "10")] == [2, 2, 1]
    for name in ("1", "label:1", "name:7"):
        with pytest.raises(ValueError, match=f"there is no class '{name}'"):
            class_label(name, NAMES)


def test_typed_digits_are_a_label_and_other_words_a_name():
    for text, label in (("1", 1), ("goldfish", 0), ("label:2", 2), ("name:7", 2), (" golden retriever ", 1)):
        assert typed_label(text, NAMES) == label
    assert [typed_label(text, NUMBERS) for text in ("label:1", "name:1", "name:10", "0")] == [1, 0, 1, 0]
    assert typed_label("2", NUMBERS) == 2  # label and name mean the same class
    assert [typed_label(text, ["label", "name"]) for text in ("label", "name", "name:label")] == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("1", NUMBERS, r"1 can mean the label 1 \(class '10'\) or the class named '1' .* write label:1 or name:1$"),
        ("7", NAMES, r"7 can mean a label out of range \(0 ... 2\) or the class named '7' \(label 2\): write name:7$"),
        ("3", NAMES, "class 3 is out of range: the model knows 0 ... 2"),
        ("-1", NAMES, "class -1 is out of range"),
        ("label:3", NAMES, "class 3 is out of range"),
        ("label:goldfish", NAMES, "'label:goldfish' is no label"),
        ("name:1", NAMES, "there is no class '1'"),
        ("gold fish", NAMES, "no class 'gold fish'; similar names: 'goldfish'"),
        ("", NAMES, "no class ''"),
    ],
)
def test_errors_of_typed_labels(text, names, message):
    with pytest.raises(ValueError, match=message):
        typed_label(text, names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "class 3 is out of range: the model knows 0 ... 2"),
        (-1, "class -1 is out of range"),
        (3.7, "a class is a label or a name, not 3.7"),
        (True, "a class is a label or a name, not True"),
    ],
)
def test_errors_in_python(given, message):
    with pytest.raises(ValueError, match=message):
        class_label(given, NAMES)


def test_names_are_compared_in_one_unicode_form():
    names = [CAFE, "with space ", "tea"]
    assert CAFE != "café" and class_label("café", names) == class_label(CAFE, names) == typed_label("café", names) == 0
    assert typed_label("with space", names) == 1
    with pytest.raises(ValueError, match="no class 'cafe'; similar names: 'café'"):
        class_label("cafe", names)


@pytest.mark.parametrize("names", [["crane", "dog", "crane"], [CAFE, "dog", " café"]])
def test_a_name_shared_by_several_classes_is_refused(names):
    for parse in (class_label, typed_label):
        with pytest.raises(ValueError, match=r"2 classes are named .*: give one of the labels 0, 2"):
            parse(names[0], names)


def test_a_file_has_a_class_on_each_line(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xef\xbb\xbf0\r\ngolden retriever\r\n 2 \nname:7\n\n")  # some editors write such files
    assert read_labels(path, NAMES) == [0, 1, 2, 2]
    path.write_text("0\n1\n")
    with pytest.raises(ValueError, match=r"line 2 of .*labels\.txt: 1 can mean"):
        read_labels(path, NUMBERS[::-1])
    path.write_text("0\n\n1\n")
    with pytest.raises(ValueError, match=r"line 2 of .*labels\.txt: there is no class ''"):
        read_labels(path, NAMES)
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_labels(path, NAMES)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is not text"):
        read_labels(path, NAMES)
    with pytest.raises(ValueError, match="give random, balanced, or a text file"):
        read_labels(tmp_path / "sorted", NAMES)
