"""What the pages of the reference have in common."""

NOW = 1_767_225_600.0
"""When everything happens that pages show."""

MADE = "<!-- Made by `python -m docs.generate`. Change the code, not this file. -->\n"


def cell(text: str) -> str:
    """A text within a table."""
    # GitHub splits cells at a bar, also between backticks.
    return text.replace("|", "\\|")
