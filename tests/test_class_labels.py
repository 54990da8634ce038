import pytest

from sit_atconv.class_labels import class_label, read_labels

NAMES = ["goldfish", "golden retriever", "7"]


def test_numbers_and_names():
    assert [class_label(given, NAMES) for given in (1, "1", "goldfish", "7")] == [1, 1, 0, 2]


@pytest.mark.parametrize(("given", "message"), [
    (3, "class 3 is out of range: the model knows 0 ... 2"), ("-1", "class -1 is out of range"),
    (3.7, "a class is a number or a name, not 3.7"),
    ("gold fish", "no class 'gold fish'; near it: 'goldfish'"), ("", "no class ''; near it: 'goldfish'")])
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        class_label(given, NAMES)


def test_a_file_has_a_class_on_each_line(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xef\xbb\xbf0\r\ngolden retriever\r\n 2 \n\n")  # as some editors leave it
    assert read_labels(path, NAMES) == [0, 1, 2]
    path.write_text("0\n\n1\n")
    with pytest.raises(ValueError, match=r"line 2 of .*labels\.txt: there is no class ''"):
        read_labels(path, NAMES)
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_labels(path, NAMES)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="it is no text"):
        read_labels(path, NAMES)
    with pytest.raises(ValueError, match="give random, balanced, or a text file"):
        read_labels(tmp_path / "sorted", NAMES)
