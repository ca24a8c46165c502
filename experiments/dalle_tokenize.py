"""Makes the codes of all pictures ahead of training, which is then kept waiting by nothing.

    python -m experiments.dalle_tokenize
    python -m experiments.dalle_tokenize --preset coco --dvae /data/dvae-coco --data.folder ~/coco
        --data.captions ~/coco/MSCOCO_train_val_Korean.json

Takes the options of `experiments.dalle_train`, of which --preset, --dvae, --crops and --data
matter. Codes are kept under ~/.cache/lmjax ($LMJAX_CACHE) by the content of the pictures and of the
dVAE, where `dalle_train` with the same options finds them; without this it makes them itself when
it starts.
"""

from rich.console import Console

from experiments.dalle_train import CHOICES, DEFAULT, PRESETS, encoder
from lmjax import command_line
from lmjax.data.captions import with_captions
from lmjax.data.pictures import open_pictures


def main() -> None:
    settings = command_line.parse(PRESETS, DEFAULT, __doc__, CHOICES)
    _, encode, sha256 = encoder(settings)
    console = Console(highlight=False, soft_wrap=True)
    for name, pictures in open_pictures(settings.data).items():
        store = encode[name](with_captions(pictures, settings.data))
        count, squares, length = store.codes.shape
        console.print(
            f"{name}: {int(store.readable.sum()):,} of {count:,} pictures as {squares} x {length}"
            f" codes of dVAE {sha256[:12]} in {store.directory}"
        )


if __name__ == "__main__":
    command_line.run(main)
