"""Mixup: what a step reports."""
import numpy as np
import torch
from torch import nn

from bridgexfer.finetune import train_step


class Constant(nn.Module):
    "A classifier of three classes that predicts the first, whatever it sees."
    def __init__(self):
        super().__init__()
        self.z = nn.Parameter(torch.tensor([2., 1., 0.]))

    def forward(self, x): return self.z.expand(len(x), 3)


def test_a_prediction_is_right_to_the_share_of_each_label():
    "Both labels are right, or neither: then the share does not matter."
    x, rng = torch.zeros(8, 3, 4, 4), np.random.default_rng(0)
    for label, right in ((0, 8.), (1, 0.)):
        for _ in range(5):
            model = Constant()
            y = torch.full((8,), label)
            step = train_step(model, torch.optim.SGD(model.parameters(), 1e-3), x, y, .2, rng)
            assert abs(float(step.right) - right) < 1e-5 and step.n == 8
    y = torch.tensor([0, 1] * 4)
    model = Constant()
    step = train_step(model, torch.optim.SGD(model.parameters(), 1e-3), x, y, .2, rng)
    assert 0 <= float(step.right) <= 8
