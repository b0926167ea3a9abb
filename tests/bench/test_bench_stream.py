"""The kernel that measures a GPU's read rate: it reads every word, and lowers for the GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h200 import H200, SMS
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.stream import DEPTH, STAGE, stream

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(("stages", "blocks", "passes"), [(1, 1, 1), (2 * DEPTH + 3, 2, 1), (5, 3, 7)])
def test_every_word_is_fetched(stages: int, blocks: int, passes: int) -> None:
    """The sums of the blocks are exact, because integers wrap."""
    words = jax.random.bits(jax.random.key(42), (stages, *STAGE), jnp.uint32).astype(jnp.int32)
    how = plgpu.InterpretGPUParams(detect_races=True)
    sums = np.asarray(stream(words, passes=passes, blocks=blocks, interpret=how))
    assert not interpret_pallas_call.get_races().races_found
    with np.errstate(over="ignore"):
        expected = [np.asarray(words)[b::blocks].sum(axis=0, dtype=np.int32) * np.int32(passes) for b in range(blocks)]
    np.testing.assert_array_equal(sums, np.stack(expected))


def test_it_lowers_for_the_gpu() -> None:
    words = jax.ShapeDtypeStruct((1 << 18, *STAGE), jnp.int32)
    with jax.sharding.use_abstract_mesh(H200):
        lowered = jax.jit(lambda w: stream(w, passes=8)).trace(words).lower(lowering_platforms=("cuda",))
    assert lowered.out_info.shape == (SMS, *STAGE)


@pytest.mark.gpu
def test_every_word_is_fetched_on_the_gpu() -> None:
    words = jax.random.bits(jax.random.key(42), (4001, *STAGE), jnp.uint32).astype(jnp.int32)
    total = np.asarray(stream(words, passes=3)).sum(axis=0, dtype=np.int32)
    expected = np.asarray(words).sum(axis=0, dtype=np.int32) * np.int32(3)
    np.testing.assert_array_equal(total, expected)
