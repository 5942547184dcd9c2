"""What the doctor says of a GPU and a disk: each cause of slowness by its name, each fault with what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cli import doctor, gpu
from cli.access import NoService
from cli.doctor import Finding, examine_disk, examine_gpus
from cli.gpu import Gpu, GpuProcess, GpuReport, GpuUnreadable, is_too_old, parse_report
from tests.unit.cli.conftest import Maskline

REPORT = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>570.86</driver_version>
  <cuda_version>12.8</cuda_version>
  <gpu id="00000000:01:00.0">
    <product_name>Tesla T4</product_name>
    <fb_memory_usage><total>15360 MiB</total><reserved>400 MiB</reserved><used>6100 MiB</used></fb_memory_usage>
    <clocks_{word}_reasons>
      <clocks_{word}_reason_gpu_idle>Not Active</clocks_{word}_reason_gpu_idle>
      <clocks_{word}_reason_hw_thermal_slowdown>{heat}</clocks_{word}_reason_hw_thermal_slowdown>
      <clocks_{word}_reason_sw_thermal_slowdown>{heat}</clocks_{word}_reason_sw_thermal_slowdown>
      <clocks_{word}_reason_hw_power_brake_slowdown>Not Active</clocks_{word}_reason_hw_power_brake_slowdown>
    </clocks_{word}_reasons>
    <temperature><gpu_temp>93 C</gpu_temp></temperature>
    <processes>
      <process_info><pid>4242</pid><process_name>game</process_name><used_memory>3000 MiB</used_memory></process_info>
    </processes>
  </gpu>
</nvidia_smi_log>
"""


def make_gpu(*, held_back_by: tuple[str, ...] = (), processes: tuple[GpuProcess, ...] = ()) -> Gpu:
    return Gpu(
        name="Tesla T4", memory_total="15360 MiB", memory_used="1 MiB", temperature="93 C", held_back_by=held_back_by,
        processes=processes,
    )  # fmt: skip


def make_report(*gpus: Gpu, cuda: str = "13.0") -> GpuReport:
    return GpuReport(driver="580.10", cuda=cuda, gpus=gpus)


@pytest.fixture(autouse=True)
def _a_torch_that_has_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_torch_cuda", lambda: "13.0")
    monkeypatch.setattr("shared.inference.device.choose_device", _choose_cuda)
    monkeypatch.setattr("shared.inference.device.describe_device", lambda _device: ("Tesla T4", 16 * 2**30))


def _choose_cuda(_name: str = "auto") -> object:
    import torch

    return torch.device("cuda")


def examine(report: GpuReport | None, *, own_sessions: frozenset[int] = frozenset()) -> list[Finding]:
    return list(examine_gpus(own_sessions=own_sessions, read_report=lambda: report))


def test_a_gpu_that_is_well_has_only_good_lines() -> None:
    findings = examine(make_report(make_gpu()))
    assert [(each.mark, each.subject) for each in findings] == [
        ("✓", "GPU"), ("✓", "driver"), ("✓", "torch"), ("✓", "CUDA"),
    ]  # fmt: skip


def test_without_a_gpu_it_says_that_the_cpu_is_slow_and_nothing_is_broken() -> None:
    findings = examine(None)
    assert findings[0].mark == "–"
    assert "inference runs on the CPU: right, but slow" in findings[0].says
    assert not any(each.mark == "✗" for each in findings)


def test_an_old_driver_is_named_with_what_it_lacks() -> None:
    driver = next(each for each in examine(make_report(make_gpu(), cuda="12.8")) if each.subject == "driver")
    assert driver.mark == "✗"
    assert "torch needs CUDA 13.0: install a newer driver" in driver.says


@pytest.mark.parametrize(
    ("driver", "torch", "old"),
    [("12.8", "13.0", True), ("13.0", "13.2", False), ("13.1", "12.8", False), ("N/A", "13.0", False)],
)
def test_versions_of_cuda_go_together_within_a_major_one(driver: str, torch: str, old: bool) -> None:
    assert is_too_old(driver_cuda=driver, torch_cuda=torch) is old


def test_a_gpu_that_torch_cannot_use_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("shared.inference.device.choose_device", lambda: torch.device("cpu"))
    found = next(each for each in examine(make_report(make_gpu())) if each.subject == "CUDA")
    assert found.mark == "✗"
    assert "CUDA_VISIBLE_DEVICES" in found.says


def test_heat_is_named_as_what_slows_down() -> None:
    found = examine(make_report(make_gpu(held_back_by=("heat",))))[-1]
    assert (found.mark, found.subject) == ("–", "speed")
    assert "slowed down by heat at 93 C: see to its cooling" in found.says


def test_other_programs_on_the_gpu_are_named_and_our_own_worker_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_session_of", {4242: 1, 4343: 77}.get)
    worker = GpuProcess(pid=4343, name="python", memory="6000 MiB")
    game = GpuProcess(pid=4242, name="game", memory="3000 MiB")
    found = examine(make_report(make_gpu(processes=(worker, game))), own_sessions=frozenset({77}))[-1]
    assert (found.mark, found.subject) == ("–", "speed")
    assert "game (process 4242, 3000 MiB)" in found.says
    assert "python" not in found.says


def test_a_broken_driver_is_told_in_its_own_words() -> None:
    def fail() -> GpuReport | None:
        raise GpuUnreadable("Failed to initialize NVML: Driver/library version mismatch")

    [found] = examine_gpus(own_sessions=frozenset(), read_report=fail)
    assert found.mark == "✗"
    assert "version mismatch; reinstall the NVIDIA driver" in found.says


@pytest.mark.parametrize("word", ["throttle", "event"])
def test_old_and_new_drivers_reports_are_read_alike(word: str) -> None:
    report = parse_report(REPORT.format(word=word, heat="Active"))
    assert (report.driver, report.cuda) == ("570.86", "12.8")
    [found] = report.gpus
    assert (found.name, found.memory_total, found.memory_used) == ("Tesla T4", "15360 MiB", "6100 MiB")
    assert found.held_back_by == ("heat",)
    assert found.processes == (GpuProcess(pid=4242, name="game", memory="3000 MiB"),)
    assert parse_report(REPORT.format(word=word, heat="Not Active")).gpus[0].held_back_by == ()


def test_a_program_that_is_no_nvidia_smi_is_unreadable() -> None:
    with pytest.raises(GpuUnreadable):
        parse_report("hello")


def write_program(folder: Path, text: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_the_drivers_program_is_asked_and_its_failure_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert gpu.read_report() is None
    write_program(folder, "echo No devices were found; exit 6")
    with pytest.raises(GpuUnreadable, match="No devices were found"):
        gpu.read_report()
    write_program(folder, f"/bin/cat <<'END'\n{REPORT.format(word='event', heat='Active')}END")
    report = gpu.read_report()
    assert report is not None
    assert report.gpus[0].name == "Tesla T4"


@pytest.mark.parametrize(("free_bytes", "mark"), [(2**40, "✓"), (5 * 2**30, "–"), (2**29, "✗")])
def test_a_disk_that_fills_up_is_told_before_it_is_full(folder: Path, free_bytes: int, mark: str) -> None:
    give: Callable[[Path], int] = lambda _path: free_bytes  # noqa: E731
    [found] = examine_disk([folder / "not" / "there" / "yet"], free_bytes=give)
    assert found.mark == mark


def test_a_machine_without_a_stack_is_not_a_broken_one(maskline: Maskline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine_gpus", lambda **_: iter(()))
    monkeypatch.setattr(doctor, "examine_weights", lambda: iter(()))
    done = maskline("doctor")
    assert done.status == 0
    for subject in ("database", "Redis", "S3", "service"):
        assert f"– {subject}" in done.out
    assert str(NoService("no service is known")) in done.out


def test_whatever_is_broken_makes_it_fail_and_says_what_to_do(
    maskline: Maskline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine_gpus", lambda **_: iter(()))
    monkeypatch.setattr(doctor, "examine_weights", lambda: iter(()))
    monkeypatch.setenv("MASKLINE_DATABASE__URL", "postgresql+psycopg://maskline@127.0.0.1:1/maskline")
    monkeypatch.setenv("MASKLINE_BROKER__URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("MASKLINE_STORAGE__ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MASKLINE_STORAGE__ACCESS_KEY", "somebody")
    monkeypatch.setenv("MASKLINE_STORAGE__SECRET_KEY", "secret")
    done = maskline("doctor", "--url", "http://127.0.0.1:1", "--api-key", "mk_test")
    assert done.status == 1
    for subject in ("database", "Redis", "S3", "service"):
        assert f"✗ {subject}" in done.out
    for advice in ("MASKLINE_DATABASE__URL", "MASKLINE_BROKER__URL", "MASKLINE_STORAGE__"):
        assert advice in done.out
