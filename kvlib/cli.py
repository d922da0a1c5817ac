"""The `kvlib` command."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kvlib.policies.base import RecipeError
from kvlib.recipe import Recipe
from kvlib.recipe import methods as all_methods

app = typer.Typer(help="Keep the KV cache of long-context models small, and see what that costs.", no_args_is_help=True)
heads = typer.Typer(help="Which KV heads need everything.", no_args_is_help=True)
app.add_typer(heads, name="heads")
console = Console()

ModelOption = Annotated[str, typer.Option("--model", help="'smollm2' or the path of a transformers model.")]
TextOption = Annotated[Path | None, typer.Option("--text", help="Text file to read; by default Python's own reference.")]


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
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="A recipe to try; may be given several times.")
    ] = None,
    length: Annotated[int, typer.Option(help="Prompt length in tokens.")] = 2048,
    samples: Annotated[int, typer.Option(help="Questions per recipe.", min=1)] = 6,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Which pieces of the text, which facts.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the figures.")] = Path("kvlib-demo"),
) -> None:
    """Let a model read a long text with a fact hidden in it, and answer from the cache each recipe leaves."""
    from kvlib import demo as demonstration

    try:
        recipes = [str(Recipe.parse(text)) for text in recipe or demonstration.RECIPES]
        loaded, tokenizer = _load(model, dtype)
        asked = demonstration.questions(tokenizer, _text(text), length, samples, seed)
    except (RecipeError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    with _progress() as progress:
        task = progress.add_task("reading and answering", total=len(recipes) * samples)
        scores = demonstration.run(
            loaded, tokenizer, recipes, asked, lambda name: progress.update(task, advance=1, description=name)
        )
        progress.update(task, description="done")
    table = Table(title=f"{model}: {samples} questions on {asked[0].ids.shape[1]} tokens, {loaded.dtype}")
    for column in ("recipe", "answers right", "KV MB held", "% of full", "prefill s", "tokens/s"):
        table.add_column(
            column, justify="left" if column == "recipe" else "right", min_width=26 if column == "recipe" else None
        )
    for score in scores:
        table.add_row(
            score.recipe,
            f"{score.right}/{score.asked}",
            f"{score.nbytes / score.asked / 2**20:.1f}",
            f"{100 * score.share:.0f}",
            f"{score.prefill_s / score.asked:.2f}",
            f"{score.tokens / score.decode_s:.1f}",
        )
    console.print(table)
    demonstration.plot(scores, out / "memory-against-accuracy.png")
    figures = {"model": model, "dtype": str(loaded.dtype), "length": length, "samples": samples, "seed": seed}
    document = {**figures, "scores": [asdict(score) for score in scores]}
    (out / "scores.json").write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"plot: {out / 'memory-against-accuracy.png'}   figures: {out / 'scores.json'}")


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

    training = identification.Training(steps=steps, length=length, passkeys=passkeys, words=words, seed=seed)
    try:
        loaded, tokenizer = _load(model, "float32")
        examples = identification.passkeys(tokenizer, _text(text), training)
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


def _load(model: str, dtype: str) -> tuple[Any, Any]:
    """The model in eval mode and its tokenizer; never asks a hub for what is a wrong path."""
    import torch
    import transformers

    from kvlib import smollm2
    from kvlib.demo import faster_dtype

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds and dtype != "auto":
        raise ValueError(f"dtype={dtype}: give float32, bfloat16, float16 or auto")
    if model != "smollm2" and not Path(model).is_dir():
        raise ValueError(f"--model {model}: no such folder; give 'smollm2' or the path of a transformers model")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status(f"loading {model}"):
        folder = smollm2.weights() if model == "smollm2" else Path(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = kinds.get(dtype) or (torch.bfloat16 if device == "cuda" else faster_dtype())
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval().to(device)
        return loaded, transformers.AutoTokenizer.from_pretrained(folder)


def _text(path: Path | None) -> str:
    from kvlib.demo import default_text

    return default_text() if path is None else path.read_text()


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


if __name__ == "__main__":
    app()
