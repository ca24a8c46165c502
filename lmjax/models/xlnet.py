"""XLNet: a language model that guesses words in any order, with a memory of what came before.

Papers: Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language
Understanding", sections 2.2 to 2.5; Dai et al. 2019, "Transformer-XL". Reference files:
zihangdai/xlnet modeling.py; transformers modeling_xlnet.py.
Axes: B batch, T query length, S key length (memory and text), M memory length, P distances,
R predicted places, D width, N heads, H head width, F feed-forward width, V vocabulary, L layers.

What is peculiar to XLNet: no positions are added to words; attention scores know how far a key is
(a sinusoid behind a kernel of its own) and whether it is in the same segment, with three biases on
the query. A layer reads the hidden states that the text before has left in its memory. Where words
are to be guessed, a second stream of queries, which know their place but not its word, goes through
the same layers and reads the first stream's keys. Which words a token sees is said by one number
each: its `order` in the factorization. Norms come after the sublayers; the output matrix is the
embedding, with a bias.
Departures: dropout on the sinusoids is the same for all rows of a batch. Of the segment term only
the difference between "another segment" and "the same" is computed, as softmax ignores what all
keys have in common. `order` stands for the reference's `perm_mask`, and `places` for its
`target_mapping`; masks in which what a token sees follows from no order are not to be had. A text
is classified by its last token even if padding follows; the reference reads the row's last place.
"""

import dataclasses
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.models.layers import (
    Classifier,
    Execution,
    KeyValue,
    LayerNorm,
    Pooler,
    affine,
    all_logits,
    attend,
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
    same_segment,
    split_heads,
    stack,
    unstacked,
    weight,
    whole_attention,
)


@dataclasses.dataclass(frozen=True)
class XLNetConfig:
    """What an XLNet is; the defaults are xlnet-base-cased."""

    vocab: int = 32_000
    """Rows of the embedding: the tokenizer's ids."""
    layers: int = 12
    width: int = 768
    """D, of the residual stream; the heads divide it among them, and it is even."""
    heads: int = 12
    feed_forward: int = 3_072
    """F, the hidden width of the feed-forward layers."""
    activation: Literal["gelu", "tanh_gelu", "relu"] = "gelu"
    """Of the feed-forward layers; transformers has exact GELU, the first code its approximation."""
    causal: bool = False
    """No token sees a later one, whatever the order (attention type "uni")."""
    memory: int = 0
    """M, hidden states per layer that are kept for the text that follows."""
    reuse: int | None = None
    """How many of a text's first tokens go into memory, because the next text begins after them;
    None for all."""
    kind: Literal["lm", "text_classifier", "token_classifier", "span"] = "lm"
    """What is on top: guesses of words or, to be fine-tuned, classes of texts (by their last
    token), of tokens, or the first and the last token of an answer."""
    labels: int = 2
    """Classes that a classifier tells apart."""
    dropout: float = 0.1
    """After the embedding, on sinusoids and attention weights, within and after sublayers, and on
    what comes out."""
    norm_epsilon: float = 1e-12
    init_scale: float = 0.02
    """Standard deviation of weights before training; narrow models learn faster with more."""

    def __post_init__(self):
        check_config(self, "vocab", "layers", "width", "heads", "feed_forward", "labels")
        check_heads(self)
        if self.width % 2:
            raise ValueError(
                f"XLNetConfig.width is {self.width}, but sines and cosines share it: choose an even"
                " width"
            )
        check_choices(self, "activation", "kind")
        if self.memory < 0 or (self.reuse is not None and self.reuse < 1):
            raise ValueError(
                f"XLNetConfig.memory is {self.memory} and reuse {self.reuse}: expected 0 or more,"
                " and 1 or more (or None, for all tokens)"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def init(self) -> nn.initializers.Initializer:
        return nn.initializers.normal(self.init_scale)

    def training_flops(self, batch: int, length: int, predicted: int) -> float:
        """Floating-point operations of the products in one step: forwards, and twice backwards.

        Attention scores count in full, as in PaLM's appendix B; recomputation does not count.
        """
        d, keys = self.width, self.memory + length
        row = 2 * d**2 + 2 * d * self.feed_forward  # the query and output kernels
        row += (2 * keys + keys + length) * d  # contents, and distances
        row = (length + predicted) * row + keys * 2 * d**2
        distances = (keys + length) * d**2  # once for all rows of a batch
        logits = predicted * d * self.vocab
        return 6.0 * (self.layers * (batch * row + distances) + batch * logits)


PRESETS = {
    "base": XLNetConfig(),
    "large": XLNetConfig(layers=24, width=1_024, heads=16, feed_forward=4_096),
}


class DecodingState(NamedTuple):
    """All that decoding carries; the first axis of every array is rows, or 1 in `distances`."""

    layers: tuple[KeyValue, ...]
    """Keys and values [rows, N, S, H] of memory and contents, in buffers of fixed length."""
    distances: tuple[Float[Array, "1 P N H"], ...]
    """The keys of the distances S, S - 1, ..., 0 in each layer."""
    length: Int[Array, " rows"]
    """States of memory, and tokens of each row read so far."""


class View(NamedTuple):
    """What the rows of a stream see of the keys; the batch's axis is 1 where all texts agree."""

    mask: Bool[Array, "#B 1 T S"]
    other_segment: Bool[Array, "#B 1 T S"] | None
    """Which keys are in another segment (sentence A or B) than the row; None if none is."""
    places: Int[Array, "B T"] | None
    """Where in the text each row is; None if row i is at place i."""
    backward: Bool[Array, " B"] | None
    """Which texts are written from right to left; None if none is."""


def relative_shift(
    scores: Float[Array, "*rows T P"], keys: int, places: Int[Array, "*rows T"] | None = None
) -> Float[Array, "*rows T S"]:
    """From scores by distance, those of each key (Transformer-XL, appendix B).

    Column 0 of `scores` is the distance S = `keys`, and each next column one less, to 1 - length of
    the text. Row i is at place i of the text, or `places[i]`; the text ends with the last key.
    """
    *rows, length, distances = scores.shape
    if places is None:
        # Each row is one longer than it should be, so that the next one starts one further left.
        scores = scores.reshape(*rows, distances, length)[..., 1:, :]
        return scores.reshape(*rows, length, distances - 1)[..., :keys]
    columns = (distances - keys - places)[..., None] + jnp.arange(keys)
    return jnp.take_along_axis(scores, columns, axis=-1)


def sinusoids(distances: Int[Array, " P"], width: int) -> Float[Array, "P D"]:
    """All sines, then all cosines."""
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = distances[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def remember(
    config: XLNetConfig, memory: Float[Array, "B M D"], x: Float[Array, "B T D"]
) -> Float[Array, "B M D"]:
    """The last `config.memory` states of the memory and of what is to be reused of x."""
    states = jnp.concatenate([memory, x[:, : config.reuse]], axis=1)
    return jax.lax.stop_gradient(states[:, max(states.shape[1] - config.memory, 0) :])


class Attention(nn.Module):
    """Attention that knows distances and segments, between two products with kernels."""

    config: XLNetConfig
    execution: Execution

    def setup(self):
        width, init = self.config.width, self.config.init
        into = {"embed": width, "heads": width}
        self.query = weight(self, "query", init, **into)
        self.key = weight(self, "key", init, **into)
        self.value = weight(self, "value", init, **into)
        self.distance = weight(self, "distance", init, **into)
        self.out = weight(self, "out", init, heads=width, embed=width)
        self.content_bias = weight(self, "content_bias", init, heads=width)
        self.distance_bias = weight(self, "distance_bias", init, heads=width)
        self.segment_bias = weight(self, "segment_bias", init, heads=width)
        self.segments = weight(self, "segments", init, types=2, heads=width)

    def read(self, x: Float[Array, "B S D"]) -> KeyValue:
        heads = self.config.heads
        return KeyValue(
            split_heads(dense(x, self.key), heads), split_heads(dense(x, self.value), heads)
        )

    def read_distances(self, encodings: Float[Array, "#2 P D"]) -> Float[Array, "#2 P N H"]:
        """The keys of distances, forwards and, if there are two, backwards."""
        keys = dense(encodings, self.distance)
        return keys.reshape(*keys.shape[:2], self.config.heads, -1)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: KeyValue,
        distances: Float[Array, "#2 P N H"],
        view: View,
    ) -> Float[Array, "B T D"]:
        c = self.config
        queries = split_heads(dense(x, self.query), c.heads)
        biases = (self.content_bias, self.distance_bias, self.segment_bias)
        content, distance, segment = (bias.reshape(c.heads, -1) for bias in biases)
        same, other = self.segments.reshape(2, c.heads, -1)
        scale = c.head_width**-0.5

        def attention(operands, key):
            q, (keys, values), view = operands
            by_distance = distances[0]
            if view.backward is not None:
                by_distance = jnp.where(view.backward[..., None, None, None], *distances[::-1])
            scores = jnp.einsum(
                "...TNH,...PNH->...NTP",
                (q + distance) * scale,
                by_distance,
                preferred_element_type=jnp.float32,
            )
            places = None if view.places is None else view.places[..., None, :]
            bias = relative_shift(scores, keys.shape[-3], places)
            if view.other_segment is not None:
                elsewhere = jnp.einsum("...TNH,NH->...NT", (q + segment) * scale, other - same)
                bias += jnp.where(view.other_segment, elsewhere[..., None], 0)
            q = (q + content) * scale
            return whole_attention(q, keys, values, view.mask, bias, rate=c.dropout, key=key)

        key = dropout_key(self, c.dropout)
        context = attend(attention, (queries, source, view), key, self.execution)
        return dense(context.reshape(x.shape), self.out)


class FeedForward(nn.Module):
    config: XLNetConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        hidden = affine(self, x, "up", c.init, embed=c.width, mlp=c.feed_forward)
        if c.activation == "relu":
            hidden = nn.relu(hidden)
        else:
            hidden = nn.gelu(hidden, approximate=c.activation == "tanh_gelu")
        hidden = constrain(hidden, "batch", "activation_length", "activation_mlp")
        hidden = dropout(self, hidden, c.dropout)
        return affine(self, hidden, "down", c.init, mlp=c.feed_forward, embed=c.width)


class Layer(nn.Module):
    config: XLNetConfig
    execution: Execution

    def setup(self):
        c, e = self.config, self.execution
        self.attention = Attention(c, e)
        self.attention_norm = LayerNorm(c.norm_epsilon, e)
        self.feed_forward = FeedForward(c, e)
        self.feed_forward_norm = LayerNorm(c.norm_epsilon, e)

    def __call__(
        self,
        streams: tuple[Float[Array, "B T D"], Float[Array, "B R D"] | None],
        memory: Float[Array, "B M D"],
        encodings: Float[Array, "#2 P D"],
        views: tuple[View, View | None],
    ):
        """(streams, memory) after this layer; both streams read the contents before it."""
        x, _ = streams
        source = self.attention.read(jnp.concatenate([memory, x], axis=1))
        distances = self.attention.read_distances(encodings)
        streams = tuple(
            None if stream is None else self.update(stream, source, distances, view)
            for stream, view in zip(streams, views, strict=True)
        )
        return streams, remember(self.config, memory, x)

    def extend(
        self,
        streams: tuple[Float[Array, "B T D"], Float[Array, "B T D"]],
        past: KeyValue,
        length: Int[Array, " B"],
        distances: Float[Array, "1 P N H"],
        views: tuple[View, View],
    ) -> tuple[tuple[Float[Array, "B T D"], Float[Array, "B T D"]], KeyValue]:
        """(streams, past) after this layer, which has read `length` contents before these."""
        past = past.extended(self.attention.read(streams[0]).swapped(), length)
        source = past.swapped()
        streams = tuple(
            self.update(stream, source, distances, view)
            for stream, view in zip(streams, views, strict=True)
        )
        return streams, past

    def update(
        self, x: Float[Array, "B T D"], source: KeyValue, distances, view: View
    ) -> Float[Array, "B T D"]:
        rate = self.config.dropout
        attended = self.attention(x, source, distances, view)
        x = self.attention_norm(x + dropout(self, attended, rate))
        x = self.feed_forward_norm(x + dropout(self, self.feed_forward(x), rate))
        return constrain(x, "batch", "activation_length", "activation_embed")


class XLNet(nn.Module):
    """A language model with a memory, which guesses words in any order.

    `__call__` and `features` take

    * `inputs`, the words, none of them hidden;
    * `memory` that the text before has left, one entry per layer; nothing if left out;
    * `order`: token i reads the tokens j with `order[j] <= order[i]`; the guess at place i, those
      with `order[j] < order[i]`, so not its own word. Left out, all tokens read all;
    * `places` to guess, if any: then what comes out belongs to them, otherwise to the tokens;
    * `token_types` 0 or 1, for sentence A or B (memory is 0; the reference's CLS 2); left out, none
      is told apart;
    * `segment_ids` that number the texts packed in a row from 1, with 0 for padding; every text
      reads the memory. Left out, a row is one text;
    * `backward`, which rows are written from right to left; left out, none.
    """

    config: XLNetConfig
    execution: Execution = Execution()

    def setup(self):
        c, e = self.config, self.execution
        self.embedding = weight(self, "embedding", c.init, vocab=c.vocab, embed=c.width)
        self.mask_embedding = weight(self, "mask_embedding", c.init, embed=c.width)
        self.layers = stack(Layer, c.layers, e, inputs=2, own_inputs=1)(c, e)
        match c.kind:
            case "lm":
                self.output_bias = weight(
                    self, "output_bias", nn.initializers.zeros, "float32", vocab=c.vocab
                )
            case "text_classifier":
                self.pooler = Pooler(c.init, e)
                self.classifier = Classifier(c.labels, c.init, e, c.dropout)
            case "token_classifier":
                self.classifier = Classifier(c.labels, c.init, e)
            case "span":
                self.classifier = Classifier(2, c.init, e)

    def __call__(
        self, inputs: Int[Array, "B T"], memory: Float[Array, "L B M D"] | None = None, **more
    ) -> tuple[Float[Array, "B T V"] | Float[Array, "B *T labels"], Float[Array, "L B M D"]]:
        """(logits, memory): float32, of the word in each of `places`, or of what follows each token
        in a causal model; of a classifier of texts or tokens the logits of classes; of spans, of
        each token being the first of the answer, and the last. And what to remember when the next
        text is read. A text's last token is the last one in a row that is not padding."""
        x, memory = self.features(inputs, memory, **more)
        match self.config.kind:
            case "text_classifier":
                segment_ids = more.get("segment_ids")
                real = jnp.ones_like(inputs) if segment_ids is None else segment_ids
                return self.classifier(self.pooler(last_of(x, real > 0))), memory
            case "token_classifier" | "span":
                return self.classifier(x), memory
        return all_logits(x, self.embedding) + self.output_bias, memory

    def features(
        self,
        inputs: Int[Array, "B T"],
        memory: Float[Array, "L B M D"] | None = None,
        *,
        order: Int[Array, "B T"] | None = None,
        places: Int[Array, "B R"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        backward: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B M D"]]:
        """(what the output matrix multiplies before `vocabulary_bias`, memory); losses take this,
        so full logits need not exist.

        Raises:
            ValueError: a memory of another model or batch, or places without an order.
        """
        c, (batch, length) = self.config, inputs.shape
        if memory is None:
            memory = jnp.zeros((c.layers, batch, 0, c.width), self.execution.dtype)
        expected = (c.layers, batch, memory.shape[2] if memory.ndim == 4 else "any length", c.width)
        if memory.shape != expected:
            raise ValueError(
                f"the memory has shape {memory.shape}, but these texts and this XLNet need"
                f" {expected}: [layers, rows, states, width]"
            )
        if places is not None and order is None:
            raise ValueError(
                "places to guess need an order, or each would see its own word: give order"
            )
        before = memory.shape[2]
        text = (order, token_types, segment_ids)
        content = self.view(text, text, None, before, length, backward)
        x, g, queries = self.embed(inputs), None, None
        if places is not None:
            own = tuple(None if a is None else jnp.take_along_axis(a, places, 1) for a in text)
            queries = self.view(own, text, places, before, length, backward)
            g = jnp.broadcast_to(self.mask_embedding, (*places.shape, c.width))
            g = dropout(self, g, c.dropout)
        encodings = sinusoids(jnp.arange(before + length, -length, -1), c.width)[None]
        if backward is not None:
            flipped = encodings * jnp.repeat(jnp.array([-1, 1]), c.width // 2)
            encodings = jnp.concatenate([encodings, flipped])
        encodings = dropout(self, encodings.astype(self.execution.dtype), c.dropout)
        memory = memory.astype(self.execution.dtype)
        (x, g), memory = self.layers((x, g), memory, encodings, (content, queries))
        return dropout(self, x if g is None else g, c.dropout), memory

    def view(self, own, text, places, before: int, length: int, backward) -> View:
        """Of rows with `own` order, types and segments, over `before` states of memory and `text`.

        `places` of the rows that guess, None for the tokens themselves.
        """
        (order, types, segments), (text_order, text_types, text_segments) = own, text
        keys = jnp.arange(length)
        at = keys[None] if places is None else places
        rows = at.shape[1]
        mask = jnp.ones((1, 1, rows, length), bool)
        if self.config.causal:
            mask = mask & (keys <= at[..., None])[:, None]
        if order is not None:
            later = text_order[:, None, :] - order[:, :, None]
            mask = mask & (later <= 0 if places is None else later < 0)[:, None]
        if segments is not None:
            mask = mask & same_segment(segments, text_segments)
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (before, 0)), constant_values=True)
        other = None
        if types is not None:
            other = ~same_segment(types, jnp.pad(text_types, ((0, 0), (before, 0))))
        return View(mask, other, places, backward)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = lookup(self.embedding, tokens)
        x = constrain(x, "batch", "activation_length", "activation_embed")
        return dropout(self, x, self.config.dropout)

    def vocabulary_bias(self) -> Float[Array, " V"]:
        """float32."""
        return self.output_bias

    def output_matrix(self) -> Float[Array, "V D"]:
        return self.embedding


def no_memory(config: XLNetConfig, rows: int, dtype: str = "float32") -> Float[Array, "L B M D"]:
    """Of full length and zero, as the reference begins its training."""
    return jnp.zeros((config.layers, rows, config.memory, config.width), dtype)


def start_decoding(
    model: XLNet, params, rows: int, length: int, memory: Float[Array, "L rows M D"] | None = None
) -> DecodingState:
    """Room for `length` tokens of each of `rows` texts, after the `memory` of what went before."""
    c, dtype = model.config, model.execution.dtype
    before = 0 if memory is None else memory.shape[2]
    room = jnp.zeros((rows, c.heads, before + length, c.head_width), dtype)
    read, layers, distances = jnp.zeros(rows, jnp.int32), [], []
    encodings = sinusoids(jnp.arange(before + length, -1, -1), c.width)[None].astype(dtype)
    attention = Attention(c, model.execution)
    for i, own in enumerate(unstacked(params["layers"], c.layers)):
        bound = attention.bind({"params": own["attention"]})
        past = KeyValue(room, room)
        if before:
            past = past.extended(bound.read(memory[i].astype(dtype)).swapped(), read)
        layers.append(past)
        distances.append(bound.read_distances(encodings))
    return DecodingState(tuple(layers), tuple(distances), read + before)


def extend(
    model: XLNet, params, tokens: Int[Array, "rows T"], state: DecodingState
) -> tuple[Float[Array, "rows T V"], DecodingState]:
    """Reads T >= 1 more tokens of each row; logits of their successors.

    The order is that of the text: a token reads itself and those before it, and a query at the next
    place, which knows no word, guesses its successor from the same.
    """
    return extender(model, params)(tokens, state)


def extender(model: XLNet, params):
    """`extend` of a model and its parameters, for use in a loop: `(tokens, state)` to the same.

    The stacked parameters are taken apart here, once, and used layer by layer.
    """
    c = model.config
    execution = dataclasses.replace(model.execution, attention="whole")
    layer = Layer(c, execution)
    own = unstacked(params["layers"], c.layers)

    def extend(tokens, state):
        bound = XLNet(c, execution).bind({"params": params})
        keys = state.layers[0].keys.shape[2]
        places = state.length[:, None] + jnp.arange(tokens.shape[1])
        mask = (jnp.arange(keys) <= places[..., None])[:, None]
        # `relative_shift` counts places from the last key where the last distance is 0.
        views = tuple(View(mask, None, places + next - (keys - 1), None) for next in (0, 1))
        x = bound.embed(tokens)
        streams, layers = (x, jnp.broadcast_to(bound.mask_embedding, x.shape)), []
        for parameters, past, distances in zip(own, state.layers, state.distances, strict=True):
            streams, past = layer.apply(
                {"params": parameters}, streams, past, state.length, distances, views,
                method="extend",
            )  # fmt: skip
            layers.append(past)
        logits = few_rows_logits(streams[1], bound.output_matrix()) + bound.vocabulary_bias()
        length = state.length + tokens.shape[1]
        return logits, state._replace(layers=tuple(layers), length=length)

    return extend
