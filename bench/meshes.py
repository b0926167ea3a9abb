"""What several devices change in a comparison: how they share the model and the rows, and the floor."""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.roofline import Ceilings, Work, decode_work, floor_s, prefill_work


@dataclass(frozen=True, order=True)
class Shape:
    """``dp`` groups of devices have a part of the rows each, and in every group ``tp`` devices have a part of the model
    each."""

    tp: int = 1
    dp: int = 1

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.tp * self.dp

    @property
    def name(self) -> str:
        """The mesh as the command line's flags."""
        parts = [f"--{flag} {n}" for flag, n in (("tp", self.tp), ("dp", self.dp)) if n > 1]
        return " ".join(parts) or "one device"

    def work(self, case: str, dims: Mapping[str, int], dtype: str, batch: int, length: float) -> Work:
        """What one device must do at least, for a decode step at a context of ``length`` or a prefill of that length of
        ``batch`` rows in all. Devices of a group divide it evenly."""
        rows = -(-batch // self.dp)
        if case == "prefill":
            whole = prefill_work(dims, dtype, rows, int(length))
        else:
            whole = decode_work(dims, dtype, rows, length)
        return Work(whole.bytes / self.tp, whole.flops / self.tp)

    def floor(
        self, ceilings: Ceilings, case: str, dims: Mapping[str, int], dtype: str, batch: int, length: float
    ) -> float:
        """The most tokens/s of all rows that the ceilings of one device allow."""
        tokens = batch * length if case == "prefill" else batch
        return tokens / floor_s(self.work(case, dims, dtype, batch, length), ceilings, dtype)
