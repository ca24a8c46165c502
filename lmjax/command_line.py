"""Command lines made from dataclasses: a preset first, then any field of it.

python -m experiments.t5_pretrain --preset base --batch 64 --optimizer.schedule.warmup 100
"""

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def parse(
    presets: Mapping[str, T],
    default: str,
    document: str,
    choices: Mapping[str, Mapping[str, Callable[[T], Any]]] | None = None,
    arguments: Sequence[str] | None = None,
) -> T:
    """An experiment's settings from the command line.

    `--preset NAME` is read first and gives the defaults of everything else. A choice such as
    `--optimizer adamw` replaces a whole part of the preset, whose fields
    (`--optimizer.weight-decay`) are then those of the new part.

    Args:
        presets: settings by name, all of one dataclass.
        default: the preset that is used when none is named.
        document: the experiment's docstring, shown by `--help`.
        choices: flag (a field, dots for nested ones) -> name -> the value of that field, made from
            the settings so far. A field that is of the chosen kind already keeps its value.
        arguments: instead of those of this process.

    Exits with status 2 and one sentence for an unknown flag, preset or value.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    choices = choices or {}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=default)
    for flag in choices:
        first.add_argument(f"--{flag}")
    chosen, rest = first.parse_known_args(arguments)

    settings = _named("--preset", chosen.preset, presets)
    for flag, values in choices.items():
        name = getattr(chosen, flag)
        if name is not None:
            value = _named(f"--{flag}", name, values)(settings)
            settings = _replaced(settings, flag.split("."), value)

    _refuse_misspelt(rest, ["--preset", *(f"--{flag}" for flag in choices)], settings)
    described = [document.strip(), "", f"--preset {{{','.join(presets)}}} (default: {default})"]
    described += [f"--{flag} {{{','.join(values)}}}" for flag, values in choices.items()]
    return tyro.cli(
        type(settings),
        default=settings,
        args=rest,
        description="\n".join(described),
        config=(tyro.conf.AvoidSubcommands,),
    )


def run(main: Callable[[], None]) -> None:
    """Calls `main`; an error that the user can mend becomes its one sentence and status 1.

    With LMJAX_TRACEBACK set in the environment the whole traceback is shown instead.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        if "LMJAX_TRACEBACK" in os.environ:
            raise
        sys.exit(f"error: {error}")


def _named(flag: str, name: str, values: Mapping[str, T]) -> T:
    if name in values:
        return values[name]
    near = difflib.get_close_matches(name.lower(), values, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    print(f"error: {flag} {name} is not known: {hint}Known: {', '.join(values)}", file=sys.stderr)
    sys.exit(2)


def _refuse_misspelt(arguments: Sequence[str], flags: Sequence[str], settings: Any) -> None:
    """Exits if a flag is none of the settings' fields but nearly one of `flags`, which tyro, that
    hints at the others, does not know."""
    fields = {field.name for field in dataclasses.fields(settings)}
    for argument in arguments:
        flag = argument.partition("=")[0]
        field = flag.removeprefix("--").partition(".")[0].replace("-", "_")
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.8)
        if flag.startswith("--") and field not in fields and near:
            print(f"error: {flag} is not known: did you mean {near[0]}?", file=sys.stderr)
            sys.exit(2)


def _replaced(settings: T, path: list[str], value: Any) -> T:
    old = getattr(settings, path[0])
    if len(path) > 1:
        value = _replaced(old, path[1:], value)
    elif type(value) is type(old):
        return settings
    return dataclasses.replace(settings, **{path[0]: value})
