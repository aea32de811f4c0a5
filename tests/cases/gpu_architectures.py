"""What three releases of nvcc list as the codes they can write, and an nvcc that only answers questions."""

from __future__ import annotations

from pathlib import Path

__all__ = ["NVCC", "codes", "fake_cuda_home"]

NVCC = {
    "12.4.131": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 90a",
    "12.8.93": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 90a 100 100a 101 101a 120 120a",
    "13.0.88": "75 80 86 87 88 89 90 90a 100 100a 100f 103 103a 103f 110 110a 110f 120 120a 120f 121 121a 121f",
}


def codes(version: str) -> frozenset[str]:
    return frozenset(f"{kind}_{arch}" for arch in NVCC[version].split() for kind in ("sm", "compute"))


def fake_cuda_home(folder: Path, version: str = "13.0.88") -> Path:
    """A CUDA whose nvcc answers `--version`, `--help` and `--dryrun`, and compiles nothing."""
    listed = ",".join(f"'{code}'" for code in sorted(codes(version) | {"lto_90"}))
    answers = {
        "--version": f"Cuda compilation tools, release {version[:4]}, V{version}",
        # Names in running text, and those of another option, are not on offer.
        "--help": f"--gpu-architecture <arch>\n such as sm_20\n Allowed values for this option:  'all','sm_30'.\n\n"
        f"--gpu-code <code>,...\n not compatible with 'sm_40'.\n Allowed values for this option:  {listed}.\n\n",
        "--dryrun": '#$ LIBRARIES=  "-L/a folder/lib"',
    }
    for question, answer in answers.items():
        (folder / question.strip("-")).write_text(answer + "\n")
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\nname=${{1#--}}\n[ -f "{folder}/$name" ] || exit 3\ncat "{folder}/$name"\n')
    nvcc.chmod(0o755)
    return folder
