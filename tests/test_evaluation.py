"""Evaluation: the head computes in float32, so that bfloat16 decides no prediction by a tie."""
import numpy as np
import pytest
import torch
from torch import nn

from bridgexfer.backbones import create_backbone, input_config
from bridgexfer.data.registry import load_dataset
from bridgexfer.evaluation import autocast, evaluate, logits, outcome, predict
from bridgexfer.loading import eval_batches


@pytest.fixture(scope="module")
def digits(): return load_dataset("digits").test


def ties(z): # share of rows whose largest value is there twice
    best = z.topk(2, 1).values
    return (best[:, 0] == best[:, 1]).float().mean().item()


@pytest.mark.parametrize("arch", ["mini_resnet10", "mini_vit"])
def test_the_head_is_in_float32_and_ties_are_as_rare_as_in_float64(digits, arch):
    "The same features, the head once more in float64: nothing ties that does not there; in bfloat16 much does."
    model = create_backbone(arch).eval()
    x = next(eval_batches(digits, 200, input_config(model)))
    with torch.inference_mode():
        with autocast("cpu"):
            z, body, rounded = logits(model, x), model.forward_features(x), model(x)
        exact = model.double().forward_head(body.double())
    assert z.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.allclose(z.double(), exact, atol=1e-4)
    assert ties(z) <= ties(exact) < ties(rounded)


def test_a_model_without_timm_parts_is_called_as_it_is():
    model = nn.Linear(3, 2)
    x = torch.ones(1, 3)
    assert torch.equal(logits(model, x), model(x))


def test_an_outcome_by_hand():
    p = np.array([[.5, .25, .25], [.1, .8, .1], [.2, .2, .6], [.5, .5, 0.]], np.float32)
    result = outcome(p, np.array([0, 1, 0, 0]))
    assert result["predictions"] == [0, 1, 2, 0] and result["accuracy"] == .75
    assert result["loss"] == pytest.approx(-np.log([.5, .8, .2, .5]).mean(), rel=1e-6)
    per_class = outcome(p, np.array([0, 1, 0, 0]), "mean_per_class")
    assert per_class["accuracy"] == pytest.approx((2 / 3 + 1) / 2) and per_class["loss"] == result["loss"]
    certain = outcome(np.array([[1., 0.]]), np.array([1]))
    assert np.isfinite(certain["loss"]) and certain["loss"] > 20 # wrong and certain is bad, and not infinite


def test_what_is_recorded_agrees_with_what_is_predicted(digits):
    few = digits.take(np.arange(40))
    model = create_backbone("mini_resnet10", 10, seed=0)
    result = evaluate(model, few)
    p = predict(model, few, batch=7) # in other batches
    assert result["labels"] == few.labels.tolist()
    assert result["loss"] == pytest.approx(-np.log(p[np.arange(40), few.labels]).mean(), abs=.02)
