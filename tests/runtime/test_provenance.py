"""A run's provenance: command line, commit, versions."""

import json
import shlex
import subprocess
import sys

import pytest

from sit_atconv.runtime import provenance
from sit_atconv.runtime.provenance import describe, record_provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, in the place of ours."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "file").write_text("1")
    for arguments in (
        ["init", "-q"],
        ["add", "file"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


def test_it_names_command_and_versions():
    found = describe()
    assert shlex.split(found["command"]) == sys.orig_argv
    assert found["versions"]["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert all(found["versions"].values()), found


def test_it_names_the_commit_and_whether_files_differ_from_it(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    (checkout / "untracked").touch()
    assert (describe()["commit"], describe()["dirty"]) == (head, False)
    (checkout / "file").write_text("2")
    assert describe()["dirty"] is True


def test_what_cannot_be_found_is_none(checkout, monkeypatch):
    (checkout / "site-packages").mkdir()
    monkeypatch.setattr(provenance, "ROOT", checkout / "site-packages")  # in a checkout, but not its root
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    found = describe()
    assert found["commit"] is None and found["dirty"] is None and found["versions"]["no-such-package"] is None
    monkeypatch.setattr(provenance, "ROOT", checkout)
    monkeypatch.setenv("PATH", "")
    assert describe()["commit"] is None


def test_sessions_are_appended_and_a_damaged_file_stops_no_run(tmp_path):
    for count in (1, 2):
        record_provenance(tmp_path)
        sessions = json.loads((tmp_path / "provenance.json").read_text())
        assert len(sessions) == count and sessions[-1]["command"]
    (tmp_path / "provenance.json").write_text("[")
    record_provenance(tmp_path)
    assert len(json.loads((tmp_path / "provenance.json").read_text())) == 1
