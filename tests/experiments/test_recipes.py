"""The presets named after published models are trained as their papers and reference code say.

BERT: Devlin et al. 2019, appendix A.2, and google-research/bert, optimization.py, which corrects no
bias and decays from step 0 on. RoBERTa: Liu et al. 2019, table 9. XLNet: Yang et al. 2019, appendix
A.4; zihangdai/xlnet, README and model_utils.py. BART: Lewis et al. 2020, section 4, and the command
in fairseq's issue 1899. T5: Raffel et al. 2020, sections 3.1 and 3.7; mesh_tensorflow/optimize.py;
for 1.1 its release notes; mT5: Xue et al. 2021, section 3.2. GPT-2: Radford et al. 2019, section
2.3, for the batch; karpathy/nanoGPT, config/train_gpt2.py, for what it leaves out. dVAE and DALL-E:
Ramesh et al. 2021, appendices A.2 and B.2. CLIP: Radford et al. 2021, tables 18 and 20.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest

from experiments import (
    bart_pretrain,
    bert_pretrain,
    clip_train,
    dalle_train,
    dvae_train,
    gpt2_pretrain,
    roberta_pretrain,
    t5_pretrain,
    xlnet_pretrain,
)
from lmjax.training.optimizers import Adafactor, AdamW


class Recipe(NamedTuple):
    optimizer: dict[str, Any]
    """Its settings, and its class."""
    rates: dict[int, float]
    """The learning rate at some steps."""
    rest: dict[str, Any]
    """Other settings of the run, by their names on the command line."""
    schedules: dict[str, dict[int, float]] = {}
    """Other settings that change with the step."""


def adamw(beta1, beta2, **more):
    return {"__class__": AdamW, "beta1": beta1, "beta2": beta2, **more}


BERT_ADAM = adamw(
    0.9, 0.999, epsilon=1e-6, weight_decay=0.01, gradient_clip=1.0, bias_correction=False
)
BERT = Recipe(
    BERT_ADAM,
    {5_000: 5e-5, 10_000: 9.9e-5, 500_000: 5e-5, 900_000: 1e-5, 1_000_000: 0.0},
    {
        "batch": 256,
        "steps": 900_000,
        "average": None,
        "model.dropout": 0.1,
        "objective.rate": 0.15,
        "objective.short": 0.1,
        "objective.copies": 10,
        "objective.lengths": {"inputs": 128, "targets": 20, "pairs": 1},
    },
)
BERT_END = Recipe(  # goes on where the others end, but for a short warm-up
    BERT_ADAM,
    {1_000: 9.9e-6, 50_000: 5e-6, 100_000: 0.0},
    {
        **BERT.rest,
        "steps": 100_000,
        "objective.lengths": {"inputs": 512, "targets": 77, "pairs": 1},
    },
)
ROBERTA_ADAM = adamw(
    0.9, 0.98, epsilon=1e-6, weight_decay=0.01, gradient_clip=None, bias_correction=True
)
ROBERTA_REST = {
    "batch": 8_192,
    "steps": 500_000,
    "average": None,
    "model.dropout": 0.1,
    "objective.rate": 0.15,
    "objective.keep": 0.1,
    "objective.replace": 0.1,
    "objective.lengths": {"inputs": 512, "targets": 77},
}
XLNET = Recipe(
    BERT_ADAM,
    {20_000: 2e-4, 40_000: 4e-4, 270_000: 2e-4, 500_000: 0.0},
    {
        "batch": 8_192,
        "steps": 500_000,
        "average": None,
        "model.dropout": 0.1,
        "model.memory": 384,
        "model.reuse": 256,
        "objective.length": 512,
        "objective.reuse": 256,
        "objective.targets": 85,
        "objective.context": 6,
        "objective.backward": True,
    },
)
BART = Recipe(
    adamw(0.9, 0.999, weight_decay=0.01, gradient_clip=0.1, bias_correction=True),
    {5_000: 2e-4, 10_000: 4e-4, 255_000: 2e-4, 500_000: 0.0},
    {
        "batch": 8_000,
        "steps": 500_000,
        "average": None,
        "label_smoothing": 0.0,
        "model.dropout": 0.1,
        "model.attention_dropout": 0.1,
        "objective.length": 512,
        "objective.infill": 0.3,
        "objective.mean_span": 3.5,
        "objective.substitute": 0.1,
        "objective.permute": 1.0,
        "objective.mask": 0.0,
        "objective.delete": 0.0,
        "objective.rotate": 0.0,
    },
)
T5 = Recipe(
    {
        "__class__": Adafactor,
        "decay_exponent": 0.8,
        "epsilon": 1e-30,
        "scale_floor": 1e-3,
        "update_clip": 1.0,
        "factored_from": 128,
        "gradient_clip": None,
    },
    {0: 0.01, 10_000: 0.01, 40_000: 0.005, 1_000_000: 0.001},
    {
        "batch": 2_048,
        "steps": 1_000_000,
        "average": None,
        "z_loss": 1e-4,
        "label_smoothing": 0.0,
        "model.dropout": 0.1,
        "objective.noise_density": 0.15,
        "objective.mean_span": 3.0,
        "objective.window": 568,
        "objective.lengths": {"inputs": 512, "targets": 114},
    },
)
T5_1_1 = T5._replace(rest={**T5.rest, "model.dropout": 0.0})
MT5 = T5_1_1._replace(
    rest={
        **T5_1_1.rest,
        "batch": 1_024,
        "objective.window": 1_137,
        "objective.lengths": {"inputs": 1_024, "targets": 229},
    }
)
GPT2 = Recipe(
    adamw(0.9, 0.95, weight_decay=0.1, gradient_clip=1.0, bias_correction=True),
    {1_000: 3e-4, 2_000: 6e-4, 301_000: 3.3e-4, 600_000: 6e-5},
    {"batch": 512, "steps": 600_000, "average": None, "objective.length": 1_024},
)
DVAE = Recipe(
    adamw(0.9, 0.999, epsilon=1e-8, weight_decay=1e-4, gradient_clip=None, bias_correction=True),
    {0: 1e-4, 600_000: 5.0625e-5, 1_200_000: 1.25e-6, 3_000_000: 1.25e-6},
    {
        "batch": 512,
        "steps": 3_000_000,
        "average": 0.999,
        "average_every": 1,
        "model.size": 256,
        "model.codes": 8_192,
        "model.grid": 32,
    },
    {
        "beta": {0: 0.0, 2_500: 3.3, 5_000: 6.6, 3_000_000: 6.6},
        "temperature": {0: 1.0, 75_000: 17 / 32, 150_000: 1 / 16, 3_000_000: 1 / 16},
        "balance": {0: 0.0, 3_000_000: 0.0},
    },
)
DALLE = Recipe(
    adamw(
        0.9,
        0.96,
        epsilon=1e-8,
        weight_decay=0.045,
        gradient_clip=4.0,
        variance_clip=5.0,
        bias_correction=True,
    ),
    {2_500: 2.25e-4, 5_000: 4.5e-4},
    {
        "batch": 1_024,
        "steps": 430_000,
        "average": 0.99,
        "average_every": 25,
        "text_weight": 1 / 8,
        "corruption": 0.0,
        "model.text_vocab": 16_384,
        "model.text_length": 256,
        "model.image_vocab": 8_192,
        "model.image_length": 1_024,
    },
)
CLIP = Recipe(
    adamw(0.9, 0.98, epsilon=1e-6, weight_decay=0.2, bias_correction=True),
    {1_000: 2.5e-4, 2_000: 5e-4, 390_625: 0.0},
    {
        "batch": 32_768,
        "steps": 390_625,  # 32 epochs of 400 million pairs
        "average": None,
        "model.size": 224,
        "model.positions": 77,
    },
)
RECIPES = [
    (bert_pretrain, "base", BERT),
    (bert_pretrain, "large", BERT),
    (bert_pretrain, "base-512", BERT_END),
    (bert_pretrain, "large-512", BERT_END),
    (
        roberta_pretrain,
        "roberta-base",
        Recipe(
            ROBERTA_ADAM, {12_000: 3e-4, 24_000: 6e-4, 262_000: 3e-4, 500_000: 0.0}, ROBERTA_REST
        ),
    ),
    (
        roberta_pretrain,
        "roberta-large",
        Recipe(
            ROBERTA_ADAM, {15_000: 2e-4, 30_000: 4e-4, 265_000: 2e-4, 500_000: 0.0}, ROBERTA_REST
        ),
    ),
    # The base model's batch is that of the README's command, the paper gives the large one's.
    (xlnet_pretrain, "base", XLNET._replace(rest={**XLNET.rest, "batch": 2_048})),
    (xlnet_pretrain, "large", XLNET),
    (bart_pretrain, "base", BART),
    (bart_pretrain, "large", BART),
    (t5_pretrain, "base", T5),
    (t5_pretrain, "v1_1-base", T5_1_1),
    (t5_pretrain, "mt5-base", MT5),
    (gpt2_pretrain, "small", GPT2),
    (gpt2_pretrain, "xl", GPT2),
    (dvae_train, "paper", DVAE),
    (dalle_train, "paper", DALLE),
    (clip_train, "vit-b-32", CLIP),
]


@pytest.mark.parametrize(
    ("module", "preset", "recipe"),
    [
        pytest.param(*row, id=f"{row[0].__name__.removeprefix('experiments.')} {row[1]}")
        for row in RECIPES
    ],
)
def test_a_published_recipe(module, preset, recipe):
    run = module.PRESETS[preset]

    def setting(name):
        return functools.reduce(getattr, name.split("."), run)

    assert {name: getattr(run.optimizer, name) for name in recipe.optimizer} == recipe.optimizer
    assert {name: setting(name) for name in recipe.rest} == recipe.rest
    for name, expected in {"optimizer.schedule": recipe.rates, **recipe.schedules}.items():
        found = [setting(name)(step) for step in expected]
        np.testing.assert_allclose(found, [*expected.values()], rtol=1e-5, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("preset", ["emoji", "coco", "paper"])
def test_the_stages_of_dalle_fit_each_other(preset):
    """A preset's DALL-E looks for the dVAE where that preset's has been trained, with its codes."""
    dvae, dalle = dvae_train.PRESETS[preset], dalle_train.PRESETS[preset]
    assert dalle.dvae == str(dvae.workdir)
    assert (dalle.model.image_vocab, dalle.model.grid) == (dvae.model.codes, dvae.model.grid)
    assert dalle_train.PRESETS["korean-coco"].dvae == dalle_train.PRESETS["coco"].dvae
    assert (dalle.crops, dalle.data.augment) == ({"emoji": None, "coco": 4, "paper": 2}[preset], 0)
