import gzip
import json
import os
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lmjax.data import sources
from lmjax.data.sources import TFDS, TextData, TextFiles, open_source
from tests.data.tfrecords import as_tfrecord

ENGLISH = [f"Paragraph {i} is about\nthe number {i}." for i in range(40)]
KOREAN = [f"{i}번째 문단은 숫자 {i}에 대한 글이다." for i in range(40)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def both(source):
    return {split: list(source.documents(split)) for split in ("train", "validation")}


def test_every_kind_of_file_is_read(tmp_path):
    lines = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in KOREAN[20:])
    write(tmp_path / "a.txt", "\ufeff" + "\r\n\r\n".join(ENGLISH[:20]))
    write(tmp_path / "deep/er/b.md.gz", gzip.compress("\n\n\n".join(KOREAN[:20]).encode()))
    write(tmp_path / "deep/c.json.gz", gzip.compress(lines.encode()))
    write(tmp_path / "deep/d.jsonl", '{"text": "half a pair \\ud800"}\n\n{"text": " "}\n')

    splits = both(TextFiles((f"{tmp_path}/**/*.*",)))
    read = {text.replace("\r\n", "\n") for split in splits.values() for text in split}
    assert read == {*ENGLISH[:20], *KOREAN, "half a pair ?"}
    assert splits["train"] and splits["validation"]


def test_held_out_documents_do_not_depend_on_order_or_company(tmp_path):
    write(tmp_path / "one.txt", "\n\n".join(ENGLISH))
    write(tmp_path / "two.txt", "\n\n".join(KOREAN + ENGLISH[::-1]))
    one = both(TextFiles(f"{tmp_path}/one.txt", validation_fraction=0.3))
    two = both(TextFiles(f"{tmp_path}/two.txt", validation_fraction=0.3))
    assert set(one["validation"]) == set(two["validation"]) & set(ENGLISH)
    assert not set(two["validation"]) & set(two["train"])
    assert 10 < len(two["validation"]) < 60  # 36 of 120 on average


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_smallest_text_still_has_both_splits(tmp_path, count):
    write(tmp_path / "small.txt", "\n\n".join(ENGLISH[:count]))
    splits = both(TextFiles(f"{tmp_path}/small.txt"))
    assert len(splits["validation"]) == 1 and len(splits["train"]) == count - 1


@pytest.mark.parametrize("name", ["poem.txt", "poem.jsonl"])
def test_of_a_single_document_lines_are_held_out(tmp_path, name):
    lines = [f"line {i}" for i in range(30)]
    text = "\n".join(lines)
    write(tmp_path / name, json.dumps({"text": text}) if name.endswith("l") else text)
    source = TextFiles(f"{tmp_path}/{name}", validation_fraction=0.2)
    splits = both(source)
    assert sorted(sum(splits.values(), [])) == sorted(lines)
    assert splits["train"] and splits["validation"]
    # Not where nothing needs to be held out.
    assert list(TextFiles(source.patterns, source.patterns).documents("validation")) == [text]
    write(tmp_path / "other.txt", "another document")
    assert text in sum(both(TextFiles(f"{tmp_path}/*")).values(), [])


def test_long_blocks_are_cut_at_lines_and_spaces(tmp_path):
    book = "".join(f"Line {i} of a book without an empty line.\n" for i in range(2_000))
    single_line = " ".join(f"word{i}" for i in range(10_000))
    write(tmp_path / "book.txt", book + "\n" + single_line)
    splits = both(TextFiles(f"{tmp_path}/book.txt"))
    pieces = splits["train"] + splits["validation"]
    assert max(map(len, pieces)) < 2 * sources.BLOCK_CHARACTERS
    assert sorted(" ".join(pieces).split()) == sorted((book + single_line).split())
    assert all(p.endswith(".") for p in pieces if p.startswith("Line"))


@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_are_disjoint_and_complete(tmp_path, files, split):
    for i in range(files):
        write(tmp_path / f"{i}.txt", "\n\n".join(f"{text} {i}" for text in ENGLISH))
    source = TextFiles(f"{tmp_path}/*.txt", validation_fraction=0.3)
    shards = [list(source.documents(split, shard, 3)) for shard in range(3)]
    assert all(shards)
    assert sorted(sum(shards, [])) == sorted(source.documents(split))


def test_validation_files_are_left_out_of_training(tmp_path):
    write(tmp_path / "a.txt", "\n\n".join(ENGLISH))
    validation = write(tmp_path / "valid.txt", "\n\n".join(KOREAN))
    splits = both(TextFiles(f"{tmp_path}/*.txt", validation))
    assert splits == {"train": ENGLISH, "validation": KOREAN}
    with pytest.raises(ValueError, match="every file .* is a validation file"):
        TextFiles(validation, validation).files("train")


def test_fingerprints_name_the_content(tmp_path):
    path = write(tmp_path / "a.txt", "\n\n".join(ENGLISH))
    source = TextFiles(path)
    first = source.fingerprint("train")
    assert first != source.fingerprint("validation")
    assert first != TextFiles(path, validation_fraction=0.2).fingerprint("train")
    moved = write(tmp_path / "elsewhere/b.txt", "\n\n".join(ENGLISH))
    assert TextFiles(moved).fingerprint("train") == first

    stat = os.stat(path)
    write(tmp_path / "a.txt", "\n\n".join(ENGLISH).replace("9", "8"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert TextFiles(path).fingerprint("train") != first


def test_huge_files_are_sampled_for_their_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HASH_WHOLE_BYTES", 100)
    content = bytearray(os.urandom(10_000_000))
    first = TextFiles(write(tmp_path / "a", bytes(content))).fingerprint("train")
    assert TextFiles(write(tmp_path / "b", bytes(content))).fingerprint("train") == first
    content[-1] ^= 1
    assert TextFiles(write(tmp_path / "c", bytes(content))).fingerprint("train") != first


def gzipped(content):
    """Without the time: pytest names tests by their content, and its processes must agree."""
    return gzip.compress(content, mtime=0)


NOISE = np.random.default_rng(0).bytes(9_000).hex().encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "가나".encode() + b"\n\n\xff", r"a.txt is not UTF-8 at byte 8"),
        ("a.txt", "안녕".encode("cp949"), r"a.txt is not UTF-8 at byte 0"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"one line\n", "one line .* to hold out as its validation split"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', r"line 2 of .*'text'.*\['body'\]"),
        ("a.jsonl", b'{"text": 3}', "line 1 of .* has no text under 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{"te', "line 2 of .* is not JSON"),
        ("a.json", b'["x"]', "line 1 of .* holds a list"),
        ("a.txt.gz", gzipped(NOISE)[:-99], "damaged gzip"),
        ("a.txt.gz", gzipped(b"a" * 99)[:20] + b"damaged here", "damaged gzip"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path, name, content, message):
    source = TextFiles(write(tmp_path / name, content))
    with pytest.raises(ValueError, match=message) as error:
        list(source.documents("train"))
    assert "\n" not in str(error.value)


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches 'absent/\*.txt' in /"):
        open_source(TextData(files=("absent/*.txt",)))
    with pytest.raises(FileNotFoundError, match=r"it is a directory, write .*/\*\*"):
        open_source(TextData(files=(f"{tmp_path}/",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": ("a",), "tfds": "c4"}, "both set"),
        ({"validation_files": ("a",)}, "without data.files"),
        ({"tfds_download": True}, "without data.tfds"),
        ({"files": ("a",), "validation_fraction": 5.0}, "not between 0 and 1"),
        ({"tfds": "gs://bucket/c4"}, "remote"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(TextData(**settings))


class NumberedTexts(tfds.core.GeneratorBasedBuilder):
    """A set with a train split only."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent  # where TFDS would look for metadata

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"body": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)}
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, text in enumerate(ENGLISH + KOREAN):
            yield i, {"body": text, "number": i}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    builder = NumberedTexts(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return data_dir


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("by_name", [True, False])
def test_prepared_tfds_sets_are_read_without_tensorflow(prepared, tmp_path, file_format, by_name):
    copy = tmp_path / "numbered_texts" / "1.0.0"
    copy.mkdir(parents=True)
    for path in (prepared / "numbered_texts" / "1.0.0").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    if file_format == "tfrecord":
        tfrecord = as_tfrecord(copy)

    where = {"tfds": "numbered_texts", "tfds_data_dir": str(tmp_path)}
    where = where if by_name else {"tfds": str(copy)}
    source = open_source(TextData(**where, text_key="body", validation_fraction=0.2))
    assert source.splits == ("train", "validation")
    splits = both(source)
    assert sorted(sum(splits.values(), [])) == sorted(ENGLISH + KOREAN)
    assert splits["train"] and splits["validation"]
    shards = [list(source.documents("train", shard, 3)) for shard in range(3)]
    assert sorted(sum(shards, [])) == sorted(splits["train"])
    assert source.fingerprint("train") != source.fingerprint("validation")

    if file_format == "tfrecord":
        tfrecord.write_bytes(tfrecord.read_bytes()[:-7])
        with pytest.raises(ValueError, match="ends in the middle of a record"):
            list(TFDS(str(copy), "body").documents("train"))


def test_tfds_errors_are_immediate_sentences(prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match="no prepared TFDS data set c4/en in .*tfds_down"):
        open_source(TextData(tfds="c4/en", tfds_data_dir=str(tmp_path)))
    directory = str(prepared / "numbered_texts" / "1.0.0")
    with pytest.raises(ValueError, match=r"no text feature 'text': set text_key to .*\['body'\]"):
        open_source(TextData(tfds=directory))
    with pytest.raises(ValueError, match="has no split 'test'"):
        TFDS(directory, "body").documents("test")
    with pytest.raises(ValueError, match=r"cannot download and prepare c4/en .*lmjax\[tensorflow"):
        open_source(TextData(tfds="c4/en", tfds_data_dir=str(tmp_path), tfds_download=True))
