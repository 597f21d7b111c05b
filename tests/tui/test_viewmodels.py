"""What the screens show, without a screen."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import api
from tui.viewmodels import permits, states
from tui.viewmodels.box import status_line
from tui.viewmodels.conversation import Conversation
from tui.viewmodels.curves import loss_plot
from tui.viewmodels.history import event_line
from tui.viewmodels.log_text import LogText
from tui.viewmodels.outline import gates, outline, row_preview, row_text
from tui.viewmodels.plot import Boundary, Layer, plot, smooth, ticks
from tui.viewmodels.records import recipe_entry, release_entry, run_entry
from tui.viewmodels.styles import fit
from tui.viewmodels.summary import run_summary
from tui.viewmodels.trace import Event, RunTrace


class Story:
    """Writes events as a worker does."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def tell(self, kind: str, stage: str = "sft", **fields: Any) -> Story:
        seq = len(self.events) + 1
        self.events.append({"seq": seq, "time": 1000.0 + seq, "event": kind, "stage": stage, **fields})
        return self

    def steps(self, *steps: int, stage: str = "sft", of: int = 10, loss: float | None = None) -> Story:
        for step in steps:
            self.tell("step", stage, step=step, steps=of, loss=1 / step if loss is None else loss, lr=1e-4)
        return self

    def trace(self) -> RunTrace:
        trace = RunTrace()
        trace.take(self.events)
        return trace


def run(state: api.RunState = "running", stage: str = "sft", **fields: Any) -> api.Run:
    stages = ("sft", "dpo", "merge", "verify", "probe")
    known: dict[str, Any] = {"created": 900.0, "started": 1000.0, **fields}
    return api.Run(id="facts-1", recipe="facts", base="tiny", state=state, stages=stages, stage=stage, **known)


CANARY = api.Canary(
    release="b",
    live="a",
    share=0.1,
    since=0,
    reason="waits for more requests: 9 to it",
    figures=(
        api.CanaryFigures(
            release="a",
            requests=31,
            errors=0,
            stops={"stop": 31},
            seconds={"first token": api.Spread(median=0.25, p95=1)},
        ),
        api.CanaryFigures(release="b", requests=2, errors=1, stops={}, seconds={}, ratings={"good": 1, "bad": 2}),
    ),
    limits=("goes live after 11",),
)
UNMERGED = api.Unmerged(run="b", live="a", name="b+adapter", since=0, answers=True)
ENDED = CANARY.model_copy(update={"ended": 1.0, "outcome": "rolled back", "reason": "it failed", "limits": ()})


def release(**fields: Any) -> api.Release:
    known: dict[str, Any] = {"id": "facts-1", "base": "tiny", "state": "verified", "created": 0.0, **fields}
    return api.Release(**known)


def test_fit_counts_cells_and_not_characters() -> None:
    assert fit("日本語日本語", 7) == "日本語…"
    assert fit("short", 7) == "short"


class TestTrace:
    def test_takes_each_event_once(self) -> None:
        story = Story().tell("stage_started").steps(1, 2)
        trace = story.trace()
        assert trace.take(story.events) == []
        story.steps(3)
        assert [event["seq"] for event in trace.take(story.events)] == [4]
        assert [x for x, _ in trace.curves["sft"].train] == [1, 2, 3]

    def test_stage_that_went_back_to_a_checkpoint_draws_over(self) -> None:
        story = Story().tell("stage_started").steps(1, 2, 3).tell("eval", step=3, loss=0.9).steps(4)
        story.tell("stage_started").steps(3, 4, loss=0.1)
        curve = story.trace().curves["sft"]
        assert [x for x, _ in curve.train] == [1, 2, 3, 4]
        assert curve.train[2:] == [(3, 0.1), (4, 0.1)]
        assert curve.evaluation == []

    def test_progress_is_that_of_the_present_stage(self) -> None:
        story = Story().tell("stage_started").steps(1, 2)
        assert story.trace().progress == (2, 10)
        story.tell("stage_finished", seconds=9).tell("stage_started", "merge")
        assert story.trace().progress is None
        assert story.trace().seconds == {"sft": 9}

    def test_held_out_loss_is_that_of_the_present_stage(self) -> None:
        story = Story().tell("stage_started").tell("eval", step=0, loss=2.0)
        assert story.tell("stage_started").trace().evaluation == 2.0
        assert story.tell("stage_started", "dpo").trace().evaluation is None

    def test_failure_is_forgotten_when_the_stage_starts_again(self) -> None:
        story = Story().tell("stage_started").tell("failed", reason="no memory", next="less")
        assert story.trace().failure
        assert not story.tell("stage_started").trace().failure

    def test_many_points_are_thinned_without_losing_a_spike(self) -> None:
        story = Story()
        for step in range(1, 20001):
            story.tell("step", step=step, steps=20000, loss=99.0 if step == 777 else 1.0)
        points = story.trace().curves["sft"].train
        assert len(points) <= 8192
        assert (777, 99.0) in points
        assert [x for x, _ in points] == sorted({x for x, _ in points})

    def test_a_held_out_loss_says_how_sure_it_is(self) -> None:
        story = Story().tell("eval", step=20, loss=2.0312, interval=[1.9062, 2.1562])
        line = event_line(story.events[0])
        assert line is not None
        assert line.plain.endswith("step 20: held-out loss 2.031 ± 0.125")

    def test_null_is_how_the_daemon_writes_a_loss_that_is_no_number(self) -> None:
        story = Story().tell("step", step=1, steps=2, loss=None).tell("eval", step=1, loss=None)
        trace = story.trace()
        assert math.isnan(trace.curves["sft"].train[0][1])
        assert "✗ the loss is not a number" in run_summary(run(), trace, 80, 1000).plain

    def test_unknown_events_do_no_harm(self) -> None:
        story = Story().tell("curve").tell("from the future", figure=3)
        line = event_line(story.events[1])
        assert line
        assert "from the future" in line.plain
        assert story.trace().seq == 2


def drawn(width: int, height: int, *layers: Layer, **options: Any) -> list[str]:
    picture = plot(width, height, layers, **options)
    assert picture
    return picture.plain.split("\n")


class TestPlot:
    def test_line_falls_from_the_left_to_the_right(self) -> None:
        lines = drawn(24, 7, Layer("line", "red", [[(0, 1.0), (10, 0.0)]]))
        assert lines == [
            "1.0 ┤⠶⣤⣀                ",
            "    │  ⠉⠛⠶⣤⣀⡀           ",
            "0.5 ┤      ⠉⠙⠳⢦⣄⡀       ",
            "    │          ⠈⠙⠛⠶⣤⣀   ",
            "0.0 ┤               ⠉⠛⠶⣤",
            "    └┬────────┬────────┬",
            "     0        5       10",
        ]

    def test_what_is_not_finite_leaves_a_gap(self) -> None:
        points = [(float(x), 1.0) for x in range(11)]
        whole = drawn(40, 7, Layer("line", "red", [points]))
        for hole in (math.nan, math.inf, -math.inf):
            holed = drawn(40, 7, Layer("line", "red", [[*points[:5], (5.0, hole), *points[6:]]]))
            assert sum(line.count(" ") for line in holed) > sum(line.count(" ") for line in whole)

    def test_nothing_finite_or_no_room_is_no_picture(self) -> None:
        assert plot(40, 10, [Layer("line", "red", [[(1, math.nan)], []])]) is None
        assert plot(40, 4, [Layer("line", "red", [[(1, 1.0)]])]) is None
        assert plot(10, 10, [Layer("line", "red", [[(1, 1.0)]])]) is None

    @pytest.mark.parametrize("loss", [0.0, 1e-9, 5e-7, 1.0, -3.0, 1e12])
    @pytest.mark.parametrize(("width", "height"), [(16, 5), (80, 15), (200, 50)])
    def test_picture_has_its_size_whatever_the_scale(self, loss: float, width: int, height: int) -> None:
        lines = drawn(width, height, Layer("line", "red", [[(1, loss)], [(2, loss * 1.5)]]))
        assert [len(line) for line in lines] == [width] * height

    @given(
        st.lists(st.tuples(st.floats(0, 1e6), st.floats()), max_size=40),
        st.integers(16, 120),
        st.integers(5, 40),
    )
    def test_no_figure_breaks_the_picture(self, points: list[tuple[float, float]], width: int, height: int) -> None:
        parts = [sorted(points)]
        layers = [Layer("dots", "red", parts), Layer("line", "red", [smooth(parts[0])]), Layer("marks", "red", parts)]
        picture = plot(width, height, layers, [Boundary(3, "dpo")])
        if not any(abs(y) < 1e100 for _, y in points):
            assert picture is None
            return
        assert picture
        lines = picture.plain.split("\n")
        assert len(lines) == height
        assert {len(line) for line in lines} == {width}

    def test_later_layers_cover_earlier_ones(self) -> None:
        line, mark = Layer("line", "red", [[(0, 1.0), (10, 1.0)]]), Layer("marks", "blue", [[(5, 1.0)]])
        (row,) = [line for line in drawn(40, 7, line, mark) if "◆" in line]
        assert row.count("◆") == 1

    def test_boundary_is_labelled_and_does_not_hide_the_curve(self) -> None:
        curve = Layer("line", "red", [[(0, 1.0), (10, 0.0)]])
        lines = drawn(40, 9, curve, boundaries=[Boundary(5, "dpo")])
        assert "┊dpo" in lines[0]
        column = lines[0].index("┊")
        assert sum(line[column] not in "┊ " for line in lines[:7]) == 1

    def test_fifty_thousand_points_keep_their_spike(self) -> None:
        points = [(float(x), 5.0 if x == 31000 else 1.0) for x in range(50000)]
        top = drawn(80, 12, Layer("line", "red", [points]))[0]
        assert any(character not in " │┤0123456789." for character in top)

    def test_ticks_are_round_and_inside(self) -> None:
        assert ticks(0.0, 1.0, 4) == [0.0, 0.2, 0.4, pytest.approx(0.6), 0.8, 1.0]
        for low, high in ((0.1, 2.9), (-3.0, 7.0), (1e-6, 2e-6), (0, 12345)):
            marks = ticks(low, high, 5)
            assert 3 <= len(marks) <= 9
            assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in marks)

    def test_smoothing_keeps_the_level_from_the_first_point_on(self) -> None:
        assert [y for _, y in smooth([(x, 2.0) for x in range(100)])] == pytest.approx([2.0] * 100)
        noisy = [(x, 1.0 + (-1) ** x * 0.5) for x in range(200)]
        assert max(abs(y - 1) for _, y in smooth(noisy)[50:]) < 0.1
        assert math.isnan(smooth([(0, 1.0), (1, math.nan), (2, 1.0)])[1][1])

    def test_stages_follow_one_another_along_the_axis(self) -> None:
        story = Story().steps(*range(1, 11)).steps(1, 2, stage="dpo", of=10)
        picture = loss_plot(story.trace(), 80, 12)
        assert picture
        assert "sft" in picture.plain
        assert "┊dpo" in picture.plain
        assert picture.plain.rstrip().endswith("20")
        assert loss_plot(RunTrace(), 80, 12) is None


class TestSummary:
    def test_running(self) -> None:
        trace = Story().tell("stage_started").steps(1, 2, 3).trace()
        lines = run_summary(run(), trace, 60, 1000).plain.split("\n")
        assert lines[0].startswith("▶ running")
        assert lines[1] == "▶ sft → ○ dpo → ○ merge → ○ verify → ○ probe"
        assert lines[2].startswith("step 3/10  ━━━━")
        assert lines[2].endswith(" 30%")
        assert len(lines[2]) <= 60
        assert "loss 0.3333" in lines[3]

    def test_figures_that_do_not_fit_are_left_out_whole(self) -> None:
        story = Story().tell("stage_started")
        story.tell("step", step=1, steps=2, loss=1.0, lr=1e-4, grad_norm=2.0, tokens_per_second=9e9, memory=9e9)
        for width in (20, 40, 60, 80):
            last = run_summary(run(), story.trace(), width, 1000).plain.split("\n")[-1]
            assert len(last) <= width
            assert "loss 1" in last

    def test_each_state_has_its_own_glyph_and_word(self) -> None:
        assert len({look.glyph for look in states.RUNS.values()}) == len(states.RUNS) == 6
        assert len({look.word for look in states.RUNS.values()}) == 6

    def test_failed_stopped_and_finished(self) -> None:
        trace = RunTrace()
        failed = run_summary(run("failed", reason="no memory", next="smaller batch"), trace, 60, 1000).plain
        assert "✗ sft → ○ dpo" in failed
        assert "no memory\n→ smaller batch" in failed
        halfway = Story().tell("stage_started").steps(1, 2, 3).trace()
        stopped = run_summary(run("stopped"), halfway, 60, 1000).plain
        assert "■ sft" in stopped
        assert "step 3/10" in stopped
        done = run_summary(run("finished", "probe", finished=1100.0), trace, 60, 1000).plain
        assert "✓ probe" in done
        assert "took 1m 40s" in done
        assert "100%" in done

    def test_loss_that_is_no_number_is_said_in_words(self) -> None:
        trace = Story().tell("stage_started").steps(1, loss=math.nan).trace()
        assert "✗ the loss is not a number" in run_summary(run(), trace, 80, 1000).plain

    def test_list_entries(self) -> None:
        trace = Story().tell("stage_started").steps(1, 2, 3).trace()
        assert (
            run_entry(
                run(),
                trace,
                2000,
            ).plain
            == "▶ facts-1\n  running  sft 1/5  30%"
        )
        assert run_entry(run("queued"), None, 2000).plain == "○ facts-1\n  queued  next sft"
        assert run_entry(run("finished", finished=1100.0), None, 1101).plain == (
            "✓ facts-1\n  finished  1m 40s, just now"
        )
        entry = release_entry(release(live=True, gates={"structure": True, "parity": False}), 60)
        assert entry.plain == "◆ facts-1\n  live  1/2 gates, 1m ago"
        tried = release_entry(release(gates={"parity": True}, canary=CANARY), 60)
        assert tried.plain.startswith("◇ ")
        assert "canary  1/1 gates" in tried.plain
        assert release_entry(release(canary=ENDED), 60).plain.startswith("✓ ")
        assert recipe_entry(api.ShippedRecipe(name="a", summary="b\nc", text="")).plain == "• a\n  b c"


class TestPermits:
    def test_stop_and_resume(self) -> None:
        assert permits.why_not_stop(run("running")) is None
        assert permits.why_not_stop(run("queued")) is None
        for state in ("finished", "failed", "stopped"):
            assert f"has {state} already" in str(permits.why_not_stop(run(state)))
        assert permits.why_not_resume(run("failed")) is None
        assert permits.why_not_resume(run("stopped")) is None
        assert permits.why_not_resume(run("running"))
        assert permits.why_not_resume(run("finished"))

    def test_promote_and_roll_back(self) -> None:
        assert permits.why_not_promote(release()) is None
        assert permits.why_not_promote(release(live=True))
        assert "gate 2" in str(permits.why_not_promote(release(state="refused", reason="gate 2")))
        status = TestStatusLine().status()
        assert "x is missing" in str(permits.why_not_promote(release(damage="x is missing")))
        assert permits.why_not_roll_back((release(live=True), release(id="b", damage="x is missing")), status)
        refused = release(id="b", state="refused")
        assert permits.why_not_roll_back((release(live=True), release(id="b")), status) is None
        assert permits.why_not_roll_back((release(live=True), refused), status)
        assert permits.why_not_roll_back((release(),), status)
        tried = release(id="b", state="refused", canary=CANARY)
        assert permits.why_not_roll_back((release(live=True), tried), status) is None
        unmerged = status.model_copy(update={"unmerged": UNMERGED})
        assert permits.why_not_roll_back((release(live=True), refused), unmerged) is None

    def test_an_adapter_before_its_release(self) -> None:
        status = TestStatusLine().status
        assert permits.why_not_serve_adapter(run("running"), status(live="a-1")) is None
        assert "no release is live" in str(permits.why_not_serve_adapter(run("running"), status(live=None)))
        assert "finished" in str(permits.why_not_serve_adapter(run("finished"), status(live="a-1")))
        assert permits.why_not_serve_adapter(None, status(live="a-1"))

    def test_canary(self) -> None:
        status = TestStatusLine().status
        assert permits.why_not_try(release(), status(lease="share")) is None
        assert "live already" in str(permits.why_not_try(release(live=True), status(lease="share")))
        assert "exclusive" in str(permits.why_not_try(release(), status()))
        assert "no release is live" in str(permits.why_not_try(release(), status(lease="share", live=None)))
        assert "b is the canary" in str(permits.why_not_try(release(), status(lease="share", canary=CANARY)))


class TestTexts:
    def test_log_pieces_of_any_length_make_the_same_lines(self) -> None:
        text = "one\n10%\r100%\n\x1b[1mtwo\x1b[0m\r\nthree"
        for length in range(1, len(text) + 1):
            log, lines, tail = LogText(), [], ""
            for start in range(0, len(text), length):
                ended, tail = log.take(text[start : start + length])
                lines += ended
            assert (lines, tail) == (["one", "100%", "two"], "three")

    def test_outline_tells_everything_and_cuts_long_lists(self) -> None:
        text = outline(
            {"rows": 3, "none": None, "ok": True, "bad": [{"line": 1, "why": "x"}] * 300, "deep": {"a": [1]}}
        )
        lines = text.plain.split("\n")
        assert lines[:5] == ["rows  3", "none  –", "ok  yes", "bad", "  •  line 1, why x"]
        assert "  … and 100 more" in lines
        assert lines[-3:] == ["deep", "  a", "    •  1"]

    def test_gates_tell_of_damage_and_of_files_that_are_read(self) -> None:
        check = {"release": "a", "state": "reading", "read": 3, "bytes": 4}
        text = gates(release(damage="x is missing", check=check), None).plain
        assert "✗ damaged" in text
        assert "x is missing" in text
        assert "the files of a are being read: 3 B of 4 B" in text

    def test_gates_tell_verdict_and_figures(self) -> None:
        manifest = {"gates": {"parity": {"passed": False, "figures": {"equal": 7, "prompts": 8}}}}
        manifest["gates"]["parity"]["reason"] = "1 of 8 differs"
        text = gates(release(state="refused", reason="1 prompt differs", gates={"parity": False}), manifest).plain
        assert "✗ refused" in text
        assert "1 prompt differs" in text
        assert "✗ parity failed\n  1 of 8 differs\n  equal 7, prompts 8" in text
        assert "no gate was measured" in gates(release(), None).plain

    def test_a_canary_is_told_with_both_sides_figures(self) -> None:
        text = gates(release(canary=CANARY), None).plain
        assert "◇ canary of 10%: waits for more requests: 9 to it" in text
        assert "a: 31 requests, 0 failed; 31 stop; first token 0.25 s" in text
        assert "b: 2 requests, 1 failed; 1 rated good, 2 rated bad" in text
        assert "goes live after 11" in text
        assert "◇ canary of 10% rolled back: it failed" in gates(release(canary=ENDED), None).plain

    def test_rows_of_both_kinds(self) -> None:
        talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "line": 3}
        assert row_preview(talk).plain == "hi → yo"
        assert row_text(talk).plain == "user\nhi\n\nassistant\nyo\n\nline  3"
        pair = {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": None, "tool_calls": [1]}],
        }
        assert row_preview(pair).plain == "hi → yes"
        assert 'rejected\nassistant\n{"content": null, "tool_calls": [1]}' in row_text(pair).plain

    def test_question_without_an_answer_is_not_sent_again(self) -> None:
        talk = Conversation()
        talk.ask("lost")
        talk.close()
        assert talk.ask("one") == [{"role": "user", "content": "one"}]
        talk.take("an")
        talk.take("swer")
        talk.close()
        assert [turn["content"] for turn in talk.ask("two")] == ["one", "answer", "two"]


class TestStatusLine:
    def status(self, **fields: Any) -> api.Status:
        hardware = api.Hardware(
            cores=2, cpu_load=99.0, memory_total=100, memory_used=50, disk_total=10**12, disk_free=10**10
        )
        known: dict[str, Any] = {
            "live": "a-1",
            "routed": "a-1",
            "engines": (api.Engine(release="a-1", kind="vllm", state="starting"),),
            "lease": "exclusive",
            "running": None,
            **fields,
        }
        return api.Status(version="1", home="/", endpoint="", queued=0, hardware=hardware, **known)

    def test_tells_engine_lease_and_what_runs_out(self) -> None:
        line = status_line(self.status(), 120).plain
        assert line == "◆ a-1 ◐ starting  │  lease serving  │  cpu 99%!  │  mem 50%  │  disk 10.0 GB free!"

    @pytest.mark.parametrize(
        ("figures", "shown"),
        [((80, 20, 50), "gpu 50% 25% mem"), ((None, None, 50), "gpu 50%"), ((80, 79, None), "gpu ? 99% mem!")],
    )
    def test_a_figure_that_the_gpu_does_not_tell_is_missing(self, figures: Any, shown: str) -> None:
        total, used, load = figures
        status = self.status()
        card = api.Gpu(name="g", memory_total=total, memory_used=used, utilisation=load)
        status = status.model_copy(update={"hardware": status.hardware.model_copy(update={"gpus": (card,)})})
        assert f"  │  {shown}  │  " in status_line(status, 140).plain

    def test_lease_names_who_holds_the_accelerator(self) -> None:
        assert "lease training" in status_line(self.status(running="b-1"), 80).plain
        assert "lease free" in status_line(self.status(routed=None), 80).plain
        assert "lease shared" in status_line(self.status(lease="share"), 80).plain

    def test_says_for_whom_an_engine_sleeps_where_there_is_room(self) -> None:
        asleep = (api.Engine(release="a-1", kind="vllm", state="sleeping"),)
        status = self.status(engines=asleep, routed=None, running="b-1")
        assert status_line(status, 120).plain.startswith("◆ a-1 ○ asleep while b-1 trains  │  lease training")
        assert status_line(status, 78).plain.startswith("◆ a-1 ○ asleep │ lease training")
        assert status_line(self.status(engines=asleep), 120).plain.startswith("◆ a-1 ○ asleep  │")

    def test_no_release_and_no_engine(self) -> None:
        assert status_line(self.status(live=None, routed=None), 80).plain.startswith("no live release")
        assert status_line(self.status(engines=()), 80).plain.startswith("◆ a-1 ○ no engine")

    def test_tells_of_the_canary(self) -> None:
        assert status_line(self.status(canary=CANARY), 120).plain.startswith("◆ a-1 ◐ starting ◇ 10%  │")

    @pytest.mark.parametrize("width", [78, 99, 118])
    def test_fits(self, width: int) -> None:
        name = "a-name-as-long-as-a-name-may-be-" * 2
        tried = self.status(live=name, routed=name, engines=(), canary=CANARY)
        assert status_line(tried, width).cell_length <= width
        assert status_line(self.status(live=name, routed=name, engines=()), width).cell_length <= width
