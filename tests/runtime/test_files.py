"""Files that are whole or not there, and folders held by one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sit_atconv.runtime.files import check_room, exclusive, sha256_of, sha256_of_state, write_aside


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def half(partial: Path):
        partial.write_text("ha")
        assert path.read_text() == "before" and partial.name == ".partial-file"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aside(path, half)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    write_aside(path, "nächste", durable=True)
    assert path.read_bytes() == "nächste".encode() and list(tmp_path.iterdir()) == [path]


HOLD = """
import os, sys
from pathlib import Path
from sit_atconv.runtime.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    if child := os.fork():
        input()
    else:
        import time; time.sleep(20)
"""


def test_a_folder_is_held_until_left_or_dead(tmp_path):
    """And a forked child that outlives its parent holds nothing."""
    folder = tmp_path / "new" / "folder"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on .*wait until"), exclusive(folder):
        pass
    holder.kill()
    holder.wait()
    with exclusive(folder):
        assert (folder / ".lock").exists()
    assert list(folder.iterdir()) == []


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with exclusive(tmp_path):
        pass
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_room_on_the_disk(tmp_path):
    check_room(tmp_path / "not" / "there", 1000)
    with pytest.raises(ValueError, match=r"there needs 1000000000\.0 GB and its disk has \d+\.\d GB free"):
        check_room(tmp_path / "there", 10**18)


def test_sha256_of_several_files_is_that_of_their_content(tmp_path):
    import hashlib

    (tmp_path / "a").write_bytes(b"x" * 5_000_000)
    (tmp_path / "b").write_bytes(b"y")
    assert sha256_of(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"x" * 5_000_000 + b"y").hexdigest()


def test_digests_of_named_tensors_are_those_on_disk():
    """Of the weights of VAEs and of extractors without a file, by the code before they had one function."""
    state = {"b.weight": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(7), "c": torch.ones(3).bfloat16()}
    of_vae = sha256_of_state({"b.weight": state["b.weight"]}, lambda name, tensor: f"{name}\0", "[1]")
    of_extractor = sha256_of_state(state, lambda name, tensor: f"{name} {tensor.dtype} {tuple(tensor.shape)}")
    assert of_vae == "8fe8846a2a4eec14943caef2d4a9679dbb33112706c046192bdba52cbf2c146b"
    assert of_extractor == "38d64c58fd9eb3338e168798804127941a85865af8b1ba92643ad3b4c43ea571"
