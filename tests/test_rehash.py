"""Steps that take a prediction again: the published rule, the best schedule against all of them, and solvers against what they do with fewer steps."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from duramen.problem import Problem
from duramen.video.calibrate import choose_schedule
from duramen.video.rehash import Course, Rehash, course_of
from duramen.video.schedules import (
    forecast,
    optimal_schedule,
    reuse_cost,
    schedule_cost,
    similarity,
    threshold_for,
    threshold_schedule,
    uniform_schedule,
)  # fmt: skip

diffusers = pytest.importorskip("diffusers")
STEPS = 25


def test_the_published_rule():
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4), torch.ones(2, 2))
    assert threshold_schedule(blocks, 0.5) == [0, 3, 7, 8]
    assert threshold_schedule(torch.ones(6, 6), 0.9) == [0, 5]
    assert threshold_schedule(torch.eye(5), 0.5) == [0, 1, 2, 3, 4]
    assert threshold_schedule(torch.eye(5), 0.0) == [0, 4]
    rounded = torch.full((4, 4), 0.9)
    rounded.fill_diagonal_(0.9999999)
    assert threshold_schedule(rounded, 1.0) == [0, 1, 2, 3]
    assert threshold_schedule(torch.ones(1, 1), 0.5) == [0]
    for wrong in (1.5, float("nan")):
        with pytest.raises(Problem, match="no similarity"):
            threshold_schedule(blocks, wrong)


def test_the_number_of_full_steps_need_not_grow_with_the_threshold():
    draw, falls = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        path = torch.randn(12, 1, 3, generator=draw).cumsum(0)
        alike = similarity(path)
        assert torch.allclose(alike.diagonal(), torch.ones(12, dtype=torch.float64))
        sizes = [len(threshold_schedule(alike, float(value))) for value in alike.unique().clamp_max(1)]
        falls += any(later < earlier for earlier, later in itertools.pairwise(sizes))
        for count in (2, 4, 7, 12):
            found = threshold_for(alike, count)
            assert len(found) <= count
            assert len(found) == max((size for size in sizes if size <= count), default=2)
    assert falls > 0


def test_the_best_schedule_is_the_best_of_all():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        predictions, weights = torch.randn(8, 3, 4, generator=draw), torch.rand(9, generator=draw).sort(descending=True).values
        cost = reuse_cost(predictions, weights)
        by_hand = sum(
            float((weights[s + 1] - weights[s]).abs()) * float((predictions[s] - predictions[2]).norm(dim=-1).mean())
            for s in (3, 4)
        )
        assert float(cost[2, 5]) == pytest.approx(by_hand, rel=1e-5)
        assert float(cost[2, 3]) == 0
        for count in (2, 4, 6):
            every = [(0, *middle, 7) for middle in itertools.combinations(range(1, 7), count - 2)]
            least = min(schedule_cost(cost, each) for each in every)
            found, said = optimal_schedule(cost, count)
            assert schedule_cost(cost, found) == pytest.approx(least)
            assert said == pytest.approx(least)
            assert least <= schedule_cost(cost, uniform_schedule(8, count)) + 1e-12
    assert uniform_schedule(25, 13) == list(range(0, 25, 2))
    for count in (1, 9):
        with pytest.raises(Problem, match="cannot be"):
            uniform_schedule(8, count)


def test_a_line_in_the_logarithm_is_carried_on():
    weights = torch.linspace(3, 0.01, 10, dtype=torch.float64)
    at = (weights + 1e-3).log()
    history = [(step, torch.tensor([2.0, -1.0], dtype=torch.float64) * at[step]) for step in (1, 4)]
    assert torch.allclose(forecast(history, weights, 7), torch.tensor([2.0, -1.0], dtype=torch.float64) * at[7])
    assert torch.equal(forecast(history[:1], weights, 7), history[0][1])


class Mixture(torch.nn.Module):
    """The exact noise of a mixture of Gaussians: a denoiser without training, whose course is known at every point."""

    def __init__(self, course, times, kind="epsilon"):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.means = torch.randn(6, 1, 8, generator=draw, dtype=torch.float64)
        self.course, self.kind, self.calls = course, kind, 0
        self.times = times

    def forward(self, sample, timestep, return_dict=True):
        self.calls += 1
        step = self.times.index(float(timestep))
        a, b = self.course.signal[step], self.course.noise[step]
        spread = 0.05 * a**2 + b**2
        apart = sample[None] - a * self.means[:, None, 0]
        shares = (-apart.square().sum(-1, keepdim=True) / (2 * spread)).softmax(0)
        noise = b * (shares * apart).sum(0) / spread
        clean = (sample - b * noise) / a
        found = a * noise - b * clean if self.kind == "v_prediction" else noise
        return (found,)


def pipeline(kind="epsilon", steps=STEPS):
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    network = Mixture(course_of(scheduler), [float(time) for time in scheduler.timesteps], kind)
    return SimpleNamespace(unet=network, scheduler=scheduler)


def generated(made, x):
    made.scheduler.set_timesteps(STEPS)
    for time in made.scheduler.timesteps:
        found = made.unet(x, time, return_dict=False)[0]
        x = made.scheduler.step(found, time, x, return_dict=False)[0]
    return x


def start(seed=0, count=64):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_kept_noise_is_fewer_steps(kind):
    full = [0, 3, 4, 9, 17, 24]
    made = pipeline(kind)
    handle = Rehash(made, full, STEPS)
    found = generated(made, start())
    assert (handle.ran, handle.asked, made.unet.calls) == (len(full), STEPS, len(full))
    handle.remove()
    course, x = made.unet.course, start()
    for here, there in itertools.pairwise([*full, STEPS]):
        noise = course.to_noise(made.unet(x, made.scheduler.timesteps[here])[0], x, here)
        clean = (x - course.noise[here] * noise) / course.signal[here]
        x = course.signal[there] * clean + course.noise[there] * noise
    assert float((found - x).abs().max()) < 1e-4  # the scheduler counts in float32
    raw = start()
    for step, time in enumerate(made.scheduler.timesteps):
        if step in full:
            kept = made.unet(raw, time)[0]
        raw = made.scheduler.step(kept, time, raw, return_dict=False)[0]
    assert (float((raw - x).abs().max()) < 1e-4) == (kind == "epsilon")


def test_the_best_schedule_is_nearer_than_even_steps_and_the_published_rule():
    made, recorded = pipeline(), {}
    handle = Rehash(made, list(range(STEPS)), STEPS, record=recorded.__setitem__)
    generated(made, start(1))
    handle.remove()
    predictions = torch.stack([recorded[step] for step in range(STEPS)])
    cost, alike = reuse_cost(predictions, made.unet.course.weights), similarity(predictions)
    expected = generated(made, start(2))
    for count in (13, 9, 7):
        errors = {}
        schedules = {
            "best": optimal_schedule(cost, count)[0],
            "even": uniform_schedule(STEPS, count),
            "rule": threshold_for(alike, count),
        }
        for name, full in schedules.items():
            handle = Rehash(made, full, STEPS)
            errors[name] = float((generated(made, start(2)) - expected).square().mean().sqrt())
            handle.remove()
        assert errors["best"] < min(errors["even"], errors["rule"]), (count, errors)


def test_branches_of_guidance_and_generations_are_kept_apart():
    made = pipeline()
    handle = Rehash(made, [0, 12, 24], STEPS, order=1)
    one, other = start(3, 4), start(4, 4)
    together = [generated(made, each) for each in (one, other)]
    assert handle.ran == 6
    made.scheduler.set_timesteps(STEPS)
    pair = [one, other]
    for time in made.scheduler.timesteps:
        found = [made.unet(each, time)[0] for each in pair]
        pair = [made.scheduler.step(each, time, x, return_dict=False)[0] for each, x in zip(found, pair, strict=True)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(pair, together, strict=True))
    with pytest.raises(RuntimeError):
        made.unet(one[:, :3], made.scheduler.timesteps[0])
    assert torch.equal(generated(made, one), together[0])
    made.scheduler.set_timesteps(10)
    with pytest.raises(Problem, match="for 25 steps, and the scheduler takes 10"):
        made.unet(one, torch.tensor(999.0))
    handle.remove()
    assert "forward" not in made.unet.__dict__


def test_transformers_are_asked_by_name():
    made = pipeline()
    named = SimpleNamespace(transformer=made.unet, scheduler=made.scheduler)
    handle = Rehash(named, [0, 12, 24], STEPS)
    expected = generated(made, start(5, 4))
    x = start(5, 4)
    made.scheduler.set_timesteps(STEPS)
    for time in made.scheduler.timesteps:
        x = made.scheduler.step(made.unet(sample=x, timestep=time, return_dict=False)[0], time, x, return_dict=False)[0]
    assert torch.equal(x, expected)
    assert handle.ran == 6
    handle.remove()


def test_a_flow_keeps_its_velocity():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    course = course_of(scheduler)
    assert course.kind == "flow"
    assert torch.equal(course.weights, course.noise)
    x = torch.randn(2, 3)
    assert torch.equal(course.from_noise(course.to_noise(x, x, 3), x, 3), x)
    plain = Course(course.signal, course.noise, "v_prediction")
    assert torch.allclose(plain.from_noise(plain.to_noise(x, 2 * x, 3), 2 * x, 3), x, atol=1e-6)


def test_what_cannot_be_is_said():
    made = pipeline()
    for wrong in ([], [1, 2], [0, 2, 2], [0, 25]):
        with pytest.raises(Problem, match="no schedule of 25 steps"):
            Rehash(made, wrong, STEPS)
    made.scheduler = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(Problem, match="DPMSolverMultistepScheduler cannot take a prediction again"):
        Rehash(made, [0, 24], STEPS)


def test_calibration_chooses_what_is_nearer_and_even_steps_where_nothing_is():
    made = pipeline()

    def generate(seed):
        return generated(made, start(seed, 128))

    found = choose_schedule(made, generate, STEPS, 9, learn=[0, 1], choose=[2, 3, 4, 5])
    assert found.name != "even"
    assert set(found.errors) == {
        "even",
        "even, carried on",
        "threshold",
        "threshold, carried on",
        "solver",
        "solver, carried on",
    }
    errors = {"chosen": 0.0, "even": 0.0}
    for seed in (10, 11, 12):
        expected = generate(seed)
        for name, full, order in (("chosen", found.full, found.order), ("even", uniform_schedule(STEPS, 9), 0)):
            handle = Rehash(made, full, STEPS, order=order)
            errors[name] += float((generate(seed) - expected).square().mean().sqrt())
            handle.remove()
    assert errors["chosen"] < errors["even"]
    assert choose_schedule(made, generate, STEPS, STEPS, learn=[0], choose=[1, 2]).name == "even"
    with pytest.raises(Problem, match="Either a number of steps or a quality"):
        choose_schedule(made, generate, STEPS, learn=[0], choose=[1, 2])
    with pytest.raises(Problem, match="cannot choose"):
        choose_schedule(made, generate, STEPS, 9, learn=[0], choose=[0, 1])


def test_a_quality_takes_the_fewest_steps_that_have_it():
    made = pipeline()

    def generate(seed):
        return generated(made, start(seed, 32))

    seeds = {"learn": [0, 1], "choose": [2, 3, 4]}
    found = choose_schedule(made, generate, STEPS, quality=30, **seeds)
    sizes = [float(generate(seed).square().mean().sqrt()) for seed in seeds["choose"]]
    above = [20 * math.log10(size / error) for size, error in zip(sizes, found.errors[found.name], strict=True)]
    assert 30 <= found.quality == pytest.approx(sum(above) / 3)
    assert choose_schedule(made, generate, STEPS, len(found.full) - 1, **seeds).quality < 30
    assert choose_schedule(made, generate, STEPS, quality=10, **seeds).quality < found.quality
    assert choose_schedule(made, generate, STEPS, quality=200, **seeds).full == list(range(STEPS))


def test_a_failed_run_gives_the_denoiser_back():
    network = torch.nn.Linear(2, 2)
    pipeline = SimpleNamespace(unet=network, scheduler=diffusers.DDIMScheduler())
    with pytest.raises(KeyboardInterrupt), Rehash(pipeline, [0], 4):
        raise KeyboardInterrupt
    assert "forward" not in network.__dict__


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise in every step"),
        (lambda: diffusers.DDIMScheduler(prediction_type="sample"), "what is predicted is a `sample`"),
    ],
)
def test_what_a_scheduler_says_is_asked(scheduler, words):
    with pytest.raises(Problem, match=words):
        course_of(scheduler())
