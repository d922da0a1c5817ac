"""The `kvlib` command."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvlib.recipe import methods as all_methods

if TYPE_CHECKING:
    from kvlib.eval import Results

app = typer.Typer(help="Keep the KV cache of long-context models small, and see what that costs.", no_args_is_help=True)
heads = typer.Typer(help="Which KV heads need everything.", no_args_is_help=True)
app.add_typer(heads, name="heads")
channels = typer.Typer(help="Which key channels carry the scores.", no_args_is_help=True)
app.add_typer(channels, name="channels")
console = Console()

ModelOption = Annotated[str, typer.Option("--model", help="'smollm2', 'tiny' or the path of a transformers model.")]
TextOption = Annotated[Path | None, typer.Option("--text", help="Text file to read; by default Python's own reference.")]
RecipeOption = Annotated[list[str] | None, typer.Option("--recipe", help="A recipe to try; may be given several times.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Which pieces of the text, which facts.")]


@app.command()
def methods() -> None:
    """List every method with its role, paper and parameters."""
    table = Table(title="kvlib methods", show_lines=False)
    for column in ("method", "role", "paper", "lossy", "idea"):
        table.add_column(column, overflow="fold")
    for row in all_methods():
        arguments = ", ".join(f"{name}={value!r}" for name, value in row["parameters"].items())
        name = f"[bold]{row['name']}[/]" + (f"({arguments})" if arguments else "")
        paper = f"arXiv {row['paper']}" if row["paper"] else ""
        table.add_row(name, row["role"], paper, "yes" if row["lossy"] else "no", row["idea"])
    console.print(table)


@app.command()
def demo(
    model: ModelOption = "smollm2",
    text: TextOption = None,
    recipe: RecipeOption = None,
    length: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 2048,
    samples: Annotated[int, typer.Option(help="Questions per recipe.", min=1)] = 6,
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the answers.")] = Path("kvlib-demo"),
) -> None:
    """Let a model read a long text with a fact hidden in it, and answer from the cache each recipe leaves."""
    from kvlib.eval.demo import DEPTHS, RECIPES, TASK

    results = _evaluate(
        *(model, recipe or RECIPES, TASK, [length], samples, text, dtype),
        questions=["aware"],
        baselines=False,
        depths=DEPTHS,
        seed=seed,
    )
    _show(results, out)
    results.save(out / "demo.jsonl")  # not answers.jsonl: that may be an evaluation's
    console.print(f"answers: {out / 'demo.jsonl'}")


@app.command(name="eval")
def evaluate(
    model: ModelOption = "smollm2",
    recipe: RecipeOption = None,
    tasks: Annotated[str, typer.Option(help="Tasks, as in 'niah, multikey(keys=2)'; `kvlib tasks` lists them.")] = "",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "1024",
    samples: Annotated[int, typer.Option(help="Samples per task and length.", min=1)] = 20,
    aware: Annotated[
        bool | None,
        typer.Option("--aware/--agnostic", help="Whether the question is seen when recipes compress; by default both."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Also ask full and, at each budget, oracle, random and streaming_llm.")
    ] = True,
    depth: Annotated[str, typer.Option(help="Where needles may lie: from,to as shares of the haystack.")] = "0,1",
    text: TextOption = None,
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    batch: Annotated[int | None, typer.Option(help="Samples side by side; by default 16,384 tokens' worth.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder for answers and plots; what it has is not asked again.")] = Path(
        "kvlib-eval"
    ),
) -> None:
    """Measure what recipes give up: retrieval tasks, perplexity, and distance from the full cache's predictions."""
    from kvlib.eval.run import DEFAULT_TASKS, QUESTIONS

    results = _evaluate(
        *(model, recipe or ["full"], tasks or DEFAULT_TASKS, _numbers("lengths", lengths, int), samples, text, dtype),
        questions=QUESTIONS if aware is None else ["aware" if aware else "agnostic"],
        baselines=baselines,
        depths=_numbers("depth", depth, float),
        seed=seed,
        batch=batch,
        out=out,
    )
    _show(results, out)
    console.print(f"answers: {out / 'answers.jsonl'}")


@app.command()
def tasks() -> None:
    """List the tasks of `kvlib eval` and their parameters."""
    from kvlib.eval.tasks import TASKS
    from kvlib.policies.base import parameters

    table = Table(title="kvlib eval: tasks")
    for column in ("task", "what is asked"):
        table.add_column(column, overflow="fold")
    for name, task in TASKS.items():
        arguments = ", ".join(f"{key}={value!r}" for key, value in parameters(task).items())
        table.add_row(f"[bold]{name}[/]" + (f"({arguments})" if arguments else ""), (task.__doc__ or "").splitlines()[0])
    console.print(table)


def _evaluate(
    model: str,
    recipes: Sequence[str],
    tasks: str,
    lengths: Sequence[int],
    samples: int,
    text: Path | None,
    dtype: str,
    **more: Any,
) -> Results:
    from kvlib.eval import run

    _quiet()
    with _progress(show_count=False) as progress:
        bar = progress.add_task(f"loading {model}", total=None)

        def step(done: int, total: int, what: str) -> None:
            progress.update(bar, total=total, completed=done, description=what)

        try:
            content = None if text is None else text.read_text()
            return run.evaluate(model, recipes, tasks, lengths, samples, text=content, dtype=dtype, progress=step, **more)
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error)) from error
        except KeyboardInterrupt:
            kept = "; the same command goes on from there" if more.get("out") else ""
            console.print(f"[yellow]stopped{kept}[/]")
            raise typer.Exit(130) from None


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _show(results: Results, out: Path) -> None:
    for table in results.tables():
        console.print(table)
    if results.caveat:
        console.print(f"[yellow]{results.caveat}[/]")
    if find_spec("matplotlib") is None:
        console.print("no plots: pip install 'kvlib[eval]', then run the same command again")
        return
    for path in results.plot(out):
        console.print(f"plot: {path}")


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        example = "1024,2048" if kind is int else "0.05,0.45"
        raise typer.BadParameter(f"--{name} {text}: give numbers separated by commas, such as {example}") from None


@heads.command()
def identify(
    model: ModelOption = "smollm2",
    text: TextOption = None,
    out: Annotated[Path, typer.Option(help="Head table to write.")] = Path("heads.tsv"),
    steps: Annotated[int, typer.Option(help="Optimisation steps (paper: 2000).")] = 120,
    length: Annotated[int, typer.Option(help="Tokens per example (paper: 1000 to 32000).")] = 768,
    passkeys: Annotated[int, typer.Option(help="Passkeys per example (paper: 10).", min=1, max=10)] = 3,
    words: Annotated[int, typer.Option(help="Words per passkey (paper: 32).", min=1)] = 12,
    seed: int = 0,
) -> None:
    """Learn which KV heads retrieve (DuoAttention's optimisation) and write the head table."""
    from kvlib import identify as identification
    from kvlib.eval import load
    from kvlib.eval.language import default_text

    _quiet()
    training = identification.Training(steps=steps, length=length, passkeys=passkeys, words=words, seed=seed)
    try:
        loaded, tokenizer = load(model, "float32")
        content = default_text() if text is None else text.read_text()
        examples = identification.passkeys(tokenizer, content, training)
        with _progress() as progress:
            task = progress.add_task("learning gates", total=steps)
            table = identification.identify(
                loaded,
                examples,
                training,
                lambda step, loss: progress.update(task, advance=1, description=f"loss {loss:.4f}"),
            )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    table.save(out)
    low, high = (table.gates < 0.1).mean(), (table.gates > 0.9).mean()
    console.print(f"{out}: {table.gates.size} heads, {100 * low:.0f} % below 0.1, {100 * high:.0f} % above 0.9")
    console.print(f'use it: kvlib.Cache(model, "duo_attention(sparsity=0.5, heads={str(out)!r})")')


@channels.command(name="identify")
def identify_channels(
    model: ModelOption = "smollm2",
    text: TextOption = None,
    out: Annotated[Path, typer.Option(help="Channel table to write.")] = Path("channels.tsv"),
    blocks: Annotated[int, typer.Option(help="Blocks of text (paper: 256 documents).", min=1)] = 64,
    length: Annotated[int, typer.Option(help="Tokens per block (paper: 512).", min=2)] = 512,
    seed: SeedOption = 0,
) -> None:
    """Rank the key channels of every KV head (Double Sparsity's calibration) and write the channel table."""
    from kvlib import channels as calibration
    from kvlib.eval import load

    _quiet()
    try:
        loaded, tokenizer = load(model, "float32")
        ids = calibration.text_blocks(tokenizer, None if text is None else text.read_text(), blocks, length, seed)
        with _progress() as progress:
            task = progress.add_task("weighing channels", total=blocks)
            table = calibration.identify_channels(loaded, ids, lambda block: progress.update(task, advance=1))
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    table.save(out)
    layers, kv_heads, d = table.order.shape
    carried = np.take_along_axis(table.weight, table.order[..., : d // 4], -1).sum()
    share = 100 * carried / table.weight.sum()
    console.print(f"{out}: {layers} layers of {kv_heads} KV heads; {d // 4} of {d} channels carry {share:.0f} % of q * k")
    console.print(f'use it: kvlib.Cache(model, "double_sparsity(channels={str(out)!r})")')


def _progress(show_count: bool = True) -> Progress:
    count = [MofNCompleteColumn()] if show_count else []
    columns = (TextColumn("{task.description}"), BarColumn(), *count, TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


if __name__ == "__main__":
    app()
