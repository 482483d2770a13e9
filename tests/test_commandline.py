"""Doors: arguments are parsed strictly, and what a user gets wrong is said in one sentence."""

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from visualrwkv.commandline import explain, parse, run


@dataclass(frozen=True)
class Options:
    """Options of a test."""

    data: Path
    scan: Literal["uni", "bi"] = "bi"
    steps: int = 3
    blind: bool = False


def test_right_arguments():
    found = parse(Options, ["--data", "a b.json", "--steps", "7", "--blind", "--scan", "uni"])
    assert found == Options(Path("a b.json"), "uni", 7, True)
    assert parse(Options, ["--data", "x"]) == Options(Path("x"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "x", "--colour", "red"], ("--colour",)),
        (["--data", "x", "--step", "3"], ("--step",)),
        (["--data", "x", "stray"], ("stray",)),
        (["--data", "x", "--steps", "many"], ("--steps", "many")),
        (["--data", "x", "--steps"], ("--steps",)),
        (["--data", "x", "--scan", "spiral"], ("--scan", "spiral", "uni", "bi")),
        ([], ("--data",)),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, words, capsys):
    with pytest.raises(ValueError) as caught:
        parse(Options, arguments)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "\n" not in said
    assert not set("╭│╰─\x1b") & set(said)
    assert "  " not in said
    assert capsys.readouterr() == ("", "")


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Options, ["--help"])
    assert caught.value.code in (0, None)
    assert "Options of a test." in capsys.readouterr().out


def fails(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("scan is 'x';\n  allowed are a, b"), "error: scan is 'x'; allowed are a, b\n"),
        (FileNotFoundError("a.json: there is no such data file"), "error: a.json: there is no such data file\n"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), "error: out/x: Permission denied\n"),
    ],
)
def test_expected_errors_end_in_status_1(error, said, capsys):
    with pytest.raises(SystemExit) as caught:
        run(fails(error))
    assert caught.value.code == 1
    assert capsys.readouterr() == ("", said)


def test_an_interrupt_ends_in_status_130(capsys):
    with pytest.raises(SystemExit) as caught:
        run(fails(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [TypeError("ours"), AssertionError("ours"), SystemExit(3)])
def test_our_own_errors_keep_their_traceback(error):
    with pytest.raises(type(error)) as caught:
        run(fails(error))
    assert caught.value is error


def test_no_error():
    run(lambda: None)


def test_a_full_disk():
    said = explain(OSError(errno.ENOSPC, "No space left on device", "runs/model.safetensors"))
    assert said.startswith("the disk is full while writing runs/model.safetensors; free some space")
    assert "the output" in explain(OSError(errno.ENOSPC, "No space left on device"))


def test_an_error_without_words_still_says_something():
    assert explain(ValueError()) != ""
    assert explain(OSError()) != ""
