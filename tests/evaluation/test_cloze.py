import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.data.token_store import TokenizedDocuments
from lmjax.evaluation.cloze import CANDIDATES, READERS, Cloze, SpecialTokens, ask
from lmjax.models.bart import Bart, BartConfig
from lmjax.models.bert import Bert, BertConfig
from lmjax.models.gpt2 import GPT2, GPT2Config
from lmjax.models.layers import unboxed
from lmjax.models.t5 import T5, T5Config
from lmjax.models.xlnet import XLNet, XLNetConfig
from lmjax.tasks.causal import Causal
from lmjax.tasks.task import reads

VOCAB, LENGTH = 60, 12
BOS, EOS, MASK, SENTINEL = 3, 1, 6, 7
TOKENS = SpecialTokens(BOS, EOS, MASK, SENTINEL)
SIZE = dict(vocab=VOCAB, layers=2, width=16, heads=2, feed_forward=24, dropout=0.0)
PLACES = dict(positions=LENGTH + 2)
MODELS = {
    "roberta": Bert(BertConfig(**SIZE, **PLACES, kind="masked_lm", token_types=1)),
    "xlnet": XLNet(XLNetConfig(**SIZE)),
    "gpt2": GPT2(GPT2Config(**SIZE, **PLACES)),
    "bart": Bart(BartConfig(**SIZE, **PLACES, padding=0, start=EOS, attention_dropout=0.0)),
    "t5": T5(T5Config(**SIZE, head_width=8)),
}


class Words:
    """Ids below 10 are special, then words and pieces that continue them take turns."""

    vocab_size, special_ids = VOCAB, np.arange(10)

    def starts_word(self):
        return np.arange(VOCAB) % 2 == 0

    def decode(self, ids):
        return "" if ids == [10] else "word"


def documents(*lengths, seed=0):
    tokens = np.random.default_rng(seed).integers(10, VOCAB, sum(lengths), np.int32)
    return TokenizedDocuments(tokens, np.cumsum([0, *lengths]))


def questions(count=6, batch=3, seed=0):
    frequencies = np.random.default_rng(1).integers(0, 50, VOCAB)
    text = documents(30, 5, 40, 13)
    return ask(
        text, frequencies, Words(), questions=count, length=LENGTH, batch=batch, seed=seed
    ), np.maximum(frequencies, 1)


def test_questions_are_about_words_of_passages_within_documents():
    batches, frequencies = questions(count=20)
    assert [len(batch["passage"]) for batch in batches] == [3, 3]  # 2 + 3 + 1 passages
    text = documents(30, 5, 40, 13)
    whole = {tuple(text.document(d)[i : i + LENGTH]) for d in range(4) for i in (0, 12, 24)}
    seen = set()
    for batch in batches:
        for row in range(3):
            passage, place = tuple(batch["passage"][row]), batch["place"][row]
            seen.add(passage)
            candidates, answer = batch["candidates"][row], batch["answer"][row]
            assert candidates[answer] == passage[place]
            assert len(set(candidates)) == CANDIDATES
            assert (candidates % 2 == 0).all() and (candidates > 10).all()
            np.testing.assert_allclose(
                batch["log_frequency"][row], np.log(frequencies[candidates]), rtol=1e-6
            )
    assert len(seen) == 6 and seen <= whole


def test_questions_are_the_same_each_time_and_fill_their_batches():
    batches, _ = questions(count=4)
    again, _ = questions(count=4)
    jax.tree.map(np.testing.assert_array_equal, batches, again)
    assert batches[1]["weights"].tolist() == [1, 0, 0]
    others, _ = questions(count=4, seed=1)
    assert (batches[0]["candidates"] != others[0]["candidates"]).any()
    answers = np.concatenate([questions(seed=seed)[0][0]["answer"] for seed in range(30)])
    assert set(answers) == set(range(CANDIDATES))


def test_others_are_drawn_by_their_frequency():
    frequencies = np.ones(VOCAB, int)
    frequencies[20] = 1_000_000
    text = documents(*[LENGTH] * 20)
    (batch,) = ask(text, frequencies, Words(), questions=20, length=LENGTH, batch=20)
    assert (batch["candidates"] == 20).any(1).all()


def test_text_that_gives_no_questions():
    with pytest.raises(ValueError, match="no held-out document has 12 tokens"):
        ask(documents(5, 9), np.ones(VOCAB), Words(), questions=1, length=LENGTH, batch=1)
    few = Words()
    few.special_ids = np.arange(42)
    with pytest.raises(ValueError, match="9 tokens that begin words.*larger vocabulary"):
        ask(documents(30), np.ones(VOCAB), few, questions=1, length=LENGTH, batch=1)


# --- answers, against the definitions


def plain(model_type, model, params, passage, place, word) -> float:
    """The log-probability of one candidate by a whole forward pass of one text."""

    def logs(*inputs, **options):
        logits = model.apply({"params": params}, *(jnp.array([x]) for x in inputs), **options)
        logits = logits[0] if isinstance(logits, tuple) else logits
        return jax.nn.log_softmax(logits[0])

    before, after = list(passage[:place]), list(passage[place + 1 :])
    text = [*before, word, *after]
    match model_type:
        case "roberta":
            return logs([BOS, *before, MASK, *after, EOS])[place + 1, word]
        case "xlnet":
            order = jnp.array([[0 if i == place else -1 for i in range(LENGTH)]])
            # Whatever stands in the place, the guess does not see it.
            text[place] = 11
            return logs(text, order=order, places=jnp.array([[place]]))[0, word]
        case "gpt2":
            found = logs([EOS, *text[:-1]])
            return sum(found[i, token] for i, token in enumerate(text))
        case "bart":
            targets = [BOS, *text, EOS]
            found = logs([BOS, *before, MASK, *after, EOS], [EOS, *targets[:-1]])
            return sum(found[i, token] for i, token in enumerate(targets))
        case "t5":
            return logs([*before, SENTINEL, *after, EOS], [0, SENTINEL])[1, word]


@pytest.mark.parametrize("model_type", MODELS)
def test_answers_are_what_whole_passes_give_and_never_see_the_hidden_word(model_type):
    model = MODELS[model_type]
    token = jnp.zeros((1, 1), jnp.int32)
    pair = (token, token) if model_type in ("bart", "t5") else (token,)
    shapes = jax.eval_shape(lambda: unboxed(model.init(jax.random.key(0), *pair)["params"])[0])
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.float32(draw.normal(0, 0.5, x.shape)), shapes)
    batch = questions()[0][0]
    read = jax.jit(lambda batch: READERS[model_type](model, params, batch, TOKENS))
    scores = read(batch)
    passage, place = batch["passage"][0], int(batch["place"][0])
    passed = jax.jit(lambda word: plain(model_type, model, params, passage, place, word))
    expected = [passed(word) for word in batch["candidates"][0]]
    np.testing.assert_allclose(scores[0], expected, atol=2e-4)
    assert np.ptp(scores, axis=1).min() > 0.05

    other = batch["passage"].copy()
    other[np.arange(3), batch["place"]] = 12
    np.testing.assert_array_equal(read(batch | {"passage": other}), scores)
    neighbour = batch["passage"].copy()
    neighbour[np.arange(3), (batch["place"] + 1) % LENGTH] = 13
    assert np.abs(read(batch | {"passage": neighbour}) - scores).max() > 1e-4


def test_a_task_that_is_asked_reads_what_it_reads():
    assert reads(Cloze(Causal(MODELS["gpt2"]), READERS["gpt2"], TOKENS)) == ("inputs",)


def test_metrics_are_exact_over_batches_and_chance_is_knowing_frequencies_alone():
    batches, _ = questions(count=4)

    def frequencies_alone(model, params, batch, tokens):
        return batch["log_frequency"] + params

    def metrics(reader):
        task = Cloze(Causal(MODELS["gpt2"]), reader, TOKENS)
        total = {"questions": sum(task.normalizers(batch)["questions"] for batch in batches)}
        assert total["questions"] == 4
        found = [task.evaluate(jnp.float32(2), "extra", batch, total) for batch in batches]
        assert all(extra == "extra" for _, extra in found)
        return {k: float(sum(m[k] for m, _ in found)) for k in found[0][0]}

    assert metrics(frequencies_alone)["loss"] == pytest.approx(math.log(CANDIDATES), abs=1e-5)

    def right(model, params, batch, tokens):
        here = jnp.arange(CANDIDATES) == batch["answer"][:, None]
        return batch["log_frequency"] + params * here

    e = math.exp(2)
    assert metrics(right) == {
        "accuracy": 1.0,
        "loss": pytest.approx(-math.log(e / (e + CANDIDATES - 1)), abs=1e-5),
    }
