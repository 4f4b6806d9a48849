"""Devices: which one is taken, what it can do."""

import pytest
import torch

from skippipe.errors import ConfigError
from skippipe.model import device as devices
from skippipe.model.device import (
    PEAKS,
    check_dtype,
    choose_device,
    device_identity,
    device_name,
    known_peak_tflop_per_s,
    peak_tflop_per_s,
    torch_dtype,
)

HAS_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")


def test_cpu_where_it_is_asked_for() -> None:
    assert choose_device("cpu", 3) == torch.device("cpu")


@pytest.mark.skipif(HAS_GPU, reason="needs a machine without GPU")
def test_without_gpu() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device cuda: this process sees no CUDA device; use 'cpu'"):
        choose_device("cuda")


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_ranks_share_gpus_in_turn() -> None:
    count = torch.cuda.device_count()
    assert choose_device("auto", count) == choose_device("cuda", 0) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("AMD Instinct MI300X", 1307, 163.4),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_peaks_by_name(name: str, bfloat16: float | None, float32: float | None) -> None:
    assert known_peak_tflop_per_s(name, torch.bfloat16) == bfloat16
    assert known_peak_tflop_per_s(name, torch.float32) == float32


def test_a_longer_name_comes_before_the_one_it_begins_with() -> None:
    names = list(PEAKS)
    for index, name in enumerate(names):
        assert not any(later.startswith(name + " ") for later in names[index:])


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_tflop_per_s(CPU, torch.float32) is None
    assert device_identity(CPU) == "cpu"
    assert device_name(CPU).startswith("CPU, ")


def test_bfloat16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert check_dtype(CPU, torch.float32, "training.dtype") is None
    assert "no instructions for bfloat16" in (check_dtype(CPU, torch.bfloat16, "training.dtype") or "")
    features["avx512_bf16"] = True
    assert check_dtype(CPU, torch.bfloat16, "training.dtype") is None


def test_bfloat16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(devices, "device_name", lambda device: "Tesla V100-SXM2-16GB")
    gpu = torch.device("cuda", 0)
    assert check_dtype(gpu, torch.float32, "training.dtype") is None
    with pytest.raises(ConfigError, match=r"training\.dtype: Tesla V100-SXM2-16GB does not compute in bfloat16"):
        check_dtype(gpu, torch.bfloat16, "training.dtype")


def test_only_number_formats_of_torch_have_a_name() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16
    for name in ("float31", "nn", "Tensor"):
        with pytest.raises(ConfigError, match=name):
            torch_dtype(name)
