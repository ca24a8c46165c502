"""T5, T5 1.1 and mT5: one encoder and decoder that read and write text.

Papers: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", section 2.1 and 3.7; Shazeer 2020, "GLU Variants Improve Transformer" (1.1); Xue et
al. 2021, "mT5". Reference files: t5x examples/t5/network.py, transformers modeling_t5.py.
Axes: B batch, T target length, S source length, D width, N heads, H head width, F feed-forward
width, V vocabulary, L layers.

What is peculiar to T5: no biases; attention is not scaled by 1/sqrt(H), the initial queries are;
positions enter only as one table of relative biases per stack, shared by its layers; 1.0 ties the
output matrix to the embedding and scales the features by 1/sqrt(D), 1.1 and mT5 do neither and gate
the feed-forward layer.
Packing needs no positions here: relative distance within a segment is distance within the row.
Departures: none. An untied output matrix starts with standard deviation 1/sqrt(D), as in T5X (1.0
in transformers).
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmjax.models.layers import (
    DecodingState,
    Execution,
    KeyValue,
    LayerState,
    RMSNorm,
    all_logits,
    attention,
    check_config,
    constrain,
    dense,
    dropout,
    dropout_key,
    few_rows_logits,
    lookup,
    same_segment,
    split_heads,
    stack,
    unstacked,
    weight,
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """What a T5 is; the defaults are the small model of 1.0."""

    vocab: int = 32_128
    """Rows of the embedding: the tokenizer's ids, rounded up to a multiple of 128."""
    layers: int = 6
    """Layers of the encoder, and of the decoder unless `decoder_layers` says otherwise."""
    decoder_layers: int | None = None
    """Layers of the decoder, where they differ from the encoder's."""
    width: int = 512
    """D, of the residual stream."""
    heads: int = 8
    head_width: int = 64
    """H; heads x H need not be the width (it is not in 1.1 small and in 11B)."""
    feed_forward: int = 2_048
    """F, the hidden width of the feed-forward layers."""
    gated: bool = False
    """False: ReLU feed-forward (1.0). True: tanh-GELU gate times linear (1.1, mT5)."""
    tied: bool = True
    """True: the output matrix is the embedding, features scaled by 1/sqrt(D) (1.0)."""
    dropout: float = 0.1
    """After the embedding, on attention weights, in and after sublayers, after the last norm."""
    relative_buckets: int = 32
    relative_distance: int = 128
    """Distances from here on share the last bucket."""
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        check_config(self, "vocab", "layers", "width", "heads", "head_width", "feed_forward")
        if self.decoder_layers is None:
            object.__setattr__(self, "decoder_layers", self.layers)
        if self.decoder_layers < 1:
            raise ValueError(f"T5Config.decoder_layers is {self.decoder_layers}, not positive")
        if self.relative_buckets % 4 or self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"T5Config.relative_buckets is {self.relative_buckets}; it must divide by 4 and "
                f"its half lie below relative_distance ({self.relative_distance})"
            )

    def training_flops(self, batch: int, inputs_length: int, targets_length: int) -> float:
        """Floating-point operations of the products in one step: forwards, and twice backwards.

        Attention scores count in full, as in PaLM's appendix B; recomputation does not count.
        """
        s, t, joined = inputs_length, targets_length, self.heads * self.head_width
        feed_forward = (3 if self.gated else 2) * self.width * self.feed_forward
        attention = 4 * self.width * joined
        encoder = s * (attention + feed_forward) + 2 * s * s * joined
        # Cross-attention has queries and outputs over T, keys and values over S.
        decoder = t * (1.5 * attention + feed_forward) + s * attention / 2
        decoder += 2 * t * (t + s) * joined
        logits = t * self.width * self.vocab
        return 6.0 * batch * (self.layers * encoder + self.decoder_layers * decoder + logits)


def _gated(**sizes) -> T5Config:
    return T5Config(gated=True, tied=False, **sizes)


_V1_1 = {
    "small": _gated(layers=8, width=512, heads=6, feed_forward=1_024),
    "base": _gated(layers=12, width=768, heads=12, feed_forward=2_048),
    "large": _gated(layers=24, width=1_024, heads=16, feed_forward=2_816),
    "xl": _gated(layers=24, width=2_048, heads=32, feed_forward=5_120),
    "xxl": _gated(layers=24, width=4_096, heads=64, feed_forward=10_240),
}

PRESETS = {
    "small": T5Config(),
    "base": T5Config(layers=12, width=768, heads=12, feed_forward=3_072),
    "large": T5Config(layers=24, width=1_024, heads=16, feed_forward=4_096),
    "3b": T5Config(layers=24, width=1_024, heads=32, head_width=128, feed_forward=16_384),
    "11b": T5Config(layers=24, width=1_024, heads=128, head_width=128, feed_forward=65_536),
    **{f"v1_1-{size}": config for size, config in _V1_1.items()},
    **{f"mt5-{size}": dataclasses.replace(config, vocab=250_112) for size, config in _V1_1.items()},
}


def relative_position_bucket(
    distance: Int[Array, "*shape"], bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    """The row of the bias table for `distance` = key position - query position.

    Half of the buckets are single distances, the other half grow logarithmically up to
    `max_distance`; a bidirectional table has its upper half for keys after the query.
    """
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    # The boundaries are found exactly, once, so that no device's rounding of a logarithm moves one.
    steps = np.arange(1, buckets - exact)
    starts = np.ceil(exact * (max_distance / exact) ** (steps / (buckets - exact)) - 1e-9)
    logarithmic = exact + jnp.searchsorted(
        jnp.asarray(starts, jnp.int32), distance, side="right", method="compare_all"
    )
    return offset + jnp.where(distance < exact, distance, logarithmic)


class RelativeBias(nn.Module):
    """Section 2.1: one scalar per head and bucket, added to every layer's attention scores."""

    config: T5Config
    execution: Execution
    bidirectional: bool

    @nn.compact
    def __call__(
        self, queries: Int[Array, "*B T"], keys: Int[Array, " S"]
    ) -> Float[Array, "*B N T S"]:
        """From the positions of queries and keys; float32."""
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        table = weight(
            self, "table", init, "float32", relative_buckets=c.relative_buckets, heads=c.heads
        )
        bucket = relative_position_bucket(
            keys - queries[..., None], self.bidirectional, c.relative_buckets, c.relative_distance
        )
        return jnp.moveaxis(table[bucket], -1, -3)


class Attention(nn.Module):
    config: T5Config
    execution: Execution

    def setup(self):
        c, joined = self.config, self.config.heads * self.config.head_width
        query, into = (
            nn.initializers.normal(s) for s in ((c.width * c.head_width) ** -0.5, c.width**-0.5)
        )
        self.query = weight(self, "query", query, embed=c.width, heads=joined)
        self.key = weight(self, "key", into, embed=c.width, heads=joined)
        self.value = weight(self, "value", into, embed=c.width, heads=joined)
        out = nn.initializers.normal(joined**-0.5)
        self.out = weight(self, "out", out, heads=joined, embed=c.width)

    def read(self, x: Float[Array, "B S D"]) -> KeyValue:
        heads = self.config.heads
        keys, values = dense(x, self.key), dense(x, self.value)
        return KeyValue(split_heads(keys, heads), split_heads(values, heads))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: KeyValue,
        mask: Bool[Array, "B 1 T S"],
        bias: Float[Array, "#B N T S"] | None,
    ) -> Float[Array, "B T D"]:
        rate = self.config.dropout
        key = dropout_key(self, rate)
        queries = split_heads(dense(x, self.query), self.config.heads)
        # Rows that share a source (beams) read it together, as if their queries were one row's.
        queries = queries.reshape(source.keys.shape[0], -1, *queries.shape[2:])
        context = attention(
            queries, *source, mask, bias, rate=rate, key=key, execution=self.execution
        )
        return dense(context.reshape(*x.shape[:2], -1), self.out)


class FeedForward(nn.Module):
    config: T5Config
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        into = nn.initializers.normal(c.width**-0.5)
        if c.gated:
            gate = weight(self, "gate", into, embed=c.width, mlp=c.feed_forward)
            up = weight(self, "up", into, embed=c.width, mlp=c.feed_forward)
            hidden = nn.gelu(dense(x, gate), approximate=True) * dense(x, up)
        else:
            up = weight(self, "up", into, embed=c.width, mlp=c.feed_forward)
            hidden = nn.relu(dense(x, up))
        hidden = constrain(hidden, "batch", "activation_length", "activation_mlp")
        out = nn.initializers.normal(c.feed_forward**-0.5)
        down = weight(self, "down", out, mlp=c.feed_forward, embed=c.width)
        return dense(dropout(self, hidden, c.dropout), down)


class EncoderLayer(nn.Module):
    config: T5Config
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], mask, bias) -> tuple[Float[Array, "B S D"], None]:
        c, e = self.config, self.execution
        normed = RMSNorm(c.norm_epsilon, e, name="attention_norm")(x)
        attend = Attention(c, e, name="attention")
        x = x + dropout(self, attend(normed, attend.read(normed), mask, bias), c.dropout)
        normed = RMSNorm(c.norm_epsilon, e, name="feed_forward_norm")(x)
        x = x + dropout(self, FeedForward(c, e, name="feed_forward")(normed), c.dropout)
        return constrain(x, "batch", "activation_length", "activation_embed"), None


class DecoderLayer(nn.Module):
    config: T5Config
    execution: Execution

    def setup(self):
        c, e = self.config, self.execution
        self.attention_norm = RMSNorm(c.norm_epsilon, e)
        self.attention = Attention(c, e)
        self.cross_attention_norm = RMSNorm(c.norm_epsilon, e)
        self.cross_attention = Attention(c, e)
        self.feed_forward_norm = RMSNorm(c.norm_epsilon, e)
        self.feed_forward = FeedForward(c, e)

    def __call__(
        self, x: Float[Array, "B T D"], encoded: Float[Array, "B S D"], mask, cross_mask, bias
    ) -> tuple[Float[Array, "B T D"], None]:
        """All positions at once, for training."""
        normed = self.attention_norm(x)
        own = self.attention.read(normed)
        return self.attend(x, normed, own, self.remember(encoded), mask, cross_mask, bias), None

    def remember(self, encoded: Float[Array, "B S D"]) -> KeyValue:
        """What the cross-attention reads of the encoder's output."""
        return self.cross_attention.read(encoded)

    def extend(
        self, x: Float[Array, "B T D"], state: LayerState, length, mask, cross_mask, bias
    ) -> tuple[Float[Array, "B T D"], LayerState]:
        """The next T positions of each row, after the `length` that its past holds."""
        normed = self.attention_norm(x)
        new = self.attention.read(normed).swapped()
        past = state.past.extended(new, length)
        own, memory = past.swapped(), state.memory.swapped()
        x = self.attend(x, normed, own, memory, mask, cross_mask, bias)
        return x, LayerState(past, state.memory)

    def attend(self, x, normed, own: KeyValue, memory: KeyValue, mask, cross_mask, bias):
        rate = self.config.dropout
        x = x + dropout(self, self.attention(normed, own, mask, bias), rate)
        normed = self.cross_attention_norm(x)
        x = x + dropout(self, self.cross_attention(normed, memory, cross_mask, None), rate)
        x = x + dropout(self, self.feed_forward(self.feed_forward_norm(x)), rate)
        return constrain(x, "batch", "activation_length", "activation_embed")


class Encoder(nn.Module):
    config: T5Config
    execution: Execution

    def setup(self):
        c, e = self.config, self.execution
        self.relative_bias = RelativeBias(c, e, bidirectional=True)
        self.layers = stack(EncoderLayer, c.layers, e, inputs=2)(c, e)
        self.final_norm = RMSNorm(c.norm_epsilon, e)

    def __call__(self, x: Float[Array, "B S D"], segments: Int[Array, "B S"]):
        positions = jnp.arange(x.shape[1])
        bias = self.relative_bias(positions, positions)[None]
        x, _ = self.layers(x, same_segment(segments, segments), bias)
        return dropout(self, self.final_norm(x), self.config.dropout)


class Decoder(nn.Module):
    config: T5Config
    execution: Execution

    def setup(self):
        c, e = self.config, self.execution
        self.relative_bias = RelativeBias(c, e, bidirectional=False)
        self.layers = stack(DecoderLayer, c.decoder_layers, e, inputs=4)(c, e)
        self.final_norm = RMSNorm(c.norm_epsilon, e)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        segments: Int[Array, "B T"],
        encoded_segments: Int[Array, "B S"],
    ) -> Float[Array, "B T D"]:
        positions = jnp.arange(x.shape[1])
        bias = self.relative_bias(positions, positions)[None]
        causal = same_segment(segments, segments) & (positions <= positions[:, None])
        x, _ = self.layers(x, encoded, causal, same_segment(segments, encoded_segments), bias)
        return dropout(self, self.final_norm(x), self.config.dropout)


class T5(nn.Module):
    """A text-to-text model.

    Token ids: 0 is padding and starts the decoder. Segment ids number the texts packed in a row
    from 1, with 0 for padding; left out, `inputs` is one text padded with token 0, and targets are
    one text (what follows it cannot reach it).
    """

    config: T5Config
    execution: Execution = Execution()

    def setup(self):
        c, e = self.config, self.execution
        self.embedding = weight(
            self, "embedding", nn.initializers.normal(1.0), vocab=c.vocab, embed=c.width
        )
        self.encoder = Encoder(c, e)
        self.decoder = Decoder(c, e)
        if not c.tied:
            init = nn.initializers.normal(c.width**-0.5)
            self.output = weight(self, "output", init, vocab=c.vocab, embed=c.width)

    def __call__(
        self,
        inputs: Int[Array, "B S"],
        decoder_inputs: Int[Array, "B T"],
        inputs_segment_ids: Int[Array, "B S"] | None = None,
        targets_segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the target after each of `decoder_inputs` (targets shifted right), float32."""
        return self.logits(
            self.features(inputs, decoder_inputs, inputs_segment_ids, targets_segment_ids)
        )

    def features(
        self,
        inputs: Int[Array, "B S"],
        decoder_inputs: Int[Array, "B T"],
        inputs_segment_ids: Int[Array, "B S"] | None = None,
        targets_segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the output matrix multiplies; losses take this, so full logits need not exist."""
        if inputs_segment_ids is None:
            inputs_segment_ids = (inputs != 0).astype(jnp.int32)
        if targets_segment_ids is None:
            targets_segment_ids = jnp.ones_like(decoder_inputs)
        encoded = self.encode(inputs, inputs_segment_ids)
        x = self.decoder(
            self.embed(decoder_inputs), encoded, targets_segment_ids, inputs_segment_ids
        )
        return self.scale(x)

    def encode(self, inputs: Int[Array, "B S"], segments: Int[Array, "B S"]):
        return self.encoder(self.embed(inputs), segments)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = dropout(self, lookup(self.embedding, tokens), self.config.dropout)
        return constrain(x, "batch", "activation_length", "activation_embed")

    def scale(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x * self.config.width**-0.5 if self.config.tied else x

    def output_matrix(self) -> Float[Array, "V D"]:
        return self.embedding if self.config.tied else self.output

    def logits(self, features: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return all_logits(features, self.output_matrix())


def start_decoding(
    model: T5,
    params,
    inputs: Int[Array, "B S"],
    length: int,
    inputs_segment_ids: Int[Array, "B S"] | None = None,
    beams: int = 1,
) -> DecodingState:
    """Reads `inputs` and makes room for `length` tokens of B x `beams` decoder rows."""
    c = model.config
    segments = (inputs != 0).astype(jnp.int32) if inputs_segment_ids is None else inputs_segment_ids
    encoded = model.apply({"params": params}, inputs, segments, method=T5.encode)
    rows = inputs.shape[0] * beams
    room = jnp.zeros((rows, c.heads, length, c.head_width), model.execution.dtype)
    layer = DecoderLayer(c, model.execution)
    layers = tuple(
        LayerState(
            KeyValue(room, room),
            layer.apply({"params": own}, encoded, method=DecoderLayer.remember).swapped().settled(),
        )
        for own in unstacked(params["decoder"]["layers"], c.decoder_layers)
    )
    return DecodingState(layers, jnp.zeros(rows, jnp.int32), segments > 0)


def extend(
    model: T5, params, tokens: Int[Array, "rows T"], state: DecodingState
) -> tuple[Float[Array, "rows T V"], DecodingState]:
    """Reads T >= 1 more decoder tokens of each row (the first is 0); logits of their successors."""
    return extender(model, params)(tokens, state)


def extender(model: T5, params):
    """`extend` of a model and its parameters, for use in a loop: `(tokens, state)` to the same.

    The stacked parameters are taken apart here, once, and used layer by layer, which decodes faster
    than a scan and lets a caller differentiate with respect to `state`.
    """
    c = model.config
    execution = dataclasses.replace(model.execution, attention="whole")
    layer = DecoderLayer(c, execution)
    own = unstacked(params["decoder"]["layers"], c.decoder_layers)

    def extend(tokens, state):
        bound = T5(c, execution).bind({"params": params})
        queries = state.length[:, None] + jnp.arange(tokens.shape[1])
        keys = jnp.arange(state.layers[0].past.keys.shape[2])
        bias = bound.decoder.relative_bias(queries, keys)
        mask = (keys <= queries[..., None])[:, None]
        cross_mask = state.visible[:, None, None]

        x, layers = bound.embed(tokens), []
        for parameters, past in zip(own, state.layers, strict=True):
            inputs = (x, past, state.length, mask, cross_mask, bias)
            x, past = layer.apply({"params": parameters}, *inputs, method=DecoderLayer.extend)
            layers.append(past)
        features = bound.scale(bound.decoder.final_norm(x))
        logits = few_rows_logits(features, bound.output_matrix())
        return logits, DecodingState(tuple(layers), state.length + tokens.shape[1], state.visible)

    return extend
