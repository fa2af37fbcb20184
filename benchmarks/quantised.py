"""Pruning and quantisation together: perplexity, bytes and speed of every share kept in every type.

Usage: python quantised.py --text TEXT NAME=FOLDER [NAME=FOLDER …], the dense model first.
Needs torchao, which may lie in a folder of PYTHONPATH, and llama.cpp's environment, see server_environments.py.

Perplexity is that of transformers in float32 on the weights that a type leaves, windows of 1024 tokens. Types of GGUF
are made by llama.cpp's own quantiser (see ggml.py). int8, int4 and int3 are torchao's weight-only ones: linear layers
alone, symmetric, one scale in bfloat16 per row for int8 and per 32 neighbours of a row for the others; the embeddings,
tied to the head, stay in bfloat16. Bytes are those of the weights in their types. Speed is llama.cpp's, of one thread,
in tokens per second of processor time, all files in turns (see llamacpp_speed.py).

Every cell is in results/quantised_MACHINE.json as soon as it is measured, and is not measured again.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ggml
import harness
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from serving_speed import llamacpp_rates
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from minisp.evaluate.perplexity import perplexity
from minisp.export.targets import export

WINDOW, WINDOWS = 1024, 3
TORCHAO = {"int8": torch.int8, "int4": torch.int4, "int3": torch.int3}
GROUP = 32
TYPES = ("bf16", "q8_0", "int8", "q4_k", "int4", "q4_0", "int3")
# What is timed: tokens of the prompt, of the answer, turns, and the types.
PROMPT, ANSWER, TURNS = 128, 16, 5
TIMED = ("bf16", "q8_0", "q4_k")


def bfloat16_(model: Any) -> int:
    """Bytes of the model as it is."""
    return sum(parameter.numel() * 2 for parameter in model.parameters())


def torchao_(model: Any, name: str) -> int:
    """Give the linear layers the values that a type of torchao leaves; returns the bytes of all weights."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    granularity = PerAxis(0) if name == "int8" else PerGroup(GROUP)
    bits = torch.iinfo(torch.int8).bits if name == "int8" else int(name.removeprefix("int"))
    total = sum(parameter.numel() * 2 for parameter in model.parameters())
    head = model.get_output_embeddings()

    def chosen(module: nn.Module, where: str) -> bool:
        return isinstance(module, nn.Linear) and module is not head

    quantize_(model, IntxWeightOnlyConfig(TORCHAO[name], granularity), filter_fn=chosen)
    for where, module in model.named_modules():
        if chosen(module, where):
            weight = module.weight
            total += weight.numel() * bits // 8 + weight.scale.numel() * 2 - weight.numel() * 2
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return total


def ggml_(model: Any, scheme: str) -> int:
    """Give every matrix the values that a type of GGUF leaves; returns the bytes of all weights."""
    total = 0
    for name, parameter in model.named_parameters():
        kind = ggml.kind_of(name, tuple(parameter.shape), scheme)
        block, size = GGML_QUANT_SIZES[kind]
        total += parameter.numel() // block * size
        if kind != Kind.F32:
            values = dequantize(ggml.quantised(parameter.detach().float().numpy(), kind), kind)
            # In float32, which holds more than the stored type.
            parameter.data = torch.from_numpy(values)
    return total


def measured(folder: Path, name: str, text: str) -> dict[str, Any]:
    """Perplexity and bytes of a checkpoint folder in a type."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=True).eval()
    makers: dict[str, Callable[..., int]] = {"bf16": bfloat16_}
    makers |= {key: lambda m, key=key: torchao_(m, key) for key in TORCHAO}
    makers |= {key: lambda m, key=key: ggml_(m, key) for key in ggml.SCHEMES}
    size = makers[name](model)
    model.float()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)
    return {"bytes": size, "perplexity": perplexity(model, ids, window=WINDOW, max_windows=WINDOWS).value}


def timed(folders: dict[str, Path], work: Path) -> dict[str, dict[str, list[float]]]:
    """ "NAME, TYPE" → tokens per second of processor time in every turn."""
    paths = {}
    for name, folder in folders.items():
        base = work / f"{name}.gguf"
        export(folder, "gguf", base, dtype="bf16")
        paths[f"{name}, bf16"] = base
        for scheme in TIMED[1:]:
            paths[f"{name}, {scheme}"] = work / f"{name}-{scheme}.gguf"
            ggml.write_quantised(base, paths[f"{name}, {scheme}"], scheme)
    rates = llamacpp_rates([*paths.values()], prompt=PROMPT, num_tokens=ANSWER, turns=TURNS)
    return dict(zip(paths, rates, strict=True))


def table(data: dict[str, Any]) -> Iterator[str]:
    """Types against models: perplexity over that of the first, and megabytes; then how fast llama.cpp is with them."""
    rows = {tuple(key.split(", ")): row for key, row in data["rows"].items()}
    models, kinds = (list(dict.fromkeys(part)) for part in zip(*rows, strict=True))
    dense = rows[models[0], kinds[0]]["perplexity"]
    yield f"Perplexity over that of {models[0]} in {kinds[0]} ({dense:.3f}, {data['windows']} windows of "
    yield f"{data['window']} tokens) · MB:\n\n"

    def cell(model: str, kind: str) -> str:
        row = rows.get((model, kind))
        return f"{row['perplexity'] / dense:.3f} · {row['bytes'] / 1e6:.0f}" if row else ""

    yield harness.markdown(["type", *models], ([kind, *(cell(model, kind) for model in models)] for kind in kinds))
    speed = data["speed"]
    if speed:
        sizes = f"a prompt of {speed['prompt']} tokens and an answer of {speed['answer']}"
        yield f"\nTokens per second of processor time in llama.cpp, {sizes}:\n\n"
        columns = ["model, type", "prefill", "decode"]
        yield harness.markdown(
            columns,
            ([key, *(harness.spread(found[part], 0) for part in columns[1:])] for key, found in speed["rates"].items()),
        )


def main() -> None:
    """Every cell, then all speeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--types", nargs="*", choices=TYPES, default=TYPES, help="Of cells that are missing.")
    parser.add_argument("--speed", action="store_true", help="Measure speed too.")
    options = parser.parse_args()
    folders = {name: Path(folder) for name, _, folder in (model.partition("=") for model in options.models)}
    result = harness.result_name("quantised")
    path = harness.RESULTS / f"{result}.json"
    data: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": {}, "speed": {}}
    data |= {"window": WINDOW, "windows": WINDOWS}
    text = options.text.read_text("utf-8")
    for kind in options.types:
        for name, folder in folders.items():
            if (key := f"{name}, {kind}") not in data["rows"]:
                data["rows"][key] = measured(folder, kind, text)
                print(key, data["rows"][key], flush=True)
                harness.write_json(result, data)
    if options.speed:
        with tempfile.TemporaryDirectory() as work:
            data["speed"] = {"prompt": PROMPT, "answer": ANSWER, "rates": timed(folders, Path(work))}
        harness.write_json(result, data)


if __name__ == "__main__":
    main()
