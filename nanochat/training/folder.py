"""The recipe `folder` as the command line has it: it starts from the model `photos`, unless a flag asks for random weights."""

from nanochat.training.recipes import Folder


def folder_from_photos() -> Folder:
    """The defaults of the recipe `folder` for a model that has learnt to see and to speak: much lower rates, no loss of the
    encoder's own, and dropout against learning few pictures by heart. Those of the class are for random weights. With rates five
    times as high, 100 pictures made the loss on held-out ones rise (dev/LOG.md)."""
    return Folder(
        start_from="photos", train_encoder=False, batchnorm="frozen", encoder_lr=3e-4, word_loss=0.0, decoder_gradient=1.0,
        flip="horizontal", dropout=0.3, feature_dropout=0.2, label_smoothing=0.1, matrix_lr=2e-3, embedding_lr=1e-3,
        head_lr=2e-4, min_steps=100,
    )  # fmt: skip


def other_shape(recipe: Folder) -> list[str]:
    """The fields that name another encoder, tokenizer or shape than that of a checkpoint to start from."""
    default = Folder()
    names = (
        "encoder", "layer", "image_size", "vision_tokens", "fusion", "vocab_size", "tokenizer", "sequence_len", "n_layer",
        "n_head", "n_embd",
    )  # fmt: skip
    return [name for name in names if getattr(recipe, name) != getattr(default, name)]
