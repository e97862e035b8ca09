"""Denoising steps that take the prediction of an earlier one: on chosen steps the denoiser runs, on the others what it said last stands in for it, as it is or carried on.

"Streamlined Inference" (Zhan et al., NeurIPS 2024, arXiv 2411.01171) keeps the output of the last temporal layer; behind it nothing sees the latent or the time, so to keep the denoiser's own output is the same bit for bit and eighty times smaller.
With predictions of noise and a deterministic first-order solver that is fewer steps, no more and no less: a chosen schedule is what can be better than the even one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duramen.override import override
from duramen.problem import Exit, Problem
from duramen.video.schedules import forecast

Prediction = Literal["epsilon", "v_prediction", "flow"]
FIRST_ORDER = ("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "CogVideoXDDIMScheduler")
"""Solvers for which a kept prediction is one that was made: others keep a history, or call the denoiser more than once in a step."""
LEAST_SIGNAL = 2.0**-12
"""What diffusers takes for a signal of none where it divides by it."""


@dataclass(frozen=True)
class Course:
    """What a scheduler will do, step by step.

    Attributes:
        signal: a before every step, and after the last one; x = a·x₀ + b·e.
        noise: b.
        kind: What the denoiser predicts.
    """

    signal: Float[Tensor, "K+1"]
    noise: Float[Tensor, "K+1"]
    kind: Prediction

    @property
    def weights(self) -> Float[Tensor, "K+1"]:
        """λ = b/a, or σ where a velocity of a straight flow is predicted; finite also where the first step sees nothing but noise."""
        return self.noise if self.kind == "flow" else self.noise / self.signal.clamp_min(LEAST_SIGNAL)

    def to_noise(self, found: Tensor, x: Tensor, step: int) -> Tensor:
        """E of what was predicted at x; a velocity of a flow stays."""
        return self.signal[step] * found + self.noise[step] * x if self.kind == "v_prediction" else found

    def from_noise(self, found: Tensor, x: Tensor, step: int) -> Tensor:
        """What would be predicted at x if e were this."""
        return (found - self.noise[step] * x) / self.signal[step] if self.kind == "v_prediction" else found


def check_scheduler(scheduler: Any) -> None:
    """Stops where a kept prediction is not one that was made.

    Raises:
        Problem: If the scheduler is no deterministic solver of first order.
    """
    if type(scheduler).__name__ not in FIRST_ORDER:
        raise Problem(
            f"{type(scheduler).__name__} cannot take a prediction again.",
            why="it keeps earlier ones as if they were fresh, calls the denoiser twice in a step, or adds noise.",
            fix=f"one of {', '.join(FIRST_ORDER)}.",
            code=Exit.INCOMPATIBLE,
        )
    config = scheduler.config
    said = config.get("prediction_type", "epsilon") if "FlowMatch" not in type(scheduler).__name__ else "epsilon"
    if config.get("stochastic_sampling") or said not in ("epsilon", "v_prediction"):
        raise Problem(
            f"This {type(scheduler).__name__} cannot take a prediction again.",
            why="it adds noise in every step." if config.get("stochastic_sampling") else f"what is predicted is a `{said}`.",
            fix="`stochastic_sampling: false`, and predictions of noise or velocity.",
            code=Exit.INCOMPATIBLE,
        )


def course_of(scheduler: Any) -> Course:
    """The course of a scheduler whose steps are set.

    Raises:
        Problem: If it is no deterministic solver of first order.
    """
    check_scheduler(scheduler)
    name = type(scheduler).__name__
    if name == "FlowMatchEulerDiscreteScheduler":
        sigmas = scheduler.sigmas.double().cpu()
        return Course(1 - sigmas, sigmas, "flow")
    kind: Prediction = "v_prediction" if scheduler.config.prediction_type == "v_prediction" else "epsilon"
    if name == "EulerDiscreteScheduler":
        sigmas = scheduler.sigmas.double().cpu()
        signal = 1 / (1 + sigmas.square()).sqrt()
        return Course(signal, sigmas * signal, kind)
    alphas = scheduler.alphas_cumprod.double().cpu()
    last = torch.as_tensor(float(scheduler.final_alpha_cumprod), dtype=torch.float64)
    squared = torch.cat([alphas[scheduler.timesteps.long().cpu()], last[None]])
    return Course(squared.sqrt(), (1 - squared).sqrt(), kind)


class Rehash:
    """A denoiser that runs on some steps only, until ``remove``.

    Args:
        pipeline: Of diffusers, with a ``unet`` or a ``transformer`` and a scheduler of first order.
        full: Steps that run in full, from 0.
        steps: Of a generation; another number is refused.
        order: 0 keeps the last prediction, 1 carries the last two on in log λ.
        record: Called with (step, prediction as noise or velocity) after every full step; for calibration.

    Attributes:
        ran: How often the denoiser ran, and ``asked``, how often it was asked.

    Raises:
        Problem: If the schedule is none, or the scheduler cannot take a prediction again.
    """

    def __init__(
        self,
        pipeline: Any,
        full: Sequence[int],
        steps: int,
        *,
        order: int = 0,
        record: Callable[[int, Tensor], None] = lambda step, found: None,
    ) -> None:
        if not full or full[0] != 0 or sorted(set(full)) != list(full) or full[-1] >= steps:
            raise Problem(
                f"{list(full)} is no schedule of {steps} steps.", why="the first step runs in full, and each at most once.", fix="`[0, …]`, ascending."
            )  # fmt: skip
        self.pipeline, self.full, self.steps, self.order, self.record = pipeline, set(full), steps, order, record
        check_scheduler(pipeline.scheduler)
        if getattr(pipeline, "transformer_2", None) is not None:
            raise Problem(
                f"A {type(pipeline).__name__} with two transformers runs on all steps.",
                why="half of its steps are the other one's, whose predictions nothing keeps.",
                fix="a pipeline with one, or no `--full` and no `--quality`.",
                code=Exit.INCOMPATIBLE,
            )
        self.network: nn.Module = getattr(pipeline, "unet", None) or pipeline.transformer
        self.ran = self.asked = 0
        self.reset()
        self._undo = override(self.network, partial(self._run, self.network.forward))

    def __enter__(self) -> Rehash:
        return self

    def __exit__(self, *ended: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Gives the denoiser its own way back."""
        self._undo()
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the next call begins a generation."""
        self._step, self._time, self._calls = -1, float("-inf"), 0
        self._branches: dict[int, list[tuple[int, Tensor]]] = {}
        self._course: Course | None = None
        self._times: Any = None

    def _run(self, before: Callable[..., Any], *args: Any, **options: Any) -> Any:
        sample, timestep = _asked(args, options)
        time = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        self._follow(time)
        self.asked += 1
        history = self._branches.setdefault(self._calls, [])
        course, step = self._course, self._step
        assert course is not None
        if step in self.full or not history:
            try:
                given = before(*args, **options)
            except BaseException:
                self.reset()
                raise
            self.ran += 1
            found = given[0]
            noise = course.to_noise(found, _latents(sample, found), step)
            history[:] = [*history[-1:], (step, noise.clone())]
            self.record(step, noise)
            return given
        kept = forecast(history, course.weights, step) if self.order else history[-1][1]
        found = course.from_noise(kept, _latents(sample, kept), step).to(sample.dtype)
        return (found,) if options.get("return_dict") is False else _Output(found)

    def _follow(self, time: float) -> None:
        """Which step and which branch of guidance a call is of: the time stands still between branches, and jumps up when a new video begins, for which a scheduler makes its times anew."""
        times = getattr(self.pipeline.scheduler, "timesteps", None)
        if time == self._time and times is self._times:
            self._calls += 1
            return
        if times is not self._times or time > self._time or self._step < 0 or self._step >= self.steps - 1:
            self.reset()
            self._course, self._times = course_of(self.pipeline.scheduler), times
            found = len(self._course.signal) - 1
            if found != self.steps:
                raise Problem(
                    f"The schedule is for {self.steps} steps, and the scheduler takes {found}.",
                    why="other steps are other times.",
                    fix=f"`num_inference_steps={self.steps}`, or a schedule for {found}.",
                )
        self._step, self._time, self._calls = self._step + 1, time, 0


@dataclass
class _Output:
    """What pipelines read of a denoiser's answer."""

    sample: Tensor

    def __getitem__(self, place: int) -> Tensor:
        return (self.sample,)[place]


def _asked(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Any]:
    """What is denoised, and the time; UNets are given both by place, transformers by name."""
    named = [options[name] for name in ("sample", "hidden_states", "timestep") if name in options]
    sample, timestep = [*args[:2], *named][:2]
    return sample, timestep


def _latents(sample: Tensor, like: Tensor) -> Tensor:
    """What is denoised, of inputs that may hold conditions beside it: the first channels."""
    axis = 2 if sample.ndim == 5 and sample.shape[2] != like.shape[2] else 1
    return sample.narrow(axis, 0, like.shape[axis]).to(like.dtype)
