"""The report is one valid page with everything inside, whatever parts a run has."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from blip2_jax.reporting import charts, pictures, run_page, scores

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Collects text and attributes, and holds that tags close in the order they opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(" ".join(data.split()))

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


def write(tmp_path, **parts):
    empty = dict(metrics={}, curves={}, examples=[], attention=[], timings={}, versions={})
    path = run_page.write_report(
        tmp_path / "new" / "report.html", **({"title": "Run", "config": ""} | empty | parts)
    )
    return path.read_text(encoding="utf-8")


def picture(seed=0):
    return np.random.default_rng(seed).integers(256, size=(64, 64, 3), dtype=np.uint8)


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


EVIL = "<script>alert(\"x\")</script> & <b onclick='y'>"


def full_parts():
    losses = [
        {"step": i, "loss": 2 / (i + 1), "itc/loss": 1 / (i + 1), "lr": 9.0} for i in range(700)
    ]
    question = {"question": "which digit?", "answer": "3", "prediction": "8", "correct": False}
    return dict(
        summary="In short.",
        metrics={
            "vqa/accuracy": 0.843,
            "vqa/accuracy_blind": 0.312,
            "vqa/count": 0.9,
            "caption/cider": 3.217,
            "caption/cider_blind": 4.0,
            "caption/tokenizer": "ptb",
            "retrieval/text_to_image_r5": 0.99,
            "retrieval/candidates": 100,
            "seconds/total": 431.5,
        },
        curves={
            "stage1": losses,
            "stage2": [{"step": 0, "loss": float("nan")}, {"step": 1, "loss": 3}],
        },
        examples=[
            {
                "image": png(picture()),
                "reference": "a red 3",
                "caption": "a red 8",
                "correct": np.False_,
                "questions": [question, question | {"prediction": "3", "correct": True}],
            },
            {"image": picture(1)},
        ],
        attention=[{"image": picture(), "attention": np.random.rand(32, 8, 8), "text": "a map"}],
        timings={"stage1": 224.2, "stage2": 3725.0, "total": 3949.2},
        versions={"jax": "0.10.2"},
        config="model:\n  query_tokens: 32",
    )


def test_a_full_page_shows_every_part_and_needs_no_network(tmp_path):
    text = write(tmp_path, **full_parts())
    page = Page(text)
    scores = ("84.3%", "no image: 31.2%", "+53.1", "3.22", "ptb", "431.5")
    texts = ("In short.", "a red 8", "should be 3", "a map", "0.10.2", "Stage 2")
    for shown in (*scores, *texts, "3 min 44 s", "1 h 02 min"):
        assert any(shown in text for text in page.texts), shown
    assert "query_tokens: 32" in text and "No " not in " ".join(page.texts)
    assert page.tags.count("svg") == 2 and "script" not in page.tags
    assert "://" not in text and "@import" not in text
    sources = page.values("src")
    assert len(sources) == 2 + 1 + 7  # examples, then an image and its most concentrated queries
    for source in sources:
        Image.open(
            io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))
        ).load()


def test_ids_are_unique_over_both_curves_and_references_resolve(tmp_path):
    text = write(tmp_path, **full_parts())
    ids = Page(text).values("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^")]+)', text)
    assert used and set(used) <= set(ids)


PARTS = ["metrics", "curves", "examples", "attention", "timings", "versions", "config"]


@pytest.mark.parametrize("left_out", PARTS)
def test_a_part_left_out_is_said_and_the_others_stay(tmp_path, left_out):
    parts = full_parts()
    parts[left_out] = type(parts[left_out])()
    page = Page(write(tmp_path, **parts))
    absent = [text for text in page.texts if text.startswith("No ")]
    assert len(absent) == 1
    assert ("84.3%" in page.texts) == (left_out != "metrics")
    assert ("svg" in page.tags) == (left_out != "curves")


def test_an_empty_run_still_gives_a_page(tmp_path):
    page = Page(write(tmp_path))
    assert sum(text.startswith("No ") for text in page.texts) == len(PARTS)


def test_curves_without_losses_are_said_to_be_missing(tmp_path):
    page = Page(
        write(tmp_path, curves={"stage1": [], "stage2": [{"step": 1, "loss": float("inf")}]})
    )
    assert "svg" not in page.tags and any(text.startswith("No loss curves") for text in page.texts)


def test_all_text_is_escaped(tmp_path):
    question = dict.fromkeys(("question", "answer", "prediction"), EVIL) | {"correct": False}
    text = write(
        tmp_path,
        title=EVIL,
        summary=EVIL,
        metrics={f"{EVIL}/accuracy": 0.5, "note": EVIL},
        curves={EVIL: [{"step": 1, f"{EVIL}/loss": 1.0}]},
        examples=[dict(image=picture(), reference=EVIL, caption=EVIL, questions=[question])],
        attention=[dict(image=picture(), attention=np.ones((1, 2, 2)), text=EVIL)],
        timings={EVIL: 1.0},
        versions={EVIL: EVIL},
        config=EVIL,
    )
    page = Page(text)
    assert not {"script", "b onclick"} & set(page.tags) and not page.values("onclick")
    assert text.count("alert(") >= 12  # nothing was dropped, only escaped


def test_baselines_are_found_by_name_and_retrieval_has_its_chance():
    shown_scores = scores.score_rows(full_parts()["metrics"])
    names = {"vqa/accuracy", "vqa/count", "caption/cider", "retrieval/text_to_image_r5"}
    assert set(shown_scores) == names
    assert (
        shown_scores["vqa/accuracy"]["against"] == "no image"
        and shown_scores["vqa/accuracy"]["better"]
    )
    assert shown_scores["vqa/count"]["baseline"] is None
    assert shown_scores["caption/cider"]["gain"] == "\N{MINUS SIGN}0.78"
    assert not shown_scores["caption/cider"]["better"]
    assert shown_scores["retrieval/text_to_image_r5"]["baseline"] == "5.0%"


def test_other_evaluations_have_the_first_score_of_each_task_on_top(tmp_path):
    metrics = {"nocaps/cider": 1.2, "nocaps/spice": 0.15, "okvqa/accuracy": 0.4}
    text = write(tmp_path, metrics=metrics | {"okvqa/unreadable": 2})
    top = text[text.index('class="card headline"') : text.index("In detail")]
    assert "1.20" in top and "40.0%" in top and "15.0%" not in top and "200.0%" not in text


def test_chance_with_several_texts_per_image_is_that_of_drawing():
    metrics = {"r/image_to_text_r5": 0.5, "r/candidates": 20, "r/candidate_texts": 100}
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(20), 5)
    drawn = np.mean([0 in rng.permutation(owners)[:5] for _ in range(4000)])
    shown = float(scores.score_rows(metrics)["r/image_to_text_r5"]["baseline"].rstrip("%")) / 100
    assert shown == pytest.approx(drawn, abs=0.02)


def test_overlay_glows_where_attention_is_high():
    attention = np.zeros((4, 4))
    attention[1, 2] = 5.0
    shown = pictures.overlay(np.full((64, 96, 3), 100, np.uint8), attention).sum(axis=2)
    assert shown.shape == (192, 288)
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    assert 48 <= row < 96 and 144 <= column < 216
    even = pictures.overlay(np.full((64, 64, 3), 100, np.uint8), np.ones((4, 4)))
    assert np.ptp(even) == 0


def test_asked_queries_are_shown_and_otherwise_the_concentrated_ones(tmp_path):
    maps = np.ones((20, 4, 4))
    maps[[3, 11], 0, 0] = 100.0
    item = {"image": picture(), "attention": maps}
    assert {"query 3", "query 11"} <= set(Page(write(tmp_path, attention=[item])).texts)
    asked = Page(write(tmp_path, attention=[item | {"queries": [0, 5]}])).texts
    assert [text for text in asked if text.startswith("query ")] == ["query 0", "query 5"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"examples": [{"image": np.zeros((8, 8), np.uint8)}]}, r"uint8\[H, W, 3\]"),
        ({"examples": [{"image": np.zeros((8, 8, 3))}]}, "got float64"),
        ({"attention": [{"image": picture(), "attention": np.ones((2, 4))}]}, r"attention\[0\]"),
    ],
)
def test_pictures_of_the_wrong_shape_are_named(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **parts)


def test_no_curve_is_drawn_twice_and_held_out_ones_are_dashed():
    """In stage 2 the total is the only loss; on test images it has the color of the other."""
    one = [{"step": s, "loss": 2.0 / s, "lm/loss": 2.0 / s} for s in (1, 2, 3)]
    one[-1] |= {"eval/loss": 1.0, "eval/lm/loss": 1.0}
    many = [{"step": s, "loss": 3.0 / s, "itc/loss": 1.0 / s, "itm/loss": 2.0 / s} for s in (1, 2)]
    many += [{"step": s, "eval/loss": 4.0 / s, "eval/itc/loss": 2.0 / s} for s in (1, 2)]
    (_, first), (_, second) = charts.draw_curves({"stage2": one, "stage1": many})
    assert legend(first) == ["loss"] and legend(second) == ["total", "itc", "itm"]
    assert second.count("stroke-dasharray") == 2
    for color in charts._CURVE_COLORS[:2]:  # a line, its place in the legend, and the dashed one
        assert second.count(f"stroke: {color}") == 3


def legend(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([a-z]+)</text>", svg.partition('legend_1"')[2])
