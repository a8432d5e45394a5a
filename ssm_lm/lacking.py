"""What a machine with a GPU lacks for it, each with the way out: a part of `ssm-lm doctor`.

The GPUs are looked for where the kernel of Linux shows them, so that one is seen which torch does not see.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

ROOT = Path("/")
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # of PCI: displays, 3D controllers, accelerators
ROCM_WHEELS = "https://download.pytorch.org/whl/rocm7.2"


def gpus_of_the_machine() -> list[str]:
    """The makers of the GPUs that the kernel lists, sorted: "NVIDIA", "AMD", of each that has one or more."""
    found = set()
    for device in (ROOT / "sys/bus/pci/devices").glob("*"):
        vendor, kind = _read(device / "vendor"), _read(device / "class")
        if vendor in VENDORS and kind.startswith(GPU_CLASSES):
            found.add(VENDORS[vendor])
    # a container may show the device and not the bus
    if (ROOT / "dev/nvidiactl").exists():
        found.add("NVIDIA")
    return sorted(found)


def lacking() -> dict[str, str]:
    """What is missing or wrong -> what to do about it; empty where there is nothing, or no GPU."""
    import torch

    found, makers = {}, gpus_of_the_machine()
    if "NVIDIA" in makers:
        found |= _of_nvidia(torch)
    if "AMD" in makers and "NVIDIA" not in makers:  # beside an NVIDIA card it may be the processor's own
        found |= _of_amd(torch)
    return found | _of_triton() if makers else found


def _of_nvidia(torch) -> dict[str, str]:
    if torch.version.cuda is None:
        return {"torch with CUDA": f"{torch.__version__} has none: pip install --force-reinstall torch"}
    if torch.cuda.is_available():
        return {}
    driver = _read(ROOT / "proc/driver/nvidia/version").partition("Module")[2].split()
    if not driver:
        return {
            "NVIDIA's driver": "the kernel has not loaded it: install the driver, or start the container with the GPU"
        }
    return {
        "a newer driver": f"torch {torch.__version__} is of CUDA {torch.version.cuda} and finds no device under driver "
        f"{driver[0]}: a newer driver, or a torch of an older CUDA"
    }


def _of_amd(torch) -> dict[str, str]:
    kfd = ROOT / "dev/kfd"
    if not kfd.exists():
        return {"AMD's driver": "there is no /dev/kfd: install ROCm, or start the container with --device /dev/kfd"}
    if not os.access(kfd, os.R_OK | os.W_OK):
        return {
            "access to the GPU": "/dev/kfd is not open to this user: usermod -aG render,video USER, and log in again"
        }
    if torch.version.hip is None:
        wheels = f"pip install --force-reinstall torch --index-url {ROCM_WHEELS}"
        return {"torch with ROCm": f"{torch.__version__} has none: {wheels}"}
    if not torch.cuda.is_available():
        return {
            "a GPU that ROCm knows": f"torch {torch.__version__} finds none: see HIP_VISIBLE_DEVICES and `rocminfo`"
        }
    return {}


def _of_triton() -> dict[str, str]:
    """Triton compiles a file of C at a kernel's first launch, against Python's headers."""
    found = {}
    if importlib.util.find_spec("triton") is None:
        found["Triton"] = "the layers run in plain PyTorch: pip install 'ssm_lm[gpu]'"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        found["a C compiler"] = "Triton builds its launchers with one: apt install gcc, or set CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        found["Python's headers"] = f"Triton builds its launchers against them: apt install python{_python()}-dev"
    return found


def _python() -> str:
    return sysconfig.get_python_version()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
