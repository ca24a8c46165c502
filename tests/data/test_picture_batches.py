import dataclasses
import errno
import functools
import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from lmjax.data import picture_batches
from lmjax.data.batches import shuffled
from lmjax.data.captions import CaptionedPictureData
from lmjax.data.code_store import CodeStore, build_code_store, code_directory
from lmjax.data.picture_batches import CodeRows, PictureRows, read_pictures
from lmjax.data.pictures import PictureData, open_pictures
from lmjax.data.pixels import dvae_crop, read_picture, transformer_crop

SIZE, BATCH = 8, 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twenty pictures of one colour each, by whose red they are known; two are held out."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    for i in range(20):
        path = folder / ("val" if i < 2 else "train") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (10 * i, 0, 200)).save(path)
        path.with_suffix(".txt").write_text(f"picture number {i}\n그림 번호 {i}\n")
    return folder


KINDS = ("unusable", "augment", "language", "dropout", "truncate")


def read(folder, captions=True, **settings):
    data = {k: settings.pop(k) for k in list(settings) if k in KINDS}
    kind = CaptionedPictureData if captions else PictureData
    options = {"batch": BATCH, "seed": 0, **settings}
    if captions:
        options = {"caption_length": 40, **options}
    return read_pictures(kind(folder=str(folder), **data), dvae_crop, SIZE, **options)


def reds(batch):
    return (batch["pictures"][:, 0, 0, 0] // 10).tolist()


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch(folder):
    read_now = read(folder)
    batch = read_now.batches.batch(0)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "pictures": ((BATCH, SIZE, SIZE, 3), "uint8"),
        "captions": ((BATCH, 40), "int32"),
        "captions_lengths": ((BATCH,), "int32"),
        "loss_weights": ((BATCH,), "float32"),
    }
    for row, number in enumerate(reds(batch)):
        length = batch["captions_lengths"][row]
        text = read_now.tokenizer.decode(batch["captions"][row, :length])
        assert text in (f"picture number {number}", f"그림 번호 {number}")
        assert length < 40 and not batch["captions"][row, length:].any()
    assert (batch["loss_weights"] == 1).all()
    alone = read(folder, captions=False)
    assert set(alone.batches.batch(0)) == {"pictures", "loss_weights"}
    assert alone.tokenizer is None and reds(alone.batches.batch(0)) == reds(batch)


def test_epochs_are_permutations_with_other_captions_and_crops(folder):
    batches = read(folder, batch=9).batches
    epochs = [[batches.batch(step) for step in (2 * e, 2 * e + 1)] for e in range(2)]
    orders = [[red for batch in epoch for red in reds(batch)] for epoch in epochs]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(2, 20))
    captions = [
        {
            red: caption.tobytes()
            for batch in epoch
            for red, caption in zip(reds(batch), batch["captions"], strict=True)
        }
        for epoch in epochs
    ]
    assert sum(captions[0][red] != captions[1][red] for red in captions[0]) > 5


def test_a_batch_is_a_function_of_seed_and_step(folder):
    read_now, again = read(folder), read(folder)
    assert same(read_now.batches.batch(7), again.batches.batch(7))
    assert not same(read_now.batches.batch(7), read(folder, seed=1).batches.batch(7))
    assert read_now.identity == again.identity
    copied = pickle.loads(pickle.dumps(read_now.batches))  # as worker processes get it
    assert same(copied.batch(7), read_now.batches.batch(7))
    started = read_now.batches.start(None)
    (_, position), (second, _) = next(started), next(started)
    started.close()
    resumed = read_now.batches.start(position)
    assert position == {"step": 1} and same(next(resumed)[0], second)
    resumed.close()


def test_hosts_share_a_batch(folder):
    whole = read(folder).batches.batch(3)
    parts = [read(folder, share=(host, 2)).batches.batch(3) for host in range(2)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    assert same(joined, whole)


def test_evaluation_is_plain_whole_and_filled_up(folder):
    read_now = read(folder)
    [batch] = read_now.evaluation
    assert reds(batch) == [0, 1, 0, 0] and batch["loss_weights"].tolist() == [1, 1, 0, 0]
    assert not batch["pictures"][2:].any() and not batch["captions_lengths"][2:].any()
    # The hosts' parts have one shape, even the one without pictures.
    parts = [read(folder, share=(host, 2)).evaluation[0] for host in range(2)]
    assert same({k: np.concatenate([p[k] for p in parts]) for k in batch}, batch)
    assert same(read(folder, seed=5).evaluation[0], batch)
    plain = read_now.tokenizer.encode_batch(["picture number 0", "그림 번호 0"])
    length = batch["captions_lengths"][0]
    assert any(batch["captions"][0, :length].tolist() == ids.tolist() for ids in plain)


def test_augmentation_is_an_option(folder):
    shades = np.tile(np.arange(12, dtype=np.uint8), (12, 1))
    for path in folder.rglob("*.png"):
        Image.fromarray(shades).save(path)
    for augment in (True, False):
        batch = read(folder, augment=augment, batch=18).batches.batch(0)
        kinds = {picture.tobytes() for picture in batch["pictures"]}
        assert (len(kinds) > 1) == augment


def damage(folder, *numbers):
    for number in numbers:
        path = folder / ("val" if number < 2 else "train") / f"{number:02}.png"
        path.write_bytes(path.read_bytes()[:40])


def test_damaged_pictures_are_replaced_and_named_once(folder, capsys):
    damage(folder, 5, 6)
    batches = read(folder, batch=18).batches
    seen = [sorted(reds(batches.batch(step))) for step in range(3)]
    kept = sorted(set(range(2, 20)) - {5, 6} | {7})
    assert seen == [sorted([*kept, 7, 7])] * 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "1 unreadable" in said[0] and "2 unreadable" in said[1]
    assert {line.split()[2] for line in said} == {f"{folder}/train/0{i}.png" for i in (5, 6)}
    assert len(batches.rows.unreadable) == 2
    # Which one replaces it does not depend on what was read before.
    assert same(read(folder, batch=18).batches.batch(2), batches.batch(2))


def test_small_sets_are_read_once_and_large_ones_again(folder, monkeypatch):
    reads = []
    monkeypatch.setattr(
        picture_batches, "read_picture", lambda file, size: reads.append(file) or Image.open(file)
    )
    train = open_pictures(PictureData(folder=str(folder)))["train"]
    for room, expected in ((18 * 3 * 12 * 10, 18), (18 * 3 * 12 * 10 - 1, 36)):
        monkeypatch.setattr(picture_batches, "KEPT_BYTES", room)
        rows = PictureRows(train, SIZE)
        for index in (*range(18), *range(18)):
            [(_, picture)] = rows.row(index)
            assert picture.content.size == (12, 10)
        assert len(reads) == expected
        reads.clear()


def test_damaged_pictures_are_refused(folder):
    damage(folder, 5)
    batches = read(folder, batch=18, unusable="refuse").batches
    with pytest.raises(ValueError, match=r"train/05.png \(.*\).*: mend or remove it, or set"):
        batches.batch(0)


def test_nothing_but_damaged_pictures_is_said(folder):
    damage(folder, *range(2, 20))
    with pytest.raises(ValueError, match="holds no picture that can be read in its train split"):
        read(folder).batches.batch(0)
    damage(folder, 0, 1)
    with pytest.raises(ValueError, match="can be read in its validation split"):
        read(folder)


def test_too_few_rows_for_the_tokenizer(folder):
    with pytest.raises(ValueError, match="the model's embedding 100 rows: set --model.text-v"):
        read(folder, rows=("--model.text-vocab", 100))


def encode(pictures, calls=None):
    """Codes that tell which picture it was."""
    if calls is not None:
        calls.append(pictures.shape)
    return np.repeat(pictures[:, 0, 0, :1].astype(np.int64) * 30, 6, axis=1) + np.arange(6)


def test_codes_are_made_once_and_kept_beside_the_captions(folder):
    damage(folder, 5)
    calls = []
    build = functools.partial(
        build_code_store,
        encode=functools.partial(encode, calls=calls),
        model_sha256="dvae",
        size=SIZE,
        batch_size=5,
    )
    build = {"train": build, "validation": build}
    read_now = read(folder, encode=build)
    assert calls == [(5, SIZE, SIZE, 3)] * 5  # four for training, one held out
    batches = read(folder, encode=build, batch=17).batches
    assert len(calls) == 5
    batch = batches.batch(0)
    assert batch["image_tokens"].shape == (17, 6) and batch["image_tokens"].dtype == np.int32
    numbers = batch["image_tokens"][:, 0] // 300
    assert sorted(numbers) == sorted(set(range(2, 20)) - {5})
    for row, number in enumerate(numbers):
        assert batch["image_tokens"][row].tolist() == [300 * number + i for i in range(6)]
        ids = batch["captions"][row, : batch["captions_lengths"][row]]
        assert read_now.tokenizer.decode(ids).endswith(f" {number}")
    assert read_now.evaluation[0]["image_tokens"][:2, 0].tolist() == [0, 300]
    copied = pickle.loads(pickle.dumps(batches))
    assert same(copied.batch(3), batches.batch(3))


def test_codes_of_random_parts(folder):
    """Of each picture the same ones every time it is encoded, any of which a step takes."""
    image = np.zeros((40, 30, 3), np.uint8)
    image[:, :, 0] = np.arange(40)[:, None]  # their red tells how far down they begin
    for path in folder.rglob("*.png"):
        Image.fromarray(image).save(path)
    build = functools.partial(build_code_store, encode=encode, model_sha256="dvae", size=SIZE)
    train = open_pictures(PictureData(folder=str(folder)))["train"]
    store = build(train, crops=3, batch_size=5)
    assert store.codes.shape == (18, 3, 6)
    for index, codes in enumerate(store.codes):
        rng = np.random.default_rng(index)
        squares = np.stack([transformer_crop(Image.fromarray(image), SIZE, rng) for _ in range(3)])
        np.testing.assert_array_equal(codes, encode(squares))
    found = {row.tobytes() for row in store.codes.reshape(-1, 6)}
    assert len(found) > 2

    read_now = read(
        folder, encode={"train": functools.partial(build, crops=3), "validation": build}, batch=18
    )
    seen = {row[0] for step in range(6) for row in read_now.batches.batch(step)["image_tokens"]}
    assert seen == set(store.codes[..., 0].flat)
    middle = build(open_pictures(PictureData(folder=str(folder)))["validation"]).codes[0, 0]
    assert (read_now.evaluation[0]["image_tokens"][:2] == middle).all()


def test_code_stores_belong_to_pictures_and_model(folder):
    splits = open_pictures(PictureData(folder=str(folder)))
    directories = {
        code_directory(pictures, model, size)
        for pictures, model, size in itertools.product(splits.values(), ("a", "b"), (8, 16))
    }
    assert len(directories) == 8
    assert len({code_directory(splits["train"], "a", 8, crops) for crops in (None, 1, 2)}) == 3
    store = build_code_store(splits["train"], encode, "a", SIZE)
    assert store.codes.dtype == np.uint16 and store.codes.shape == (18, 1, 6)
    assert type(store.codes) is np.ndarray and store.readable.all()
    with pytest.raises(ValueError, match="holds the codes of other pictures"):
        CodeRows(splits["validation"], store)


def test_what_a_store_lacks_is_said_or_refused_whenever_it_is_opened(folder, capsys):
    damage(folder, 5, 6)
    train = open_pictures(PictureData(folder=str(folder)))["train"]
    for _ in range(2):  # made, and found in the cache
        assert build_code_store(train, encode, "m", SIZE).readable.sum() == 16
        said = capsys.readouterr().err
        assert "left out: 2 of 18 pictures that cannot be read, the first of them" in said
    with pytest.raises(ValueError, match=r"train/05.png \(.*\): mend or remove it, or set"):
        build_code_store(train, encode, "m", SIZE, unusable="refuse")


def test_storage_that_fails_for_a_while_leaves_no_mark(folder, monkeypatch):
    """What is wrong with a file is remembered; what is wrong with a disk is not."""
    train, failures = open_pictures(PictureData(folder=str(folder)))["train"], [errno.EIO]
    opened = Image.open

    def fail(file):
        if "05" in str(file) and failures:
            raise OSError(failures.pop(), "Input/output error")
        return opened(file)

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match=r"05.png could not be read \(Input/output error\)"):
        build_code_store(train, encode, "m", SIZE)
    assert build_code_store(train, encode, "m", SIZE).readable.all()


def test_what_is_learned_from_pictures_is_part_of_a_run(folder):
    """How they are cropped, and how captions are cut."""
    build = functools.partial(build_code_store, encode=encode, model_sha256="m", size=SIZE)
    found = [
        read(folder, **settings).identity
        for settings in (
            {},
            {"augment": False},
            {"dropout": 0.0},
            {"truncate": True},
            {"captions": False},
            {"encode": {"train": build, "validation": build}},
        )
    ]
    assert len({json.dumps(identity) for identity in found}) == len(found)


def test_bad_code_stores(folder, tmp_path):
    splits = open_pictures(PictureData(folder=str(folder)))
    train = splits["train"]
    with pytest.raises(ValueError, match="a code is 70,000: a store holds those below 65,536"):
        build_code_store(train, lambda p: np.full((len(p), 3), 70_000), "m", SIZE)
    assert not list((tmp_path / "cache").rglob("codes.npy"))  # nothing is left behind
    with pytest.raises(ValueError, match="no store of codes in .*nowhere"):
        CodeStore(tmp_path / "nowhere")
    damage(folder, 5)
    with pytest.raises(ValueError, match="train/05.png"):
        build_code_store(train, encode, "m", SIZE, unusable="refuse")
    damage(folder, *range(2, 20))
    with pytest.raises(ValueError, match="holds no picture that can be read"):
        build_code_store(train, encode, "m", SIZE)


def test_emoji_from_the_set_to_the_batch(tmp_path, monkeypatch):
    """With nothing set, as an experiment starts."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))
    read_now = read_pictures(
        CaptionedPictureData(), transformer_crop, 64, batch=16, seed=3, caption_length=32
    )
    rows = read_now.batches.rows
    assert isinstance(rows, PictureRows) and len(rows) > 3_700
    assert f"{len(rows):,} pictures" in read_now.summary
    batch = read_now.batches.batch(1_000_000)
    epoch, place = divmod(1_000_000 * 16, len(rows))
    index = shuffled(place, len(rows), 3, epoch)
    ids = batch["captions"][0, : batch["captions_lengths"][0]]
    names = [text for texts in rows.pictures.captions[index].values() for text in texts]
    assert read_now.tokenizer.decode(ids) in [name.lower() for name in names]
    # The first picture is a part of that emoji, hardly larger than the part.
    whole = np.asarray(read_picture(rows.pictures.file(index)).resize((64, 64)), float)
    assert np.abs(whole - batch["pictures"][0]).mean() < np.abs(whole - 255).mean()
    assert dataclasses.replace(read_now.batches, seed=4).batch(0).keys() == batch.keys()
