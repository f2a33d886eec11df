"The comparison keeps its promises on experiments whose truth is known, and refuses tables that do not fit."
import json
import numpy as np
import pytest
from blip2mgm.stats import (Noise, by_cluster, compare, crossed_bootstrap, detectable, errors, estimate, half_width, holm, mean_squares, needed, noise, permutation, plot_differences, power,
                            sentence, tail)

def experiment(rng, seeds=3, images=150, effect=0., seed_sd=.02, image_sd=.05, per_image=4):
    clusters = np.repeat(np.arange(images), per_image)
    chance = rng.uniform(.25, .75, len(clusters))
    own = lambda: rng.normal(0, seed_sd, (seeds, 1))
    helps = np.repeat(rng.normal(0, image_sd, images), per_image)
    coin = lambda p: (rng.random((seeds, len(clusters))) < p).astype(float)
    return coin(chance + effect + helps + own()), coin(chance + own()), clusters

def tables(n, seed=5, seeds=3, pictures=120, effect=0., seed_sd=.02, picture_sd=.05):
    "Differences of two arms [n, S, C] with known parts, as four answers to each picture give them."
    rng = np.random.default_rng(seed)
    parts = rng.normal(0, seed_sd, (n, seeds, 1)), rng.normal(0, picture_sd, (n, 1, pictures)), rng.normal(0, .34, (n, seeds, pictures))
    return effect + sum(parts)

@pytest.mark.parametrize('setting', [dict(), dict(effect=.05), dict(seed_sd=0.), dict(seed_sd=0., picture_sd=0.), dict(seed_sd=.04), dict(seeds=2), dict(seeds=5), dict(pictures=40, picture_sd=.1)])
def test_intervals_hold_the_truth_as_often_as_they_say(setting):
    t, truth = tables(2000, **setting), setting.get('effect', 0.)
    assert .93 <= (abs(t.mean((1, 2)) - truth) <= half_width(t)[0]).mean() <= .97

def said(t, smallest=.02):
    value, pairs = t.mean((1, 2)), errors(t)
    equal = np.maximum(tail(smallest - value, pairs), tail(smallest + value, pairs)) < .05
    return np.where(equal, 'equivalent', np.where(2 * tail(abs(value), pairs) >= .05, 'inconclusive', np.where(value > 0, 'better', 'worse')))

@pytest.mark.parametrize('setting', [dict(), dict(seed_sd=0.), dict(seeds=6), dict(seeds=6, seed_sd=.001, pictures=600)])
def test_arms_with_the_same_data_end_equivalent_or_inconclusive(setting):
    v = said(tables(1000, **setting))
    assert np.isin(v, ['equivalent', 'inconclusive']).mean() >= .935           # 95%, less what chance does in 1,000 experiments
    if setting.get('pictures'): assert (v == 'equivalent').mean() > .8        # a large quiet experiment can show it

@pytest.mark.parametrize('seeds', [3, 6])
def test_twice_the_detectable_difference_is_found(seeds):
    n = Noise(.02, .05, .34)
    least = detectable(n, seeds, 120)
    assert power(least, n, seeds, 120) == pytest.approx(.8, abs=.001)
    assert (said(tables(1000, seeds=seeds, effect=least), 0.) == 'better').mean() >= .7 and (said(tables(1000, seeds=seeds, effect=2 * least), 0.) == 'better').mean() >= .95

def test_vectorised_verdicts_are_those_of_compare():
    t = tables(60, effect=.06)
    assert [compare(x, 0 * x, smallest=.02).verdict for x in t] == said(t).tolist() and len(set(said(t))) > 1

def test_seeds_and_pictures_needed():
    n = Noise(.02, .05, .34)
    k = needed(.03, n, None, 120)
    assert power(.03, n, k, 120) >= .8 > power(.03, n, k - 1, 120)
    assert needed(.005, n, 3, None) is None and needed(.1, n, 3, None) < 1000 and detectable(n, 1, 120) == float('inf')
    assert detectable(n, 6, 120) < detectable(n, 3, 120) and detectable(n, 3, 1000) < detectable(n, 3, 120)

def test_noise_is_told_apart():
    t = tables(1, seeds=60, pictures=300, seed_sd=.1, picture_sd=.2)[0]
    found = noise(t)
    assert (found.seed, found.picture, found.rest) == (pytest.approx(.1, abs=.03), pytest.approx(.2, abs=.03), pytest.approx(.34, abs=.02))

def test_holm_and_its_words():
    rng = np.random.default_rng(3)
    c = [compare(*experiment(rng, effect=e)) for e in (0., .02, .15)]
    h = holm(c)
    assert all(a.p_holm >= b.p and a.family == 3 for a, b in zip(h, c)) and holm([]) == []
    near = holm([compare(x, 0 * x) for x in tables(3, seeds=8, effect=.0297, seed_sd=.001)])
    for x in near: assert (x.verdict == 'better') == (x.p_holm < .05)

def test_permutation():
    rng = np.random.default_rng(0)
    assert permutation(rng.normal(.2, .3, (3, 200)))['pictures'] < .001 and permutation(rng.normal(0, .3, (3, 200)))['pictures'] > .01
    assert permutation(rng.normal(.2, .3, (3, 200)))['seeds'] == .25 and permutation(np.zeros((3, 5)))['pictures'] == 1
    assert permutation(rng.normal(.2, .3, (1, 200)))['seeds'] == 1   # one seed can show nothing

def test_mean_is_over_questions_whatever_the_cluster_sizes():
    rng = np.random.default_rng(0)
    values, clusters = rng.random((3, 100)), rng.integers(0, 17, 100)
    assert np.allclose(by_cluster(values, clusters).mean(1), values.mean(1))
    e = estimate(values, clusters)
    assert e.value == pytest.approx(values.mean()) and e.per_seed == pytest.approx(values.mean(1)) and e.low < e.value < e.high
    assert (e.n_seeds, e.n_questions, e.n_clusters) == (3, 100, 17)

def test_clusters_may_be_names_and_their_order_does_not_matter():
    rng = np.random.default_rng(1)
    a, b, names = rng.random((3, 60)), rng.random((3, 60)), np.array([f'p{i}' for i in rng.integers(0, 20, 60)])
    order = rng.permutation(60)
    one, two = compare(a, b, names), compare(a[:, order], b[:, order], names[order])
    assert (one.low, one.high) == pytest.approx((two.low, two.high))
    swap = compare(b, a, names)
    assert (one.low, one.high) == pytest.approx((-swap.high, -swap.low))

def test_mean_squares_match_a_textbook_table():
    table = np.array([[1., 2, 3], [2, 4, 6]])                      # seeds 2, 4; pictures 1.5, 3, 4.5; mean 3
    assert mean_squares(table) == pytest.approx((6., 4.5, .5))

def test_degenerate_tables():
    zero = compare(np.ones((3, 4)), np.ones((3, 4)))
    assert (zero.low, zero.high, zero.verdict, zero.p) == (0, 0, 'inconclusive', 1)
    assert compare(np.ones((3, 4)), np.ones((3, 4)), smallest=.01).verdict == 'equivalent'
    one = compare([[1, 1, 1, 0.]], [[0, 0, 0, 0.]])
    assert one.verdict == 'inconclusive' and one.seed_sd is None and 'one seed' in sentence(one)
    for bad in (([[1, 0]], [[1, 0], [1, 0]]), ([[1, 0, 1]], [[1, 0]])):
        with pytest.raises(ValueError, match='pairs'): compare(*bad)
    with pytest.raises(ValueError, match='two pictures'): compare([[1, 0]], [[0, 0]], ['a', 'a'])
    with pytest.raises(ValueError, match='cluster names'): compare([[1, 0]], [[0, 0]], ['a'])
    with pytest.raises(ValueError, match='not a number'): compare([[1, np.nan]], [[0, 0]])

def test_never_much_narrower_than_questions_alone():
    rng = np.random.default_rng(3)
    table = rng.normal(0, 1, (1, 200)).repeat(3, 0) + rng.normal(0, .1, (3, 200))
    table -= table.mean(1, keepdims=True)                          # seeds agree to the digit
    alone = 1.96 * table.mean(0).std(ddof=1) / 200**.5
    assert half_width(table)[0] >= .7 * alone * .99

def test_report_forms():
    c = compare(*experiment(np.random.default_rng(0), effect=.2), name='blip2', against='raw', task='textvqa')
    assert str(c) == c._repr_markdown_() == sentence(c) and 'better, because' in str(c) and '3 seeds, 600 questions on 150 pictures' in str(c)
    assert json.loads(json.dumps(c.to_dict()))['arm'] == 'blip2' and c.difference == c.value
    low, high = crossed_bootstrap(np.random.default_rng(0).random((5, 50)))
    assert low < .5 < high

def test_plot():
    import matplotlib; matplotlib.use('agg')
    ax = plot_differences([compare(*experiment(np.random.default_rng(i)), task=f't{i}') for i in range(3)])
    assert len(ax.get_yticks()) == 3
