"""A recipe: everything that decides a build, in one YAML file, checked before anything runs."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from minisp.config import MinifyConfig, split_options
from minisp.docstrings import documented
from minisp.errors import ConfigError, one_line
from minisp.resources import Resources
from minisp.units import parse_count, parse_size

MANIFEST_NAME = "minisp-build.json"
BUDGETS = ("keep", "target_size", "target_params")
# Faults of one recipe that a message lists.
MOST_FAULTS = 5


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _options(name: str, record: type, without: tuple[str, ...]) -> type[BaseModel]:
    """The options of a record as a part of the recipe, with their documentation and defaults."""
    help_of = documented(record)
    own = [field for field in fields(record) if field.name not in without]
    keys: Any = {
        field.name: (field.type, Field(default=field.default, description=help_of[field.name])) for field in own
    }
    part: type[BaseModel] = create_model(name, __base__=_Part, **keys)
    return part


if TYPE_CHECKING:
    Method = BaseModel
    Limits = BaseModel
else:
    Method = _options("Method", MinifyConfig, without=BUDGETS)
    Limits = _options("Limits", Resources, without=("scratch", "resume", "reuse"))


class Text(_Part):
    """One source of calibration text."""

    source: str = Field(min_length=1, description="FILE.txt, FILE.jsonl, hf:NAME, builtin:NAME, as for minisp minify.")
    weight: float = Field(default=1.0, gt=0, description="Its share of the windows, relative to the other sources.")


class Budget(_Part):
    """What may stay: exactly one of these."""

    keep: float | None = Field(
        default=None, gt=0, le=1, description="Share of the parameters that may be cut, and stays."
    )
    target_size: str | int | None = Field(default=None, description="Bytes of the weights at most, such as 90MB.")
    target_params: str | int | None = Field(default=None, description="Parameters at most, such as 110M.")

    @model_validator(mode="after")
    def _is_one(self) -> "Budget":
        if len(given := self.model_dump(exclude_none=True)) != 1:
            raise ValueError(f"expected exactly one of {', '.join(BUDGETS)}, got {', '.join(given) or 'none'}")
        return self


class Export(_Part):
    """One form for a server, written beside the model."""

    to: Literal["hf", "hf-per-layer", "padded", "gguf", "nemotron-nas"] = Field(description="As for minisp export.")
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = Field(
        default=None, description="For gguf; default: as stored."
    )

    @model_validator(mode="after")
    def _fits(self) -> "Export":
        if self.dtype is not None and self.to != "gguf":
            raise ValueError(f"expected no dtype for {self.to}, which keeps the stored values, got {self.dtype}")
        return self

    def file_name(self, name: str) -> str:
        """What it is called beside a model of this name; the name says all that it depends on."""
        if self.to == "gguf":
            return f"{name}{f'-{self.dtype}' if self.dtype else ''}.gguf"
        return f"{name}-{self.to}"


class Gates(_Part):
    """What the model has to pass; a build that fails one leaves nothing."""

    max_bytes: str | int | None = Field(default=None, description="Bytes of the weights at most, such as 120MB.")
    max_parameters: str | int | None = Field(default=None, description="Parameters at most, such as 110M.")
    max_perplexity_ratio: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Text (file, builtin:documentation or builtin:code) → perplexity at most, relative to before.",
    )
    window: int = Field(default=1024, ge=2, description="Tokens per window of the perplexity.")
    max_windows: int | None = Field(default=20, ge=1, description="Windows at most, from the start of every text.")

    @model_validator(mode="after")
    def _are_readable(self) -> "Gates":
        for name, parse, example in (("max_bytes", parse_size, "120MB"), ("max_parameters", parse_count, "110M")):
            value = getattr(self, name)
            try:
                readable = value is None or parse(value) > 0
            except ValueError:
                readable = False
            if not readable:
                raise ValueError(f"expected {name} such as {example}, got {value!r}")
        return self


class Recipe(_Part):
    """A build of minisp. Paths are relative to the recipe's folder."""

    source: str = Field(min_length=1, description="A Hugging Face folder, a .gguf file, or a hub id.")
    name: str = Field(
        default="model", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Of the model in the output."
    )
    budget: Budget
    calibration: list[Text] = Field(default=[], description="Text to calibrate on; none is generic text alone.")
    method: Method = Field(default=Method(), description="How to cut and refit, as for minisp minify.")
    resources: Limits = Field(default=Limits(), description="What the build may use, as for minisp minify.")
    export: list[Export] = Field(default=[], description="Forms for servers, beside the model itself.")
    gates: Gates = Field(default=Gates(), description="What the model has to pass.")

    @model_validator(mode="after")
    def _names_differ(self) -> "Recipe":
        names = [MANIFEST_NAME, *self.names()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected outputs of different names, got {', '.join(twice)} twice")
        return self

    def names(self) -> list[str]:
        """What the output holds beside its manifest: the model's folder, then the exports."""
        return [self.name, *(export.file_name(self.name) for export in self.export)]

    def options(self) -> dict[str, Any]:
        """The keyword options of `minisp.fast.minify`."""
        return {
            **self.budget.model_dump(exclude_none=True),
            **self.method.model_dump(),
            **self.resources.model_dump(),
        }

    def plain(self) -> dict[str, Any]:
        """Plain values, defaults included: two recipes are the same where these are equal."""
        return self.model_dump(mode="json")


def load(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: there is no such file, it is no YAML, or a key or value is not what it has to be; the message
            names the path of the key.
    """
    try:
        values = yaml.load(path.read_text("utf-8"), Loader=_Loader)
        text = json.dumps(values)
    except OSError as error:
        raise ConfigError(f"Recipe {path}: expected a YAML file, got {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"Recipe {path}: expected YAML of mappings, lists, strings and numbers, got: {one_line(error)} Correct it."
        ) from error
    try:
        # As JSON, a list is a tuple where one is wanted, and yet no string passes for a number.
        recipe = Recipe.model_validate_json(text, strict=True)
        split_options(**recipe.options())
    except ValidationError as error:
        faults = [_fault(fault) for fault in error.errors()]
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise ConfigError(
            f"Recipe {path}: {'; '.join(faults[:MOST_FAULTS])}{more}. Correct it; minisp build --schema prints every "
            "key."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"Recipe {path}: {error}") from error
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML's own takes the last of two equal keys, and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"key {sorted(twice)[0]!r} twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _fault(fault: Any) -> str:
    """What pydantic found, in our words: path of the key, expected, got."""
    place = ".".join(str(part) for part in fault["loc"])
    where = f"key {place}: " if place else ""
    if fault["type"] == "extra_forbidden":
        return f"{where}expected one of {', '.join(_keys_beside(fault['loc']))}, got an unknown key"
    if fault["type"] == "missing":
        return f"{where}expected a value, got none"
    says = re.sub(r"^(Value error, |\w+ should )", lambda m: "expected to " if "should" in m[0] else "", fault["msg"])
    says = says.replace("expected to be ", "expected ", 1)
    return f"{where}{says}" + ("" if fault["type"] == "value_error" else f", got {fault['input']!r:.80}")


def _keys_beside(loc: tuple[str | int, ...]) -> list[str]:
    """The keys that a recipe may have where an unknown one was found."""
    model: Any = Recipe
    for part in loc[:-1]:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next((x for x in (annotation, *get_args(annotation)) if hasattr(x, "model_fields")), None)
    return list(model.model_fields)
