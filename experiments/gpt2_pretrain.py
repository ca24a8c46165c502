"""GPT-2's pretraining: read text, predict every next token.

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    python -m experiments.gpt2_pretrain
    python -m experiments.gpt2_pretrain --data.files 'my/*.txt' --workdir runs/mine
    python -m experiments.gpt2_pretrain --preset small --data.tokenizer gpt2/
        --data.files '~/openwebtext/*.jsonl.gz' --workdir /data/gpt2-small

The first trains `mini` on the documentation installed on this machine: about four minutes on two
CPU cores; then it continues a few held-out texts. The same command, run again, continues the run in
--workdir.

`small` to `xl` are the published models (`kogpt2` SKT-AI's Korean one) in batches of 512 x 1,024
tokens, the paper's size. The paper does not give its optimizer: AdamW with betas 0.9 and 0.95,
decay 0.1, clipping at 1 and a cosine from 6e-4 over 600,000 steps, as reproductions of it have,
stand in. Their text and their tokenizer (vocab.json and merges.txt, or tokenizer.json) are yours to
give.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape

from lmjax import command_line
from lmjax.data.text import Text, TokenizedText
from lmjax.decoding.generate import generate
from lmjax.decoding.sampling import Sampling
from lmjax.models import gpt2
from lmjax.models.gpt2 import GPT2, GPT2Config
from lmjax.objectives.causal_lm import CausalLM
from lmjax.pretraining import TextRun, optimizer_choices, pretrain
from lmjax.tasks.causal import Causal
from lmjax.training.execution import ExecutionOptions
from lmjax.training.fit import FitOptions
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Pretrain(TextRun):
    model_type = "gpt2"

    model: GPT2Config
    objective: CausalLM
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2, which keeps logits from drifting."""

    def __post_init__(self):
        super().__post_init__()
        if self.objective.length > self.model.positions:
            raise ValueError(
                f"--objective.length is {self.objective.length}, but the model has"
                f" {self.model.positions} positions: choose a smaller length or more"
                " --model.positions"
            )
        if self.model.kind != "lm":
            raise ValueError(
                f"--model.kind is {self.model.kind}: GPT-2 learns to go on with texts, choose lm"
            )

    def task(self, devices: Sequence[jax.Device] | None = None) -> Causal:
        return Causal(GPT2(self.model, self.execution.resolve(devices)), self.z_loss)


MINI = GPT2Pretrain(
    model=GPT2Config(
        vocab=4_096, positions=128, layers=4, width=192, heads=8, feed_forward=768, dropout=0.0
    ),
    objective=CausalLM(length=128),
    data=TokenizedText(subwords="byte_bpe", vocab_size=4_096),
    optimizer=AdamW(Cosine(3e-3, horizon=600, warmup=50), weight_decay=0.1),
    batch=32,
    steps=600,
    workdir=Path("runs/gpt2-mini"),
    fit=FitOptions(log_every=1, eval_every=50, checkpoint_every=50),
)


def published(name: str, model: GPT2Config) -> GPT2Pretrain:
    """A usual recipe for the published model of this name."""
    return GPT2Pretrain(
        model=model,
        objective=CausalLM(length=model.positions),
        data=TokenizedText(subwords="byte_bpe", vocab_size=model.vocab),
        optimizer=AdamW(
            Cosine(6e-4, horizon=600_000, warmup=2_000, final_fraction=0.1),
            weight_decay=0.1,
            beta2=0.95,
        ),
        batch=512,
        steps=600_000,
        workdir=Path("runs") / f"gpt2-{name}",
        execution=ExecutionOptions(remat="full" if model.layers >= 36 else "matmuls"),
        fit=FitOptions(log_every=100, eval_every=5_000, checkpoint_every=5_000),
    )


PRESETS = {"mini": MINI} | {name: published(name, model) for name, model in gpt2.PRESETS.items()}
DEFAULT = "mini"
CHOICES = optimizer_choices()


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    pretrain(settings, PRESETS, "gpt2_pretrain", show_continuations)


def show_continuations(
    settings: GPT2Pretrain, model: GPT2, params, text: Text, console: Console
) -> None:
    """Prints the beginnings of held-out texts, and how the model goes on beside the truth."""
    tokenizer = text.tokenizer
    halves = [np.split(tokens, [len(tokens) // 2]) for tokens in text.samples]
    if not halves:
        return
    lengths = np.array([len(prompt) for prompt, _ in halves])
    prompts = [np.pad(prompt, (0, lengths.max() - len(prompt))) for prompt, _ in halves]
    written = generate(
        model,
        params,
        np.stack(prompts),
        lengths=jnp.asarray(lengths),
        max_length=min(40, model.config.positions - int(lengths.max())),
        strategy=Sampling(temperature=0.7, top_k=40),
        key=jax.random.key(0),
        eos=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
    )
    for (prompt, truth), output in zip(halves, np.asarray(written.tokens), strict=True):
        console.rule("held-out text")
        console.print(escape(tokenizer.decode(prompt)), highlight=False)
        shown = escape(tokenizer.decode(output))
        console.print(f"  [bold]model[/bold] [cyan]{shown or '(nothing)'}[/cyan]")
        console.print(f"  [bold]truth[/bold] [green]{escape(tokenizer.decode(truth))}[/green]")


if __name__ == "__main__":
    command_line.run(main)
