"""What the site needs beyond Markdown: formulas as MathML, notebooks, and the options of commands.

Formulas are written in TeX between dollars and become MathML when the site is built. Browsers
draw that themselves, so no script is loaded and the pages are whole without network. Where
latex2mathml is not installed the TeX source stands there instead.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

try:
    from latex2mathml.converter import convert
except ImportError:
    convert = None

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)
# What the theme's offline search loads.
_SHIM = "https://unpkg.com/iframe-worker/shim"
_WORKER = "javascripts/worker-from-disk.js"
_COMMANDS = "<!-- commands -->"


# Before mkdocs-jupyter looks which files are notebooks.
@event_priority(100)
def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks, which stand beside the documentation and not in it."""
    root = Path(config.config_file_path).resolve().parent
    for path in sorted(root.glob("notebooks/*.ipynb")):
        name = str(path.relative_to(root))
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the options of every command in the place of a comment."""
    return (
        markdown.replace(_COMMANDS, "\n".join(_commands())) if _COMMANDS in markdown else markdown
    )


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML."""
    content = _INLINE.sub(lambda match: _formula(match[1], "inline"), content)
    return _BLOCK.sub(lambda match: _formula(match[1], "block"), content)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Have the search from disk start with our script, and nothing from elsewhere."""
    return _from_here(output, page.url)


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """The same for pages without a source, such as 404.html."""
    return _from_here(output_content, template_name)


def _from_here(page: str, url: str) -> str:
    return page.replace(_SHIM, get_relative_url(_WORKER, url))


def _formula(tex: str, display: str) -> str:
    tex = html.unescape(tex).strip()
    if convert is None:
        code = f"<code>{html.escape(tex)}</code>"
        return code if display == "inline" else f'<p class="formula">{code}</p>'
    drawn = convert(tex, display=display)
    return drawn if display == "inline" else f'<div class="formula">{drawn}</div>'


def _commands() -> Iterator[str]:
    from typer.main import get_command

    from circuitlens.cli import app

    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(["circuitlens", name, *(p.name.upper() for p in arguments)])
        yield f"\n## `{usage}`\n"
        # Typer's own paragraphs; what is indented there is an example.
        yield re.sub(r"^(?=\S)", "", command.help or "") + "\n"
        yield "| option | default | |"
        yield "|---|---|---|"
        for option in (p for p in command.params if p.param_type_name == "option"):
            if option.name == "help":
                continue
            names = ", ".join(f"`{o}`" for o in option.opts)
            yield f"| {names} | {_default(option)} | {(option.help or '').replace('|', '/')} |"


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag or option.default is None or option.default == ():
        return ""
    return f"`{option.default}`"
