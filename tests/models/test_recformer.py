"""The encoder against the official code's numbers: hidden states, vectors, logits, losses and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.recformer_fixture import (
    CONFIG,
    SIDES,
    embed,
    load_fixture,
    official_gradients,
    official_model,
    official_sequences,
    rows_of,
    under,
)
from userrep.config import ConfigError
from userrep.models.recformer import Recformer, RecformerConfig

# Of what is compared, relative to its largest value; of gradients, also to the largest of all.
TOLERANCE = {"f64": 1e-10, "f32": 1e-5}
PRECISIONS = [("f64", torch.float64), ("f32", torch.float32)]


def assert_near(received: torch.Tensor, expected: torch.Tensor, precision: str, scale: float | None = None) -> None:
    scale = float(expected.abs().max()) if scale is None else scale
    assert received.shape == expected.shape
    assert float((received.detach() - expected).abs().max()) <= TOLERANCE[precision] * scale


@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS)
def test_hidden_states_and_vectors_are_those_of_the_official_code(precision: str, dtype: torch.dtype) -> None:
    model, expected = official_model(dtype), under(f"{precision}/")
    for side in SIDES:
        x_PD, layout, places, order = embed(model, official_sequences(side))
        states = [x_PD]
        for layer in model.layers:
            states.append(layer(states[-1], layout))
        for number, state_PD in enumerate(states):
            name = f"{side}/hidden_{number}"
            if name in expected:
                assert_near(state_PD, rows_of(expected[name], side)[places], precision)
        assert_near(model.hidden(x_PD, layout), rows_of(expected[f"{side}/last_hidden_state"], side)[places], precision)
        assert_near(model.pooled(x_PD, layout), expected[f"{side}/pooled"][order], precision)


@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS)
def test_losses_and_all_gradients_are_those_of_the_official_code(precision: str, dtype: torch.dtype) -> None:
    model, expected = official_model(dtype), under(f"{precision}/")
    vectors, masked_lm = [], []
    for side in SIDES:
        x_PD, layout, _, order = embed(model, official_sequences(side))
        vectors.append(F.normalize(model.pooled(x_PD, layout)[order.argsort()], dim=-1))
        x_PD, layout, places, _ = embed(model, official_sequences(side, is_masked=True))
        labels = rows_of(load_fixture()[f"batch/mlm_labels_{side}"], side)[places]
        rows = (labels != -100).nonzero()[:, 0]
        feature_MD = model.head(model.hidden_at(x_PD, layout, rows))
        logits_MV = F.linear(feature_MD, model.output_matrix, model.head.bias)
        assert_near(logits_MV, rows_of(expected[f"mlm_logits_{side}"], side)[places][rows], precision)
        masked_lm.append(F.cross_entropy(logits_MV, labels[rows]))
        assert_near(masked_lm[-1].double(), expected[f"loss_mlm_{side}"], precision)
    logits_BB = vectors[0] @ vectors[1].T * model.logit_scale.exp()
    assert_near(logits_BB, expected["iic_logits"], precision)
    contrastive = F.cross_entropy(logits_BB, torch.arange(4))
    assert_near(contrastive.double(), expected["loss_iic"], precision)
    loss = contrastive + 0.1 * (masked_lm[0] + masked_lm[1])
    assert_near(loss.double(), expected["loss_total"], precision)

    loss.backward()
    gradients = official_gradients(precision)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert_near(parameter.grad, gradients[name], precision, largest)


def test_a_tied_model_has_no_second_matrix() -> None:
    model = Recformer(CONFIG.model_copy(update={"tie_embeddings": True}), 100)
    assert model.output_matrix is model.token_embedding.weight
    assert "head.decoder" not in model.state_dict()


@pytest.mark.parametrize(("key", "value", "needle"), [("window", 5, "window 5 is odd"), ("num_heads", 3, "multiple")])
def test_impossible_shapes_are_refused(key: str, value: int, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        RecformerConfig.parse({key: value})
