"""The command line. Heavy imports happen inside the commands, so that `--help` is quick."""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from vlmtune.errors import VlmtuneError
from vlmtune.interrupt import Interrupted, StopRequest
from vlmtune.paths import DISK_FULL, require_folder, require_new_file

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels around the help would double the time it takes
    context_settings={"terminal_width": 120 if not sys.stdout.isatty() else None, "max_content_width": 120},
    help="Supervised fine-tuning of vision-language models that shows its evidence.",
)
# a log file has no width of its own; tables need about 110 columns
console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)

ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="a .yaml file or the name of a shipped recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="e.g. optim.lr=1e-4 plan.2.rank=8")]


@app.command()
def train(
    config: ConfigName,
    overrides: Overrides = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="delete the run folder first instead of continuing")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="look at the start, the settings and memory before training")
    ] = True,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="processes on this machine that share every step (torchrun)")
    ] = None,
) -> None:
    """Train, or continue a run that was interrupted; of a chain of stages, all of them."""
    from vlmtune.config import Chain, load_config, load_run_config

    picks = any(override.startswith("stage=") for override in overrides or [])
    load = load_config if picks else load_run_config
    wish = load(config, overrides or [])  # a wrong config is refused before the heavy imports, and once
    if nproc is not None and nproc > 1:
        raise typer.Exit(_start_processes(nproc))
    from vlmtune.processes import joined
    from vlmtune.run import train as run
    from vlmtune.stages import train_chain

    again = "the same command without --restart continues" if restart else "the same command continues"
    is_chain = isinstance(wish, Chain)
    patience = max(config.train.rank_timeout for config in (wish.stages.values() if is_chain else [wish]))
    may_start_again = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restart and (may_start_again or os.environ.get("GROUP_WORLD_SIZE", "1") != "1"):
        raise VlmtuneError(
            "--restart would delete the run again whenever torchrun starts its processes again; delete the run folder "
            "yourself, or set run=… to another."
        )
    with StopRequest(again).listening() as stop, joined(patience) as processes:
        if is_chain:
            train_chain(wish, console, restart, stop, check, processes)
        else:
            run(wish, console, restart, stop=stop, check=check, processes=processes)


def _start_processes(count: int) -> int:
    """This command without --nproc, in `count` processes; returns the exit code of the first that failed, or 0.

    Raises VlmtuneError inside of one of several processes.
    """
    from vlmtune.processes import launch

    if "WORLD_SIZE" in os.environ:
        raise VlmtuneError("--nproc: torchrun has started this process already; leave --nproc out.")
    words = [word for before, word in pairwise(sys.argv) if not word.startswith("--nproc") and before != "--nproc"]
    return launch(count, ["-m", "vlmtune", *words])


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="a run folder, or a chain of stages; finished or not")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="on localhost; 0: any that is free")] = 8765,
) -> None:
    """Show the page of a run on localhost, refreshed while it goes on. Ctrl-C ends it, not the run."""
    from vlmtune.watch import watch as serve

    serve(run, port, console)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    checkpoint: Annotated[str, typer.Option(help="latest, best, base, or a name like step_000100")] = "latest",
    output: Annotated[Path | None, typer.Option(help="also write the metrics as JSON here")] = None,
) -> None:
    """Loss and task metrics of a checkpoint on the run's held-out groups."""
    from vlmtune.use import evaluate_run

    if output is not None:
        require_new_file(output, "--output")
    metrics = evaluate_run(run, checkpoint, console)
    if output is not None:
        output.write_text(json.dumps(metrics, indent=1))


@app.command()
def predict(
    image: Annotated[Path, typer.Argument(help="an image file")],
    prompt: Annotated[str, typer.Argument(help="what to ask")],
    model: Annotated[str, typer.Option(help="model folder, hub name, run folder, or embedded")] = "embedded",
    checkpoint: Annotated[str | None, typer.Option(help="of a run folder: latest (default), best, step_…")] = None,
    region: Annotated[
        str | None, typer.Option(help="x1,y1,x2,y2 in pixels: what \\[region] in the prompt refers to")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    system: Annotated[
        str | None, typer.Option(help="system prompt: a name, file:path or a text (default: the run's)")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="folder for masks of the region and the boxes (run with loss.referring)")
    ] = None,
) -> None:
    """The reply to one question about one image, with boxes and points read back to pixels."""
    from vlmtune.use import predict as run

    if masks is not None:
        require_folder(masks, "--masks", "choose another folder")
    prediction = run(image, prompt, model, checkpoint, region, max_new_tokens, system, masks is not None)
    console.print(prediction.text, markup=False, highlight=False)
    for what, places in (("box", prediction.boxes), ("point", prediction.points), ("click", prediction.clicks)):
        for place in places:
            console.print(f"{what} in pixels: " + ", ".join(f"{v:.1f}" for v in place), highlight=False)
    for number, mask in enumerate(prediction.masks):
        masks.mkdir(parents=True, exist_ok=True)
        mask.save(masks / f"mask_{number}.png")
        console.print(f"mask: {masks / f'mask_{number}.png'}", highlight=False, markup=False)


@app.command()
def inspect(
    config: ConfigName,
    overrides: Overrides = None,
    sample: Annotated[str | None, typer.Option(help="id of a sample (default: the first of the run)")] = None,
    html: Annotated[Path, typer.Option(help="where the page goes")] = Path("inspect.html"),
) -> None:
    """What the model sees: tokens by kind and loss, the resized image with its boxes."""
    from vlmtune.config import load_config
    from vlmtune.view import inspect_sample

    require_new_file(html, "--html")
    page = inspect_sample(load_config(config, overrides or []), sample, html, console)
    console.print(f"page: {page}", highlight=False)


@app.command()
def check(
    config: ConfigName,
    overrides: Overrides = None,
    data: Annotated[bool, typer.Option("--data/--no-data", help="read every row of the data files")] = True,
    workers: Annotated[int | None, typer.Option(min=0, help="processes (default: data.workers)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Try everything that a run needs before it starts. Exit code 1 if it could not go well."""
    from vlmtune.config import load_config, load_run_config

    picks = any(override.startswith("stage=") for override in overrides or [])
    wish = (load_config if picks else load_run_config)(config, overrides or [])
    from vlmtune.check import check as run

    code = run(wish, console, as_json, workers, data)
    if code:
        raise typer.Exit(code)


@app.command("check-data")
def check_data(
    config: ConfigName,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="folder of the report (default: <run>-data-check)")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="processes (default: data.workers)")] = None,
) -> None:
    """Read, decode and encode all data once, and report what is wrong with it. Exit code 1 if there are errors."""
    from vlmtune.config import load_config

    wish = load_config(config, overrides or [])
    from vlmtune.check_data import check_data as run

    report = run(wish, console, output, workers)
    if report.count("error"):
        raise typer.Exit(1)


@app.command()
def ranks(
    config: ConfigName,
    overrides: Overrides = None,
    budget: Annotated[int, typer.Option(help="uniform LoRA rank whose parameters are spent")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="training samples to measure on, the first of the run")] = 64,
    output: Annotated[Path, typer.Option(help="the config with the new plan goes here; never overwritten")] = Path(
        "ranks.yaml"
    ),
    per: Annotated[
        Literal["module", "kind", "layer"],
        typer.Option(help="one rank per module, per kind of module, or per layer"),
    ] = "module",
    count: Annotated[
        Literal["parameters", "ranks"],
        typer.Option(help="what the budget counts: LoRA parameters, or the sum of ranks"),
    ] = "parameters",
    power: Annotated[
        float, typer.Option(min=0, help="ranks follow importance to this power: 0 uniform, 1 proportional")
    ] = 0.5,
) -> None:
    """Measure which modules matter (Fisher traces), and write a config whose LoRA ranks follow that."""
    from vlmtune.config import load_config

    wish = load_config(config, overrides or [])
    from vlmtune.ranks import choose_ranks

    choose_ranks(wish, console, output, budget, samples, per, count, power)


@app.command()
def compare(
    config: ConfigName,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="names with commas between them, or a .yaml file of plans by name")
    ] = "full,lora,qlora,adapter,prefix,ia3",
    seeds: Annotated[int, typer.Option(min=1, help="trials of each method, with train.seed and the next ones")] = 3,
    lr: Annotated[
        list[str] | None, typer.Option(metavar="METHOD=RATE", help="instead of the usual rate; may be given again")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the comparison (default: <run>-compare)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print what compare.json holds")] = False,
) -> None:
    """Measure methods on this model and data: parameters, memory, speed, quality. Exit code 1 if a trial failed."""
    from vlmtune.config import load_config

    wish = load_config(config, overrides or [])
    from vlmtune.comparison.command import compare as run
    from vlmtune.comparison.command import parse_rates

    names = [name.strip() for name in methods.split(",") if name.strip()]
    with StopRequest("the same command continues").listening():
        code = run(wish, console, names, seeds, parse_rates(lr or []), output, as_json)
    if code:
        raise typer.Exit(code)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="folder, config.json, or a name like qwen2.5-vl-7b")],
    memory: Annotated[str, typer.Option(help="of the device, for example 24GB")],
    goal: Annotated[Literal["quality", "speed", "memory"], typer.Option(help="what to prefer")] = "quality",
    data: Annotated[str | None, typer.Option(metavar="CONFIG", help="measure the samples of this config")] = None,
    tokens: Annotated[int | None, typer.Option(help="of a sample, images included (without --data)")] = None,
    images: Annotated[int, typer.Option(help="of a sample (without --data)")] = 1,
    max_pixels: Annotated[int | None, typer.Option(help="of an image (without --data)")] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="where training will run")] = "cuda",
    processes: Annotated[int, typer.Option(min=1, help="that train together, on a device each")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print the answer as JSON")] = False,
) -> None:
    """Predict memory from config.json alone, and recommend method, ranks, batch and checkpointing, with reasons."""
    from vlmtune.plan_model import plan_model

    plan_model(model, memory, console, goal, data, tokens, images, max_pixels, device, as_json, processes)


@app.command()
def cache(config: ConfigName, overrides: Overrides = None) -> None:
    """Run a frozen vision tower over all training images ahead, and keep what it makes (data.vision_cache)."""
    from vlmtune.build import best_device
    from vlmtune.config import load_config
    from vlmtune.vision_cache import fill_cache

    wish = load_config(config, overrides or [])
    with StopRequest("what was made is kept, and the same command continues").listening():
        fill_cache(wish, console, best_device())


@app.command()
def compose(
    vision: Annotated[str, typer.Argument(help="CLIP or SigLIP (folder or hub name), or efficientnet-lite0")],
    language: Annotated[str, typer.Argument(help="causal language model (folder, hub name, or a .gguf file)")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="where the model goes; a new folder")],
    projector: Annotated[
        Literal["mlp", "resampler"], typer.Option(help="mlp: a token per patch; resampler: a fixed number of tokens")
    ] = "mlp",
    queries: Annotated[int | None, typer.Option(min=1, help="resampler: image tokens, a square (default 64)")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="efficientnet-lite0: pixels (default 192)")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the projector's first weights")] = 0,
) -> None:
    """Build a new vision-language model from a vision encoder and a language model; its projector is untrained."""
    if queries is not None and projector != "resampler":
        raise VlmtuneError("--queries belongs to --projector resampler; an mlp has a token for each patch.")
    require_folder(folder, "OUT", "choose another folder")
    from vlmtune.models.compose import compose as run

    made = run(vision, language, folder, projector, queries or 64, image_size, seed)
    parts = ", ".join(f"{name} {size:,}" for name, size in made.parameters.items())
    gained = "the tokenizer had <image>" if made.added is None else f"the tokenizer gained {made.added}"
    console.print(f"{folder}: parameters: {parts}; {made.image_tokens} tokens per image; {gained}", highlight=False)
    console.print(
        "its projector knows nothing yet: train it first, with vision and language frozen (docs/guide/compose.md)",
        highlight=False,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    folder: Annotated[Path, typer.Argument(help="where the model or adapter goes")],
    checkpoint: Annotated[str, typer.Option(help="latest, best or step_…")] = "latest",
    form: Annotated[
        Literal["merged", "adapter", "gguf"],
        typer.Option("--as", help="merged: for plain from_pretrained; adapter: for plain peft if it can be"),
    ] = "merged",
) -> None:
    """Write a run's checkpoint as a model folder or an adapter folder, reload it, and prove that it answers alike."""
    from vlmtune.export import export_run

    export_run(run, checkpoint, folder, console, form)


@app.command()
def validate(
    run: Annotated[Path, typer.Argument(help="a run folder, or a chain of stages")],
    checkpoint: Annotated[str, typer.Option(help="latest, best or step_…")] = "latest",
    retain: Annotated[
        list[str] | None, typer.Option(help="held-out group, or data file, of what the base could do; repeatable")
    ] = None,
    pope: Annotated[Path | None, typer.Option(help="data file of questions whose replies are yes or no")] = None,
    question: Annotated[
        str | None, typer.Option(help="whether {name} is there, where meta.objects says what is")
    ] = None,
    safety: Annotated[Path | None, typer.Option(help="data file of prompts with meta.refuse or meta.forbidden")] = None,
    judge: Annotated[str | None, typer.Option(help="command that judges the replies to --safety")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="sections to leave out, a,b or repeated")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="samples of each held-out source, spread over it (default: all)")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="exported folder of this checkpoint: write its model card")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """What came out of a run: learned, kept, varied, honest, robust, loadable. Exit code 1 if anything fails."""
    from vlmtune.evaluate.yes_no import QUESTION
    from vlmtune.validation.command import Wish
    from vlmtune.validation.command import validate as check

    sections = [name.strip() for part in skip or [] for name in part.split(",")]
    wish = Wish(checkpoint, retain or (), pope, question or QUESTION, safety, judge, sections, limit, card)
    code = check(run, console, wish, as_json)
    if code:
        raise typer.Exit(code)


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="a run folder, a chain of stages, or a checkpoint folder")],
    failure: Annotated[str | None, typer.Option(help="a folder of RUN/failures, step_… (default: the newest)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """What is wrong with a run or checkpoint: data, config, code; a step that was not finite is replayed.

    Exit code 1 if anything fails.
    """
    from vlmtune.doctor import examine

    code = examine(path, console, failure, as_json)
    if code:
        raise typer.Exit(code)


@app.command()
def align(
    run: Annotated[Path, typer.Argument(help="a run folder, or a chain of stages")],
    checkpoint: Annotated[str, typer.Option(help="latest, best or step_…")] = "latest",
    on: Annotated[
        Literal["scenes", "data"], typer.Option(help="ask about the embedded scenes, or rows of data.eval")
    ] = "scenes",
    concepts: Annotated[
        Literal["base", "new", "all"] | None, typer.Option(help="of the scenes: 72 base ones, 24 new (default), or all")
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="task=level, for rows without meta.level; can be repeated")
    ] = None,
    samples: Annotated[
        int, typer.Option(help="test questions of each level, 20 or more; probes learn from 3 times as many")
    ] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="print the matrix as JSON")] = False,
) -> None:
    """Does language say what vision shows? Objects, attributes, relations, scenes, before and after training."""
    from vlmtune.align import align as run_align

    run_align(run, console, on, concepts, level or [], samples, checkpoint, as_json)


@app.command()
def scenes(
    folder: Annotated[Path, typer.Argument(help="where the files go; a split that is there already is kept")],
    train_per_task: Annotated[
        int, typer.Option(min=1, help="training samples of each task and new concept group")
    ] = 1000,
    val_per_task: Annotated[int, typer.Option(min=1, help="held-out samples of each task")] = 200,
    start: Annotated[int, typer.Option(min=0, help="number of the first sample of each split")] = 0,
) -> None:
    """Write the demo's data as ordinary JSONL + PNG files: 24 new concepts, and replay of the 72 old ones."""
    from vlmtune.data.export_scenes import write_demo

    for path, rows in write_demo(folder, train_per_task, val_per_task, start):
        console.print(f"{path}: {rows} conversations", highlight=False)


@app.command("pack-embedded", hidden=True)
def pack_embedded(
    folder: Annotated[Path, typer.Argument(help="an exported run of the recipe embedded_base")],
) -> None:
    """Put a trained embedded model into the package (for maintainers)."""
    from vlmtune.models.embedded import pack_weights, weights_folder

    target = pack_weights(folder, weights_folder())
    size = sum(file.stat().st_size for file in target.iterdir())
    console.print(f"{target}: {size / 1e6:.1f} MB", highlight=False)


@app.command()
def schema() -> None:
    """The JSON Schema of the configuration."""
    from vlmtune.config import config_schema

    print(json.dumps(config_schema(), indent=2))


@app.command()
def prompts(
    model: Annotated[str | None, typer.Option(help="model folder or hub name: count tokens with its tokenizer")] = None,
) -> None:
    """The named system prompts, for data.system and predict --system."""
    from vlmtune.data.prompts import PROMPTS

    lengths = {}
    if model is not None:
        from vlmtune.build import resolve_model
        from vlmtune.models.load import load_processor

        tokenizer = load_processor(resolve_model(model)).tokenizer
        lengths = {name: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for name, text in PROMPTS.items()}
    for name, text in PROMPTS.items():
        size = f"{lengths[name]} tokens" if lengths else f"{len(text.split())} words"
        console.print(f"{name} ({size})\n{text}\n", highlight=False, markup=False)


@app.command()
def recipes() -> None:
    """Names of the recipes that ship."""
    from vlmtune.config import recipe_names

    for name in recipe_names():
        print(name)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer was used
    try:
        app()
    except VlmtuneError as error:
        errors.print(f"[bold red]error:[/] {_rank(str(error))}", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except Interrupted as interrupted:
        errors.print(str(interrupted), markup=False, highlight=False, soft_wrap=True)
        sys.exit(interrupted.exit_code)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        errors.print("[bold red]error:[/] ", end="")
        errors.print(f"{error}; free some space and run the same command again.", markup=False, highlight=False)
        sys.exit(1)
    except MemoryError as error:
        errors.print("[bold red]error:[/] ", end="")
        errors.print(
            f"there is not enough memory for this ({error}); is train.length what you meant? Else lower "
            "train.micro_batch_size or data.max_length.", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command (without --restart) continues from the last checkpoint")
        sys.exit(130)


def _rank(said: str) -> str:
    """Of this process, where several of them write to one place, and it does not stand in what is said."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or said.startswith(f"rank {os.environ['RANK']} "):
        return ""
    return f"rank {os.environ['RANK']}: "


if __name__ == "__main__":
    main()
