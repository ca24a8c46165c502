import io
import json
import os
import pathlib
import pickle
import shutil
import unicodedata

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lmjax.data.pictures import PictureData, by_language, open_pictures, picture_files
from lmjax.data.pixels import read_picture
from tests.data.tfrecords import as_tfrecord


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, the first ones with captions."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(10):
        (folder / ("more" if i % 2 else "") / f"{i}.PNG").write_bytes(png(i))
    (folder / "0.txt").write_text("A red   square\n\n빨간 사각형\n")
    (folder / "more" / "1.txt").write_text("\ufeffAnother one")
    (folder / "notes.md").write_text("no picture")
    return folder


def opened(**settings):
    return open_pictures(PictureData(**settings))


def everything(splits):
    """Captions by name, of both sides."""
    return {
        name: captions
        for pictures in splits.values()
        for name, captions in zip(pictures.names, pictures.captions, strict=True)
    }


def red(pictures):
    return [read_picture(pictures.file(i)).getpixel((0, 0))[0] for i in range(len(pictures))]


def test_a_folder_and_the_captions_beside_its_pictures(folder):
    splits = opened(folder=str(folder), validation_fraction=0.3)
    captions = everything(splits)
    assert len(captions) == 10
    assert captions["0.PNG"] == {"en": ("A red square",), "ko": ("빨간 사각형",)}
    assert captions["more/1.PNG"] == {"en": ("Another one",)}
    assert captions["2.PNG"] == {}
    for pictures in splits.values():
        numbers = [int(name.removeprefix("more/").removesuffix(".PNG")) for name in pictures.names]
        assert red(pictures) == numbers
        assert pictures.place(0) == f"{folder}/{pictures.names[0]}"


def test_what_is_held_out_depends_on_names_only(folder):
    before = set(opened(folder=str(folder), validation_fraction=0.5)["validation"].names)
    assert 0 < len(before) < 10
    (folder / "new.png").write_bytes(png(99))
    (folder / "0.txt").write_text("Another caption")
    after = set(opened(folder=str(folder), validation_fraction=0.5)["validation"].names)
    assert after - {"new.png"} == before
    few = opened(folder=str(folder), validation_fraction=1e-6)
    assert len(few["validation"]) == 1 and len(few["train"]) == 10


def test_fingerprints_tell_contents_apart(folder, tmp_path):
    first = opened(folder=str(folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    second = opened(folder=str(moved))
    assert {s: p.fingerprint for s, p in first.items()} == {
        s: p.fingerprint for s, p in second.items()
    }
    assert first["train"].fingerprint != first["validation"].fingerprint
    seen = {first["train"].fingerprint}
    for change in (
        lambda: (folder / "0.txt").write_text("Changed"),
        lambda: (folder / "2.PNG").write_bytes(png(200)),
        lambda: (folder / "2.PNG").rename(folder / "two.png"),
    ):
        change()
        seen.add(opened(folder=str(folder))["train"].fingerprint)
    assert len(seen) == 4


def write(path, entries, as_list=False):
    lines = "\n".join(json.dumps(entry) for entry in entries)
    path.write_text(json.dumps(entries) if as_list else lines + "\n\n")
    return str(path)


def test_json_lines(folder):
    entries = [
        {"file_name": "0.PNG", "text": "zero"},
        {"image": "./more/1.PNG", "caption": "하나"},
        {"image": "more/1.PNG", "caption": ["one", "uno"], "license": 3},
        {"file_name": "2.PNG", "text": " ", "caption_ko": "two"},
    ]
    captions = everything(opened(captions=write(folder / "captions.jsonl", entries)))
    assert captions == {
        "0.PNG": {"en": ("zero",)},
        "more/1.PNG": {"en": ("one", "uno"), "ko": ("하나",)},
        "2.PNG": {"ko": ("two",)},
    }


def test_korean_captions_of_coco(folder, tmp_path):
    for split in ("train2014", "val2014"):
        (folder / split).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(folder / split / f"COCO_{split}_{i}.jpg")
    entries = [
        {
            "file_path": f"{split}/COCO_{split}_{i}.jpg",
            "captions": [f"caption {i}", "the same"],
            "caption_ko": [f"설명 {i}", "같은 것"],
            "id": i,
        }
        for split in ("val2014", "train2014")
        for i in range(3)
    ]
    file = write(tmp_path / "MSCOCO_train_val_Korean.json", entries, as_list=True)
    splits = opened(folder=str(folder), captions=file)
    assert {s: len(p) for s, p in splits.items()} == {"train": 3, "validation": 3}
    assert all(name.startswith("val2014/") for name in splits["validation"].names)
    assert splits["train"].captions[1] == {
        "en": ("caption 1", "the same"),
        "ko": ("설명 1", "같은 것"),
    }


def test_missing_pictures_are_left_out_or_refused(folder, capsys):
    entries = [{"image": f"{i}.PNG", "text": str(i)} for i in (0, 2, 4, 17, 19)]
    file = write(folder / "captions.jsonl", entries)
    assert len(everything(opened(captions=file))) == 3
    said = capsys.readouterr().err
    assert f"2 of 5 pictures of {file} are not in {folder}, may not be read," in said
    assert "the first of them 17.PNG" in said
    with pytest.raises(FileNotFoundError, match="2 of 5 pictures .* set data.unusable to skip"):
        opened(captions=file, unusable="refuse")


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(0))


def test_splits_by_folders_leave_out_what_is_in_none(tmp_path, capsys):
    for name in ("Train/a", "Train/b", "valid/c", "test2014/d", "stray", "trains/e"):
        save(tmp_path / f"{name}.png")
    splits = opened(folder=str(tmp_path))
    assert {s: list(p.names) for s, p in splits.items()} == {
        "train": ["Train/a.png", "Train/b.png"],
        "validation": ["valid/c.png"],
    }
    assert "left out: 3 pictures of" in capsys.readouterr().err
    # Without a validation part, some of what is for training is held out.
    shutil.rmtree(tmp_path / "valid")
    names = sorted(everything(opened(folder=str(tmp_path))))
    assert names == ["Train/a.png", "Train/b.png"]
    # Folders that are no splits are only folders.
    shutil.rmtree(tmp_path / "test2014")
    assert len(everything(opened(folder=str(tmp_path)))) == 4


def test_linked_folders_are_looked_into_once(tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    save(tmp_path / "photos" / "b.png")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "folder.png").mkdir()
    assert sorted(everything(opened(folder=str(tmp_path / "photos")))) == ["b.png", "link/a.png"]


def test_names_that_other_systems_spell(tmp_path, capsys):
    """Hangul letter by letter is found; bytes that are no UTF-8 are left out by name."""
    for name in ("하나", "b"):
        save(tmp_path / (unicodedata.normalize("NFD", name) + ".png"))
    entries = [{"image": f"{name}.png", "text": name} for name in ("하나", "b")]
    found = everything(opened(captions=write(tmp_path / "captions.jsonl", entries)))
    assert found == {"하나.png": {"ko": ("하나",)}, "b.png": {"en": ("b",)}}
    assert not capsys.readouterr().err

    save(tmp_path / os.fsdecode(b"\xc7\xcf.png"))
    assert len(everything(opened(folder=str(tmp_path)))) == 2
    said = capsys.readouterr().err
    assert "1 of 3 pictures" in said and r"the first of them \udcc7\udccf.png" in said
    with pytest.raises(FileNotFoundError, match="names that are not UTF-8"):
        opened(folder=str(tmp_path), unusable="refuse")


def test_files_that_may_not_be_read(folder, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "2.PNG")
    assert len(everything(opened(folder=str(folder)))) == 9
    assert "1 of 10 pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"folder": "{folder}", "tfds": "coco_captions"}, "drop one of them"),
        ({"tfds_download": True}, "set without data.tfds"),
        ({"validation_fraction": 1.0}, "not between 0 and 1"),
        ({"folder": "{folder}/nowhere"}, "there is no folder of pictures .*/nowhere"),
        ({"captions": "{folder}/none.jsonl"}, "cannot read the captions .*none.jsonl"),
        ({"captions": "{folder}/notes.md"}, r"notes.md, line 1 is not JSON \(.*\): expected one"),
        ({"captions": "{folder}/0.PNG"}, "0.PNG is not UTF-8"),
        ({"tfds": "coco_captions", "tfds_data_dir": "{folder}"}, "no prepared TFDS data set"),
        ({"tfds": "gs://bucket/coco"}, "is remote"),
    ],
)
def test_bad_settings_end_in_one_sentence(folder, settings, says):
    settings = {
        k: v.format(folder=folder) if isinstance(v, str) else v for k, v in settings.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        opened(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, says",
    [
        ("[1]", "entry 1 names no picture"),
        ('{"image": 3}', "line 1 names no picture"),
        ('\n{"image": "0.PNG", "text": 5}', "line 2 has no text under 'text'"),
        ('{"image": "0.PNG", "captions": ["a", 5]}', "line 1 has no text under 'captions'"),
        ('[{"image": "0.PNG"},]', "is not JSON .* at line 1"),
        ("", "holds no pictures"),
        ('{"image": "0.PNG"}', "holds one picture only"),
    ],
)
def test_damaged_captions_end_in_one_sentence(folder, content, says):
    (folder / "captions.json").write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        opened(captions=str(folder / "captions.json"))
    assert "\n" not in str(caught.value)


def test_captions_beside_pictures_must_be_utf8(folder):
    (folder / "0.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="0.txt is not UTF-8: convert it"):
        picture_files(folder)


def test_languages_go_by_key_then_by_script():
    texts = [("ko", "dna"), ("en", "한글"), ("text", "a 의자"), ("caption_ko", "x"), ("text", "y")]
    assert by_language(texts) == {"ko": ("dna", "a 의자", "x"), "en": ("한글", "y")}
    assert by_language([("text", "  "), ("text", "\ud83d")]) == {"en": ("?",)}


class Captioned(tfds.core.GeneratorBasedBuilder):
    """Laid out as coco_captions is."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent  # where TFDS would look for metadata
    splits = ("train", "val")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "image/id": tfds.features.Scalar(np.int64),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()}),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {s: self._generate_examples(40 * i) for i, s in enumerate(self.splits)}

    def _generate_examples(self, first):
        for i in range(first, first + 30 if first == 0 else first + 5):
            captions = [{"text": f"picture {i}"}, {"text": f"그림 {i}"}]
            objects = [{"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 0.5)}] * (i % 3)
            yield i, {"image": png(i), "image/id": i, "captions": captions, "objects": objects}


class OnlyTrain(Captioned):
    splits = ("train",)


class NoPictures(OnlyTrain):
    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _generate_examples(self, first):
        yield 0, {"text": "no picture"}


def prepare(builder, directory):
    builder = builder(data_dir=directory, file_format="array_record")
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=offline)
    return builder.data_path


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds_pictures_and_captions(tmp_path, monkeypatch, file_format):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    directory = prepare(OnlyTrain, tmp_path)
    if file_format == "tfrecord":
        file = as_tfrecord(directory)
    for _ in range(2):  # read, and found in the cache
        splits = opened(tfds=str(directory), validation_fraction=0.3)
        for pictures in pickle.loads(pickle.dumps(splits)).values():
            assert len(pictures) > 0
            assert pictures.captions == [
                {"en": (f"picture {i}",), "ko": (f"그림 {i}",)} for i in red(pictures)
            ]
        assert sum(map(len, splits.values())) == 30
    assert splits["train"].place(0).startswith("only_train/1.0.0/train/")
    if file_format == "tfrecord":
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(ValueError, match="ends in the middle of a record"):
            opened(tfds=str(directory))


class Repainted(OnlyTrain):
    def _generate_examples(self, first):
        for i, example in super()._generate_examples(first):
            yield i, {**example, "image": png(29 - i)}


def test_fingerprints_of_tfds_sets_are_of_pictures_and_captions_not_of_files(tmp_path, monkeypatch):
    """TFDS lays the features of a record out in another order each time."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    directory = prepare(OnlyTrain, tmp_path)
    found = [opened(tfds=str(directory))["train"].fingerprint]
    as_tfrecord(directory)
    found.append(opened(tfds=str(directory))["train"].fingerprint)
    assert found[0] == found[1]
    other = prepare(Repainted, tmp_path)
    assert opened(tfds=str(other))["train"].fingerprint not in found


def test_a_split_called_val_is_the_validation_part(tmp_path, monkeypatch):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    prepare(Captioned, tmp_path)
    splits = opened(tfds="captioned", tfds_data_dir=str(tmp_path))
    assert sorted(red(splits["train"])) == list(range(30))
    assert sorted(red(splits["validation"])) == list(range(40, 45))


def test_a_tfds_set_without_pictures_is_refused(tmp_path):
    directory = prepare(NoPictures, tmp_path)
    with pytest.raises(ValueError, match="has 0 pictures in an example"):
        opened(tfds=str(directory))
