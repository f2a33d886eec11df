"Word statistics: hand-computed cases, and diversity that does not depend on the size of the set."
import random
from collections import Counter
from statistics import fmean

import pytest

from blip2mgm.lexical import all_words, boilerplate, frequencies, length_stats, mattr, mtld, ngrams, too_short, ttr, words
from blip2mgm.corpus import _slices, common_budget, corpus_of, describe, diversity


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


def test_a_corpus_takes_captions_apart_as_the_pattern_does():
    rng = random.Random(3)
    signs = "abc ABC .,!?\u2026\u3002'\u2019-_\x00\x1d\x1e\n\t\x85\xa0\xe9\xdf\u0130\u0131\u03a3\u65e5\uff10\xb2\u2603\U0001f642\U0001d400\U00020000\u0301\u200b\ud800$\xa9 12"
    captions = ["".join(rng.choices(signs, k=rng.choice([0, 1, 3, 20, 90]))) for _ in range(2000)] + ["word " * 30_000, "x" * 100_000]
    corpus, ids = corpus_of(captions), []
    plain = [words(c.replace("\x1e", " ")) for c in captions]
    for some, _ in _slices(corpus): ids += some.tolist()
    assert [corpus.vocabulary.words[i] for i in ids] == [w for caption in plain for w in caption]
    assert corpus.words == Counter(map(len, plain)) and corpus.characters == Counter(map(len, captions))


def test_signs_of_all_planes():
    seen = corpus_of([]).add(["\U0001d400\U0001d401 \U0001d402", "\xa0\xa0", "\u65e5\u672c", "abc d", "ABC D"])
    assert seen["non_latin"].tolist() == [True, False, True, False, False] and seen["ocr_like"].tolist() == [True, False, False, False, True]


def test_mtld_is_its_definition():
    rng = random.Random(2)
    for n in (1, 5, 200):
        tokens, lengths = rng.choices("abcdefghij", k=n), []
        for order in (tokens, tokens[::-1]):
            factors, types, at = 0, set(), 0
            for token in order:
                types.add(token)
                at += 1
                if len(types) <= 0.72 * at: factors, types, at = factors + 1, set(), 0
            if at: factors += (1 - len(types) / at) / (1 - 0.72)
            lengths.append(n / factors if factors else n)
        assert mtld(tokens) == pytest.approx(fmean(lengths))


def test_near_duplicates_against_all_pairs():
    rng, lexicon = random.Random(4), [f"w{i}" for i in range(500)]
    captions = [rng.choices(lexicon, k=10) for _ in range(300)]
    captions += [c[:9] + [rng.choice(lexicon)] for c in captions[:100]]
    corpus = corpus_of(" ".join(c) for c in captions)
    groups, sets = corpus.near_duplicates(0.8), [set(c) for c in captions]
    pairs = [(i, j) for i in range(400) for j in range(i) if len(sets[i] & sets[j]) >= 0.8 * len(sets[i] | sets[j])]
    assert len(pairs) > 80 and sum(groups[i] == groups[j] for i, j in pairs) >= 0.95 * len(pairs)
    assert len(set(groups.tolist())) >= 400 - len(pairs)
    assert corpus.top_grams(2, room=50) == {**corpus.top_grams(2), "most_frequent": corpus.top_grams(2, room=50)["most_frequent"]}
