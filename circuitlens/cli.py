"""The command line: parses, calls the verbs, prints tables.

The heavy imports are inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from circuitlens.adapt.options import TRANSFER
from circuitlens.cli_options import FigureFormat, parsed, run_options, settings_of, takes, width_of
from circuitlens.cli_runner import Address, CPUs, Executor, GPUs, runner_of_options
from circuitlens.cli_tables import pairs_table, plan_table, strategy_table, summary_table
from circuitlens.errors import CircuitLensError, InputError
from circuitlens.run_settings import SCORING, RunSettings, check_run
from circuitlens.settings_files import RECIPES, expanded
from circuitlens.utils.claims import claiming
from circuitlens.utils.strangers import plain_log, printable

if TYPE_CHECKING:
    from circuitlens.adapt import TransferResult
    from circuitlens.run_folder import RunFolder

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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
# What discovery can be repeated with.
_DISCOVERY = ("size", *SCORING)
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show neither progress nor log lines.")]

# Wide enough for the tables when there is no terminal.
# Square brackets are not markup.
_out = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)


def _begin(quiet: bool) -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[plain_log()])
    level = logging.WARNING if quiet else logging.INFO
    if os.environ.get("RANK", "0") != "0":
        # Of the processes of accelerate launch, only one prints.
        level, _out.quiet = logging.ERROR, True
    logging.getLogger("circuitlens").setLevel(level)
    # What torch and transformers warn about here is not the user's doing.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch|transformers")


def _say(text: str) -> None:
    _out.print(printable(text), soft_wrap=True)


def _version(wanted: bool | None) -> None:
    if wanted:
        from importlib.metadata import version

        _out.print(f"circuitlens {version('circuitlens')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    pass


def _finish(run: RunFolder, results: Sequence[TransferResult]) -> None:
    if results:
        from circuitlens.experiments.simple_rivals import simple_rivals

        rivals = simple_rivals(run.task, [r.target_language for r in results])
        _out.print(strategy_table(results, rivals))
    _say(f"Report: {run.path / 'report.html'}")


@app.command()
@takes(run_options())
@claiming
def run(
    out: Annotated[Path, typer.Option(help="Folder for all results; must be new or unfinished.")],
    config: Annotated[
        Path | None,
        typer.Option(help="Settings file (YAML): every option is a key. Options override it."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help=f"Settings of a published protocol: {', '.join(RECIPES)}.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what the run will take, then stop.")
    ] = False,
    executor: Executor = None,
    address: Address = None,
    cpus: CPUs = 1,
    gpus: GPUs = None,
    quiet: _Quiet = False,
    **values: Any,
) -> None:
    """Run the whole pipeline: competence, discovery, faithfulness, transfer, report.

    For example, on a local copy of NusaX:

        circuitlens run --model my-model --task nusax --data nusax
            --source indonesian --target javanese --out runs/ind-jav

    An interrupted run resumes when the same command is given again.
    """
    _begin(quiet)
    # main() has replaced them by their settings.
    assert config is None
    assert recipe is None
    settings = settings_of(values)
    settings.check_names()
    runner = runner_of_options(executor, address, cpus, gpus)
    from circuitlens.run_folder import RunFolder

    if plan:
        planned = RunFolder(out, settings, quiet=quiet).plan()
        _out.print(plan_table(planned))
        _say(f"All of it takes {planned}.")
        planned.check()
        return
    folder = RunFolder.create(out, settings, quiet=quiet)
    _finish(folder, folder.run_all(runner))


@app.command()
@takes(run_options(*_DISCOVERY))
@claiming
def discover(
    folder: _Dir,
    redo: Annotated[
        bool, typer.Option("--redo", help="Replace the circuit and all that is based on it.")
    ] = False,
    backup: Annotated[
        bool,
        typer.Option(help="Keep what is replaced, in `replaced-1` and so on, or remove it."),
    ] = True,
    quiet: _Quiet = False,
    **values: Any,
) -> None:
    """Score the heads and choose the circuit again; options that are left out stay as they were."""
    _begin(quiet)
    changes = parsed(values)
    check_run(folder)
    if (folder / "circuit.json").is_file() and not redo:
        raise InputError(
            f"{folder} already has a circuit: add --redo to replace it and what is based on it, "
            "which is kept in a separate folder (not with --no-backup)."
        )
    from circuitlens.run_folder import RunFolder

    run = RunFolder.open(folder, quiet=quiet)
    replaced = run.discover_again(changes, backup=backup)
    run.report()
    _say(run.scores.to_frame().head(len(run.circuit)).to_string(index=False))
    if replaced is not None:
        _say(f"The old results: {replaced}")


@app.command()
@claiming
def faithfulness(
    folder: _Dir,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again.")] = False,
    quiet: _Quiet = False,
) -> None:
    """Measure how much of the task the circuit does on its own."""
    _begin(quiet)
    check_run(folder)
    from circuitlens.run_folder import RunFolder

    run = RunFolder.open(folder, quiet=quiet)
    if redo:
        (folder / "faithfulness.safetensors").unlink(missing_ok=True)
    columns = ["heads", "faithfulness", "accuracy", "random_faithfulness", "random_accuracy"]
    columns += ["layer_matched_faithfulness", "completeness"]
    table = run.curve.to_frame()[columns]
    _say(table.to_string(index=False, float_format="{:.3f}".format))
    run.report()
    run.write_record()


@app.command()
@takes(run_options("targets", "strategies"))
@claiming
def transfer(
    folder: _Dir,
    quiet: _Quiet = False,
    **values: Any,
) -> None:
    """Adapt the model to further languages, or with further strategies; finished ones are kept."""
    _begin(quiet)
    chosen = parsed(values)
    check_run(folder)
    from circuitlens.run_folder import RunFolder

    run = RunFolder.open(folder, quiet=quiet)
    asked = replace(run.settings, **chosen)
    tasks = [run.task.to(name) for name in asked.targets]
    results = [run.transfer(t.language, s) for t in tasks for s in asked.strategies]
    run.report()
    run.write_record()
    _finish(run, results)


@app.command()
@takes(run_options("targets", "strategies"))
def compare(
    folder: _Dir,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of a transfer. Repeat for several; default: 0, 1, 2."),
    ] = None,
    executor: Executor = None,
    address: Address = None,
    cpus: CPUs = 1,
    gpus: GPUs = None,
    simple: Annotated[
        bool,
        typer.Option(
            "--simple/--no-simple",
            help="Add the most frequent label, and n-grams with logistic regression, as rivals.",
        ),
    ] = True,
    quiet: _Quiet = False,
    **values: Any,
) -> None:
    """Compare strategies over languages and seeds; the numbers go into the run's `compare`.

    Finished cells are kept, so an interrupted comparison resumes, and a finished one can grow.
    """
    _begin(quiet)
    chosen = parsed(values)
    check_run(folder)
    runner: Any = runner_of_options(executor, address, cpus, gpus)
    from circuitlens.experiments import compare as compare_strategies
    from circuitlens.run_folder import RunFolder

    run = RunFolder.open(folder, quiet=quiet)
    settings = run.settings
    out = folder / "compare"
    run.outdate()
    result = compare_strategies(
        run.model,
        run.circuit,
        run.task,
        chosen.get("targets", settings.targets),
        strategies=chosen.get("strategies", settings.strategies),
        seeds=seed or (0, 1, 2),
        scores=run.scores,
        out=out,
        executor=runner,
        **settings.transferring,
        simple=simple,
        quiet=quiet,
    )
    _out.print(summary_table(result.summary()))
    if len(result.strategies) > 1:
        pairs = result.pairs(result.reference)
        if len(result.languages) == 1:  # which is all of them
            pairs = pairs[pairs["language"] == result.languages[0]]
        _out.print(pairs_table(pairs, result.reference))
    _say(f"Tables: {out}")
    if (folder / "baseline.safetensors").is_file():
        _say(f"Report: {run.report()}")
    if result.errors:
        # The log has named each of them.
        sys.stderr.write(f"{len(result.errors)} failed; the same command tries them again.\n")
        raise typer.Exit(1)


@app.command()
def predict(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a run, a transfer, an adapter or a model.")
    ],
    texts: Annotated[
        Path, typer.Option("--in", help="Texts: .csv, .tsv, .jsonl or .parquet, columns by name.")
    ],
    out: Annotated[Path, typer.Option(help="Labelled texts: .csv, .tsv or .jsonl.")],
    target: Annotated[
        str | None, typer.Option(help="Language of the transfer, where a run has several.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Strategy of the transfer, where a run has several.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device, such as cpu or cuda:0.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts per forward pass.", min=1)] = 64,
    quiet: _Quiet = False,
) -> None:
    """Label new texts with a run's model; each gets its label and the labels' probabilities."""
    _begin(quiet)
    from circuitlens.tasks.streams import Table, chunks, stream_rows

    table = Table(out)
    rows = stream_rows(texts)
    # Before a model is loaded, which takes seconds.
    first = next(chunks(rows, 16 * batch_size), None)
    if first is None:
        raise InputError(f"{texts} contains no texts.")
    from circuitlens.predicting import predict as labelled
    from circuitlens.run_model import open_run

    model = open_run(folder, target, strategy, device)
    n = 0
    with table:
        for chunk in chain([first], chunks(rows, 16 * batch_size)):
            found = labelled(model, chunk, batch_size=batch_size, folder=texts.parent, quiet=True)
            taken = {name: f"predicted {name}" for name in found if name in chunk[0]}
            added = found.rename(columns=taken).to_dict("records")
            table.add([{**row, **extra} for row, extra in zip(chunk, added, strict=True)])  # type: ignore[dict-item]
            n += len(chunk)
    _say(f"Labelled: {out} ({n} texts)")


@app.command()
@claiming
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved comparison.")],
    quiet: _Quiet = False,
) -> None:
    """Write the report of a folder's results."""
    _begin(quiet)
    if not (folder / "comparison.json").is_file():
        check_run(folder)
    from circuitlens.experiments import Comparison
    from circuitlens.run_folder import RunFolder
    from circuitlens.view import write_report

    if (folder / "comparison.json").is_file():
        page = folder / "report.html"
        comparison = Comparison.load(folder)
        write_report(page, title="Strategies compared", comparison=comparison)
        _say(f"Report: {page}")
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
        list[FigureFormat] | None,
        typer.Option(help="Repeat for several; default: pdf and svg."),
    ] = None,
    width: Annotated[
        str, typer.Option(help="column (85 mm), page (178 mm), or millimetres.")
    ] = "column",
    mode: Annotated[Literal["light", "dark"], typer.Option(help="Colours.")] = "light",
    quiet: _Quiet = False,
) -> None:
    """Write all figures of a folder for a paper, each with its data as CSV next to it."""
    _begin(quiet)
    from circuitlens.view import write_figures

    out = out or folder / "figures"
    files = write_figures(
        folder,
        out,
        format or ("pdf", "svg"),
        width=width_of(width),
        mode=mode,
    )
    _say(f"Figures: {out} ({len(files)} files)")


@app.command()
@claiming
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Another seed makes other languages.")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Run the whole pipeline on three artificial languages and a model trained on the spot."""
    _begin(quiet)
    from circuitlens.run_folder import RunFolder

    settings = RunSettings(
        model="toy",
        task="toy",
        source="source",
        targets=("negation", "lexicon"),
        strategies=("circuit", "near-zero", "random-by-layer", "lora", "full"),
        method="auto",
        size="f=0.9",
        max_examples=200,
        learning_rates=(1e-3, 3e-3),
        replay=(0.5,),
        training=TRANSFER.updated({"epochs": 12}),
        seed=seed,
    )
    # Weight decay leaves the task to the heads that it needs.
    decayed = settings.competence_options({"weight_decay": 1.0})
    settings = replace(settings, finetuning=decayed)
    folder = RunFolder.create(out, settings, quiet=quiet)
    _finish(folder, folder.run_all("processes"))


def main() -> None:
    """Run the command line; expected errors are one sentence and no traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(args=expanded(sys.argv[1:]))
    except CircuitLensError as error:
        sys.stderr.write(f"Error: {printable(error)}\n")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            sys.stderr.write(
                "Interrupted. Finished results are complete; the same command resumes there.\n"
            )
        raise


if __name__ == "__main__":
    main()
