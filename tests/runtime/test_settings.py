"""Settings that differ, in words."""

from sit_atconv.runtime.settings import changed, differences, flatten, is_among


def test_nested_names_are_joined_by_dots():
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": []}, "f": {}}) == {"a": 1, "b.c.d": 2, "b.e": []}


def test_what_differs():
    then = {"lr": 0.1, "data": {"files": "a" * 64, "crop": "none"}, "gone": 1, "same": {"a": [1, 2]}}
    now = {"lr": 0.2, "data": {"files": "b" * 64, "crop": "adm"}, "new": True, "same": {"a": [1, 2]}, "none": None}
    words = [
        "lr 0.1 -> 0.2",
        f"data.files {'a' * 12} -> {'b' * 12}",
        "data.crop none -> adm",
        "gone 1 -> None",
        "new None -> True",
    ]
    assert differences(then, now) == words
    assert differences(then, now, ignored=["data", "lr", "gone"]) == words[-1:]
    assert changed({"a": {"b": 1}}, {"a": {"b": 2}}) == {"a.b": (1, 2)}


def test_a_setting_is_among_its_groups():
    assert is_among("a.b", ["a"]) and is_among("a", ["a"])
    assert not is_among("ab", ["a"]) and not is_among("a", ["a.b"])
