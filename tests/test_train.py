"""The loop: its schedule, stops and resumes to the bit, gradients that add up, and a loss that is not finite."""

import json

import pytest
import torch

from duramen.problem import Problem
from duramen.train.checkpoint import FACTS
from duramen.train.loop import train
from duramen.train.schedule import Schedule


class Regression:
    """A linear problem with sequences of different lengths."""

    def __init__(self, seed=0, spoiled=()):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.x = [torch.randn(3 + number % 4, 4, generator=generator) for number in range(20)]
        self.goal, self.seen, self.spoiled = torch.tensor([1.0, -2.0, 0.5, 3.0]), [], set(spoiled)
        self.sequences = 16

    def targets(self, index):
        return len(self.x[index])

    def loss(self, indices):
        self.seen.append(list(indices))
        total = sum(((self.x[index] @ (self.weight - self.goal)) ** 2).sum() for index in indices)
        return total * float("nan") if len(self.seen) in self.spoiled else total

    def held_out(self):
        return {"loss": float(sum(((x @ (self.weight - self.goal)) ** 2).mean() for x in self.x[16:]) / 4)}


def run(task, folder=None, steps=30, **more):
    return train(
        [{"params": [task.weight], "lr": 0.2}], task, Schedule(steps, batch=4, every=5, clip=100.0, **more), folder=folder
    )


def test_it_learns_and_keeps_the_best():
    task = Regression()
    history = run(task)
    losses = dict(history.held_out)
    assert list(losses) == [0, 5, 10, 15, 20, 25, 30]
    assert losses[history.best] == min(losses.values()) < 0.05 * losses[0]
    with torch.no_grad():
        assert task.held_out()["loss"] == pytest.approx(min(losses.values()))


def test_the_rate_rises_and_falls():
    schedule = Schedule(100)
    assert [schedule.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule.rate(10) == 1.0
    assert 0 < schedule.rate(99) < 0.02


def test_every_epoch_sees_every_sequence_once_in_another_order():
    schedule = Schedule(8, batch=4)
    epochs = [[index for step in range(start, start + 4) for index in schedule.sequences(step, 16)] for start in (0, 4)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_parts_of_a_batch_add_up(at_once):
    whole, parts = Regression(), Regression()
    losses = run(whole, at_once=4).losses
    assert run(parts, at_once=at_once).losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-4, atol=1e-5)


class Stopped(Exception):
    """Instead of a kill."""


@pytest.mark.parametrize("stop", [3, 5, 12, 29])
def test_stopped_it_ends_at_the_same_bits(stop, tmp_path):
    whole, again = Regression(), Regression()
    expected = run(whole)
    honest = again.loss

    def loss(indices):
        if len(again.seen) == stop:
            raise Stopped
        return honest(indices)

    again.loss = loss
    with pytest.raises(Stopped):
        run(again, tmp_path)
    fresh = Regression()
    found = run(fresh, tmp_path)
    assert torch.equal(fresh.weight, whole.weight)
    assert found == expected
    assert len(fresh.seen) == 30 - stop // 5 * 5
    assert run(Regression(), tmp_path) == expected, "a finished one has nothing to do"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    task = Regression(spoiled=[13])
    with pytest.raises(Problem, match="step 13") as caught:
        run(task, tmp_path)
    assert "learning_rate" in caught.value.fix
    kept = json.loads((tmp_path / "checkpoints" / "step-00000010" / FACTS).read_text())["facts"]
    assert len(kept["losses"]) == 10
    assert run(Regression(), tmp_path).losses[:10] == kept["losses"]


def test_a_step_that_jumps_is_left_out_and_counted():
    task, jumps = Regression(), {140, 150}
    honest = task.loss

    def loss(indices):
        found = honest(indices)
        step = len(task.seen) - 1
        return found * (1e6 if step in jumps else 1.0) * (float("nan") if step == 160 else 1.0)

    task.loss = loss
    history = run(task, steps=170, skip=True, shape="wsd", best=False)
    assert history.skipped == [140, 150, 160]
    assert len(history.losses) == 170
    assert history.losses[-1] < 1


def test_too_many_jumps_stop():
    task = Regression()
    honest = task.loss
    task.loss = lambda indices: honest(indices) * (float("nan") if len(task.seen) > 20 else 1.0)
    with pytest.raises(Problem, match="11 of the last 128 steps"):
        run(task, steps=100, skip=True)


def test_a_stretch_and_its_decay_are_the_whole(tmp_path):
    """A run that goes on from the stable stretch and decays is the run that was planned so."""
    whole, branched = Regression(), Regression()
    expected = run(whole, steps=40, shape="wsd", decay=0.5, best=False)
    honest = branched.loss

    def loss(indices):
        if len(branched.seen) == 20:
            raise Stopped
        return honest(indices)

    branched.loss = loss
    with pytest.raises(Stopped):
        run(branched, tmp_path, steps=40, shape="wsd", decay=0.5, best=False)
    last = Regression()
    assert run(last, tmp_path, steps=40, shape="wsd", decay=0.5, best=False) == expected
    assert len(last.seen) == 20
    assert torch.equal(last.weight, whole.weight)
