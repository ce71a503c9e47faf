"""Vision vectors in the token row."""

import pytest
import torch
import torch.nn as nn

from nanochat.fusion import pool_to_tokens
from nanochat.gpt import GPT
from nanochat.multimodal_gpt import MultimodalGPTConfig, VisionProjector, create_multimodal_gpt
from tests.conftest import make_model

IMAGE = 96


def mask_of(idx, *places):
    mask = torch.zeros_like(idx, dtype=torch.bool)
    for row, column in places:
        mask[row, column] = True
    return mask


@torch.no_grad()
def test_vectors_replace_exactly_the_marked_embeddings(model):
    idx = torch.randint(0, 90, (2, 6))
    vision = torch.randn(2, 2, 12)
    mask = mask_of(idx, (0, 1), (0, 4), (1, 0), (1, 5))
    x = model.embed(model.inputs(idx, vision, mask))
    expected = model.transformer.wte(idx).clone()
    projected = model.vision_projector(vision)
    for b, t, n in ((0, 1, 0), (0, 4, 1), (1, 0, 0), (1, 5, 1)):
        expected[b, t] = projected[b, n]
    torch.testing.assert_close(x, expected)


@torch.no_grad()
def test_shapes_of_vision_embeddings_agree(model):
    idx, v = torch.randint(0, 90, (3, 5)), torch.randn(3, 12)
    mask = mask_of(idx, (0, 0), (1, 2), (2, 1))
    flat = model(idx, v, mask)
    torch.testing.assert_close(model(idx, v[:, None], mask), flat)
    torch.testing.assert_close(model(idx, [v[0:1], v[1:2], v[2:3]], mask), flat)


@torch.no_grad()
def test_without_a_mask_the_placeholders_are_the_places(model):
    idx, v = torch.tensor([[1, IMAGE, 3]]), torch.randn(1, 12)
    torch.testing.assert_close(model(idx, v), model(idx, v, mask_of(idx, (0, 1))))


@torch.no_grad()
def test_the_picture_matters_and_only_forwards(model):
    idx, v = torch.randint(0, 90, (1, 6)), torch.randn(2, 1, 12)
    mask = mask_of(idx, (0, 3))
    one, other = model(idx, v[0], mask), model(idx, v[1], mask)
    torch.testing.assert_close(one[:, :3], other[:, :3])
    assert (one[:, 3:] - other[:, 3:]).abs().max() > 1e-3


@torch.no_grad()
def test_text_alone_is_the_plain_gpt(model):
    plain = GPT(model.config)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("vision")})
    idx = torch.randint(0, 90, (2, 8))
    torch.testing.assert_close(model(idx), plain(idx))


@pytest.mark.parametrize(
    ("vision", "places", "message"),
    [
        (torch.randn(1, 12), [], r"\[0, 0\] places.*\[1\] vectors"),  # one vector must not fill several rows
        (torch.randn(2, 12), [(0, 0)], r"\[1, 0\] places.*\[1, 1\] vectors"),
        (torch.randn(2, 1, 12), [(0, 0), (0, 1), (1, 0)], r"\[2, 1\] places.*\[1, 1\] vectors"),
        (torch.randn(2, 2, 12), [(0, 0), (1, 0)], r"\[1, 1\] places.*\[2, 2\] vectors"),
        (torch.randn(2, 84), [(0, 0), (1, 0)], "vision_embedding_dim is 12"),
        (torch.full((2, 12), float("nan")), [(0, 0), (1, 0)], "NaN"),
        (None, [(0, 0)], "no vision_embeddings"),
    ],
)
def test_mismatches_name_both_sides(model, vision, places, message):
    idx = torch.randint(0, 90, (2, 5))
    with pytest.raises(ValueError, match=message):
        model(idx, vision, mask_of(idx, *places))


def test_a_mask_of_the_wrong_shape_or_type_is_refused(model):
    idx, v = torch.randint(0, 90, (1, 5)), torch.randn(1, 12)
    for mask in (torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 5)):
        with pytest.raises(ValueError, match="vision_mask must be"):
            model(idx, v, mask)


def test_image_positions_are_never_targets(model):
    idx, v = torch.randint(0, 90, (1, 6)), torch.randn(1, 12)
    mask, targets = mask_of(idx, (0, 2)), torch.randint(0, 90, (1, 6))
    losses = model(idx, v, mask, targets, loss_reduction="none")
    assert (losses == 0).tolist() == [False, True, True, False, False, False]
    masked = targets.clone()
    masked[0, 1:3] = -1
    torch.testing.assert_close(model(idx, v, mask, targets), model(idx, v, mask, masked))


def test_gradients_reach_the_projector_and_the_vectors():
    model = make_model()
    idx, v = torch.randint(0, 90, (2, 6)), torch.randn(2, 12, requires_grad=True)
    with pytest.raises(ValueError, match="shape of the tokens"):
        model(idx, v, mask_of(idx, (0, 0), (1, 0)), targets=idx[:, 1:])
    model(idx, v, mask_of(idx, (0, 0), (1, 0)), targets=idx).backward()
    assert v.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.vision_projector.parameters())


def test_projector_and_grid_positions():
    projector = VisionProjector(12, 32, 128, n_tokens=4)
    v = torch.randn(2, 4, 12)
    plain = projector(v)
    assert plain.shape == (2, 4, 32) and plain.dtype == torch.float32
    torch.testing.assert_close(projector(v * 7), plain, rtol=1e-3, atol=1e-3)  # the scale of the map does not matter
    with torch.no_grad():
        projector.position[2] = 1.0
    torch.testing.assert_close(projector(v) - plain, projector.position.detach().expand(2, 4, 32), atol=1e-5, rtol=1e-4)


def test_pooling_reads_the_grid_row_by_row():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert pool_to_tokens(maps, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_to_tokens(maps, 1).flatten().tolist() == [7.5]


@pytest.mark.parametrize(
    ("weights", "embeddings"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_dtypes_of_the_spec_run(weights, embeddings):
    model = make_model().to(weights)
    model.transformer.wte.to(embeddings)
    idx, v = torch.randint(0, 90, (1, 5)), torch.randn(1, 12)
    assert model(idx, v, mask_of(idx, (0, 0))).dtype == torch.float32
    assert len(model.generate_with_image([1, 2], max_new_tokens=3, vision_embeddings=v[None])) == 3


def test_generate_with_image_is_the_uncached_forward(model):
    v = torch.randn(1, 1, 12)
    ids = [IMAGE, 1, 2, 3]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]), v)[0, -1].argmax()))
    options = dict(max_new_tokens=6, temperature=0.0, vision_embeddings=v)
    assert model.generate_with_image([1, 2, 3], **options) == ids[4:]
    assert model.generate_with_image([IMAGE, 1, 2, 3], **options) == ids[4:]
    stream = model.generate_with_image([1, 2, 3], stream=True, **options)
    assert not isinstance(stream, list) and list(stream) == ids[4:]
    with pytest.raises(ValueError, match="do not fit"):
        model.generate_with_image([1] * 90, stream=True, **options)  # at once, not when it is read
    with pytest.raises(ValueError, match="needs an image"):
        model.generate_with_image([1, 2, 3])


class FakeEncoder(nn.Module):
    def channels(self, layer):
        return {"head": 84, "p4": 96}[layer]


def test_an_encoder_that_does_not_fit_is_refused_when_attached(model):
    with pytest.raises(ValueError, match="84 channels, but vision_embedding_dim is 12"):
        model.attach_encoder(FakeEncoder())
    fitting = make_model(vision_embedding_dim=96, vision_layer="p4")
    fitting.attach_encoder(FakeEncoder())
    assert isinstance(fitting.vision_encoder, FakeEncoder)


def test_config_defaults_are_the_specs():
    config = MultimodalGPTConfig(vocab_size=50257)
    assert (config.vision_embedding_dim, config.use_vision_projection, config.vision_tokens_per_image) == (84, True, 1)
    assert config.vision_token_id == 50256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_tokens_per_image": 5}, "square number"),
        ({"vision_tokens_per_image": 0}, "square number"),
        ({"vision_token_id": 97}, "vision_token_id"),
        ({"vision_embedding_dim": 0}, "vision_embedding_dim"),
        ({"use_vision_projection": False}, "use_vision_projection"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_without_projection_vectors_go_in_as_they_are():
    model = make_model(use_vision_projection=False, vision_embedding_dim=32)
    idx, v = torch.randint(0, 90, (1, 4)), torch.randn(1, 32)
    torch.testing.assert_close(model.embed(model.inputs(idx, v, mask_of(idx, (0, 1))))[0, 1], v[0])


def test_spec_model_size():
    """The spec's small model: two layers of 256, a vocabulary of 1,000, 2.1 M parameters."""
    config = MultimodalGPTConfig(sequence_len=256, vocab_size=1000, n_layer=2, n_head=4, n_kv_head=4, n_embd=256)
    assert create_multimodal_gpt(config).num_parameters() == pytest.approx(2.1e6, rel=0.2)
