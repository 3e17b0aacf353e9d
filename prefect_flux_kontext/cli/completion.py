"""`flux-kontext completion`: scripts that complete commands and options in a shell."""

from __future__ import annotations

import argparse

_BASH = """\
_flux_kontext() {{
  local words
  case "${{COMP_WORDS[1]}}" in
{cases}
    *) words="{commands}" ;;
  esac
  [ "$COMP_CWORD" = 1 ] && words="{commands}"
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _flux_kontext flux-kontext
"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def print_script(options: argparse.Namespace) -> int:
    """Run `completion`."""
    words = {
        name: [word for action in parser._actions for word in action.option_strings]  # noqa: SLF001
        for name, parser in options.parsers.items()
    }
    if options.shell == "fish":
        print("complete -c flux-kontext -n __fish_use_subcommand -f -a", repr(" ".join(words)))
        for name, names in words.items():
            for word in names:
                flag = f"-l {word[2:]}" if word.startswith("--") else f"-s {word[1:]}"
                print(f"complete -c flux-kontext -n '__fish_seen_subcommand_from {name}' {flag}")
        return 0
    cases = "\n".join(f'    {name}) words="{" ".join(names)}" ;;' for name, names in words.items())
    script = _BASH.format(cases=cases, commands=" ".join(words))
    print((_ZSH if options.shell == "zsh" else "") + script, end="")
    return 0
