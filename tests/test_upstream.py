"""Importing upstream checkpoints, against transformers' own NanoChat."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.checkpoint import load_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.upstream import SPECIAL_TOKENS, from_tiktoken, import_upstream, read_weights

tiktoken = pytest.importorskip("tiktoken")

TEXT = "Héllo, wörld! it's 12345 o'clock\n\n  日本語 👩‍🚀 <|bos|> the quick brown fox"
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def encoding():
    """A small tiktoken vocabulary whose merges were learnt from a few words."""
    from nanochat.tokenizer import Tokenizer

    learnt = Tokenizer.train(["the quick brown fox jumps over the lazy dog's 12345 wörld " * 3], 340)
    merged = sorted(learnt.token_bytes.index(t) for t in learnt.token_bytes if len(t) > 1)
    ranks = {bytes([b]): b for b in range(256)}
    for i in merged:
        ranks[learnt.token_bytes[i]] = len(ranks)
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS[:9])}
    return tiktoken.Encoding("test", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


CODER = encoding()
CONVERTED = from_tiktoken(CODER)


@given(st.text() | st.text("aA1٣²ⅷ '’sſtK\t\n\r\u00a0\u0085\u2028\u0301éß日👍_-.!\x1c\ufeff", max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_converted_tokenizer_is_tiktokens(text):
    assert CONVERTED.encode(text) == CODER.encode_ordinary(text)


@pytest.fixture
def upstream(tmp_path):
    """An upstream folder with random bfloat16-rounded weights."""
    source = tmp_path / "d2"
    source.mkdir()
    coder = encoding()
    config = GPTConfig(sequence_len=64, vocab_size=coder.n_vocab, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
    torch.manual_seed(0)
    state = {name: (0.2 * torch.randn_like(t)).bfloat16() for name, t in GPT(config).state_dict().items()}
    torch.save({f"_orig_mod.{name}": t for name, t in state.items()}, source / "model_000650.pt")
    torch.save(state, source / "model_000100.pt")
    for step in (100, 650):
        (source / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": vars(config)}))
    (source / "tokenizer.pkl").write_bytes(pickle.dumps(coder))
    return source


def test_import_keeps_weights_and_tokenizer(upstream, tmp_path):
    folder = import_upstream(upstream, tmp_path / "out", trust_pickle=True)
    model, tokenizer, training = load_checkpoint(folder)
    assert type(model) is GPT and training["step"] == 650
    saved = torch.load(upstream / "model_000100.pt")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved[name].float())
    coder = encoding()
    for text in (TEXT, "", " ", "fox", "\n \n", "12 345", "don't"):
        assert tokenizer.encode(text) == coder.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special("<|assistant_end|>") == coder._special_tokens["<|assistant_end|>"]


def test_logits_equal_transformers_nanochat(upstream, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, _, _ = load_checkpoint(import_upstream(upstream, tmp_path / "out", trust_pickle=True))
    c = model.config
    peer = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.sequence_len,
        )
    ).eval()  # fmt: skip
    names = {
        "transformer.wte": "model.embed_tokens", "transformer.h": "model.layers", "attn.c_q": "self_attn.q_proj",
        "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    peer.load_state_dict(state)
    idx = torch.randint(0, c.vocab_size, (2, 40))
    with torch.no_grad():
        ours, theirs = model(idx), peer(idx).logits
    assert ours.abs().mean() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_pickle_is_not_read_without_the_users_word(upstream, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (upstream / "tokenizer.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="trust_pickle"):
        import_upstream(upstream, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_weights_with_code_in_them_are_refused(upstream, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"lm_head.weight": Bomb()}, upstream / "model_000650.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        import_upstream(upstream, tmp_path / "out", trust_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("extra", ["value_embeds.0.weight", "resid_lambdas", "transformer.h.0.attn.ve_gate.weight"])
def test_later_architectures_are_refused(upstream, tmp_path, extra):
    state = torch.load(upstream / "model_000650.pt")
    torch.save(state | {extra: torch.zeros(3)}, upstream / "model_000650.pt")
    with pytest.raises(ValueError, match=f"{extra}.*October 2025"):
        import_upstream(upstream, tmp_path / "out", trust_pickle=True)


def test_later_settings_are_refused(upstream, tmp_path):
    meta = json.loads((upstream / "meta_000650.json").read_text())
    meta["model_config"]["window_pattern"] = "SSSL"
    (upstream / "meta_000650.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="window_pattern.*October 2025"):
        import_upstream(upstream, tmp_path / "out", trust_pickle=True)


def test_missing_tensors_and_wrong_shapes_are_named(upstream):
    config = GPTConfig(**json.loads((upstream / "meta_000650.json").read_text())["model_config"])
    state = torch.load(upstream / "model_000100.pt")
    head = state.pop("lm_head.weight")
    torch.save(state, upstream / "a.pt")
    with pytest.raises(ValueError, match="lacks the tensors lm_head.weight"):
        read_weights(upstream / "a.pt", config)
    torch.save(state | {"lm_head.weight": head[:5]}, upstream / "a.pt")
    with pytest.raises(ValueError, match=r"lm_head.weight has the shape \(5, 64\)"):
        read_weights(upstream / "a.pt", config)


def meta_of(**changes):
    config = {"sequence_len": 64, "vocab_size": 300, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    return json.dumps({"model_config": config | changes}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.pkl", b"", "tokenizer.pkl is damaged"),
        ("tokenizer.pkl", b"garbage", "tokenizer.pkl is damaged"),
        ("tokenizer.pkl", pickle.dumps({"a": 1}), "holds a dict, expected a tiktoken.Encoding"),
        ("model_000650.pt", b"", "model_000650.pt is damaged"),
        ("model_000650.pt", b"hello", "model_000650.pt is damaged"),
        ("meta_000650.json", b"[1]", "meta_000650.json: expected a JSON object"),
        ("meta_000650.json", b"{}", "model_config"),
        ("meta_000650.json", b"[" * 100_000, "nested too deeply"),
        ("meta_000650.json", meta_of(n_layer=10**6), "n_layer must be a positive integer up to 512"),
        ("meta_000650.json", meta_of(n_embd="wide"), "n_embd must be a positive integer"),
        ("meta_000650.json", meta_of(n_embd=49152, n_layer=400), "lacks the tensors"),
    ],
)
def test_damaged_files_are_named(upstream, tmp_path, name, content, message):
    (upstream / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_upstream(upstream, tmp_path / "out", trust_pickle=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", [[1], {"lm_head.weight": 3}, {"lm_head.weight": torch.zeros(3, dtype=torch.int32)}])
def test_files_of_other_things_than_weights_are_refused(upstream, tmp_path, state):
    torch.save(state, upstream / "model_000650.pt")
    with pytest.raises(ValueError, match="must hold named floating-point tensors"):
        import_upstream(upstream, tmp_path / "out", trust_pickle=True)


def test_a_step_can_be_chosen_and_the_tokenizer_can_lie_elsewhere(upstream, tmp_path):
    (upstream / "tokenizer.pkl").rename(tmp_path / "elsewhere.pkl")
    options = {"tokenizer_path": tmp_path / "elsewhere.pkl", "trust_pickle": True}
    folder = import_upstream(upstream, tmp_path / "out", step=100, **options)
    assert load_checkpoint(folder)[2]["step"] == 100
    with pytest.raises(ValueError, match="meta_000007.json"):
        import_upstream(upstream, tmp_path / "no", step=7, **options)


def test_a_tokenizer_that_would_encode_otherwise_is_refused():
    """tiktoken may split by what the other library does not know; ids must not silently differ."""
    other = tiktoken.Encoding("odd", pat_str=PATTERN, mergeable_ranks=CODER._mergeable_ranks, special_tokens={})
    other.encode_ordinary = lambda text: [0]
    with pytest.raises(ValueError, match="'odd' cannot be converted"):
        from_tiktoken(other)
