"""DALL-E's stages one after the other, on emoji, small."""

import dataclasses
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

import lmjax
from experiments import clip_train, dalle_generate, dalle_train, dvae_train
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark.trained import measure as judge
from experiments.dalle_generate import DALLEGenerate, check_picture, ranker, trained
from experiments.dalle_train import SAMPLES, Easel, sample_rows
from lmjax.data.captions import CaptionedPictureData, CaptionEncoder
from lmjax.data.pixels import UnreadablePicture
from lmjax.evaluation.pictures import AT_ONCE, sheet
from lmjax.loading import TOKENIZER, describe
from lmjax.tasks.dvae import HalfCosine
from tests.experiments.conftest import ROOT, environment
from tests.experiments.test_t5_pretrain import held_out
from tests.sharding.test_multihost import free_port

DVAE = """--model.size 16 --model.codes 32 --model.width 16 --model.code-width 16 --model.patch 4
--model.blocks 1 --batch 16 --eval-batches 2 --fit.eval-every 20""".split()
DALLE = """--model.text-vocab 600 --model.text-length 32 --model.image-vocab 32 --model.grid 4
--model.layers 2 --model.width 32 --model.heads 4 --model.feed-forward 64 --data.vocab-size 600
--batch 16 --eval-batches 2 --fit.eval-every 20""".split()
CLIP = """--model.size 16 --model.patch 8 --model.picture-layers 1 --model.picture-width 32
--model.picture-heads 2 --model.picture-feed-forward 64 --model.vocab 600 --model.positions 34
--model.layers 1 --model.width 32 --model.heads 2 --model.feed-forward 64 --model.joint-width 16
--data.vocab-size 600 --batch 16 --eval-batches 2 --fit.eval-every 20""".split()


class Stage(NamedTuple):
    """A finished run."""

    workdir: Path
    printed: str


@pytest.fixture(scope="module")
def dvae(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stages") / "dvae"
    done = run("experiments.dvae_train", *DVAE, "--steps", 60, "--workdir", workdir)
    return Stage(workdir, done.stdout)


@pytest.fixture(scope="module")
def dalle(run, dvae):
    """With an average of the weights, on codes of random parts that are made ahead."""
    workdir = dvae.workdir.parent / "dalle"
    arguments = [*DALLE, "--dvae", dvae.workdir, "--crops", 2]
    made = run("experiments.dalle_tokenize", *arguments).stdout
    arguments += ["--workdir", workdir, "--average", 0.5]
    done = run("experiments.dalle_train", *arguments, "--steps", 40)
    return Stage(workdir, made + done.stdout)


@pytest.fixture(scope="module")
def clip(run, dvae):
    workdir = dvae.workdir.parent / "clip"
    done = run("experiments.clip_train", *CLIP, "--steps", 40, "--workdir", workdir)
    return Stage(workdir, done.stdout)


def test_pictures_through_codes(dvae):
    losses = held_out(dvae.workdir)
    assert losses[-1] < losses[0]
    assert "codes are in use" in dvae.printed
    assert Image.open(dvae.workdir / "reconstructions.png").width > 500
    assert (dvae.workdir / "codes.png").exists()
    model, params, tokenizer = lmjax.load(dvae.workdir)
    assert tokenizer is None and model.config.codes == 32
    codes = model.apply({"params": params}, np.zeros((1, 16, 16, 3)), method="encode")
    assert codes.shape == (1, 4, 4, 32)
    assert pictures_shown(dvae.workdir, "reconstructions") == [20, 40, 60]
    assert pictures_shown(dvae.workdir, "codes") == [60]


def test_captions_to_pictures(dalle):
    assert "3,792 of 3,792 pictures as 2 x 16 codes" in dalle.printed
    losses = held_out(dalle.workdir)
    assert losses[-1] < losses[0] - 0.5
    assert dalle.printed.count("nearest to its own original") == 4
    assert Image.open(dalle.workdir / "samples.png").height > 1_000
    assert pictures_shown(dalle.workdir, "samples") == [20, 40]


def test_the_benchmark_judges_what_is_trained(cache, dvae, dalle, clip, tmp_path, monkeypatch):
    """With the figures that training ended with."""
    monkeypatch.setenv("LMJAX_CACHE", str(cache))
    dvae_only, both = judge(str(dvae.workdir), None), judge(str(dvae.workdir), str(dalle.workdir))
    ((name, text),) = dvae_only.items()
    assert name == "161 held-out emoji through their codes" and both.pop(name) == text
    printed = re.findall(r"in (\d+% of cases \(chance: .*?\))", " ".join(dalle.printed.split()))
    assert [text.replace(" (", " of cases (") for text in both.values()] == printed
    assert "captions held out, ko, nearest" in list(both)[-1]
    folder = shutil.copytree(
        dalle.workdir, tmp_path / "folder", ignore=shutil.ignore_patterns("ch*")
    )
    config = (folder / "config.json").read_text()
    config = re.sub(r'"pictures": "\w+"', '"pictures": "others"', config)
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match="folder was not trained on emoji_captions"):
        judge(str(dvae.workdir), str(folder))

    settings = benchmark.DALLE(dvae=str(dvae.workdir), dalle=str(clip.workdir))
    assert "judging failed" in settings.trained()["what is trained"]
    nothing = benchmark.DALLE().trained()["what is trained"]
    assert nothing == "not judged: there is no dVAE in runs/dvae-emoji"
    with pytest.raises(ValueError, match="--dvae nowhere holds no trained dvae: run .*dvae_train"):
        benchmark.DALLE(dvae="nowhere").cases()


def test_of_two_processes_one_shows_what_both_have_learned(cache, dvae, tmp_path):
    """Each has a part of the parameters, and reads the dVAE for itself."""
    command = [sys.executable, "-m", "experiments.dalle_train", *DALLE, "--steps", "2"]
    command += ["--dvae", dvae.workdir, "--workdir", tmp_path / "w", "--strategy", "fsdp"]
    address = f"127.0.0.1:{free_port()}"
    command += ["--distributed.coordinator", address, "--distributed.processes", "2"]
    both = [
        subprocess.Popen(
            [*command, "--distributed.process", str(number)], cwd=ROOT, env=environment(cache),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [output.count("nearest to its own") for output in outputs] == [4, 0]
    assert pictures_shown(tmp_path / "w", "samples") == [2]
    Image.open(tmp_path / "w" / "samples.png").verify()


def test_what_cannot_be_read_or_has_no_caption_is_not_shown():
    def read(file):
        if file == 1:
            raise UnreadablePicture("half a file")
        return np.full((2, 2, 3), file)

    easel = types.SimpleNamespace(
        read=read, draw=lambda _, captions, samples: np.zeros((len(captions), samples, 2, 2, 3))
    )
    pictures = types.SimpleNamespace(
        captions=[{"en": [name]} for name in "abc"], file=lambda index: index
    )
    rows = sample_rows(easel, None, pictures, ["en", "ko"], 3)
    assert sorted((caption, row[0].max()) for caption, row in rows) == [("a", 0), ("c", 2)]
    assert {len(row) for _, row in rows} == {1 + SAMPLES}
    assert sample_rows(easel, None, pictures, ["ko"], 3) == []


def pictures_shown(workdir, name) -> list[int]:
    """The steps of which TensorBoard has a picture of this name."""
    steps = []
    for path in (workdir / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:  # the record's length, its checksum, the record, a checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                if value.tag == name:
                    Image.open(io.BytesIO(value.image.encoded_image_string)).verify()
                    steps.append(event.step)
    return sorted(steps)


def test_pictures_are_matched_drawn_and_ranked(run, refused, dvae, dalle, clip, tmp_path):
    assert "among the first five" in clip.printed
    assert pictures_shown(clip.workdir, "matches") == [20, 40]
    places = ["--checkpoint", dalle.workdir, "--dvae", dvae.workdir, "--clip", clip.workdir]
    drawn = tmp_path / "drawn.png"
    flags = ["--samples", 6, "--shown", 3, "--rerank", "clip", "--output", drawn]
    done = run("experiments.dalle_generate", *places, *flags, "avocado", "아보카도")
    assert done.stdout.count("the best of 6 scores") == 2
    assert Image.open(drawn).size[1] == 2 * 102 + 6
    # Without --dvae, the one that the DALL-E was trained with; brackets are but brackets.
    aside = dict(zip(places[::2], places[1::2], strict=True))
    flags = ["--checkpoint", aside["--checkpoint"], "--output", tmp_path / "new" / "drawn.webp"]
    run("experiments.dalle_generate", *flags, "--samples", 1, "a sign [/]")
    assert Image.open(tmp_path / "new" / "drawn.webp").format == "WEBP"

    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    flags = ["--complete", tmp_path / "red.png", "--rows", 2, "--output", drawn]
    run("experiments.dalle_generate", *places, *flags, "--truncate", "red square " * 40)
    assert pictures_shown(dalle.workdir, "drawings") == [40, 40, 40]
    for flags, words in (
        (["--checkpoint", dvae.workdir, "x"], "holds a dvae, not a dalle"),
        (["--rows", 9, "--complete", tmp_path / "red.png", "x"], "--rows is 9"),
        (
            ["--checkpoint", tmp_path / "absent", "x"],
            "run `python -m experiments.dalle_train` first",
        ),
        ([" "], "none without words"),
        (["x" * 100], "has 100 tokens"),
    ):
        assert words in refused("experiments.dalle_generate", *places, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.image-vocab", "64"], "has 32 codes on a grid of 4, and the model 64 on 4"),
        (["--dvae", "absent"], "give the workdir of one with 32 codes on a grid of 4"),
    ],
)
def test_dvaes_that_do_not_fit(refused, dvae, tmp_path, flags, words):
    arguments = [*DALLE, "--dvae", dvae.workdir, *flags, "--workdir", tmp_path / "w"]
    assert words in refused("experiments.dalle_train", *arguments)
    assert not (tmp_path / "w").exists()


def test_what_is_no_dvae_or_another_one_is_refused(dvae, dalle, clip, tmp_path):
    with pytest.raises(ValueError, match="holds a clip, not a dvae"):
        dalle_train.trained_dvae(str(clip.workdir), dalle_train.EMOJI.model)
    model, _, tokenizer = lmjax.load(dalle.workdir)
    easel = Easel(dataclasses.replace(dalle_train.EMOJI, dvae=str(dvae.workdir)), model, tokenizer)
    easel.check(dalle.workdir)
    config = json.loads((dalle.workdir / "config.json").read_text())
    config["identity"]["data"]["dvae"] = "another"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--dvae .*dvae is not the one that .* was trained with"):
        easel.check(tmp_path)


def test_drawings_are_ranked_by_what_a_clip_says_of_them(clip):
    """As it says it of each picture alone, of its own size and whatever the others are."""
    model, params, tokenizer = lmjax.load(clip.workdir)
    rng, size = np.random.default_rng(0), model.config.size
    pictures = rng.integers(256, size=(AT_ONCE + 3, size, size, 3)).astype(np.uint8)
    captions = ["red heart", "빨간색 하트"]
    rank = ranker(model, params, tokenizer, captions, truncate=False)
    read = CaptionEncoder(tokenizer, model.config.positions, ends=True).encode
    apply = jax.jit(model.apply)
    for caption in captions:
        text = read(caption)[None]
        expected = [apply({"params": params}, one[None] / 255, text) for one in pictures]
        np.testing.assert_allclose(
            rank(caption, pictures), np.concatenate(expected)[:, 0], rtol=1e-4, atol=1e-4
        )
    larger = pictures.repeat(4, axis=1).repeat(4, axis=2)
    assert np.corrcoef(rank(caption, larger), rank(caption, pictures))[0, 1] > 0.95
    with pytest.raises(ValueError, match="ranks cannot read all of a caption: the caption 'xx"):
        ranker(model, params, tokenizer, ["x" * 100], truncate=False)
    long = "x" * 100
    assert ranker(model, params, tokenizer, [long], truncate=True)(long, pictures).size


def test_the_best_drawings_are_shown_first(dvae, dalle, tmp_path, monkeypatch):
    """Here the brightest ones."""
    shown = {}
    monkeypatch.setattr(dalle_generate, "trained", lambda *_: lmjax.load(dalle.workdir))
    monkeypatch.setattr(dalle_generate, "ranker", lambda *_: lambda _, p: p.mean((1, 2, 3)))
    monkeypatch.setattr(dalle_generate, "log_sheet", lambda *_: None)
    monkeypatch.setattr(
        dalle_generate, "sheet", lambda rows: shown.update(rows) or Image.new("RGB", (8, 8))
    )
    flags = ["--checkpoint", dalle.workdir, "--dvae", dvae.workdir, "--rerank", "clip"]
    flags += ["--samples", AT_ONCE + 4, "--shown", 5, "--output", tmp_path / "drawn.png", "avocado"]
    monkeypatch.setattr(sys, "argv", ["dalle_generate", *map(str, flags)])
    dalle_generate.main()
    means = [picture.mean() for picture in shown["avocado"]]
    assert len(means) == 5 and means == sorted(means, reverse=True) and means[0] > means[-1]


def test_a_completed_picture_begins_as_the_given_one(dvae, dalle, tmp_path):
    path = tmp_path / "given.png"
    Image.effect_noise((40, 40), 90).save(path)
    settings = DALLEGenerate(("a", "b"), dvae=str(dvae.workdir), checkpoint=str(dalle.workdir))
    settings = dataclasses.replace(settings, complete=path, rows=3)
    model, params, tokenizer = lmjax.load(dalle.workdir)
    easel = Easel(dalle_generate.drawn_with(settings), model, tokenizer)
    codes = easel.codes(easel.read(path))
    top = dalle_generate.given_rows(settings, easel, 4)
    np.testing.assert_array_equal(top, [codes[:12]] * 2)
    # The rows above are decoded from these codes, so they only differ where lower ones reach.
    drawn = easel.draw(params, settings.captions, 2, top=top)
    assert drawn.shape == (2, 2, 16, 16, 3) and len({one.tobytes() for one in drawn[0]}) == 2


def test_many_drawings_are_made_in_parts(dvae, dalle, monkeypatch):
    """As many as asked for, none twice, the same each time."""
    monkeypatch.setattr(dalle_train, "AT_ONCE", 3)
    model, params, tokenizer = lmjax.load(dalle.workdir)
    easel = Easel(dataclasses.replace(dalle_train.EMOJI, dvae=str(dvae.workdir)), model, tokenizer)
    for captions, samples in ((5, 1), (2, 2), (1, 4)):
        names = [f"heart {i}" for i in range(captions)]
        drawn = easel.draw(params, names, samples)
        assert drawn.shape == (captions, samples, 16, 16, 3)
        assert len({one.tobytes() for one in drawn.reshape(-1, 16, 16, 3)}) == captions * samples
        np.testing.assert_array_equal(easel.draw(params, names, samples), drawn)


def test_sheets_show_pictures_at_their_size_or_a_multiple():
    for side, cell in ((16, 96), (64, 128), (72, 144), (96, 96), (256, 256)):
        picture = np.random.default_rng(0).integers(256, size=(side, side, 3)).astype(np.uint8)
        image = sheet([("", [picture, picture])])
        assert image.size == (12 + 2 * (cell + 6), 6 + cell + 6)
        shown = np.asarray(image)[6 : 6 + cell, 12 : 12 + cell]
        np.testing.assert_array_equal(shown[:: cell // side, :: cell // side], picture)


def test_a_clip_needs_as_many_pairs_as_stand_in_a_batch(cache, monkeypatch):
    monkeypatch.setenv("LMJAX_CACHE", str(cache))
    many = dataclasses.replace(clip_train.EMOJI, batch=4_000)
    with pytest.raises(ValueError, match="--batch is 4000 and there are 3792 pictures .* 3792 or"):
        many.read(None, (0, 1))


def test_clips_without_a_tokenizer(clip, tmp_path):
    clip = shutil.copytree(clip.workdir, tmp_path / "clip")
    (clip / TOKENIZER).unlink()
    with pytest.raises(ValueError, match="--clip .* has no tokenizer"):
        trained("clip", str(clip), "clip")
    start, settings = describe(clip), dataclasses.replace(clip_train.EMOJI, init=str(clip))
    with pytest.raises(ValueError, match="has no tokenizer: give .* as --data.tokenizer"):
        settings.read(start, (0, 1))


def test_what_is_found_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="--output name does not end as a file of pictures"):
        DALLEGenerate(("x",), output=Path("name"))
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in (("missing.png", "No such file"), ("text.png", "no picture")):
        with pytest.raises(ValueError, match=rf"--complete .*/{name} cannot be read \({reason}"):
            check_picture(tmp_path / name)


def test_settings_that_would_do_nothing():
    with pytest.raises(ValueError, match="codes are made once, so leave it out .* choose --crops"):
        dataclasses.replace(dalle_train.EMOJI, data=CaptionedPictureData(augment=True))
    with pytest.raises(ValueError, match="--crops is 0, not 1 or more"):
        dataclasses.replace(dalle_train.EMOJI, crops=0)
    nearest = dataclasses.replace(dvae_train.EMOJI.model, nearest=True)
    vq_vae = dataclasses.replace(dvae_train.EMOJI, model=nearest)
    with pytest.raises(ValueError, match="--model.nearest makes a VQ-VAE"):
        dataclasses.replace(vq_vae, beta=HalfCosine(0, 1, 10))
    with pytest.raises(ValueError, match="--commitment is 0.5, but only a VQ-VAE has that: add"):
        dataclasses.replace(dvae_train.EMOJI, commitment=0.5)


@pytest.mark.full
def test_the_default_runs(run, tmp_path):
    began = time.monotonic()
    output = [
        run("experiments.dvae_train", "--workdir", tmp_path / "dvae").stdout,
        run(
            "experiments.dalle_train", "--workdir", tmp_path / "dalle", "--dvae", tmp_path / "dvae"
        ).stdout,
        run(
            "experiments.dalle_generate", "--checkpoint", tmp_path / "dalle",
            "--dvae", tmp_path / "dvae", "--output", tmp_path / "drawings.png",
            "avocado", "아보카도", "red heart", "빨간색 하트",
        ).stdout,
    ]  # fmt: skip
    minutes = (time.monotonic() - began) / 60
    print(*output, f"{minutes:.1f} minutes")
    assert minutes < 20 and (tmp_path / "drawings.png").stat().st_size > 10_000
    lines = (tmp_path / "dvae" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["eval_psnr"] >= 20
    assert int(re.search(r"(\d+) of 512 codes", output[0])[1]) > 256
    told_apart = re.findall(
        r"trained on, (en|ko): .*? in (\d+)% of cases", output[1].replace("\n", " ")
    )
    assert [language for language, _ in told_apart] == ["en", "ko"]
    assert all(int(share) >= 50 for _, share in told_apart)
