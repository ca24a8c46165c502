import json
import pickle

import numpy as np
import pytest
import transformers

from lmjax.data import fast_tokenizers
from lmjax.data.fast_tokenizers import FastTokenizer
from lmjax.data.token_store import Ended
from lmjax.data.tokenizers import load_tokenizer

TEXTS = [
    "The quick brown fox returns the list of values, in order.",
    "목록의 값을 차례대로 돌려줍니다. 값이 없으면 빈 목록입니다.",
    "Returns None if the list is empty; 목록이 비어 있으면 None.",
] * 4


@pytest.fixture(scope="module", params=["byte_bpe", "wordpiece"])
def tokenizer(request):
    return fast_tokenizers.train(request.param, TEXTS, 500)


@pytest.mark.parametrize("text", TEXTS[:3])
def test_text_comes_back(tokenizer, text):
    """WordPiece has no spaces, and lower case."""
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.vocab_size and tokenizer.unk_id not in ids

    def plain(text):
        return text if tokenizer.mask_id == tokenizer.encode("<mask>")[0] else text.lower()

    squeezed = [t.replace(" ", "") for t in (tokenizer.decode(ids), plain(text))]
    assert squeezed[0] == squeezed[1]


def test_training_is_repeatable(tokenizer):
    kind = "byte_bpe" if tokenizer.encode("<mask>") == [tokenizer.mask_id] else "wordpiece"
    again = fast_tokenizers.train(kind, TEXTS, 500)
    assert again.sha256 == tokenizer.sha256
    assert fast_tokenizers.train(kind, TEXTS[:1] * 4, 500).sha256 != tokenizer.sha256


def test_special_tokens(tokenizer):
    assert tokenizer.special_ids.tolist() == [0, 1, 2, 3, 4]
    roles = ("pad", "bos", "eos", "unk", "mask")
    assert len({getattr(tokenizer, f"{role}_id") for role in roles}) == 5
    mask = {4: "<mask>" if tokenizer.pad_id == 1 else "[MASK]"}[tokenizer.mask_id]
    assert tokenizer.encode(mask) == [tokenizer.mask_id]
    (literal,) = tokenizer.encode_batch([mask])  # a corpus may speak of them
    assert tokenizer.mask_id not in literal
    assert tokenizer.decode([tokenizer.mask_id]) == mask
    assert tokenizer.decode([tokenizer.bos_id, 9, tokenizer.eos_id, 10]) == tokenizer.decode([9])


def test_saved_pickled_and_found_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")  # as in a run's workdir
    for found in (
        load_tokenizer(tmp_path / "tokenizer.model"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert found.sha256 == tokenizer.sha256
        assert found.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXTS[0], add_special_tokens=False) == tokenizer.encode(TEXTS[0])
    assert theirs.mask_token_id == tokenizer.mask_id and theirs.eos_token_id == tokenizer.eos_id
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_files_of_gpt2(tmp_path):
    """vocab.json and merges.txt, read as transformers' own GPT-2 tokenizer reads them."""
    trained = json.loads(fast_tokenizers.train("byte_bpe", TEXTS, 400).model)
    vocabulary = {**trained["model"]["vocab"], "<|endoftext|>": 400}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in trained["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    theirs = transformers.GPT2Tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    ours = load_tokenizer(tmp_path)
    for text in TEXTS[:3]:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(TEXTS[1])) == TEXTS[1]


@pytest.mark.parametrize("lower", [True, False])
def test_files_of_bert(tmp_path, lower):
    """vocab.txt, read as transformers' own BERT tokenizer reads it."""
    trained = json.loads(fast_tokenizers.train("wordpiece", [*TEXTS, "Café"], 500).model)
    vocabulary = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].get)
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    theirs = transformers.BertTokenizer(tmp_path / "vocab.txt", do_lower_case=lower)
    ours = load_tokenizer(tmp_path)
    for text in [*TEXTS[:3], "Café [MASK] au lait"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.eos_id == theirs.sep_token_id and ours.bos_id == theirs.cls_token_id


def test_words_begin():
    bpe, pieces = (fast_tokenizers.train(kind, TEXTS, 500) for kind in ("byte_bpe", "wordpiece"))
    ids = bpe.encode("the list of values")
    assert bpe.starts_word()[ids].tolist()[1:] == [
        bpe.decode([id]).startswith(" ") for id in ids[1:]
    ]
    ids = pieces.encode("returns valuess")
    assert not pieces.starts_word()[ids].all() and pieces.starts_word()[ids[0]]


def test_documents_end(tokenizer):
    (ids,) = Ended(tokenizer).encode_batch(["the list"])
    assert ids.tolist() == [*tokenizer.encode("the list"), tokenizer.eos_id]
    assert ids.dtype == np.int32 and Ended(tokenizer).sha256 != tokenizer.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "is no tokenizer.json, or is damaged"),
        ("vocab.txt", "a\nb\n", r"no vocab.txt of WordPiece: it has no \[UNK\]"),
        ("merges.txt", "#version: 0.2\n", "is damaged or incomplete"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    path = tmp_path if name == "merges.txt" else tmp_path / name
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="cannot read the tokenizer .*absent.json"):
        FastTokenizer.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="too small for byte_bpe: set at least 261"):
        fast_tokenizers.train("byte_bpe", TEXTS, 200)
    no_end = json.loads(fast_tokenizers.train("byte_bpe", TEXTS, 300).model)
    no_end["added_tokens"] = []
    del no_end["model"]["vocab"]["</s>"]
    with pytest.raises(ValueError, match="no token that ends a text"):
        FastTokenizer(json.dumps(no_end).encode())
