"""The command line as a shell has it: help that leads on, JSON for programs, completion, colours on a terminal alone."""
import json
import os
import pty
import re
import subprocess

import pytest
import typer
from commands import COMMAND, EXAMPLE, run

from mlserve.cli import app
from mlserve.errors import MlserveError, exit_codes

SHELL = typer.main.get_command(app)
RUNS_ON = {"serve", "debug"}  # end with what they started, and have no result


@pytest.mark.parametrize("name", SHELL.commands)
def test_every_command_has_json_and_its_next_step(name):
    command = SHELL.commands[name]
    assert name in RUNS_ON or any("--json" in p.opts for p in command.params)
    assert command.help and command.epilog.startswith("Next: ")
    for named in re.findall(r"mlserve ([a-z]+)", command.epilog):
        assert named in SHELL.commands, command.epilog


def test_the_help_lists_every_command_in_the_order_of_the_story():
    done = run(COMMAND, "--help", env={"COLUMNS": "120"})
    assert done.returncode == 0 and SHELL.list_commands(None) == re.findall(r"^│ ([a-z]+) ", done.stdout, re.M)
    assert set(SHELL.list_commands(None)) == set(SHELL.commands)
    assert done.stdout.strip().splitlines()[-1].strip().endswith("of your own.")
    done = run(COMMAND, "promote", "--help", env={"COLUMNS": "120"})
    assert done.stdout.strip().splitlines()[-1].strip().startswith("Next: mlserve deploy compose MODEL")


def on_a_terminal(*command, env):
    "What a command prints where somebody sits"
    ours, theirs = pty.openpty()
    with subprocess.Popen([str(c) for c in command], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm-256color", **env}) as process:
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 65536):
                said += part
        except OSError:  # Linux says so when the other end is closed
            pass
        assert process.wait(60) == 0
    os.close(ours)
    return said.decode()


def test_colours_appear_on_a_terminal_alone():
    plain = run(COMMAND, "check", "--help")
    assert "\x1b" not in plain.stdout + plain.stderr
    assert "\x1b[" in on_a_terminal(COMMAND, "check", "--help", env={})
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", on_a_terminal(COMMAND, "check", "--help", env={"NO_COLOR": "1"}))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell):
    def completed(words):
        "What a shell is offered, by the protocol of Click and Typer"
        env = {"_MLSERVE_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1),
               "_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        return run(COMMAND, env=env).stdout
    assert all(name in completed("mlserve re") for name in ("release", "resume", "render", "releases"))
    assert "--token-file" in completed("mlserve check --t")
    assert shell in run(COMMAND, env={"_MLSERVE_COMPLETE": f"source_{shell}"}).stdout or shell != "bash"


def test_what_prints_a_file_prints_it_as_json_too():
    plain, full = (run(COMMAND, "dockerfile", EXAMPLE, *more, env={"MLSERVE_BASE": None, "MLSERVE_REGISTRY": None}) for more in ([], ["--json"]))
    told = json.loads(full.stdout)
    assert plain.stdout == told["text"] + "\n" and (told["device"], told["delivery"]) == ("cpu", "baked")
    plain, full = (run(COMMAND, "render", "alerts", *more) for more in ([], ["--json"]))
    assert plain.returncode == 0 and plain.stdout == json.loads(full.stdout)["text"] + "\n"


def test_every_failure_has_a_code_that_is_listed_and_a_line_on_the_page_of_codes():
    def family(cls):
        return [cls] + [c for s in cls.__subclasses__() for c in family(s)]
    page = (EXAMPLE.parent.parent / "reference/exit_codes.ipynb").read_text()
    for cls in family(MlserveError):
        if cls.__module__ == "mlserve.errors":
            assert cls.code in exit_codes, cls
            assert str(cls.code) in page
