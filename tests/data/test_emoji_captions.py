import collections
import itertools

import pytest

from lmjax.data.emoji_captions import base_emoji, collect_emoji, emoji_captions
from lmjax.data.pixels import read_picture


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield emoji_captions()


@pytest.fixture(scope="module")
def records():
    return collect_emoji()


def test_the_set_is_whole(splits, records):
    """As of the packages' versions in November 2026; newer ones may only add."""
    assert len(records) >= 3_953
    assert {name: len(pictures) for name, pictures in splits.items()}.keys() == {
        "train",
        "validation",
    }
    assert len(splits["train"]) + len(splits["validation"]) == len(records)
    assert 0.02 < len(splits["validation"]) / len(records) < 0.08
    for pictures in splits.values():
        assert all(len(captions["en"]) == 1 for captions in pictures.captions)
        image = read_picture(pictures.file(0))
        assert image.size == (72, 72) and image.mode == "RGB"


def test_names_in_english_and_korean(records):
    names = {r["emoji"]: (r["en"], r["ko"], r["category"]) for r in records}
    assert names["🥑"] == ("avocado", "아보카도", "Food & Drink")
    assert names["🪑"] == ("chair", "의자", "Objects")
    assert names["❤"] == ("red heart", "빨간색 하트", "Smileys & Emotion")
    assert names["🇰🇷"] == ("flag South Korea", "깃발 대한민국", "Flags")
    assert names["🏴‍☠"][0] == "pirate flag"
    assert names["👩🏽‍🚀"][:2] == ("woman astronaut medium skin tone", "여자 우주비행사 갈색 피부")
    assert names["👩🏽‍🚀"][2] == names["🧑‍🩰"][2] == "People & Body"
    assert names["🏃‍➡"][1] == "오른쪽을 향한 뛰는 사람"
    assert len({english for english, _, _ in names.values()}) == len(names)
    for english, korean, category in names.values():
        assert english.strip() == english and korean.strip() == korean and category
        assert not set("_:\ufe0f") & set(english + korean)
    assert sum(category == "Other" for _, _, category in names.values()) < 30


def test_nothing_leaks_into_the_validation_split(splits):
    sides = collections.defaultdict(set)
    for split, pictures in splits.items():
        for index in range(len(pictures)):
            record = pictures.files.records[index]
            sides["base", record["base"]].add(split)
            sides["picture", record["image"]].add(split)
    shared = [thing for thing, found in sides.items() if len(found) > 1]
    assert not shared
    bases = collections.Counter(kind for kind, _ in sides)["base"]
    held_out = sum(found == {"validation"} for (kind, _), found in sides.items() if kind == "base")
    assert bases > 1_600 and 0.03 < held_out / bases < 0.08


@pytest.mark.parametrize(
    "base, variants",
    [
        ("🧑", "🧑🏿 👩 👨🏻‍🦰 👱🏽‍♀️ 🧑‍🦳"),
        ("🧑🚀", "👩🏽‍🚀 🧑‍🚀 👨‍🚀"),
        ("🏃", "🏃 🏃🏽‍♀️ 🏃🏿‍♂️‍➡️"),
        ("👫", "👬🏽 👭 🧑🏻‍🤝‍🧑🏿 👩🏻‍🤝‍👨🏽"),
        ("💏", "💏🏽 👩🏻‍❤️‍💋‍👨🏾"),
        ("👪", "👨‍👩‍👧 👩‍👦 🧑‍🧑‍🧒‍🧒"),
        ("🐈", "🐈 🐈‍⬛"),
        ("🏴", "🏴 🏴‍☠️"),
        ("❤", "❤ ❤️ ❤️‍🔥"),
        ("🎅", "🤶🏼 🎅 🧑🏿‍🎄"),
        ("🏽", "🏽"),
        ("🦰", "🦰"),
        ("♀", "♀️"),
    ],
)
def test_bases(base, variants):
    assert {base_emoji(variant) for variant in variants.split()} == {base}
    different = ["🥑", "🪑", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🇰🇷", "🇰🇵", base]
    assert all(base_emoji(a) != base_emoji(b) for a, b in itertools.combinations(different, 2))


def test_it_is_prepared_alike_everywhere(splits, tmp_path, monkeypatch):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))
    again = emoji_captions()
    for split, pictures in splits.items():
        assert again[split].fingerprint == pictures.fingerprint
    assert not list(tmp_path.rglob("*.tmp"))
