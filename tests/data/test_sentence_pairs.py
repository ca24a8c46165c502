import numpy as np
import pytest

from lmjax.data.batches import IndexedBatches
from lmjax.data.fast_tokenizers import train
from lmjax.data.sentence_pairs import SentencePairs, Sentences, choose_pairs, split_sentences
from lmjax.data.token_store import TokenizedDocuments
from lmjax.objectives.masked_pairs import MaskedPairs

END = 3


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It rains. The list is empty!  Is it?", ["It rains.", "The list is empty!", "Is it?"]),
        ('He said "no." Then\nhe left.', ['He said "no."', "Then\nhe left."]),
        ("Version 3.11 of python. e.g.this", ["Version 3.11 of python.", "e.g.this"]),
        ("A title\n\nA text. ", ["A title", "A text."]),
        (
            "비가 온다. 목록이 비었다! 정말?\n그렇다.",
            ["비가 온다.", "목록이 비었다!", "정말?", "그렇다."],
        ),
        ("  \n\n ", []),
    ],
)
def test_sentences_end_at_full_stops_and_blank_lines(text, sentences):
    assert split_sentences(text) == sentences


def test_lines_may_be_sentences():
    assert split_sentences("One. Two.\nthree\n\nfour", lines=True) == ["One. Two.", "three", "four"]


def test_the_corpus_ends_each_sentence():
    texts = ["It rains. The list is empty.", " ", "비가 온다."] * 20
    tokenizer = train("wordpiece", texts, 300)
    corpus = Sentences(tokenizer)
    first, empty, korean = corpus.encode_batch(texts[:3])
    end = [tokenizer.eos_id]
    assert first.tolist() == [
        *tokenizer.encode("It rains."), *end, *tokenizer.encode("The list is empty."), *end
    ]  # fmt: skip
    assert len(empty) == 0 and korean.tolist() == [*tokenizer.encode("비가 온다."), *end]
    assert first.dtype == np.int32
    assert len({corpus.sha256, Sentences(tokenizer, lines=True).sha256, tokenizer.sha256}) == 3


def corpus(seed=0, documents=30):
    """Every sentence's tokens are its own number, so that pairs can be read back."""
    draw = np.random.default_rng(seed)
    tokens, offsets, number = [], [0], 10
    for document in range(documents):
        for _ in range(0 if document == 4 else draw.integers(1, 12)):
            tokens += [number] * draw.integers(1, 15) + [END]
            number += 1
        offsets.append(len(tokens))
    return TokenizedDocuments(np.array(tokens, np.uint16), np.array(offsets))


STORE = corpus()
BY_SENTENCE = {
    int(token): document
    for document in range(len(STORE))
    for token in set(STORE.document(document).tolist()) - {END}
}


def pairs_of(**settings):
    settings = MaskedPairs(length=33, **settings)
    rows = SentencePairs(STORE, END, settings, seed=7)
    return [rows.row(index)[0][1] for index in range(len(rows))]


def test_parts_are_whole_sentences_of_one_document_and_half_are_from_elsewhere():
    pairs = pairs_of(copies=40)
    several = []
    for first, second, elsewhere in pairs:
        for part in (first, second):
            numbers = np.unique(part)
            assert len(numbers) and (np.diff(numbers) == 1).all() and END not in part
            assert len({BY_SENTENCE[int(n)] for n in numbers}) == 1
        same = BY_SENTENCE[int(first[0])] == BY_SENTENCE[int(second[0])]
        assert elsewhere != same
        if not elsewhere:
            assert second[0] == first[-1] + 1
        several.append((elsewhere, len(np.unique(first)) + len(np.unique(second))))
    # A stretch of one sentence always gets its second part from elsewhere: more than half do.
    share = np.mean([elsewhere for elsewhere, _ in several])
    assert 0.5 < share < 0.75


def test_a_reading_covers_its_document_once_and_puts_unused_sentences_back():
    documents = np.array([0, *range(12, 400, 8)])
    lengths = np.full(documents[-1], 5)
    settings = MaskedPairs(length=23, short=0.0)  # four sentences fill the window of 20
    halves = []
    for seed in range(500):
        pairs = choose_pairs(lengths, documents, 0, settings, np.random.default_rng(seed))
        at = 0
        for first, first_end, second, second_end, elsewhere in pairs:
            assert first == at < first_end
            if elsewhere:
                assert second >= 12 and 1 <= second_end - second
                room = 20 - 5 * (first_end - first)
                assert 5 * (second_end - second - 1) < max(room, 1)
                at = first_end
            else:
                assert second == first_end < second_end <= 12 and second_end - first <= 4
                at = second_end
            if first_end - first + (second_end - second) > 1 and first < 8:
                halves.append(elsewhere)
        assert at == 12
    share, n = np.mean(halves), len(halves)
    assert abs(share - 0.5) < 5 * (0.25 / n) ** 0.5


def test_a_share_of_the_readings_is_short():
    """Of one long document: the first pair of a reading from neighbours is as long as its aim."""
    lengths, documents = np.ones(400, int), np.array([0, 300, 400])
    sizes = []
    for seed in range(2_000):
        rng = np.random.default_rng(seed)
        pairs = choose_pairs(lengths, documents, 0, MaskedPairs(length=103, short=0.1), rng)
        first, _, _, end, elsewhere = pairs[0]
        if not elsewhere:
            sizes.append(end - first)
    sizes = np.array(sizes)
    shorter = sizes < 100
    assert abs(shorter.mean() - 0.1 * 98 / 99) < 5 * (0.09 / len(sizes)) ** 0.5
    assert sizes.max() == 100 and sizes.min() >= 2
    assert abs(sizes[shorter].mean() - 50.5) < 5 * 28.3 / shorter.sum() ** 0.5


def test_copies_differ_and_the_seed_decides():
    once, twice = pairs_of(copies=1), pairs_of(copies=2)
    assert len(twice) > 1.5 * len(once)
    for pair, again in zip(once, twice, strict=False):
        np.testing.assert_array_equal(pair.first, again.first)
        np.testing.assert_array_equal(pair.second, again.second)
    rest = twice[len(once) :]
    assert any(
        a.first.tolist() != b.first.tolist() or a.second.tolist() != b.second.tolist()
        for a, b in zip(once, rest, strict=False)
    )


def test_a_lone_document_is_paired_with_itself():
    store = TokenizedDocuments(np.array([9, 9, END]), np.array([0, 3]))
    rows = SentencePairs(store, END, MaskedPairs(copies=1), seed=0)
    [(_, pair)] = rows.row(0)
    assert pair.elsewhere and pair.first.tolist() == pair.second.tolist() == [9, 9]


def test_without_sentences_there_is_nothing_to_pair():
    store = TokenizedDocuments(np.array([9, 9]), np.array([0, 2]))
    with pytest.raises(ValueError, match="has no sentences"):
        SentencePairs(store, END, MaskedPairs(), seed=0)


def test_static_noise_is_the_same_in_every_epoch():
    """Row by row: which rows share a batch changes."""

    class Numbers:
        def __len__(self):
            return 8

        def row(self, index):
            return [(index, np.array([index]))]

    def objective(tokens, rng):
        return {"inputs": np.append(tokens, rng.integers(1_000)), "targets": tokens}

    def epochs(static):
        lengths = {"inputs": 2, "targets": 1}
        batches = IndexedBatches(Numbers(), objective, lengths, 8, seed=1, static=static)
        return [dict(batches.batch(step)["inputs"].tolist()) for step in (0, 1)]

    first, second = epochs(static=True)
    assert first == second and list(first) != list(second)
    first, second = epochs(static=False)
    assert first != second
