"""When the scheduler plans sequences whose next step depends on their last token."""

import pytest

from atoma_jax.engine.guide import Guide
from tests.engine.fake_device import Harness, finite_prompt


def add_guided(harness: Harness, seed: int, *, guided: bool) -> None:
    """A request of eight tokens; if `guided`, its next step depends on its last token."""
    (seq,) = harness.add(finite_prompt(5, 8, seed=seed))
    if guided:
        seq.guide = Guide(None)
        harness.scheduler._num_guided += 1


@pytest.mark.parametrize("num_pages", [64, 9])
def test_a_guided_sequence_is_planned_once_its_last_token_is_read(num_pages):
    """Whatever is preempted; those without a guide are planned ahead as ever, and all end as they would alone."""
    harness = Harness(num_pages=num_pages, depth=1)
    for seed in range(6):
        add_guided(harness, seed, guided=seed % 2 == 1)
    ahead: set[bool] = set()
    while harness.scheduler.has_work or harness.in_flight:
        plan = harness.step()
        ahead |= {work.seq.guide is not None for work in plan.works if work.token_on_device} if plan else set()
    harness.check_outputs()
    assert ahead == {False}
    assert harness.scheduler._num_guided == 0
    assert (harness.scheduler.stats().num_preemptions > 0) == (num_pages == 9)


@pytest.mark.parametrize(("num_guided", "steps"), [(4, 8), (3, 8), (1, 12)])
def test_a_step_waits_for_the_tokens_of_most(num_guided, steps):
    """Four sequences of eight tokens: guided ones are in eight steps, the last of which is the step `steps`."""
    harness = Harness(depth=1)
    for seed in range(4):
        add_guided(harness, seed, guided=seed < num_guided)
    plans = []
    while harness.scheduler.has_work or harness.in_flight:
        plan = harness.step()
        if plan is not None:
            plans.append(any(work.seq.guide is not None for work in plan.works))
    assert sum(plans) == 8
    assert max(index for index, guided in enumerate(plans) if guided) == steps - 1
