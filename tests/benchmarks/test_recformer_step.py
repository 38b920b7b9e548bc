"""The rival of the Recformer step computes the loss and the gradients of ours."""

import argparse

import torch

from benchmarks.recformer_step import (
    LOSS,
    OfficialRecformer,
    draw_batch,
    new_model,
    new_vocabulary,
    official_sides,
    official_state,
)
from tests.support.pretrained import shake
from userrep.training.recformer_objective import RecformerObjective


def test_the_official_step_has_our_loss_and_our_gradients() -> None:
    arguments = argparse.Namespace(vocabulary=90, dim=128, layers=2, batch_size=2)
    vocabulary, ours = new_vocabulary(arguments.vocabulary), new_model(arguments)
    shake(ours)
    batch, theirs = draw_batch(arguments.batch_size, vocabulary), OfficialRecformer(ours)
    expected = theirs.loss(official_sides(batch, ours.config, vocabulary))
    received, _ = RecformerObjective(ours, vocabulary, LOSS)(batch)
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=0)
    received.backward()
    expected.backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    for name, gradient in official_state(ours).items():
        torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=1e-4 * largest)
