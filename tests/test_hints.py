"""Hints as data: what is said in a shell, and what is said in Python."""

from __future__ import annotations

import shlex

import pytest

from ckptfix.hints import Command, Hint, adding, command, naming, shell

ODD = ["a b", "it's", "$HOME", "*", "", 'say "no"', "-n", "ü"]


@pytest.mark.parametrize("name", ODD)
def test_a_shell_reads_the_arguments_as_they_are(name: str) -> None:
    words = shlex.split(str(command("inspect", name, select=name)))
    dashed = f"./{name}" if name.startswith("-") else name
    assert words == ["ckptfix", "inspect", dashed, "--select", name]
    assert shlex.split(str(shell("ls", "-l", files=[name]))) == ["ls", "-l", dashed]


def test_flags_have_no_value_and_what_is_not_given_is_not_said() -> None:
    made = command("strip-prefix", "a.pt", "b.pt", select=None, partial=True, in_place=False)
    assert str(made) == "ckptfix strip-prefix a.pt b.pt --partial"
    assert str(command("fix", "a", "b", keep_training_state=True)).endswith("--keep-training-state")
    assert str(command("rename", "a", "b", sub=("^x", ""))) == "ckptfix rename a b --sub '^x' ''"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (command("inspect", "a b.pt"), "ckptfix.open('a b.pt').findings"),
        (
            command("strip-prefix", "a.pt", "b.pt", prefix="net.", partial=True),
            "ckptfix.open('a.pt').strip_prefix(prefix='net.', partial=True).save('b.pt')",
        ),
        (
            command("rename", "a.pt", "b.pt", sub=("^x", "y"), select="s"),
            "ckptfix.open('a.pt').rename('^x', 'y', select='s').save('b.pt')",
        ),
        (command("recover", "a.pt", "b.pt"), "ckptfix recover a.pt b.pt"),
        (shell("df", "-h", "."), "df -h ."),
    ],
)
def test_a_program_is_told_the_same_in_python(made: Command, said: str) -> None:
    assert made.in_python() == said


def test_a_hint_says_an_option_in_both_tongues() -> None:
    force = adding("replace it", "force")
    assert (str(force), force.in_python()) == (
        "replace it: add --force",
        "replace it: pass force=True",
    )
    chosen = naming("take one of those", "select", "a b")
    assert (str(chosen), chosen.in_python()) == (
        "take one of those: --select 'a b'",
        "take one of those: select='a b'",
    )


def test_a_hint_may_name_another_way() -> None:
    hint = Hint("copy it again").otherwise_do(Hint("see", command("inspect", "x y")))
    assert str(hint) == "copy it again; or see: ckptfix inspect 'x y'"
    assert hint.in_python() == "copy it again; or see: ckptfix.open('x y').findings"


def test_words_are_filled_in_as_arguments() -> None:
    made = command("to-cpu", "FILE", "OUT").filled({"FILE": "my FILE.pt", "OUT": "o.pt"})
    assert str(made) == "ckptfix to-cpu 'my FILE.pt' o.pt"
