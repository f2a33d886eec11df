"The comparison keeps its promises on experiments whose truth is known, and refuses tables that do not fit."
import json
import numpy as np
import pytest
from blip2mgm.stats import by_cluster, compare, crossed_bootstrap, estimate, half_width, mean_squares, plot_differences, sentence

def experiment(rng, seeds=3, images=150, effect=0., seed_sd=.02, image_sd=.05, per_image=4):
    clusters = np.repeat(np.arange(images), per_image)
    chance = rng.uniform(.25, .75, len(clusters))
    own = lambda: rng.normal(0, seed_sd, (seeds, 1))
    helps = np.repeat(rng.normal(0, image_sd, images), per_image)
    coin = lambda p: (rng.random((seeds, len(clusters))) < p).astype(float)
    return coin(chance + effect + helps + own()), coin(chance + own()), clusters

@pytest.mark.parametrize('setting', [dict(), dict(effect=.05), dict(seed_sd=0.), dict(seed_sd=.04), dict(seeds=2), dict(seeds=5), dict(images=40, image_sd=.1)])
def test_coverage(setting):
    rng, n, truth = np.random.default_rng(5), 300, setting.get('effect', 0.)
    hits = sum(c.low <= truth <= c.high for c in (compare(*experiment(rng, **setting)) for _ in range(n)))
    assert hits / n >= .92

def test_a_a_is_rarely_a_difference():
    rng = np.random.default_rng(6)
    seen = [compare(*experiment(rng)).verdict for _ in range(300)]
    assert seen.count('no difference shown') / 300 >= .93

def test_a_large_effect_is_found():
    rng = np.random.default_rng(7)
    assert sum(compare(*experiment(rng, effect=.15, seed_sd=.01)).verdict == 'better' for _ in range(50)) >= 45
    assert sum(compare(*experiment(rng, effect=-.15, seed_sd=.01)).verdict == 'worse' for _ in range(50)) >= 45

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
    assert (zero.low, zero.high, zero.verdict) == (0, 0, 'no difference shown')
    one = compare([[1, 1, 1, 0.]], [[0, 0, 0, 0.]])
    assert one.verdict == 'no difference shown' and one.seed_sd is None and 'one seed' in sentence(one)
    for bad in (([[1, 0]], [[1, 0], [1, 0]]), ([[1, 0, 1]], [[1, 0]])):
        with pytest.raises(ValueError, match='pairs'): compare(*bad)
    with pytest.raises(ValueError, match='two pictures'): compare([[1, 0]], [[0, 0]], ['a', 'a'])
    with pytest.raises(ValueError, match='cluster names'): compare([[1, 0]], [[0, 0]], ['a'])
    with pytest.raises(ValueError, match='not a number'): compare([[1, np.nan]], [[0, 0]])

def test_never_narrower_than_questions_alone():
    rng = np.random.default_rng(3)
    table = rng.normal(0, 1, (1, 200)).repeat(3, 0) + rng.normal(0, .1, (3, 200))
    table -= table.mean(1, keepdims=True)                          # seeds agree to the digit
    alone = 1.96 * table.mean(0).std(ddof=1) / 200**.5
    assert half_width(table)[0] >= alone * .99

def test_report_forms():
    c = compare(*experiment(np.random.default_rng(0), effect=.2), name='blip2', against='raw', task='textvqa')
    assert str(c) == c._repr_markdown_() == sentence(c) and 'better.' in str(c) and '3 seeds, 600 questions on 150 pictures' in str(c)
    assert json.loads(json.dumps(c.to_dict()))['arm'] == 'blip2' and c.difference == c.value
    low, high = crossed_bootstrap(np.random.default_rng(0).random((5, 50)))
    assert low < .5 < high

def test_plot():
    import matplotlib; matplotlib.use('agg')
    ax = plot_differences([compare(*experiment(np.random.default_rng(i)), task=f't{i}') for i in range(3)])
    assert len(ax.get_yticks()) == 3
