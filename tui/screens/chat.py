"""Chat: a conversation with the model that is live now."""

from __future__ import annotations

import time
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Input, Markdown, Static
from textual.worker import Worker

from appliance.words import visible
from tui.link import PROBLEMS, explain
from tui.screens.page import Page
from tui.viewmodels.box import Box
from tui.viewmodels.conversation import Conversation
from tui.widgets.words import Words


class ChatPage(Page):
    NAME = "chat"
    LABEL = "Chat"
    CSS_PATH = "chat.tcss"
    ABOUT = (
        "Asks the live model through the daemon, as an application would through the endpoint. "
        "The whole conversation is sent with each question. Escape stops an answer; what came of it is kept."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop_or_leave", "Stop, leave input", key_display="esc", id="chat.stop"),
        Binding("i,enter", "write", "Write", id="chat.write"),
        Binding("ctrl+n", "new", "New conversation", key_display="^n", id="chat.new"),
    ]
    AUTO_FOCUS = "#question"

    def __init__(self) -> None:
        super().__init__()
        self._conversation = Conversation()
        self._answering: Worker[None] | None = None
        self._routed: str | None = ""
        """The release that answers, as it was told last."""

    def compose_body(self) -> ComposeResult:
        with Vertical(id="body"):
            yield VerticalScroll(id="turns")
            yield Words(id="answering")
            yield Input(id="question", placeholder="Ask the live model; enter sends, esc leaves this line")

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one(Input).cursor_blink = False
        self.query_one("#turns", VerticalScroll).anchor()

    def show_box(self, box: Box) -> None:
        routed = box.status.routed
        if routed != self._routed and not self._answering:
            self._routed = routed
            words = f"{routed} answers" if routed else "no release is live: promote one on page 3"
            self.query_one("#answering", Words).say(words)

    @on(Input.Submitted, "#question")
    def _ask(self, message: Input.Submitted) -> None:
        question = message.value.strip()
        if not question or self.appliance.refused(
            "the model is still answering; esc stops it" if self._answering else None
        ):
            return
        message.input.clear()
        self._answering = self._answer(question)

    @work(group="answer", exit_on_error=False)
    async def _answer(self, question: str) -> None:
        turns, state = self.query_one("#turns", VerticalScroll), self.query_one("#answering", Words)
        answer = Markdown(classes="answer", open_links=False)
        await turns.mount(Static(visible(question), classes="question", markup=False), answer)
        turns.anchor()
        state.say("waiting for the first word; esc stops it")
        stream = Markdown.get_stream(answer)
        began, first = time.monotonic(), None
        try:
            async for piece in self.appliance.client.chat(self._conversation.ask(question)):
                if first is None:
                    first = time.monotonic() - began
                    state.say("answering; esc stops it")
                self._conversation.take(piece)
                await stream.write(visible(piece))
            state.say(f"first word after {first or 0:.1f}s, all in {time.monotonic() - began:.1f}s")
        except PROBLEMS as error:
            await turns.mount(Static(f"✗ {explain(error)}", classes="error", markup=False))
            state.say("no answer")
        finally:
            self._conversation.close()
            self._answering = None
            await stream.stop()

    def action_stop_or_leave(self) -> None:
        if self._answering:
            self._answering.cancel()
            self.query_one("#answering", Words).say("stopped")
        else:
            self.set_focus(None)

    def action_write(self) -> None:
        self.query_one(Input).focus()

    async def action_new(self) -> None:
        if self._answering:
            self._answering.cancel()
        self._conversation = Conversation()
        await self.query_one("#turns").remove_children()
        self.query_one(Input).focus()
