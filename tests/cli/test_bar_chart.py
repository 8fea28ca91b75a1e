"""Bar charts are well-formed SVG whose bars have the lengths of their values."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from qserve.cli.bar_chart import BAR_WIDTH, COLORS, Group, draw_bars

SVG = "{http://www.w3.org/2000/svg}"


def test_the_longest_bar_of_each_group_has_the_full_width() -> None:
    groups = [Group("decode", [200.0, 50.0]), Group("prefill & more", [None, 1234.0])]
    root = ElementTree.fromstring(draw_bars("a < b", ["ours", "theirs"], groups))
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.get("height") == "14"]
    found = [(int(bar.get("width", "")), bar.get("fill")) for bar in bars]
    assert found == [(BAR_WIDTH, COLORS[0]), (BAR_WIDTH // 4, COLORS[1]), (BAR_WIDTH, COLORS[1])]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts == ["a < b", "ours", "theirs", "decode", "200", "50", "prefill & more", "1234"]


def test_text_has_a_colour_for_dark_pages() -> None:
    svg = draw_bars("t", ["ours"], [Group("g", [1.0])])
    assert "prefers-color-scheme:dark" in svg


def test_nothing_is_drawn_outside() -> None:
    groups = [Group(str(i), [1.0, 1e6, 3.0]) for i in range(7)]
    root = ElementTree.fromstring(draw_bars("t", ["a", "b", "c"], groups))
    width, height = (float(root.get(name, "")) for name in ("width", "height"))
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
        assert min(x, y) >= 0 and x + w < width and y + h <= height


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="6 series"):
        draw_bars("t", list("abcdef"), [])
    with pytest.raises(ValueError, match="1 values for 2 bars"):
        draw_bars("t", ["a", "b"], [Group("g", [1.0])])
