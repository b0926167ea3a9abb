"""An H200 to lower for, on a machine that has none."""

import jax

SMS = 132
H200 = jax.sharding.AbstractMesh(
    (), (), abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=SMS)
)
