"""A prompt for each part of a video: which counts when. Without ComfyUI."""

from __future__ import annotations

import pytest
from cogx.models.specs import SpecError
from cogx.models.turns import TURN, first_of_each, prompts_of, sequences
from cogx.samplers.prompts import in_turn, mix
from hypothesis import given, settings
from hypothesis import strategies as st


def sequence_of(count, **options):
    return [[f"text {i}", {TURN: (i, count), **options}] for i in range(count)]


def test_a_prompt_on_each_line():
    assert prompts_of("\n a cat \n\n\t\na dog (loud:1.4)\n") == ["a cat", "a dog (loud:1.4)"]
    with pytest.raises(SpecError, match="expected a prompt on each line, got none"):
        prompts_of(" \n\t\n")


def test_what_is_one_sequence():
    """Two of the same length after each other, one of another, entries without a turn; one of which a part is left."""
    turns = [(0, 3), (1, 3), (2, 3), (0, 3), (1, 3), (2, 3), None, None, (0, 2), (1, 2), (2, 3), None, (1, 2)]
    assert sequences(turns) == [[0, 1, 2], [3, 4, 5], [6], [7], [8, 9], [10], [11], [12]]
    assert sequences([]) == []
    entries = [{TURN: turn, "place": place} for place, turn in enumerate(turns)]
    assert [entry["place"] for entry in first_of_each(entries)] == [0, 3, 6, 7, 8, 10, 11, 12]


def test_a_conditioning_for_each_turn():
    plain = [["plain", {"strength": 0.5}]]
    both = sequence_of(3, area="left") + plain + sequence_of(2, area="right")
    turns = in_turn(both)
    assert [[text for text, _ in turn] for turn in turns] == [
        ["text 0", "plain", "text 0"], ["text 1", "plain", "text 1"], ["text 2", "plain", "text 1"]]
    assert [options for _, options in turns[1]] == [{"area": "left"}, {"strength": 0.5}, {"area": "right"}]
    assert both[0][1][TURN] == (0, 3), "the input is left as it is"
    assert in_turn(plain) == [plain] and in_turn([]) == [[]]


def shares(turns, time, fade, closed=False):
    """How much each entry counts at a moment."""
    a, b, share = mix(turns, time, fade, closed)
    assert 0 <= share <= 1
    found = [0.0] * len(turns)
    found[a] += 1 - share
    found[b] += share
    return found


def test_plateaus_and_cross_fades():
    """Three prompts, each a third of the video; a cross-fade of a tenth of it lies half before and half after."""
    turns = [(i, 3) for i in range(3)]
    for time, expected in ((0, [1, 0, 0]), (0.28, [1, 0, 0]), (1 / 3, [0.5, 0.5, 0]), (1 / 3 + 0.025, [0.25, 0.75, 0]),
                           (0.5, [0, 1, 0]), (2 / 3 - 0.025, [0, 0.75, 0.25]), (0.72, [0, 0, 1]), (1, [0, 0, 1])):
        assert shares(turns, time, 0.1) == pytest.approx(expected), time
    assert shares(turns, 1 / 3 - 1e-9, 0) == [1, 0, 0] and shares(turns, 1 / 3, 0) == [0, 1, 0]
    assert shares(turns, 0, 0.1, closed=True) == pytest.approx([0.5, 0, 0.5])
    assert shares(turns, 0.025, 0.1, closed=True) == pytest.approx([0.75, 0, 0.25])
    assert shares(turns, 0.975, 0.1, closed=True) == pytest.approx([0.25, 0, 0.75])


def test_what_is_left_of_a_sequence():
    """ComfyUI copies entries one by one for areas: what is there is spread as it was."""
    assert shares([(1, 3)], 0.0, 0.1) == [1]
    assert shares([(0, 3), (2, 3)], 0.49, 0) == [1, 0] and shares([(0, 3), (2, 3)], 0.51, 0) == [0, 1]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 2), st.booleans())
def test_each_prompt_counts_alone_in_the_middle_of_its_part(count, time, fade, closed):
    turns = [(i, count) for i in range(count)]
    for i in range(count):
        assert shares(turns, (i + 0.5) / count, fade, closed)[i] == pytest.approx(1)
    found = shares(turns, time, fade, closed)
    assert sum(found) == pytest.approx(1)
    assert max(found) >= 0.5 - 1e-9 and found[min(int(time * count), count - 1)] >= 0.5 - 1e-6
    near = shares(turns, min(1, time + 1e-6), max(fade, 0.01), closed)
    assert all(abs(a - b) < 1e-3 for a, b in zip(near, shares(turns, time, max(fade, 0.01), closed), strict=True))
