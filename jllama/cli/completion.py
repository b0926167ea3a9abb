"""Shell completion scripts, generated from the argument parsers of the commands.

In bash: ``source <(jllama --completion bash)``. In zsh: the same with ``zsh``. In fish: ``jllama --completion fish |
source``.
"""

import argparse
from collections.abc import Callable

from jllama.cli import command_modules

Flags = dict[str, tuple[str, ...]]  # flag -> its choices; empty if it has none


def script(shell: str) -> str | ValueError:
    """The script for a shell, or an error if the shell is not known."""
    if shell not in SHELLS:
        return ValueError(f"--completion: expected one of {', '.join(SHELLS)}, found {shell!r}")
    return SHELLS[shell]({name: flags_of(module.parser()) for name, module in command_modules().items()})


def flags_of(parser: argparse.ArgumentParser) -> Flags:
    """The flags of a command."""
    choices = ((action.option_strings, action.choices) for action in parser._actions)
    return {flag: tuple(map(str, values or ())) for flags, values in choices for flag in flags}


def bash(commands: dict[str, Flags]) -> str:
    """The script for bash. After a flag with choices, it completes the choices; after ``-``, it completes flags.
    Otherwise bash completes file names."""
    cases = "\n".join(_bash_case(name, flags) for name, flags in commands.items())
    return f"""\
_jllama() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" flags="" values=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        values="{" ".join(commands)} --help --version --completion"
    else
        case "${{COMP_WORDS[1]}}" in
            --completion) values="{" ".join(SHELLS)}" ;;
{cases}
        esac
    fi
    COMPREPLY=()
    if [ -n "$values" ]; then
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    elif [ "${{word#-}}" != "$word" ]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    fi
}}
complete -o default -F _jllama jllama"""


def _bash_case(name: str, flags: Flags) -> str:
    values = "".join(
        f"""
                    {flag}) values="{" ".join(few)}" ;;"""
        for flag, few in flags.items()
        if few
    )
    return f"""\
            {name})
                flags="{" ".join(flags)}"
                case "$before" in{values}
                    *) ;;
                esac ;;"""


def zsh(commands: dict[str, Flags]) -> str:
    """The script for zsh: the one for bash, run with zsh's bashcompinit."""
    return f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{bash(commands)}"


def fish(commands: dict[str, Flags]) -> str:
    """The script for fish, with one line per flag."""
    lines = [f'complete -c jllama -n __fish_use_subcommand -f -a "{" ".join(commands)}"']
    lines += [f"complete -c jllama -n __fish_use_subcommand -l {flag}" for flag in ("help", "version")]
    lines += [f'complete -c jllama -n __fish_use_subcommand -l completion -x -a "{" ".join(SHELLS)}"']
    for name, flags in commands.items():
        for flag, few in flags.items():
            kind = "l" if flag.startswith("--") else "s" if len(flag) == 2 else "o"
            values = f' -x -a "{" ".join(few)}"' if few else ""
            lines.append(
                f'complete -c jllama -n "__fish_seen_subcommand_from {name}" -{kind} {flag.lstrip("-")}{values}'
            )
    return "\n".join(lines)


SHELLS: dict[str, Callable[[dict[str, Flags]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
