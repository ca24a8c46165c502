"""Fill the <extra_id_0> spans of a text, or answer it, with a trained T5.

    python -m experiments.t5_generate --checkpoint runs/t5-mini \\
        "The <extra_id_0> is returned if <extra_id_1>."
    python -m experiments.t5_generate --checkpoint google-t5/t5-small --beams 4 \\
        "translate English to German: The house is wonderful."
    python -m experiments.t5_generate --checkpoint runs/t5-mini --complete --temperature 0.8 \\
        --samples 3 "Return a new array"

The checkpoint is the workdir of a run, a directory in Hugging Face's format (config.json and
safetensors) or the name of such a repository. A model pretrained by span corruption knows one task:
to fill sentinels; --complete puts one behind the text. Texts without sentinels get the model's
answer as it is, which is what fine-tuned checkpoints and prefix language models are for.
"""

import dataclasses
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

import lmjax
from lmjax import command_line
from lmjax.decoding.beam_search import Beam
from lmjax.decoding.fill_in import fill_in, spans_by_sentinel
from lmjax.decoding.generate import Generated, generate
from lmjax.decoding.sampling import Sampling
from lmjax.models.t5 import T5


@dataclasses.dataclass(frozen=True)
class T5Generate:
    texts: tyro.conf.Positional[tuple[str, ...]]
    """One or more texts; quote each."""
    checkpoint: Annotated[str, tyro.conf.arg(aliases=("--init",))]
    """A run's workdir, a Hugging Face directory, or a repository's name."""
    complete: bool = False
    """Put <extra_id_0> behind each text, to have it continued."""
    max_length: int = 64
    """The most tokens to write, the end of text counted."""
    temperature: float = 0.0
    """0: always the likeliest token. 1: draw from the model's distribution; more is wilder."""
    top_k: int | None = None
    """Draw among so many likeliest tokens only."""
    top_p: float = 1.0
    """Draw among the fewest tokens that together have this probability."""
    beams: int = 1
    """More than 1: beam search with so many beams instead of drawing."""
    alpha: float = 0.6
    """Length penalty of beam search: 0 ranks by probability, more prefers longer texts."""
    samples: int = 1
    """Texts to write for each: draws (which need a temperature) or the best of the beams."""
    seed: int = 0
    """Of the draws."""
    dtype: str | None = None
    """float32 or bfloat16; by default float32 on a CPU and bfloat16 elsewhere."""

    def __post_init__(self):
        if not self.texts:
            raise ValueError("give at least one text, in quotes")
        if self.samples < 1 or self.beams < 1:
            raise ValueError(f"samples ({self.samples}) and beams ({self.beams}) start at 1")
        if self.samples > 1 and self.beams == 1 and self.temperature == 0:
            raise ValueError("several samples need a temperature above 0, or as many beams")

    @property
    def strategy(self) -> Sampling | Beam:
        if self.beams > 1:
            return Beam(self.beams, self.alpha, best=self.samples)
        return Sampling(self.temperature, self.top_k, self.top_p)


def main() -> None:
    settings = tyro.cli(T5Generate, description=__doc__)
    strategy = settings.strategy
    model, params, tokenizer = lmjax.load(settings.checkpoint, dtype=settings.dtype)
    if not isinstance(model, T5):
        raise ValueError(
            f"{settings.checkpoint} holds a {type(model).__name__}, and only a T5 fills gaps: name"
            " the workdir of a t5_pretrain, or a Hugging Face directory or repo of a T5"
        )
    if tokenizer is None:
        raise ValueError(f"{settings.checkpoint} has no tokenizer: put its spiece.model there")
    texts = [text + " <extra_id_0>" * settings.complete for text in settings.texts]
    prompts = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    copies = 1 if isinstance(strategy, Beam) else settings.samples
    inputs = padded([prompt for prompt in prompts for _ in range(copies)])
    written = generate(
        model,
        params,
        inputs,
        max_length=settings.max_length,
        strategy=strategy,
        key=jax.random.key(settings.seed),
        eos=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
    )
    scores = written.log_probs if isinstance(written, Generated) else written.scores
    tokens = np.asarray(written.tokens).reshape(len(texts), settings.samples, -1)
    scores = np.asarray(scores).reshape(len(texts), settings.samples)

    console = Console(highlight=False, soft_wrap=True)
    for prompt, rows, row_scores in zip(prompts, tokens, scores, strict=True):
        for row, score in zip(rows, row_scores, strict=True):
            line = filled(prompt, row, tokenizer)
            if settings.samples > 1:
                line.append(f"   ({score:.2f})", style="dim")
            console.print(line)


def padded(rows: list[list[int]]) -> np.ndarray:
    """Rows of token ids as one array, 0 behind the shorter ones."""
    length = max(map(len, rows))
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def filled(prompt: list[int], output: np.ndarray, tokenizer) -> Text:
    """The prompt with what the model wrote in place of its sentinels, or the answer alone."""
    if not np.isin(prompt, tokenizer.sentinels).any():
        return Text(tokenizer.decode(output))
    spans = spans_by_sentinel(output, tokenizer.sentinels, tokenizer.eos_id)
    tokens, places = fill_in(prompt, spans, tokenizer.sentinels)
    line = Text(tokenizer.decode(tokens))
    for place in places:
        line.stylize("bold cyan", *(len(tokenizer.decode(tokens[:end])) for end in place))
    return line


if __name__ == "__main__":
    command_line.run(main)
