"""Recipes: what is refused, how it is said, and that the schema knows every option."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from minisp.config import MinifyConfig
from minisp.errors import ConfigError
from minisp.recipes.inputs import recipe_sha256
from minisp.recipes.recipe import BUDGETS, Recipe, load
from minisp.resources import Resources

GOOD = """
source: llama
budget: {keep: 0.8}
calibration: [{source: cal.txt, weight: 2}]
method: {window: 32, structures: [mlp, attention], damping: auto}
export: [{to: gguf, dtype: f16}, {to: padded}]
gates: {max_bytes: 1MB, max_perplexity_ratio: {test.txt: 1.5}}
"""


def read(folder: Path, text: str) -> Recipe:
    (folder / "r.yaml").write_text(text)
    return load(folder / "r.yaml")


def test_a_recipe_becomes_options(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    options = recipe.options()
    assert (options["keep"], options["window"], options["damping"]) == (0.8, 32, "auto")
    assert options["structures"] == ("mlp", "attention") and "target_size" not in options
    # Everything else is the default of the two records.
    for record, extra in ((MinifyConfig, {"keep", "window", "structures", "damping"}), (Resources, set())):
        for field in fields(record):
            if field.name in options and field.name not in extra:
                assert options[field.name] == field.default
    assert recipe.names() == ["model", "model-f16.gguf", "model-padded"]
    assert read(tmp_path, GOOD.replace("keep: 0.8", "target_size: 90MB")).options()["target_size"] == "90MB"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("keep:", "kep:", "key budget.kep: expected one of keep, target_size, target_params, got an unknown key"),
        ("keep: 0.8", "keep: 0.8, target_size: 9MB", "key budget: expected exactly one of keep, target_size"),
        ("{keep: 0.8}", "{}", "key budget: expected exactly one of keep, target_size, target_params, got none"),
        ("keep: 0.8", "keep: 1.2", "key budget.keep: expected less than or equal to 1, got 1.2"),
        ("keep: 0.8", "keep: '0.8'", "key budget.keep: expected a valid number, got '0.8'"),
        ("keep: 0.8", "target_size: 90QB", "Option target_size: expected a size such as 90MB, got '90QB'"),
        ("window: 32", "windw: 32", "key method.windw: expected one of method, pattern"),
        ("window: 32", "window: 0", "Option window: expected a whole number, at least 1, got 0"),
        ("window: 32", "window: yes", "key method.window: expected a valid integer, got True"),
        ("mlp, attention", "mlp, heads", "key method.structures.1: expected 'mlp', 'attention' or 'queries'"),
        ("weight: 2", "weight: 0", "key calibration.0.weight: expected greater than 0, got 0"),
        ("to: padded", "to: onnx", "key export.1.to: expected 'hf', 'hf-per-layer', 'padded', 'gguf'"),
        ("{to: padded}", "{to: padded, dtype: f16}", "key export.1: expected no dtype for padded"),
        ("{to: padded}", "{to: gguf, dtype: f16}", "expected outputs of different names, got model-f16.gguf twice"),
        ("1MB", "lots", "key gates: expected max_bytes such as 120MB, got 'lots'"),
        ("test.txt: 1.5", "test.txt: -1", "key gates.max_perplexity_ratio.test.txt: expected greater than 0"),
        ("source: llama", "source: llama\nname: ../x", "key name: expected to match pattern"),
        ("source: llama", "source: llama\nname: minisp-build.json", "got minisp-build.json twice"),
        ("source: llama", "", "key source: expected a value, got none"),
        ("source: llama", "source: llama\nsource: other", "key 'source' twice"),
        ("source: llama", "source: [llama", "expected YAML of mappings"),
        ("source: llama", "source: 2020-01-01", "expected YAML of mappings"),
    ],
)
def test_what_is_wrong_is_said_with_the_path_of_its_key(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, GOOD.replace(old, new, 1))
    message = str(refused.value)
    assert says in message and message.startswith(f"Recipe {tmp_path / 'r.yaml'}: ")
    assert "\n" not in message


def test_a_missing_an_empty_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a YAML file, got No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="expected an object, got None"):
        read(tmp_path, "")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="expected YAML"):
        load(tmp_path / "r.yaml")


def test_the_schema_describes_every_option_and_forbids_others() -> None:
    schema = Recipe.model_json_schema()
    parts: dict[str, Any] = {"Recipe": schema, **schema["$defs"]}
    assert all(part["additionalProperties"] is False for part in parts.values())
    for part in parts.values():
        assert all(key.get("description") or "$ref" in key for key in part["properties"].values()), part["title"]
    names = {field.name for field in fields(MinifyConfig)} - set(BUDGETS)
    assert set(parts["Method"]["properties"]) == names
    assert set(parts["Budget"]["properties"]) == set(BUDGETS)


def test_a_hash_is_of_what_a_recipe_says_and_not_of_how(tmp_path: Path) -> None:
    first = recipe_sha256(read(tmp_path, GOOD).plain())
    reordered = "\n".join(reversed(GOOD.strip().splitlines())) + "\n# a comment\nname: model\n"
    assert recipe_sha256(read(tmp_path, reordered).plain()) == first
    assert recipe_sha256(read(tmp_path, GOOD.replace("0.8", "0.7")).plain()) != first


def test_the_page_shows_a_recipe_that_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/pipelines.md").read_text("utf-8")
    recipe = read(tmp_path, page.split("```yaml\n", 1)[1].split("```", 1)[0])
    assert recipe.names() == ["smollm2-80", "smollm2-80-q8_0.gguf"]
    assert recipe.gates.max_perplexity_ratio == {"builtin:documentation": 1.6, "builtin:code": 1.6}
