"""What reaches the terminal: one line an error, no control characters, and a log level as people write it."""

import logging

import pytest

from skippipe.cli.main import main
from skippipe.cli.safe_output import SafeFormatter, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é and 漢字", "plain, é and 漢字"),
        ("a\nb\x1b[31m\0", r"a\nb\x1b[31m\x00"),
        ("half \ud800, break \u2028", r"half \ud800, break \u2028"),
    ],
)
def test_messages_are_one_line_without_commands_to_the_terminal(text: str, shown: str) -> None:
    assert one_line(text) == shown
    record = logging.LogRecord("x", logging.INFO, "", 1, "%s", (text,), None)
    assert SafeFormatter("%(levelname)s %(message)s").format(record) == f"INFO {shown}"


@pytest.mark.parametrize(("level", "code"), [("debug", 0), ("Warning", 0), ("", 0), ("loud", 2), ("10", 2)])
def test_log_level_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, code: int
) -> None:
    monkeypatch.setenv("SKIPPIPE_LOG_LEVEL", level)
    with pytest.raises(SystemExit) as stop:
        main(["config", "--explain", "seed"])
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert ("SKIPPIPE_LOG_LEVEL is 'loud'; give one of DEBUG, INFO" in error) == (level == "loud")


def test_names_with_commands_to_the_terminal_are_written_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["validate", "no\x1b[31m\nsuch.yaml"])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
@pytest.mark.parametrize("arguments", [["evaluate"], ["validate"], ["train", "--config"]])
def test_a_text_that_cannot_be_a_path_is_refused(
    arguments: list[str], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, path])
    assert stop.value.code == 2
    assert "cannot be a path here" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "x"], ["evaluate", "x"], ["simulate", "x"], ["plan"]])
def test_seeds_that_no_generator_takes_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--seed", str(2**32)])
    assert stop.value.code == 2
    assert "4294967296 is not in the range 0<=x<=4294967295" in capsys.readouterr().err
