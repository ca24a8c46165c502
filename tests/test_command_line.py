import dataclasses

import pytest

from lmjax import command_line


@dataclasses.dataclass(frozen=True)
class Adam:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class SGD:
    rate: float = 0.2


@dataclasses.dataclass(frozen=True)
class Settings:
    optimizer: Adam | SGD = Adam()
    steps: int = 5


PRESETS = {"small": Settings(), "large": Settings(steps=50)}
CHOICES = {"optimizer": {"adam": lambda _: Adam(), "sgd": lambda _: SGD()}}


def parsed(*arguments):
    return command_line.parse(PRESETS, "small", "About.", CHOICES, arguments)


def test_a_preset_and_what_replaces_parts_of_it():
    assert parsed() == Settings()
    assert parsed("--preset=large", "--optimizer.rate", "3") == Settings(Adam(3.0), steps=50)
    assert parsed("--optimizer", "sgd", "--steps", "7") == Settings(SGD(), steps=7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--presett", "large"], "--presett is not known: did you mean --preset?"),
        (["--pre-set=large"], "--pre-set is not known: did you mean --preset?"),
        (["--optimiser", "sgd"], "--optimiser is not known: did you mean --optimizer?"),
        (["--preset", "larg"], "--preset larg is not known: did you mean large?"),
        (["--optimizer", "sdg"], "--optimizer sdg is not known: did you mean sgd?"),
        (["--stepps", "7"], "--steps"),
        (["--optimizer.rte", "7"], "--optimizer.rate"),
    ],
)
def test_what_is_misspelt_is_answered_with_the_nearest_name(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        parsed(*arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
