"""Where statistics wait between the sweeps: a scratch folder beside the output, or memory where there is no output."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisp.errors import OutputError
from minisp.statistics import LayerStatistics


@contextmanager
def scratch_folder(target: Path | None) -> Iterator[Path | None]:
    """A folder for statistics on the output's disk, removed at the end; None keeps them in memory.

    Folders that killed runs for the same output left behind are removed first: their names tell the process.

    Raises:
        OutputError: no folder can be made beside the output.
    """
    if target is None:
        yield None
        return
    prefix = f".{target.name}.scratch-"
    try:
        for path in target.parent.iterdir():
            owner = re.fullmatch(re.escape(prefix) + r"(\d+)-\w+", path.name)
            if owner and not psutil.pid_exists(int(owner[1])):
                shutil.rmtree(path, ignore_errors=True)
        folder = TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-", dir=target.parent)
    except OSError as error:
        raise OutputError(f"Output {target}: no scratch folder can be made beside it ({error}).") from error
    with folder as name:
        yield Path(name)


class Scratch:
    """One record of statistics per layer, on disk or in memory.

    Args:
        folder: an existing folder to keep the records in; None keeps them in memory.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._memory: dict[int, LayerStatistics] = {}

    def put(self, layer: int, statistics: LayerStatistics) -> None:
        """Keep a layer's statistics; on disk, the caller's record loses its Gram matrix to free the memory.

        Raises:
            OutputError: the disk is full.
        """
        if self.folder is None:
            self._memory[layer] = statistics
            return
        tensors: dict[str, Tensor] = {
            "saliency": statistics.saliency.cpu(),
            "num_tokens": torch.tensor(statistics.num_tokens),
        }
        if statistics.gram is not None:
            tensors["gram"] = statistics.gram.cpu()
        try:
            save_file(tensors, self._path(layer))
        except (SafetensorError, OSError) as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise OutputError(
                f"Statistics of layer {layer}: expected room for {size / 1e6:.1f} MB in the scratch folder beside the "
                f"output, got: {error}. Free some space or choose another disk; nothing was left there."
            ) from error
        statistics.gram = None

    def take(self, layer: int, device: torch.device) -> LayerStatistics:
        """Give a layer's statistics back and forget them."""
        if self.folder is None:
            return self._memory.pop(layer)
        tensors = load_file(self._path(layer))
        self._path(layer).unlink()
        gram = tensors["gram"].to(device) if "gram" in tensors else None
        return LayerStatistics(int(tensors["num_tokens"]), tensors["saliency"].to(device), gram)

    def _path(self, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"layer_{layer:04d}.statistics.safetensors"
