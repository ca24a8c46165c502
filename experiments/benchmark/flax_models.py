"""What the Flax models of transformers 4.57 do with a `Case`: all logits, optax's cross-entropy of
those that count, `optax.adamw`, and their own `generate`, jitted."""

import jax
import jax.numpy as jnp
import optax
import transformers

from experiments.benchmark.harness import (
    Case,
    Figures,
    examples,
    prompts,
    timed_decoding,
    timed_jax_training,
)
from experiments.benchmark.transformers_configs import transformers_config

MODELS = {
    "bart": transformers.FlaxBartForConditionalGeneration,
    "bert": transformers.FlaxBertForPreTraining,
    "gpt2": transformers.FlaxGPT2LMHeadModel,
    "t5": transformers.FlaxT5ForConditionalGeneration,
}


CLIP = jnp.clip


def measure(case: Case) -> Figures:
    jnp.clip = clip_of_old
    model = MODELS[case.model](transformers_config(case), seed=0)
    batch = jax.tree.map(jnp.asarray, examples(case))
    optimizer = optax.adamw(1e-3)
    gradient = jax.value_and_grad(lambda params: loss(model, params, batch, case))

    def step(carry):
        params, state = carry
        value, gradients = gradient(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = jax.tree.map(jnp.copy, model.params), optimizer.init(model.params)
    figures, _ = timed_jax_training(step, start, case.steps)
    if not case.decode_batch:
        return figures
    length = case.decode_tokens + (case.decode_inputs if case.model == "gpt2" else 1)
    options = {"max_length": length, "min_length": length, "num_beams": 1}
    write = jax.jit(lambda params, x: model.generate(x, params=params, **options).sequences)
    tokens = jnp.asarray(prompts(case))
    return figures | timed_decoding(
        lambda: jax.block_until_ready(write(model.params, tokens)), case
    )


def clip_of_old(x, min=None, max=None, *, a_min=None, a_max=None):
    """transformers 4.57 calls `jnp.clip` with the names of an older JAX."""
    return CLIP(x, a_min if min is None else min, a_max if max is None else max)


def loss(model, params, batch: dict[str, jax.Array], case: Case) -> jax.Array:
    inputs, targets = batch["inputs"], batch["targets"]
    options = {"params": params, "train": False}
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    match case.model:
        case "bert":
            out = model(inputs, token_type_ids=batch["types"], **options)
            rows = jnp.arange(case.batch)[:, None]
            labels = jnp.zeros_like(inputs).at[rows, batch["places"]].set(targets)
            guessed = jnp.zeros(inputs.shape).at[rows, batch["places"]].set(1)
            words = cross_entropy(out.prediction_logits, labels) * guessed
            verdicts = cross_entropy(out.seq_relationship_logits, jnp.ones(case.batch, int))
            return words.sum() / guessed.sum() + verdicts.mean()
        case "gpt2":
            return cross_entropy(model(inputs, **options).logits, targets).mean()
        case _:
            logits = model(inputs, decoder_input_ids=batch["shifted"], **options).logits
            return cross_entropy(logits, targets).mean()
