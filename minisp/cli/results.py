"""The commands that look at finished models: `eval`, `compare`, `report`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from minisp.cli.arguments import Json, Model, Quiet
from minisp.cli.console import errors, show
from minisp.config import split_options
from minisp.errors import ConfigError
from minisp.units import megabytes

TEXT_HELP = (
    "Text file to predict, from its start, or a folder, which stands for its .txt and .jsonl files. Repeat it for more "
    "texts."
)
SPEED_HELP = "Measure tokens per second too: a prompt of 256 tokens, several turns, half a minute or more."
Window = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
Stride = Annotated[int | None, typer.Option(min=1, help="Tokens between windows; default: the window.")]
MaxWindows = Annotated[int | None, typer.Option(min=1, help="Windows at most, from the start of the text.")]
Builtin = Annotated[
    bool, typer.Option(help="Measure on Python's documentation and on source code too: domains unlike the text.")
]
Questions = Annotated[int, typer.Option(min=0, help="Multiple-choice questions on every text; 0 for none.")]
Speed = Annotated[bool, typer.Option(help=SPEED_HELP)]
Dtype = Annotated[str, typer.Option(help="Compute type: auto, bfloat16, float16, float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


def evaluate(
    model: Model,
    other: Annotated[str | None, typer.Argument(help="A second model, measured beside the first.")] = None,
    *,
    text: Annotated[list[Path], typer.Option(help=TEXT_HELP, show_default=False)],
    window: Window = 1024,
    stride: Stride = None,
    max_windows: MaxWindows = 20,
    builtin: Builtin = True,
    questions: Questions = 100,
    speed: Speed = True,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model, or two side by side: perplexity by a stated protocol, multiple choice, tokens per second, bytes.

    The speed of two is measured in turns, and a ratio within noise is called so. Several texts give a mean ratio too.
    """
    from minisp.evaluate import measure, tables
    from minisp.report.progress import progress_bar

    with errors(), progress_bar(quiet, lines=not as_json) as progress:
        protocol = measure.Protocol(window=window, stride=stride, max_windows=max_windows, questions=questions)
        names = [name for name in (model, other) if name is not None]
        folders, tokens = _tokens(names, text, window, builtin)
        options: dict[str, Any] = {"speed": speed, "config": split_options(dtype=dtype, device=device)[0]}
        if other is None:
            found = measure.measure(folders[0], tokens, protocol, progress=progress, **options)
            values, lines = found.as_dict(), tables.protocol_lines(found)
            table = tables.measurement_table(model, found)
        else:
            (both,) = measure.compare(folders, tokens, protocol, progress=progress, **options)
            values, lines = both.as_dict(), tables.comparison_lines(both)
            table = tables.comparison_table("Side by side", names, both)
    show(values, as_json, quiet, table, lines)


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two models or more; ratios are to the first one.", show_default=False, metavar="MODELS..."
        ),
    ],
    text: Annotated[list[Path] | None, typer.Option(help=TEXT_HELP, show_default=False)] = None,
    window: Window = 1024,
    stride: Stride = None,
    max_windows: MaxWindows = 20,
    builtin: Builtin = True,
    questions: Questions = 0,
    speed: Speed = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put two models or more side by side in one evaluation: perplexity on every text, parameters, bytes.

    With --speed also tokens per second, all models in turns. Without --text, the texts are Python's own.
    """
    from minisp.evaluate import measure, tables
    from minisp.report.progress import progress_bar

    if len(models) < 2:
        raise typer.BadParameter("expected two models or more; minisp eval measures one.", param_hint="MODELS...")
    with errors(), progress_bar(quiet, lines=not as_json) as progress:
        if not text and not builtin:
            raise ConfigError("Option text: expected a text to measure on, got none with --no-builtin. Pass one.")
        protocol = measure.Protocol(window=window, stride=stride, max_windows=max_windows, questions=questions)
        folders, tokens = _tokens(models, text or [], window, builtin)
        config = split_options(dtype=dtype, device=device)[0]
        pairs = measure.compare(folders, tokens, protocol, speed=speed, config=config, progress=progress)
        found = [pairs[0].first, *(pair.second for pair in pairs)]
        values = {
            "models": [{"name": name, **one.as_dict()} for name, one in zip(models, found, strict=True)],
            "to_the_first": [
                {"name": name, **pair.ratios_dict()} for name, pair in zip(models[1:], pairs, strict=True)
            ],
            "together": pairs[0].together,
        }
        table = tables.comparison_table("Side by side", models, *pairs)
        lines = tables.comparison_lines(*pairs)
    show(values, as_json, quiet, table, lines)


def report(
    folder: Annotated[
        Path, typer.Argument(help="The folder of a result, as minify has written it.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The page to write; a new file.")] = Path("report.html"),
    samples: Annotated[
        bool, typer.Option("--samples", help="Let the dense model and the result go on from a few prompts.")
    ] = False,
    dense: Annotated[
        str | None, typer.Option(help="With --samples: the model that was cut. One is loaded after the other.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="With --samples: a prompt of your own. Repeat it for more.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="With --samples: tokens to write after each prompt.")] = 80,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a result as one page of HTML, which stands alone: what was cut, how it was refitted, what it took."""
    from minisp.report.page import result_page, rows
    from minisp.report.progress import progress_bar
    from minisp.report.result import read_result
    from minisp.store.writer import check_output, output_file

    with errors(lambda: "Nothing was left at the output path."), progress_bar(quiet, lines=not as_json) as progress:
        if samples != (dense is not None) or (prompt and not samples):
            raise ConfigError(
                "Option samples: expected --samples together with --dense, the model that was cut, and --prompt only "
                "beside them, got another combination. Pass both, or none."
            )
        result = read_result(folder)
        path = check_output(out, 0, is_file=True)
        written = []
        if dense is not None:
            config = split_options(dtype=dtype, device=device)[0]
            written = _samples([dense, str(folder)], prompt, new_tokens, config, progress)
        page = result_page(result, written)
        with output_file(path) as partial:
            partial.write_text(page, encoding="utf-8")
    size = len(page.encode())
    table = Table(title=escape(f"Result: {result.source}"), title_justify="left")
    for name in ("", "before", "after", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows(result):
        table.add_row(escape(row.label), row.before, row.after, f"{row.ratio:.3f}")
    values = {"out": str(path), "bytes": size, "samples": len(written)}
    show(values, as_json, quiet, table, [f"written to {path}, {megabytes(size)}: open it in a browser"])


def _samples(names: Sequence[str], prompts: Sequence[str] | None, new_tokens: int, config: Any, progress: Any) -> Any:
    """What each model writes after each prompt."""
    from minisp.evaluate.samples import PROMPTS, greedy_texts
    from minisp.report.page import Sample
    from minisp.store.hub import local_folder

    asked = prompts or PROMPTS
    texts = [
        greedy_texts(local_folder(name), asked, new_tokens=new_tokens, config=config, progress=progress)
        for name in names
    ]
    labels = [f"{kind}: {Path(name).name}" for kind, name in zip(("before", "after"), names, strict=True)]
    return [
        Sample(prompt, tuple(zip(labels, answers, strict=True))) for prompt, *answers in zip(asked, *texts, strict=True)
    ]


def _tokens(
    names: Sequence[str], text: Sequence[Path], window: int, builtin: bool
) -> tuple[list[Path], dict[str, Any]]:
    """The models' folders, and the texts as the tokens that all of them read."""
    from minisp.evaluate import measure
    from minisp.store.hub import local_folder
    from minisp.text.corpora import load_texts

    own = measure.builtin_texts() if builtin else {}
    texts = (load_texts(text, taken=own) if text else {}) | own
    folders = [local_folder(name) for name in names]
    tokens = measure.tokenize(folders[0], texts)
    tokens = {name: ids for name, ids in tokens.items() if name not in own or len(ids) >= window}
    for folder in folders[1:]:
        measure.check_same_tokens([folders[0], folder], tokens, measure.tokenize(folder, texts))
    return folders, tokens
