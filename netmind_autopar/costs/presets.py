"""Known devices and clusters: vendor numbers, each with the page it is from. Numbers only; `device.py` reads them.

Dense rates, without sparsity; "float32" is the rate outside the tensor cores, because PyTorch multiplies float32 matrices there
unless told otherwise. `memory_bytes` counts a "80 GB" device as 80e9 bytes although it shows about 79 GiB: the rest is what the
driver's context and the communication library's own buffers take. What the caching allocator loses between tensors is `fragmentation`.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

GB, TERA = 10**9, 1e12

# What a link delivers of its vendor rate. Fitted to the all-reduce times of 2 to 8 A100 that vTrain publishes (MICRO 2024; 1 MiB to
# 1 GiB): 193 of 300 GB/s for 2 devices, 218 for 4, 227 for 8. The latencies of NVLink and of starting a collective are from there too.
LINK_EFFICIENCY = 0.76
# What PyTorch's caching allocator reserves beyond the tensors alive at the peak, as a part of these. torchtitan's published peaks on H100
# and H200 (reserved memory, 20 runs, 73.3 GiB on average) are 4.69 GiB above what a count of the tensors says, fitted on half of them
# (`KEPT` in benchmarks/published.py): 0.068 of 68.6 GiB. Workspaces of libraries are in it. On CPUs the system takes back what is freed.
FRAGMENTATION = 0.068
GPU_LAUNCH_S = 4e-6  # from one kernel to the next in eager mode, when the queue is full


def _gpu(memory_gb: float, memory_tb_s: float, host_gb_s: float, source: str, **tera: float) -> dict[str, object]:
    return {
        "memory_bytes": int(memory_gb * GB),
        "memory_bandwidth_bytes_s": memory_tb_s * TERA,
        "host_bandwidth_bytes_s": host_gb_s * GB,
        "launch_s": GPU_LAUNCH_S,
        "fragmentation": FRAGMENTATION,
        "peak_flops": {k: v * TERA for k, v in tera.items()},
        "source": source,
    }


# memory GB, memory TB/s, host link GB/s in one direction, source, then TFLOP/s by dtype
DEVICES: dict[str, dict[str, object]] = {
    "v100": _gpu(32, 0.9, 16, "NVIDIA V100 Tensor Core GPU datasheet (SXM2, 32 GB)", float32=15.7, float64=7.8, float16=125),
    "a100-40": _gpu(40, 1.555, 32, "NVIDIA A100 Tensor Core GPU datasheet (40 GB)", float32=19.5, float64=9.7, float16=312, bfloat16=312),
    "a100-80": _gpu(
        80, 2.039, 32, "NVIDIA A100 Tensor Core GPU datasheet (SXM, 80 GB)", float32=19.5, float64=9.7, float16=312, bfloat16=312
    ),
    "a100-pcie": _gpu(
        80, 1.935, 32, "NVIDIA A100 Tensor Core GPU datasheet (PCIe, 80 GB)", float32=19.5, float64=9.7, float16=312, bfloat16=312
    ),
    "h100-sxm": _gpu(
        80,
        3.35,
        64,
        "NVIDIA H100 Tensor Core GPU datasheet (SXM)",
        float32=67,
        float64=34,
        float16=989.4,
        bfloat16=989.4,
        float8_e4m3fn=1978.9,
        float8_e5m2=1978.9,
    ),
    "h100-pcie": _gpu(
        80,
        2.0,
        64,
        "NVIDIA H100 Tensor Core GPU datasheet (PCIe)",
        float32=51,
        float64=26,
        float16=756.5,
        bfloat16=756.5,
        float8_e4m3fn=1513,
        float8_e5m2=1513,
    ),
    "h200": _gpu(
        141,
        4.8,
        64,
        "NVIDIA H200 Tensor Core GPU datasheet (SXM)",
        float32=67,
        float64=34,
        float16=989.4,
        bfloat16=989.4,
        float8_e4m3fn=1978.9,
        float8_e5m2=1978.9,
    ),
    "b200": _gpu(
        180,
        8.0,
        64,
        "NVIDIA Blackwell architecture technical brief (HGX B200)",
        float32=80,
        float64=40,
        float16=2250,
        bfloat16=2250,
        float8_e4m3fn=4500,
        float8_e5m2=4500,
    ),
    "l4": _gpu(
        24, 0.3, 32, "NVIDIA L4 Tensor Core GPU datasheet", float32=30.3, float64=0.47, float16=121, bfloat16=121, float8_e4m3fn=242.5
    ),
    "rtx4090": _gpu(
        24,
        1.008,
        32,
        "NVIDIA Ada GPU architecture whitepaper (GeForce RTX 4090)",
        float32=82.6,
        float64=1.29,
        float16=165.2,
        bfloat16=165.2,
        float8_e4m3fn=330.3,
    ),
    "mi300x": _gpu(
        192,
        5.3,
        64,
        "AMD Instinct MI300X accelerator data sheet",
        float32=163.4,
        float64=81.7,
        float16=1307.4,
        bfloat16=1307.4,
        float8_e4m3fn=2614.9,
    ),
    # One process that runs on one core. Measured with PyTorch 2.13 on an AMD EPYC (Zen 4) core at 2.6 GHz: 90 GFLOP/s float32,
    # 44 float64 (mm of 512 × 512), 22 GB/s (add in cache-sized blocks), about half of that when all cores are busy.
    "cpu": {
        "memory_bytes": 0,
        "memory_bandwidth_bytes_s": 1.2e10,
        "host_bandwidth_bytes_s": 1.2e10,
        "launch_s": 3e-6,
        "peak_flops": {"float32": 9e10, "float64": 4.5e10},
        "source": "measured; memory: the present machine's, shared by its processes",
    },
    # One process that runs on all eight cores. 32 float32 operations per cycle and core (two 256-bit multiply-adds: AMD, Software
    # Optimization Guide for the AMD Zen4 Microarchitecture) at the base clock of 3.3 GHz; two channels of DDR5-5600 of 8 bytes each.
    "laptop-cpu": {
        "memory_bytes": 16 * GB,
        "memory_bandwidth_bytes_s": 8.96e10,
        "host_bandwidth_bytes_s": 8.96e10,
        "launch_s": 3e-6,
        "peak_flops": {"float32": 8 * 32 * 3.3e9, "float64": 8 * 16 * 3.3e9},
        "source": "AMD Ryzen 7 7840U product page: 8 cores, 3.3 GHz, 2 × DDR5-5600; with 16 GB",
    },
}


class Host(NamedTuple):
    """What a device may use of its node's memory, and of its disks: bytes, and bytes/s of the slower direction, which is writing."""

    memory_bytes: int
    disk_bytes_s: float
    source: str


_NVME = 3.5e9  # U.2, PCIe Gen4, sequential writes: Samsung's announcement of the PM9A3, 3.84 TB (2020); reading takes half of the time

# Per device: the node's memory and drives, shared by its eight devices. The share that the system and the data loaders take is left out.
HOSTS: dict[str, Host] = {
    "v100": Host(512 * GB // 8, 4 * 0.5e9 / 8, "NVIDIA DGX-1 (V100) datasheet: 512 GB, four SATA SSDs of 1.92 TB"),
    "a100-40": Host(1000 * GB // 8, 4 * _NVME / 8, "NVIDIA DGX A100 (320 GB) datasheet: 1 TB, four U.2 NVMe drives of 3.84 TB"),
    "a100-80": Host(2000 * GB // 8, _NVME, "NVIDIA DGX A100 (640 GB) datasheet: 2 TB, eight U.2 NVMe drives of 3.84 TB"),
    "a100-pcie": Host(1000 * GB // 8, 4 * _NVME / 8, "assumed: as NVIDIA DGX A100 (320 GB)"),
    "h100-sxm": Host(2000 * GB // 8, _NVME, "NVIDIA DGX H100 datasheet: 2 TB, eight U.2 NVMe drives of 3.84 TB"),
    "h100-pcie": Host(1000 * GB // 8, 4 * _NVME / 8, "assumed: half of NVIDIA DGX H100"),
    "h200": Host(2000 * GB // 8, _NVME, "NVIDIA DGX H200 datasheet: 2 TB, eight U.2 NVMe drives of 3.84 TB"),
    "b200": Host(2000 * GB // 8, _NVME, "NVIDIA DGX B200 datasheet: 2 TB, eight U.2 NVMe drives of 3.84 TB"),
    "l4": Host(768 * GB // 8, 4 * _NVME / 8, "Amazon EC2 G6 page, g6.48xlarge: 768 GiB for eight devices; four drives assumed"),
    "rtx4090": Host(512 * GB // 8, _NVME / 8, "assumed: a workstation with 512 GB and one NVMe drive for eight devices"),
    "mi300x": Host(2000 * GB // 8, _NVME, "assumed: as NVIDIA DGX H100"),
    "cpu": Host(0, 1e9, "memory: the present machine's, shared by its processes; disk assumed"),
    "laptop-cpu": Host(16 * GB, _NVME, "one NVMe drive; memory is the device's own"),
}


class Link(NamedTuple):
    """A link of one device: bytes/s in one direction as the vendor says, latency of one message, what is reached of the rate."""

    vendor_bytes_s: float
    latency_s: float
    efficiency: float
    source: str


class Cluster(NamedTuple):
    """`intra` joins the `node_size` devices of a node, `inter` the nodes. A latency between nodes includes the card and a switch."""

    device: str
    node_size: int
    intra: Link
    inter: Link


def _nvlink(gb_s: float, source: str) -> Link:
    return Link(gb_s * GB, 2.7e-6, LINK_EFFICIENCY, source)


def _pcie(gb_s: float, source: str) -> Link:
    # All devices share the root complex: 35–45 GB/s are usual in nccl-tests of 8 × H100 PCIe with 64 GB/s each.
    return Link(gb_s * GB, 5e-6, 0.6, source)


_IB400 = Link(50e9, 5e-6, LINK_EFFICIENCY, "NVIDIA ConnectX-7 datasheet: 400 Gb/s, one card per device")
_IB200 = Link(25e9, 5e-6, LINK_EFFICIENCY, "NVIDIA ConnectX-6 datasheet: 200 Gb/s, one card per device")
_IB100 = Link(12.5e9, 6e-6, LINK_EFFICIENCY, "NVIDIA ConnectX-5 datasheet: 100 Gb/s, one card per device")
_IB400_SHARED = Link(6.25e9, 6e-6, LINK_EFFICIENCY, "NVIDIA ConnectX-7 datasheet: 400 Gb/s, one card for eight devices")
_ETH25 = Link(3.125e9 / 8, 3e-5, LINK_EFFICIENCY, "25 Gb/s Ethernet, one card for eight devices")
_GLOO = Link(1.5e9, 5e-5, 1.0, "gloo on the loopback device, order of magnitude")
_ETH10 = Link(1.25e9, 1e-4, LINK_EFFICIENCY, "10 Gb/s Ethernet")
_ETH1 = Link(0.125e9, 1e-4, LINK_EFFICIENCY, "1 Gb/s Ethernet")
# EFA's datagrams may arrive out of order and are sorted in software: the latency, an order of magnitude, is above InfiniBand's.
_EFA400 = Link(6.25e9, 1.5e-5, LINK_EFFICIENCY, "Amazon EC2 P4 page: 400 Gb/s of EFA for eight devices; latency assumed")
_EFA3200 = Link(50e9, 1.5e-5, LINK_EFFICIENCY, "Amazon EC2 P5 page: 3,200 Gb/s of EFA for eight devices; latency assumed")

_NVLINK2 = _nvlink(150, "NVIDIA V100 datasheet: NVLink 300 GB/s in both directions")
_NVLINK3 = _nvlink(300, "NVIDIA A100 datasheet: NVLink 600 GB/s in both directions")
_NVLINK4 = _nvlink(450, "NVIDIA H100 and H200 datasheets: NVLink 900 GB/s in both directions")
_NVLINK5 = _nvlink(900, "NVIDIA Blackwell architecture technical brief: NVLink 1.8 TB/s in both directions")
_XGMI = _nvlink(448, "AMD Instinct MI300X data sheet: seven Infinity Fabric links of 128 GB/s in both directions")
_PCIE4 = _pcie(32, "NVIDIA A100 datasheet: PCIe Gen4 64 GB/s in both directions")
_PCIE5 = _pcie(64, "NVIDIA H100 datasheet: PCIe Gen5 128 GB/s in both directions")

CLUSTERS: dict[str, Cluster] = {
    "v100": Cluster("v100", 8, _NVLINK2, _IB100),
    "a100-40": Cluster("a100-40", 8, _NVLINK3, _IB200),
    "a100-80": Cluster("a100-80", 8, _NVLINK3, _IB200),
    "dgx-a100": Cluster("a100-80", 8, _NVLINK3, _IB200),  # NVIDIA DGX A100 datasheet (640 GB): eight ConnectX-6, one per device
    "p4d": Cluster("a100-40", 8, _NVLINK3, _EFA400),
    "p4de": Cluster("a100-80", 8, _NVLINK3, _EFA400),
    "a100-pcie": Cluster("a100-pcie", 8, _PCIE4, _IB400_SHARED),
    "h100-sxm": Cluster("h100-sxm", 8, _NVLINK4, _IB400),
    "dgx-h100": Cluster("h100-sxm", 8, _NVLINK4, _IB400),  # NVIDIA DGX H100 datasheet: eight ConnectX-7, one per device
    "p5": Cluster("h100-sxm", 8, _NVLINK4, _EFA3200),
    "h100-pcie": Cluster("h100-pcie", 8, _PCIE5, _IB400_SHARED),
    "h200": Cluster("h200", 8, _NVLINK4, _IB400),
    "p5en": Cluster("h200", 8, _NVLINK4, _EFA3200),
    "b200": Cluster("b200", 8, _NVLINK5, _IB400),
    "l4": Cluster("l4", 8, _PCIE4, _ETH25),
    "rtx4090": Cluster("rtx4090", 8, _PCIE4, _ETH25),
    "mi300x": Cluster("mi300x", 8, _XGMI, _IB400),
    "cpu": Cluster("cpu", 8, _GLOO, _ETH10),
    "laptop": Cluster("laptop-cpu", 1, _GLOO, _ETH1),
}

# torch.cuda.get_device_name → cluster; the first that matches
NAMES: tuple[tuple[str, str], ...] = (
    (r"H100.*PCIe|H100 NVL", "h100-pcie"),
    (r"H100", "h100-sxm"),
    (r"H200", "h200"),
    (r"B200", "b200"),
    (r"A100.*PCI", "a100-pcie"),
    (r"A100.*40GB", "a100-40"),
    (r"A100", "a100-80"),
    (r"V100", "v100"),
    (r"\bL4\b", "l4"),
    (r"RTX 4090", "rtx4090"),
    (r"MI300X", "mi300x"),
)


def match_name(device_name: str) -> str | None:
    """The cluster whose devices have this name, or None."""
    return next((cluster for pattern, cluster in NAMES if re.search(pattern, device_name, re.IGNORECASE)), None)


def host_memory_bytes() -> int:
    """Memory of the present machine, or of the container that this process is confined to."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as f:
                total = min(total, int(f.read()))
        except (OSError, ValueError):
            continue
    return total
