"""BART: an encoder that reads a damaged text and a decoder that writes it whole again.

Paper: Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training", section 2.1.
Reference files: fairseq models/bart/model.py; transformers modeling_bart.py.
Axes: B batch, S source length, T target length, D width, N heads, H head width, F feed-forward
width, V vocabulary, L layers.

What is peculiar to it: norms come after the sublayers and after both embeddings, none at the end;
encoder and decoder have tables of learned positions of their own, whose first two rows stay unused;
one embedding serves encoder, decoder and output.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.models.layers import (
    Classifier,
    DecodingState,
    Execution,
    KeyValue,
    LayerNorm,
    LayerState,
    Pooler,
    affine,
    all_logits,
    attention,
    check_choices,
    check_config,
    check_heads,
    constrain,
    dense,
    dropout,
    dropout_key,
    few_rows_logits,
    last_of,
    lookup,
    positions_within,
    same_segment,
    shift_right,
    split_heads,
    stack,
    unstacked,
    weight,
)

FIRST_POSITION = 2
"""Row of the first token in a table of positions."""


@dataclasses.dataclass(frozen=True)
class BartConfig:
    """What a BART is; the defaults are bart-base."""

    vocab: int = 50_265
    """Rows of the embedding: the tokenizer's ids."""
    positions: int = 1_024
    """The longest source, and the longest target."""
    layers: int = 6
    """Of the encoder."""
    decoder_layers: int = 6
    width: int = 768
    """D, of the residual stream; the heads divide it among them."""
    heads: int = 12
    feed_forward: int = 3_072
    """F, the hidden width of the feed-forward layers."""
    padding: int = 1
    """The id that fills up a source."""
    start: int = 2
    """The id that the decoder reads first; it is </s>, which also ends a text."""
    kind: Literal["lm", "text_classifier", "span"] = "lm"
    """What is on top: guesses of the next token or, to be fine-tuned, classes of texts (by their
    last </s>), or the first and the last token of an answer."""
    labels: int = 3
    """Classes that a classifier tells apart; three, unless told, in transformers' BART."""
    dropout: float = 0.1
    """After the embeddings and after sublayers."""
    attention_dropout: float = 0.1
    """On attention weights."""
    activation_dropout: float = 0.0
    """Within feed-forward layers."""
    classifier_dropout: float = 0.0
    """Before both products of a classifier."""
    norm_epsilon: float = 1e-5
    init_scale: float = 0.02
    """Standard deviation of weights before training; narrow models learn faster with more."""

    def __post_init__(self):
        sizes = ("vocab", "positions", "layers", "decoder_layers", "width", "heads", "feed_forward")
        check_config(self, *sizes, "labels")
        check_heads(self)
        check_choices(self, "kind")
        for name in ("attention_dropout", "activation_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"BartConfig.{name} is {getattr(self, name)}, not in [0, 1)")
        for name in ("padding", "start"):
            if not 0 <= getattr(self, name) < self.vocab:
                raise ValueError(
                    f"BartConfig.{name} is {getattr(self, name)}, not one of {self.vocab} ids"
                )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def init(self) -> nn.initializers.Initializer:
        return nn.initializers.normal(self.init_scale)

    def training_flops(self, batch: int, inputs: int, targets: int) -> float:
        """Floating-point operations of the products in one step: forwards, and twice backwards.

        Attention scores count in full, as in PaLM's appendix B; recomputation does not count.
        """
        d, feed_forward = self.width, 2 * self.width * self.feed_forward
        encoder = inputs * (4 * d**2 + 2 * inputs * d + feed_forward)
        own = targets * (4 * d**2 + 2 * targets * d + feed_forward)
        cross = targets * (2 * d**2 + 2 * inputs * d) + inputs * 2 * d**2
        logits = targets * d * self.vocab
        return 6.0 * batch * (self.layers * encoder + self.decoder_layers * (own + cross) + logits)


PRESETS = {
    "base": BartConfig(),
    "large": BartConfig(layers=12, decoder_layers=12, width=1_024, heads=16, feed_forward=4_096),
}


class Attention(nn.Module):
    config: BartConfig
    execution: Execution

    def setup(self):
        width, init = self.config.width, self.config.init
        into, out = {"embed": width, "heads": width}, {"heads": width, "embed": width}

        def parameters(name: str, axes: dict[str, int]):
            (_, (outputs, size)) = axes.items()
            bias = weight(self, f"{name}_bias", nn.initializers.zeros, **{outputs: size})
            return weight(self, name, init, **axes), bias

        self.query, self.query_bias = parameters("query", into)
        self.key, self.key_bias = parameters("key", into)
        self.value, self.value_bias = parameters("value", into)
        self.out, self.out_bias = parameters("out", out)

    def read(self, x: Float[Array, "B S D"]) -> KeyValue:
        keys, values = dense(x, self.key) + self.key_bias, dense(x, self.value) + self.value_bias
        heads = self.config.heads
        return KeyValue(split_heads(keys, heads), split_heads(values, heads))

    def __call__(
        self, x: Float[Array, "B T D"], source: KeyValue, mask: Bool[Array, "B 1 T S"]
    ) -> Float[Array, "B T D"]:
        c = self.config
        queries = split_heads(dense(x, self.query) + self.query_bias, c.heads)
        # Rows that share a source (beams) read it together, as if their queries were one row's.
        queries = queries.reshape(source.keys.shape[0], -1, *queries.shape[2:])
        context = attention(
            queries * c.head_width**-0.5,
            *source,
            mask,
            rate=c.attention_dropout,
            key=dropout_key(self, c.attention_dropout),
            execution=self.execution,
        )
        return dense(context.reshape(x.shape), self.out) + self.out_bias


class FeedForward(nn.Module):
    config: BartConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        up = affine(self, x, "up", c.init, embed=c.width, mlp=c.feed_forward)
        hidden = constrain(
            nn.gelu(up, approximate=False), "batch", "activation_length", "activation_mlp"
        )
        hidden = dropout(self, hidden, c.activation_dropout)
        return affine(self, hidden, "down", c.init, mlp=c.feed_forward, embed=c.width)


class EncoderLayer(nn.Module):
    config: BartConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], mask) -> tuple[Float[Array, "B S D"], None]:
        c, e = self.config, self.execution
        attend = Attention(c, e, name="attention")
        x = x + dropout(self, attend(x, attend.read(x), mask), c.dropout)
        x = LayerNorm(c.norm_epsilon, e, name="attention_norm")(x)
        x = x + dropout(self, FeedForward(c, e, name="feed_forward")(x), c.dropout)
        x = LayerNorm(c.norm_epsilon, e, name="feed_forward_norm")(x)
        return constrain(x, "batch", "activation_length", "activation_embed"), None


class DecoderLayer(nn.Module):
    config: BartConfig
    execution: Execution

    def setup(self):
        c, e = self.config, self.execution
        self.attention = Attention(c, e)
        self.attention_norm = LayerNorm(c.norm_epsilon, e)
        self.cross_attention = Attention(c, e)
        self.cross_attention_norm = LayerNorm(c.norm_epsilon, e)
        self.feed_forward = FeedForward(c, e)
        self.feed_forward_norm = LayerNorm(c.norm_epsilon, e)

    def __call__(
        self, x: Float[Array, "B T D"], encoded: Float[Array, "B S D"], mask, cross_mask
    ) -> tuple[Float[Array, "B T D"], None]:
        """All positions at once, for training."""
        own, memory = self.attention.read(x), self.remember(encoded)
        return self.attend(x, own, memory, mask, cross_mask), None

    def remember(self, encoded: Float[Array, "B S D"]) -> KeyValue:
        """What the cross-attention reads of the encoder's output."""
        return self.cross_attention.read(encoded)

    def extend(
        self, x: Float[Array, "B T D"], state: LayerState, length, mask, cross_mask
    ) -> tuple[Float[Array, "B T D"], LayerState]:
        """The next T positions of each row, after the `length` that its past holds."""
        past = state.past.extended(self.attention.read(x).swapped(), length)
        x = self.attend(x, past.swapped(), state.memory.swapped(), mask, cross_mask)
        return x, LayerState(past, state.memory)

    def attend(self, x, own: KeyValue, memory: KeyValue, mask, cross_mask):
        rate = self.config.dropout
        x = self.attention_norm(x + dropout(self, self.attention(x, own, mask), rate))
        crossed = self.cross_attention(x, memory, cross_mask)
        x = self.cross_attention_norm(x + dropout(self, crossed, rate))
        x = self.feed_forward_norm(x + dropout(self, self.feed_forward(x), rate))
        return constrain(x, "batch", "activation_length", "activation_embed")


class Positions(nn.Module):
    """A learned vector for each place, added to the words before a norm."""

    config: BartConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "*B T"]
    ) -> Float[Array, "B T D"]:
        c = self.config
        if x.shape[1] > c.positions:
            raise ValueError(
                f"{x.shape[1]} tokens do not fit the {c.positions} positions that this BART has"
                " learned: shorten the text, or train a model with more"
            )
        rows = c.positions + FIRST_POSITION
        table = weight(self, "table", c.init, positions=rows, embed=c.width)
        x = LayerNorm(c.norm_epsilon, self.execution, name="norm")(
            x + table[positions + FIRST_POSITION]
        )
        x = constrain(x, "batch", "activation_length", "activation_embed")
        return dropout(self, x, c.dropout)


class Bart(nn.Module):
    """A text-to-text model.

    The decoder reads `config.start` first; left out, `decoder_inputs` are `inputs` shifted right,
    which is what classifiers and spans read. Segment ids number the texts packed in a row from 1,
    with 0 for padding; left out, `inputs` is one text padded with `config.padding`, and targets are
    one text (what follows it cannot reach it).
    """

    config: BartConfig
    execution: Execution = Execution()

    def setup(self):
        c, e = self.config, self.execution
        self.embedding = weight(self, "embedding", c.init, vocab=c.vocab, embed=c.width)
        self.encoder_positions = Positions(c, e)
        self.encoder_layers = stack(EncoderLayer, c.layers, e, inputs=1)(c, e)
        self.decoder_positions = Positions(c, e)
        self.decoder_layers = stack(DecoderLayer, c.decoder_layers, e, inputs=3)(c, e)
        if c.kind == "text_classifier":
            self.pooler = Pooler(c.init, e)
            self.classifier = Classifier(c.labels, c.init, e, c.classifier_dropout)
        if c.kind == "span":
            self.classifier = Classifier(2, c.init, e)

    def __call__(
        self,
        inputs: Int[Array, "B S"],
        decoder_inputs: Int[Array, "B T"] | None = None,
        inputs_segment_ids: Int[Array, "B S"] | None = None,
        targets_segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B *T labels"]:
        """Logits of the target after each of `decoder_inputs` (targets shifted right); of a
        classifier of texts the logits of classes; of spans, of each token being the first of the
        answer, and the last. float32."""
        x = self.features(inputs, decoder_inputs, inputs_segment_ids, targets_segment_ids)
        match self.config.kind:
            case "text_classifier":
                x = last_of(x, inputs == self.config.start)
                x = self.pooler(dropout(self, x, self.config.classifier_dropout))
                return self.classifier(x)
            case "span":
                return self.classifier(x)
        return all_logits(x, self.embedding)

    def features(
        self,
        inputs: Int[Array, "B S"],
        decoder_inputs: Int[Array, "B T"] | None = None,
        inputs_segment_ids: Int[Array, "B S"] | None = None,
        targets_segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the output matrix multiplies; losses take this, so full logits need not exist."""
        segments = self.segments(inputs, inputs_segment_ids)
        encoded = self.encode(inputs, segments)
        if decoder_inputs is None:
            decoder_inputs = shift_right(inputs, positions_within(segments), self.config.start)
            targets_segment_ids = segments
        targets = jnp.ones_like(decoder_inputs)
        targets = targets if targets_segment_ids is None else targets_segment_ids
        places = jnp.arange(decoder_inputs.shape[1])
        causal = same_segment(targets, targets) & (places <= places[:, None])
        x = self.embed(decoder_inputs, positions_within(targets))
        x, _ = self.decoder_layers(x, encoded, causal, same_segment(targets, segments))
        return x

    def segments(self, inputs: Int[Array, "B S"], given: Int[Array, "B S"] | None):
        """Those given, or one text and its padding."""
        return (inputs != self.config.padding).astype(jnp.int32) if given is None else given

    def encode(
        self, inputs: Int[Array, "B S"], segments: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        x = self.encoder_positions(lookup(self.embedding, inputs), positions_within(segments))
        return self.encoder_layers(x, same_segment(segments, segments))[0]

    def embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "*B T"]
    ) -> Float[Array, "B T D"]:
        """What the decoder reads."""
        return self.decoder_positions(lookup(self.embedding, tokens), positions)

    def output_matrix(self) -> Float[Array, "V D"]:
        return self.embedding


def start_decoding(
    model: Bart,
    params,
    inputs: Int[Array, "B S"],
    length: int,
    inputs_segment_ids: Int[Array, "B S"] | None = None,
    beams: int = 1,
) -> DecodingState:
    """Reads `inputs` and makes room for `length` tokens of B x `beams` decoder rows.

    Raises:
        ValueError: the model has fewer positions.
    """
    c = model.config
    if length > c.positions:
        raise ValueError(
            f"{length} tokens do not fit the {c.positions} positions that this BART has learned"
        )
    bound = model.bind({"params": params})
    segments = bound.segments(inputs, inputs_segment_ids)
    encoded = bound.encode(inputs, segments)
    rows = inputs.shape[0] * beams
    room = jnp.zeros((rows, c.heads, length, c.head_width), model.execution.dtype)
    layer = DecoderLayer(c, model.execution)
    layers = tuple(
        LayerState(
            KeyValue(room, room),
            layer.apply({"params": own}, encoded, method=DecoderLayer.remember).swapped().settled(),
        )
        for own in unstacked(params["decoder_layers"], c.decoder_layers)
    )
    return DecodingState(layers, jnp.zeros(rows, jnp.int32), segments > 0)


def extend(
    model: Bart, params, tokens: Int[Array, "rows T"], state: DecodingState
) -> tuple[Float[Array, "rows T V"], DecodingState]:
    """Reads T >= 1 more decoder tokens of each row; logits of their successors."""
    return extender(model, params)(tokens, state)


def extender(model: Bart, params):
    """`extend` of a model and its parameters, for use in a loop: `(tokens, state)` to the same.

    The stacked parameters are taken apart here, once, and used layer by layer, which decodes faster
    than a scan and lets a caller differentiate with respect to `state`.
    """
    c = model.config
    execution = dataclasses.replace(model.execution, attention="whole")
    layer = DecoderLayer(c, execution)
    own = unstacked(params["decoder_layers"], c.decoder_layers)

    def extend(tokens, state):
        bound = Bart(c, execution).bind({"params": params})
        queries = state.length[:, None] + jnp.arange(tokens.shape[1])
        keys = jnp.arange(state.layers[0].past.keys.shape[2])
        mask = (keys <= queries[..., None])[:, None]
        cross_mask = state.visible[:, None, None]

        x, layers = bound.embed(tokens, queries), []
        for parameters, past in zip(own, state.layers, strict=True):
            inputs = (x, past, state.length, mask, cross_mask)
            x, past = layer.apply({"params": parameters}, *inputs, method=DecoderLayer.extend)
            layers.append(past)
        logits = few_rows_logits(x, bound.output_matrix())
        return logits, DecodingState(tuple(layers), state.length + tokens.shape[1], state.visible)

    return extend
