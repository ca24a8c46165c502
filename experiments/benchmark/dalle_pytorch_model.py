"""What dalle-pytorch does with a `Case` of DALL-E: its own loss, `torch.optim.AdamW`, and drawing.

Its sparse layers are trained as it computes them; its rows see their own row, its convolution a
corner of five by five, and its feed-forward layers are gated, with half as much again to multiply.
It draws by the attention that it offers for that, with a cache: by its `forward`, because its
`generate_images` leaves the cache out where nothing is contrasted.
"""

import numpy as np
import torch
from dalle_pytorch.dalle_pytorch import DALLE, DiscreteVAE, gumbel_sample, top_k

from experiments.benchmark.harness import (
    Case,
    Figures,
    picture_tokens,
    timed_decoding,
    timed_torch_training,
)

KINDS = {"row": "axial_row", "column": "axial_col", "conv": "conv_like"}


def measure(case: Case) -> Figures:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model_of(case, drawing=False).train().to(device)
    captions, codes = tokens_of(case, case.batch, device)
    figures = timed_torch_training(
        lambda: model(captions, codes, return_loss=True),
        [p for p in model.parameters() if p.requires_grad],
        case.steps,
    )
    easel = model_of(case, drawing=True).eval().to(device)
    captions, _ = tokens_of(case, case.decode_batch, device)
    return figures | timed_decoding(lambda: draw(easel, captions, case.decode_tokens), case)


def model_of(case: Case, drawing: bool) -> DALLE:
    c = case.sizes
    codes = DiscreteVAE(image_size=2 * c.grid, num_layers=1, num_tokens=c.image_vocab)
    return DALLE(
        dim=c.width,
        vae=codes,
        num_text_tokens=c.text_vocab,
        text_seq_len=c.text_length,
        depth=c.layers,
        heads=c.heads,
        dim_head=c.width // c.heads,
        attn_types=tuple(KINDS[kind] for kind in case.kinds),
        shift_tokens=False,
        rotary_emb=False,
        optimize_for_inference=drawing,
    )


def tokens_of(case: Case, rows: int, device) -> list[torch.Tensor]:
    """[rows, text_length] and [rows, targets]"""
    arrays = picture_tokens(case, rows)
    return [torch.from_numpy(x.astype(np.int64)).to(device) for x in arrays]


@torch.no_grad()
def draw(model: DALLE, captions: torch.Tensor, count: int) -> torch.Tensor:
    """[B, count]: codes, each drawn from the upper half of its distribution."""
    cache, codes = {}, captions[:, :0]
    for _ in range(count):
        logits = model(captions, codes, cache=cache)[:, -1]
        drawn = gumbel_sample(top_k(logits)) - model.num_text_tokens
        codes = torch.cat([codes, drawn[:, None]], dim=1)
    return codes
