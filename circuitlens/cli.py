"""The command line: parses, calls the verbs, prints tables.

The heavy imports stand inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from circuitlens.cli_tables import pairs_table, strategy_table, summary_table
from circuitlens.errors import CircuitLensError, InputError

if TYPE_CHECKING:
    from circuitlens.adapt import TransferResult
    from circuitlens.run_folder import RunFolder

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Find the few attention heads that carry a task in a language model, check them, and "
        "adapt the model to another language by training only those heads."
    ),
)

# The exit status of a program that Ctrl-C ended.
INTERRUPTED = 130

_Dir = Annotated[Path, typer.Argument(help="Folder of an earlier `circuitlens run`.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Neither progress nor log lines.")]

# Wide enough for the tables when nobody has a terminal.
_out = Console(width=None if sys.stdout.isatty() else 140)


def _begin(quiet: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("circuitlens").setLevel(logging.WARNING if quiet else logging.INFO)
    # What torch and transformers warn about here is none of the user's making.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|transformers")


def _pairs(items: Sequence[str], option: str) -> dict[str, str] | None:

    for item in items:
        if "=" not in item:
            raise InputError(f"{option} takes name=value, but got {item!r}.")
    return dict(item.split("=", 1) for item in items) or None


def _size(text: str) -> int | float:

    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise InputError(
            f"--size takes a number of heads (8) or a share of them (0.25), but got {text!r}."
        ) from None


def _width(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text  # a name, which the export checks


def _finish(run: RunFolder, results: Sequence[TransferResult]) -> None:
    if results:
        _out.print(strategy_table(results))
    _out.print(f"Report: {run.path / 'report.html'}", soft_wrap=True)


@app.command()
def run(
    model: Annotated[
        str, typer.Option(help="Hub name or local folder; `toy` makes the built-in small model.")
    ],
    task: Annotated[
        str,
        typer.Option(
            help="nusax, smsa, americasnli, xnli, toy, or a CSV, TSV, JSONL or Parquet file; "
            "`{language}` in its path stands for the language."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for all results; must be new or unfinished.")],
    target: Annotated[
        list[str] | None, typer.Option(help="Target language; give it again for more.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Source language; default: the data set's usual one.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Local folder of the data set; default: the hub.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt with the fields in braces: '{text} sentimen:'.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Answer word of a label, one token: 'positive= positif'. Repeat."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Columns of a data file: label=NAME, id=NAME or group=NAME. Repeat."),
    ] = None,
    competence: Annotated[
        str,
        typer.Option(
            help="Fine-tune on the source first: auto (if the model is near chance), always, never."
        ),
    ] = "auto",
    finetune_rate: Annotated[
        float | None, typer.Option(help="Learning rate of that; large models want 1e-5 to 5e-5.")
    ] = None,
    finetune_epochs: Annotated[int | None, typer.Option(help="Epochs of that.")] = None,
    method: Annotated[
        str,
        typer.Option(help="Scorer, such as cdt-linear, cdt, midpoint, attribution or ablation."),
    ] = "cdt-linear",
    size: Annotated[
        str, typer.Option(help="Heads in the circuit: a number (8) or a share (0.25).")
    ] = "0.25",
    positions: Annotated[
        str, typer.Option(help="Where heads deviate from their means: all or decision.")
    ] = "all",
    max_examples: Annotated[
        int | None, typer.Option(help="Most examples for discovery; default: all correct ones.")
    ] = None,
    n_random: Annotated[
        int,
        typer.Option(help="Random circuits for each size, and as many matched layer by layer."),
    ] = 30,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="circuit, near-zero, random, random-by-layer, norms, lora, lora-r8, circuit-lora, "
            "gradual, head, full or auto. Repeat; default: circuit, near-zero, random, norms, "
            "lora, full."
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Learning rates of the transfer, chosen on validation. Repeat."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of the transfer, at most.")] = 10,
    accumulation: Annotated[
        int, typer.Option(help="Parts of a training batch, run one after another: saves memory.")
    ] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train with bfloat16 autocast.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float64.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Do the whole line: competence, discovery, faithfulness, transfer, report.

    For example, on a local copy of NusaX:

        circuitlens run --model my-model --task nusax --data nusax
            --source indonesian --target javanese --out runs/ind-jav

    An interrupted run goes on where it stopped when the same command is given again.
    """
    _begin(quiet)
    from circuitlens.adapt.transfers import DEFAULT_RATES
    from circuitlens.run_folder import RunFolder
    from circuitlens.run_settings import RunSettings

    for name, value, known in (
        ("--competence", competence, ("auto", "always", "never")),
        ("--positions", positions, ("all", "decision")),
    ):
        if value not in known:
            raise InputError(f"{name} is one of {', '.join(known)}, but got {value!r}.")
    options: dict[str, Any] = {} if strategy is None else {"strategies": tuple(strategy)}
    settings = RunSettings(
        model=model,
        task=task,
        source=source,
        targets=tuple(target or ()),
        data=data,
        template=template,
        labels=_pairs(label or [], "--label"),
        columns=_pairs(column or [], "--column"),
        competence=competence,  # type: ignore[arg-type]
        finetune_rate=finetune_rate,
        finetune_epochs=finetune_epochs,
        positions=positions,  # type: ignore[arg-type]
        method=method,
        size=_size(size),
        max_examples=max_examples,
        n_random=n_random,
        learning_rates=tuple(rate or DEFAULT_RATES),
        epochs=epochs,
        accumulation=accumulation,
        bf16=bf16,
        dtype=dtype,
        device=device,
        seed=seed,
        **options,
    )
    folder = RunFolder.create(out, settings, quiet=quiet)
    _finish(folder, folder.run_all())


@app.command()
def discover(
    folder: _Dir,
    method: Annotated[str | None, typer.Option(help="Another scorer than the run's.")] = None,
    size: Annotated[str | None, typer.Option(help="Another circuit size.")] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="Replace what is there, and remove what came of it.")
    ] = False,
    quiet: _Quiet = False,
) -> None:
    """Score the heads and choose the circuit anew."""
    _begin(quiet)
    from dataclasses import replace

    from circuitlens.run_folder import RunFolder

    run = RunFolder.open(folder, quiet=quiet)
    if (folder / "circuit.json").is_file() and not redo:
        raise InputError(
            f"{folder} has a circuit already: add --redo to replace it, which also removes the "
            "faithfulness, the transfers, the comparison and the report that came of it."
        )
    changes: dict[str, Any] = {"method": method or run.settings.method}
    if size is not None:
        changes["size"] = _size(size)
    run.discover_anew(replace(run.settings, **changes))
    _out.print(run.scores.to_frame().head(len(run.circuit)).to_string(index=False))


@app.command()
def faithfulness(
    folder: _Dir,
    redo: Annotated[bool, typer.Option("--redo", help="Measure anew.")] = False,
    quiet: _Quiet = False,
) -> None:
    """Measure how much of the task the circuit does alone."""
    _begin(quiet)
    from circuitlens.run_folder import RunFolder

    run = RunFolder.open(folder, quiet=quiet)
    if redo:
        (folder / "faithfulness.safetensors").unlink(missing_ok=True)
    columns = ["heads", "faithfulness", "accuracy", "random_faithfulness", "random_accuracy"]
    columns += ["layer_matched_faithfulness", "completeness"]
    table = run.curve.to_frame()[columns]
    _out.print(table.to_string(index=False, float_format="{:.3f}".format))
    run.write_record()


@app.command()
def transfer(
    folder: _Dir,
    target: Annotated[list[str] | None, typer.Option(help="Target language. Repeat.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="Strategy. Repeat.")] = None,
    quiet: _Quiet = False,
) -> None:
    """Adapt the model to further languages, or by further strategies; finished ones are kept."""
    _begin(quiet)
    from dataclasses import replace

    from circuitlens.run_folder import RunFolder

    run = RunFolder.open(folder, quiet=quiet)
    targets = tuple(target or run.settings.targets)
    strategies = tuple(strategy or run.settings.strategies)
    replace(run.settings, targets=targets, strategies=strategies)  # checks the names
    tasks = [run.task.to(name) for name in targets]
    results = [run.transfer(t.language, s) for t in tasks for s in strategies]
    run.report()
    run.write_record()
    _finish(run, results)


@app.command()
def compare(
    folder: _Dir,
    target: Annotated[list[str] | None, typer.Option(help="Target language. Repeat.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="Strategy. Repeat.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of a transfer. Repeat; default: 0, 1, 2.")
    ] = None,
    quiet: _Quiet = False,
) -> None:
    """Compare strategies over languages and seeds; the numbers go into the run's `compare`.

    Finished cells are kept, so an interrupted comparison goes on, and a finished one can grow.
    """
    _begin(quiet)
    from circuitlens.experiments import compare as compare_strategies
    from circuitlens.run_folder import RunFolder

    run = RunFolder.open(folder, quiet=quiet)
    settings = run.settings
    out = folder / "compare"
    result = compare_strategies(
        run.model,
        run.circuit,
        run.task,
        target or settings.targets,
        strategies=strategy or settings.strategies,
        seeds=seed or (0, 1, 2),
        scores=run.scores,
        out=out,
        learning_rates=settings.learning_rates,
        **settings.training,
        quiet=quiet,
    )
    _out.print(summary_table(result.summary()))
    if len(result.strategies) > 1:
        reference = result.reference
        pairs = result.pairs(reference)
        if len(result.languages) == 1:  # which is all of them
            pairs = pairs[pairs["language"] == result.languages[0]]
        _out.print(pairs_table(pairs, reference))
    _out.print(f"Tables: {out}", soft_wrap=True)
    if (folder / "report.html").is_file():
        _out.print(f"Report: {run.report()}", soft_wrap=True)
    if result.errors:
        # The log has named each of them.
        sys.stderr.write(f"{len(result.errors)} failed; the same command tries them again.\n")
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved comparison.")],
    quiet: _Quiet = False,
) -> None:
    """Write the report of what the folder holds."""
    _begin(quiet)
    from circuitlens.experiments import Comparison
    from circuitlens.run_folder import RunFolder
    from circuitlens.view import write_report

    if (folder / "comparison.json").is_file():
        page = folder / "report.html"
        comparison = Comparison.load(folder)
        write_report(page, title="Strategies compared", comparison=comparison)
        _out.print(f"Report: {page}", soft_wrap=True)
        return
    run = RunFolder.open(folder, quiet=quiet)
    run.report()
    _finish(run, ())


@app.command()
def figures(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a run, or of a comparison, finished or not.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the figures; default: `figures` in DIR.")
    ] = None,
    format: Annotated[  # noqa: A002
        list[str] | None,
        typer.Option(help="pdf, svg, png or html. Repeat; default: pdf and svg."),
    ] = None,
    width: Annotated[
        str, typer.Option(help="column (85 mm), page (178 mm), or millimetres.")
    ] = "column",
    mode: Annotated[str, typer.Option(help="Colours: light or dark.")] = "light",
    quiet: _Quiet = False,
) -> None:
    """Write all figures of a folder for a paper, each with its data as CSV beside it."""
    _begin(quiet)
    from circuitlens.view import write_figures

    out = out or folder / "figures"
    files = write_figures(
        folder,
        out,
        format or ("pdf", "svg"),
        width=_width(width),
        mode=mode,  # type: ignore[arg-type]
    )
    _out.print(f"Figures: {out} ({len(files)} files)", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Another seed makes other languages.")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Do the whole line on three artificial languages and a model trained on the spot."""
    _begin(quiet)
    from circuitlens.run_folder import RunFolder
    from circuitlens.run_settings import RunSettings

    settings = RunSettings(
        model="toy",
        task="toy",
        source="source",
        targets=("near", "far"),
        max_examples=300,
        epochs=20,
        seed=seed,
    )
    folder = RunFolder.create(out, settings, quiet=quiet)
    _finish(folder, folder.run_all())


def main() -> None:
    """Run the command line; expected errors are one sentence and no traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except CircuitLensError as error:
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            sys.stderr.write(
                "Interrupted. What was finished is whole; the same command goes on from there.\n"
            )
        raise


if __name__ == "__main__":
    main()
