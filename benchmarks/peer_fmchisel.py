"""fmchisel for peers.py: OSSCAR (Meng et al., 2024), which drops MLP units one after the other by the least squares
error of the layer's output and refits the rest, layer after layer on what the pruned layers below give.

`one by one` is its default (`update_iter_mlp=1`), which it calls the better and slower setting. It prunes through
llm-compressor, and its own `pack` makes the smaller model.
"""

import shutil
import time

import torch
from peer_worker import arguments, first_loss, load_dense, read_windows, report, uniform_width
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    """The command line."""
    args = arguments(__doc__, ("one by one",))
    # Here, so that --help works where they are not installed.
    from datasets import Dataset
    from fmchisel.pruning.osscar.base import OSSCARModifier
    from fmchisel.pruning.osscar.utils.helpers import pack
    from llmcompressor import oneshot

    model, windows = load_dense(args.model), read_windows(args.windows)
    loss = first_loss(model, windows)
    dropped = model.config.intermediate_size - uniform_width(model, args.keep)
    settings = {"num_drop_mlp_neuron": dropped, "num_drop_attn_group": 0, "update_iter_mlp": 1, "dampening_frac": 0.01}
    ids = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    start = time.perf_counter()
    oneshot(
        model=model,
        # llm-compressor asks for one, though the windows are tokens; transformers 4 does not know what class the folder
        # names.
        processor=PreTrainedTokenizerFast(tokenizer_file=f"{args.model}/tokenizer.json"),
        dataset=Dataset.from_dict(ids),
        recipe=[OSSCARModifier(**settings)],
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
    )
    model.save_pretrained(args.out)
    pack(str(args.out), dropped, 0, original_model_path=args.model)
    seconds = time.perf_counter() - start
    # `pack` leaves the zeroed full-width model beside the result.
    shutil.rmtree(f"{args.out}-uncompressed")
    packed = AutoModelForCausalLM.from_pretrained(args.out)
    report(args.result, packed, {"first_loss": loss, "settings": settings, "seconds": seconds})


if __name__ == "__main__":
    main()
