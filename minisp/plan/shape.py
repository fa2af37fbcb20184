"""The sizes of a model and of a run on it, which memory, work and traffic follow from."""

from dataclasses import dataclass

from minisp.models.families import CausalLM, decoder_layers, family_of, structures_of


@dataclass(frozen=True)
class Shape:
    """What memory depends on.

    Attributes:
        num_layers, hidden, width, vocabulary: L, d, m, V.
        layer: parameters of a layer.
        vocabulary_weights: parameters of embedding and head, a tied weight counted once; `outside`: all others that
            are in no layer.
        tokenizer: bytes of the tokenizer's file.
        tokens, batch_tokens: T of this process, and of a micro-batch.
        item, stored_item: bytes of an element, in the compute type and as stored.
        autograd: bytes per token that autograd keeps of one layer; see `layers.autograd_bytes`.
        kept: units that stay at most, in one layer that is cut.
        gram: whether the saliency sweep collects Gram matrices.
        trials: tokens on which trial cuts are made; 0 where none is.
        refits: tokens of this process on which layers are refitted or corrected on the pruned model; 0 where none is.
        corrects: whether these tokens run through the dense model beside the pruned one.
        logits: bytes that a chunk of logits may take.
        loaded: whether the model was in memory before the run: its weights are then no part of what the run needs.
        streams: whether weights stream from a checkpoint; else the model is in memory whole.
        writes: whether what waits goes to a scratch folder; else it waits in memory.
    """

    num_layers: int
    hidden: int
    width: int
    vocabulary: int
    layer: int
    vocabulary_weights: int
    outside: int
    tokenizer: int
    tokens: int
    batch_tokens: int
    item: int
    stored_item: int
    autograd: int
    kept: int
    gram: bool
    trials: int
    refits: int
    corrects: bool
    logits: int
    loaded: bool
    streams: bool
    writes: bool


def shape_of(model: CausalLM, *, tokens: int, batch_tokens: int, item: int, stored_item: int, **rest: int) -> Shape:
    """The shape of a model, whose weights may be on the meta device; `rest`:
    tokenizer, autograd, kept, gram, trials, refits, corrects, logits, loaded, streams, writes."""
    family = family_of(model.config)
    layers = decoder_layers(model, family)
    parameters = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    ends = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    return Shape(
        num_layers=len(layers),
        hidden=model.config.hidden_size,
        width=max(structure.width for structure in structures_of(model, family)),
        vocabulary=model.config.vocab_size,
        layer=max(parameters),
        vocabulary_weights=sum(ends.values()),
        outside=sum(p.numel() for p in model.parameters()) - sum(parameters) - sum(ends.values()),
        tokens=tokens,
        batch_tokens=batch_tokens,
        item=item,
        stored_item=stored_item,
        **rest,  # type: ignore[arg-type]
    )
