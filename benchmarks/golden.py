"""Do the written weights stay the same, byte for byte, while the code is rearranged?

    python benchmarks/golden.py record FILE [--model FOLDER]
    python benchmarks/golden.py check FILE [--model FOLDER]

A record is the SHA-256 of every weight file that `minify` writes for a tiny random model of every family and for each
recipe: the defaults, uniform widths, and the paper's. `--model` adds a real checkpoint, on a few random tokens. `check`
fails where a digest is another one, or is missing.

All is computed on the portable path, by torch in one thread. The bytes still depend on the processor and on torch's
version, because a BLAS adds in the order that suits the processor's vectors. So a record serves on the machine that
made it: record before a change, check after it. `check` refuses a record of another machine.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
from minify_cpu import PAPER

sys.path.append(str(Path(__file__).parents[1]))

from tests.tiny import MODEL_TYPES, save_checkpoint, tiny_model

RECIPES: dict[str, dict[str, Any]] = {"defaults": {}, "uniform": {"widths": "uniform"}, "paper": PAPER}
KEEP, WINDOWS, LENGTH = 0.6, 16, 32
# What the bytes depend on besides the code.
MACHINE = ("cpu", "gpu", "python", "torch", "transformers")


def digests(source: Path, vocabulary: int, options: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every weight file that a run on the model in `source` writes."""
    from minisp import fast

    ids = torch.randint(vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    options = {"keep": KEEP, "dtype": "float32", "device": "cpu", "batch": 4, **options}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Few tokens are enough to tell bytes apart.
        warnings.simplefilter("ignore", UserWarning)
        out = Path(folder) / "out"
        fast.minify(source, out=out, calibration=ids, progress=lambda phase, done, total: None, **options)
        return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.glob("*.safetensors"))}


def all_digests(model_types: tuple[str, ...] = MODEL_TYPES, model: Path | None = None) -> dict[str, str]:
    """ "model recipe file" → SHA-256, for the tiny models and, where given, the checkpoint in `model`."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: save_checkpoint(Path(folder) / name, tiny_model(name)) for name in model_types}
        sources |= {} if model is None else {model.name: model}
        for name, source in sources.items():
            vocabulary = json.loads((source / "config.json").read_text("utf-8"))["vocab_size"]
            for recipe, options in RECIPES.items():
                for file, digest in digests(source, vocabulary, options).items():
                    found[f"{name} {recipe} {file}"] = digest
            harness.say(f"{name}: done")
    return found


def machine() -> dict[str, Any]:
    """What the bytes depend on besides the code."""
    description = harness.machine()
    return {key: description[key] for key in MACHINE}


def check(record: dict[str, Any], found: dict[str, str]) -> list[str]:
    """What differs between a record and the digests of now, a line each.

    Raises:
        SystemExit: the record is another machine's.
    """
    if record["machine"] != machine():
        raise SystemExit(
            f"Golden record: expected one of this machine, {machine()}, got one of {record['machine']}. Record anew "
            "here, with the code as it was."
        )
    wanted = record["weights"]
    lines = [f"missing: {name}" for name in sorted(set(wanted) - set(found))]
    lines += [f"new: {name}" for name in sorted(set(found) - set(wanted))]
    return lines + [f"differs: {name}" for name in sorted(set(wanted) & set(found)) if wanted[name] != found[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Are the written weights the same bytes as before?")
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", type=Path, help="a checkpoint besides the tiny models")
    arguments = parser.parse_args()
    # Not to be imported from here on: every operation falls to torch.
    sys.modules["minisp._C"] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    found = all_digests(model=arguments.model)
    if arguments.action == "record":
        arguments.file.write_text(json.dumps({"machine": machine(), "weights": found}, indent=1) + "\n", "utf-8")
        print(f"{len(found)} weight files recorded in {arguments.file}")
        return
    differences = check(json.loads(arguments.file.read_text("utf-8")), found)
    print("\n".join([*differences, f"{len(found)} weight files, {len(differences)} not as recorded"]))
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
