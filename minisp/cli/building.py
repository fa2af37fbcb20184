"""The command `build`: a recipe in, a gated model out."""

import json
from pathlib import Path
from typing import Annotated

import typer

from minisp.cli.arguments import Json, Quiet
from minisp.cli.console import errors, show

RecipeFile = Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder to write; new, empty, or what this recipe built. Default: the recipe without .yaml."),
]
Schema = Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, and do nothing else.")]


def build(
    recipe: RecipeFile = None, out: Out = None, schema: Schema = False, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Minify, export and gate by a recipe. A gate that fails ends with exit code 11 and leaves no output."""
    from minisp.errors import GateError
    from minisp.recipes.recipe import Recipe

    if schema:
        print(json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False))
        return
    if recipe is None:
        raise typer.BadParameter("expected a recipe, or --schema.", param_hint="RECIPE")
    from minisp.recipes.build import build as built_from
    from minisp.report.progress import progress_bar

    with errors(lambda: "Nothing was left at the output path. The same command goes on from what was finished."):
        try:
            with progress_bar(quiet, lines=not as_json) as progress:
                result = built_from(recipe, out, progress=progress)
        except GateError as error:
            if as_json:
                print(json.dumps(error.facts, indent=2))
            raise
    show(result.as_dict(), as_json, quiet, result.table(), result.lines())
