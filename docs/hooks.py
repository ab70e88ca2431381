"""What the documentation site makes while it is built: the page of the commands, and formulas as MathML.

A hook of MkDocs. The commands' page comes from the command line itself, so it cannot be out of date; formulas are
converted here, so that pages load no script from anywhere.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the commands into their page."""
    return markdown + commands() if page.file.src_uri == "commands.md" else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Formulas of a page as MathML."""
    return _MATH.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    block = found[2] == "["
    made = convert(html.unescape(found[3]).strip(), display="block" if block else "inline")
    if "\\" in made:
        raise ValueError(f"a formula has a command that latex2mathml does not know: {found[3]}")
    return f'<p style="overflow-x: auto">{made}</p>' if block else made


def commands() -> str:
    """Every command of `hf-gptq` with its arguments and options, in Markdown."""
    from typer.main import get_command

    from hf_gptq_cli import app

    root: Any = get_command(app)
    return "\n".join(_command(f"hf-gptq {name}", command) for name, command in root.commands.items())


def _command(name: str, command: Any) -> str:
    if hasattr(command, "commands"):
        return "\n".join(_command(f"{name} {inner}", child) for inner, child in command.commands.items())
    lines = [f"\n## {name}\n", _text(command.help or ""), ""]
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        kind = "Arguments" if parameter.param_type_name == "argument" else None
        panels.setdefault(kind or getattr(parameter, "rich_help_panel", None) or "Options", []).append(parameter)
    for title, parameters in panels.items():
        rows = [_row(p) for p in parameters if not getattr(p, "hidden", False) and p.name != "help"]
        if rows:
            lines += [f"**{title}**\n", "| | | default |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _row(parameter: Any) -> str:
    names = [parameter.metavar or parameter.name.upper()]
    if parameter.param_type_name == "option":
        names = [*parameter.opts, *parameter.secondary_opts]
    usual = parameter.default
    if parameter.required:
        shown = "required"
    elif usual is None or (usual is False and not parameter.secondary_opts) or callable(usual) or usual == "":
        shown = ""
    elif parameter.secondary_opts:
        shown = f"`{(parameter.opts if usual else parameter.secondary_opts)[0]}`"
    else:
        shown = f"`{usual}`"
    text = _text(getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
    return f"| {' '.join(f'`{name}`' for name in names)} | {text} | {shown} |"


def _text(text: str) -> str:
    """Help text as Markdown: examples as code, names in capitals as they are."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text.strip().replace("\b", "")):
        lines = [line.strip() for line in paragraph.strip().splitlines()]
        first = re.match(r"(Examples?):\s*(.*)", lines[0]) if lines else None
        if first is not None:
            code = [line for line in [first[2], *lines[1:]] if line]
            if code:
                out.append("```sh\n" + "\n".join(code) + "\n```")
        elif lines and lines[0].startswith("hf-gptq "):
            out.append("```sh\n" + "\n".join(lines) + "\n```")
        else:
            out.append(" ".join(lines))
    return "\n\n".join(out).replace("\n```\n\n```sh\n", "\n")
