"""Losses of the auxiliary heads against plain loops. That of positions: test_cameras_train.py."""

import torch

from nanochat.training.auxiliary import AnswerTokensHead, Components, DirectionHead, EqualHead


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
    mean, basis = torch.randn(8), torch.linalg.qr(torch.randn(8, 5)).Q
    head, vectors, cells = (
        DirectionHead(6, Components(mean, basis, torch.tensor(1.0))),
        torch.randn(3, 4, 6),
        torch.randn(3, 4, 8),
    )
    expected = torch.zeros(())
    for picture, teacher in zip(vectors, cells, strict=True):
        for cell, seen in zip(picture, teacher, strict=True):
            found, target = head.linear.weight @ cell + head.linear.bias, basis.T @ (seen - mean)
            expected += (1 - found @ target / (found.norm() * target.norm())) / 4
    torch.testing.assert_close(head.loss(vectors, cells), expected)


def test_the_loss_of_equal_cells_is_their_squared_error_in_units_of_the_variance():
    torch.manual_seed(0)
    mean, basis = torch.randn(8), torch.linalg.qr(torch.randn(8, 5)).Q
    head, cells, off = EqualHead(Components(mean, basis, torch.tensor(2.0))), torch.randn(3, 4, 8), torch.randn(5)
    outside = torch.linalg.svd(basis.T)[2][-1]  # what no component sees
    torch.testing.assert_close(head.loss(cells + basis @ off + 3 * outside, cells), 3 * (off @ off) / 2)
    assert head.loss(cells, cells) == 0
    assert {name for name, _ in head.named_parameters()} == set()
    assert {"components.mean", "components.basis", "components.variance"} == set(head.state_dict())
