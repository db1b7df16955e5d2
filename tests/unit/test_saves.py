"""Which steps save and which saves stay."""

from __future__ import annotations

import pytest

from megatron_octo.budget.saves import is_due, superseded
from megatron_octo.config.train import SaveConfig
from megatron_octo.errors import SettingsError

STEP = 256  # tokens


def due(config: SaveConfig, steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if is_due(config, step, batch_tokens=STEP)]


def test_steps_and_tokens_each_call_for_a_save():
    assert due(SaveConfig(every_steps=4), 9) == [4, 8]
    assert due(SaveConfig(every_tokens=2 * STEP), 6) == [2, 4, 6]
    assert due(SaveConfig(every_steps=4, every_tokens=3 * STEP), 9) == [3, 4, 6, 8, 9]
    assert due(SaveConfig(every_minutes=1), 9) == []  # rank 0's clock does


def test_a_multiple_of_tokens_inside_of_a_step_saves_after_it():
    assert due(SaveConfig(every_tokens=2 * STEP + 1), 8) == [3, 5, 7]
    assert due(SaveConfig(every_tokens=STEP // 2), 3) == [1, 2, 3]


def test_the_last_ones_stay():
    config = SaveConfig(every_steps=1, keep_last=2)
    assert superseded(config, [3, 6, 9, 10], batch_tokens=STEP) == [3, 6]
    assert superseded(config, [3], batch_tokens=STEP) == []


def test_the_first_save_at_or_after_each_multiple_of_tokens_stays_however_often_saves_go():
    config = SaveConfig(every_steps=3, keep_last=1, keep_every_tokens=10 * STEP)
    steps: list[int] = []
    for step in range(3, 37, 3):
        steps.append(step)
        for gone in superseded(config, steps, batch_tokens=STEP):
            steps.remove(gone)
    assert steps == [12, 21, 30, 36]


@pytest.mark.parametrize("name", ["every_steps", "every_tokens", "every_minutes", "keep_last", "keep_every_tokens"])
def test_a_number_that_is_not_above_0_is_refused(name):
    with pytest.raises(SettingsError, match=f"save.{name} 0 is not above 0"):
        SaveConfig(**{"every_steps": 1, name: 0})


def test_settings_without_an_interval_are_refused():
    with pytest.raises(SettingsError, match="no interval"):
        SaveConfig(keep_every_tokens=1)
