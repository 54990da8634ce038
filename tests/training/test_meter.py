import pytest
import torch
from accelerate import Accelerator

from sit_atconv.training.meter import Meter, check_tracker, peak_tflops


def test_a_line_holds_the_means_since_the_last_line(monkeypatch):
    accelerator, now = Accelerator(cpu=True), [0.0]
    monkeypatch.setattr("sit_atconv.training.meter.time.perf_counter", lambda: now[0])
    meter = Meter(torch.device("cpu"), gflops_per_image=2.0, peak=10.0)
    with meter.timed("pause"):
        now[0] += 30
    with meter.timed("data"):
        now[0] += 2
    now[0] += 6
    meter.add(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0.0, 0.19, 1.0]), torch.ones(3, dtype=torch.bool))
    meter.add(torch.tensor([4.0, 0.0]), torch.tensor([0.5, 0.6]), torch.tensor([True, False]))  # one is unreadable
    for norm in (1.0, float("inf"), 3.0, float("nan")):
        meter.add_norm(torch.tensor(norm))
    line = meter.read(accelerator)
    assert line["loss"] == 4.0 and line["loss_by_time"] == [2.0, None, 4.0, None, 8.0] and line["grad_norm"] == 2.0
    assert line["data_wait"] == 0.25 and line["images_per_second"] == 0.625  # of the eight seconds outside the pause
    assert line["tflops_per_second"] == 0.00125 and line["mfu"] == pytest.approx(0.000125) and line["memory_gb"] > 0.1
    meter.add(torch.tensor([5.0]), torch.tensor([0.3]), torch.tensor([True]))
    meter.add_norm(torch.tensor(7.0))
    now[0] += 1
    again = meter.read(accelerator)
    assert (again["loss"], again["grad_norm"]) == (5.0, 7.0)
    blind = Meter(torch.device("cpu"), 1.0)
    blind.add(torch.zeros(1), torch.zeros(1), torch.tensor([False]))
    blind.add_norm(torch.tensor(float("inf")))
    now[0] += 1
    line = blind.read(accelerator)
    assert "mfu" not in line and line["grad_norm"] is None and line["loss"] == 0.0


def test_the_peak_depends_on_device_and_precision(monkeypatch):
    assert peak_tflops(torch.device("cpu"), "bf16", True) is None
    for name, peak in (
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA T4", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(torch.device("cuda"), "bf16", False) == peak
        assert peak_tflops(torch.device("cuda"), "fp32", True) == (peak and peak / 2)
        assert peak_tflops(torch.device("cuda"), "fp32", False) is None


def test_a_missing_tracker_is_refused(monkeypatch):
    check_tracker(None)
    monkeypatch.setattr("sit_atconv.training.meter.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'sit-atconv\[trackers\]'"):
        check_tracker("wandb")
