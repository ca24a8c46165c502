import numpy as np
import pytest

from lmjax.data.fast_tokenizers import train
from lmjax.data.full_sentences import FullSentences, row_starts
from lmjax.data.sentence_pairs import Sentences, split_sentences
from tests.data.test_lanes import WORDS
from tests.data.test_sentence_pairs import BY_SENTENCE, END, STORE

TEXTS = ["It rains.  The list is empty!\n\nIs it? 'No.' He left.", "비가 온다. 목록이 비었다!\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe_sees_each_sentence_as_within_its_document(text):
    tokenizer = train("byte_bpe", TEXTS * 9, 400)
    assert "".join(split_sentences(text, spaced=True)) == text.rstrip()
    corpus = Sentences(tokenizer, spaced=True)
    tokens = corpus.encode_batch([text])[0]
    assert (tokens == tokenizer.eos_id).sum() == len(split_sentences(text)) > 1
    assert tokens[tokens != tokenizer.eos_id].tolist() == list(tokenizer.encode(text.rstrip()))
    assert corpus.sha256 != Sentences(tokenizer).sha256


def rows_of(window):
    rows = FullSentences(STORE, END, window)
    return [tokens for i in range(len(rows)) for _, tokens in rows.row(i)]


def test_rows_are_as_many_whole_sentences_as_fit_and_cross_documents():
    """Liu et al. 2019, section 4.2: an extra separator stands between documents."""
    rows = rows_of(40)
    assert max(map(len, rows)) <= 40
    read = np.concatenate(rows)
    np.testing.assert_array_equal(read[read != END], WORDS[WORDS != END])
    lengths = dict(zip(*np.unique(WORDS, return_counts=True), strict=True))
    for row, following in zip(rows, rows[1:], strict=False):
        assert row[-1] != END != row[0]
        for sentence in set(row.tolist()) - {END}:  # each has a number of its own
            assert (row == sentence).sum() == lengths[sentence]
        # What follows did not fit, with the mark behind the row or behind itself, if there is one.
        assert len(row) + lengths[following[0]] + 1 >= 40
        documents = [BY_SENTENCE[int(token)] for token in row if token != END]
        assert (row == END).sum() == len(set(documents)) - 1
    assert any(END in row for row in rows)


def test_a_sentence_longer_than_a_row_is_cut():
    assert row_starts(np.array([0, 3, 20, 22, 30]), 8).tolist() == [0, 3, 11, 19, 22, 30]
    rows = rows_of(5)
    assert max(map(len, rows)) == 5
    read = np.concatenate(rows)
    np.testing.assert_array_equal(read[read != END], WORDS[WORDS != END])


def test_text_shorter_than_a_row_is_refused_in_training_only():
    said = "the train text has .* tokens and one example takes 9,999"
    with pytest.raises(ValueError, match=said):
        FullSentences(STORE, END, 9_999)
    assert len(FullSentences(STORE, END, 9_999, "validation")) == 1
