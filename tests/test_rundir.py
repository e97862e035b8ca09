"""The run directory: files are whole or absent, runs that differ are told apart, masks are packed as documented."""

import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duramen.problem import Exit, Problem
from duramen.recipe import resolve_step
from duramen.rundir import (
    BlockStore,
    Finished,
    RunDirectory,
    hash_named,
    pack_mask,
    replacing,
    unpack_mask,
    write_json,
    write_tensors,
    write_text,
)

FINGERPRINT = {"model": {"model.safetensors": "a1"}, "calibration tokens": "b2", "recipe": {"layers": [{"sparsity": 0.5}]}}


def test_the_same_run_goes_on_and_others_are_refused(tmp_path):
    directory = RunDirectory(tmp_path / "out")
    directory.claim(FINGERPRINT)
    RunDirectory(tmp_path / "out").claim(FINGERPRINT)
    changed = {"model": {"model.safetensors": "a2"}, "calibration tokens": "b3", "recipe": {"layers": [{"sparsity": 0.6}]}}
    with pytest.raises(Problem, match="holds another run") as caught:
        RunDirectory(tmp_path / "out").claim(changed)
    for line in ('model.model.safetensors: "a1" -> "a2"', 'tokens: "b2" -> "b3"', "recipe.layers[0].sparsity: 0.5 -> 0.6"):
        assert line in caught.value.what
    assert caught.value.code == Exit.INCOMPATIBLE


def test_other_steps_follow_those_that_are_the_same(tmp_path):
    steps = [("a", {"x": 1}), ("b", {"x": 2}), ("c", {"x": 3})]

    def claim(*steps, **options):
        return RunDirectory(tmp_path).claim(FINGERPRINT, steps, **options)

    assert claim(*steps) == []
    for name in "abc":
        (tmp_path / name).mkdir()
    assert claim(*steps) == []
    assert claim(steps[0], ("b", {"x": 5}), steps[2]) == ["steps[1].x: 2 -> 5"]
    assert sorted(item.name for item in tmp_path.iterdir()) == [".duramen", "a"]
    aside = tmp_path / ".duramen" / "aside"
    assert sorted(item.name for item in aside.iterdir()) == ["b-0", "c-0"]
    (tmp_path / "b").mkdir()
    assert claim(steps[0]) == [
        'steps[1].folder: "b" -> null',
        "steps[1].x: 5 -> null",
        'steps[2].folder: "c" -> null',
        "steps[2].x: 3 -> null",
    ]
    assert (aside / "b-1").is_dir()
    assert claim(*steps[:2]) == ['steps[1].folder: null -> "b"', "steps[1].x: null -> 2"]
    with pytest.raises(Problem, match=r"differs in:\n    steps\[0\]\.x: 1 -> 2"):
        claim(("a", {"x": 2}), steps[1])
    with pytest.raises(Problem, match=r"steps\[1\]\.x: 2 -> 3"):
        claim(steps[0], ("b", {"x": 3}), until=tmp_path / ".duramen" / "fingerprint.json")
    with pytest.raises(Problem, match="holds another run"):
        claim(("a", {"x": 2}), beside=["stages"])
    (tmp_path / "stages").mkdir()
    assert claim(("a", {"x": 2}), beside=["stages"])
    file = tmp_path / ".duramen" / "fingerprint.json"
    for name in ("../a", "/a"):
        file.write_text(file.read_text().replace('"folder": "a"', f'"folder": "{name}"'))
        with pytest.raises(Problem, match="cannot be understood: ValueError: the folder"):
            claim(*steps)
        file.write_text(file.read_text().replace(f'"folder": "{name}"', '"folder": "a"'))


def test_what_settings_name_is_hashed_and_nothing_else(tmp_path, monkeypatch):
    """A folder named like a method, a format or OUT is not what a setting means."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parent").mkdir()
    for name in ("a.txt", "parent/config.json", "auto", "refit"):
        (tmp_path / name).write_text(name)
    steps = [
        resolve_step({"method": "evaluate", "text": ["a.txt", "boolq"]}, 0),
        resolve_step({"method": "refit", "parent": "parent"}, 1),
    ]
    found = hash_named(step.settings for step in steps)
    assert list(found) == ["a.txt", "parent/config.json"]
    sources = {"method": "curate", "sources": [{"text": "a.txt", "licence": "MIT"}], "decontaminate": ["auto"]}
    assert list(hash_named([resolve_step(sources, 0).settings])) == ["a.txt", "auto"]


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(Problem, match="is not empty and holds no Duramen run"):
        RunDirectory(tmp_path).claim(FINGERPRINT)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_was_measured_once_is_kept(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.recorded("recipe", "dtype") == "auto"
    directory.claim({"recipe": {"dtype": "bfloat16"}})
    assert directory.recorded("recipe", "dtype") == "bfloat16"
    assert directory.recorded("recipe", "nothing") == "auto"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.txt"
    write_text(file, "old")

    def half():
        with replacing(file) as temporary:
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert file.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["x.txt"]


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_json(tmp_path / "kept.json", {})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Problem, match="cannot be written: No space left") as caught:
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    assert caught.value.code == Exit.OUT_OF_BUDGET
    assert "finished blocks are kept" in caught.value.fix
    assert [item.name for item in tmp_path.iterdir()] == ["kept.json"]


def test_files_are_readable_by_others(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    write_text(tmp_path / "x.txt", "")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "x.txt").stat().st_mode


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_masks_survive_packing(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.shape == (rows, -(-columns // 8))
    assert packed.dtype == torch.uint8
    assert int(packed[0, 0]) & 1 == int(mask[0, 0]), "bits are little-endian"
    assert torch.equal(unpack_mask(packed, columns), mask)


def test_a_damaged_block_counts_as_missing(tmp_path):
    store = BlockStore(tmp_path, lambda name: name.removeprefix("model."))
    mask = torch.rand(4, 9) < 0.5
    records = [{"layer": "model.q", "removed": int(mask.sum())}]
    store.save(0, Finished({"model.q.weight": torch.ones(4, 9)}, records, {"model.q": mask}))
    tensors, found = store.load(0)
    assert torch.equal(tensors["model.q.weight"], torch.ones(4, 9))
    assert found == records
    assert store.load(1) is None
    with store.shard(0).open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\xff")
    assert store.load(0) is None


def test_a_memo_computes_once(tmp_path):
    calls = []
    for _ in range(2):
        assert RunDirectory(tmp_path).memo("step")("part", lambda: calls.append(1) or {"x": 1}) == {"x": 1}
    assert calls == [1]
