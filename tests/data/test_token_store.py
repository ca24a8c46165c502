import errno
import multiprocessing
import pickle

import numpy as np
import pytest

from lmjax.data import token_store
from lmjax.data.token_store import DamagedStore, TokenStore, build_token_store, first_documents

DOCUMENTS = ["one", "", "three and more", "four"]


class Letters:
    """A fake tokenizer: one id per character."""

    sha256 = "letters"

    def __init__(self, vocab_size=1_000):
        self.vocab_size = vocab_size

    def encode_batch(self, texts):
        return [np.array([ord(c) for c in text], np.int32) for text in texts]


def text(ids):
    return "".join(map(chr, ids))


def never():
    raise AssertionError("the documents were read again")
    yield


def build(directory, documents=DOCUMENTS, tokenizer=None):
    return build_token_store(
        documents, tokenizer or Letters(), directory, "fingerprint", progress=False
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_documents_come_back_and_ids_are_stored_narrowly(tmp_path, vocab_size, dtype, monkeypatch):
    monkeypatch.setattr(token_store, "GROUP_DOCUMENTS", 2)
    store = build(tmp_path / "store", tokenizer=Letters(vocab_size))
    assert store.tokens.dtype == dtype and len(store) == 4
    assert [text(store.document(i)) for i in range(4)] == DOCUMENTS
    assert text(store.tokens) == "".join(DOCUMENTS)
    assert store.fingerprint == "fingerprint"


def test_the_first_documents_are_tokenized_without_reading_the_rest(monkeypatch):
    monkeypatch.setattr(token_store, "GROUP_DOCUMENTS", 1)

    def documents():
        yield from DOCUMENTS
        raise AssertionError("more was read than needed")

    first = first_documents(documents(), Letters(), 18)
    assert [text(first.document(i)) for i in range(len(first))] == DOCUMENTS
    assert text(first.tokens) == "".join(DOCUMENTS)
    assert len(first_documents(DOCUMENTS, Letters(), 1_000)) == 4
    assert len(first_documents([], Letters(), 1_000)) == 0


def test_a_store_is_opened_not_built_again_and_pickles_by_path(tmp_path):
    build(tmp_path / "store")
    store = build(tmp_path / "store", documents=never())
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    np.testing.assert_array_equal(pickle.loads(pickled).tokens, store.tokens)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "meta.json"])
def test_a_truncated_store_is_named_and_built_again(tmp_path, name, capsys):
    build(tmp_path / "store")
    damaged = tmp_path / "store" / name
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(DamagedStore, match="token store .*store is damaged"):
        TokenStore(tmp_path / "store")
    assert text(build(tmp_path / "store").tokens) == "".join(DOCUMENTS)
    assert "is damaged" in capsys.readouterr().out


def test_a_store_of_other_text_is_refused_not_replaced(tmp_path):
    build(tmp_path / "store")
    with pytest.raises(ValueError, match="another text or another tokenizer"):
        build_token_store(never(), Letters(), tmp_path / "store", "other", progress=False)
    assert text(TokenStore(tmp_path / "store").tokens) == "".join(DOCUMENTS)


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_an_empty_source_is_named_and_leaves_nothing(tmp_path, documents):
    with pytest.raises(ValueError, match="nothing to train on"):
        build(tmp_path / "store", documents=documents)
    assert [path.name for path in tmp_path.iterdir()] == ["store.lock"]
    with pytest.raises(FileNotFoundError, match="no token store"):
        TokenStore(tmp_path / "store")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, texts):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Letters, "encode_batch", full)
    with pytest.raises(OSError, match="no space is left in") as caught:
        build(tmp_path / "store")
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["store.lock"]


def build_after(barrier, directory, results):
    barrier.wait()
    store = build(directory, documents=(f"document {i}" for i in range(2_000)))
    results.put(len(store))


def test_processes_that_start_at_once_agree(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (barrier, tmp_path / "store", results)
    processes = [context.Process(target=build_after, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [2_000, 2_000]
    for process in processes:
        process.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "store.lock"]
