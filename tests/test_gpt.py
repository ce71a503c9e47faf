"""The decoder against plainly written references."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, CausalSelfAttention, GPTConfig, apply_rotary, norm, rotary_tables

CONFIG = GPTConfig(sequence_len=32, vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


def random_gpt(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
    return model.eval()


def calls_of_a_block(model) -> list:
    """A list that gets an item with every pass through the first block. Where it is recomputed, a step makes two."""
    calls = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_norm_has_unit_mean_square():
    x = torch.randn(3, 5, 16)
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_rotary_is_a_complex_rotation():
    T, H, D = 7, 3, 8
    x = torch.randn(2, T, H, D)
    cos, sin = rotary_tables(T, D)
    turned = apply_rotary(x, cos[:, None], sin[:, None])
    # channel i is the real and channel i + D/2 the imaginary part; nanochat turns clockwise, by -position * frequency
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    frequency = 10_000.0 ** (-torch.arange(0, D, 2) / D)
    angle = torch.arange(T)[:, None] * frequency
    expected = z * torch.exp(-1j * angle)[:, None]
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1))


def test_attention_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    cos, sin = rotary_tables(40, 16)

    def score(i, j):
        return (apply_rotary(q, cos[i, None], sin[i, None]) * apply_rotary(k, cos[j, None], sin[j, None])).sum()

    torch.testing.assert_close(score(5, 2), score(35, 32), rtol=1e-4, atol=1e-4)
    assert abs(score(5, 2) - score(5, 4)) > 1e-3


def plain_attention(attn, x, cos, sin):
    """Attention one head and one query at a time."""
    B, T, C = x.shape
    D = attn.head_dim
    q = norm(apply_rotary((x @ attn.c_q.weight.T).view(B, T, -1, D), cos, sin))
    k = norm(apply_rotary((x @ attn.c_k.weight.T).view(B, T, -1, D), cos, sin))
    v = (x @ attn.c_v.weight.T).view(B, T, -1, D)
    out = torch.zeros(B, T, attn.n_head, D)
    for b in range(B):
        for h in range(attn.n_head):
            shared = h // (attn.n_head // attn.n_kv_head)
            for t in range(T):
                weight = torch.softmax(k[b, : t + 1, shared] @ q[b, t, h] / math.sqrt(D), 0)
                out[b, t, h] = weight @ v[b, : t + 1, shared]
    return out.flatten(2) @ attn.c_proj.weight.T


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_attention_equals_plain_reference(n_kv_head):
    torch.manual_seed(0)
    attn = CausalSelfAttention(GPTConfig(n_head=4, n_kv_head=n_kv_head, n_embd=32), layer=0)
    x = torch.randn(2, 6, 32)
    cos, sin = (t[:, None] for t in rotary_tables(6, 8))
    torch.testing.assert_close(attn(x, cos, sin, None, None), plain_attention(attn, x, cos, sin), rtol=1e-4, atol=1e-5)


def test_gqa_equals_full_attention_with_repeated_heads():
    grouped = random_gpt()
    full = GPT(GPTConfig(**vars(CONFIG) | {"n_kv_head": 4}))
    state = grouped.state_dict()
    for name, weight in state.items():
        if "c_k" in name or "c_v" in name:
            state[name] = weight.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    full.load_state_dict(state)
    idx = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(grouped(idx), full(idx), rtol=1e-4, atol=1e-5)


def test_causal():
    model = random_gpt()
    idx = torch.randint(0, 50, (1, 12))
    other = idx.clone()
    other[0, 8:] = (other[0, 8:] + 1) % 50
    torch.testing.assert_close(model(idx)[:, :8], model(other)[:, :8])
    assert not torch.allclose(model(idx)[:, 8:], model(other)[:, 8:])


def test_parameter_count_by_formula():
    c = GPTConfig(sequence_len=16, vocab_size=300, n_layer=3, n_head=6, n_kv_head=2, n_embd=48)
    per_layer = 2 * c.n_embd**2 + 2 * c.n_embd * (c.n_kv_head * c.head_dim) + 8 * c.n_embd**2
    assert GPT(c).num_parameters() == 2 * c.vocab_size * c.n_embd + c.n_layer * per_layer


def test_parameter_names_are_upstreams():
    names = set(GPT(GPTConfig(n_layer=1)).state_dict())
    attn = {f"transformer.h.0.attn.{n}.weight" for n in ("c_q", "c_k", "c_v", "c_proj")}
    mlp = {f"transformer.h.0.mlp.{n}.weight" for n in ("c_fc", "c_proj")}
    assert names == attn | mlp | {"transformer.wte.weight", "lm_head.weight"}


def test_a_new_model_says_nothing_and_learns():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights()
    idx = torch.randint(0, 50, (4, 16))
    assert (model(idx) == 0).all()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(idx[:, :-1], targets=idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(50), abs=1e-3)
    assert losses[-1] < 1.0


def test_logits_are_capped():
    model = random_gpt()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    assert model(torch.randint(0, 50, (1, 8))).abs().max() <= 15


def test_loss_reductions_agree_with_cross_entropy():
    model = random_gpt()
    idx = torch.randint(0, 50, (3, 10))
    targets = torch.randint(0, 50, (3, 10))
    targets[0, :7] = -1
    logits = model(idx).flatten(0, 1)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction=reduction)
        torch.testing.assert_close(model(idx, targets, loss_reduction=reduction), expected)
    with pytest.raises(ValueError, match="loss_reduction"):
        model(idx, targets, loss_reduction="median")
    for bad, message in (
        (targets + 50, "must lie in 0..49"),
        (targets - 99, "-1 where nothing"),
        (targets[:, 1:], "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(idx, bad)


def test_label_smoothing_spreads_a_share_over_the_vocabulary():
    model = random_gpt()
    hidden, targets = torch.randn(2, 5, 32), torch.randint(0, 50, (2, 5))
    targets[0, :3] = -1
    logs = model.logits(hidden).log_softmax(-1)
    expected = -0.9 * logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] - 0.1 * logs.mean(-1)
    torch.testing.assert_close(model.loss(hidden, targets, label_smoothing=0.1), expected[targets >= 0].mean())
    assert model.loss(hidden, targets) != model.loss(hidden, targets, label_smoothing=0.1)


def test_dropout_is_for_training_only_and_keeps_the_mean():
    model = random_gpt()
    idx = torch.randint(0, 50, (2, 9))
    plain = model(idx)
    model.dropout = 0.5
    torch.testing.assert_close(model(idx), plain, rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(idx), model(idx))
    block, x = model.transformer.h[0], torch.randn(1, 9, 32)
    cos, sin = model.cos[:9], model.sin[:9]
    dropped = torch.stack([block(x, cos, sin, None, None, 0.5) - x for _ in range(1000)])
    assert (dropped == 0).float().mean() > 0.2  # both branches of an entry
    attention = block.attn(norm(x), cos, sin, None, None)
    expected = attention + torch.stack([block.mlp(norm(x + F.dropout(attention, 0.5))) for _ in range(1000)]).mean(0)
    assert (dropped.mean(0) - expected).norm() < 0.15 * expected.norm()
    model.dropout = 0.0
    torch.testing.assert_close(model(idx), plain, rtol=0, atol=0)


def test_dropout_is_the_same_when_blocks_are_recomputed():
    model, idx = random_gpt().train(), torch.randint(0, 50, (2, 9))
    model.dropout, gradients, calls = 0.3, [], calls_of_a_block(model)
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        model(idx).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert len(calls) == (3 if model.gradient_checkpointing else 1)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_nothing_to_learn_is_zero_with_a_graph():
    model = random_gpt().train()
    idx = torch.randint(0, 50, (2, 5))
    loss = model(idx, torch.full_like(idx, -1))
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing_but_memory():
    idx, targets = torch.randint(0, 50, (2, 10)), torch.randint(0, 50, (2, 10))
    grads = []
    for on in (False, True):
        model = random_gpt().train()
        model.gradient_checkpointing, calls = on, calls_of_a_block(model)
        loss = model(idx, targets)
        loss.backward()
        assert len(calls) == (2 if on else 1)
        grads.append([loss.detach()] + [p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_float32_weights_run_under_bfloat16_embeddings(stored):
    model = random_gpt().to(stored)
    model.transformer.wte.to(torch.bfloat16)
    logits = model(torch.randint(0, 50, (1, 8)))
    assert logits.dtype == torch.float32 and model.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        ([[0, 50]], "0..49"),
        ([[-1, 3]], "0..49"),
        ([[]], "non-empty"),
        ([0, 1], "non-empty"),
        ([[1] * 33], "context of 32"),
    ],
)
def test_bad_tokens_are_refused(idx, message):
    with pytest.raises(ValueError, match=message):
        random_gpt()(torch.tensor(idx, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"n_embd": 36}, "n_embd"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": 1.5}, "vocab"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"n_head": 4, "n_kv_head": 4, "n_embd": 32} | changes)
