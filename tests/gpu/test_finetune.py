"""The fine-tuning command on the device: the CPU's loss curve."""

import pytest
import tiny_llama

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from finetune_pair import RUNS, pair

pytestmark = pytest.mark.stand_in


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_the_loss_curve_is_the_cpus(run, device, tmp_path):
    """finetune_pair.py does the same with a larger model."""
    model = tiny_llama.save(tmp_path / "model")
    backend = None if device.type == "cuda" else "simt"
    result = pair(tmp_path, model, run, 8, device.type, backend)
    print(result)
    assert result["falls"] and result["agrees"], result
