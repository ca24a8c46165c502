"""BERT and RoBERTa: an encoder that guesses hidden words.

Papers: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", section 3; Liu
et al. 2019, "RoBERTa". Reference files: google-research/bert modeling.py; transformers
modeling_bert.py, modeling_roberta.py; fairseq models/roberta/model.py.
Axes: B batch, T and S length, P predicted tokens, D width, N heads, H head width, F feed-forward
width, V vocabulary, L layers.

What is peculiar to them: norms come after the sublayers and after the embeddings; words, learned
positions and token types (sentence A or B) are added; the output matrix is the embedding, behind
one more dense layer with a norm. BERT also judges whether sentence B follows A, by its first token;
RoBERTa does not, has one token type, and leaves the first two positions of its table unused.
Departures: GELU is exact, as in transformers and RoBERTa; `tanh_gelu` is Google's BERT.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmjax.models.layers import (
    Classifier,
    Execution,
    LayerNorm,
    Pooler,
    affine,
    all_logits,
    attention,
    check_choices,
    check_config,
    check_heads,
    constrain,
    dropout,
    dropout_key,
    lookup,
    same_segment,
    split_heads,
    stack,
    weight,
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """What a BERT is; the defaults are bert-base-uncased."""

    vocab: int = 30_522
    """Rows of the embedding: the tokenizer's ids."""
    positions: int = 512
    """The longest text."""
    first_position: int = 0
    """Row of the first token in the table of positions; RoBERTa's is 2."""
    token_types: int = 2
    """Kinds of sentences that can be told apart; 1 in RoBERTa."""
    layers: int = 12
    width: int = 768
    """D, of the residual stream; the heads divide it among them."""
    heads: int = 12
    feed_forward: int = 3_072
    """F, the hidden width of the feed-forward layers."""
    kind: Literal[
        "pretraining", "masked_lm", "encoder", "text_classifier", "token_classifier", "span"
    ] = "pretraining"
    """What is on top: guesses of words and a verdict on the next sentence (BERT's pretraining),
    guesses of words alone (RoBERTa), only a pooled first token; or, to be fine-tuned, classes of
    texts, of tokens, or the first and the last token of an answer."""
    labels: int = 2
    """Classes that a classifier tells apart."""
    tanh_gelu: bool = False
    """GELU by its tanh approximation."""
    dropout: float = 0.1
    """After the embeddings, on attention weights, and after sublayers."""
    norm_epsilon: float = 1e-12
    init_scale: float = 0.02
    """Standard deviation of weights before training, and before they are cut off at two of them;
    narrow models learn faster with more."""

    def __post_init__(self):
        sizes = ("vocab", "positions", "token_types", "layers", "width", "heads", "feed_forward")
        check_config(self, *sizes, "labels")
        check_heads(self)
        check_choices(self, "kind")
        if self.first_position < 0:
            raise ValueError(f"BertConfig.first_position is {self.first_position}, not 0 or more")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def init(self) -> nn.initializers.Initializer:
        return nn.initializers.truncated_normal(self.init_scale)

    def training_flops(self, batch: int, length: int, predicted: int) -> float:
        """Floating-point operations of the products in one step: forwards, and twice backwards.

        Attention scores count in full, as in PaLM's appendix B; recomputation does not count.
        """
        d = self.width
        layer = 4 * d**2 + 2 * d * self.feed_forward + 2 * length * d
        return 6.0 * batch * (length * self.layers * layer + predicted * (d**2 + d * self.vocab))


_LARGE = dict(layers=24, width=1_024, heads=16, feed_forward=4_096)
_ROBERTA = BertConfig(
    vocab=50_265, first_position=2, token_types=1, kind="masked_lm", norm_epsilon=1e-5
)

PRESETS = {
    "base": BertConfig(),
    "base-cased": BertConfig(vocab=28_996),
    "large": BertConfig(**_LARGE),
    "roberta-base": _ROBERTA,
    "roberta-large": dataclasses.replace(_ROBERTA, **_LARGE),
}


class Attention(nn.Module):
    config: BertConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B 1 T T"]
    ) -> Float[Array, "B T D"]:
        c = self.config

        def heads(name: str) -> Float[Array, "B T N H"]:
            y = affine(self, x, name, c.init, embed=c.width, heads=c.width)
            return split_heads(y, c.heads)

        queries, keys, values = heads("query"), heads("key"), heads("value")
        context = attention(
            queries * c.head_width**-0.5,
            keys,
            values,
            mask,
            rate=c.dropout,
            key=dropout_key(self, c.dropout),
            execution=self.execution,
        )
        return affine(self, context.reshape(x.shape), "out", c.init, heads=c.width, embed=c.width)


class FeedForward(nn.Module):
    config: BertConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        up = affine(self, x, "up", c.init, embed=c.width, mlp=c.feed_forward)
        hidden = nn.gelu(up, approximate=c.tanh_gelu)
        hidden = constrain(hidden, "batch", "activation_length", "activation_mlp")
        return affine(self, hidden, "down", c.init, mlp=c.feed_forward, embed=c.width)


class Layer(nn.Module):
    config: BertConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask) -> tuple[Float[Array, "B T D"], None]:
        c, e = self.config, self.execution
        attended = Attention(c, e, name="attention")(x, mask)
        x = x + dropout(self, attended, c.dropout)
        x = LayerNorm(c.norm_epsilon, e, name="attention_norm")(x)
        x = x + dropout(self, FeedForward(c, e, name="feed_forward")(x), c.dropout)
        x = LayerNorm(c.norm_epsilon, e, name="feed_forward_norm")(x)
        return constrain(x, "batch", "activation_length", "activation_embed"), None


class MaskedHead(nn.Module):
    """What lies between a hidden state and the output matrix."""

    config: BertConfig
    execution: Execution

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        c = self.config
        x = affine(self, x, "transform", c.init, embed=c.width, mlp=c.width)
        return LayerNorm(c.norm_epsilon, self.execution, name="norm")(
            nn.gelu(x, approximate=c.tanh_gelu)
        )


class Bert(nn.Module):
    """A masked language model.

    Segment ids number the texts packed in a row from 1, with 0 for padding, and positions count
    from 0 in each; left out, a row is one text without padding. Token types are 0 for sentence A
    and 1 for B; left out, all are 0.
    """

    config: BertConfig
    execution: Execution = Execution()

    def setup(self):
        c, e = self.config, self.execution
        self.embedding = weight(self, "embedding", c.init, vocab=c.vocab, embed=c.width)
        rows = c.first_position + c.positions
        self.positions = weight(self, "positions", c.init, positions=rows, embed=c.width)
        self.token_types = weight(self, "token_types", c.init, types=c.token_types, embed=c.width)
        self.embedding_norm = LayerNorm(c.norm_epsilon, e)
        self.layers = stack(Layer, c.layers, e, inputs=1)(c, e)
        if c.kind in ("pretraining", "masked_lm"):
            self.head = MaskedHead(c, e)
            self.output_bias = weight(
                self, "output_bias", nn.initializers.zeros, "float32", vocab=c.vocab
            )
        if c.kind in ("pretraining", "encoder", "text_classifier"):
            self.pooler = Pooler(c.init, e)
        if c.kind == "pretraining":
            self.verdict = Classifier(2, c.init, e)
        if c.kind in ("text_classifier", "token_classifier", "span"):
            labels = 2 if c.kind == "span" else c.labels
            self.classifier = Classifier(labels, c.init, e, c.dropout)

    def __call__(
        self,
        inputs: Int[Array, "B T"],
        token_types: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B T D"] | Float[Array, "B *T labels"]:
        """Logits of the word in each place, float32; of an encoder the hidden states; of a
        classifier of texts or tokens the logits of classes; of spans, of each token being the first
        of the answer, and the last."""
        x = self.encode(inputs, token_types, positions, segment_ids)
        match self.config.kind:
            case "encoder":
                if self.is_initializing():
                    self.pool(x)
                return x
            case "text_classifier":
                return self.classifier(self.pool(x))
            case "token_classifier" | "span":
                return self.classifier(x)
            case "pretraining":
                if self.is_initializing():
                    self.judge(x)
        return all_logits(self.head(x), self.embedding) + self.output_bias

    def encode(
        self,
        inputs: Int[Array, "B T"],
        token_types: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The hidden states of the last layer."""
        c, length = self.config, inputs.shape[1]
        if length > c.positions:
            raise ValueError(
                f"{length} tokens do not fit the {c.positions} positions that this model has"
                " learned: shorten the text, or train a model with more"
            )
        positions = jnp.arange(length) if positions is None else positions
        segment_ids = jnp.ones_like(inputs) if segment_ids is None else segment_ids
        token_types = jnp.zeros_like(inputs) if token_types is None else token_types
        x = lookup(self.embedding, inputs) + self.positions[positions + c.first_position]
        x = x + self.token_types[token_types]
        x = dropout(self, self.embedding_norm(x), c.dropout)
        x = constrain(x, "batch", "activation_length", "activation_embed")
        return self.layers(x, same_segment(segment_ids, segment_ids))[0]

    def guess(
        self, encoded: Float[Array, "B T D"], places: Int[Array, "B P"]
    ) -> Float[Array, "B P D"]:
        """What `output_matrix` multiplies, before `vocabulary_bias`, for the words in `places`."""
        return self.head(jnp.take_along_axis(encoded, places[..., None], axis=1))

    def vocabulary_bias(self) -> Float[Array, " V"]:
        """float32."""
        return self.output_bias

    def pool(self, encoded: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """What a classifier of whole texts reads: the first token."""
        return self.pooler(encoded[:, 0])

    def judge(self, encoded: Float[Array, "B T D"]) -> Float[Array, "B 2"]:
        """Logits of: sentence B follows A; it is from elsewhere. float32."""
        return self.verdict(self.pool(encoded))

    def output_matrix(self) -> Float[Array, "V D"]:
        return self.embedding
