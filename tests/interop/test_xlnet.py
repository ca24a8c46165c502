"""Parity with transformers' PyTorch XLNet, through files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import XLNetConfig as TheirConfig
from transformers import XLNetLMHeadModel

import lmjax
from lmjax.interop import xlnet as interop
from lmjax.interop.safetensors import Tensors, read_json, write_json
from lmjax.models.layers import Execution
from lmjax.models.xlnet import PRESETS, XLNet

SIZES = dict(vocab_size=97, d_model=24, n_layer=3, n_head=4, d_inner=56)
ROWS, LENGTH = 4, 10
PLACES = np.array([[1, 4, 8], [0, 2, 9], [3, 4, 5], [9, 7, 6]])


def make(directory, **settings):
    """Their model, saved, and ours, loaded."""
    torch.manual_seed(0)
    model = XLNetLMHeadModel(TheirConfig(**SIZES, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # scores that are not all alike
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(directory, safe_serialization=True)
    return model, lmjax.load(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("xlnet")


@pytest.fixture(scope="module")
def pair(directory):
    return make(directory)


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(0).integers(7, 97, (ROWS, LENGTH))


@pytest.fixture(scope="module")
def order():
    """Two tokens of context, which come first, and all others in an order of its own per row."""
    draw = np.random.default_rng(1)
    order = np.stack([draw.permutation(LENGTH) for _ in range(ROWS)])
    for row, places in zip(order, PLACES, strict=True):
        row[np.setdiff1d(np.arange(LENGTH), places)[[1, 4]]] = -1
    return order


def torch_run(model, inputs, order=None, places=None, **more):
    """Their output, with the masks that our arguments stand for."""
    arguments = {"input_ids": torch.from_numpy(inputs)}
    if order is not None:
        context = order < 0  # of which every token sees every other
        unseen = order[:, None, :] >= (order + context)[:, :, None]
        arguments["perm_mask"] = torch.from_numpy(unseen).float()
    if places is not None:
        arguments["target_mapping"] = torch.nn.functional.one_hot(
            torch.from_numpy(places), inputs.shape[1]
        ).float()
    for name, value in more.items():
        arguments[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return model(**arguments)


def ours_run(ours, *inputs, **more):
    with jax.default_matmul_precision("highest"):
        return jax.jit(ours.model.apply)({"params": ours.params}, *inputs, **more)


@pytest.mark.parametrize(
    ("settings", "ours_also"),
    [
        ({}, {}),
        ({"ff_activation": "relu"}, {}),
        ({"ff_activation": "gelu_new"}, {}),
        ({"attn_type": "uni"}, {}),
        ({"bi_data": True}, {"backward": np.arange(ROWS) >= ROWS // 2}),
    ],
    ids=["gelu", "relu", "tanh gelu", "uni", "bi_data"],
)
def test_logits(tmp_path, texts, order, settings, ours_also):
    """Of the tokens, and of guesses at some places, with sentences A and B."""
    theirs, ours = make(tmp_path, **settings)
    types = (np.arange(LENGTH) > np.array([[3], [5], [9], [0]])).astype(int)
    # Theirs fails on a batch with both "uni" and an order.
    orders = [] if "attn_type" in settings else [{"order": order, "places": PLACES}]
    for guesses in ({}, *orders):
        expected = torch_run(theirs, texts, token_type_ids=types, **guesses).logits.detach().numpy()
        assert np.abs(expected).max() > 1
        found, _ = ours_run(ours, texts, token_types=types, **guesses, **ours_also)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_padding_in_front(pair, texts):
    theirs, ours = pair
    there = np.arange(LENGTH) >= np.array([[0], [3], [6], [1]])
    expected = torch_run(theirs, texts, attention_mask=there.astype(np.float32)).logits
    found, _ = ours_run(ours, texts, segment_ids=there.astype(int))
    np.testing.assert_allclose(found[there], expected.detach().numpy()[there], atol=2e-5)


@pytest.mark.parametrize("directions", [False, True])
def test_memory_over_several_segments(tmp_path, order, directions):
    """It fills up, runs over, and holds only what the next text does not read again."""
    theirs, ours = make(tmp_path, mem_len=14, reuse_len=6, bi_data=directions)
    assert (ours.model.config.memory, ours.model.config.reuse) == (14, 6)
    more = {"backward": np.arange(ROWS) >= ROWS // 2} if directions else {}
    types = np.tile(np.arange(LENGTH) > 6, (ROWS, 1)).astype(int)
    mems, memory, sizes = None, None, []
    for segment in range(4):
        inputs = np.random.default_rng(segment).integers(7, 97, (ROWS, LENGTH))
        guesses = {"order": order, "places": PLACES}
        result = torch_run(
            theirs, inputs, **guesses, token_type_ids=types, mems=mems, use_mems=True
        )
        mems = result.mems
        found, memory = ours_run(ours, inputs, memory, **guesses, token_types=types, **more)
        np.testing.assert_allclose(found, result.logits.detach().numpy(), atol=2e-5)
        expected = np.stack([each.numpy() for each in mems]).swapaxes(1, 2)
        np.testing.assert_allclose(memory, expected, atol=1e-5)
        sizes.append(memory.shape[2])
    assert sizes == [6, 12, 14, 14]


def test_gradients(pair, texts, order):
    theirs, ours = pair
    types = np.tile(np.arange(LENGTH) > 6, (ROWS, 1)).astype(int)
    targets = np.take_along_axis(texts, PLACES, 1)
    theirs.zero_grad()
    logits = torch_run(theirs, texts, order, PLACES, token_type_ids=types).logits
    torch.nn.functional.cross_entropy(
        logits.reshape(-1, 97), torch.from_numpy(targets).reshape(-1)
    ).backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    def loss(params, execution):
        model = XLNet(ours.model.config, execution)
        logits, _ = model.apply(
            {"params": params}, texts, order=order, places=PLACES, token_types=types
        )
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()

    for execution in (Execution(), Execution(remat="matmuls", attention="blocked")):
        with jax.default_matmul_precision("highest"):
            gradients = jax.jit(jax.grad(loss), static_argnums=1)(ours.params, execution)
        found = dict(interop.export_tensors(ours.model.config, gradients))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = max(np.abs(gradient).max(), 1e-3)
            np.testing.assert_allclose(found[name], gradient, atol=3e-5 * scale, err_msg=name)


def test_no_guess_knows_its_word_or_a_later_one(pair, texts, order):
    """By the gradient with respect to each token's embedding."""
    _, ours = pair
    model = ours.model
    row = 0
    for guess, place in enumerate(PLACES[row]):

        def logit(table, guess=guess):
            # Each token has a row of the table to itself.
            variables = {"params": {**ours.params, "embedding": table}}
            features, _ = model.apply(
                variables,
                jnp.arange(LENGTH)[None],
                order=order[row : row + 1],
                places=PLACES[row : row + 1],
                method="features",
            )
            return (features[0, guess] ** 3).sum()

        gradient = jax.jit(jax.grad(logit))(jnp.asarray(ours.params["embedding"]))
        read = np.abs(gradient[:LENGTH]).sum(1) > 0
        allowed = order[row] < order[row, place]
        assert not allowed[place] and allowed.any()
        np.testing.assert_array_equal(read, allowed)


def test_files_come_back_byte_for_byte(pair, directory, texts, tmp_path):
    theirs, ours = pair
    interop.save_pretrained(tmp_path / "again", ours.model.config, ours.params)
    before, after = Tensors(directory), Tensors(tmp_path / "again")
    assert before.keys() - {"lm_loss.weight"} == after.keys()
    for key in after.keys():
        shape = before.shape(key)
        assert before.read(key, shape).tobytes() == after.read(key, shape).tobytes()
    again, how = XLNetLMHeadModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not how["missing_keys"] and not how["unexpected_keys"]
    found = torch_run(again.eval(), texts).logits.detach().numpy()
    np.testing.assert_array_equal(found, torch_run(theirs, texts).logits.detach().numpy())


@pytest.mark.parametrize(("preset", "parameters"), [("base", 116_750_336), ("large", 360_300_800)])
def test_published_sizes(preset, parameters):
    shapes = interop.parameter_shapes(PRESETS[preset])
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
    config = interop.config_from_json(interop.config_to_json(PRESETS[preset]))
    assert config == PRESETS[preset]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ff_activation": "swish"}, "ff_activation is 'swish'"),
        ({"attn_type": "both"}, "attn_type is 'both'"),
        ({"clamp_len": 8}, "clamp_len is 8"),
        ({"untie_r": False}, "untie_r is False"),
        ({"n_head": 5}, "into 5 heads"),
        ({"n_layer": 4}, "lacks transformer.layer.3"),
        ({"n_layer": 2}, "an XLNet of its config has no place for"),
        ({"vocab_size": 98}, "word_embedding"),
        ({"reuse_len": -1}, "reuse -1"),
        ({"summary_type": "mean"}, "summary_type is 'mean'"),
        (
            {"architectures": ["XLNetForSequenceClassification"], "summary_last_dropout": 0.3},
            "summary_last_dropout is 0.3 and dropout 0.1",
        ),
    ],
)
def test_what_cannot_be_loaded(pair, directory, tmp_path, change, message):
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    write_json(tmp_path / "config.json", {**read_json(directory / "config.json"), **change})
    with pytest.raises(ValueError, match=message):
        lmjax.load(tmp_path)


def test_what_does_not_fit(pair, texts, order):
    _, ours = pair
    for shape in ((2, ROWS, 3, 24), (3, 2, 3, 24), (3, ROWS, 3, 23), (3, ROWS, 24)):
        with pytest.raises(ValueError, match="the memory has shape"):
            ours_run(ours, texts, jnp.zeros(shape))
    with pytest.raises(ValueError, match="places to guess need an order"):
        ours_run(ours, texts, places=PLACES)


def test_dropout_is_only_for_training(pair, texts):
    _, ours = pair
    apply = jax.jit(XLNet(dataclasses.replace(ours.model.config, dropout=0.5)).apply)
    calm, _ = ours_run(ours, texts)
    variables = {"params": ours.params}
    with jax.default_matmul_precision("highest"):
        np.testing.assert_array_equal(apply(variables, texts)[0], calm)
        shaken, _ = apply(variables, texts, rngs={"dropout": jax.random.key(0)})
    assert np.abs(shaken - calm).max() > 0.1
