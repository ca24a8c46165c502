"""How well a trained dVAE, and a DALL-E on its codes, do what they were trained for, on emoji."""

import dataclasses

import lmjax
from experiments import dalle_train, dvae_train
from experiments.dalle_train import Easel, told_apart, trained_on
from experiments.dvae_train import rebuilt
from lmjax.data.pictures import open_pictures


def measure(dvae: str, dalle: str | None) -> dict[str, str]:
    """Of the workdirs of both, or of the dVAE alone.

    Raises:
        ValueError: one of them was trained on other pictures, or the DALL-E with another dVAE.
    """
    splits = open_pictures(dvae_train.EMOJI.data)
    for workdir in filter(None, (dvae, dalle)):
        if trained_on(workdir)["pictures"] != splits["train"].fingerprint:
            raise ValueError(f"{workdir} was not trained on emoji_captions")
    model, params, _ = lmjax.load(dvae)
    settings = dataclasses.replace(dvae_train.EMOJI, model=model.config)
    held_out = rebuilt(model, params, settings.read(None, (0, 1)))
    figures = {
        f"{len(held_out.pictures)} held-out emoji through their codes": held_out.figures(
            model.config
        )
    }
    if dalle is None:
        return figures
    model, params, tokenizer = lmjax.load(dalle)
    easel = Easel(dataclasses.replace(dalle_train.EMOJI, dvae=dvae), model, tokenizer)
    easel.check(dalle)
    language = trained_on(dalle)["language"]
    for split, about in (("train", "trained on"), ("validation", "held out")):
        for name in ("en", "ko") if language == "both" else (language,):
            count, right = told_apart(easel, params, splits[split], name)
            figures[f"drawings of {count} captions {about}, {name}, nearest to their original"] = (
                f"{right:.0%} (chance: {1 / count:.1%})"
            )
    return figures
