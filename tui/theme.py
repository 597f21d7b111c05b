"""Colours that stay apart for colour-blind eyes (after Okabe and Ito), on a dark ground."""

from __future__ import annotations

from textual.theme import Theme

APPLIANCE = Theme(
    name="appliance",
    primary="#56b4e9",
    secondary="#cc8fc0",
    accent="#f0a830",
    success="#4cc38a",
    warning="#f0d050",
    error="#f2765a",
    foreground="#d6dee6",
    background="#0f151b",
    surface="#131b23",
    panel="#1c2732",
    variables={
        "border": "#56b4e9",
        "border-blurred": "#2b3a48",
        "footer-background": "#0f151b",
        "footer-key-foreground": "#f0a830",
        "footer-description-foreground": "#9fb0bf",
        "scrollbar": "#2b3a48",
        "scrollbar-background": "#131b23",
        "scrollbar-background-hover": "#131b23",
        "scrollbar-background-active": "#131b23",
        "scrollbar-corner-color": "#131b23",
    },
)
