import dataclasses
import io
import multiprocessing
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import XLNetTokenizer

from lmjax.data import cache
from lmjax.data import tokenizers as module
from lmjax.data.tokenizers import (
    COMMON_LAYOUT,
    XLNET_LAYOUT,
    SentencePieceTokenizer,
    cached_tokenizer,
    train_tokenizer,
)
from lmjax.objectives.bart_denoising import BartDenoising
from lmjax.objectives.causal_lm import CausalLM
from lmjax.objectives.denoising import SpanCorruption
from lmjax.objectives.masked_lm import MaskedLM
from lmjax.objectives.masked_pairs import MaskedPairs
from lmjax.objectives.permutation_lm import PermutationLM

WORDS = (
    "the quick brown fox jumps over lazy dog array returned sorted values unable shape key "
    "나는 학교에 갑니다 대한민국의 수도는 서울입니다 밥을 먹고 책을 읽습니다 아보카도 의자"
).split()


SYLLABLES = "ra to ne mi sol ka ter ing ber lo an de ur ex 가 나 다 라 마 바 사".split()


def texts(count=300, seed=0):
    """Real words, and invented ones so that a vocabulary has many pieces to choose from."""
    draw = random.Random(seed)
    invented = ["".join(draw.choices(SYLLABLES, k=3)) for _ in range(100)]
    return [f"{' '.join(draw.choices(WORDS + invented, k=12))}." for _ in range(count)]


def trained(pieces=120, **options):
    """A .model with sentencepiece's own defaults for everything but the ids."""
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_writer=model,
        vocab_size=pieces,
        minloglevel=2,
        **ids,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(texts(), 120)


def test_t5_layout(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 220
    np.testing.assert_array_equal(tokenizer.sentinels, np.arange(219, 119, -1, np.int32))
    assert tokenizer.sentinels.dtype == np.int32
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert [pieces.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]


@pytest.mark.parametrize("spelled", ["<extra_id_{}>", "\u2581<extra_id_{}>"])
def test_a_models_own_sentinels_are_used_in_place(spelled):
    own = [spelled.format(k) for k in (2, 1, 0)]
    tokenizer = SentencePieceTokenizer(trained(user_defined_symbols=own))
    assert tokenizer.vocab_size == 120
    assert tokenizer.sentinels.tolist() == [5, 4, 3]
    ids = tokenizer.encode("the <extra_id_0> fox <extra_id_2>")
    assert ids.count(5) == ids.count(3) == 1 and ids[-1] == 3
    assert tokenizer.decode(ids) == "the <extra_id_0> fox <extra_id_2>"


@pytest.mark.parametrize(
    "text",
    [
        "the quick brown fox",
        "<extra_id_0> brown fox <extra_id_1>",
        "the <extra_id_0> fox <extra_id_1><extra_id_99> dog.",
        "나는 <extra_id_0> 갑니다 <extra_id_1>.",
        "un <extra_id_0>able",
        "",
    ],
)
def test_text_with_sentinels_survives_there_and_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.decode(ids) == text.replace("1><", "1> <")


def test_xlnets_layout(tmp_path):
    """Its ids, and those of transformers' tokenizer of the same files."""
    pieces = train_tokenizer(texts(), 140, layout=XLNET_LAYOUT)
    special = [pieces.unk_id, pieces.bos_id, pieces.cls_id, pieces.sep_id, pieces.pad_id]
    assert [*special, pieces.mask_id, pieces.eos_id] == [0, 1, 3, 4, 5, 6, 7]
    assert pieces.special_ids.tolist() == list(range(8))  # </s> among them, <eop> not
    assert pieces.vocab_size == 140 and len(pieces.sentinels) == 0
    for name, content in pieces.files().items():
        (tmp_path / name).write_bytes(content)
    assert SentencePieceTokenizer.find(tmp_path).sha256 == pieces.sha256
    theirs = XLNetTokenizer.from_pretrained(tmp_path)
    assert theirs.sep_token_id == 4 and theirs.mask_token_id == 6 and theirs.padding_side == "left"
    for text in ("the lazy fox, unable.", "나는 학교에 갑니다", "<mask> and <cls>"):
        ids = pieces.encode_batch([text])[0].tolist()
        if "<" not in text:
            assert theirs.encode(text, add_special_tokens=False) == ids
        assert not set(ids) & {3, 6}
    starts = pieces.starts_word()
    words = pieces.encode_batch(["the quick 학교에"])[0]
    assert starts[words].sum() == 3 and starts[[3, 4, 7]].all()


OBJECTIVES = [
    MaskedPairs(),
    MaskedLM(),
    PermutationLM(),
    BartDenoising(),
    SpanCorruption(),
    CausalLM(),
]


def test_the_common_layout_has_what_every_objective_asks_for():
    pieces = train_tokenizer(texts(), 240, layout=COMMON_LAYOUT)
    assert (pieces.pad_id, pieces.eos_id, pieces.unk_id, pieces.bos_id) == (0, 1, 2, 3)
    assert (pieces.cls_id, pieces.sep_id, pieces.mask_id) == (4, 5, 6)
    np.testing.assert_array_equal(pieces.sentinels, np.arange(7, 107))
    assert pieces.vocab_size == 240 and pieces.special_ids.tolist() == list(range(107))
    for objective in OBJECTIVES:
        objective.bind(pieces)
    text = "the <extra_id_0> fox <extra_id_1>"
    assert pieces.decode(pieces.encode(text)) == text
    corpus = np.concatenate(pieces.encode_batch([text, "<s> the <mask> fox <sep> </s>"]))
    assert set(corpus) & set(pieces.special_ids) <= {pieces.unk_id}


def test_special_ids_are_no_words(tokenizer):
    assert tokenizer.bos_id is None
    assert tokenizer.special_ids.tolist() == [0, 1, 2, *range(120, 220)]


def test_a_tokenizer_of_xlnets_kind_is_kept_and_known(monkeypatch, tmp_path):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))

    class Texts:
        name = "texts"

        def fingerprint(self, split):
            return "texts"

        def documents(self, split):
            return iter(texts())

    first = cached_tokenizer(Texts(), 140, subwords="xlnet_unigram")
    assert first.cls_id == 3
    assert cached_tokenizer(Texts(), 240, subwords="common_unigram").cls_id == 4
    assert cached_tokenizer(Texts(), 140, subwords="xlnet_unigram").sha256 == first.sha256
    assert cached_tokenizer(Texts(), 140).cls_id is None
    assert pickle.loads(pickle.dumps(first)).sha256 == first.sha256


def test_only_white_space_starts_a_word_after_a_sentinel(tokenizer):
    sentinel = int(tokenizer.sentinels[4])
    words, fox = tokenizer.encode("the fox"), tokenizer.encode("fox")
    assert tokenizer.encode("the <extra_id_4> fox") == [*words[: -len(fox)], sentinel, *fox]
    joined = tokenizer.encode("un<extra_id_4>able")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    after = pieces.decode(joined[joined.index(sentinel) + 1 :])
    assert after == "able"
    assert not pieces.id_to_piece(joined[joined.index(sentinel) + 1]).startswith("\u2581")


def test_corpus_text_is_literal(tokenizer):
    texts = ["<extra_id_0> fox", "the fox", "", "서울입니다"]
    batch = tokenizer.encode_batch(texts)
    assert all(ids.dtype == np.int32 and ids.ndim == 1 for ids in batch)
    assert not np.isin(tokenizer.sentinels, batch[0]).any()
    assert [ids.tolist() for ids in batch[1:]] == [tokenizer.encode(text) for text in texts[1:]]
    assert (
        tokenizer.encode("<extra_id_100>") == tokenizer.encode_batch(["<extra_id_100>"])[0].tolist()
    )


def test_decoding_stops_at_eos_and_survives_any_id(tokenizer):
    fox, dog = tokenizer.encode("fox"), tokenizer.encode("dog")
    ids = np.array([0, *fox, 0, *dog, 1, *fox], np.int32)
    assert tokenizer.decode(ids) == "fox dog"
    assert tokenizer.decode([1]) == ""
    assert "fox" in tokenizer.decode([tokenizer.vocab_size + 7, *fox, -1])


def test_pickle_and_save_keep_the_identity(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "a.model")
    loaded = SentencePieceTokenizer.load(tmp_path / "deep" / "a.model")
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert other.sha256 == tokenizer.sha256
        assert other.encode("the <extra_id_0> 서울입니다") == tokenizer.encode(
            "the <extra_id_0> 서울입니다"
        )
    fewer = SentencePieceTokenizer.load(tmp_path / "deep" / "a.model", extra_ids=5)
    assert fewer.vocab_size == 125 and fewer.sha256 != tokenizer.sha256


def test_training_is_deterministic_and_samples_evenly():
    documents = texts(2_000)
    sample = module._sample(documents, 10_000)
    assert 9_000 < sum(map(len, sample)) <= 10_000
    assert module._sample(iter(documents[::-1]), 10_000) == sample
    halves = [len(set(sample) & set(half)) for half in (documents[:1_000], documents[1_000:])]
    assert min(halves) > 0.6 * max(halves)
    assert module._sample(["a long document" * 9], 10) == ["a long document" * 9]

    first, second = (train_tokenizer(documents, 110, max_characters=10_000) for _ in range(2))
    assert first.model == second.model


def test_a_short_text_gives_a_smaller_vocabulary():
    tokenizer = train_tokenizer(texts(), 8_000)
    assert 100 < tokenizer.vocab_size < 8_000
    assert tokenizer.sentinels[0] == tokenizer.vocab_size - 1
    assert tokenizer.unk_id not in tokenizer.encode(texts()[0])


def test_rare_characters_do_not_fill_the_vocabulary(capsys):
    """Korean has 11,172 syllables, of which a text uses a few hundred all the time."""
    draw = random.Random(0)
    syllables = [chr(0xAC00 + i) for i in range(8_500)]
    frequencies = [1 / (i + 1) for i in range(len(syllables))]
    rare = [" ".join(syllables[i : i + 10]) for i in range(0, len(syllables), 10)]
    common = [
        " ".join("".join(draw.choices(syllables, frequencies, k=3)) for _ in range(20))
        for _ in range(500)
    ]
    tokenizer = train_tokenizer(rare + common, 8_092)
    assert tokenizer.vocab_size <= 8_192
    assert "character_coverage 0.98" in capsys.readouterr().err
    ids = np.concatenate(tokenizer.encode_batch(common))
    assert (ids == tokenizer.unk_id).mean() < 0.05
    with pytest.raises(ValueError, match=r"too small .*coverage 1.0000: set at least 8,5\d\d"):
        train_tokenizer(rare + common, 8_092, character_coverage=1.0)


def test_every_character_has_a_piece_where_there_is_room(capsys):
    assert module.default_coverage(["ab", "cd"], 16) == 1.0
    assert module.default_coverage(["abcde"], 16) == 0.9995
    assert module.default_coverage(["a" * 990 + "bcdefghij"], 6) == 992 / 999
    assert module.default_coverage(["a" * 99 + "bcdefghij"], 6) == module.LEAST_COVERAGE
    tokenizer = train_tokenizer(texts(), 400)
    assert tokenizer.unk_id not in np.concatenate(tokenizer.encode_batch(texts()))
    assert capsys.readouterr().err == ""


def test_errors_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"20 pieces is too small .* at least \d+"):
        train_tokenizer(texts(), 20)
    with pytest.raises(ValueError, match="coverage is 0.95, not between 0.98 and 1"):
        train_tokenizer(texts(), 100, character_coverage=0.95)
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer([" ", ""], 100)
    with pytest.raises(ValueError, match=r"cannot read .*absent.model: No such file"):
        SentencePieceTokenizer.load(tmp_path / "absent.model")
    for name, content in (("text", b"not a model at all"), ("cut", trained()[:5_000]), ("no", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a SentencePiece model, or is damaged"):
            SentencePieceTokenizer.load(tmp_path / name)
    with pytest.raises(ValueError, match="has no pad id"):
        SentencePieceTokenizer(trained(pad_id=-1, eos_id=1, unk_id=0))
    with pytest.raises(ValueError, match="has no eos id"):
        SentencePieceTokenizer(trained(eos_id=-1))


@dataclasses.dataclass(frozen=True)
class Logged:
    """A source that notes each time it is read."""

    log: Path
    name = "logged"

    def fingerprint(self, split):
        return f"same every time {split}"

    def documents(self, split, shard=0, shards=1):
        with open(self.log, "a") as file:
            file.write("read\n")
        return iter(texts())


def _train(barrier, log, results):
    barrier.wait()
    results.put(cached_tokenizer(Logged(log), 120).sha256)


def test_two_processes_at_once_train_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (barrier, tmp_path / "log", results)
    processes = [context.Process(target=_train, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    hashes = {results.get() for _ in processes}
    assert hashes == {cached_tokenizer(Logged(tmp_path / "log"), 120).sha256}
    assert (tmp_path / "log").read_text() == "read\n"
    assert len(list((cache.cache_dir() / "tokenizers").glob("*.model"))) == 1


def test_same_ids_as_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.57")
    tokenizer.save(tmp_path / "spiece.model")
    reference = {
        legacy: transformers.T5Tokenizer(
            str(tmp_path / "spiece.model"), extra_ids=100, legacy=legacy
        )
        for legacy in (True, False)
    }
    assert len(reference[True]) == tokenizer.vocab_size

    def ids(text, legacy):
        return reference[legacy].encode(text, add_special_tokens=False)

    for text in ("the quick  brown\nfox ", "서울입니다 의자", "zebra 漢字", "<extra_id_100>", ""):
        assert tokenizer.encode(text) == ids(text, True) == ids(text, False)
    # White space after each sentinel: its older tokenizer, which T5 was trained like.
    for text in ("the <extra_id_0> fox <extra_id_1>", "<extra_id_0> 나는 <extra_id_99> 책을"):
        assert tokenizer.encode(text) == ids(text, True)
    # None: its newer one.
    for text in ("un<extra_id_0>able", "the <extra_id_0>, dog<extra_id_1>."):
        assert tokenizer.encode(text) == ids(text, False)
