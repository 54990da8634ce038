from sit_atconv.runtime.names import is_object_path, name_classes


def test_many_classes_are_not_all_named():
    names = ["cat", "dog", "emu"]
    assert name_classes(names, [2]) == "1 class: 2 ('emu')"
    assert (
        name_classes(names, [0, 1, 2], " without images", most=2)
        == "3 classes without images: 0 ('cat'), 1 ('dog') and 1 more"
    )


def test_what_is_the_path_of_an_object(tmp_path, monkeypatch):
    assert is_object_path("my_module.MyCodec") and is_object_path("a.b.C")
    assert not any(map(is_object_path, ["digits", "owner/sd-vae", "./a.b", "../x", "a-b.c", "1.5", "a..b"]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.v2").mkdir()
    assert not is_object_path("images.v2")
