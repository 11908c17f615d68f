"""Bars move twice a second on a terminal; a file gets full lines, few of them."""

import errno
import io
import os
import re
import select
import termios
import time

import pytest

from mdt_jax.runtime import progress
from tests.conftest import ROOT, SMOKE, train_here


def test_a_file_gets_full_lines_every_ten_seconds(monkeypatch):
    stream, now = io.StringIO(), [1000.0]
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("time.time", lambda: now[0])
    with progress.progress_bar(600, True, "sampling", "step") as bar:
        bar._time = time.time  # tqdm binds the clock when it is imported
        bar.start_t = bar.last_print_t = now[0]
        for _ in range(600):
            now[0] += 0.1
            bar.update(1)
    printed = stream.getvalue()
    assert "\r" not in printed and printed.endswith("\n")
    lines = printed.splitlines()
    assert all(re.match(r"sampling: +\d+%\|", line) for line in lines)
    # One at the beginning, one at the end, and of 60 seconds one every ten.
    assert 6 <= len(lines) <= 9 and "600/600" in lines[-1]


def read_all(terminal: int) -> str:
    """What was written to it; the kernel hands it on in parts."""
    printed = b""
    while select.select([terminal], [], [], 0.5)[0]:
        printed += os.read(terminal, 100_000)
    return printed.decode()


def test_a_terminal_sees_it_move_twice_a_second(monkeypatch):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    with open(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with progress.progress_bar(10**9, True, "sampling", "step") as bar:
            bar._time = time.time  # tqdm binds the clock when it is imported
            bar.start_t = bar.last_print_t = now[0]
            for pace in (0.001, 0.1):  # a bar that slows down moves as often
                for _ in range(round(3 / pace)):
                    now[0] += pace
                    bar.update(1)
        printed = read_all(ours)
    os.close(ours)
    assert 12 <= printed.count("\rsampling") <= 14  # the first, two a second, the last


def on_screen(printed: str) -> list[str]:
    """The lines that a terminal shows after it."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", printed):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_no_bar_is_silent(capsys):
    with progress.progress_bar(3, False, "sampling", "step") as bar:
        bar.set_postfix_str("more", refresh=False)
        bar.update(3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_without_a_terminal_prints_a_line_each_log_every(every, tmp_path):
    workdir = tmp_path / "run"
    printed = train_here(*SMOKE, f"--workdir={workdir}", f"--config.train.log_every={every}",
                         "--config.sample.num_samples=0")  # fmt: skip
    assert "\r" not in printed and "training:" not in printed
    lines = re.findall(
        r"^step (\d)/4: loss \d+\.\d{4}, grad_norm \S+, \S+ img/s, \d+:\d\d:\d\d left$",
        printed, re.M,
    )  # fmt: skip
    assert lines == [str(step) for step in range(every, 5, every)]
    assert f"step 2: samples in {workdir}/samples/0000002.png" in printed.splitlines()


def test_control_characters_are_printed_as_escapes(capsys):
    progress.log("a\x1b[2J\n\r\x9b\u202eb \u00e9\u200d")
    progress.print_result("a\n\tb\x1b]0;c\x07")
    printed = capsys.readouterr()
    assert printed.err == "a\\x1b[2J\\n\\r\\x9b\\u202eb \u00e9\u200d\n"
    assert printed.out == "a\n\tb\\x1b]0;c\\x07\n"


def test_a_full_stdout_does_not_stop_the_work(monkeypatch):
    for name, number in (("stdout", errno.ENOSPC), ("stderr", None)):
        with monkeypatch.context() as patch, open("/dev/full", "w", buffering=1) as full:
            patch.setattr(f"sys.{name}", full)
            for _ in range(3):
                progress.print_result("a result")
                progress.log("a line")
            error = progress.stdout_error()
        assert (error and error.errno) == number and progress.stdout_error() is None


def test_streams_that_are_not_there(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    progress.print_result("a result")
    progress.log("a line")
    with progress.progress_bar(3, True, "sampling", "step") as bar:
        bar.update(3)
    assert progress.stdout_error() is None


def test_a_bar_inside_another_goes_when_it_is_done(monkeypatch):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with progress.progress_bar(4, True, "training", "step") as bar:
            with progress.progress_bar(2, True, "sampling", "step") as inner:
                inner.update(2)
                progress.log("a line")
            bar.update(4)
        printed = read_all(ours)
    os.close(ours)
    screen = on_screen(printed)
    assert screen[0] == "a line" and screen[1].startswith("training: 100%"), screen
    assert not any(screen[2:]), screen


def test_all_messages_are_printed_in_one_place():
    for path in (ROOT / "mdt_jax").rglob("*.py"):
        found = re.findall(r"(?<![\w.])print\(|sys\.std(?:err|out)\.write", path.read_text())
        assert not found or path.name == "progress.py", path


def test_all_bars_are_made_in_one_place():
    for path in [*(ROOT / "mdt_jax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert path.name == "progress.py" or "tqdm" not in path.read_text(), path
