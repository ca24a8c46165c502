"""A small corpus, a small model, and experiments as processes of their own."""

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax import command_line

ROOT = Path(__file__).resolve().parents[2]
SMALL = """--model.vocab 512 --model.layers 2 --model.width 64 --model.heads 4 --model.head-width 16
--model.feed-forward 128 --objective.inputs-length 64 --batch 8 --data.vocab-size 300
--eval-batches 2 --fit.eval-every 10""".split()


def environment(cache):
    """Data and compiled programs are kept between the runs of a session."""
    return {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "LMJAX_CACHE": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "100",
    }


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """English and Korean files with something to learn in them."""
    directory = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    english = (
        "the function returns an array of values when axis is given and raises an error".split()
    )
    korean = "함수는 값의 배열을 돌려준다 축이 주어지면 오류를 낸다 새 배열의 모양은 같다".split()
    for name, words in {"english": english, "korean": korean}.items():
        sentences = (" ".join(draw.choices(words, k=8)) + "." for _ in range(1_500))
        blocks = map(" ".join, zip(*[sentences] * 10, strict=True))
        (directory / f"{name}.txt").write_text("\n\n".join(blocks), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def run(cache):
    """Runs `python -m MODULE ARGUMENTS...` from the repository's root."""

    def run(module, *arguments, check=True, **options):
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=environment(cache),
            capture_output=True,
            text=True,
            **options,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def refused(cache, monkeypatch, capsys):
    """Does as `python -m MODULE ARGUMENTS...` in this process: what it says in giving up."""

    def refused(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.setenv("LMJAX_CACHE", str(cache))
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            command_line.run(importlib.import_module(module).main)
        said = "".join(capsys.readouterr())
        if isinstance(end.value.code, str):  # the interpreter's to say
            said += end.value.code
        else:
            assert end.value.code
        return " ".join(said.split())

    return refused
