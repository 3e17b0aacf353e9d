"""Pages that are written from the code when the documentation is built."""

from pathlib import Path

from prefect_flux_kontext.settings import FluxKontextSettings


def settings_table() -> str:
    """The environment settings as a Markdown table, from the settings class."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in FluxKontextSettings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `FLUX_KONTEXT_{name.upper()}` | {default} | {meaning} |")
    return "\n".join(lines)


def write_settings(page: Path) -> None:
    """Write the table where `settings.md` includes it, unless it stands there already."""
    text = settings_table() + "\n"
    page.parent.mkdir(exist_ok=True)
    if not page.exists() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")
