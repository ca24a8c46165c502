import ast
import multiprocessing

import numpy as np
import pytest

from lmjax.data import python_docs as module
from lmjax.data.python_docs import python_docs
from lmjax.data.sources import document_hash

PACKAGES = ("optax", "not-installed-anywhere")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))


def test_documents_are_clean_distinct_and_split_by_hash(tmp_path):
    source = python_docs(PACKAGES)
    train, validation = (list(source.documents(s)) for s in ("train", "validation"))
    assert len(train) == source.num_documents("train") > 200
    assert len(set(train + validation)) == len(train + validation)
    assert all(len(text) >= 100 and text == text.strip() for text in train + validation)
    assert all(document_hash(text) < 0.05 * 2**64 for text in validation)
    assert any("Adafactor" in text for text in train)
    assert source.fingerprint("train") == python_docs(PACKAGES).fingerprint("train")
    assert not list(tmp_path.rglob("*.tmp"))


def test_upgrades_rebuild(monkeypatch):
    monkeypatch.setattr(module, "collect_documents", lambda packages: texts)
    directories = []
    for version in ("1.0", "2.0"):
        monkeypatch.setattr(module, "_version", lambda package, version=version: version)
        texts = {i << 55: f"{version} {i}" for i in range(512)}
        source = python_docs(PACKAGES)
        directories.append(source.dataset)
        assert {text.split()[0] for text in source.documents("train")} == {version}
    assert directories[0] != directories[1]


def test_what_is_read_from_a_module(tmp_path, recwarn):
    path = tmp_path / "pydoc_data" / "topics.py"
    path.parent.mkdir()
    path.write_text("topics = {'assert': 'The assert statement', 'if': 'The if statement'}")
    assert list(module._documents_in(path)) == ["The assert statement", "The if statement"]

    path = tmp_path / "module.py"
    path.write_text(
        '"Module \\d."\n'
        "if True:\n"
        "    class A:\n"
        '        """A class.\n\n        Indented."""\n'
        "        async def method(self):\n"
        '            "Method."\n'
        "            raise SystemExit('never run')\n"
        "else:\n"
        "    def f():\n"
        '        "Function."\n'
    )
    found = {text for text in module._documents_in(path) if text}
    assert found == {"Module \\d.", "A class.\n\nIndented.", "Method.", "Function."}

    for content in (b"# coding: latin-1\n'\xe9t\xe9'\n", b"'\xe9'", b"print 'old'", b"\0"):
        path.write_bytes(content)
        assert set(module._documents_in(path)) <= {ast.literal_eval("'\xe9t\xe9'")}
    assert not recwarn


def test_the_standard_library_is_found():
    files = module._python_files("python")
    names = {path.name for path in files}
    assert {"topics.py", "argparse.py"} <= names and "test_argparse.py" not in names
    assert not any("site-packages" in path.parts for path in files)


def test_nothing_to_read_is_said():
    with pytest.raises(ValueError, match="found 0 documents in not-installed-anywhere"):
        python_docs(("not-installed-anywhere",))


def _prepare(barrier, log, results):
    collect = module.collect_documents

    def logged(packages):
        with open(log, "a") as file:
            file.write("prepared\n")
        return collect(packages)

    module.collect_documents = logged
    barrier.wait()
    results.put(len(list(python_docs(PACKAGES).documents("train"))))


def test_two_processes_at_once_prepare_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (barrier, tmp_path / "log", results)
    processes = [context.Process(target=_prepare, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    counts = [results.get() for _ in processes]
    assert np.ptp(counts) == 0 and counts[0] > 200
    assert (tmp_path / "log").read_text() == "prepared\n"
