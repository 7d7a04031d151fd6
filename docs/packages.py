"""What the environment weighs, by purpose: figures/environment.csv, and by package figures/packages.csv.

    make env FOR="test docs lab" && .venv/bin/python docs/packages.py

Sizes to download are the package index's; sizes on disk are those of the environment that runs this."""
import os
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

ROOT = Path(__file__).parents[1]
PURPOSES = {"library": [], "study": ["study"], # and the extras that install it
            "test": ["study", "test"], "docs": ["study", "docs"], "lab": ["study", "lab"]}
PLATFORMS = {"Linux": "x86_64-unknown-linux-gnu", "macOS": "aarch64-apple-darwin", "Windows": "x86_64-pc-windows-msvc"}
PYTORCH = ("torch", "torchvision")
CUDA = re.compile("nvidia-|cuda-|triton$") # what PyPI's builds of torch for Linux pull in, with a GPU or without
MB = 1e6


def locked(extras: list[str], platform: str) -> dict[str, float]: # package -> MB to download
    "What these extras install on a platform, as requirements.lock pins it."
    with TemporaryDirectory() as folder:
        subprocess.run([ROOT/".uv/bin/uv", "pip", "compile", "--quiet", "pyproject.toml", "-c", "requirements.lock",
                        *(word for extra in extras for word in ("--extra", extra)), "--python-version", "3.11",
                        "--python-platform", platform, "--format", "pylock.toml", "-o", f"{folder}/pylock.toml"],
                       cwd=ROOT, check=True, env={**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"})
        packages = tomllib.loads(Path(folder, "pylock.toml").read_text(encoding="utf-8"))["packages"]
    return {p["name"]: max(f["size"] for f in p.get("wheels") or [p["sdist"]]) / MB for p in packages}


def on_disk(package: str) -> float: # MB
    "Unpacked, as it is installed here; NaN where it is not."
    try: files = distribution(package).files or []
    except PackageNotFoundError: return float("nan")
    return sum(f.size or 0 for f in files) / MB


def first(purposes: list[str]) -> str: # as in `PURPOSES`
    "The one that needs a package in any case, or all that do."
    return next((p for p in ("library", "study") if p in purposes), " ".join(purposes))


def by_package() -> pd.DataFrame: # package, purpose, MB to download by platform, MB on disk
    "Every package, with what needs it."
    sizes, needed = {}, {}
    for system, platform in PLATFORMS.items():
        for purpose, extras in PURPOSES.items():
            for package, size in locked(extras, platform).items():
                sizes.setdefault(package, {})[f"download_{system}_mb"] = size
                needed.setdefault(package, []).append(purpose)
    frame = pd.DataFrame([{"package": p, "purpose": first([*dict.fromkeys(needed[p])]), **sizes[p]} for p in sizes])
    frame["unpacked_Linux_mb"] = frame.package.map(on_disk)
    return frame.sort_values(["download_Linux_mb", "package"], ascending=[False, True], ignore_index=True)


def by_purpose(frame: pd.DataFrame) -> pd.DataFrame: # what, packages, MB to download by platform, MB on disk
    "The same in a few lines: the parts, then what a command installs."
    torch = frame.package.isin(PYTORCH)
    cuda = frame.package.str.match(CUDA)
    library = frame.purpose == "library"
    study = library | (frame.purpose == "study")
    parts = {"CUDA and Triton, which torch requires on Linux": cuda, "torch, torchvision": torch,
             "the rest of the library": library & ~torch & ~cuda}
    parts |= {f"what only {p} needs": frame.purpose == p for p in PURPOSES if p != "library"}
    parts["what several of these need"] = frame.purpose.str.contains(" ")
    parts |= {"make study": study, "make study TORCH=keep": study & ~torch & ~cuda,
              "everything": frame.package.notna()}
    rows = [{"what": what, "packages": sum(rows), **frame[rows].select_dtypes("number").sum()}
            for what, rows in parts.items()]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    packages = by_package()
    packages.round(2).to_csv(ROOT/"figures/packages.csv", index=False)
    summary = by_purpose(packages)
    whole = summary.round(0).astype({c: int for c in summary if c != "what"})
    whole.to_csv(ROOT/"figures/environment.csv", index=False)
    print(whole.to_string())
