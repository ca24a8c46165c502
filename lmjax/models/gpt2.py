"""GPT-2 and KoGPT2: a decoder that continues text.

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3;
SKT-AI 2021, KoGPT2 (the same shape, 51,200 pieces of Korean). Reference files: openai/gpt-2
src/model.py, transformers modeling_gpt2.py.
Axes: B batch, T query length, S key length, D width, N heads, H head width, F feed-forward width,
V vocabulary, L layers.

What is peculiar to GPT-2: norms come before the sublayers and once more after the last; positions
are learned; weights that write to the residual stream start smaller with depth; the output matrix
is the embedding.
Departures: queries, keys and values have a kernel each (published files join the three).
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.models.layers import (
    Classifier,
    Execution,
    KeyValue,
    LayerNorm,
    affine,
    all_logits,
    attention,
    check_choices,
    check_config,
    check_heads,
    constrain,
    dropout,
    dropout_key,
    few_rows_logits,
    last_of,
    lookup,
    same_segment,
    split_heads,
    stack,
    unstacked,
    weight,
)

INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """What a GPT-2 is; the defaults are the smallest published one."""

    vocab: int = 50_257
    """Rows of the embedding: the tokenizer's ids."""
    positions: int = 1_024
    """Rows of the table of positions: the longest text."""
    layers: int = 12
    width: int = 768
    """D, of the residual stream; the heads divide it among them."""
    heads: int = 12
    feed_forward: int = 3_072
    """F, the hidden width of the feed-forward layers."""
    dropout: float = 0.1
    """After the embedding, on attention weights, and after sublayers."""
    norm_epsilon: float = 1e-5
    kind: Literal["lm", "text_classifier", "token_classifier", "span"] = "lm"
    """What is on top: guesses of the next token or, to be fine-tuned, classes of texts (by their
    last token), of tokens, or the first and the last token of an answer."""
    labels: int = 2
    """Classes that a classifier tells apart."""

    def __post_init__(self):
        sizes = ("vocab", "positions", "layers", "width", "heads", "feed_forward", "labels")
        check_config(self, *sizes)
        check_heads(self)
        check_choices(self, "kind")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def training_flops(self, batch: int, length: int) -> float:
        """Floating-point operations of the products in one step: forwards, and twice backwards.

        Attention scores count in full, as in PaLM's appendix B; recomputation does not count.
        """
        layer = 4 * self.width**2 + 2 * self.width * self.feed_forward + 2 * length * self.width
        return 6.0 * batch * length * (self.layers * layer + self.width * self.vocab)


PRESETS = {
    "small": GPT2Config(),
    "medium": GPT2Config(layers=24, width=1_024, heads=16, feed_forward=4_096),
    "large": GPT2Config(layers=36, width=1_280, heads=20, feed_forward=5_120),
    "xl": GPT2Config(layers=48, width=1_600, heads=25, feed_forward=6_400),
    "kogpt2": GPT2Config(vocab=51_200),
}


class DecodingState(NamedTuple):
    """All that decoding carries; the first axis of every array is rows."""

    layers: tuple[KeyValue, ...]
    """Keys and values [rows, N, S, H] in buffers of fixed length."""
    length: Int[Array, " rows"]
    """Tokens of each row read so far."""


class Attention(nn.Module):
    config: GPT2Config
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B 1 T S"],
        past: KeyValue | None = None,
        length: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValue | None]:
        """Reads x, or where there is a `past` of some `length`, that and x; also the new past."""
        c = self.config

        def heads(name: str) -> Float[Array, "B T N H"]:
            y = affine(self, x, name, INIT, embed=c.width, heads=c.width)
            return split_heads(y, c.heads)

        queries, own = heads("query"), KeyValue(heads("key"), heads("value"))
        if past is not None:
            past = past.extended(own.swapped(), length)
            own = past.swapped()
        key = dropout_key(self, c.dropout)
        queries = queries * c.head_width**-0.5
        context = attention(
            queries, *own, mask, rate=c.dropout, key=key, execution=self.execution
        ).reshape(x.shape)
        return affine(self, context, "out", residual_init(c), heads=c.width, embed=c.width), past


class FeedForward(nn.Module):
    config: GPT2Config
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        up = affine(self, x, "up", INIT, embed=c.width, mlp=c.feed_forward)
        hidden = nn.gelu(up, approximate=True)
        hidden = constrain(hidden, "batch", "activation_length", "activation_mlp")
        return affine(self, hidden, "down", residual_init(c), mlp=c.feed_forward, embed=c.width)


def residual_init(c: GPT2Config):
    """Section 2.3: scaled by 1/sqrt(N), where N = 2L sublayers write to the residual stream."""
    return nn.initializers.normal(0.02 * (2 * c.layers) ** -0.5)


class Layer(nn.Module):
    config: GPT2Config
    execution: Execution

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask, past: KeyValue | None = None, length=None
    ) -> tuple[Float[Array, "B T D"], KeyValue | None]:
        c, e = self.config, self.execution
        normed = LayerNorm(c.norm_epsilon, e, name="attention_norm")(x)
        attended, past = Attention(c, e, name="attention")(normed, mask, past, length)
        x = x + dropout(self, attended, c.dropout)
        normed = LayerNorm(c.norm_epsilon, e, name="feed_forward_norm")(x)
        x = x + dropout(self, FeedForward(c, e, name="feed_forward")(normed), c.dropout)
        return constrain(x, "batch", "activation_length", "activation_embed"), past


class GPT2(nn.Module):
    """A causal language model.

    Segment ids number the texts packed in a row from 1, with 0 for padding, and positions count
    from 0 in each; left out, a row is one text.
    """

    config: GPT2Config
    execution: Execution = Execution()

    def setup(self):
        c, e = self.config, self.execution
        self.embedding = weight(self, "embedding", INIT, vocab=c.vocab, embed=c.width)
        self.positions = weight(self, "positions", INIT, positions=c.positions, embed=c.width)
        self.layers = stack(Layer, c.layers, e, inputs=1)(c, e)
        self.final_norm = LayerNorm(c.norm_epsilon, e)
        if c.kind == "text_classifier":
            self.classifier = Classifier(c.labels, INIT, e, bias=False)
        if c.kind == "token_classifier":
            self.classifier = Classifier(c.labels, INIT, e, c.dropout)
        if c.kind == "span":
            self.classifier = Classifier(2, INIT, e)

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B *T labels"]:
        """Logits of the token after each of `inputs`; of a classifier of texts or tokens the logits
        of classes; of spans, of each token being the first of the answer, and the last. float32. A
        text's last token is the last one in a row that is not padding."""
        x = self.features(inputs, positions, segment_ids)
        match self.config.kind:
            case "text_classifier":
                real = jnp.ones_like(inputs) if segment_ids is None else segment_ids
                return self.classifier(last_of(x, real > 0))
            case "token_classifier" | "span":
                return self.classifier(x)
        return all_logits(x, self.embedding)

    def features(
        self,
        inputs: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the output matrix multiplies; losses take this, so full logits need not exist."""
        places = jnp.arange(inputs.shape[1])
        mask = (places <= places[:, None])[None, None]
        if segment_ids is not None:
            mask = mask & same_segment(segment_ids, segment_ids)
        x, _ = self.layers(self.embed(inputs, places if positions is None else positions), mask)
        return self.final_norm(x)

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"]
    ) -> Float[Array, "B T D"]:
        if tokens.shape[1] > self.config.positions:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit the {self.config.positions} positions that"
                " this GPT-2 has learned: shorten the text, or train a model with more"
            )
        x = lookup(self.embedding, tokens) + self.positions[positions]
        x = constrain(x, "batch", "activation_length", "activation_embed")
        return dropout(self, x, self.config.dropout)

    def output_matrix(self) -> Float[Array, "V D"]:
        return self.embedding


def start_decoding(model: GPT2, rows: int, length: int) -> DecodingState:
    """Room for `length` tokens of each of `rows` texts.

    Raises:
        ValueError: the model has fewer positions.
    """
    c = model.config
    if length > c.positions:
        raise ValueError(
            f"{length} tokens do not fit the {c.positions} positions that this GPT-2 has learned"
        )
    room = jnp.zeros((rows, c.heads, length, c.head_width), model.execution.dtype)
    return DecodingState((KeyValue(room, room),) * c.layers, jnp.zeros(rows, jnp.int32))


def extend(
    model: GPT2, params, tokens: Int[Array, "rows T"], state: DecodingState
) -> tuple[Float[Array, "rows T V"], DecodingState]:
    """Reads T >= 1 more tokens of each row; logits of their successors."""
    return extender(model, params)(tokens, state)


def extender(model: GPT2, params):
    """`extend` of a model and its parameters, for use in a loop: `(tokens, state)` to the same.

    The stacked parameters are taken apart here, once, and used layer by layer, which decodes faster
    than a scan and lets a caller differentiate with respect to `state`.
    """
    c = model.config
    execution = dataclasses.replace(model.execution, attention="whole")
    layer = Layer(c, execution)
    own = unstacked(params["layers"], c.layers)

    def extend(tokens, state):
        bound = GPT2(c, execution).bind({"params": params})
        positions = state.length[:, None] + jnp.arange(tokens.shape[1])
        keys = jnp.arange(state.layers[0].keys.shape[2])
        mask = (keys <= positions[..., None])[:, None]
        x, layers = bound.embed(tokens, positions), []
        for parameters, past in zip(own, state.layers, strict=True):
            x, past = layer.apply({"params": parameters}, x, mask, past, state.length)
            layers.append(past)
        logits = few_rows_logits(bound.final_norm(x), bound.output_matrix())
        return logits, DecodingState(tuple(layers), state.length + tokens.shape[1])

    return extend
