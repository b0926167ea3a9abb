"""``jllama chat`` as users drive it: typed, pasted, piped, interrupted."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from jllama.cli import chat


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):
    """Replace the user's typing by these lines, for questions and menus. Returns the prompts that were shown."""

    def call(*lines: str | Exception) -> list[str]:
        left, asked = iter(lines), []

        def read(prompt: str) -> str:
            asked.append(prompt)
            line = next(left)
            if isinstance(line, Exception):
                raise line
            return line

        monkeypatch.setattr(chat, "read_message", read)
        monkeypatch.setattr(chat, "read_line", read)
        return asked

    return call


def talk(*flags: str) -> None:
    chat.main([*flags, "--no-compilation-cache"])


def test_chat_keeps_the_conversation(capsys: pytest.CaptureFixture[str], typed, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    typed("/system be kind", "hello", "/nonsense", "and then?", f"/save {saved}", f"/save {saved}", "/reset", "/quit")
    talk("-n", "6")
    out, err = capsys.readouterr()
    said = json.loads(saved.read_text())
    assert said["system"] == "be kind"
    assert [exchange["question"] for exchange in said["exchanges"]] == ["hello", "and then?"]
    assert all(exchange["answer"] in out for exchange in said["exchanges"])
    assert "/nonsense: no such command" in err
    assert "cannot be written" in err  # the second save: a file is never overwritten
    assert "forgotten" in err


def test_a_banner_says_what_answers(capsys: pytest.CaptureFixture[str], typed) -> None:
    typed("/quit")
    talk("-c", "128", "--quant", "int8")
    err = capsys.readouterr().err
    line, note = err.splitlines()[-2:]
    assert "no chat template" in note
    for part in ("demo (hf, 2.3 M weights)", "weights in int8", "float32", "XLA on cpu", "context 128 tokens"):
        assert part in line
    typed("/quit")
    talk("-q")
    assert capsys.readouterr().err == ""


FILLING = ("tell me a story", "tell me another story please")
SMALL = ("-n", "24", "-c", "80", "-q", "--chat-template", "llama-2", "--when-full")


def test_chat_asks_what_to_drop_when_the_context_is_full(capsys, typed, monkeypatch) -> None:
    monkeypatch.setattr(chat, "interactive", lambda: True)
    asked = typed(*FILLING, "what?", "d", "no more", "c", "/quit")
    talk(*SMALL, "ask")
    assert [prompt for prompt in asked if "[d]rop" in prompt] == [chat.MENU] * 3  # "what?" was no answer
    assert "the context is full" in capsys.readouterr().err


@pytest.mark.parametrize("leave", ["/quit", chat.Leave()])
def test_the_menu_can_be_left(leave: str | Exception, typed, monkeypatch) -> None:
    monkeypatch.setattr(chat, "interactive", lambda: True)
    asked = typed(*FILLING, leave)
    talk(*SMALL, "ask")
    assert asked[-1] == chat.MENU


def test_ctrl_c_in_the_menu_takes_the_question_back(typed, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chat, "interactive", lambda: True)
    saved = tmp_path / "talk.json"
    typed(*FILLING, chat.Cancelled(), f"/save {saved}", "/quit")
    talk(*SMALL, "ask")
    assert [e["question"] for e in json.loads(saved.read_text())["exchanges"]] == ["tell me a story"]


def test_piped_questions_are_never_taken_for_an_answer_to_a_menu(module, tmp_path: Path) -> None:
    """Piped lines such as "d" and "reset" are questions, not commands."""
    saved = tmp_path / "talk.json"
    lines = "\n".join([*FILLING, "d", "reset", f"/save {saved}"]).encode()
    flags = ("jllama.cli.chat", *SMALL[:-1], "--no-compilation-cache")
    dropped = module(*flags, "--when-full", "drop", stdin=lines)
    assert dropped.returncode == 0, dropped.stderr
    assert b"the oldest exchange is forgotten" in dropped.stderr
    assert json.loads(saved.read_text())["exchanges"][-1]["question"] == "reset"
    for more in ((), ("--when-full", "stop")):
        stopped = module(*flags, *more, stdin=lines)
        assert stopped.returncode == 2
        last = stopped.stderr.splitlines()[-1]
        assert last.startswith(b"jllama chat: error: the context is full")
        assert b"--when-full drop" in last
    asked = module(*flags, "--when-full", "ask", stdin=lines)
    assert asked.returncode == 2
    assert b"--when-full: expected drop or stop where the input is piped, found ask" in asked.stderr


def test_an_interrupt_before_the_first_word_leaves_no_turn(capsys, typed, monkeypatch, tmp_path: Path) -> None:
    from jllama.text.lm import LM

    saved, original = tmp_path / "talk.json", LM.complete

    def interrupted(self, completions, **options):
        pieces = original(self, completions, **options)
        for n, piece in enumerate(pieces):
            if n == interrupted.after:
                pieces.close()
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(LM, "complete", interrupted)
    for interrupted.after, kept in ((0, []), (2, ["hello"])):
        typed("hello", f"/save {saved}", "/quit")
        talk("-n", "40")
        assert "(stopped)" in capsys.readouterr().err
        assert [e["question"] for e in json.loads(saved.read_text())["exchanges"]] == kept
        saved.unlink()


def test_a_line_that_ends_with_a_backslash_goes_on(module, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    lines = f"one\\\ntwo\\\nthree\n/save {saved}\nlast\\".encode()
    done = module("jllama.cli.chat", "-n", "2", "--no-compilation-cache", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert json.loads(saved.read_text())["exchanges"][0]["question"] == "one\ntwo\nthree"


class Terminal:
    """``jllama chat`` in its own terminal. Its state is in ``home``."""

    def __init__(self, home: Path, *flags: str, columns: int = 80) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        environment = os.environ | {"XDG_STATE_HOME": str(home), "TERM": "xterm"}
        chat = [sys.executable, "-m", "jllama.cli.chat", "-q", "-n", "2", "--no-compilation-cache", *flags]
        # The terminal must be the program's own, otherwise Ctrl-C would not interrupt it. Nor would it where the tests
        # run in a shell's background, which ignores the signal.
        own = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        own += "os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", own, *chat]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.at, self.shown, self.passed = ours, b"", b""

    def expect(self, text: bytes, again: bytes = b"") -> None:
        """Wait until the terminal shows a text after what was expected before. Meanwhile type ``again`` repeatedly."""
        end = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if not select.select([self.at], [], [], 2)[0]:
                self.type(again)
                continue
            try:
                self.shown += os.read(self.at, 4096)
            except OSError:  # the program has gone
                raise AssertionError(self.shown) from None
        before, _, self.shown = self.shown.partition(text)
        self.passed += before + text

    def type(self, text: bytes) -> None:
        os.write(self.at, text)

    def leave(self) -> int:
        self.type(b"/quit\r")
        return self.process.wait(60)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait(60)
        os.close(self.at)


def test_in_a_terminal_a_paste_is_one_message_and_the_history_lasts(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with Terminal(tmp_path) as first:
        first.expect(b"> ")
        first.type(b"\x1b[200~pasted one\npasted two\x1b[201~\r")
        first.expect(b"(cut off after 2 tokens)")
        first.expect(b"> ")
        first.type(f"/save {saved}\r".encode())
        first.expect(b"saved 1 exchanges")
        assert first.leave() == 0
    assert json.loads(saved.read_text())["exchanges"][0]["question"] == "pasted one\npasted two"
    file = tmp_path / "jllama" / "chat_history"
    assert "pasted one pasted two" in file.read_text().replace("\\040", " ")
    assert file.stat().st_mode & 0o077 == 0

    with Terminal(tmp_path) as second:
        second.expect(b"> ")
        second.type(b"abc")
        second.expect(b"abc")
        # Python's input() misses a Ctrl-C that arrives while it handles a key, so it is sent repeatedly.
        second.type(b"\x03")
        second.expect(b"(Ctrl-D or /quit leaves)", again=b"\x03")
        second.expect(b"> ")
        second.type(b"\x1b[A\x1b[A\x1b[A\r")  # /quit, /save, and the first question
        second.expect(b"(cut off after 2 tokens)")
        second.expect(b"> ")
        saved.unlink()
        second.type(f"/save {saved}\r".encode())
        second.expect(b"saved 1 exchanges")
        assert second.leave() == 0
    assert json.loads(saved.read_text())["exchanges"][0]["question"] == "pasted one pasted two"

    with Terminal(tmp_path, "--no-history") as third:
        third.expect(b"> ")
        third.type(b"\x1b[Ahello\r")
        third.expect(b"(cut off after 2 tokens)")
        assert third.leave() == 0
    assert "hello" not in file.read_text()


@pytest.mark.parametrize(("columns", "rows_up"), [(40, 3), (200, 0)])
def test_a_long_line_wraps_at_the_width_of_the_terminal_and_stays_one_message(
    columns: int, rows_up: int, tmp_path: Path
) -> None:
    saved, question = tmp_path / "talk.json", " ".join(f"word-{n:04}" for n in range(13))  # 129 characters
    with Terminal(tmp_path, "--no-history", columns=columns) as terminal:
        terminal.expect(b"> ")
        terminal.type(question.encode())
        terminal.expect(b"12")
        terminal.type(b"\x01first ")  # Ctrl-A: to the start of the line
        terminal.expect(b"first ")
        terminal.type(b"\r")
        terminal.expect(b"(cut off after 2 tokens)")
        assert terminal.passed.count(b"\x1b[A") >= rows_up
        assert (b"\x1b[A" in terminal.passed) == (rows_up > 0)  # the cursor goes up over the wrapped rows
        terminal.expect(b"> ")
        terminal.type(f"/save {saved}\r".encode())
        terminal.expect(b"saved 1 exchanges")
        assert terminal.leave() == 0
    assert json.loads(saved.read_text())["exchanges"][0]["question"] == f"first {question}"
