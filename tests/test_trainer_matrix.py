"""{Trainer, SFTTrainer, plain loop, accelerate} x dtype x checkpointing x compiled x int8, a line per cell."""

import pytest
from trainer_matrix import DRIVERS, SETTINGS, run_setting

# transformers renames its checkpointing from release to release; the old names work in all of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_loss_falls_and_resuming_is_exact(setting, tmp_path):
    cells = list(run_setting(setting, tmp_path))
    for cell in cells:
        print(cell.row)
    assert [cell.driver for cell in cells] == list(DRIVERS)
    assert not [cell.row for cell in cells if not (cell.falls and cell.exact)]
