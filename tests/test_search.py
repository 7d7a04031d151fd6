"""The search: what it looks at, how it breaks ties and how far it goes; expectations are a few lines of arithmetic."""
import numpy as np
import pytest

from bridgexfer.search import WIDENINGS, Axis, Found, Trial, behind, beyond, race, race_axis, search

SEEDS = range(100, 105)


def table(trials, asked=None):
    "A trial that looks up what a candidate does: candidate -> (accuracy, loss), on 100 images."
    def trial(candidate, seed):
        if asked is not None: asked.append((candidate, seed))
        found = trials[candidate]
        return found and Trial(*found, 100)
    return trial


def test_a_race_sees_what_a_trial_returns_and_nothing_else():
    "Trials of the given candidates at the given seeds; what a candidate is called does not matter."
    asked = []
    ended = race([.1, .3, 1.], table({.1: (.5, 1.), .3: (.9, .3), 1.: (.7, .8)}, asked), SEEDS)
    assert {c for c, _ in asked} == {.1, .3, 1.} and {s for _, s in asked} <= set(SEEDS)
    assert len(set(asked)) == len(asked) # none is asked twice
    renamed = race("abc", table({"a": (.5, 1.), "b": (.9, .3), "c": (.7, .8)}), range(5))
    assert (ended.winner, renamed.winner) == (.3, "b") and ended[2:] == renamed[2:]


def test_the_distance_has_the_larger_of_two_standard_errors():
    "By hand: lags of 4, 2 and 0 points over three seeds have √(4/3) points; 30 images have √(2 %/30)."
    accuracies = np.array([[.90, .90, .90], [.86, .88, .90]])
    distance, se = behind(accuracies, 300)
    assert distance == pytest.approx([0, .02]) and se[1] == pytest.approx(.02 / np.sqrt(3))
    _, few = behind(accuracies, 30)
    assert few[1] == pytest.approx(np.sqrt(.02 / 30))


def test_a_candidate_is_kept_until_it_is_two_standard_errors_behind():
    "By hand: after two seeds b is 1.4 behind and a and c are tied; after four, b is ahead by more than one."
    found = dict(a=(.80, .80, .80, .80), b=(.79, .79, .95, .95), c=(.81, .79, .79, .81))
    ended = race("abc", lambda c, seed: Trial(found[c][seed - 100], .5, 10**6), SEEDS)
    assert (ended.winner, ended.tied, ended.seeds) == ("b", ("b",), 4)


def test_ties_go_to_the_lowest_loss_wherever_it_is():
    for losses in ((.1, .2, .3), (.3, .1, .2), (.3, .2, .1)):
        trials = dict(zip((.01, .03, .1), [(.8, loss) for loss in losses]))
        best = min(trials, key=lambda c: trials[c][1])
        for order in (list(trials), list(trials)[::-1]):
            ended = race(order, table(trials), SEEDS)
            assert ended.winner == best and set(ended.tied) == set(trials) and ended.se is None
            assert ended.seeds == len(SEEDS) # a tie takes all seeds


def test_a_lower_loss_does_not_beat_a_clearly_higher_accuracy():
    ended = race("ab", table({"a": (.9, 2.), "b": (.6, .1)}), SEEDS)
    assert ended.winner == "a" and ended.tied == ("a",) and ended.seeds == 2 # and two seeds are enough
    assert ended.accuracy == pytest.approx(.9) and ended.se == pytest.approx(np.sqrt(.3 / 200))


def test_who_is_far_behind_gets_no_more_seeds():
    asked = []
    race("abc", table({"a": (.90, 1.), "b": (.90, 2.), "c": (.2, 1.)}, asked), SEEDS)
    assert [sum(c == who for c, _ in asked) for who in "abc"] == [5, 5, 2]


def test_a_diverging_candidate_loses():
    "At the first seed or later, and however well it did until then."
    def trial(candidate, seed):
        if candidate == "late" and seed == SEEDS[1]: return None
        return dict(late=Trial(1., 0., 100), never=None, poor=Trial(.1, 2., 100))[candidate]
    ended = race(["late", "never", "poor"], trial, SEEDS)
    assert ended.winner == "poor" and ended.tied == ("poor",) and ended.seeds == 2
    nobody = race(["never"], trial, SEEDS)
    assert nobody.winner is None and nobody.tied == () and nobody.accuracy is None
    assert search({"lr": 1}, {"lr": Axis((1, 3))}, lambda values, seed: None, SEEDS) is None


def peak(at, asked=None): # accuracy falls by 10 points for each factor of ten
    def trial(value, seed):
        if asked is not None: asked.append(value)
        return Trial(.9 - .1 * abs(np.log10(value / at)), 1., 10**6)
    return trial


@pytest.mark.parametrize(("best", "values"), [
    (1., (.01, .03, .1, .3, 1., 3.)), (.001, (.0003, .001, .003, .01, .03)),
    (.03, (.01, .03, .1)), (.01, (.003, .01, .03))])
def test_a_winner_at_an_edge_widens_the_grid(best, values):
    "Until it is inside; the grid stays 1 and 3 of each power of ten, in order."
    grid = (.01, .03)
    ended, tried = race_axis(Axis(grid, widens=True), peak(best), SEEDS)
    assert ended.winner == best and tried == values
    assert race_axis(Axis(grid), peak(best), SEEDS)[1] == grid # a budget is not widened


def test_widening_ends():
    _, tried = race_axis(Axis((.01, .03), widens=True), peak(1e9), SEEDS)
    assert len(tried) == 2 + WIDENINGS
    def cliff(value, seed): return peak(1e9)(value, seed) if value < .2 else None
    ended, tried = race_axis(Axis((.01, .03), widens=True), cliff, SEEDS)
    assert ended.winner == .1 and tried == (.01, .03, .1, .3) # what lies beyond diverges


def test_beyond_is_always_beyond():
    for value in np.geomspace(1e-4, 10, 97):
        assert beyond([value, 20], value) < value < beyond([0, value], value)


def test_axes_are_searched_in_turn_from_the_start():
    "The rate first, then the length with that rate; the rate again only where the length moved."
    def run(best_length):
        asked = []
        def trial(values, seed):
            asked.append(tuple(values.values()))
            return Trial(.9 - .2 * (values["lr"] != .3) - .2 * (values["length"] != best_length), 1., 10**6)
        found = search({"lr": .1, "length": 1}, {"lr": Axis((.1, .3)), "length": Axis((1, 2))}, trial, SEEDS)
        return found, asked
    found, asked = run(best_length=1)
    assert found.values == {"lr": .3, "length": 1} and set(asked) == {(.1, 1), (.3, 1), (.3, 2)}
    found, asked = run(best_length=2)
    assert found.values == {"lr": .3, "length": 2} and set(asked) == {(.1, 1), (.3, 1), (.3, 2), (.1, 2)}


def test_edges_are_named():
    tried = dict(lr=(.03, .1), length=(2, 4), repeats=(1, 3, 10), one=(5,))
    found = Found(dict(lr=.1, length=2, repeats=3, one=5), tried, {})
    assert found.edges == {"lr": "largest", "length": "smallest"}
