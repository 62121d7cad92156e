"""Options as fields: what a command line may say, what it gives, and what its help shows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from runtime.options import add_options, option, parse_options


@dataclass
class Fields:
    """An option of every kind; ``list`` has the name of a type."""

    epochs: float = option(1.0, "passes, in 100%", above=0, most=10)
    steps: int | None = option(None, "most steps", metavar="N", least=1)
    loss: str = option("ce", "which loss", choices=("ce", "kl"))
    data: list[str] = option([], "text", repeat=True, metavar="FILE")
    names: list[str] = option([], "several", metavar="NAME")
    list: bool = option(False, "print and leave", name="--list-all")
    pair: list[str] = option([], "two of them", nargs=2, metavar=("A", "B"))
    source: str | None = option(None, "what to read", name="source", nargs="?", metavar="SOURCE")
    derived: int = 3  # no option

    def check(self) -> None:
        if self.steps and self.list:
            raise ValueError("--steps excludes --list-all")


def parse(*words: str) -> Fields:
    return parse_options(Fields, "program", "What it does.\n\nMore about it.", words)


def test_a_command_line_fills_the_fields_and_the_rest_keep_their_defaults():
    assert parse() == Fields()
    found = parse("--data", "a", "here", "--data", "b", "--names", "c", "d", "--pair", "e", "f", "--list-all")
    assert found == Fields(data=["a", "b"], names=["c", "d"], pair=["e", "f"], list=True, source="here")
    assert parse("--steps", "2", "--loss", "kl", "--epochs", "10") == Fields(steps=2, loss="kl", epochs=10.0)
    assert parse() is not parse() and parse().data is not parse().data


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs must be above 0, got 0.0"),
        (["--epochs", "10.5"], "--epochs must be at most 10, got 10.5"),
        (["--epochs", "nan"], "--epochs must be a number, got nan"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--loss", "kll"], "Unknown --loss 'kll'. Did you mean 'kl'?"),
        (["--epoch", "2"], "Unknown option '--epoch'. Did you mean '--epochs'?"),
        (["--derived", "4"], "Unknown option '--derived'"),
        (["--pair", "e"], "argument --pair: expected 2 arguments"),
        (["here", "there"], "unexpected argument 'there'"),
        (["--steps", "1", "--list-all"], "--steps excludes --list-all"),
    ],
)
def test_a_mistake_is_named_with_its_option(words, message):
    with pytest.raises(ValueError) as caught:
        parse(*words)
    assert message in str(caught.value)


def test_the_help_shows_the_first_paragraph_the_defaults_and_only_the_options_that_are_offered(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text and "More about it" not in text
    for line in ("--epochs EPOCHS passes, in 100% (default: 1.0)", "--loss {ce,kl} which loss (default: ce)"):
        assert line in text
    assert "--steps N most steps --loss" in text and "--pair A B" in text  # no default to show
    with pytest.raises(ValueError, match="Unknown option '--epochs'"):
        parse_options(Fields, "program", "Less.", ["--epochs", "2"], only=["steps"])


def test_a_field_named_like_a_type_does_not_hide_that_type():
    import argparse
    import typing

    add_options(argparse.ArgumentParser(), Fields)
    assert "list" in {field.name for field in dataclasses.fields(Fields)}
    with pytest.raises(TypeError):  # the control: names of the class come first without the precaution
        typing.get_type_hints(Fields)
