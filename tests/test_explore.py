"The exploration: its numbers, and that odd rows and captions do not stop it."
import io
import json

import pytest
from PIL import Image

from blip2mgm.core import ConfigError
from blip2mgm.data import Picture, gate, text_of
from blip2mgm.explore import ExploreConfig, analyse, completeness, conclusion, image_stats, measures, plot_images, plot_lengths, plot_words, sample_gallery


@pytest.fixture
def gated(tmp_path):
    for i, size in enumerate([(402, 370), (200, 300), (600, 600)]):
        Image.effect_noise(size, 30).save(tmp_path / f"{i}.jpg")
    captions = ["stock photo", "a red bus on the road to the $2 sign_x^2", "a <b>bold</b> caption with { braces } and $ signs"]
    rows = [{"id": i, "text": text_of(c), "images": [f"{i}.jpg"]} for i, c in enumerate(captions)]
    return gate([*rows, {"id": 9, "text": None, "images": ["0.jpg"]}, "no row"], tmp_path), tmp_path


def test_numbers(gated):
    a = analyse(gated[0])
    assert a["rows"] == {"in": 5, "accepted": 3, "rejected": 2} and a["rejected_by"] == {"null text": 1, "not a row": 1}
    assert a["complete"] == {"id": 1, "text": 0.75, "images": 1}
    assert a["captions"]["too_short"] == pytest.approx(1 / 3) and a["phrases"] == [("stock photo", 1)]
    assert a["images"]["sizes"] == pytest.approx({"medium": 1 / 3, "small": 1 / 3, "large": 1 / 3})
    json.dumps(a, allow_nan=False)
    text = " ".join(conclusion(a))
    assert "3 are sound" in text and "2 were refused" in text and len(measures(a)) > 10


def test_charts_take_any_text(gated):
    result, root = gated
    texts = [row["text"] for row in result.accepted] + ["$\\frac$ broken formula", ""]
    for fig in (plot_lengths(texts), plot_words(texts), plot_images(list(result.pictures.values())), sample_gallery(result.accepted, root, 12),
                plot_lengths(["a bus"] * 50 + ["word " * 900])):
        fig.savefig(io.BytesIO(), format="png")


def test_nothing_to_measure():
    empty = analyse(gate([], "."))
    assert conclusion(empty)[1] == "There is nothing to measure." and measures(empty)
    for fig in (plot_lengths([]), plot_words([]), plot_images([]), sample_gallery([], ".")): fig.savefig(io.BytesIO(), format="png")


def test_size_classes():
    stats = image_stats([Picture(224, 5000, "PNG", "P", 1), Picture(223, 5000, "PNG", "P", 1), Picture(1024, 2000, "JPEG", "RGB", 1)])
    assert set(stats["sizes"]) == {"small", "medium", "very large"} and completeness([]) == {"id": 0, "text": 0, "images": 0}


def test_config():
    with pytest.raises(ConfigError): ExploreConfig(top=0)
