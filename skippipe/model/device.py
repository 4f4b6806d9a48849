"""Which device a process computes on, and what it can do."""

import re

import torch

from skippipe.errors import ConfigError

PEAKS: dict[str, tuple[float | None, float]] = {
    "GB200": (2500, 80),
    "B200": (2250, 75),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H800": (989, 67),
    "H20": (148, 44),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165, 10.3),
    "A10G": (70, 35),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "RTX 6000 Ada": (364, 91.1),
    "RTX A6000": (155, 38.7),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
    "V100": (None, 15.7),
    "T4": (None, 8.1),
    "MI300X": (1307, 163.4),
    "MI250X": (383, 47.9),
}
"""Dense peak in TFLOP/s for bfloat16 (sums in fp32) and for float32, by the words in a GPU's name.

From the data sheets and architecture white papers of NVIDIA and AMD; where a sheet gives the rate with sparsity, half
of it. None: the GPU has no bfloat16.
"""
QUALIFIERS = ("Ti", "SUPER", "D", "Laptop", "MIG")
"""Words that make another GPU, or a part of one, of a known name."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the number format that settings and files call `name`, such as `float32` or `bfloat16`."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"{name!r} is no number format of torch; use such as 'float32' or 'bfloat16'")
    return found


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device called `name`: `auto` (a GPU where there is one), `cpu` or `cuda`; ranks share GPUs in turn.

    Raises `ConfigError` where a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(f"device {name}: this process sees no CUDA device; use 'cpu' or 'auto', or check the driver")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def device_name(device: torch.device) -> str:
    """Return what the device is, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def device_identity(device: torch.device) -> str:
    """Return what tells the device apart from others of its machine."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return device.type


def check_dtype(device: torch.device, dtype: torch.dtype, key: str) -> str | None:
    """Return a warning where `device` computes in `dtype` but slowly; raise `ConfigError` where it cannot.

    `key` is where the experiment asks for it.
    """
    if dtype != torch.bfloat16:
        return None
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return None
        raise ConfigError(
            f"{key}: {device_name(device)} does not compute in bfloat16 (NVIDIA GPUs do from compute capability 8.0 "
            "on); use float32, or leave this device out"
        )
    if cpu_has_bfloat16():
        return None
    return f"{key}: this CPU has no instructions for bfloat16 and will be slower than in float32"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 by itself; true where torch cannot tell."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    features = ("avx512_bf16", "amx_bf16", "bf16")
    return not known or known.get("architecture") != "x86_64" or any(known.get(feature) for feature in features)


def peak_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's dense peak by its data sheet; None where it is not known."""
    return known_peak_tflop_per_s(device_name(device), dtype) if device.type == "cuda" else None


def known_peak_tflop_per_s(name: str, dtype: torch.dtype) -> float | None:
    """Return the peak of the GPU called `name`; None for one that is not in the table or only part of one."""
    words = re.split(r"[\s-]+", name)
    for model, (bfloat16, float32) in PEAKS.items():
        parts = model.split()
        for first in range(len(words) - len(parts) + 1):
            if words[first : first + len(parts)] == parts:
                if set(QUALIFIERS) & set(words):
                    return None
                return bfloat16 if dtype == torch.bfloat16 else float32
    return None
