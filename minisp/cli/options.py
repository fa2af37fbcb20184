"""Options of `minify` and `plan`: the fields of `MinifyConfig` and `Resources`, with their documentation as help."""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from minisp.config import MinifyConfig
from minisp.docstrings import documented
from minisp.resources import Resources


def with_config_options(command: Callable[..., None], without: Collection[str] = ()) -> Callable[..., None]:
    """Give a command, which takes `**options`, one option per field of `MinifyConfig` and of `Resources`.

    Args:
        without: fields that it does not get.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=_option(field, help_of[field.name], panel),
        )
        for record, panel in ((MinifyConfig, "Method and calibration"), (Resources, "Resources"))
        for help_of in [documented(record)]
        for field in fields(record)
        if field.name not in without
    ]
    command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
    return command


def _option(field: Field[Any], text: str, panel: str) -> Any:
    if field.name == "damping":
        option = typer.Option(help=text, rich_help_panel=panel, parser=_number_or_word, metavar="<number>")
        return Annotated[Any, option]
    if field.name == "structures":
        text += " As in `mlp,attention`, or one each time."
        return Annotated[list[str], typer.Option(help=text, rich_help_panel=panel, callback=_words, metavar="<words>")]
    if isinstance(field.default, bool) and not field.default:
        return Annotated[bool, typer.Option(f"--{field.name}", help=text, rich_help_panel=panel)]
    if get_origin(field.type) is Literal:
        # A column of all choices would leave the names of the options no room in 80 columns.
        choices = get_args(field.type)
        named = all(f"`{choice}`" in text for choice in choices)
        text = text if named else f"{text} One of {', '.join(choices)}."
        return Annotated[field.type, typer.Option(help=text, rich_help_panel=panel, metavar="<word>")]
    return Annotated[field.type, typer.Option(help=text, rich_help_panel=panel)]


def _number_or_word(text: Any) -> float | str:
    try:
        return float(text)
    except ValueError:
        return str(text)


def _words(texts: Sequence[str]) -> tuple[str, ...]:
    """The words of an option that may list several of them and may be repeated."""
    return tuple(word.strip() for text in texts for word in text.split(","))
