"""The normaliser of the scripts that are not yet rebuilt."""

import numpy as np
import torch

from old.conftest import ON_VECTORS


@ON_VECTORS
def test_normalizer_equals_two_passes_in_float64(script):
    alone = (script.Ranks(script.Args()),) if script.__name__ == "ppo_multienv" else ()
    rng = np.random.default_rng(0)
    batches = [rng.normal(1e3, [1e-2, 1, 50], (steps, 4, 3)).astype(np.float32) for steps in (1, 9)]
    batches += [rng.normal(-5, 2, (100, 4, 3)).astype(np.float32)]
    normalizer = script.ObservationNormalizer(3)
    for batch in batches:
        normalizer.update(torch.from_numpy(batch), *alone)
    everything = np.concatenate([batch.reshape(-1, 3) for batch in batches]).astype(np.float64)
    np.testing.assert_allclose(normalizer.mean, everything.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.var, everything.var(0), rtol=1e-9)
    assert normalizer.count.item() == len(everything)
    obs = batches[2]
    expected = (obs - everything.mean(0)) / np.sqrt(everything.var(0) + 1e-8)
    normalized = normalizer(torch.from_numpy(obs))
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized, expected.clip(-10, 10), rtol=1e-6, atol=1e-6)
    assert normalizer(torch.tensor([1e9, -1e9, 0.0])).tolist()[:2] == [10, -10]
