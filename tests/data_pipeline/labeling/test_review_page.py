import random

from data_pipeline.labeling.review_page import Html, Table, _lanes, element, review_page


def test_a_plain_text_is_escaped_wherever_it_stands_and_markup_is_not_escaped_twice():
    inner = element("b", "a < b & 'c'")
    assert inner == "<b>a &lt; b &amp; &#x27;c&#x27;</b>" and isinstance(inner, Html)
    assert element("p", inner, " > d") == f"<p>{inner} &gt; d</p>"
    assert element("p", title='"><script>') == '<p title="&quot;&gt;&lt;script&gt;"></p>'
    page = review_page("<h1>", ["</p>"], [Table("<t>", ["<h>"], [["<c>"]])], [])
    assert not {"<t>", "<h>", "<c>", "<h1><h1>", "</p></p>"} & set(page.split("\n"))
    assert all(f"&lt;{name}&gt;" in page for name in ("h1", "/p", "t", "h", "c"))


def test_bars_in_one_lane_never_share_a_frame_and_no_lane_is_opened_without_need():
    draw = random.Random(0)
    for _ in range(50):
        ranges = sorted((first := draw.randint(1, 12), first + draw.randint(0, 5)) for _ in range(8))
        lanes = _lanes(ranges)
        deepest = max(sum(first <= frame <= last for first, last in ranges) for frame in range(1, 18))
        assert max(lanes) + 1 == deepest  # ranges that rise by their first frame are coloured perfectly so
        for i in range(8):
            for j in range(i):
                overlap = ranges[j][0] <= ranges[i][1] and ranges[i][0] <= ranges[j][1]
                assert not (overlap and lanes[i] == lanes[j])
