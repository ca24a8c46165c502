import functools
import math

import numpy as np
import pytest

from lmjax.data.fast_tokenizers import train
from lmjax.objectives.bart_denoising import (
    BartDenoising,
    bart_denoising,
    hide_words,
    insert,
    permute_sentences,
    rotate,
    spans,
)

BOS, EOS, MASK = 0, 2, 4
WORDS = np.arange(5, 205)
TEXT = np.array([BOS, *WORDS, EOS], np.int32)  # every token differs
IDS = 205
STARTS = np.arange(len(TEXT)) % 3 != 0  # words of one and two tokens
STOPS = np.zeros(IDS, bool)
STOPS[[20, 21, 60, 130]] = True  # two of them in a row


def rng(seed):
    return np.random.default_rng(seed)


def hidden(out):
    """The runs of missing tokens, as (first, end) places of TEXT, each with the masks there."""
    runs, place, masks = [], 0, 0
    for token in [*out, None]:
        if token == MASK:
            masks += 1
            continue
        at = len(TEXT) if token is None else int(np.flatnonzero(TEXT == token)[0])
        if at > place or masks:
            runs.append((place, at, masks))
        place, masks = at + 1, 0
    return runs


def test_whole_words_hide_behind_masks():
    """Each gap is made of whole words, and of no fewer words than it has masks."""
    words = np.flatnonzero(STARTS)
    counts = []
    for seed in range(300):
        out = hide_words(TEXT, STARTS, 0.3, rng(seed), mask=MASK, mean_span=3.0)
        assert out[0] == BOS and out[-1] == EOS and len(out) <= len(TEXT)
        gone = 0
        for first, end, masks in hidden(out):
            if first == end:
                continue  # a mask that was inserted
            assert masks >= 1 and first in words and (end in words or end == len(TEXT) - 1)
            gone += ((words >= first) & (words < end)).sum()
        counts.append(gone)
    budget = int(np.ceil(0.3 * len(words)))
    # Spans may overlap, as in the reference, and then hide fewer.
    assert max(counts) <= budget and np.mean(counts) > 0.75 * budget


def test_spans_sum_up_and_follow_poisson():
    drawn = [spans(30, 3.0, rng(seed)) for seed in range(3_000)]
    assert {int(lengths.sum()) for lengths in drawn} == {30}
    # The last one is cut to fit: look at the first.
    lengths = np.concatenate([lengths[:4] for lengths in drawn])
    expected = np.exp(-3.0) * 3.0 ** np.arange(6) / [1, 1, 2, 6, 24, 120]
    found = np.bincount(lengths, minlength=6)[:6] / len(lengths)
    assert (abs(found - expected) < 5 * (expected / len(lengths)) ** 0.5).all()


def test_spans_without_words_become_inserted_masks():
    drawn = [hide_words(TEXT, STARTS, 0.3, rng(s), mask=MASK, mean_span=0.5) for s in range(200)]
    inserted = [sum(first == end for first, end, _ in hidden(out)) for out in drawn]
    assert np.mean(inserted) > 5 and max(len(out) for out in drawn) <= len(TEXT)


@pytest.mark.parametrize("share", [0.1, 0.15, 0.5])
def test_single_tokens_are_masked_or_deleted(share):
    every, count = np.ones(len(TEXT), bool), int(np.ceil(share * 200))
    masked = hide_words(TEXT, every, share, rng(0), mask=MASK)
    assert (masked == MASK).sum() == count and len(masked) == len(TEXT)
    np.testing.assert_array_equal(masked[masked != MASK], TEXT[masked != MASK])
    deleted = hide_words(TEXT, every, share, rng(0), mask=MASK, delete=True)
    np.testing.assert_array_equal(deleted, masked[masked != MASK])


def test_substitutes():
    every = np.ones(len(TEXT), bool)
    out = [
        hide_words(TEXT, every, 0.5, rng(s), mask=MASK, substitute=0.1, words=WORDS)
        for s in range(400)
    ]
    changed = np.concatenate([o[o != TEXT] for o in out])
    share = (changed != MASK).mean()
    assert abs(share - 0.1) < 5 * (0.09 / len(changed)) ** 0.5 + 0.1 / 200
    assert np.isin(changed[changed != MASK], WORDS).all()


def sentences(tokens):
    ends = [i for i in range(1, len(tokens) - 1) if STOPS[tokens[i]] and not STOPS[tokens[i - 1]]]
    cuts = [0, *ends, len(tokens) - 2]
    return [tuple(tokens[a + 1 : b + 1]) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


def test_sentences_change_places():
    whole = sentences(TEXT)
    assert len(whole) == 4
    orders = set()
    for seed in range(300):
        out = permute_sentences(TEXT, STOPS, 1.0, rng(seed))
        assert out[0] == BOS and out[-1] == EOS
        order = sorted(whole, key=lambda s: int(np.flatnonzero(out == s[0])[0]))
        np.testing.assert_array_equal(out[1:-1], np.concatenate(order))
        orders.add(tuple(whole.index(s) for s in order))
    assert len(orders) == 24
    np.testing.assert_array_equal(permute_sentences(TEXT, STOPS, 0.0, rng(0)), TEXT)
    # Half of four sentences: two at most are elsewhere.
    for seed in range(50):
        out = permute_sentences(TEXT, STOPS, 0.5, rng(seed))
        order = sorted(whole, key=lambda s: int(np.flatnonzero(out == s[0])[0]))
        assert sum(a != b for a, b in zip(order, whole, strict=True)) in (0, 2)


def test_rotation_and_insertion():
    firsts = set()
    for seed in range(3_000):
        out = rotate(TEXT, rng(seed))
        assert out[0] == BOS and out[-1] == EOS
        start = int(np.flatnonzero(TEXT[1:-1] == out[1])[0])
        np.testing.assert_array_equal(out[1:-1], np.roll(TEXT[1:-1], -start))
        firsts.add(start)
    assert firsts == set(range(200))
    out = insert(TEXT, 7, rng(0), mask=MASK)
    assert (out == MASK).sum() == 7 and out[0] == BOS and out[-1] == EOS
    np.testing.assert_array_equal(out[out != MASK], TEXT)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 30, 200])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mean_span": 0.3},
        {"infill": 1.0, "rotate": 1.0},
        {"infill": 0.0, "permute": 0.0, "delete": 0.15, "mask": 0.1},
        {"delete": 1.0},
    ],
)
def test_no_example_is_longer_than_its_row(window, settings):
    settings = BartDenoising(length=202, **settings)
    for seed in range(100):
        example = bart_denoising(
            WORDS[:window],
            rng(seed),
            settings=settings,
            bos=BOS,
            eos=EOS,
            mask=MASK,
            words=WORDS,
            word_starts=np.arange(IDS) % 2 == 0,
            sentence_ends=STOPS,
        )
        inputs, targets = settings.sizes(window)
        assert len(example["inputs"]) <= inputs and len(example["targets"]) == targets
        assert example["inputs"].dtype == example["targets"].dtype == np.int32
        assert example["inputs"][0] == BOS and example["inputs"][-1] == EOS
        np.testing.assert_array_equal(example["targets"], [BOS, *WORDS[:window], EOS])


def test_what_hides_does_not_depend_on_what_is_hidden():
    """No word reaches the inputs by the place of a mask: another one there gives the same."""
    for seed in range(50):
        out = hide_words(TEXT, STARTS, 0.3, rng(seed), mask=MASK, mean_span=3.0)
        gone = ~np.isin(TEXT, out)
        other = np.where(gone, 7_777, TEXT)
        again = hide_words(other, STARTS, 0.3, rng(seed), mask=MASK, mean_span=3.0)
        np.testing.assert_array_equal(again, out)


NOISE = {"bos": BOS, "eos": EOS, "mask": MASK, "words": WORDS}


def test_the_noise_does_not_depend_on_what_is_hidden():
    """All of it, as it is by default: each id has a twin of its kind, which is put in its place
    where it is hidden."""
    hide = functools.partial(
        bart_denoising,
        settings=BartDenoising(),
        word_starts=np.tile(np.arange(IDS) % 2 == 0, 2),
        sentence_ends=np.tile(STOPS, 2),
        **NOISE,
    )
    stops = 0
    for seed in range(50):
        example = hide(WORDS, rng(seed))
        gone = ~np.isin(WORDS, example["inputs"])
        again = hide(np.where(gone, WORDS + IDS, WORDS), rng(seed))
        np.testing.assert_array_equal(again["inputs"], example["inputs"])
        assert (again["targets"] != example["targets"]).sum() == gone.sum() > 20
        stops += STOPS[WORDS[gone]].sum()
    assert stops > 20  # sentences end there all the same


# --- the paper's example, its noise told again in plain words

FIGURE = {"<s>": BOS, "</s>": EOS, "_": MASK, "A": 5, "B": 6, "C": 7, ".": 8, "D": 9, "E": 10}
NAMES = {id: name for name, id in FIGURE.items()}
LINE = "A B C . D E .".split()


def sentence_permutation(draw):
    return [word for i in draw.permutation(2) for word in (LINE[:4], LINE[4:])[i]]


def document_rotation(draw):
    draw.random()  # whether to rotate
    first = draw.integers(1, len(LINE) + 1)
    return LINE[first - 1 :] + LINE[: first - 1]


def token_masking(draw, *, delete=False):
    places = set(draw.permutation(7)[:2])
    line = ["_" if i in places else word for i, word in enumerate(LINE)]
    return [word for word in line if word != "_" or not delete]


def text_infilling(draw, *, starts="ABC.DE."):
    """Spans may overlap; those of no words are put in last."""
    firsts = [i for i, word in enumerate(LINE) if word in starts]
    budget = math.ceil(0.25 * len(firsts))
    drawn = list(draw.poisson(1.0, budget))
    while sum(drawn) < budget:
        drawn += list(draw.poisson(1.0, budget))
    lengths = []
    while sum(lengths) < budget:
        lengths.append(min(drawn[len(lengths)], budget - sum(lengths)))
    inserted, lengths = lengths.count(0), [length for length in lengths if length]
    line, kept = list(LINE), [True] * 7
    begins = [firsts[i] for i in draw.permutation(len(firsts))[: len(lengths)]]
    for place, left in zip(begins, lengths, strict=True):
        line[place] = "_"
        while place + 1 < 7:
            place += 1
            left -= LINE[place] in starts
            if left == 0:
                break
            kept[place] = False
    line = [word for word, keep in zip(line, kept, strict=True) if keep]
    inserted = min(inserted, 7 - len(line))  # ours: no text gets longer
    if inserted:
        for place in sorted(draw.permutation(len(line) + inserted)[:inserted]):
            line.insert(place, "_")
    return line


NO_NOISE = {"infill": 0.0, "permute": 0.0, "substitute": 0.0}


@pytest.mark.parametrize(
    ("settings", "retold", "figure"),
    [
        ({"mask": 0.25}, token_masking, "A _ C . _ E ."),
        ({"delete": 0.25}, functools.partial(token_masking, delete=True), "A C . E ."),
        ({"permute": 1.0}, sentence_permutation, "D E . A B C ."),
        ({"rotate": 1.0}, document_rotation, "C . D E . A B"),
        ({"infill": 0.25, "mean_span": 1.0}, text_infilling, "A _ . D _ E ."),
        (  # full stops belong to the words before them, as in GPT-2's vocabulary
            {"infill": 0.25, "mean_span": 1.0},
            functools.partial(text_infilling, starts="ABCDE"),
            "A _ D _ E .",
        ),
    ],
    ids=["masking", "deletion", "permutation", "rotation", "infilling", "infilling, whole words"],
)
def test_the_papers_example(settings, retold, figure):
    """Lewis et al. 2020, figure 2, is among what the steps of fairseq's denoising_dataset.py give:
    `add_whole_word_mask`, `permute_sentences`, `add_rolling_noise`, `add_insertion_noise`."""
    starts = getattr(retold, "keywords", {}).get("starts", "ABC.DE.")
    ids = np.arange(11)
    noise = functools.partial(
        bart_denoising,
        np.array([FIGURE[word] for word in LINE]),
        settings=BartDenoising(**NO_NOISE | settings),
        word_starts=np.isin(ids, [FIGURE[word] for word in starts]),
        sentence_ends=ids == FIGURE["."],
        **NOISE,
    )
    seen = set()
    for seed in range(2_000):
        start, *found, end = (NAMES[id] for id in noise(rng(seed))["inputs"])
        assert (start, found, end) == ("<s>", retold(rng(seed)), "</s>"), seed
        seen.add(" ".join(found))
    assert figure in seen


def test_bound_to_a_tokenizer_english_and_korean():
    texts = ["The list is empty. It rains!", "목록이 비어 있습니다. 비가 온다."] * 4
    tokenizer = train("byte_bpe", texts, 400)
    bound = BartDenoising(length=200).bind(tokenizer)
    for text in texts[:2]:
        tokens = np.array(tokenizer.encode(text))
        example = bound(tokens, rng(3))
        assert tokenizer.decode(example["targets"][1:]) == text
        assert (example["inputs"] == tokenizer.mask_id).any()
        stops = bound.keywords["sentence_ends"][tokens]
        assert stops.sum() == 2

    class Unigram:
        bos_id = mask_id = None

    with pytest.raises(ValueError, match="the tokenizer lacks them: take one of BART's kind"):
        BartDenoising().bind(Unigram())


def test_needs_a_full_stop_to_permute():
    class Letters:
        bos_id, eos_id, mask_id, unk_id, vocab_size = 0, 2, 4, 3, 9
        special_ids = np.arange(5)

        def decode(self, ids):
            return "letter"

        def starts_word(self):
            return np.ones(9, bool)

    with pytest.raises(ValueError, match="no token for a full stop.*--objective.permute 0"):
        BartDenoising().bind(Letters())
    assert BartDenoising(permute=0.0).bind(Letters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 2}, "length >= 3, got 2"),
        ({"infill": 1.5}, "infill is 1.5, not a share"),
        ({"mean_span": 0.0}, "mean_span is 0.0"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        BartDenoising(**settings)
