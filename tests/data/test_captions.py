import itertools
import json
import types
import unicodedata

import numpy as np
import pytest

from lmjax.data import fast_tokenizers
from lmjax.data.captions import (
    CaptionedPictureData,
    CaptionEncoder,
    CaptionTexts,
    caption_tokenizer,
    in_language,
    with_captions,
)
from lmjax.data.emoji_captions import collect_emoji
from lmjax.data.pictures import Pictures
from lmjax.data.tokenizers import train_tokenizer
from lmjax.objectives.bpe_dropout import bpe_dropout

RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))


def pictures_of(captions, fingerprint="captions"):
    names = [f"{i}.png" for i in range(len(captions))]
    return Pictures("photos", names, names, np.arange(len(names)), captions, fingerprint)


@pytest.fixture(scope="module")
def names():
    """The names of all emoji."""
    return [{"en": (one["en"],), "ko": (one["ko"],)} for one in collect_emoji()]


@pytest.fixture(scope="module")
def tokenizer(names):
    texts = [text for name in names for [text] in name.values()]
    return fast_tokenizers.train("byte_bpe", texts, 16_384, lower_case=True)


STRANGE = [
    "",
    " ",
    "a  b\n",
    "ÀÉ 日本語 🥑‍",
    "it's 3,000!!",
    "</s> <mask>",
    "\u1100\u1161",
    "A\u0301",
]


def test_without_dropout_it_is_the_librarys_encoding(tokenizer, names):
    """In English and Korean, and in whatever else."""
    merges = tokenizer.merges()
    texts = STRANGE + [text for name in names for [text] in name.values()]
    for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids = bpe_dropout(tokenizer.words(text), merges, 0.0, RNG(0))
        assert ids.tolist() == expected.tolist(), text


def test_dropout_cuts_words_into_more_pieces_of_the_same_text(tokenizer, names):
    encoder = CaptionEncoder(tokenizer, 256, dropout=0.1)
    texts = [text for name in names[::20] for [text] in name.values()]
    plain = tokenizer.encode_batch(texts)
    dropped = [encoder.encode(text, RNG(i)) for i, text in enumerate(texts)]
    assert all(
        tokenizer.decode(ids) == text.lower() for text, ids in zip(texts, dropped, strict=True)
    )
    assert sum(map(len, dropped)) > 1.2 * sum(map(len, plain))
    assert any(np.array_equal(a, b) for a, b in zip(plain, dropped, strict=True))
    again = [encoder.encode(text, RNG(i)) for i, text in enumerate(texts)]
    assert all(map(np.array_equal, dropped, again))


def test_nothing_is_unknown_and_case_does_not_matter(tokenizer):
    for text in ("한 글자도 모르는 것이 없다: 뷁", "Ünïcode 🥑"):
        [ids] = tokenizer.encode_batch([text])
        assert tokenizer.unk_id not in ids and tokenizer.decode(ids) == text.lower()
    assert tokenizer.encode("Red HEART") == tokenizer.encode("red heart")
    # File names of some systems have Hangul letter by letter.
    assert tokenizer.encode("\u1112\u1161\u11ab") == tokenizer.encode("한")


def test_captions_are_read_alike_by_any_tokenizer(tokenizer, names, tmp_path):
    """Whatever their case, spaces and Unicode form: they are prompts, too."""
    texts = [text for name in names for [text] in name.values()]
    cased = fast_tokenizers.train("byte_bpe", texts, 1_000, lower_case=False)
    for reader in (tokenizer, cased):
        encode = CaptionEncoder(reader, 40).encode
        plain = encode("red heart 하트")
        assert reader.decode(plain) == "red heart 하트"
        strange = unicodedata.normalize("NFD", " Red  HEART\n하트 ")
        np.testing.assert_array_equal(encode(strange), plain)


def test_a_vocabulary_is_as_large_as_the_captions_support(names):
    sizes = {}
    for language in ("en", "ko", "both"):
        data = CaptionedPictureData(language=language)
        sizes[language] = caption_tokenizer(data, pictures_of(names)).vocab_size
    assert 1_500 < sizes["en"] < sizes["ko"] < sizes["both"] < 16_384
    small = CaptionedPictureData(vocab_size=1_000)
    assert caption_tokenizer(small, pictures_of(names)).vocab_size == 1_000


def test_a_trained_tokenizer_is_kept_by_content(names, tmp_path):
    data = CaptionedPictureData(vocab_size=500)
    first = caption_tokenizer(data, pictures_of(names, "a"))
    assert caption_tokenizer(data, pictures_of(names[:9], "a")).sha256 == first.sha256  # found
    assert caption_tokenizer(data, pictures_of(names[:9], "b")).sha256 != first.sha256
    assert len(list((tmp_path / "tokenizers").glob("*.model"))) == 2
    # A cased one of the same captions would be another.
    texts = list(CaptionTexts(pictures_of(names), "both").documents("train"))
    assert fast_tokenizers.train("byte_bpe", texts, 500).sha256 != first.sha256


def test_a_given_tokenizer_must_be_the_named_one(tokenizer, names, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    data = CaptionedPictureData(tokenizer=str(tmp_path / "tokenizer.json"))
    assert caption_tokenizer(data, pictures_of(names)).sha256 == tokenizer.sha256
    assert caption_tokenizer(CaptionedPictureData(), pictures_of(names), tokenizer) is tokenizer
    other = fast_tokenizers.train("byte_bpe", ["another"], 300)
    with pytest.raises(ValueError, match="is not the tokenizer that the checkpoint was trained"):
        caption_tokenizer(data, pictures_of(names), other)


def test_which_caption_is_drawn(tokenizer):
    captions = {"en": ("one", "two", "three"), "ko": ("하나",)}
    draws = {
        language: [
            CaptionEncoder(tokenizer, 9, language).draw(captions, RNG(i)) for i in range(300)
        ]
        for language in ("en", "ko", "both")
    }
    assert set(draws["en"]) == {"one", "two", "three"} and set(draws["ko"]) == {"하나"}
    assert 100 < draws["both"].count("하나") < 200  # languages before captions
    with pytest.raises(ValueError, match="has no Korean captions"):
        CaptionEncoder(tokenizer, 9, "ko").draw({"en": ("one",)}, RNG(0))


def test_pictures_without_captions_are_left_out_or_refused(capsys):
    captions = [{"en": ("a",)}, {"ko": ("가",)}, {}, {"en": ("b",), "ko": ("나",)}]
    korean = CaptionedPictureData(language="ko")
    kept = with_captions(pictures_of(captions), korean)
    assert kept.names == ["1.png", "3.png"] and kept.file(1) == "3.png"
    assert kept.fingerprint != pictures_of(captions).fingerprint
    said = capsys.readouterr().err
    assert "2 of 4 train pictures without Korean captions, the first of them photos/0.png" in said
    assert len(with_captions(pictures_of(captions), CaptionedPictureData())) == 3
    with pytest.raises(ValueError, match="1 of 4 train pictures without captions.*2.png: mend"):
        with_captions(pictures_of(captions), CaptionedPictureData(unusable="refuse"))
    with pytest.raises(
        ValueError, match="nothing to learn .* 1 of 1 train pictures without Korean"
    ):
        with_captions(pictures_of(captions[:1]), korean)
    assert in_language(captions[3], "en") == {"en": ("b",)}


def test_long_captions_are_named_or_cut(tokenizer):
    text = "a very long caption about " + "many things and " * 5
    encoder = CaptionEncoder(tokenizer, 10, dropout=0.1)
    said = rf"the caption '{text[:60]}\.\.\.' has .* the model reads 10: shorten"
    with pytest.raises(ValueError, match=said):
        encoder.check(pictures_of([{"en": ("short", text)}]))
    with pytest.raises(ValueError, match="the model reads 10"):
        encoder({"en": (text,)}, RNG(0))
    cut = CaptionEncoder(tokenizer, 10, dropout=0.1, truncate=True)
    cut.check(pictures_of([{"en": (text,)}]))
    assert len(cut({"en": (text,)}, RNG(0))) == 10


def test_dropout_makes_no_caption_too_long(tokenizer):
    text = "woman astronaut medium skin tone"
    [plain] = tokenizer.encode_batch([text])
    encoder = CaptionEncoder(tokenizer, len(plain), dropout=0.5)
    encoder.check(pictures_of([{"en": (text,)}]))
    for seed in range(20):
        assert len(encoder({"en": (text,)}, RNG(seed))) <= len(plain)


def test_dropout_needs_merges_of_bytes(names):
    texts = [text for name in names[:500] for [text] in name.values()]
    sentencepiece = train_tokenizer(texts, 1_000)
    word_piece = fast_tokenizers.train("wordpiece", texts, 1_000)
    for other in (sentencepiece, word_piece):
        with pytest.raises(ValueError, match="no merges .*set data.dropout 0"):
            CaptionEncoder(other, 30, dropout=0.1)
        encoder = CaptionEncoder(other, 30)
        assert encoder.encode(texts[0]).tolist() == other.encode_batch(texts[:1])[0].tolist()


def test_ends_need_tokens_for_them():
    pieces = types.SimpleNamespace(bos_id=None, eos_id=1)  # as T5's are
    with pytest.raises(ValueError, match="no tokens that begin and end a text"):
        CaptionEncoder(pieces, 10, ends=True)


def test_merges_as_older_files_spell_them(tokenizer):
    settings = json.loads(tokenizer.model)
    settings["model"]["merges"] = [" ".join(pair) for pair in settings["model"]["merges"]]
    older = fast_tokenizers.FastTokenizer(json.dumps(settings).encode())
    assert older.merges() == tokenizer.merges()
    first = dict(itertools.islice(tokenizer.merges().items(), 3))
    assert [rank for rank, _ in first.values()] == [0, 1, 2]


def test_bad_settings():
    with pytest.raises(ValueError, match=r"data.dropout is 1.5, not in \[0, 1\)"):
        CaptionedPictureData(dropout=1.5)
