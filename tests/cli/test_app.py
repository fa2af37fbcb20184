"""The command line: what it prints where, which exit code it returns, and that it does the whole job."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import typer
from click import unstyle
from click.testing import Result
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import minisp
from minisp import errors, fast
from minisp.cli.app import app
from minisp.config import MinifyConfig
from minisp.plan.plan import plan_dict
from minisp.resources import Resources
from tests.tiny import WIDTH, save_checkpoint, tiny_model

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SMALL = ("--window", "32", "--num-windows", "8", "--dtype", "float32")
CHOICES = {field.name: get_args(field.type) for field in fields(MinifyConfig) if get_origin(field.type) is Literal}


def run(*arguments: object, columns: int = 2000) -> Result:
    # By default, a terminal wide enough that no line is broken.
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny-llama", tiny_model("llama"))


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """Two texts of 640 tokens each, which is 20 windows of 32."""
    prose, digits = tmp_path / "prose.txt", tmp_path / "digits.txt"
    prose.write_text("".join(f"sentence {i} of no consequence, then another one. " for i in range(14))[:640])
    digits.write_text(("3.14159 26535 89793 + 2.71828 = " * 20)[:640])
    return prose, digits


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_option_and_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    # Where the environment asks for colours, they would stand inside the flags.
    shown = unstyle(result.stdout)
    assert f"Example: minisp {name} " in shown
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        # Help shows mathematical signs and quotes as they are, so the beginning of every text can be looked for.
        assert parameter.help.split(";")[0].split("[")[0].strip() in shown
        for flag in parameter.opts if parameter.param_type_name == "option" else ():
            assert flag in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_in_80_columns_cuts_no_name(name: str) -> None:
    shown = unstyle(run(name, "--help", columns=80).stdout)
    assert max(len(line) for line in shown.splitlines()) <= 80
    for parameter in COMMANDS[name].params:
        for flag in parameter.opts if parameter.param_type_name == "option" else ():
            assert re.search(rf"{flag}(?![\w-])", shown), flag


@pytest.mark.parametrize("name", ["minify", "plan"])
@pytest.mark.parametrize("option", CHOICES)
def test_help_names_every_choice(name: str, option: str) -> None:
    parameter = next(parameter for parameter in COMMANDS[name].params if parameter.name == option)
    assert all(choice in parameter.help for choice in CHOICES[option])


def test_the_main_help_lists_commands_and_exit_codes() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert set(COMMANDS) == {"build", "minify", "plan", "eval", "export", "demo", "check", "report", "compare", "sweep"}
    assert all(name in result.stdout for name in COMMANDS)
    codes = {int(code) for code in re.findall(r"(\d+) [a-z]", result.stdout.split("Exit codes:")[1])}
    raised = {error.exit_code for error in vars(errors).values() if isinstance(error, type)}
    assert codes == raised | {0, 1, 2, 130}


def test_names_that_look_like_markup_are_printed_as_they_are(
    model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = tmp_path / "m[bold]x[b]", tmp_path / 'o[v1]"q'
    source.symlink_to(model)
    done = run("minify", source, "--out", out, "-c", texts[0], *SMALL)
    assert done.exit_code == 0, done.stderr
    assert f"written to {out}" in done.stdout
    assert json.dumps(str(out)) in done.stdout
    assert "m[bold]x[b]" in done.stdout


def test_the_demo_refuses_a_full_folder_before_it_fetches_anything(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    refused = run("demo", "--out", tmp_path)
    assert refused.exit_code == 8
    assert "expected a new or empty folder" in refused.stderr


@pytest.mark.parametrize("name", ["minify", "plan"])
def test_every_field_of_the_config_is_an_option_with_its_default(name: str) -> None:
    defaults = {parameter.name: parameter.default for parameter in COMMANDS[name].params}
    for record in (MinifyConfig, Resources):
        assert {field.name: defaults[field.name] for field in fields(record)} == asdict(record())


def test_plan_prints_a_table_or_json_or_nothing(model: Path) -> None:
    before = sorted(model.parent.iterdir())
    table = run("plan", model, "--keep", "0.5", *SMALL)
    assert table.exit_code == 0 and table.stderr == ""
    assert re.search(r"tiny-llama \(llama\).*at most 72 of 144 units.*8 windows of 32 tokens", table.stdout, re.DOTALL)

    as_json = run("plan", model, "--keep", "0.5", *SMALL, "--json")
    assert as_json.exit_code == 0 and as_json.stderr == ""
    planned = json.loads(json.dumps(plan_dict(fast.plan(model, keep=0.5, window=32, num_windows=8, dtype="float32"))))
    found = json.loads(as_json.stdout)
    # The process itself grows a little from one plan to the next.
    assert found["peak_memory"] - found["base_memory"] == planned["peak_memory"] - planned["base_memory"]
    changing = ("peak_memory", "base_memory", "expected_seconds")
    assert found["expected_seconds"] > 0
    assert {k: v for k, v in found.items() if k not in changing} == {
        k: v for k, v in planned.items() if k not in changing
    }

    assert run("plan", model, *SMALL, "--quiet").output == ""
    assert run("plan", model, "--keep", "0.5", *SMALL, "--quiet", "--json").stdout.startswith("{")
    assert sorted(model.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-c", "TEXT"), "25% of them generic: half written"),
        (("-c", "TEXT:3", "-c", "builtin:code"), None),
        ((), "100% of them generic: half written"),
        (("-c", "TEXT", "--generic", "0"), None),
        (("--scratch", "SCRATCH", "--reuse"), "25% of them generic, unless the text names builtin sources: half"),
    ],
)
def test_plan_and_minify_say_what_generic_text_joins(
    arguments: tuple[str, ...], says: str | None, model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    names = {"TEXT": str(texts[0]), "TEXT:3": f"{texts[0]}:3", "SCRATCH": str(tmp_path / "scratch")}
    arguments = tuple(names.get(argument, argument) for argument in arguments)
    planned = run("plan", model, *arguments, *SMALL)
    assert planned.exit_code == 0
    minified = run("minify", model, *arguments, "--out", tmp_path / "out", *SMALL)
    for shown in (planned.stdout, minified.stderr):
        table = shown[: shown.index("method")]
        assert "8 windows of 32 tokens (256)" in table
        assert "generic" not in table if says is None else says in table


def test_the_plan_counts_what_the_model_writes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minisp.plan.plan.product_rate", lambda device, dtype: 1e9)
    found = {}
    for source in ("builtin:code", "builtin:model:1", "builtin:model"):
        mixed = ("-c", "builtin:code") if source.endswith("1") else ()
        planned = run("plan", model, "-c", source, *mixed, *SMALL, "--json")
        found[source] = json.loads(planned.stdout)["expected_seconds"]
    half, whole = found["builtin:model:1"] - found["builtin:code"], found["builtin:model"] - found["builtin:code"]
    assert half > 0 and whole == pytest.approx(2 * half)


def test_plan_and_report_print_as_tables(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither a terminal's width nor its colours change the text.
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("FORCE_COLOR", "1")
    planned = fast.plan(model, keep=0.5, window=32, num_windows=8, dtype="float32")
    shown = str(planned)
    assert shown.startswith("Plan: tiny-llama (llama)") and f"{planned}" == shown and "\x1b" not in shown
    for row in ("layers", "keep", "calibration", "method", "memory, peak"):
        assert re.search(rf"^│ {row} +│", shown, re.MULTILINE), row
    out = tmp_path / ("a" * 120)
    report = fast.minify(model, keep=0.5, out=out, calibration=torch.randint(64, (8, 32)), dtype="float32")
    reported = str(report)
    assert reported.startswith("Result: tiny-llama") and "\x1b" not in reported
    assert re.search(r"^│ MLP units +│ +144 │ +72 │ 0.500 │$", reported, re.MULTILINE)
    assert re.search(r"^calibration: 8 windows of 32 tokens", reported, re.MULTILINE)
    assert f'from_pretrained("{out}",' in reported
    for line in f"{shown}\n{reported}".splitlines():
        assert (len(line) <= 100 or str(out) in line) and line == line.rstrip()


def test_minify_does_the_whole_job(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    sources = [part for text in texts for part in ("-c", f"{text}:0.5")]
    result = run("minify", model, "--keep", "0.7", "--out", out, *sources, *SMALL)
    assert result.exit_code == 0
    assert "Plan: tiny-llama (llama)" in result.stderr
    assert "25% of them generic" in " ".join(result.stderr.split())
    for expected in ("Result: tiny-llama", "3 windows of 32 tokens from prose.txt", f"written to {out}"):
        assert expected in result.stdout
    line = re.search(r"load it with: (.*)", result.stdout)
    assert line is not None
    loaded = eval(line[1], {"AutoModelForCausalLM": AutoModelForCausalLM})
    widths = [layer.mlp.up_proj.weight.shape[0] for layer in loaded.model.layers]
    assert 0.6 * 3 * WIDTH < sum(widths) <= 0.7 * 3 * WIDTH and len(set(widths)) > 1
    assert torch.isfinite(loaded(torch.arange(32)[None]).logits).all()

    again = run("minify", model, "--keep", "0.7", "--out", tmp_path / "again", *sources, *SMALL, "--json")
    assert again.exit_code == 0
    report = json.loads(again.stdout)
    own, generic = report["calibration"][:2], report["calibration"][2:]
    assert own == [f"3 windows of 32 tokens from {text.name}" for text in texts]
    assert generic[0] == "1 window of 32 tokens from text that the model wrote itself (generic)"
    assert generic[-1].startswith("the model wrote by 32 openings of texts, every fourth text from a random token")
    assert [layer["kept"] for layer in report["layers"]] == widths
    assert report["plan"]["config"]["keep"] == 0.7
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_minify_weighs_its_sources_and_uniform_widths_need_no_code(
    model: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "uniform"
    sources = ("-c", f"{texts[0]}:3", "-c", texts[1])
    result = run("minify", model, "--out", out, *sources, *SMALL, "--widths", "uniform", "--generic", "0", "--json")
    report = json.loads(result.stdout)
    assert report["calibration"] == [
        "6 windows of 32 tokens from prose.txt",
        "2 windows of 32 tokens from digits.txt",
    ]
    assert "trust_remote_code" not in report["load_line"]
    assert AutoModelForCausalLM.from_pretrained(out).config.intermediate_size == 38


def test_quiet_leaves_only_notes(model: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    quiet = run("minify", model, "--out", tmp_path / "a", "-c", texts[0], *SMALL, "--quiet")
    assert quiet.exit_code == 0 and quiet.output == ""
    flags = ("--window", "32", "--num-windows", "30", "--generic", "0", "--dtype", "float32", "--quiet")
    short = run("minify", model, "--out", tmp_path / "b", "-c", texts[0], *flags)
    assert short.exit_code == 0 and short.stdout == ""
    assert short.stderr.startswith("note: prose.txt holds 20 windows of 32 tokens, not the 30 asked for")


@pytest.mark.parametrize("name", ["minify", "plan"])
@pytest.mark.parametrize("option", CHOICES)
def test_a_choice_outside_its_list_is_wrong_usage(name: str, option: str, model: Path) -> None:
    flag = "--" + option.replace("_", "-")
    required = ("--out", model.parent / "out") if name == "minify" else ()
    result = run(name, model, *required, flag, "magic")
    assert result.exit_code == 2 and result.stdout == ""
    assert flag in result.stderr
    assert all(choice in result.stderr for choice in CHOICES[option])


WRONG_USAGE: dict[str, tuple[str, ...]] = {
    "no command": (),
    "unknown command": ("shrink",),
    "no model": ("plan",),
    "no output": ("minify", "MODEL"),
    "unknown option": ("plan", "MODEL", "--kepe", "0.5"),
    "not a number": ("plan", "MODEL", "--keep", "half"),
    "not a whole number": ("plan", "MODEL", "--window", "3.5"),
    "eval without text": ("eval", "MODEL"),
    "eval of three models": ("eval", "MODEL", "MODEL", "MODEL", "--text", "x.txt"),
    "eval of one-token windows": ("eval", "MODEL", "--text", "x.txt", "--window", "1"),
}


@pytest.mark.parametrize("arguments", WRONG_USAGE.values(), ids=WRONG_USAGE)
def test_wrong_usage_has_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


FAILURES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "option": (("plan", "MODEL", "--keep", "2"), 3, r"keep: expected a number in \(0, 1\], got 2"),
    "option of demo": (("demo", "--keep", "2"), 3, r"keep: expected a number in \(0, 1\], got 2"),
    "option of eval": (("eval", "MODEL", "--text", "TEXT", "--dtype", "int8"), 3, r"expected one of auto, .*'int8'"),
    "no such folder": (("plan", "./missing"), 5, r"expected a checkpoint folder.*Check the path"),
    "no such model": (("plan", "nobody/nothing"), 5, r"the hub did not provide it"),
    "eval of no folder": (("eval", "./missing", "--text", "TEXT"), 5, r"expected a checkpoint folder"),
    "no such text of a plan": (("plan", "MODEL", "-c", "missing.txt"), 6, r"Expected a text file"),
    "no such text": (("minify", "MODEL", "--out", "OUT", "-c", "missing.txt", *SMALL), 6, r"Expected a text file"),
    "weight zero": (("minify", "MODEL", "--out", "OUT", "-c", "TEXT:0", *SMALL), 6, r"finite weight above 0"),
    "eval of no text": (("eval", "MODEL", "--text", "missing.txt"), 6, r"Expected a text file"),
    "eval of one text and none": (("eval", "MODEL", "--text", "TEXT", "--text", "no.txt"), 6, r"Expected a text file"),
    "eval beyond positions": (("eval", "MODEL", "--text", "TEXT", "--window", "65"), 6, r"windows of 2 to 64 tokens"),
    "taken output": (("minify", "MODEL", "--out", "MODEL", "-c", "TEXT", *SMALL), 8, r"got one with content"),
}


@pytest.mark.parametrize(("arguments", "code", "says"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("flags", [(), ("--json",), ("--quiet",)], ids=["plain", "json", "quiet"])
def test_a_failure_has_its_exit_code_and_prints_no_result(
    arguments: tuple[str, ...], code: int, says: str, flags: tuple[str, ...], model: Path, texts: tuple[Path, Path]
) -> None:
    names = {"MODEL": model, "TEXT": texts[0], "TEXT:0": f"{texts[0]}:0", "OUT": texts[0].with_name("out")}
    result = run(*(names.get(argument, argument) for argument in arguments), *flags)
    assert result.exit_code == code
    assert result.stdout == ""
    assert re.search(says, result.stderr) and "Traceback" not in result.stderr
    assert not names["OUT"].exists()  # type: ignore[union-attr]


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (RuntimeError, 1)])
def test_interrupts_and_bugs_have_codes_of_their_own(
    raised: type[BaseException], code: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(fast, "plan", fail)
    assert run("plan", model).exit_code == code


def test_the_module_is_the_command(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(minisp.__file__).parents[1]), "COLUMNS": "2000"}

    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "minisp", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    helped = process("--help")
    assert (helped.returncode, helped.stderr) == (0, "") and "minify" in helped.stdout
    failed = process("plan", "./missing")
    assert (failed.returncode, failed.stdout) == (5, "")
    assert "CheckpointError" in failed.stderr and "Traceback" not in failed.stderr
