"""Tables of parts, and parts of the user's own."""

import sys

import pytest

from sit_atconv.runtime.tables import Table, import_module_of, import_modules


@pytest.fixture
def table():
    return Table("colour", str, {"red": "#f00", "green": "#0f0"})


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's module in the working directory, not imported yet."""
    (tmp_path / "own_colours.py").write_text("BLUE = '#00f'\nSEVEN = 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "own_colours"
    sys.modules.pop("own_colours", None)


def test_entries_by_name(table):
    assert table.find("red") == "#f00" and [*table] == ["red", "green"]
    assert table.register("black", "#000") == table.find("black") == "#000"
    with pytest.raises(ValueError, match="'red' cannot be registered: the name is taken"):
        table.register("red", "#e00")
    with pytest.raises(ValueError, match="cannot be registered: a name with a dot"):
        table.register("a.b", "#e00")
    with pytest.raises(ValueError, match="colour must be one of red, green, black, or your own"):
        table.find("rde")


def test_own_parts_are_found_by_path_once_their_module_is_imported(table, own_module):
    with pytest.raises(ValueError, match="BLUE is not known here: give --import own_colours"):
        table.find("own_colours.BLUE")
    assert own_module not in sys.modules  # a name in a file imports nothing
    assert import_module_of("own_colours.BLUE") == "own_colours.BLUE"
    assert table.find("own_colours.BLUE") == "#00f"
    for name in ("own_colours.SEVEN", "own_colours.PINK"):
        with pytest.raises(ValueError, match=f"colour {name} is not a str"):
            table.find(name)


def test_what_cannot_be_imported_is_named(own_module):
    import_modules([own_module])
    assert import_module_of("red") == "red"
    with pytest.raises(ValueError, match="the module nowhere cannot be imported"):
        import_modules(["nowhere"])
