import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT,
    StreamDecoder,
    Tokenizer,
    byte_alphabet,
    slow_pattern,
)

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


# ---- files of strangers

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def with_pattern(pattern):
    made = json.loads(TOKENIZER.to_json())
    made["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
    return json.dumps(made)


@pytest.mark.parametrize("pattern", [SPLIT, GPT2, GPT4, GPT4O, r"\s+", "."])
def test_the_usual_patterns_are_read(pattern):
    assert slow_pattern(pattern) == ""
    made = Tokenizer.from_json(with_pattern(pattern))
    assert made.decode(made.encode(TEXTS[0])) == TEXTS[0]


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a*)*b", "(.|.)*!", "(a|aa)+$", "(?:a?){25}a{25}", "a?" * 30 + "a" * 30, r"(.+)+\1", r".*.*.*x", "(?<=a*)b",
     "(?>a+)b", "a{1,9}a{1,9}a{1,9}x", "[[a]+]+*", "(a+|b)c+(d+|e)f+", "x" * 2000, "(?i:a+)+", "a{1,100000}", "(?R)"],
)  # fmt: skip
def test_patterns_that_could_take_for_ever_are_refused(pattern):
    with pytest.raises(UserError, match="splits text by the pattern .*for ever"):
        Tokenizer.from_json(with_pattern(pattern))


@given(st.text(alphabet="ab.()[]{}|*+?\\^$!:=<>0123456789,pPLNkx-&", max_size=30))
@settings(max_examples=300)
def test_any_pattern_is_read_or_refused(pattern):
    start = time.process_time()
    try:
        Tokenizer.from_json(with_pattern(pattern)).encode("a" * 300 + "b" * 300)
    except UserError as error:
        assert len(str(error)) < 500
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            "WordLevel|not the JSON",
        ),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "changes text"),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}),
            "not the JSON of a tokenizer",
        ),
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "*"}),
            "not the JSON of a tokenizer",
        ),
    ],
)
def test_files_of_other_kinds_are_refused(change, message):
    made = json.loads(TOKENIZER.to_json())
    change(made)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_json(json.dumps(made))


@pytest.mark.parametrize(
    "change",
    [
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "a"}},
        {"truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
                            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [3], "tokens": ["<|bos|>"]}}}},
    ],
)  # fmt: skip
def test_settings_that_change_the_tokens_of_a_text_are_left_out(change):
    made = Tokenizer.from_json(json.dumps(json.loads(TOKENIZER.to_json()) | change))
    assert made.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])


def test_dropout_is_left_out():
    made = json.loads(TOKENIZER.to_json())
    made["model"]["dropout"] = 0.9
    assert Tokenizer.from_json(json.dumps(made)).encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])


def test_a_panic_of_the_library_is_one_line(monkeypatch):
    class Panic(BaseException):
        pass

    def panic(text):
        raise Panic("called `Result::unwrap()`\non an `Err` value")

    monkeypatch.setattr(
        "nanochat.tokenizer.tokenizers", type("Library", (), {"Tokenizer": type("T", (), {"from_str": panic})})
    )
    with pytest.raises(UserError, match=r"^not the JSON of a tokenizer: called .* on an `Err` value$"):
        Tokenizer.from_json(TOKENIZER.to_json())


def test_one_bad_text_file_of_several_is_named(tmp_path):
    from nanochat.cli.main import tokenizer

    (tmp_path / "a.txt").write_text("fine\n")
    (tmp_path / "b.txt").write_bytes(b"first\nsec\xffond\n")
    with pytest.raises(UserError, match=r"b.txt is not UTF-8 text"):
        tokenizer((tmp_path / "a.txt", tmp_path / "b.txt"), tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()
