"""How well a trained dVAE and a DALL-E on its codes do what they were trained for, on emoji."""

import dataclasses

import numpy as np

import lmjax
from experiments import dalle_train
from experiments.dalle_train import Easel, told_apart
from experiments.dvae_train import through_codes
from lmjax.data.pictures import PictureData, open_pictures
from lmjax.data.pixels import middle_crop, read_picture
from lmjax.evaluation.pictures import psnr, use_of_codes


def measure(dvae: str, dalle: str) -> dict[str, str]:
    """Of the workdirs of both."""
    return {**rebuilt(dvae), **conditioned(dvae, dalle)}


def rebuilt(dvae: str) -> dict[str, str]:
    """What is left of all held-out emoji after going through their codes."""
    model, params, _ = lmjax.load(dvae)
    held_out, size = open_pictures(PictureData())["validation"], model.config.size
    pictures = np.stack(
        [middle_crop(read_picture(held_out.file(i), size), size) for i in range(len(held_out))]
    )
    codes, again = through_codes(model)(params, pictures)
    used, perplexity = use_of_codes(np.bincount(codes.reshape(-1), minlength=model.config.codes))
    return {
        f"{len(pictures)} held-out emoji through {model.config.codes} codes": (
            f"{psnr(pictures, again).mean():.2f} dB; {used} codes in use, as evenly as"
            f" {perplexity:.0f}"
        )
    }


def conditioned(dvae: str, dalle: str) -> dict[str, str]:
    """How often a drawing is nearer to its own original than to those of other captions."""
    model, params, tokenizer = lmjax.load(dalle)
    easel = Easel(dataclasses.replace(dalle_train.EMOJI, dvae=dvae), model, tokenizer)
    figures = {}
    for split, about in (("train", "trained on"), ("validation", "held out")):
        pictures = open_pictures(PictureData())[split]
        for language in ("en", "ko"):
            count, right = told_apart(easel, params, pictures, language)
            name = (
                f"drawings of {count} captions {about}, {language}, nearest to their own original"
            )
            figures[name] = f"{right:.0%} (chance: {1 / count:.1%})"
    return figures
