"""What accelerators can do at best: one row a chip, from public figures.

A rate is what the maker states, which no program reaches: times that follow from it are lower
bounds, and shares of it (MFU) are honest only when the row is right. Sources:

- TPU: the pages of each generation in Cloud TPU's documentation (docs.cloud.google.com/tpu/docs,
  "TPU v4", "v5e", "v5p", "v6e"): peak compute per chip in bf16, HBM, network per chip (v5e: a
  pod's over its 256 chips; v6e: four adapters of 200 Gbit/s for eight chips). A link's bandwidth
  is the stated sum of both directions of all ports, 400, 1200 and 800 GB/s, over two and the
  number of ports; v4's is 50 (Jouppi et al. 2023, "TPU v4"). "How to Scale Your Model"
  (jax-ml.github.io/scaling-book) counts on 45 and 90 in practice. `usable_bytes` is the limit
  that the TPU compiler states when a program does not fit.
- NVIDIA: data sheets of A100, H100 and H200 (SXM) and of DGX B200, dense bf16; NVLink per GPU in
  one direction, half of the sum that is stated; one network adapter a GPU (HDR on A100, NDR after).
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      name: e.g. "v5e" or "h100".
      device_kinds: how `jax.Device.device_kind` begins for it.
      peak_flops: bf16 FLOP/s, dense.
      memory_bytes: of its HBM.
      usable_bytes: what a program may use of it.
      memory_bandwidth: of its HBM, bytes/s.
      link_bandwidth: of one link to a neighbor (GPU: to the node's switch) in one direction,
        bytes/s.
      links: how many it has.
      network_bandwidth: its share of the network beyond (between slices, between nodes), in one
        direction, bytes/s.
      node: chips that the links join; 0: a whole slice.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    memory_bytes: int
    usable_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    links: int
    network_bandwidth: float
    node: int = 0

    @property
    def ici_bandwidth(self) -> float:
        """What leaves the chip through all its links at once, bytes/s."""
        return self.link_bandwidth * self.links


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    tflops: float,
    gib: int,
    usable_gib: float,
    gb_per_s: float,
    link: float,
    links: int,
    network: float,
) -> Chip:
    usable = int(usable_gib * GIB)
    return Chip(
        name, kinds, tflops * 1e12, gib * GIB, usable, gb_per_s * 1e9, link * 1e9, links,
        network * 1e9,
    )  # fmt: skip


def _gpu(
    name: str,
    kind: str,
    tflops: float,
    gb: float,
    tb_per_s: float,
    nvlink: float,
    network: float,
) -> Chip:
    # A CUDA context, the collectives' buffers and the allocator's rounding leave about 92%.
    return Chip(
        name, (kind,), tflops * 1e12, int(gb * 1e9), int(0.92 * gb * 1e9), tb_per_s * 1e12,
        nvlink * 1e9, 1, network * 1e9, node=8,
    )  # fmt: skip


CHIPS = {
    chip.name: chip
    for chip in (
        #    name  device_kind                   TFLOP/s GiB usable GB/s link links network GB/s
        _tpu("v4", ("TPU v4",), 275, 32, 30.75, 1228, 50, 6, 6.25),
        _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 15.75, 819, 50, 4, 3.125),
        _tpu("v5p", ("TPU v5p", "TPU v5"), 459, 96, 95.74, 2765, 100, 6, 6.25),
        _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 32, 31.25, 1638, 100, 4, 12.5),
        #    name        device_kind         TFLOP/s GB TB/s NVLink network GB/s
        _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 312, 40, 1.555, 300, 25),
        _gpu("a100-80gb", "NVIDIA A100-SXM4-80GB", 312, 80, 2.039, 300, 25),
        _gpu("h100", "NVIDIA H100 80GB", 989, 80, 3.35, 450, 50),
        _gpu("h200", "NVIDIA H200", 989, 141, 4.8, 450, 50),
        _gpu("b200", "NVIDIA B200", 2250, 180, 8.0, 900, 50),
    )
}


def of_device_kind(device_kind: str) -> Chip | None:
    """The chip that a `jax.Device` is, or None where there is no row for it (a CPU)."""
    fits = [
        (len(kind), chip)
        for chip in CHIPS.values()
        for kind in chip.device_kinds
        if device_kind.startswith(kind)
    ]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None
