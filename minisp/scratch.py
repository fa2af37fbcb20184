"""Where statistics wait between the sweeps: a scratch folder beside the output, or memory where there is no output."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minisp.errors import OutputError
from minisp.statistics import LayerStatistics


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
