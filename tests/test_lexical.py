"Word statistics: hand-computed cases, and diversity that does not depend on the size of the set."
import random
from statistics import fmean

import pytest

from blip2mgm.lexical import (all_words, boilerplate, common_budget, describe, diversity, frequencies, length_stats, mattr, ngrams, too_short, ttr,
                              words)


@pytest.mark.parametrize("text, expected", [
    ("A red Bus.", ["a", "red", "bus"]), ("don\u2019t stop-over 24/7", ["don\u2019t", "stop-over", "24", "7"]), ("na\u00efve \u00dcBER", ["na\u00efve", "\u00fcber"]),
    ("\u7ea2\u8272 bus", ["\u7ea2\u8272", "bus"]), ("snake_case", ["snake", "case"]), ("", []), ("... --- '", []),
])
def test_words(text, expected): assert words(text) == expected


def test_hand_computed():
    captions = ["the bus and the sign", "a sign"]
    assert ttr(all_words(captions)) == 5 / 7 and ttr([]) == 0
    assert frequencies(captions)["the"] == 2 and frequencies(captions, 2)["sign a"] == 0
    assert ngrams(["a"], 2) == [] and ngrams(list("abc"), 2) == [("a", "b"), ("b", "c")]
    assert length_stats([1, 3])["sd"] == 1 and length_stats([]) == {"n": 0} and length_stats([7])["median"] == 7
    assert mattr(list("aabb"), 2) == pytest.approx((.5 + 1 + .5) / 3) and mattr([], 5) == 0


def test_mattr_is_its_definition():
    rng = random.Random(1)
    for n, window in ((50, 1), (50, 7), (50, 49), (50, 50), (50, 80)):
        tokens = rng.choices("abcde", k=n)
        plain = [ttr(tokens[i:i + window]) for i in range(max(1, n - window + 1))]
        assert mattr(tokens, window) == pytest.approx(fmean(plain))


def world(n, seed, lexicon=400):
    rng, weights = random.Random(seed), [1 / (i + 2) for i in range(lexicon)]
    return [" ".join(rng.choices([f"w{i}" for i in range(lexicon)], weights, k=rng.randint(4, 12))) for _ in range(n)]


def test_diversity_is_fair_to_size_and_its_interval_holds_the_truth():
    truth = diversity(world(20_000, 99), 100).value
    found = [diversity(world(250, seed), 100, seed=seed) for seed in range(1, 101)]
    assert abs(fmean(d.value for d in found) - truth) < 0.003
    assert sum(d.low <= truth <= d.high for d in found) >= 86   # nominally 95


def test_diversity_sees_a_difference():
    poor, rich = world(500, 0, 100), world(500, 0, 1000)
    budget = common_budget(poor, rich)
    assert diversity(poor, budget).high < diversity(rich, budget).low
    assert diversity(poor, budget) == diversity(poor, budget) and diversity([], 10) is None


def test_rules():
    assert too_short("five words are not enough") and too_short("a b c d e f") and not too_short("six words are just enough here")
    for text in ("Royalty-free image", "12 Stock Photos", "Download now", "\u00a9 2020", "see https://x.org"): assert boilerplate(text), text
    for text in ("a bus at the stop", "livestock photographed", "the captain clips art"): assert not boilerplate(text), text


def test_describe():
    d = describe(world(300, 0))
    assert d["captions"] == 300 and d["diversity"]["distinct_1"]["blocks"] >= 20 and 0 < d["diversity"]["distinct_2"]["value"] <= 1
    empty = describe([])
    assert empty["captions"] == empty["tokens"] == empty["too_short"] == 0 and empty["diversity"]["distinct_1"] is None
