"""What an answer looked at: the attention of its words to the cells of the pictures, from one plain forward pass.

    vectors = agent.look("photo.jpg")
    prompt = agent.prompt([user_message("what is this?", 1)])
    for word in attention_of_words(agent.model, agent.tokenizer, prompt, "a red bus", vectors):
        word.text, word.weights                  # "bus", (n_layer, n_head, 1, N)

With fusion="prefix" a cell is a token of the row, and the weights are those of self-attention: what is missing to 1 went to text.
With fusion="cross" they are those of cross-attention, and add up to 1 over the pictures that a position can see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class WordAttention:
    """A word of an answer. weights: (n_layer, n_head, P, N) float32, from where the word is said to the N cells of P pictures,
    row by row from the top left; the mean over its tokens."""

    text: str
    weights: Any  # a tensor, or an array of a model that runs without torch

    @property
    def mean(self):
        """(P, N): over all layers and heads."""
        return self.weights.mean((0, 1))


def check_has_cells(model) -> None:
    """Raises UserError for a model whose vision vectors are not the cells of a grid."""
    if not getattr(model.config, "places_per_image", 0):
        raise UserError("this model has no cells: it is a text model and sees no pictures")
    if hasattr(model, "act"):
        raise UserError(
            "this model has no cells: each of its glances reads the whole picture, so its attention points nowhere"
        )
    if model.config.vision_tokens_per_image == 1:
        raise UserError(
            "this model has no cells: it sees a picture as one vector. Train one with a grid, such as --vision-tokens 16"
        )


def attention_to_images(model, ids: Sequence[int], vectors):
    """(n_layer, n_head, T, P, N) float32 on the CPU: how much each of T positions attends to each cell of P pictures. A tensor,
    or an array of a model that runs without torch.

    ids: T token ids of one row with the placeholders of the pictures. vectors: (P, N, D) from `look`. A position before a
    picture has 0 for its cells. Raises UserError for a model without cells (see `check_has_cells`), and where ids and vectors do
    not match.
    """
    check_has_cells(model)
    return model.attention(ids, vectors)


def attention_of_words(model, tokenizer: Tokenizer, prompt: Sequence[int], answer: str, vectors) -> list[WordAttention]:
    """Each word of the answer, in its order, with the attention of the positions that say it: those before its tokens.

    prompt: the ids up to where the answer begins. vectors: (P, N, D). Raises UserError as `attention_to_images` does.
    """
    tokens = tokenizer.encode(answer)
    words = word_tokens(tokenizer, tokens)
    weights = attention_to_images(model, [*prompt, *tokens[:-1]], vectors)[:, :, len(prompt) - 1 :]
    return [WordAttention(text, weights[:, :, places].mean(2)) for text, places in words]


def word_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[tuple[str, list[int]]]:
    """(word, the indices of its tokens): words are what stands between spaces. A token with the end of one word and the begin of
    another belongs to the latter."""
    ends, text = [], b""
    for token in tokens:
        text += tokenizer.bytes_of(token)
        ends.append(len(text))
    words, start = [], 0
    for piece in text.split(b" "):
        end = start + len(piece)
        # a token belongs to the word that its last byte is in; one of a lone space to none
        places = [i for i, last in enumerate(ends) if start < last <= end]
        if piece.strip() and places:
            words.append((piece.decode("utf-8", errors="replace").strip(), places))
        start = end + 1
    return words
