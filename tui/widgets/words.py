"""Text that is drawn again only when it says something else."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static


class Words(Static):
    """Plain or styled text; markup in it is not interpreted."""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes, markup=False)
        self._said = Content("")

    def say(self, words: Content | str) -> None:
        """Show `words` instead of what was there."""
        content = Content(words) if isinstance(words, str) else words
        if not content.is_same(self._said):
            self.update(content, layout=self.styles.auto_dimensions)
            self._said = content
