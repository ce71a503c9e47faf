"""Losses of the auxiliary heads against plain loops. That of positions: test_cameras_train.py."""

import torch

from nanochat.training.auxiliary import AnswerTokensHead, CellsHead


def test_the_loss_of_answer_tokens_equals_a_plain_loop():
    """Each picture: the mean over its tokens of -log p(token); nothing for a picture without tokens."""
    torch.manual_seed(0)
    tokens = [[1, 4], [], [2], [0, 3, 5]]
    head, vectors, items = AnswerTokensHead(6, 7, tokens), torch.randn(4, 3, 6), [3, 1, 0, 0]
    expected = torch.zeros(())
    for seen, item in zip(vectors, items, strict=True):
        logits = head.linear.weight @ seen.mean(0) + head.linear.bias
        for token in tokens[item]:
            expected -= (logits[token] - logits.exp().sum().log()) / len(tokens[item])
    torch.testing.assert_close(head.loss(vectors, items), expected)


def test_the_loss_of_cells_equals_a_plain_loop():
    """Each picture: the mean over its cells of the cosine distance."""
    torch.manual_seed(0)
    head, vectors, targets = CellsHead(6, 5), torch.randn(3, 4, 6), torch.randn(3, 4, 5)
    expected = torch.zeros(())
    for picture, teacher in zip(vectors, targets, strict=True):
        for cell, target in zip(picture, teacher, strict=True):
            found = head.linear.weight @ cell + head.linear.bias
            expected += (1 - found @ target / (found.norm() * target.norm())) / 4
    torch.testing.assert_close(head.loss(vectors, targets), expected)
