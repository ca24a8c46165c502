import sys

from experiments import dalle_benchmark


def test_figures_are_shown(monkeypatch, capsys):
    tiny = "--text-length 8 --grid 4 --conv-extent 3 --layers 1 --width 16 --rounds 1"
    monkeypatch.setattr(sys, "argv", ["dalle_benchmark", *tiny.split()])
    dalle_benchmark.main()
    printed = capsys.readouterr().out
    for words in ("2 x 16 tokens", "with a cache", "24 positions", "column", "0.67"):
        assert words in printed
