import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer, byte_alphabet

TEXTS = ["is there a red circle in the image?", "a dog runs on the beach.", "Zwei Boxkämpfer jagen Eva, 東京 👍🏽"] * 3
TOKENIZER = Tokenizer.train(TEXTS, 400)

text = st.text() | st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "a", "é", "\n", "👍🏽", "<|"])).map("".join)


@given(text)
@settings(max_examples=300)
def test_any_string_comes_back_as_it_was(string):
    ids = TOKENIZER.encode(string)
    assert TOKENIZER.decode(ids) == string
    assert not set(ids) & TOKENIZER.special_ids  # nobody can type a special token


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
@settings(max_examples=200)
def test_a_stream_says_the_same_as_decoding_at_once(ids):
    decoder = StreamDecoder(TOKENIZER)
    pieces = [decoder.feed(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == TOKENIZER.decode(ids)
    for piece in pieces:
        piece.encode("utf-8")


@given(text)
def test_a_stream_of_whole_text_never_shows_a_broken_character(string):
    decoder = StreamDecoder(TOKENIZER)
    pieces = [decoder.feed(i) for i in TOKENIZER.encode(string)]
    assert ("�" in "".join(pieces)) == ("�" in string)
    assert decoder.flush() == ""


def test_multi_byte_characters_wait_for_their_last_byte():
    decoder = StreamDecoder(Tokenizer.train([], 266))  # no merges: a token a byte
    assert [decoder.feed(i) for i in decoder.tokenizer.encode("é👍")] == ["", "é", "", "", "", "👍"]


def test_special_tokens_stand_behind_the_vocabulary():
    assert TOKENIZER.vocab_size <= 400
    ids = [TOKENIZER.special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(TOKENIZER.vocab_size - len(SPECIAL_TOKENS), TOKENIZER.vocab_size))
    assert TOKENIZER.decode([ids[0], *TOKENIZER.encode("hi"), ids[-1]]) == "hi"
    assert TOKENIZER.decode([ids[0], *TOKENIZER.encode("hi")], skip_special=False) == "<|bos|>hi"
    with pytest.raises(ValueError, match="no special token"):
        TOKENIZER.special("a")


def test_merges_are_learnt():
    assert len(TOKENIZER.encode("is there a red circle in the image?")) < 15


def test_the_byte_table_is_the_librarys():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    spelled = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n")[0][0]
    assert bytes(byte_alphabet()[c] for c in spelled) == "é \n".encode()


def test_json_round_trip_and_growth(tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.encode("a red <|image|> dog 東") == TOKENIZER.encode("a red <|image|> dog 東")
    before = loaded.vocab_size
    assert loaded.add_special_tokens(["<|action_0|>", "<|action_1|>"]) == [before, before + 1]
    again = Tokenizer.from_json(loaded.to_json())
    assert again.vocab_size == before + 2 and again.special("<|action_1|>") == before + 1
    assert again.special("<|image|>") == TOKENIZER.special("<|image|>")


def test_growth_never_takes_ordinary_text_away():
    grown = Tokenizer.from_json(TOKENIZER.to_json())
    for names, message in ((["a"], "'a' cannot be"), ([""], "'' cannot be"), ("xyz", "a list of names")):
        with pytest.raises(ValueError, match=message):
            grown.add_special_tokens(names)
    assert grown.vocab_size == TOKENIZER.vocab_size
    bos = TOKENIZER.special("<|bos|>")
    assert grown.add_special_tokens(["act", "<|bos|>"]) == [TOKENIZER.vocab_size, bos]
    assert grown.encode("a red act") == TOKENIZER.encode("a red act")


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    TOKENIZER.save(tmp_path / "t.json")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        Tokenizer.train([], 266).save(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json").vocab_size == TOKENIZER.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def foreign(change):
    """The tokenizer's JSON with a part of it changed."""
    parts = json.loads(TOKENIZER.to_json())
    change(parts)
    return json.dumps(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.update(pre_tokenizer=None), "changes text"),
        (lambda parts: parts.update(normalizer={"type": "Lowercase"}), "changes text"),
        (lambda parts: parts["model"]["vocab"].update({"日": 400}), "byte-level"),
        (lambda parts: parts.update(added_tokens=parts["added_tokens"][:-1]), "lacks the special tokens <.image.>"),
    ],
    ids=["no bytes", "lower case", "not byte-level", "no image token"],
)
def test_tokenizers_of_another_kind_are_refused(tmp_path, change, message):
    (tmp_path / "t.json").write_text(foreign(change))
    with pytest.raises(ValueError, match=f"t.json.*{message}"):
        Tokenizer.load(tmp_path / "t.json")


def test_training_is_deterministic():
    assert Tokenizer.train(TEXTS, 350).to_json() == Tokenizer.train(TEXTS, 350).to_json()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 266"):
        Tokenizer.train(TEXTS, 265)
    for broken in ("", "{", json.dumps({"version": "1.0"})):
        with pytest.raises(ValueError, match="not the JSON of a tokenizer"):
            Tokenizer.from_json(broken)
    with pytest.raises(ValueError, match="UTF-8.*udcff"):
        TOKENIZER.encode("photo\udcff")
    for i in (-1, TOKENIZER.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            TOKENIZER.decode([i])
