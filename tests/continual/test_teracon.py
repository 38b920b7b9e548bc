"""TERACON against the official code's numbers: masks, logits, losses, rates, gradients, optimizer steps."""

from unittest import mock

import numpy as np
import pytest
import torch

from tests.support.teracon_fixture import (
    NUM_ITEMS,
    TASKS,
    gradients,
    load_fixture,
    load_weights,
    roles,
    teracon,
    to_ours,
)
from userrep.continual import teracon as module
from userrep.continual.masks import gate
from userrep.continual.method import Progress
from userrep.continual.network import TaskSpec
from userrep.continual.teracon import Teracon
from userrep.losses.retention import sampling_rate

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}
BATCH = 4


def assert_close(received: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    tolerance = TOLERANCES[received.dtype]
    torch.testing.assert_close(
        received, expected.to(received.dtype), rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}"
    )


def teacher(method: Teracon) -> Teracon:
    assert method.teacher is not None
    return method.teacher


def started(number: int, dtype: torch.dtype) -> Teracon:
    """The method before the first step of a task, its teacher being the fixture's."""
    method = load_weights(teracon(number, with_teacher=False, dtype=dtype), f"task{number}/init")
    if number > 1:
        past = load_weights(teracon(number - 1, with_teacher=False, dtype=dtype), f"task{number}/past")
        method.teacher = past.requires_grad_(False)
    return method


def rows(number: int, batch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    fixture = load_fixture()
    chosen = slice(BATCH * batch, BATCH * (batch + 1))
    items = fixture["data/task1_seq" if f"data/task{number}_seq" not in fixture else f"data/task{number}_seq"]
    labels = fixture[f"data/task{number}_target"] if number > 1 else torch.zeros(len(items), dtype=torch.long)
    return items[chosen], labels[chosen]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("when", ["s_first", "s_mid", "s_max"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_masks_and_logits(number: int, when: str, dtype: torch.dtype) -> None:
    fixture, method = load_fixture(), started(number, dtype)
    place = f"f64/task{number}/forward/{when}"
    scale = fixture[f"{place}/s"].item()
    items, _ = rows(number)
    for task in range(number):
        suffix = f"_T{task + 1}" if number > 1 else ""
        masks = method.masks(task, scale)
        assert_close(masks, fixture[f"{place}/masks{suffix}"], "masks")
        assert_close(method.network.logits(items, task, gate(masks)), fixture[f"{place}/logits_last{suffix}"], "logits")
        if task + 1 < number:
            past = teacher(method).masks(task, scale)
            assert_close(past, fixture[f"{place}/past_masks{suffix}"], "masks of the teacher")
            logits = teacher(method).network.logits(items, task, gate(past))
            assert_close(logits, fixture[f"{place}/past_logits_last{suffix}"], "logits of the teacher")
    if number == 1:
        vectors = method.network.backbone(items[:, :-1], gate(method.masks(0, scale)), last_only=False)
        assert_close(method.network.heads[0](vectors), fixture[f"{place}/logits_all_positions"], "all positions")


def take_loss(
    method: Teracon, number: int, batch: int, scale: float, place: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss at a given scale, with the fixture's choice of users."""
    fixture = load_fixture()
    chosen = [fixture[f"{place}T{task}"] for task in range(1, number)]
    with (
        mock.patch.object(module, "annealed_scale", return_value=scale),
        mock.patch.object(method, "_sample", return_value=chosen),
    ):
        return method.loss(*rows(number, batch), Progress(0, 1))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_loss_and_its_gradient(number: int, dtype: torch.dtype) -> None:
    fixture, method = load_fixture(), started(number, dtype)
    place = f"f64/task{number}/oneshot"
    scale = fixture.get(f"{place}/s", fixture["f64/task1/forward/s_mid/s"]).item()
    if number > 1:
        method.rates = fixture[f"{place}/rho_used"].tolist()
    loss, facts = take_loss(method, number, 0, scale, f"task{number}/oneshot_rand_idx_")
    assert_close(loss, fixture[f"{place}/{'total' if number > 1 else 'loss'}"], "loss")
    if number > 1:
        assert facts["train/task_loss"] == pytest.approx(fixture[f"{place}/ce"].item(), rel=1e-4)
        assert facts["train/retention"] == pytest.approx(fixture[f"{place}/kr"].item(), rel=1e-4)
        assert_close(torch.tensor(method.rates, dtype=dtype), fixture[f"{place}/rho_next"], "rates")
    loss.backward()
    grads = gradients(method)
    for role, grad in grads.items():
        key = f"{place}/grad/{role}"
        if key not in fixture:
            assert torch.all(grad == 0), role
            continue
        assert_close(grad, to_ours(role, fixture[key]).reshape(grad.shape), role)
    assert {f"{place}/grad/{role}" for role in grads} >= {key for key in fixture if key.startswith(f"{place}/grad/")}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_four_steps_of_the_optimizer(number: int) -> None:
    fixture, method = load_fixture(), started(number, torch.float64)
    optimizer = torch.optim.Adam(method.trainable(), lr=1e-4 if number == 3 else 1e-3)
    if number > 1:
        method.rates = fixture[f"f64/task{number}/steps/rho_used"][0].tolist()
    for batch in range(4):
        # alpha, batches of an epoch and s_max of the fixture: 0.7, 4.5 and 50.
        scale = 1 / 50 + (50 - 1 / 50) * batch / 4.5
        loss, _ = take_loss(method, number, batch, scale, f"task{number}/steps/{batch}/rand_idx_")
        losses = fixture[f"f64/task{number}/{'steps/total' if number > 1 else 'losses'}"]
        assert_close(loss, losses[batch], f"step {batch}")
        if number > 1:
            rates = fixture[f"f64/task{number}/steps/rho_next"][batch]
            assert_close(torch.tensor(method.rates, dtype=torch.float64), rates, f"rates after step {batch}")
        optimizer.zero_grad()
        loss.backward()
        if batch == 2:
            for role, grad in gradients(method).items():
                if (key := f"f64/task{number}/grad_step2/{role}") in fixture:
                    assert_close(grad, to_ours(role, fixture[key]).reshape(grad.shape), f"{role} in step 2")
        optimizer.step()
        method.after_step()
    for role, part in roles(method):
        expected = to_ours(role, fixture[f"f64/task{number}/final/{role}"])
        assert_close(part.detach(), expected.reshape(part.shape), f"{role} after 4 steps")


def test_every_past_task_is_rehearsed_in_a_small_batch() -> None:
    method = started(3, torch.float64)
    method.rates = [0.0025, 0.4]
    assert all(len(rows) >= 1 and len(set(rows.tolist())) == len(rows) for rows in method._sample(BATCH))
    sizes = np.array([[len(rows) for rows in method._sample(100)] for _ in range(200)])
    assert set(sizes[:, 0]) == {1}
    assert set(sizes[:, 1]) <= {40, 41}  # 100 * .4 in float64 is not quite 40
    method.rates = [0.016, 1.0]
    sizes = np.array([[len(rows) for rows in method._sample(100)] for _ in range(2000)])
    assert set(sizes[:, 0]) == {1, 2}
    assert sizes[:, 0].mean() == pytest.approx(1.6, abs=0.05)
    assert set(sizes[:, 1]) == {100}


def test_rates_are_lowest_for_equal_masks() -> None:
    masks = torch.rand(6, 5)
    assert sampling_rate(masks, masks).item() == pytest.approx(module.MIN_RATE, abs=1e-6)
    assert sampling_rate(torch.eye(4)[:2], torch.eye(4)[2:]).item() == pytest.approx(0.5)


def test_the_teacher_is_a_copy_that_does_not_learn() -> None:
    torch.manual_seed(0)
    method = teracon(2, with_teacher=True, dtype=torch.float64)
    before = [value.clone() for value in teacher(method).state_dict().values()]
    optimizer = torch.optim.Adam(method.trainable(), lr=0.1)
    items = torch.randint(1, NUM_ITEMS, (8, 10))
    for step in range(3):
        loss, _ = method.loss(items, torch.randint(0, TASKS[1].num_classes, (8,)), Progress(step, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
    assert all(torch.equal(old, new) for old, new in zip(before, teacher(method).state_dict().values(), strict=True))
    assert all(not parameter.requires_grad for parameter in teacher(method).parameters())
    assert method.embeddings.tasks[0].abs().max() <= 6
    method.end_task()
    assert method.teacher is None


def test_a_fixed_teacher_answers_the_same_at_every_scale() -> None:
    torch.manual_seed(0)
    method = teracon(2, with_teacher=True, dtype=torch.float64)
    method.config = method.config.model_copy(update={"teacher_scale": "fixed", "sampling": "all"})
    items = torch.randint(1, NUM_ITEMS, (4, 10))
    method.rates = [1.0]
    taught = teacher(method).logits(items, 0)
    with mock.patch.object(module.F, "mse_loss", side_effect=module.F.mse_loss) as mse:
        for step in (0, 2):
            method.loss(items, torch.zeros(4, dtype=torch.long), Progress(step, 3))
    rehearsed = [call.args[1] for call in mse.call_args_list]
    for answer in rehearsed:
        torch.testing.assert_close(answer.sort(0).values, taught.sort(0).values)


def fixed(sampling: str) -> Teracon:
    """A method at its third task whose teacher's answers are the same in every epoch."""
    torch.manual_seed(0)
    method = teracon(2, with_teacher=True, dtype=torch.float64)
    method.config = method.config.model_copy(update={"teacher_scale": "fixed", "sampling": sampling})
    method.begin_task(TASKS[2])
    return method


def two_epochs(method: Teracon, with_rows: bool) -> tuple[list[float], list[int]]:
    """Losses of steps over 20 users, and how many histories the teacher's backbone has read in each."""
    users, optimizer = torch.randint(1, NUM_ITEMS, (20, 10)), torch.optim.Adam(method.trainable(), lr=0.01)
    losses, read = [], []
    teacher(method).network.backbone.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    for epoch in range(2):
        torch.manual_seed(epoch)
        order = torch.cat([torch.randperm(20), torch.tensor([3, 3, 3, 4])])  # users have several samples
        for step, rows in enumerate(order.split(8)):
            progress = Progress(step, 3, rows=rows if with_rows else None)
            loss, _ = method.loss(users[rows], rows % TASKS[2].num_classes, progress)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.after_step()
            losses.append(loss.item())
    return losses, read


@pytest.mark.parametrize("sampling", ["relation", "all"])
def test_a_fixed_teacher_encodes_a_user_once_per_past_task(sampling: str) -> None:
    expected, read_plainly = two_epochs(fixed(sampling), with_rows=False)
    method = fixed(sampling)
    names = method.state_dict().keys()
    losses, read = two_epochs(method, with_rows=True)
    assert losses == pytest.approx(expected, abs=1e-12)
    known = [sorted(task) for task in method._known]
    assert sum(read) == sum(map(len, known)) < sum(read_plainly)
    if sampling == "all":
        assert known == [list(range(20))] * 2
        assert sum(read_plainly) == 2 * 2 * 24
    assert method.state_dict().keys() == names
    method.end_task()
    assert method._known == []
    method.begin_task(TaskSpec("T4", "label", 2))
    assert method._known == [{}, {}, {}]


def test_a_teacher_whose_masks_harden_is_asked_in_every_step() -> None:
    method = fixed("all")
    method.config = method.config.model_copy(update={"teacher_scale": "annealed"})
    _, read = two_epochs(method, with_rows=True)
    assert sum(read) == 2 * 2 * 24
