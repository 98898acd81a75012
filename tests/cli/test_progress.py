"""stage: silent while it is quick, then a line, or a line that is rewritten."""

import time

import pytest

from octav_fx.cli.progress import stage


def test_what_is_quick_says_nothing(capsys):
    with stage("writing", patience=60):
        pass
    assert capsys.readouterr().err == ""


def test_what_is_slow_is_named_once_where_there_is_no_terminal(capsys):
    with stage("writing", patience=0):
        time.sleep(0.05)
    assert capsys.readouterr().err == "octav-fx: writing ...\n"


@pytest.mark.slow
def test_in_a_terminal_the_time_is_shown_and_the_line_wiped(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with stage("writing", patience=0):
        time.sleep(0.6)
    told = capsys.readouterr().err
    assert "writing, 0 s" in told and told.endswith("\r\x1b[K")


def test_an_error_passes_through(capsys):
    with pytest.raises(ValueError, match="broken"), stage("writing", patience=60):
        raise ValueError("broken")
