"""DALL-E: a decoder that continues a caption with the tokens of a picture.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.2 and appendix B.
Reference for what the paper leaves open: lucidrains/DALLE-pytorch.
Axes: B batch, S stream (text, then image), T query length, D width, N heads, H head width, V
vocabulary; of an image's positions L lines (rows or columns) of C each, K keys that a line reads.

What is peculiar to DALL-E: text and image are one stream of one vocabulary. A caption is padded
with tokens that are learned for each position, and predicted. Every image position sees all of the
text and a few image positions, which differ by layer: the row that ends there, its column, or (the
last layer) a convolution's neighbourhood; one softmax goes over both. The products are those of the
blocks in which the keys lie, not the stream's square. Image positions have row and column
embeddings. Text is predicted among text rows, image among image rows of an output matrix that is
not tied.
What the paper does not say: norms, activation and initial weights are GPT-2's. What starts the
stream is position 0's padding, for which no parameters are needed. Position p reads token p - 1,
has the place of token p and predicts token p; masks are of positions. So nothing stands between
text and image: the last text token is what section 2.2 calls the start of the image, and has the
first code's row and column; figure 10 may be read so that each code has its own ones instead.
Departures: none of the image is seen out of raster order, as it would be if the row's window were
taken literally down columns. Gradients are scaled by residual branches (section 2.4) where `scales`
are given, for float16; in bfloat16 they need not be. Biases within branches have float16 gradients
then, in the paper float32.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.models.gpt2 import INIT, FeedForward, residual_init
from lmjax.models.layers import (
    Execution,
    KeyValue,
    LayerNorm,
    LayerState,
    affine,
    all_logits,
    attend,
    check_config,
    check_heads,
    constrain,
    drop,
    dropout,
    dropout_key,
    few_rows_logits,
    into_branch,
    lookup,
    out_of_branch,
    rematerialised,
    split_heads,
    stack,
    unstacked,
    weight,
    whole_attention,
)

Kind = Literal["row", "column", "conv"]
BLOCK: tuple[Kind, ...] = ("row", "column", "row", "row")
"""The kinds of layers that repeat; the last layer of a model is "conv"."""


@dataclasses.dataclass(frozen=True)
class DALLEConfig:
    """What a DALL-E's transformer is; the defaults are the paper's."""

    text_vocab: int = 16_384
    """The tokenizer's ids."""
    text_length: int = 256
    """Text positions of the stream, the most tokens of a caption."""
    image_vocab: int = 8_192
    """Codes of the picture's tokens."""
    grid: int = 32
    """Rows and columns of a picture's tokens."""
    layers: int = 64
    width: int = 3_968
    """D, of the residual stream; the heads divide it among them."""
    heads: int = 62
    feed_forward: int = 15_872
    """F, the hidden width of the feed-forward layers."""
    conv_extent: int = 11
    """Columns, an odd number, that the last layer's convolution sees around a position, and half as
    many rows above; columns wrap around."""
    dropout: float = 0.0
    """After the embedding, on attention weights, and after sublayers."""
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        sizes = ("text_vocab", "text_length", "image_vocab", "grid", "layers", "width", "heads")
        check_config(self, *sizes, "feed_forward", "conv_extent")
        check_heads(self)
        if self.conv_extent % 2 == 0 or self.conv_extent > self.grid:
            raise ValueError(
                f"DALLEConfig.conv_extent is {self.conv_extent}, not an odd number up to the grid's"
                f" {self.grid} columns"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def image_length(self) -> int:
        return self.grid**2

    @property
    def length(self) -> int:
        """S, of the stream."""
        return self.text_length + self.image_length

    @property
    def vocab(self) -> int:
        """V: image codes, so that a code is its own row; then the tokenizer's ids; then the padding
        of each text position."""
        return self.image_vocab + self.text_vocab + self.text_length

    @property
    def start(self) -> int:
        """What the first position reads: its own padding."""
        return self.image_vocab + self.text_vocab

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of each layer, as in appendix B.1."""
        return tuple(BLOCK[i % len(BLOCK)] for i in range(self.layers - 1)) + ("conv",)

    @property
    def blocks(self) -> int:
        """Whole blocks before the last layer; the layers that are left stand alone."""
        return (self.layers - 1) // len(BLOCK)

    def lines_above(self, kind: Kind) -> int:
        """How many lines a position's keys reach back: they are rows, or columns for "column"."""
        reach = {"row": 1, "column": 0, "conv": self.conv_extent // 2 + 1}[kind]
        return min(reach, self.grid - 1)

    def image_reach(self, kind: Kind) -> int:
        """How many positions before its own an image position sees at most."""
        half = self.conv_extent // 2
        reach = {"row": self.grid, "column": self.image_length, "conv": half * (self.grid + 1)}
        return min(reach[kind], self.image_length - 1)

    def scores(self, kind: Kind) -> int:
        """Pairs of a query and a key that a layer multiplies, masked ones in its blocks too."""
        keys = self.text_length + self.grid * (1 + self.lines_above(kind))
        return self.text_length**2 + self.image_length * keys

    def training_flops(self, batch: int) -> float:
        """Floating-point operations of the products in one step: forwards, and twice backwards.

        Attention counts as it is computed, by blocks; recomputation does not count.
        """
        kernels = self.length * (4 * self.width**2 + 2 * self.width * self.feed_forward)
        scores = 2 * self.width * sum(map(self.scores, self.kinds))
        rows = self.text_length * (self.text_vocab + self.text_length)
        rows += self.image_length * self.image_vocab
        return 6.0 * batch * (self.layers * kernels + scores + self.width * rows)


COCO = DALLEConfig(layers=24, width=512, heads=8, feed_forward=2_048)
"""The paper's shape with a 120th of its parameters: as deep as that allows, with heads of 64."""
PRESETS = {
    "12b": DALLEConfig(),
    "coco": COCO,
    "korean-coco": COCO,  # another tokenizer with as many ids
    "emoji": DALLEConfig(
        text_vocab=2_048,
        text_length=24,
        image_vocab=512,
        grid=8,
        layers=3,
        width=160,
        heads=5,
        feed_forward=640,
        conv_extent=3,
    ),
}


# --- which positions a position sees


def sees(
    config: DALLEConfig, kind: Kind, query: Int[Array, "*shape"], key: Int[Array, "*shape"]
) -> Bool[Array, "*shape"]:
    """Whether the image position `query` sees the image position `key`, both in raster order.

    Rows are windows: the grid's width of positions before the query, and itself. The convolution
    goes by raster order as well, so that columns wrap around.
    """
    back = query - key
    if kind == "row":
        return (back >= 0) & (back <= config.grid)
    if kind == "column":
        return (back >= 0) & (back % config.grid == 0)
    half = config.conv_extent // 2
    rows, columns = jnp.divmod(back + half, config.grid)
    return (back >= 0) & (rows <= half) & (columns < config.conv_extent)


def mask(kind: Kind, config: DALLEConfig) -> Bool[Array, "S S"]:
    """Which positions of the stream each one sees: what layers compute by blocks, in full."""
    places = jnp.arange(config.length)
    image = places - config.text_length
    seen = sees(config, kind, image[:, None], image) & (image >= 0)
    return jnp.where(image[:, None] < 0, places <= places[:, None], seen | (image < 0))


# --- attention by blocks


def stream_attention(
    config: DALLEConfig,
    kind: Kind,
    q: Float[Array, "*B S N H"],
    k: Float[Array, "*B S N H"],
    v: Float[Array, "*B S N H"],
    *,
    rate: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "*B S N H"]:
    """Attention of a whole stream, or of its text alone; the caller scales `q`."""
    c, length = config, q.shape[-3]
    text_key, image_key = (None, None) if key is None else jax.random.split(key)
    places = jnp.arange(c.text_length)
    (q_text, q), (k_text, k), (v_text, v) = (
        jnp.split(x, [c.text_length], axis=-3) for x in (q, k, v)
    )
    causal = places <= places[:, None]
    text = whole_attention(q_text, k_text, v_text, causal, rate=rate, key=text_key)
    if length == c.text_length:
        return text
    places = jnp.arange(c.image_length)[:, None, None]
    queries, keys = in_lines(c, kind, places), seen_by_lines(c, kind, places + 1) - 1
    queries, keys = queries[..., None, 0, 0], keys[:, None, :, 0, 0]
    image = joint_attention(
        in_lines(c, kind, q),
        KeyValue(k_text, v_text),
        KeyValue(seen_by_lines(c, kind, k), seen_by_lines(c, kind, v)),
        sees(c, kind, queries, keys) & (keys >= 0),
        rate=rate,
        key=image_key,
    )
    image = image.swapaxes(-4, -3) if kind == "column" else image
    return jnp.concatenate([text, image.reshape(q.shape)], axis=-3)


def in_lines(
    config: DALLEConfig, kind: Kind, x: Float[Array, "*B L*C N H"]
) -> Float[Array, "*B L C N H"]:
    """Image positions by rows, or by columns where the layer's kind is "column"."""
    x = x.reshape(*x.shape[:-3], config.grid, config.grid, *x.shape[-2:])
    return x.swapaxes(-4, -3) if kind == "column" else x


def seen_by_lines(
    config: DALLEConfig, kind: Kind, x: Float[Array, "*B L*C N H"]
) -> Float[Array, "*B L K N H"]:
    """For each line what its positions may see: the lines that they reach back to and itself, with
    zeros above the first."""
    x, above = in_lines(config, kind, x), config.lines_above(kind)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 4) + [(above, 0), (0, 0), (0, 0), (0, 0)])
    shifted = [padded[..., i : i + config.grid, :, :, :] for i in range(above + 1)]
    return jnp.concatenate(shifted, axis=-3)


def joint_attention(
    q: Float[Array, "*B L C N H"],
    text: KeyValue,
    image: KeyValue,
    mask: Bool[Array, "*#B #N L C K"],
    *,
    rate: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "*B L C N H"]:
    """One softmax over the text [*B S N H], which all queries see, and the image keys of each line
    of queries [*B L K N H], which `mask` tells apart."""
    q = jnp.moveaxis(q, -2, -4)
    text = KeyValue(*(x.swapaxes(-2, -3) for x in text))
    image = KeyValue(*(jnp.moveaxis(x, -2, -4) for x in image))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    by_text = product("...NLCH,...NSH->...NLCS", q, text.keys)
    by_image = product("...NLCH,...NLKH->...NLCK", q, image.keys)
    by_image = jnp.where(mask, by_image, jnp.finfo(jnp.float32).min)

    highest = jnp.maximum(by_text.max(-1, keepdims=True), by_image.max(-1, keepdims=True))
    weights = [jnp.exp(x - jax.lax.stop_gradient(highest)) for x in (by_text, by_image)]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    if rate > 0 and key is not None:
        weights = [drop(x, rate, k) for x, k in zip(weights, jax.random.split(key), strict=True)]
    on_text, on_image = (x.astype(q.dtype) for x in weights)
    context = product("...NLCS,...NSH->...NLCH", on_text, text.values)
    context += product("...NLCK,...NLKH->...NLCH", on_image, image.values)
    return jnp.moveaxis((context / total).astype(q.dtype), -4, -2)


def cached_attention(
    config: DALLEConfig,
    kind: Kind,
    q: Float[Array, "rows T N H"],
    state: LayerState,
    length: Int[Array, " rows"],
) -> Float[Array, "rows T N H"]:
    """Attention of image positions from each row's `length` on, which are in the state already.

    Of the past only as much is read as any of them may see. Rows that share a text read it at once.
    """
    queries = length[:, None] + jnp.arange(q.shape[1])
    keys = seen_positions(config, kind, queries)
    past = KeyValue(
        *(jnp.take_along_axis(x, keys[:, None, :, None], axis=2) for x in state.past)
    ).swapped()
    seen = sees(config, kind, queries[:, :, None], keys[:, None, :])

    texts = state.memory.keys.shape[0]
    q_lines, *past, seen = (x.reshape(texts, -1, *x.shape[1:]) for x in (q, *past, seen))
    context = joint_attention(q_lines, state.memory.swapped(), KeyValue(*past), seen[:, None])
    return context.reshape(q.shape)


def seen_positions(
    config: DALLEConfig, kind: Kind, queries: Int[Array, "rows T"]
) -> Int[Array, "rows K"]:
    """Image positions among which are all that any of these consecutive ones see."""
    first, new = queries[:, :1], queries.shape[1]
    if kind == "column" and new == 1:
        return first % config.grid + config.grid * jnp.arange(config.grid)
    reach, room = config.image_reach(kind), config.image_length
    window = min(reach + new, room)
    return jnp.clip(first - reach, 0, room - window) + jnp.arange(window)


# --- the model


class Attention(nn.Module):
    config: DALLEConfig
    execution: Execution
    kind: Kind

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LayerState | None = None,
        length: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Reads a stream x, or the image positions x after a `state` with `length` of them; also
        keys and values, or the state's new past."""
        c = self.config

        def heads(name: str) -> Float[Array, "B T N H"]:
            y = affine(self, x, name, INIT, embed=c.width, heads=c.width)
            return split_heads(y, c.heads)

        queries, own = heads("query") * c.head_width**-0.5, KeyValue(heads("key"), heads("value"))
        if state is None:

            def attention(operands, key):
                return stream_attention(c, self.kind, *operands, rate=c.dropout, key=key)

            key = dropout_key(self, c.dropout)
            context = attend(attention, (queries, *own), key, self.execution)
        else:
            own = state.past.extended(own.swapped(), length)
            context = cached_attention(c, self.kind, queries, state._replace(past=own), length)
        context = context.reshape(x.shape)
        return affine(self, context, "out", residual_init(c), heads=c.width, embed=c.width), own


class Layer(nn.Module):
    config: DALLEConfig
    execution: Execution
    kind: Kind

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LayerState | None = None,
        length=None,
        scales: Float[Array, "2"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        c, e = self.config, self.execution
        of_attention, of_feed_forward = (None, None) if scales is None else scales
        normed = LayerNorm(c.norm_epsilon, e, name="attention_norm")(into_branch(x, of_attention))
        attended, own = Attention(c, e, self.kind, name="attention")(normed, state, length)
        x = x + out_of_branch(dropout(self, attended, c.dropout), of_attention)
        normed = LayerNorm(c.norm_epsilon, e, name="feed_forward_norm")(
            into_branch(x, of_feed_forward)
        )
        forward = dropout(self, FeedForward(c, e, name="feed_forward")(normed), c.dropout)
        x = x + out_of_branch(forward, of_feed_forward)
        return constrain(x, "batch", "activation_length", "activation_embed"), own


class Block(nn.Module):
    """The layers that repeat."""

    config: DALLEConfig
    execution: Execution

    def setup(self):
        self.layers = [Layer(self.config, self.execution, kind) for kind in BLOCK]

    def __call__(
        self, x: Float[Array, "B S D"], scales: Float[Array, "4 2"] | None
    ) -> tuple[Float[Array, "B S D"], None]:
        of_layers = [None] * len(BLOCK) if scales is None else scales
        for layer, own in zip(self.layers, of_layers, strict=True):
            x, _ = layer(x, scales=own)
        return x, None


class DALLE(nn.Module):
    """A model of streams, which `caption_tokens` and image codes make up, one after the other."""

    config: DALLEConfig
    execution: Execution = Execution()

    def setup(self):
        c, e = self.config, self.execution
        # What float16 would let vanish stays outside of it: the stream, and both of its ends.
        ends = dataclasses.replace(e, dtype="float32") if e.dtype == "float16" else e

        def table(name: str, **axes: int):
            return weight(self, name, INIT, ends.dtype, **axes, embed=c.width)

        self.embedding = table("embedding", vocab=c.vocab)
        self.positions = table("positions", positions=c.text_length)
        self.rows = table("rows", positions=c.grid)
        self.columns = table("columns", positions=c.grid)
        if c.blocks:
            self.blocks = stack(Block, c.blocks, e, inputs=0, own_inputs=1)(c, e)
        single = rematerialised(Layer, e)
        self.last = [single(c, e, kind) for kind in c.kinds[c.blocks * len(BLOCK) :]]
        self.final_norm = LayerNorm(c.norm_epsilon, ends)
        self.output = table("output", vocab=c.vocab)

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S V"]:
        """Logits of each token after those before it, float32; the lowest there are for image codes
        in the text and text in the image."""
        image = jnp.arange(self.config.vocab) < self.config.image_vocab
        possible = image == (jnp.arange(tokens.shape[1]) >= self.config.text_length)[:, None]
        logits = all_logits(self.features(tokens), self.output)
        return jnp.where(possible, logits, jnp.finfo(jnp.float32).min)

    def features(
        self, tokens: Int[Array, "B S"], scales: Float[Array, "layers 2"] | None = None
    ) -> Float[Array, "B S D"]:
        """What the output matrix multiplies to predict each of `tokens` from those before it.

        Args:
            scales: of the gradients within each layer's attention and feed-forward branch; those
                that come out must be divided by them, as `unscaled` does.

        Raises:
            ValueError: for tokens that are neither a whole stream nor its text.
        """
        c, x = self.config, self.embed_stream(tokens)
        stacked, single = None, [None] * len(self.last)
        if scales is not None:
            stacked, single = by_blocks(c, scales)
        if c.blocks:
            x, _ = self.blocks(x, stacked)
        for layer, own in zip(self.last, single, strict=True):
            x, _ = layer(x, scales=own)
        return self.final_norm(x)

    def embed_stream(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """What the layers read: at each position the token before it, in its own place."""
        c, length = self.config, tokens.shape[1]
        if length not in (c.text_length, c.length):
            raise ValueError(
                f"{length} tokens are no stream of this DALL-E: expected {c.text_length} of text,"
                f" and {c.image_length} of the image after it or none"
            )
        inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=c.start)
        return self.embed(inputs, jnp.arange(length))

    def embed(self, inputs: Int[Array, "B T"], places: Int[Array, "*B T"]) -> Float[Array, "B T D"]:
        c = self.config
        image = (self.rows[:, None] + self.columns).reshape(-1, c.width)
        x = lookup(self.embedding, inputs) + jnp.concatenate([self.positions, image])[places]
        x = constrain(x, "batch", "activation_length", "activation_embed")
        return dropout(self, x, c.dropout)

    def output_matrix(self) -> Float[Array, "V D"]:
        return self.output


def caption_tokens(
    config: DALLEConfig, captions: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> Int[Array, "B text"]:
    """The text of streams: captions in the tokenizer's ids, of `lengths` tokens each.

    What stands behind a shorter one is not read.

    Raises:
        ValueError: there is no room for captions of T tokens.
    """
    c, room = config, config.text_length - captions.shape[1]
    if room < 0:
        raise ValueError(
            f"captions of {captions.shape[1]} tokens do not fit the {c.text_length} for which this"
            " DALL-E has room: shorten them, or train a model with a larger text_length"
        )
    captions = jnp.pad(jnp.asarray(captions, jnp.int32), ((0, 0), (0, room)))
    places = jnp.arange(c.text_length)
    ids = jnp.where(places < lengths[:, None], captions, c.text_vocab + places)
    return c.image_vocab + ids


def layer_parameters(config: DALLEConfig, params) -> list:
    """The parameters of each layer, in the order of `config.kinds`."""
    blocks = unstacked(params["blocks"], config.blocks) if config.blocks else []
    layers = [block[f"layers_{i}"] for block in blocks for i in range(len(BLOCK))]
    return layers + [params[f"last_{i}"] for i in range(config.layers - len(layers))]


BRANCHES = (("attention_norm", "attention"), ("feed_forward_norm", "feed_forward"))
"""The parameters of a layer's two residual branches."""


def by_blocks(
    config: DALLEConfig, scales: Float[Array, "layers 2"]
) -> tuple[Float[Array, "blocks 4 2"], Float[Array, "single 2"]]:
    """Those of the stacked blocks' layers, and of the layers that stand alone."""
    stacked, single = jnp.split(scales, [config.blocks * len(BLOCK)])
    return stacked.reshape(config.blocks, len(BLOCK), 2), single


def unscaled(config: DALLEConfig, gradients, scales: Float[Array, "layers 2"]):
    """Gradients without the `scales` of their branches."""

    def layer(gradients, scales: Float[Array, "*blocks 2"]):
        """Of a stacked layer, those of each block."""
        found = dict(gradients)
        for branch, names in enumerate(BRANCHES):
            scale = scales[..., branch]
            for name in names:
                found[name] = jax.tree.map(
                    lambda x, s=scale: x / s.reshape(*s.shape, *[1] * (x.ndim - s.ndim)),
                    gradients[name],
                )
        return found

    stacked, single = by_blocks(config, scales)
    found = dict(gradients)
    if config.blocks:
        layers = {f"layers_{i}": stacked[:, i] for i in range(len(BLOCK))}
        found["blocks"] = {n: layer(gradients["blocks"][n], own) for n, own in layers.items()}
    layers = {f"last_{i}": own for i, own in enumerate(single)}
    return found | {name: layer(gradients[name], own) for name, own in layers.items()}


def finite_branches(config: DALLEConfig, gradients) -> Bool[Array, "layers 2"]:
    """In which branches all gradients are finite."""

    def finite(tree):
        return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()

    layers = layer_parameters(config, gradients)
    return jnp.array([[finite([own[n] for n in names]) for names in BRANCHES] for own in layers])


# --- decoding


class DecodingState(NamedTuple):
    """All that decoding an image carries; the first axis of every array is rows.

    Neighbouring rows are pictures of one caption, whose `memory` they share.
    """

    layers: tuple[LayerState, ...]
    """The past is that of the image, the memory that of the text."""
    length: Int[Array, " rows"]
    """Image positions of each row read so far."""


def start_decoding(
    model: DALLE, params, text: Int[Array, "B text"], samples: int = 1
) -> DecodingState:
    """Reads `text`, as `caption_tokens` makes it, and makes room for `samples` pictures of each."""
    c, rows = model.config, text.shape[0] * samples
    x = model.apply({"params": params}, text, method=DALLE.embed_stream)
    room = jnp.zeros((rows, c.heads, c.image_length, c.head_width), model.execution.dtype)
    layers = []
    for kind, own in zip(c.kinds, layer_parameters(c, params), strict=True):
        x, memory = Layer(c, model.execution, kind).apply({"params": own}, x)
        layers.append(LayerState(KeyValue(room, room), memory.swapped().settled()))
    return DecodingState(tuple(layers), jnp.zeros(rows, jnp.int32))


def extend(
    model: DALLE, params, tokens: Int[Array, "rows T"], state: DecodingState
) -> tuple[Float[Array, "rows T V"], DecodingState]:
    """Reads T >= 1 more image positions of each row; logits of the codes that they predict.

    The first position reads the last token of the text, each other one the code before it.
    """
    return extender(model, params)(tokens, state)


def extender(model: DALLE, params):
    """`extend` of a model and its parameters, for use in a loop: `(tokens, state)` to the same.

    The stacked parameters are taken apart here, once, and used layer by layer, which decodes faster
    than a scan and lets a caller differentiate with respect to `state`.
    """
    c, e = model.config, model.execution
    each = list(zip(c.kinds, layer_parameters(c, params), strict=True))

    def extend(tokens, state):
        bound = model.bind({"params": params})
        places = c.text_length + state.length[:, None] + jnp.arange(tokens.shape[1])
        x, layers = bound.embed(tokens, places), []
        for (kind, own), layer in zip(each, state.layers, strict=True):
            x, past = Layer(c, e, kind).apply({"params": own}, x, layer, state.length)
            layers.append(layer._replace(past=past))
        logits = few_rows_logits(bound.final_norm(x), bound.output_matrix()[: c.image_vocab])
        return logits, DecodingState(tuple(layers), state.length + tokens.shape[1])

    return extend
